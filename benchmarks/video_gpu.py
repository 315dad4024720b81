"""Rows of the suite ``video`` that decode on a GPU: NVDEC by three libraries, and the JPEG frames of packed files by nvJPEG.

    dali nvdec          DALI's decoder of videos in memory, cut and resized by DALI
    torchcodec nvdec    torchcodec, a new decoder for each clip; cut and resized by loaders/resample.py
    pynvvideocodec      PyNvVideoCodec's SimpleDecoder in RGB, one a thread, pointed at the next file; cut as above
    pynvvideocodec nv12 the same in NVDEC's own NV12, made into RGB here by BT.601, as FFmpeg does where a file names no colours
    packed nvjpeg       DALI decodes a packed file's JPEG frames whole, by the GPU's JPEG engine and its cores, and cuts them

They serve the clips of our video loader: frames by number (PyAV's), boxes, flips and order, as uint8 [B, 3, T, S, S],
channels_last_3d, in device memory. Each row's first batch is compared with PyAV's (packed: with our decoder's) before anything is
timed: NVDEC's containers, seeking and colours are three libraries' own. These are rows of a benchmark; what measures
best may become a decoder of the loader. Not yet seen on a GPU.

Shape suffixes: B batch, T frames of a clip, N videos, H W height and width of a frame, S side of the output, C channels.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from fasttrain.loaders import LoaderSpec
from fasttrain.loaders.crop import cut_clip
from fasttrain.loaders.order import batches
from fasttrain.loaders.resample import cut
from fasttrain.loaders.video import Clips, PackedClips
from fasttrain.loaders.views import View
from torch import Tensor

from fasttrain.gpu_use import Gauge, opened_nvml

LARGEST_MEAN = 3.0  # of 255: what colours and filters may differ on average over a frame
_AHEAD = 3  # batches in the making, at least
_AHEAD_CLIPS = 4  # and clips a thread
_CHECKED = 8  # clips of the first batch
_NEARER = 0.9  # a clip that is so much nearer to other frames than to the right ones is not made of the right ones
# BT.601 in limited range (ITU-R BT.601-7, 2.5.1, scaled to 8 bits): (Y - 16, Cb - 128, Cr - 128) to (R, G, B)
_BT601 = ((1.164384, 0.0, 1.596027), (1.164384, -0.391762, -0.812968), (1.164384, 2.017232, 0.0))


@dataclass(frozen=True)
class Asked:
    """One batch of clips: videos, frames by number [B, T], boxes and flips."""

    index_B: np.ndarray
    frame_BT: np.ndarray
    view: View


def asked(spec: LoaderSpec, epoch: int, index_B: np.ndarray) -> Asked:
    """The clips that the video loader serves of these videos in an epoch (training: one clip of each)."""
    read, clip = _clips(spec), spec.clip
    assert clip is not None and not clip.clips
    count_B, height_B, width_B = read.shape_N3[index_B].T
    number_B = spec.number(epoch, index_B)
    frame_BT = clip(seed=spec.view_seed, number_B=number_B, index_B=index_B, count_B=count_B)
    return Asked(index_B, frame_BT, spec.plan.numbered(spec.view_seed, number_B, index_B, height_B, width_B))


def walk(spec: LoaderSpec) -> Iterator[Asked]:
    """Batches of one epoch after the other, without end."""
    for epoch in itertools.count():
        for index_B in batches(spec.epoch_order(epoch), global_batch=spec.batch, drop_last=spec.drop_last):
            yield asked(spec, epoch, index_B)


class Maker(Protocol):
    """Makes batches on a device; several may be in the making, and they are taken in the order in which they were begun."""

    def begin(self, todo: Asked) -> Any:
        """Has a batch made; what it returns is for :meth:`take`."""

    def take(self, todo: Asked, begun: Any) -> Tensor:
        """uint8 [B, 3, T, S, S], channels_last_3d; the current stream may use it."""

    def close(self) -> None:
        """Ends threads."""


class Row:
    """Batches that a maker makes, some of them ahead."""

    def __init__(self, spec: LoaderSpec, maker: Maker, workers: int) -> None:
        self.maker, self._walk = maker, walk(spec)
        self._pending: deque[tuple[Asked, Any]] = deque()
        self._ahead = max(_AHEAD, -(-_AHEAD_CLIPS * workers // spec.batch))

    def batch(self) -> tuple[Asked, Tensor]:
        """The next one."""
        while len(self._pending) < self._ahead:
            todo = next(self._walk)
            self._pending.append((todo, self.maker.begin(todo)))
        todo, begun = self._pending.popleft()
        return todo, self.maker.take(todo, begun)

    def serve(self, clips_wanted: int) -> int:
        """At least so many clips; returns how many."""
        served = 0
        while served < clips_wanted:
            served += len(self.batch()[1])
        return served

    def close(self) -> None:
        self._pending.clear()
        self.maker.close()


class Frames(Protocol):
    """Decodes on a device. Called by several threads, each with a CUDA stream of its own."""

    def __call__(self, index: int, frame_T: np.ndarray) -> Tensor:
        """Frames of a video by number, in any order, repeated as often as asked: uint8 [T, H, W, 3]."""


class Threads:
    """A :class:`Maker`: threads have clips decoded, one each, and the batch is cut at once on the device."""

    def __init__(self, frames: Frames, size: int, device: torch.device, workers: int) -> None:
        self._frames, self._size, self._device = frames, size, device
        self._pool = ThreadPoolExecutor(workers, "nvdec")
        self._local = threading.local()

    def begin(self, todo: Asked) -> list[Future]:
        return [self._pool.submit(self._one, *each) for each in zip(todo.index_B.tolist(), todo.frame_BT, strict=True)]

    def take(self, todo: Asked, begun: list[Future]) -> Tensor:
        clip_BTHWC = [future.result() for future in begun]
        if self._device.type == "cuda":
            for clip in clip_BTHWC:
                clip.record_stream(torch.cuda.current_stream(self._device))
        return cut_clips(clip_BTHWC, todo.view, self._size)

    def _one(self, index: int, frame_T: np.ndarray) -> Tensor:
        if self._device.type != "cuda":
            return self._frames(index, frame_T)
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(self._local.stream):
            clip_THWC = self._frames(index, frame_T)
            self._local.stream.synchronize()
        return clip_THWC

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def cut_clips(clip_BTHWC: list[Tensor], view: View, size: int) -> Tensor:
    """Cuts clips, whose frames may differ in size from clip to clip, where they lie: uint8 [B, 3, T, S, S], channels_last_3d.

    The same bytes as the video loader's: a clip is cut as an image of 3 T channels.
    """
    first, shapes = clip_BTHWC[0], [tuple(c.shape) for c in clip_BTHWC]
    out_BTSSC = torch.empty(len(shapes), len(first), size, size, 3, dtype=torch.uint8, device=first.device)
    for shape in set(shapes):
        here_K = [b for b, other in enumerate(shapes) if other == shape]
        image_KHWX = torch.stack([clip_BTHWC[b].permute(1, 2, 0, 3) for b in here_K]).flatten(3)
        part = View(view.box_B4[here_K], view.flip_B2[here_K], view.number_B[here_K])
        cut_KSSTC = cut(image_KHWX, part, size).permute(0, 2, 3, 1).unflatten(3, (-1, 3))
        out_BTSSC[here_K] = cut_KSSTC.permute(0, 3, 1, 2, 4)
    return out_BTSSC.permute(0, 4, 1, 2, 3)


class TorchcodecFrames:
    """torchcodec: a decoder for each clip, as a data set that is not decoded twice needs them; it keeps NVDEC's sessions."""

    def __init__(self, paths: list[Path], device: torch.device) -> None:
        from torchcodec.decoders import VideoDecoder

        self._open = partial(VideoDecoder, dimension_order="NHWC", num_ffmpeg_threads=1, device=str(device))
        self._paths, self._gpu = paths, device.type == "cuda"

    def __call__(self, index: int, frame_T: np.ndarray) -> Tensor:
        video = self._open(str(self._paths[index]))
        clip_THWC = video.get_frames_at(frame_T.tolist()).data
        if self._gpu and video.cpu_fallback:
            raise ValueError(f"it decodes {self._paths[index].name} on the CPU: {video.cpu_fallback}")
        return clip_THWC


