"""Videos that lie in memory, some of which cannot be read."""

from collections.abc import Iterator

import numpy as np
from fasttrain.loaders import Dataset
from fasttrain.loaders.video import Clips


class MemoryClips(Clips):
    """Random frames. ``broken``: videos -> the first frame that cannot be decoded, -1 for none at all."""

    def __init__(self, shape_N3: list[tuple[int, int, int]], broken: dict[int, int] | None = None) -> None:
        rng = np.random.default_rng(0)
        self.videos = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shape_N3]
        self.broken = broken or {}
        self.shape_N3 = np.array(shape_N3, dtype=np.int64)
        self.shape_N3[[i for i, first in self.broken.items() if first < 0], 0] = 0

    def name(self, index: int) -> str:
        return f"video{index}"

    def why(self, index: int) -> str:
        return "it is broken" if not self.shape_N3[index, 0] else ""

    def frames(self, index: int, frame_T: np.ndarray) -> np.ndarray:
        if index in self.broken and (frame_T >= self.broken[index]).any():
            raise ValueError(f"cannot read the video video{index}: frame {self.broken[index]} is damaged")
        return self.videos[index][frame_T]

    def every(self, index: int) -> Iterator[np.ndarray]:
        for t in range(len(self.videos[index])):
            yield self.frames(index, np.array([t]))[0]

    def fingerprint(self, samples: int) -> str:
        return f"{samples} in memory"


def videos(shape_N3, broken=None, classes: int = 2) -> Dataset:
    """A data set of them; every third is for the test, every fourth of the others validates."""
    n = len(shape_N3)
    index_N = np.arange(n)
    rest = index_N[index_N % 3 != 2]
    splits = {"train": np.delete(rest, np.s_[3::4]), "val": rest[3::4], "test": index_N[index_N % 3 == 2]}
    names = tuple(f"class{c}" for c in range(classes))
    return Dataset("memory", names, index_N % classes, MemoryClips(shape_N3, broken), splits, "memory")
