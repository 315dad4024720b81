"""A packed data set: one ``.beton`` file (``fasttrain pack``, or FFCV's writer) and what lies beside it."""

import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np

from ..beton import RAW, Beton, read_beton
from ..decode import decode
from .base import Dataset, Encoded, split_off


class Packed(Encoded):
    """Images in a ``.beton``, through a memory map: only what is looked at is read."""

    def __init__(self, file: Beton) -> None:
        self.file = file
        self.raw_N = file.mode_N == RAW

    @cached_property
    def data(self) -> np.ndarray:
        """The whole file: uint8, read-only."""
        return np.memmap(self.file.path, dtype=np.uint8, mode="r").view(np.ndarray)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "data"}

    def encoded(self, index: int) -> np.ndarray:
        start = int(self.file.ptr_N[index])
        return self.data[start : start + int(self.file.size_N[index])]

    def raw(self, index: int) -> np.ndarray | None:
        """uint8 [H, W, 3] of a sample that is kept as pixels; None of a JPEG."""
        return self.encoded(index).reshape(*self.size(index), 3) if self.raw_N[index] else None

    def name(self, index: int) -> str:
        return f"{self.file.path}, sample {index}"

    def size(self, index: int) -> tuple[int, int]:
        return int(self.file.height_N[index]), int(self.file.width_N[index])

    def __call__(self, index: int) -> np.ndarray:
        raw = self.raw(index)
        if raw is not None:
            return raw.copy()
        image_HWC = decode(self.encoded(index), self.name(index))
        if image_HWC.shape[:2] != self.size(index):
            raise ValueError(f"cannot read the image {self.name(index)}: its size is not that of its record")
        return image_HWC


def side_file(path: Path) -> Path:
    """Where class names, splits and checksums of a packed file are."""
    return path.with_name(path.name + ".json")


def classes_sha256(classes: list[str] | tuple[str, ...]) -> str:
    """Fingerprint of a class list: names in their order."""
    return hashlib.sha256(json.dumps(list(classes)).encode()).hexdigest()


def beton(root: Path, *, val_share: float, verify: bool = True) -> Dataset:
    """A packed file; ``root`` is the file itself.

    With ``FILE.json`` beside it: its name, classes and splits are those of the data set that was packed. Without (FFCV's
    own writer): classes are numbers, 20 % are parted off for the test and ``val_share`` for validation.

    Args:
        root: the ``.beton``.
        val_share: used only where there is no ``FILE.json``.
        verify: compare size, records and class list with their checksums (not the pixels: ``fasttrain pack --check``).

    Raises:
        ValueError: damaged, cut off, changed since it was packed, or labels beyond the class list.
    """
    file = read_beton(root)
    beside = side_file(root)
    if not beside.is_file():
        if file.targets_N.ndim == 2:
            raise ValueError(f"{root} holds label vectors, and there is no {beside.name} that names their classes")
        classes = tuple(map(str, range(int(file.targets_N.max(initial=-1)) + 1)))
        rest, test = split_off(file.targets_N, np.arange(len(file)), 0.2, purpose=3)
        train, val = split_off(file.targets_N[rest], rest, val_share, purpose=2)
        splits = {"train": train, "val": val, "test": test}
        name, content = "beton", file.head_sha256
    else:
        about = _beside(beside)
        classes, name, content = tuple(about["classes"]), about["name"], about["sha256"]
        if verify:
            _compare(root, file, about)
        splits = {k: _expand(v) for k, v in about["splits"].items()}
        if any(len(v) and v[-1] >= len(file) for v in splits.values()):
            raise ValueError(f"{beside}: its splits name samples beyond the {len(file)} of {root}")
    labels = file.targets_N
    if labels.ndim == 1 and len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(
            f"{root}: labels go from {labels.min()} to {labels.max()}, and there are {len(classes)} classes"
        )
    if labels.ndim == 2 and labels.shape[1] != len(classes):
        raise ValueError(f"{root}: labels are for {labels.shape[1]} classes, and {len(classes)} are named")
    return Dataset(name, classes, labels, Packed(file), splits, str(root), content=content)


def compress(index_M: np.ndarray) -> list[list[int]]:
    """Ascending indices as runs [first, behind the last]."""
    breaks = np.flatnonzero(np.diff(index_M) != 1) + 1
    return [[int(r[0]), int(r[-1]) + 1] for r in np.split(index_M, breaks) if len(r)]


def _expand(runs: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.arange(a, b) for a, b in runs]) if runs else np.zeros(0, dtype=np.int64)


def _beside(path: Path) -> dict:
    try:
        about = json.loads(path.read_text())
        missing = {"name", "classes", "classes_sha256", "splits", "bytes", "sha256", "head_sha256"} - set(about)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}: it was not made by fasttrain pack")
    return about


def _compare(path: Path, file: Beton, about: dict) -> None:
    size = path.stat().st_size
    if size != about["bytes"]:
        raise ValueError(f"{path} has {size} bytes, and {about['bytes']} were packed: it is cut off, or another file")
    if file.head_sha256 != about["head_sha256"]:
        raise ValueError(
            f"{path} has changed since it was packed: its records are not those that {path.name}.json knows"
        )
    if classes_sha256(about["classes"]) != about["classes_sha256"]:
        raise ValueError(f"{path}.json: the class list has changed since the set was packed")
