"""The ``resident`` loader: the data set as uint8 on the device, whole batches cut out of it by indexing."""

import hashlib
import itertools
from collections.abc import Iterator
from weakref import WeakValueDictionary

import numpy as np
import torch

from .base import EpochLoader, LoaderSpec, read_or_stand_in
from .batch import Batch
from .datasets import stored_pixels
from .resample import cut_from_store
from .views import View

_AHEAD = 16  # batches whose views are drawn at once, and on a GPU cut at once,
_INDEX_BYTES = 1 << 26  # unless the indices of their pixels would take more
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
        self._together = self.device.type == "cuda"  # on a CPU there is nothing to launch, and a cache to stay in

    def _load(self, epoch: int, walk: Iterator[np.ndarray]) -> Iterator[Batch]:
        size = self.spec.size_at(epoch)
        count = max(1, min(_AHEAD, _INDEX_BYTES // (8 * size * size * max(self.spec.batch, 1))))
        while chunk := list(itertools.islice(walk, count)):
            yield from self._cut(epoch, chunk)

    def at(self, epoch: int, index_B: np.ndarray) -> Batch:
        """The views in ``epoch`` of chosen samples of the split, whatever the loader's position."""
        return next(self._cut(epoch, [index_B]))

    def _cut(self, epoch: int, chunk: list[np.ndarray]) -> Iterator[Batch]:
        """Batches of these samples. What can be done for all of them at once is: a small batch's step takes less time on a GPU
        than to ask for each of its parts in turn."""
        spec = self.spec
        row_N = self._row_of[np.concatenate(chunk)]
        height, width = self._store_NHWC.shape[1:3]
        index_N, size = self._store.index_N[row_N], spec.size_at(epoch)
        view = spec.view(epoch, index_N, height, width)
        together = self._together and bool((view.box_B4[:, 2:] == size).all())
        pixels_N = cut_from_store(self._store_NHWC, row_N, view, size) if together else None
        arrays = (spec.dataset.targets_N[index_N], index_N, view.number_B)
        targets_N, device_index_N, number_N = (self._small(torch.from_numpy(a)) for a in arrays)
        where_N2, start = np.stack([index_N, view.number_B], axis=1), 0
        for index_B in chunk:
            its = slice(start, start + len(index_B))
            start = its.stop
            row_B, view_B = row_N[its], View(view.box_B4[its], view.flip_B2[its], view.number_B[its])
            pixels = cut_from_store(self._store_NHWC, row_B, view_B, size) if pixels_N is None else pixels_N[its]
            still = None
            if self._still_NHWC is not None:
                its_view = view_B.scaled(spec.still / spec.stored)
                still = cut_from_store(self._still_NHWC, row_B, its_view, spec.still)
            elif spec.still:
                still = cut_from_store(self._store_NHWC, row_B, view_B, spec.still)
            yield Batch(pixels, targets_N[its], device_index_N[its], number_N[its], still, where_N2[its])

    def describe(self) -> str:
        n, height, width, _ = self._store_NHWC.shape
        size = self._store_NHWC.numel() + (0 if self._still_NHWC is None else self._still_NHWC.numel())
        return f"resident on {self.device}: {n} images of {width} x {height}, {size / 2**20:.0f} MiB"
