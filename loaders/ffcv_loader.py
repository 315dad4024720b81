"""The ``ffcv`` loader: FFCV's loop of compiled code over a ``.beton``, in our order and with our views.

The epoch is a table with a row for each sample: its index, box and flips. FFCV's traversal order hands the rows on, our
decoder shows them (``show.py``). So nothing is drawn in a worker, and a position is a row of the table.
"""

import os
import weakref
from collections.abc import Iterator
from importlib import metadata
from queue import Empty
from typing import Any

import numpy as np
import torch

from .base import EpochLoader, LoaderSpec, read_or_stand_in
from .batch import Batch
from .crop import cut_one
from .datasets.beton import Packed
from .parts import missing_part
from .show import load_libjpeg

_AHEAD = 3  # batches ready before they are asked for
_KEPT = 8  # batches whose memory is used again
AT_ONCE = 1 << 12  # samples whose views are computed at once
# columns of the table: index in the file, top, left, height, width, flips, and which row of its batch it is
_INDEX, _BOX, _FLIP_X, _FLIP_Y, _ROW, _SIZE, _COLUMNS = 0, 1, 5, 6, 7, 8, 9


class FfcvLoader(EpochLoader):
    """Serves a packed data set; decodes in ``workers`` threads (0: one for each core).

    Raises:
        ValueError: FFCV or libjpeg-turbo is not here, the data set is not packed, or ``spec.stored`` is not 0.
    """

    def __init__(self, spec: LoaderSpec, device: torch.device | str = "cpu", workers: int = 0) -> None:
        super().__init__(spec, device)
        if not isinstance(spec.dataset.read, Packed):
            raise ValueError(
                f"data.loader: ffcv reads packed data sets; pack {spec.dataset.name} with `fasttrain pack`"
            )
        if spec.stored:
            raise ValueError(
                "data.stored: ffcv cuts views from the images as they are packed; pack them with --square "
                f"{spec.stored}, or use the torch loader"
            )
        self._read = spec.dataset.read
        self.workers = workers or len(os.sched_getaffinity(0))
        _need_ffcv()
        self._code: _Code | None = None  # compiled when the first batch is asked for
        self._copied: torch.cuda.Event | None = None
        self._memory = _Memory()
        self._running: Any = None

    def _load(self, epoch: int, walk: Iterator[np.ndarray]) -> Iterator[Batch]:
        spec, size = self.spec, self.spec.size_at(epoch)
        parts = list(walk)
        full = [p for p in parts if len(p)]
        if not full:
            yield from (self._empty(epoch, size) for _ in parts)
            return
        table = np.empty((sum(map(len, full)), _COLUMNS), dtype=np.int32)
        filled = self._fill(table, epoch, full, size, 0)
        self.close()
        if self._copied is not None:  # out of memory that FFCV's next thread writes into
            self._copied.synchronize()
        self._code = self._code or _Code(spec, self._read, self.workers)
        running = self._running = self._code.begin(table, len(full[0]))
        try:
            for b, index_B in enumerate(parts):
                if not len(index_B):
                    yield self._empty(epoch, size)
                    continue
                if filled < min(b + _AHEAD + 4, len(full)):  # before FFCV's thread comes there
                    filled = self._fill(table, epoch, full, size, filled)
                if self._copied is not None:  # with the next batch FFCV may write into the last one's memory
                    self._copied.synchronize()
                flat = _next(running)
                yield self._made(epoch, index_B, size, flat)
        finally:
            _end(running)  # not what another iteration may have begun meanwhile

    def _fill(self, table: np.ndarray, epoch: int, parts: list[np.ndarray], size: int, begin: int) -> int:
        """Writes the rows of some batches from number ``begin`` on; returns the number of the next to be written.

        Within a batch they stand in an order that fills the threads alike.
        """
        batch, file = len(parts[0]), self._read.file
        end = min(begin + max(AT_ONCE // batch, _AHEAD + 4), len(parts))
        index = np.concatenate(parts[begin:end])
        view = self.spec.view(epoch, index, file.height_N[index], file.width_N[index])
        # what a sample costs: the data of its box, or down to its box's end, and the pixels of the box
        top, height, width = view.box_B4[:, 0], view.box_B4[:, 2], view.box_B4[:, 3]
        of_height = height if self._read.indexed else top + height
        of_width = width / file.width_N[index] if self._read.indexed else 1.0
        share = np.clip(of_height / file.height_N[index], 0, 1) * np.minimum(of_width, 1)
        cost = file.size_N[index] * share + 0.25 * height * width
        number = np.arange(len(index)) // batch
        dealt = _deal(np.lexsort((-cost, number)), batch, self.workers)
        rows = table[begin * batch : begin * batch + len(index)]
        rows[:, _INDEX] = index[dealt]
        rows[:, _BOX:_FLIP_X] = view.box_B4[dealt]
        rows[:, _FLIP_X:_ROW] = view.flip_B2[dealt]
        rows[:, _ROW] = dealt - number * batch
        rows[:, _SIZE] = size
        return end

    def _made(self, epoch: int, index_B: np.ndarray, size: int, flat: np.ndarray) -> Batch:
        spec, n = self.spec, len(index_B)
        first, second = n * size * size * 3, n * spec.still * spec.still * 3
        failed = np.flatnonzero(flat[first + second : first + second + n])
        if len(failed):
            index_B = index_B.copy()
            pixels_BSSC = flat[:first].reshape(n, size, size, 3)
            still_BRRC = flat[first : first + second].reshape(n, spec.still, spec.still, 3)
            for b in failed:
                index_B[b] = self._mend(epoch, int(index_B[b]), pixels_BSSC[b], still_BRRC[b])
        used = torch.from_numpy(flat[: first + second])
        here = self._memory.copy_of(used) if self.device.type == "cpu" else self._sent(used)  # out of FFCV's ring
        self._copied = self._stream.record_event() if self._stream is not None else None
        pixels = here[:first].view(n, size, size, 3).permute(0, 3, 1, 2)
        still = here[first:].view(n, spec.still, spec.still, 3).permute(0, 3, 1, 2) if spec.still else None
        return self._batch_of(pixels, index_B, spec.number(epoch, index_B), still)

    def _mend(self, epoch: int, index: int, out_SSC: np.ndarray, still_RRC: np.ndarray) -> int:
        """Writes a sample that the compiled code could not decode, or its stand-in; returns its index."""
        index, image_HWC, bad = read_or_stand_in(self.spec, index)
        for i, why in bad.items():
            self._skip(i, why)
        view = self.spec.view(epoch, np.array([index]), *image_HWC.shape[:2])
        cut_one(image_HWC, view, 0, out_SSC)
        if len(still_RRC):
            cut_one(image_HWC, view, 0, still_RRC)
        return index

    def _empty(self, epoch: int, size: int) -> Batch:
        none = np.zeros(0, dtype=np.int64)
        pixels, still = (
            torch.empty(0, s, s, 3, dtype=torch.uint8, device=self.device) for s in (size, self.spec.still)
        )
        return self._batch_of(
            pixels.permute(0, 3, 1, 2), none, none, still.permute(0, 3, 1, 2) if self.spec.still else None
        )

    def close(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            _end(running)

    def describe(self) -> str:
        version = metadata.version("ffcv")  # ffcv.__version__ is that of years ago
        how = "jpeg" if not self._read.raw_N.any() else "raw" if self._read.raw_N.all() else "jpeg and raw"
        how += ", seek index" if self._read.indexed else ""
        return f"ffcv {version}, {how}, {self.workers} threads, {self._read.file.path} to {self.device}"


class _Memory:
    """Memory of batches on the CPU, used again when nobody holds the batch any more: no new pages, no fragments."""

    def __init__(self) -> None:
        # arrays, and the parts of them that were lent: such a part lives as long as the tensor made of it
        self._lent: list[tuple[np.ndarray, weakref.ref]] = []

    def copy_of(self, bytes_: torch.Tensor) -> torch.Tensor:
        """uint8 [n] with the same content, valid as long as it is held."""
        n = len(bytes_)
        array = next((a for a, to in self._lent if to() is None and len(a) >= n), None)
        if array is None:
            array = np.empty(n, dtype=np.uint8)
        others = [(a, to) for a, to in self._lent if a is not array and len(a) >= n]
        lent = array[:n]
        self._lent = [*others[1 - _KEPT :], (array, weakref.ref(lent))]
        lent[:] = bytes_.numpy()  # PyTorch would copy in several threads, which then wait for more, and keep cores busy
        return torch.from_numpy(lent)


def _deal(sorted_N: np.ndarray, batch: int, hands: int) -> np.ndarray:
    """Deals each batch's samples, dearest first, to threads that take equal parts of it one behind the other: int64 [N]."""
    at = np.arange(len(sorted_N)) % batch
    turn, place = at // hands, at % hands
    hand = np.where(turn % 2, hands - 1 - place, place)
    return sorted_N[np.lexsort((hand, np.arange(len(sorted_N)) // batch))]


def _end(running) -> None:
    """Stops FFCV's thread, waits for it, and leaves nothing of it to who might still ask for a batch."""
    running.close()
    alive = True
    while alive:
        alive = running.is_alive()
        while not running.output_queue.empty():  # it may wait for room
            running.output_queue.get_nowait()
        running.join(0.05)


def _next(running) -> np.ndarray:
    """The next batch of FFCV's thread; an error where that thread has died, in which FFCV itself would wait forever."""
    while True:
        alive = running.is_alive()  # before it is asked for: a thread may leave its last batch and end
        try:
            result = running.output_queue.get(timeout=0.5 if alive else 0)
        except Empty:
            if alive:
                continue
            raise RuntimeError("the loader was closed, or FFCV's thread ended early (its error stands above)") from None
        assert result is not None
        return result[1][0].reshape(-1)


def _need_ffcv() -> None:
    missing = missing_part("ffcv")
    if missing:
        raise ValueError(f"data.loader: ffcv needs FFCV: pip install 'fasttrain[ffcv]' ({missing})")
    load_libjpeg()


class _Code:
    """FFCV's Loader with our order and decoder, and nothing else of the file decoded."""

    def __init__(self, spec: LoaderSpec, read: Packed, workers: int) -> None:
        from ffcv.loader import Loader
        from ffcv.traversal_order.base import TraversalOrder

        from .ffcv_decoder import decoder, leave_numba_types_alone, leave_torch_threads_alone

        leave_torch_threads_alone()
        leave_numba_types_alone()

        class Table(TraversalOrder):
            """Hands on the rows of a table; FFCV asks for an order when it starts, and for its type by calling it."""

            table = np.zeros((1, _COLUMNS), dtype=np.int32)

            def __init__(self) -> None:
                pass

            def __call__(self, loader):
                super().__init__(loader)
                return self

            def sample_order(self, epoch):
                return self.table

        self._order = Table()
        largest = max(spec.size, spec.growth.size if spec.growth else 0)
        self._bytes = largest * largest * 3 + spec.still * spec.still * 3 + 1
        pipelines: dict[str, Any] = dict.fromkeys(read.file.fields)
        pipelines[read.file.image_field] = [decoder(self._bytes, spec.still)]
        self._loader = Loader(
            str(read.file.path),
            batch_size=max(spec.batch // spec.ranks, 1),
            num_workers=workers,
            os_cache=True,
            order=self._order,
            seed=0,
            pipelines=pipelines,
            drop_last=False,
            batches_ahead=_AHEAD,
        )
        allocate = self._loader.graph.allocate_memory
        kept: dict[tuple, Any] = {}

        def allocate_once(*sizes):  # not anew in every epoch: memory that a GPU reads from is dear to set up
            if sizes not in kept:
                kept.clear()
                kept[sizes] = allocate(*sizes)
            return kept[sizes]

        self._loader.graph.allocate_memory = allocate_once

    def begin(self, table: np.ndarray, batch: int):
        """Starts FFCV's thread over the table's rows."""
        self._order.table = self._loader.first_traversal_order = table
        self._loader.batch_size = batch
        return iter(self._loader)
