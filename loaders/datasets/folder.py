"""A tree of image files, one folder a class."""

from pathlib import Path

import numpy as np

from .base import Dataset, Files, split_off

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}


def image_folder(root: Path, *, val_share: float, verify: bool = True) -> Dataset:
    """``ROOT/train/CLASS/*`` with ``ROOT/val/CLASS/*`` and, if there, ``ROOT/test/CLASS/*``; or ``ROOT/CLASS/*``.

    Classes are the sub-folders of ``train``, in the order of their names. A split that is not there is parted off, the
    same way every time: 20 % test from a flat ``ROOT/CLASS`` tree, ``val_share`` of the training images for validation.
    With ``train`` and ``val`` but no ``test`` (as in ImageNet), ``val`` is the test split and validation images are
    parted off the training ones: what selects is not what is reported.

    Raises:
        ValueError: no class folder, an empty one, or a class that ``train`` does not have.
    """
    given = [s for s in ("train", "val", "test") if (root / s).is_dir()]
    if "train" not in given:
        paths, targets, classes = _scan(root, None)
        index_N, targets_N = np.arange(len(paths)), np.array(targets, dtype=np.int64)
        rest, test = split_off(targets_N, index_N, 0.2, purpose=3)
        train, val = split_off(targets_N[rest], rest, val_share, purpose=2)
        return Dataset(
            "folder", classes, targets_N, Files(paths), {"train": train, "val": val, "test": test}, str(root)
        )
    paths, targets, classes = _scan(root / "train", None)
    splits = {"train": np.arange(len(paths))}
    for split in given[1:]:
        more_paths, more_targets, _ = _scan(root / split, classes)
        splits[split] = np.arange(len(paths), len(paths) + len(more_paths))
        paths, targets = paths + more_paths, targets + more_targets
    targets_N = np.array(targets, dtype=np.int64)
    if "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    if "test" not in splits:
        splits["train"], splits["test"] = split_off(targets_N[splits["train"]], splits["train"], 0.2, purpose=3)
    if "val" not in splits:
        train = splits["train"]
        splits["train"], splits["val"] = split_off(targets_N[train], train, val_share, purpose=2)
    return Dataset("folder", classes, targets_N, Files(paths), splits, str(root))


def _scan(folder: Path, classes: tuple[str, ...] | None) -> tuple[list[Path], list[int], tuple[str, ...]]:
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not names:
        raise ValueError(f"data.root: {folder} has no class folders")
    if classes is not None and set(names) - set(classes):
        raise ValueError(
            f"data.root: {folder} has classes that train does not have: {sorted(set(names) - set(classes))}"
        )
    paths, targets = [], []
    for label, name in enumerate(classes or names):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not found and name in names:
            raise ValueError(f"data.root: the class folder {folder / name} holds no images")
        paths += found
        targets += [label] * len(found)
    return paths, targets, classes or names