class PynvFrames:
    """PyNvVideoCodec: a SimpleDecoder for each thread, which is pointed at one file after the other and keeps its session.

    Args:
        library: the module ``PyNvVideoCodec``.
        paths: of the videos.
        shape_N3: their frames, height and width.
        nv12: take NVDEC's own format and make RGB of it here.
        gpu: number of the device.
    """

    def __init__(self, library: Any, paths: list[Path], shape_N3: np.ndarray, *, nv12: bool, gpu: int) -> None:
        kind = library.OutputColorType.NATIVE if nv12 else library.OutputColorType.RGB
        largest = {"max_height": int(shape_N3[:, 1].max()), "max_width": int(shape_N3[:, 2].max())}
        self._open = partial(
            library.SimpleDecoder, gpu_id=gpu, use_device_memory=True, output_color_type=kind, **largest
        )
        self._paths, self._shape_N3, self._nv12 = paths, shape_N3, nv12
        self._local = threading.local()

    def __call__(self, index: int, frame_T: np.ndarray) -> Tensor:
        path = str(self._paths[index])
        decoder = getattr(self._local, "decoder", None)
        if decoder is None:
            stream = torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0
            decoder = self._local.decoder = self._open(path, cuda_stream=stream)
        else:
            decoder.reconfigure_decoder(path)
        frame_U, place_T = np.unique(frame_T, return_inverse=True)  # it leaves out what is asked for twice
        found = decoder.get_batch_frames_by_index(frame_U.tolist())
        if len(found) != len(frame_U):
            raise ValueError(f"it gives {len(found)} of {len(frame_U)} frames of {path}")
        # stacked: copied out of the decoder's own memory, which the next call writes to
        plane_UHWX = torch.stack([torch.from_dlpack(frame) for frame in found])
        if self._nv12:
            _, height, width = self._shape_N3[index].tolist()
            plane_UHWX = rgb_of_nv12(plane_UHWX.view(len(frame_U), -1, width), height)
        return plane_UHWX[torch.from_numpy(place_T).to(plane_UHWX.device)]


