"""The ``torch`` loader: PyTorch's DataLoader, decoding files in worker processes. The others are tested against it."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

from .base import EpochLoader, LoaderSpec
from .batch import Batch
from .resample import centre_square, cut
from .views import View


class TorchLoader(EpochLoader):
    """Serves any data set from its files; batches come from ``workers`` processes (0: from this one).

    An image that cannot be read raises ``ValueError`` naming its file, in the consumer.
    """

    def __init__(self, spec: LoaderSpec, device: torch.device | str = "cpu", workers: int = 0) -> None:
        super().__init__(spec, device)
        self.workers = workers

    def _load(self, epoch: int, walk: Iterator[np.ndarray]) -> Iterator[Batch]:
        loader: DataLoader = DataLoader(
            _Cutter(self.spec, epoch),  # type: ignore[arg-type]
            batch_sampler=list(walk),  # type: ignore[arg-type]
            collate_fn=_as_is,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        for item in loader:
            if isinstance(item, ValueError):
                raise item
            pixels, still, index_B, number_B = item
            pixels = pixels.to(self.device, non_blocking=True)
            still = still.to(self.device, non_blocking=True) if len(still) else None
            yield self._batch_of(pixels, index_B.numpy(), number_B.numpy(), still)

    def describe(self) -> str:
        return f"torch DataLoader, {self.workers} workers, to {self.device}"


def _as_is(item):
    return item


class _Cutter:
    """A map-style data set whose ``__getitems__`` makes a whole batch: views as arrays, images one after the other."""

    def __init__(self, spec: LoaderSpec, epoch: int) -> None:
        self.spec, self.epoch = spec, epoch

    def __len__(self) -> int:
        return len(self.spec.index_N)

    def __getitems__(self, index_B: np.ndarray):
        spec = self.spec
        try:
            images = [spec.dataset.read(int(i)) for i in index_B]
        except ValueError as error:  # raised again where the batch is consumed, without the worker's traceback
            return error
        stored = [centre_square(i, spec.stored) for i in images] if spec.stored else images
        size_B2 = np.array([i.shape[:2] for i in stored]).reshape(-1, 2)
        view = spec.view(self.epoch, index_B, size_B2[:, 0], size_B2[:, 1])
        pixels = _cut_each(stored, view, spec.size)
        still = torch.empty(0, dtype=torch.uint8)
        if spec.still and spec.stored:
            squares = [centre_square(i, spec.still) for i in images]
            still = _cut_each(squares, view.scaled(spec.still / spec.stored), spec.still)
        elif spec.still:
            still = _cut_each(images, view, spec.still)
        return pixels, still, torch.from_numpy(index_B), torch.from_numpy(view.number_B)


def _cut_each(images: list[np.ndarray], view: View, size: int) -> torch.Tensor:
    out_BHWC = torch.empty(len(images), size, size, 3, dtype=torch.uint8)
    for b, image in enumerate(images):
        one = View(view.box_B4[b : b + 1], view.flip_B2[b : b + 1], view.number_B[b : b + 1])
        image_1HWC = torch.from_numpy(np.require(image, requirements=["C", "W"]))[None]
        out_BHWC[b] = cut(image_1HWC, one, size)[0].permute(1, 2, 0)
    return out_BHWC.permute(0, 3, 1, 2)
