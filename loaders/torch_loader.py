"""The ``torch`` loader: PyTorch's DataLoader at its best. Takes any data set; the others are tested against it.

Worker processes live as long as the loader, decode with torchvision's libjpeg-turbo, cut with ``crop.py`` and send whole
batches of uint8, pinned where a GPU waits for them.
"""

import os
import signal
import threading
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader

from .base import EpochLoader, LoaderSpec, read_or_stand_in
from .batch import Batch
from .crop import centre_square, cut_one
from .views import View

_AHEAD = 4  # batches a worker


class TorchLoader(EpochLoader):
    """Serves any data set from its files; batches come from ``workers`` processes (0: from this one).

    An image that cannot be read raises ``ValueError`` naming its file, in the consumer.
    """

    def __init__(self, spec: LoaderSpec, device: torch.device | str = "cpu", workers: int = 0) -> None:
        super().__init__(spec, device)
        self.workers = workers
        self._walk = _Walk()
        self._loader: DataLoader | None = None
        self._turn: object = None  # which iteration may go on

    def _load(self, epoch: int, walk: Iterator[np.ndarray]) -> Iterator[Batch]:
        turn = self._turn = object()
        self._walk.batches = [(epoch, index_B) for index_B in walk]
        if self._loader is None:
            self._loader = DataLoader(
                _Cutter(self.spec),  # type: ignore[arg-type]
                batch_sampler=self._walk,  # type: ignore[arg-type]
                collate_fn=_as_is,
                num_workers=self.workers,
                pin_memory=self.device.type == "cuda",
                persistent_workers=self.workers > 0,
                prefetch_factor=_AHEAD if self.workers else None,
                # not what Python prefers at the moment: a process that starts anew takes seconds to import PyTorch
                multiprocessing_context="fork" if self.workers else None,
                worker_init_fn=partial(_leave_with, os.getpid()),
            )
        for item in self._loader:
            if self._turn is not turn:  # PyTorch would leave out batches
                raise RuntimeError("the loader was closed, or began to iterate anew")
            if isinstance(item, ValueError):
                self.close()
                raise item
            pixels, still, index_B, number_B, bad = item
            for index, why in bad.items():
                self._skip(index, why)
            still = self._sent(still) if self.spec.still else None
            yield self._batch_of(self._sent(pixels), index_B.numpy(), number_B.numpy(), still)

    def close(self) -> None:
        loader, self._loader, self._turn = self._loader, None, None
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()

    def describe(self) -> str:
        return f"torch DataLoader, {self.workers} workers, to {self.device}"


class _Walk:
    """The batches of the epoch that a loader is at; PyTorch keeps the sampler that it was given first.

    It does not know its loader: in a cycle of garbage PyTorch loses its workers' queues, and waits 5 s for each of them.
    """

    def __init__(self) -> None:
        self.batches: list[tuple[int, np.ndarray]] = []

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _leave_with(parent: int, worker: int) -> None:
    """PyTorch's workers end when their parent has died, but wait forever if it died before they looked first.

    A scheduler that asks a job to end may send SIGTERM to all of its processes: a worker obeys only its parent, which still
    needs batches for the step it is at.
    """
    if os.getppid() != parent:
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(parent,), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _as_is(item):
    return item


class _Cutter:
    """A map-style data set whose ``__getitems__`` makes a whole batch: views as arrays, images one after the other."""

    def __init__(self, spec: LoaderSpec) -> None:
        self.spec = spec

    def __len__(self) -> int:
        return len(self.spec.index_N)

    def __getitems__(self, batch: tuple[int, np.ndarray]):
        epoch, index_B = batch
        spec = self.spec
        bad: dict[int, str] = {}
        images = []
        index_B = index_B.copy()
        try:
            for b, index in enumerate(index_B.tolist()):
                index_B[b], image_HWC, unread = read_or_stand_in(spec, index)
                images.append(image_HWC)
                bad |= unread
        except ValueError as error:  # raised again where the batch is consumed, without the worker's traceback
            return error
        stored = [centre_square(i, spec.stored) for i in images] if spec.stored else images
        size_B2 = np.array([i.shape[:2] for i in stored]).reshape(-1, 2)
        view = spec.view(epoch, index_B, size_B2[:, 0], size_B2[:, 1])
        pixels = _cut_each(stored, view, spec.size_at(epoch))
        still = torch.empty(0, dtype=torch.uint8)
        if spec.still and spec.stored:
            squares = [centre_square(i, spec.still) for i in images]
            still = _cut_each(squares, view.scaled(spec.still / spec.stored), spec.still)
        elif spec.still:
            still = _cut_each(images, view, spec.still)
        return pixels, still, torch.from_numpy(index_B), torch.from_numpy(view.number_B), bad


def _cut_each(images: list[np.ndarray], view: View, size: int) -> torch.Tensor:
    out_BHWC = torch.empty(len(images), size, size, 3, dtype=torch.uint8)
    for b, image in enumerate(images):
        cut_one(image, view, b, out_BHWC[b].numpy())
    return out_BHWC.permute(0, 3, 1, 2)