def rgb_of_nv12(plane_TXW: Tensor, height: int) -> Tensor:
    """RGB of NV12 frames by BT.601 in limited range, chroma repeated: uint8 [T, H, W, 3].

    Args:
        plane_TXW: uint8 [T, 1.5 H, W]: rows of luma, below them rows of interleaved chroma at half the size.
        height: H, even; W is even.
    """
    luma_THW = plane_TXW[:, :height, :, None].float() - 16
    chroma_THW2 = plane_TXW[:, height:].unflatten(2, (-1, 2)).float() - 128
    chroma_THW2 = chroma_THW2.repeat_interleave(2, 1).repeat_interleave(2, 2)
    yuv_THW3 = torch.cat([luma_THW, chroma_THW2], dim=3)
    matrix_33 = torch.tensor(_BT601, device=plane_TXW.device)
    return (yuv_THW3 @ matrix_33.T).round_().clamp_(0, 255).to(torch.uint8)


class Dali:
    """A :class:`Maker`: DALI decodes, cuts and resizes, fed with our frames, boxes and flips.

    Args:
        spec: of files (NVDEC, on a CPU only what DALI decodes there) or of a packed file (JPEG frames).
        device: where DALI works; on a CPU to try it without a GPU.
        workers: DALI's threads.
    """

    def __init__(self, spec: LoaderSpec, device: torch.device, workers: int) -> None:
        assert spec.clip is not None
        self._read, self._frames, self._size = _clips(spec), spec.clip.served, spec.size
        self.packed = isinstance(self._read, PackedClips)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        gpu = self._stream.device.index if self._stream else None
        self._pipe = _pipeline(spec.batch, self._frames, packed=self.packed, threads=workers, gpu=gpu)

    def begin(self, todo: Asked) -> dict[str, Any]:
        """Returns what DALI is fed: it does not copy the files' bytes."""
        box_B4, flip_B2 = todo.view.box_B4, todo.view.flip_B2[:, ::-1]  # (vertical, horizontal)
        shape_B2 = box_B4[:, 2:]
        fed: dict[str, Any] = {
            "start": box_B4[:, :2].astype(np.int32),
            "shape": shape_B2.astype(np.int32),
            "from": np.where(flip_B2, shape_B2, 0).astype(np.float32),
            "to": np.where(flip_B2, 0, shape_B2).astype(np.float32),
            "size": np.full(shape_B2.shape, self._size, dtype=np.float32),
        }
        if isinstance(self._read, PackedClips):
            fed = {name: np.repeat(value, self._frames, axis=0) for name, value in fed.items()}
            image_BT = todo.frame_BT + self._read.first_V[todo.index_B, None]
            fed["content"] = [self._read.packed.encoded(int(i)) for i in image_BT.flat]
        else:
            fed["content"] = [np.fromfile(self._read.name(i), dtype=np.uint8) for i in todo.index_B.tolist()]
            fed["frames"] = todo.frame_BT.astype(np.int32)
        for name, values in fed.items():
            self._pipe.feed_input(name, values)
        self._pipe.schedule_run()
        return fed

    def take(self, todo: Asked, begun: dict[str, Any]) -> Tensor:
        (output,) = self._pipe.share_outputs()
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            out_XSSC = torch.from_dlpack(output.as_tensor()).clone()
        if self._stream:
            self._stream.synchronize()  # DALI may write into its memory again
            out_XSSC.record_stream(torch.cuda.current_stream(self._stream.device))
        self._pipe.release_outputs()
        return out_XSSC.view(len(todo.index_B), -1, *out_XSSC.shape[-3:]).permute(0, 4, 1, 2, 3)

    def close(self) -> None:
        self._pipe = None


