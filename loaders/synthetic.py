"""The ``synthetic`` loader: one batch, served again and again. What a training reaches with it is what its steps allow."""

from collections.abc import Iterator

import numpy as np
import torch

from .base import EpochLoader, LoaderSpec
from .batch import Batch


class SyntheticLoader(EpochLoader):
    """Random pixels that lie on the device already, with as many batches an epoch as the data set has.

    Indices, labels and views are those of an epoch's first batch: nothing can be learned from it.
    """

    def __init__(self, spec: LoaderSpec, device: torch.device | str = "cpu") -> None:
        super().__init__(spec, device)
        self._kept: dict[tuple[int, int], Batch] = {}

    def _load(self, epoch: int, walk: Iterator[np.ndarray]) -> Iterator[Batch]:
        size = self.spec.size_at(epoch)
        for index_B in walk:
            key = (size, len(index_B))
            if key not in self._kept:
                self._kept = {k: v for k, v in self._kept.items() if k[0] == size} | {key: self._make(index_B, size)}
            yield self._kept[key]

    def _make(self, index_B: np.ndarray, size: int) -> Batch:
        generator = torch.Generator().manual_seed(self.spec.seed)

        def random(side: int) -> torch.Tensor:
            pixels = torch.randint(0, 256, (len(index_B), side, side, 3), dtype=torch.uint8, generator=generator)
            return pixels.to(self.device).permute(0, 3, 1, 2)

        still = random(self.spec.still) if self.spec.still else None
        index_B, frames = index_B // self.spec.shows, self.spec.clip.served if self.spec.clip else 0
        pixels = random(size)
        if frames:
            # every frame another part of the same random numbers
            rolled = [pixels.roll(t, dims=-1) for t in range(frames)]
            pixels = torch.stack(rolled, dim=2).contiguous(memory_format=torch.channels_last_3d)
        return self._batch_of(pixels, index_B, np.zeros(len(index_B), dtype=np.int64), still)

    def describe(self) -> str:
        return f"synthetic: one batch of random pixels on {self.device}, again and again"
