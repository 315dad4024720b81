"""The ``dali`` loader: NVIDIA DALI decodes, cuts and resizes, on a GPU or on the CPU, in our order and with our views.

DALI draws nothing: with every batch it is fed the boxes, flips and sizes. A thread gathers the files' bytes, keeps DALI a few
batches ahead and copies what it made into tensors of PyTorch, so that a batch stays valid for as long as it is held. On the
CPU the decoder gives the same bytes as ours, on a GPU nvJPEG decodes. DALI's triangle filter repeats the pixels at a box's
border where ``resample.py`` leaves them out, and does not round its weights.
"""

import importlib.metadata
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, Full, Queue
from threading import Event, Thread, current_thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import EpochLoader, LoaderSpec, read_or_stand_in
from .batch import Batch
from .datasets.base import Encoded
from .datasets.beton import Packed
from .jpeg import read_header

_AHEAD, _READY = 3, 2  # batches that DALI works on, and that wait for the consumer
# fails, or crashes the process, where a GPU decodes a part of a JPEG: github.com/NVIDIA/nvImageCodec/issues/55
_NO_GPU_CROPS = "0.9.0"
_TURNING = (b"eXIf", b"exif", b"Orientation")  # PNGs with one of these may have to be turned
WHOLE, CROP, PIXELS = "whole-image decode", "crop-only decode", "pixels"  # what DALI does with what it is fed