def _pipeline(batch: int, frames: int, *, packed: bool, threads: int, gpu: int | None) -> Any:
    """DALI's graph, built: of clips, or of a packed file's frames as images. Inputs are those that ``Dali.begin`` feeds."""
    from nvidia.dali import Pipeline, fn, types

    def numbers(name: str, kind: Any) -> Any:
        return fn.external_source(name=name, dtype=kind, ndim=1)

    count = batch * frames if packed else batch
    made = Pipeline(batch_size=count, num_threads=threads, device_id=gpu, prefetch_queue_depth=1)
    with made:
        encoded = fn.external_source(name="content", dtype=types.DALIDataType.UINT8, ndim=1, no_copy=True)
        how: dict[str, Any] = {"device": "cpu"} if gpu is None else {"device": "mixed", "affine": False}
        if packed:
            image = fn.decoders.image(encoded, **how)
        else:
            image = fn.decoders.video(encoded, frames=numbers("frames", types.DALIDataType.INT32), **how)
        start, shape = (numbers(name, types.DALIDataType.INT32) for name in ("start", "shape"))
        image = fn.slice(image, start=start, shape=shape, axis_names="HW")
        corner = {f"roi_{k}": numbers(n, types.DALIDataType.FLOAT) for k, n in (("start", "from"), ("end", "to"))}
        to_size = numbers("size", types.DALIDataType.FLOAT)
        made.set_outputs(fn.resize(image, size=to_size, antialias=True, **corner))  # linear: the triangle filter
    made.build()
    return made


def open_row(name: str, spec: LoaderSpec, device: torch.device, workers: int) -> Row:
    """A row by name, checked: see :data:`ROWS`.

    Raises:
        ValueError: its first batch is not what PyAV (packed: our decoder) gives.
        Exception: whatever a library raises that is not here, or cannot work here.
    """
    row = Row(spec, ROWS[name](spec, device, workers), workers)
    try:
        todo, pixels = row.batch()
        why = wrong_frames(spec, todo, pixels)
        if why:
            raise ValueError(f"frames differ: {why}")
    except Exception:
        row.close()
        raise
    return row


