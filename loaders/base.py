"""What all loaders share: the walk through an epoch, the position in it, and the views of a batch."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from .batch import Batch
from .clips import ClipPlan
from .datasets import Dataset
from .order import balanced_order, batch_count, batches, order, part_sizes
from .puzzle import Puzzle
from .views import View, ViewPlan

BadSamples = Literal["error", "skip"]
_TRIES = 100  # samples in a row that may be bad before that is an error whatever is asked


@dataclass(frozen=True)
class Growth:
    """Progressive resizing: the images' side grows while the training goes on.

    Attributes:
        size: side in pixels up to epoch ``start``.
        start, end: epochs between which it grows to ``LoaderSpec.size``, linearly.
        step: sides are multiples of this, in pixels (the first and the last side are as given).
    """

    size: int
    start: int
    end: int
    step: int = 32

    def at(self, epoch: int, last: int) -> int:
        """Side in pixels in an epoch, ``last`` being the final one."""
        if epoch <= self.start:
            return self.size
        if epoch >= self.end:
            return last
        grown = self.size + (last - self.size) * (epoch - self.start) / (self.end - self.start)
        return min(max(round(grown / self.step) * self.step, self.size), last)


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
        rank, ranks: whose share of every batch to serve, of how many.
        parts: into which a batch is cut, a multiple of ``ranks``, which share them out; 0: one a rank.
        growth: serve smaller images in the first epochs; None for ``size`` always.
        balance: draw every class equally often; an epoch is as long as before, and samples of small classes come
            several times in it (as the same view).
        on_bad_sample: a sample that cannot be read is an ``error``, or skipped: the next of ``index_N`` that can be
            read stands in for it, with its own index, label and view.
        clip: serve clips of videos; None serves images (of a video, its middle frame).
        puzzle: make puzzles of the images, whose orders are then the labels; None serves the images.
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
    parts: int = 0
    growth: Growth | None = None
    balance: bool = False
    on_bad_sample: BadSamples = "error"
    clip: ClipPlan | None = None
    puzzle: Puzzle | None = None

    @property
    def shows(self) -> int:
        """How often an epoch shows each sample."""
        return self.clip.shows if self.clip else 1

    @property
    def unit(self) -> int:
        """Samples that stay together when a batch is cut."""
        return 2 if self.puzzle else 1

    def shares(self, n: int) -> tuple[int, ...]:
        """Sizes of this rank's parts of a global batch of ``n`` samples, those that are not empty."""
        parts = self.parts or self.ranks
        each = parts // self.ranks
        sizes = part_sizes(n, parts, self.unit)[self.rank * each : (self.rank + 1) * each]
        return tuple(size for size in sizes if size)

    def size_at(self, epoch: int) -> int:
        """Side in pixels of the images served in an epoch."""
        return self.growth.at(epoch, self.size) if self.growth else self.size

    def epoch_order(self, epoch: int) -> np.ndarray:
        """What is served in an epoch, over all ranks: int64 [N * shows], each index * shows + show."""
        if self.balance:
            index_N = self.index_N[balanced_order(self.seed, epoch, self.dataset.targets_N[self.index_N])]
        elif self.shuffle:
            index_N = self.index_N[order(self.seed, epoch, len(self.index_N))]
        else:
            index_N = self.index_N
        if self.shows == 1:
            return index_N
        return (index_N[:, None] * self.shows + np.arange(self.shows)).ravel()

    def number(self, epoch: int, index_B: np.ndarray) -> np.ndarray:
        """The numbers of the samples' views in an epoch: int64 [B]. (Where a sample is shown several times they are 0 ..
        shows - 1, and no epoch changes them.)"""
        return self.plan.number(seed=self.view_seed, epoch=epoch, index_B=index_B)

    def view(self, epoch: int, index_B: np.ndarray, height_B, width_B) -> View:
        """The views of samples in an epoch; ``height_B``, ``width_B`` are the sizes of the images as stored."""
        return self.plan(seed=self.view_seed, epoch=epoch, index_B=index_B, height_B=height_B, width_B=width_B)


