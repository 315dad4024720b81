"""The contract between loaders and everything that consumes their batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One step's samples, on the loader's device.

    Attributes:
        pixels: uint8 [B, 3, H, W], channels_last; of clips [B, 3, T, H, W], channels_last_3d.
        targets: int64 [B], class indices; or float32 [B, C] of a multi-label data set.
        index: int64 [B], the samples' indices in their data set.
        view: int64 [B], which view of its sample this is (the epoch, or ``epoch mod K``).
        still: uint8 [B, 3, R, R] or None: the same view at the sources' own resolution; of a clip, its centre frame's.
        where_B2: int64, index and view once more, on the host, for what is looked up there without waiting for the device.
        whole: samples of the global batch, over all ranks; 0 where this is all of it.
        parts: sizes of the parts in which it is to be taken, in order; empty for all at once.
    """

    pixels: Tensor
    targets: Tensor
    index: Tensor
    view: Tensor
    still: Tensor | None = None
    where_B2: np.ndarray | None = None
    whole: int = 0
    parts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def images(self) -> Tensor:
        """What a network for images sees of the pixels: uint8 [B, 3, H, W]; of clips, their centre frames."""
        return self.pixels if self.pixels.dim() == 4 else self.pixels[:, :, self.pixels.shape[2] // 2]


class Loader(Protocol):
    """Yields one epoch's batches of one data set on one device, in ``order(seed, epoch)``, as its views say."""

    def __len__(self) -> int:
        """Batches an epoch, on this rank."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of ``epoch``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position: ``{"epoch", "batch"}``, the next batch to come."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        ...

    def describe(self) -> str:
        """One line for the run's log."""
        ...