class DaliLoader(EpochLoader):
    """Serves files and packed data sets; ``workers`` are DALI's threads (0: one for each core).

    Args:
        hw_decoder_load: share of a batch's JPEGs that goes to the GPU's JPEG engine, where it has one.
        crops: whether a GPU decodes only the part of a JPEG that is shown; None: where its decoder is not known to fail at it.
        fancy: a GPU interpolates between chroma samples as libjpeg does, instead of repeating them.

    Raises:
        ValueError: DALI is not here, the data set holds no files, or ``spec.stored`` is not 0.
    """

    def __init__(
        self,
        spec: LoaderSpec,
        device: torch.device | str = "cpu",
        workers: int = 0,
        hw_decoder_load: float = 0.65,
        *,
        crops: bool | None = None,
        fancy: bool = False,
    ) -> None:
        super().__init__(spec, device)
        read = spec.dataset.read
        if not isinstance(read, Encoded):
            raise ValueError(f"data.loader: dali decodes image files; {spec.dataset.name} holds pixels: use resident")
        if spec.stored:
            raise ValueError(
                "data.stored: dali cuts views from the images as they are stored; pack them with --square "
                f"{spec.stored}, or use the torch loader"
            )
        self._version = _dali_version()
        self._read = read
        self.workers = workers or len(os.sched_getaffinity(0))
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        gpu = self._stream.device.index if self._stream else None
        self._how = _how(spec, gpu, crops)
        decoder: dict[str, Any] = {}
        if gpu is not None:  # affine would bind the decoders' threads of several processes to the same cores
            decoder = {"device": "mixed", "hw_decoder_load": hw_decoder_load, "affine": False}
            decoder |= {"jpeg_fancy_upsampling": True} if fancy else {}
        self._new_pipe = partial(pipeline, spec, self._how, self.workers, gpu, decoder)
        self._pipe: Any = None
        self._size_N2 = np.zeros((len(spec.dataset), 2), dtype=np.int32)  # of files that were looked into; else 0
        self._ours: set[int] = set()  # samples that DALI cannot decode: it is fed the pixels
        self._running: _Background | None = None

    def _load(self, epoch: int, walk: Iterator[np.ndarray]) -> Iterator[Batch]:
        if self._running is not None:
            self._running.end()
        running = self._running = _Background(self._batches(epoch, walk))
        try:
            for work, pixels, still in running:
                for index, why in work.bad.items():
                    self._skip(index, why)
                if self._stream:  # the copies are done; PyTorch has to know which stream uses their memory now
                    for tensor in (pixels, still):
                        if tensor is not None:
                            tensor.record_stream(torch.cuda.current_stream(self._stream.device))
                yield self._batch_of(pixels, work.index_B, work.number_B, still)
        finally:
            running.end()

    def close(self) -> None:
        if self._running is not None:
            self._running.end()
        self._pipe = None

    def describe(self) -> str:
        return f"dali {self._version} on {self.device}, {self.workers} threads, {self._how}"

    def _batches(self, epoch: int, walk: Iterator[np.ndarray]) -> Iterator[tuple["_Work", Tensor, Tensor | None]]:
        """Runs in a thread: the walk's batches, in its order, with DALI at work on those that follow."""
        pending: deque[_Work] = deque()
        failed: ValueError | None = None
        try:
            with ThreadPoolExecutor(self.workers, "dali-read") as pool:
                each = map if isinstance(self._read, Packed) else pool.map  # a packed file's bytes are not read here

                def gather(asked_B: np.ndarray) -> _Work:
                    return self._work(epoch, asked_B, list(each(self._sample, asked_B.tolist())))

                for asked_B in walk:
                    try:
                        pending.append(gather(asked_B))
                    except ValueError as error:  # raised when the batches before it have been served
                        failed = error
                        break
                    self._schedule(pending[-1])
                    if len(pending) > _AHEAD:
                        yield self._collect(epoch, pending, gather)
                while pending:
                    yield self._collect(epoch, pending, gather)
                if failed:
                    raise failed
        finally:
            if pending:  # DALI holds batches that nobody wants any more
                self._pipe = None

    def _sample(self, index: int) -> "_Sample":
        """What DALI is fed for a sample, or for its stand-in.

        Raises:
            ValueError: it cannot be read; see ``read_or_stand_in``.
        """
        read = self._read
        if index not in self._ours:
            try:
                content = read.encoded(index)
                if isinstance(read, Packed):
                    size = read.size(index)
                    if self._how == PIXELS:
                        return _Sample(index, content.reshape(*size, 3), size)
                if not self._size_N2[index, 0]:  # nobody has looked into it
                    self._size_N2[index] = plain_size(content)
                if not isinstance(read, Packed) or size == tuple(self._size_N2[index]):
                    return _Sample(index, content, self._size_N2[index])
            except ValueError:
                pass
            self._ours.add(index)
        index, image_HWC, bad = read_or_stand_in(self.spec, index)
        head = b"P6 %d %d 255\n" % (image_HWC.shape[1], image_HWC.shape[0])  # a PPM file: this line, and pixels
        content = np.concatenate([np.frombuffer(head, dtype=np.uint8), image_HWC.reshape(-1)])
        return _Sample(index, content, image_HWC.shape[:2], ours=True, bad=bad)

    def _work(self, epoch: int, asked_B: np.ndarray, samples: list["_Sample"]) -> "_Work":
        spec = self.spec
        index_B = np.array([s.index for s in samples], dtype=np.int64)
        size_B2 = np.array([s.size for s in samples], dtype=np.int64).reshape(-1, 2)
        view = spec.view(epoch, index_B, size_B2[:, 0], size_B2[:, 1])
        shape_B2, flip_B2 = view.box_B4[:, 2:], view.flip_B2[:, ::-1]  # (vertical, horizontal)
        fed = {
            "content": [s.content for s in samples],
            "start": view.box_B4[:, :2].astype(np.int32),
            "shape": shape_B2.astype(np.int32),
            "from": np.where(flip_B2, shape_B2, 0).astype(np.float32),
            "to": np.where(flip_B2, 0, shape_B2).astype(np.float32),
            "size": np.full((len(samples), 2), spec.size_at(epoch), dtype=np.float32),
        }
        if spec.still:
            fed["still"] = np.full((len(samples), 2), spec.still, dtype=np.float32)
        bad = {index: why for s in samples for index, why in s.bad.items()}
        return _Work(asked_B, index_B, view.number_B, fed, [s.ours for s in samples], bad)

    def _schedule(self, work: "_Work") -> None:
        if len(work.index_B):
            if self._pipe is None:
                self._pipe = self._new_pipe(max(sum(self.spec.shares(self.spec.batch)), 1))
            _run(self._pipe, work.fed)

    def _collect(
        self, epoch: int, pending: deque["_Work"], gather: Callable[[np.ndarray], "_Work"]
    ) -> tuple["_Work", Tensor, Tensor | None]:
        """Waits for the oldest of the pending batches and removes it."""
        if not len(pending[0].index_B):  # a rank's part of a small last batch
            device = self._stream.device if self._stream else "cpu"
            sides = (self.spec.size_at(epoch), self.spec.still)
            made = [torch.empty(0, s, s, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2) for s in sides]
        else:
            while True:
                try:
                    outputs = self._pipe.share_outputs()
                    break
                except (
                    Exception
                ) as error:  # RuntimeError mostly, of all the batch; the pipeline is "no longer valid" then
                    self._pipe = None
                    if _short_of_memory(error):
                        raise
                    refused = self._refused(pending[0])
                    if not refused:
                        raise
                    self._ours |= refused
                    pending[0] = gather(pending[0].asked_B)
                    for work in pending:
                        self._schedule(work)
            made = [self._copy(o) for o in outputs]
            self._pipe.release_outputs()
        return pending.popleft(), made[0], made[1] if self.spec.still else None

    def _refused(self, work: "_Work") -> set[int]:
        """Which samples of a batch DALI cannot decode: each is tried alone."""
        refused, alone = set(), None
        for b in np.flatnonzero(~np.array(work.ours_B)):
            alone = alone or self._new_pipe(1)
            try:
                _run(alone, {name: values[b : b + 1] for name, values in work.fed.items()})
                alone.share_outputs()
                alone.release_outputs()
            except Exception as error:
                if _short_of_memory(error):
                    raise
                refused.add(int(work.index_B[b]))
                alone = None
        return refused

    def _copy(self, output: Any) -> Tensor:
        """uint8 [B, 3, S, S], channels_last, of DALI's output on the same device; done when this returns."""
        with torch.cuda.stream(self._stream):
            pixels_BSSC = torch.from_dlpack(output.as_tensor()).clone()
        if self._stream:
            self._stream.synchronize()  # DALI may write into its memory again
        return pixels_BSSC.permute(0, 3, 1, 2)