class EpochLoader:
    """Walks through epochs and keeps the position. A back end supplies ``_load(epoch, batches of indices)``."""

    def __init__(self, spec: LoaderSpec, device: torch.device | str = "cpu") -> None:
        self.spec = spec
        self.device = torch.device(device)
        self._epoch, self._batch = 0, 0
        self.bad: dict[int, str] = {}  # index -> why it was skipped
        self._stream: torch.cuda.Stream | None = None

    def __len__(self) -> int:
        return batch_count(len(self.spec.index_N) * self.spec.shows, self.spec.batch, self.spec.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        spec, epoch = self.spec, self._epoch
        walk = batches(
            spec.epoch_order(epoch),
            global_batch=spec.batch,
            drop_last=spec.drop_last,
            start=self._batch,
            rank=spec.rank,
            ranks=spec.ranks,
            unit=spec.unit,
            parts=spec.parts,
        )
        for batch in self._load(epoch, walk):
            whole, sizes = self._sizes()
            self._batch += 1
            made = spec.puzzle(batch, seed=spec.view_seed) if spec.puzzle else batch
            yield replace(made, whole=whole, parts=sizes)
        self.set_epoch(epoch + 1)

    def _sizes(self) -> tuple[int, tuple[int, ...]]:
        """Samples of the global batch that comes next, and the sizes of this rank's parts of it."""
        spec = self.spec
        whole = min(spec.batch, len(spec.index_N) * spec.shows - self._batch * spec.batch)
        return whole, spec.shares(whole)

    def _load(self, epoch: int, walk: Iterator[np.ndarray]) -> Iterator[Batch]:
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        self._epoch, self._batch = epoch, 0

    def describe(self) -> str:
        raise NotImplementedError

    def close(self) -> None:
        """Ends worker processes and threads. Called for a loader that is no longer used; it can be called twice."""

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._batch = state["epoch"], state["batch"]

    def _skip(self, index: int, why: str) -> None:
        """Counts a bad sample that was replaced, or raises what is wrong with it."""
        if self.spec.on_bad_sample == "error":
            raise ValueError(why)
        self.bad[index] = why

    def _sent(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels on the device: from pinned memory they travel on a stream of their own, beside what is being computed."""
        if self.device.type != "cuda":
            return pixels
        self._stream = self._stream or torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            out = pixels.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        out.record_stream(current)
        return out

    def _batch_of(self, pixels: torch.Tensor, index_B: np.ndarray, number_B: np.ndarray, still=None) -> Batch:
        arrays = (self.spec.dataset.targets_N[index_B], index_B, number_B)
        targets, index, number = (self._small(torch.from_numpy(a)) for a in arrays)
        return Batch(pixels, targets, index, number, still, np.stack([index_B, number_B], axis=1))

    def _small(self, values: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return values
        return values.pin_memory().to(self.device, non_blocking=True)  # from pageable memory the host would wait


def stand_ins(spec: LoaderSpec, index: int) -> Iterator[int]:
    """What may be served for a sample that cannot be read: the indices that follow it in ``spec.index_N``, cyclically."""
    at = int(np.flatnonzero(spec.index_N == index)[0])
    for step in range(1, min(_TRIES, len(spec.index_N))):
        yield int(spec.index_N[(at + step) % len(spec.index_N)])


def read_or_stand_in(spec: LoaderSpec, index: int) -> tuple[int, np.ndarray, dict[int, str]]:
    """A sample's pixels, or those of its stand-in: (index, uint8 [H, W, 3], bad ones that were met -> why).

    Raises:
        ValueError: it cannot be read, and ``spec.on_bad_sample`` is ``error``, or none of 100 can be read.
    """
    bad: dict[int, str] = {}
    for candidate in itertools.chain([index], stand_ins(spec, index)):
        try:
            return candidate, spec.dataset.read(candidate), bad
        except ValueError as error:
            if spec.on_bad_sample == "error":
                raise
            bad[candidate] = str(error)
    raise ValueError(f"{len(bad)} samples in a row cannot be read; the first: {next(iter(bad.values()))}")