def wrong_frames(spec: LoaderSpec, todo: Asked, pixels: Tensor) -> str:
    """What is wrong with a batch beside what ``spec``'s data set reads itself; empty where nothing is.

    A clip is wrong if one of its frames differs by more than ``LARGEST_MEAN`` on average, or is more than twice as far from
    the right frame as from the one before or behind it, or if all of it is nearer to those before or behind: so a wrong
    number shows in a video that hardly moves, too.
    """
    read = _clips(spec)
    for b, index in enumerate(todo.index_B[:_CHECKED].tolist()):
        found_TSSC = pixels[b].permute(1, 2, 3, 0).cpu().numpy().astype(np.int16)
        last, frame_T = int(read.shape_N3[index, 0]) - 1, todo.frame_BT[b]
        near_3T = np.clip(frame_T + np.array([[0], [-1], [1]]), 0, last)
        frame_XHWC = read.frames(index, near_3T.ravel())
        cut_XSSC = np.empty((near_3T.size, *found_TSSC.shape[1:]), dtype=np.uint8)
        empty = np.empty((0, 0, 3), dtype=np.uint8)
        cut_clip(frame_XHWC, todo.view.box_B4[b], *todo.view.flip_B2[b], cut_XSSC, 0, empty)
        off_3T = np.abs(cut_XSSC.reshape(3, *found_TSSC.shape) - found_TSSC).mean((2, 3, 4))
        off_2T = np.where(near_3T[1:] == frame_T, np.inf, off_3T[1:])  # at a video's ends there is no neighbour
        wrong_T = (off_3T[0] > LARGEST_MEAN) | (off_3T[0] > 2 * off_2T.min(0))
        shifted = [off_T[np.isfinite(off_T)].sum() < _NEARER * off_3T[0][np.isfinite(off_T)].sum() for off_T in off_2T]
        if wrong_T.any() or any(shifted):
            t = int(np.argmax(wrong_T))
            off, before, behind = off_3T[:, t]
            return (
                f"frame {frame_T[t]} of {read.name(index)} by {off:.2f} of 255 on average; what is served differs from the "
                f"frame before it by {before:.2f}, from the one behind it by {behind:.2f}"
            )
    return ""


def decoder_gauge(device: torch.device) -> Gauge:
    """Tells how busy the GPU's cores, NVDEC and JPEG engine are, in percent, by NVML; nothing of what it does not tell here."""
    if device.type != "cuda":
        return dict
    try:
        pynvml, handle = opened_nvml(device)
        asked = {
            "gpu_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "nvdec_percent": lambda: pynvml.nvmlDeviceGetDecoderUtilization(handle)[0],  # and its sampling period
            "jpeg_percent": lambda: pynvml.nvmlDeviceGetJpgUtilization(handle)[0],
        }
        told = {name: ask for name, ask in asked.items() if _answers(ask, pynvml.NVMLError)}
    except Exception as error:  # no NVML, no GPU: what is measured is speed
        print(f"no figures of the decoders' use: {type(error).__name__}: {error}")
        return dict
    return lambda: {name: float(ask()) for name, ask in told.items()}


def _answers(ask: Callable[[], Any], refusal: type[Exception]) -> bool:
    try:
        ask()
    except refusal:
        return False
    return True


def _clips(spec: LoaderSpec) -> Clips:
    read = spec.dataset.read
    assert isinstance(read, Clips)
    return read


def _paths(spec: LoaderSpec) -> list[Path]:
    return [Path(_clips(spec).name(i)) for i in range(len(spec.dataset))]


def _torchcodec(spec: LoaderSpec, device: torch.device, workers: int) -> Maker:
    return Threads(TorchcodecFrames(_paths(spec), device), spec.size, device, workers)


def _pynv(spec: LoaderSpec, device: torch.device, workers: int, *, nv12: bool = False) -> Maker:
    import PyNvVideoCodec

    frames = PynvFrames(PyNvVideoCodec, _paths(spec), _clips(spec).shape_N3, nv12=nv12, gpu=device.index or 0)
    return Threads(frames, spec.size, device, workers)


ROWS: dict[str, Callable[[LoaderSpec, torch.device, int], Maker]] = {
    "dali nvdec": Dali,
    "torchcodec nvdec": _torchcodec,
    "pynvvideocodec": _pynv,
    "pynvvideocodec nv12": partial(_pynv, nv12=True),
    "packed nvjpeg": Dali,
}