def pipeline(spec: LoaderSpec, how: str, threads: int, gpu: int | None, decoder: Mapping[str, Any], batch: int) -> Any:
    """DALI's graph for batches of up to ``batch`` samples, built; ``gpu`` is the device's number, None for the CPU, ``decoder``
    what DALI's decoder is told.

    Inputs, by name, B samples each: ``content``, uint8 [bytes], or [H, W, 3] of ``PIXELS``; ``start`` and ``shape`` of the
    boxes, int32 [2]; ``from`` and ``to``, float32 [2], its corners within itself, exchanged where it is mirrored; ``size``
    and ``still``, float32 [2], of the outputs. Outputs: uint8 [B, S, S, 3], and [B, R, R, 3] with ``spec.still``.
    """
    from nvidia.dali import Pipeline

    # a queue of 1: how far DALI is ahead is up to who schedules its runs
    made = Pipeline(batch_size=batch, num_threads=threads, device_id=gpu, prefetch_queue_depth=1)
    with made:
        made.set_outputs(*graph(spec, how, gpu, decoder))
    made.build()
    return made


def graph(spec: LoaderSpec, how: str, gpu: int | None, decoder: Mapping[str, Any]) -> list:
    """The outputs of :func:`pipeline`, as nodes of DALI's current pipeline."""
    from nvidia.dali import fn, types

    def numbers(name: str, kind=types.DALIDataType.FLOAT):
        return fn.external_source(name=name, dtype=kind, ndim=1)

    start, shape = (numbers(name, types.DALIDataType.INT32) for name in ("start", "shape"))
    axes: dict[str, Any] = {"layout": "HWC"} if how == PIXELS else {"ndim": 1}
    image = fn.external_source(name="content", dtype=types.DALIDataType.UINT8, no_copy=True, **axes)
    if how == CROP:
        image = fn.decoders.image_slice(image, start=start, shape=shape, axis_names="HW", **decoder)
    else:
        image = fn.decoders.image(image, **decoder) if how == WHOLE else image
        outside = "pad" if spec.plan.crop == "pad" else "error"  # "pad": with 0
        image = fn.slice(image, start=start, shape=shape, axis_names="HW", out_of_bounds_policy=outside)
    if gpu is not None and how == PIXELS:
        image = image.gpu()
    how_to: dict[str, Any] = {"roi_start": numbers("from"), "roi_end": numbers("to")}
    how_to |= {"interp_type": types.DALIInterpType.INTERP_LINEAR, "antialias": True}  # the triangle filter
    return [fn.resize(image, size=numbers(s), **how_to) for s in ["size"] + ["still"] * bool(spec.still)]


