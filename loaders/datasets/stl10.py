"""STL-10's labelled part, from its binary files as torchvision lays them out."""

from pathlib import Path

import numpy as np

from .base import Dataset, Pixels, checked, train_val_test
from .labels import read_text


def stl10(root: Path, *, val_share: float, verify: bool = True) -> Dataset:
    """STL-10: 5,000 labelled + 8,000 test images of 96 x 96, in ``ROOT/stl10_binary``."""
    from torchvision import datasets as tv  # slow to import; it has the files' names and checksums

    folder = root / tv.STL10.base_folder
    if not folder.is_dir():
        raise ValueError(f"data.root: {root} has no folder {tv.STL10.base_folder}")
    md5 = dict([*tv.STL10.train_list, *tv.STL10.test_list]) if verify else {}
    contents, targets = [], []
    for part in ("train", "test"):
        contents.append(checked(folder / f"{part}_X.bin", md5.get(f"{part}_X.bin")))
        labels = np.frombuffer(checked(folder / f"{part}_y.bin", md5.get(f"{part}_y.bin")), dtype=np.uint8)
        if not len(labels) or len(contents[-1]) != len(labels) * 3 * 96 * 96:
            raise ValueError(f"{folder}/{part}_X.bin and {part}_y.bin do not hold equally many images and labels")
        targets.append(labels.astype(np.int64) - 1)
    names = read_text(folder / "class_names.txt").split()
    targets_N = np.concatenate(targets)
    if targets_N.min() < 0 or targets_N.max() >= len(names):
        raise ValueError(
            f"{folder}: labels go from {targets_N.min() + 1} to {targets_N.max() + 1}, not 1 to {len(names)}"
        )
    image_NHWC = np.empty((len(targets_N), 96, 96, 3), dtype=np.uint8)
    stored = [np.frombuffer(content, dtype=np.uint8).reshape(-1, 3, 96, 96) for content in contents]
    np.concatenate([part.transpose(0, 3, 2, 1) for part in stored], out=image_NHWC)  # stored column by column
    index_N = np.arange(len(targets_N))
    splits = train_val_test(targets_N, index_N[: len(targets[0])], index_N[len(targets[0]) :], val_share)
    return Dataset("stl10", tuple(names), targets_N, Pixels(image_NHWC), splits, str(folder))
