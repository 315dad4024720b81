"""The ``resident`` loader: the data set as uint8 on the device, whole batches cut out of it by indexing."""

import hashlib
from collections.abc import Iterator
from weakref import WeakValueDictionary

import numpy as np
import torch

from .base import EpochLoader, LoaderSpec, read_or_stand_in
from .batch import Batch
from .datasets import stored_pixels
from .resample import cut_from_store

_STORES: WeakValueDictionary[tuple, "_Store"] = WeakValueDictionary()


class _Store:
    """A split's decoded images on a device.

    Attributes:
        pixels_NHWC: uint8.
        index_N: int64, whose image each is: a sample's own, or its stand-in's.
        bad: samples that could not be read -> why.
    """

    def __init__(self, spec: LoaderSpec, side: int, device: torch.device) -> None:
        self.index_N = spec.index_N.copy()
        self.bad: dict[int, str] = {}
        row_of = {int(index): row for row, index in enumerate(spec.index_N)}

        def read(index: int) -> np.ndarray:
            self.index_N[row_of[index]], image_HWC, bad = read_or_stand_in(spec, index)
            self.bad.update(bad)
            return image_HWC

        self.pixels_NHWC = stored_pixels(spec.dataset, spec.index_N, side, read).to(device)


def _store(spec: LoaderSpec, side: int, device: torch.device) -> _Store:
    """The decoded images, on the device; those that another loader of this process still holds are shared."""
    samples = hashlib.sha256(spec.index_N.tobytes()).hexdigest()
    key = (spec.dataset.identity(), spec.dataset.source, samples, side, str(device), spec.on_bad_sample)
    store = _STORES.get(key)
    if store is None:
        store = _STORES[key] = _Store(spec, side, device)
    return store


class ResidentLoader(EpochLoader):
    """Serves a data set (or split) that fits into the device's memory, uncompressed.

    Raises:
        ValueError: the images differ in size and ``spec.stored`` is 0.
    """

    def __init__(self, spec: LoaderSpec, device: torch.device | str = "cpu") -> None:
        super().__init__(spec, device)
        self._store = _store(spec, spec.stored, self.device)
        self._store_NHWC = self._store.pixels_NHWC
        self._still = _store(spec, spec.still, self.device) if spec.still and spec.stored else None
        self._still_NHWC = self._still.pixels_NHWC if self._still else None
        self.bad = dict(self._store.bad)
        self._row_of = np.full(len(spec.dataset), -1, dtype=np.int64)
        self._row_of[spec.index_N] = np.arange(len(spec.index_N))

    def _load(self, epoch: int, walk: Iterator[np.ndarray]) -> Iterator[Batch]:
        for index_B in walk:
            yield self.at(epoch, index_B)

    def at(self, epoch: int, index_B: np.ndarray) -> Batch:
        """The views in ``epoch`` of chosen samples of the split, whatever the loader's position."""
        spec, row_B = self.spec, self._row_of[index_B]
        height, width = self._store_NHWC.shape[1:3]
        index_B = self._store.index_N[row_B]
        view = spec.view(epoch, index_B, height, width)
        pixels = cut_from_store(self._store_NHWC, row_B, view, spec.size_at(epoch))
        still = None
        if self._still_NHWC is not None:
            still = cut_from_store(self._still_NHWC, row_B, view.scaled(spec.still / spec.stored), spec.still)
        elif spec.still:
            still = cut_from_store(self._store_NHWC, row_B, view, spec.still)
        return self._batch_of(pixels, index_B, view.number_B, still)

    def describe(self) -> str:
        n, height, width, _ = self._store_NHWC.shape
        size = self._store_NHWC.numel() + (0 if self._still_NHWC is None else self._still_NHWC.numel())
        return f"resident on {self.device}: {n} images of {width} x {height}, {size / 2**20:.0f} MiB"
