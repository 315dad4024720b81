"""What a data set is here: images or videos that can be read by index, labels, and fixed splits."""

import hashlib
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..crop import centre_square
from ..decode import decode, image_size, read_bytes
from ..order import order
from ..video.base import Clips

_SPLIT_SEED = 0  # splits are part of a data set: no setting changes who is in them


@dataclass(frozen=True)
class Dataset:
    """Labelled images, or labelled videos.

    Attributes:
        name: of the data set.
        classes: names, in the order of the class indices.
        targets_N: int64 [N], class indices; or float32 [N, C], 1 where an image shows a class, 0 where it does not, -1
            where that is not to be counted (multi-label).
        read: index -> uint8 [H, W, 3]; raises ``ValueError`` with the file's name for an image that cannot be read. For
            videos it is a :class:`Clips`, which gives any frames of a video; called with an index, the middle one.
        splits: ``train``, ``val`` and ``test`` -> int64 indices, ascending, disjoint.
        source: where it came from, for the run's log.
        content: fingerprint of the pixels, or of which files they are in, where one is known, or empty.
    """

    name: str
    classes: tuple[str, ...]
    targets_N: np.ndarray
    read: Callable[[int], np.ndarray]
    splits: dict[str, np.ndarray]
    source: str
    content: str = ""

    @property
    def multi_label(self) -> bool:
        return self.targets_N.ndim == 2

    @property
    def video(self) -> bool:
        """Whether the samples are videos: ``read`` is a :class:`Clips`."""
        return isinstance(self.read, Clips)

    def __len__(self) -> int:
        return len(self.targets_N)

    def identity(self) -> str:
        """A short fingerprint of names, labels and splits: what soft targets of it are bound to."""
        parts = [self.name, *self.classes, self.targets_N.tobytes().hex()]
        parts += [self.content] if self.content else []
        parts += [f"{k}:{v.tobytes().hex()}" for k, v in sorted(self.splits.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


class Pixels:
    """``read`` for images that lie in memory as one array [N, H, W, C] or [N, H, W]; grey becomes three channels."""

    def __init__(self, image_NHWC: np.ndarray) -> None:
        self.image_NHWC = image_NHWC if image_NHWC.ndim == 4 else image_NHWC[..., None]

    def __call__(self, index: int) -> np.ndarray:
        image_HWC = self.image_NHWC[index]
        return image_HWC if image_HWC.shape[2] == 3 else np.repeat(image_HWC, 3, axis=2)


class Encoded:
    """``read`` for images that are kept encoded, one a sample: what loaders that decode by themselves ask.

    A kind of data set supplies :meth:`encoded` and :meth:`name`.
    """

    def encoded(self, index: int) -> np.ndarray:
        """The image file's content: uint8 [bytes], read-only perhaps; raises ``ValueError`` naming it."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call the sample in messages: its path, or archive and member."""
        raise NotImplementedError

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels as decoded; raises ``ValueError`` naming it."""
        return image_size(self.encoded(index), self.name(index))

    def fingerprint(self, samples: int) -> str:
        """Changes when the files of samples 0 .. ``samples`` - 1 do, as far as their names (sizes, times) tell."""
        return hashlib.sha256("\n".join(map(self.name, range(samples))).encode()).hexdigest()

    def total_bytes(self, samples: int) -> int:
        """Size of the files of samples 0 .. ``samples`` - 1; 0 where that is not known without reading them."""
        return 0

    def __call__(self, index: int) -> np.ndarray:
        return decode(self.encoded(index), self.name(index))


class Files(Encoded):
    """Images in files."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def encoded(self, index: int) -> np.ndarray:
        return read_bytes(self.paths[index])

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def fingerprint(self, samples: int) -> str:
        about = [(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in self.paths[:samples]]
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def total_bytes(self, samples: int) -> int:
        return sum(p.stat().st_size for p in self.paths[:samples])


def stored_pixels(
    dataset: Dataset, index_N: np.ndarray, side: int, read: Callable[[int], np.ndarray] | None = None
) -> torch.Tensor:
    """The images ``index_N``, decoded: uint8 [N, H, W, 3]; their centre squares at ``side`` pixels unless it is 0.

    ``read`` stands in for ``dataset.read``.

    Raises:
        ValueError: an image cannot be read, or the images differ in size and ``side`` is 0.
    """

    def load(index: int) -> np.ndarray:
        image_HWC = (read or dataset.read)(index)
        return centre_square(image_HWC, side) if side else image_HWC

    first = load(int(index_N[0]))
    store_NHWC = np.empty((len(index_N), *first.shape), dtype=np.uint8)
    with ThreadPoolExecutor() as pool:
        for row, image_HWC in enumerate(pool.map(load, index_N.tolist())):
            if image_HWC.shape != first.shape:
                raise ValueError(
                    f"the images of {dataset.name} differ in size ({first.shape[1]} x {first.shape[0]} and "
                    f"{image_HWC.shape[1]} x {image_HWC.shape[0]} pixels): set data.stored to one side, or "
                    "data.loader to torch"
                )
            store_NHWC[row] = image_HWC
    return torch.from_numpy(store_NHWC)


def labelled_part(targets_N: np.ndarray, index_M: np.ndarray, count: int) -> np.ndarray:
    """``count`` of the indices, their classes in the proportion of all; a smaller count is a part of a larger one.

    Raises:
        ValueError: fewer than one image a class, or more than there are.
    """
    if targets_N.ndim == 2:
        raise ValueError("data.labelled: parts of a multi-label data set are not made; give it an index list instead")
    classes = np.unique(targets_N[index_M])
    if not len(classes) <= count <= len(index_M):
        raise ValueError(
            f"data.labelled: {count} is not between {len(classes)} (the classes) and {len(index_M)} (the images)"
        )
    # every image's place among its class, as a share: the first `count` by share hold each class in proportion
    place_M = np.empty(len(index_M))
    for label in classes:
        member = np.flatnonzero(targets_N[index_M] == label)
        place_M[member[order(_SPLIT_SEED, 1, len(member))]] = (np.arange(len(member)) + 0.5) / len(member)
    return np.sort(index_M[np.argsort(place_M, kind="stable")[:count]])


def split_off(stratum_M: np.ndarray, index_M: np.ndarray, share: float, purpose: int) -> tuple[np.ndarray, np.ndarray]:
    """Parts indices into (rest, held out), ``share`` of every stratum being held out; a fixed function of its input.

    Args:
        stratum_M: what to keep in proportion, an integer for each of ``index_M``.
        index_M: the indices to part.
        share: of every stratum, to be held out, rounded to whole images.
        purpose: a number that tells one such parting of a data set from another.
    """
    held = np.zeros(len(index_M), dtype=bool)
    for label in np.unique(stratum_M):
        member = np.flatnonzero(stratum_M == label)
        held[member[order(_SPLIT_SEED, purpose, len(member))[: round(share * len(member))]]] = True
    return np.sort(index_M[~held]), np.sort(index_M[held])


def split_off_groups(
    stratum_M: np.ndarray, group_M: np.ndarray, index_M: np.ndarray, share: float, purpose: int
) -> tuple[np.ndarray, np.ndarray]:
    """Parts indices as :func:`split_off` does, but no group of a stratum is on both sides.

    Groups are held out, in an order that is random but fixed, as long as each brings its stratum nearer to ``share``;
    one that is too large for that is passed over, and one group of each stratum always stays.

    Args:
        stratum_M: what to keep in proportion, an integer for each of ``index_M``.
        group_M: int64, which group of its stratum each belongs to.
        index_M: the indices to part.
        share: of every stratum, to be held out.
        purpose: a number that tells one such parting of a data set from another.
    """
    held = np.zeros(len(index_M), dtype=bool)
    for label in np.unique(stratum_M):
        member = np.flatnonzero(stratum_M == label)
        groups, size_G = np.unique(group_M[member], return_counts=True)
        missing, left = share * len(member), len(groups) - 1
        for g in order(_SPLIT_SEED, purpose, len(groups)):
            if left and abs(missing - size_G[g]) < missing:
                held[member[group_M[member] == groups[g]]] = True
                missing, left = missing - size_G[g], left - 1
    return np.sort(index_M[~held]), np.sort(index_M[held])


def train_val_test(targets_N: np.ndarray, train_M: np.ndarray, test_M: np.ndarray, val_share: float) -> dict:
    """The splits of a data set that comes with training and test images: ``val_share`` of the former validates."""
    train, val = split_off(targets_N[train_M], train_M, val_share, purpose=2)
    return {"train": train, "val": val, "test": np.sort(test_M)}


def checked(path: Path, md5: str | None) -> bytes:
    """A file's bytes.

    Raises:
        ValueError: missing, unreadable, or its MD5 is not ``md5`` (None: not compared).
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    if md5 is not None and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise ValueError(
            f"{path} is not the published file (MD5 differs; CRC {zlib.crc32(content):08x}): fetch it again, or set "
            "data.verify to false if it is meant to differ"
        )
    return content
