"""What all loaders share: the walk through an epoch, the position in it, and the views of a batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .batch import Batch
from .datasets import Dataset
from .order import batch_count, batches, order
from .views import View, ViewPlan


@dataclass(frozen=True)
class LoaderSpec:
    """What to load; every back end takes the same, and serves the same batches for it.

    Attributes:
        dataset: where the images are.
        index_N: int64, the indices to serve (a split, or a part of one).
        plan: the views to take.
        size: side in pixels of the images served.
        stored: side in pixels to which the images' centre squares are brought before any view; 0 leaves them as they
            are.
        batch: samples a step, over all ranks.
        seed: of the order.
        view_seed: of the views.
        shuffle: in ``order(seed, epoch)``, or as in ``index_N``.
        drop_last: leave out a last batch that is not full.
        still: side in pixels of the additional view for the sources; 0 for none.
        rank, ranks: which part of every batch to serve.
    """

    dataset: Dataset
    index_N: np.ndarray
    plan: ViewPlan
    size: int
    stored: int
    batch: int
    seed: int = 0
    view_seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    still: int = 0
    rank: int = 0
    ranks: int = 1

    def view(self, epoch: int, index_B: np.ndarray, height_B, width_B) -> View:
        """The views of samples in an epoch; ``height_B``, ``width_B`` are the sizes of the images as stored."""
        return self.plan(seed=self.view_seed, epoch=epoch, index_B=index_B, height_B=height_B, width_B=width_B)


class EpochLoader:
    """Walks through epochs and keeps the position. A back end supplies ``_load(epoch, batches of indices)``."""

    def __init__(self, spec: LoaderSpec, device: torch.device | str = "cpu") -> None:
        self.spec = spec
        self.device = torch.device(device)
        self._epoch, self._batch = 0, 0

    def __len__(self) -> int:
        return batch_count(len(self.spec.index_N), self.spec.batch, self.spec.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        spec = self.spec
        index_N = spec.index_N
        if spec.shuffle:
            index_N = index_N[order(spec.seed, self._epoch, len(index_N))]
        walk = batches(
            index_N,
            global_batch=spec.batch,
            drop_last=spec.drop_last,
            start=self._batch,
            rank=spec.rank,
            ranks=spec.ranks,
        )
        for batch in self._load(self._epoch, walk):
            self._batch += 1
            yield batch
        self.set_epoch(self._epoch + 1)

    def _load(self, epoch: int, walk: Iterator[np.ndarray]) -> Iterator[Batch]:
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        self._epoch, self._batch = epoch, 0

    def describe(self) -> str:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._batch = state["epoch"], state["batch"]

    def _batch_of(self, pixels: torch.Tensor, index_B: np.ndarray, number_B: np.ndarray, still=None) -> Batch:
        targets_B = torch.from_numpy(self.spec.dataset.targets_N[index_B])
        index, number = (torch.from_numpy(a).to(self.device) for a in (index_B, number_B))
        return Batch(pixels, targets_B.to(self.device), index, number, still)
