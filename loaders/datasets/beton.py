"""A packed data set: one ``.beton`` file (``fasttrain pack``, or FFCV's writer) and what lies beside it."""

import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np

from ..beton import RAW, Beton, read_beton
from ..decode import decode
from ..seek import TAG
from ..video.packed import PackedClips, packed_clips
from .base import Dataset, Encoded, split_off

_MAX_CLASSES = 100_000  # where nothing names them: a label beyond is no class
_MAX_SIDE_FILE = 1 << 28  # bytes; that of 10 million images in random splits has 50 MB


class Packed(Encoded):
    """Images in a ``.beton``, through a memory map: only what is looked at is read."""

    def __init__(self, file: Beton) -> None:
        self.file = file
        self.raw_N = file.mode_N == RAW

    @cached_property
    def data(self) -> np.ndarray:
        """The whole file: uint8, read-only."""
        try:
            data = np.memmap(self.file.path, dtype=np.uint8, mode="r").view(np.ndarray)
        except (OSError, ValueError) as error:  # ValueError: it is empty now
            raise ValueError(f"cannot read {self.file.path}: {error}") from error
        if len(data) < int((self.file.ptr_N + self.file.size_N).max()):  # compiled code does not ask again
            raise ValueError(f"cannot read {self.file.path}: it was cut off since it was opened")
        return data

    @cached_property
    def indexed(self) -> bool:
        """Whether the first JPEG has a seek index before it (``loaders/seek.py``): a guess at what samples cost."""
        first = np.flatnonzero(~self.raw_N)[:1]
        at = int(self.file.ptr_N[first[0]]) if len(first) else 0
        return self.data[at - len(TAG) : at].tobytes() == TAG if at else False

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
    file, beside = read_beton(root), side_file(root)
    labels, about = file.targets_N, read_side_file(beside) if beside.is_file() else None
    if about is not None and verify:
        _compare(root, file, about)
    if about is None and labels.ndim == 2:
        raise ValueError(f"{root} holds label vectors, and there is no {beside.name} that names their classes")
    count = min(int(labels.max()) + 1, _MAX_CLASSES) if about is None else len(about["classes"])
    if labels.ndim == 1 and not 0 <= labels.min() <= labels.max() < count:
        raise ValueError(f"{root}: labels go from {labels.min()} to {labels.max()}, and there are {count} classes")
    if labels.ndim == 2 and labels.shape[1] != count:
        raise ValueError(f"{root}: labels are for {labels.shape[1]} classes, and {count} are named")
    if labels.ndim == 2 and not ((labels == 0) | (labels == 1) | (labels == -1)).all():
        raise ValueError(f"{root}: its label vectors are not of 1 (shown), 0 (not shown) and -1 (not counted)")
    read: Packed | PackedClips = Packed(file)
    if about is not None:
        if "videos" in about:
            read = packed_clips(Packed(file), about["videos"], str(beside))
            labels = labels[read.first_V[:-1]]
        splits = {k: _expand(v, len(labels), f"{beside}: its split {k}") for k, v in about["splits"].items()}
        if (np.bincount(np.concatenate(list(splits.values())), minlength=1) > 1).any():
            raise ValueError(f"{beside}: a sample is in two of its splits")
        name, classes, content = about["name"], tuple(about["classes"]), about["sha256"]
    else:
        rest, test = split_off(labels, np.arange(len(file)), 0.2, purpose=3)
        train, val = split_off(labels[rest], rest, val_share, purpose=2)
        splits = {"train": train, "val": val, "test": test}
        name, classes, content = "beton", tuple(map(str, range(count))), file.head_sha256
    return Dataset(name, classes, labels, read, splits, str(root), content=content)


def compress(index_M: np.ndarray) -> list[list[int]]:
    """Ascending indices as runs [first, behind the last]."""
    breaks = np.flatnonzero(np.diff(index_M) != 1) + 1
    return [[int(r[0]), int(r[-1]) + 1] for r in np.split(index_M, breaks) if len(r)]


def _expand(runs: list[list[int]], samples: int, what: str) -> np.ndarray:
    try:
        if not all(type(edge) is int for run in runs for edge in run):
            raise TypeError
        edge_R2 = np.array(runs, dtype=np.int64).reshape(len(runs), 2)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{what} is no list of runs [first, behind the last]") from None
    if edge_R2.min(initial=0) < 0 or edge_R2.max(initial=0) > samples:
        raise ValueError(f"{what} names samples beyond the {samples} of the file")
    if (np.diff(edge_R2.ravel()) < 0).any():
        raise ValueError(f"{what} does not ascend")
    return np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(a, b) for a, b in edge_R2)])


def read_side_file(path: Path) -> dict:
    """What ``fasttrain pack`` wrote beside a packed file.

    Raises:
        ValueError: it is not there, or not what ``fasttrain pack`` writes.
    """
    try:
        if path.stat().st_size > _MAX_SIDE_FILE:
            raise ValueError(f"it has more than {_MAX_SIDE_FILE} bytes")
        about = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    kinds = {"name": str, "classes": list, "splits": dict, "samples": int, "bytes": int}
    kinds |= dict.fromkeys(("classes_sha256", "sha256", "head_sha256"), str)
    lacks = [k for k, kind in kinds.items() if not isinstance(about, dict) or not isinstance(about.get(k), kind)]
    if lacks:
        raise ValueError(f"{path} lacks {', '.join(lacks)}: it was not made by fasttrain pack")
    if not all(isinstance(c, str) for c in about["classes"]) or set(about["splits"]) != {"train", "val", "test"}:
        raise ValueError(f"{path}: classes are to be names, and splits train, val and test")
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