def plain_size(content: np.ndarray) -> tuple[int, int]:
    """(height, width), upright, of a file that DALI decodes to the same pixels as ``decode``, from its header and end.

    Raises:
        ValueError: it may not, and is left to ``decode``: anything but whole JPEGs of 8 bits in grey or YCbCr and whole PNGs
            of 8 bits. (DALI rounds 16 bits to 8, and takes a JPEG that was cut off for a whole one.)
    """
    file = content.tobytes()
    if file[:2] == b"\xff\xd8" and file[-2:] == b"\xff\xd9":
        head = read_header(file)
        if head.precision == 8 and len(head.components) in (1, 3) and head.adobe != 0:
            return (head.width, head.height) if head.orientation > 4 else (head.height, head.width)
    png = file[:4] == b"\x89PNG" and file[-8:-4] == b"IEND" and file[24:25] == b"\x08"
    if png and not any(mark in file for mark in _TURNING):
        width, height = struct.unpack(">II", file[16:24])
        return height, width
    raise ValueError("not a plain JPEG or PNG")


def gpu_decodes_crops() -> bool:
    """Whether the nvImageCodec that is installed decodes a part of a JPEG on a GPU."""
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    versions = [v for name, v in installed.items() if name in ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13")]
    return bool(versions) and not any(f"{v}.".startswith(f"{_NO_GPU_CROPS}.") for v in versions)


def _dali_version() -> str:
    try:
        import nvidia.dali
    except Exception as error:  # a broken installation can raise anything
        raise ValueError(
            f"data.loader: dali needs nvidia-dali-cuda130 (Linux, x86-64): pip install nvidia-dali-cuda130; {error}"
        ) from error
    return nvidia.dali.__version__


def _how(spec: LoaderSpec, gpu: int | None, crops: bool | None = None) -> str:
    if isinstance(spec.dataset.read, Packed):
        raw_N = spec.dataset.read.raw_N[spec.index_N]
        if raw_N.all():
            return PIXELS
        if raw_N.any():
            raise ValueError(
                f"data.loader: dali takes JPEGs or pixels, and {spec.dataset.name} holds {(~raw_N).sum()} samples as "
                f"JPEGs and {raw_N.sum()} as pixels: use the torch loader"
            )
    inside = spec.plan.crop != "pad"  # no part of a decoded crop can be outside the image
    if gpu is None or crops is None:
        crops = gpu is None or gpu_decodes_crops()
    return CROP if inside and crops else WHOLE


def _short_of_memory(error: Exception) -> bool:
    """Whether it was that, and no image. DALI and nvImageCodec say so in several ways."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in said
        for words in ("out of memory", "allocation failed", "can't allocate", "allocator failed", "bad_alloc")
    )


def _run(pipe: Any, fed: dict[str, Any]) -> None:
    for name, values in fed.items():
        pipe.feed_input(name, values)
    pipe.schedule_run()


@dataclass(frozen=True)
class _Sample:
    """What DALI is fed for one sample; ``ours``: as pixels that we decoded; ``bad``: those for which it stands in."""

    index: int
    content: np.ndarray
    size: Any  # height, width
    ours: bool = False
    bad: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Work:
    """One batch, and what DALI is fed for it; kept until DALI is done, which does not copy ``content``."""

    asked_B: np.ndarray
    index_B: np.ndarray
    number_B: np.ndarray
    fed: dict[str, Any]
    ours_B: list[bool]
    bad: dict[int, str]


class _Background:
    """Runs a generator in a thread, ``_READY`` items ahead; iteration yields its items and raises its error."""

    def __init__(self, items: Iterator) -> None:
        self._queue: Queue = Queue(_READY)
        self._ended = Event()
        self._thread = Thread(target=self._run, args=(items,), name="dali", daemon=True)
        self._thread.start()

    def _run(self, items: Any) -> None:
        try:
            for item in items:
                self._put(item)
                if self._ended.is_set():
                    break
            self._put(None)
        except BaseException as error:  # raised where the items are used
            self._put(error)
        finally:
            items.close()

    def _put(self, item: Any) -> None:
        while not self._ended.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except Full:
                pass

    def __iter__(self) -> Iterator:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def end(self) -> None:
        """Stops the thread and waits for it; who still iterates gets an error."""
        self._ended.set()
        if self._thread is not current_thread():  # an iterator that was dropped is ended by the garbage collector
            self._thread.join()
        try:
            while True:
                self._queue.get_nowait()
        except Empty:
            self._queue.put(RuntimeError("the loader was closed, or began to iterate anew"))
