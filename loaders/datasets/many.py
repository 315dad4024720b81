"""What data sets of millions of image files share: one look into each folder, no Path and no stat for a file."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..decode import read_bytes
from .base import Dataset, Encoded
from .labels import complete_splits

_SUFFIXES = (".jpeg", ".jpg", ".png")


class Group(NamedTuple):
    """Images of one class in one folder.

    Attributes:
        label: class index.
        folder: that they are in.
        files: their names, in the order that they are to have.
    """

    label: int
    folder: Path
    files: list[str]


class ManyFiles(Encoded):
    """Images in files, group after group; takes the bytes of their names, and 8 more for each.

    Args:
        groups: of images, at least one of them in all.
    """

    def __init__(self, groups: list[Group]) -> None:
        names = [os.fsencode("\0".join([*g.files, ""])) for g in groups if g.files]
        self._names = b"".join(names)
        self._end_N = np.flatnonzero(np.frombuffer(self._names, dtype=np.uint8) == 0)
        self._folders = [os.fspath(g.folder) for g in groups if g.files]
        self._last_G = np.cumsum([len(g.files) for g in groups if g.files])
        assert len(self._end_N) == self._last_G[-1]

    def name(self, index: int) -> str:
        start = int(self._end_N[index - 1]) + 1 if index else 0
        file = os.fsdecode(self._names[start : int(self._end_N[index])])
        return os.path.join(self._folders[int(np.searchsorted(self._last_G, index, side="right"))], file)

    def encoded(self, index: int) -> np.ndarray:
        return read_bytes(Path(self.name(index)))

    def fingerprint(self, samples: int) -> str:
        about = hashlib.sha256()
        for name in map(self.name, range(samples)):
            found = os.stat(name)
            about.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        return about.hexdigest()

    def total_bytes(self, samples: int) -> int:
        return sum(os.stat(name).st_size for name in map(self.name, range(samples)))


def grouped(
    name: str, root: Path, classes: tuple[str, ...], groups_by_split: dict[str, list[Group]], val_share: float
) -> Dataset:
    """The data set of these images, split by split, completed as :func:`~.labels.complete_splits` does it.

    Its fingerprint depends on the names of all files and of their folders below ``root``.
    """
    groups = [group for some in groups_by_split.values() for group in some]
    targets_N = np.repeat([g.label for g in groups], [len(g.files) for g in groups]).astype(np.int64)
    given, first, about = {}, 0, hashlib.sha256()
    for split, some in groups_by_split.items():
        count = sum(len(g.files) for g in some)
        given[split] = np.arange(first, first + count)
        first += count
    for g in groups:
        about.update(os.fsencode("\0".join([os.path.relpath(g.folder, root), *g.files, ""])))
    splits = complete_splits(targets_N, given, val_share)
    return Dataset(name, classes, targets_N, ManyFiles(groups), splits, str(root), about.hexdigest())


def look(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders, and of the images, in a folder; both sorted, without those that begin with a dot.

    Raises:
        ValueError: it cannot be read.
    """
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if name.lower().endswith(_SUFFIXES):
                    files.append(name)
                elif entry.is_dir():
                    folders.append(name)
    except OSError as error:
        raise ValueError(f"cannot read the folder {folder}: {error.strerror}") from error
    return sorted(folders), sorted(files)


def images_by_class(folder: Path) -> dict[str, list[str]]:
    """Names of the images in each of a folder's class folders, all sorted.

    Raises:
        ValueError: there are no class folders, or one without images.
    """
    names, _ = look(folder)
    if not names:
        raise ValueError(f"data.root: {folder} has no class folders")
    files_by_class = {name: look(folder / name)[1] for name in names}
    for name, files in files_by_class.items():
        if not files:
            raise ValueError(f"data.root: the class folder {folder / name} holds no images (.JPEG, .jpg, .png)")
    return files_by_class


def check_count(folder: Path, found: int, published: int) -> None:
    """Raises ``ValueError`` where a folder of the complete data set holds fewer or more images than were published."""
    if found != published:
        raise ValueError(
            f"data.root: {folder} holds {found:,} images, and {published:,} were published: unpack it again, or set "
            "data.verify to false if it is meant to differ"
        )
