"""Readers of frames by number, one a decoder: all give the frame that PyAV gives for a number.

PyAV reads every file. The others are given the kinds of files on which they were found to agree with it frame for frame;
``Scan.special`` and ``_CODECS`` decide, before a file is opened. What was found of decord2 3.4, torchcodec 0.17 and DALI 2.4
(``tests/loaders/test_decoders.py`` has a clip of each kind):

- decord serves wrong frames behind a seek in open GOPs and intra refresh, counts the packets of MPEG-4 in AVI that hold no
  picture, ignores mirrored pictures, and cannot always go back in HEVC; interlaced pictures have other colours;
- torchcodec loses the last frames of H.264 with open GOPs or intra refresh, and of B-frames in AVI, and ignores mirrored
  pictures;
- DALI decodes VP8, VP9 and MJPEG on a CPU, and nothing else.

Frames are the same; pixels may differ by how YUV becomes RGB: by ``LARGEST_MEAN`` of 255 on average over a frame at most. decord
and torchcodec give PyAV's very bytes for 8-bit 4:2:0 video of even height and width.

A damaged file: where the decoder that was asked raises, PyAV's answer counts, which is the frame or an error. FFmpeg hides
some damage (always in MPEG-4, often in H.264): what it makes up then is what is served.
"""

import importlib.metadata
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from ..parts import missing_part
from .scan import Scan, open_container, opened, reason, upright, video_stream

LARGEST_MEAN = 2.0
_DALI = {"vp8", "vp9", "mjpeg"}
_DECORD = _DALI | {"h264", "mpeg4"}
_CODECS = {"decord": _DECORD, "torchcodec": _DECORD | {"hevc"}, "dali": _DALI}
_PARTS = {
    "decord": ("decord", "decord2"),
    "torchcodec": ("torchcodec.decoders", "torchcodec"),
    "dali": ("nvidia.dali", ""),
}
_NEAR = 4  # a place where decoding may begin that is no further on than this is not sought, but reached by decoding


class Reader:
    """An open video, for one thread at a time.

    Attributes:
        keep: whether it is worth staying open for the next frames that are asked for.
    """

    keep = True

    def __init__(self, path: Path, scan: Scan) -> None:
        raise NotImplementedError

    def frames(self, frame_T: np.ndarray) -> np.ndarray:
        """Frames by number, all of which exist: uint8 [T, H, W, 3], upright."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives memory and files back."""


class PyavReader(Reader):
    """Seeks by the scan's table, decodes on from there, and takes the frames by their time.

    What is not found so, it looks for from the first frame on.
    """

    def __init__(self, path: Path, scan: Scan) -> None:
        self._path, self._scan = path, scan
        self._container: Any = None
        if scan.pts is not None:
            self._container = open_container(path)
            self._stream = video_stream(self._container)

    def frames(self, frame_T: np.ndarray) -> np.ndarray:
        scan = self._scan
        out_THWC = np.empty((len(frame_T), scan.height, scan.width, 3), dtype=np.uint8)
        asked = sorted(set(frame_T.tolist()))
        missing = asked
        if scan.pts is not None:
            missing = self._sought(asked, frame_T, out_THWC)
        if missing:
            self._counted(missing, frame_T, out_THWC)
        return out_THWC

    def close(self) -> None:
        if self._container is not None:
            self._container.close()

    def _sought(self, asked: list[int], frame_T: np.ndarray, out_THWC: np.ndarray) -> list[int]:
        """Fills in what is found by seeking; returns what is not, and what hidden damage may have changed: that depends on
        all that was decoded before."""
        starts, pts, missing = self._scan.starts, self._scan.pts, []
        assert pts is not None
        decoded: Iterator[Any] = iter(())
        at, sound = None, True  # the frame decoded last, and whether nothing since the place begun at was damaged
        for number in asked:
            start = starts[bisect_right(starts, number) - 1]
            try:
                if at is None or start - at > _NEAR or (start > at and not sound):
                    self._container.seek(int(pts[start]), stream=self._stream)
                    decoded, sound = self._container.decode(self._stream), True
                frame = None
                for frame in decoded:
                    sound = sound and not frame.is_corrupt
                    if frame.pts is not None and frame.pts >= pts[number]:
                        break
                at = number if frame is not None and frame.pts == pts[number] else None
            except av.FFmpegError:
                at = None
            if at is None or not sound:
                missing.append(number)
            else:
                self._place(frame, number, frame_T, out_THWC)
        return missing

    def _counted(self, missing: list[int], frame_T: np.ndarray, out_THWC: np.ndarray) -> None:
        """Fills in frames by decoding from the first on; counts them where their times cannot be relied on."""
        times = self._scan.pts
        wanted = {(number if times is None else int(times[number])): number for number in missing}
        with opened(self._path) as (container, stream):
            try:
                for count, frame in enumerate(container.decode(stream)):
                    number = wanted.pop(count if times is None else frame.pts, None)
                    if number is not None:
                        self._place(frame, number, frame_T, out_THWC)
                        if not wanted:
                            return
            except av.FFmpegError as error:
                raise ValueError(f"frame {min(wanted.values())}: {reason(error)}") from error
        raise ValueError(f"frame {min(wanted.values())} is not in what can be decoded of it")

    def _place(self, frame: Any, number: int, frame_T: np.ndarray, out_THWC: np.ndarray) -> None:
        image_HWC = upright(frame.to_ndarray(format="rgb24"), self._scan.turn)
        if image_HWC.shape != out_THWC.shape[1:]:
            raise ValueError(f"frame {number} is of another size than the first")
        out_THWC[frame_T == number] = image_HWC


class DecordReader(Reader):
    """decord, one thread for each reader. It decodes ahead of what was asked for, for nothing: a new one is quicker."""

    keep = False

    def __init__(self, path: Path, scan: Scan) -> None:
        import decord

        self._video = decord.VideoReader(str(path), num_threads=1)
        _agree(len(self._video), scan)

    def frames(self, frame_T: np.ndarray) -> np.ndarray:
        return self._video.get_batch(frame_T).asnumpy()


class TorchcodecReader(Reader):
    """torchcodec, one thread for each reader, with its own exact scan."""

    def __init__(self, path: Path, scan: Scan) -> None:
        from torchcodec.decoders import VideoDecoder

        self._video = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, device="cpu")
        _agree(len(self._video), scan)

    def frames(self, frame_T: np.ndarray) -> np.ndarray:
        return self._video.get_frames_at(frame_T.tolist()).data.contiguous().numpy()


class DaliReader(Reader):
    """DALI's decoder on the CPU: the file's bytes in memory, and a pipeline that is fed them with the numbers each time."""

    def __init__(self, path: Path, scan: Scan) -> None:
        self._content, self._pipe = np.fromfile(path, dtype=np.uint8), _dali_pipeline()

    def frames(self, frame_T: np.ndarray) -> np.ndarray:
        self._pipe.feed_input("encoded", [self._content])
        self._pipe.feed_input("frames", [frame_T.astype(np.int32)])
        (out,) = self._pipe.run()
        return np.array(out.at(0))  # the pipeline's own memory is used again


def _dali_pipeline() -> Any:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    pipe = Pipeline(
        batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_async=False, exec_pipelined=False
    )
    with pipe:
        encoded = fn.external_source(name="encoded")
        number = fn.external_source(name="frames", dtype=types.DALIDataType.INT32, ndim=1)
        pipe.set_outputs(fn.decoders.video(encoded, frames=number, device="cpu"))
    pipe.build()
    return pipe


def _agree(count: int, scan: Scan) -> None:
    if count != scan.frames:
        raise ValueError(f"it counts {count} frames instead of {scan.frames}")


READERS: dict[str, Callable[[Path, Scan], Reader]] = {
    "decord": DecordReader,
    "torchcodec": TorchcodecReader,
    "pyav": PyavReader,
    "dali": DaliReader,
}


def choose_decoder(decoder: str) -> tuple[str, str]:
    """(decoder, its name and version): ``auto`` is decord where it can be imported, else pyav.

    Raises:
        ValueError: no such decoder, or it is not here.
    """
    if decoder == "auto":
        decoder = "pyav" if missing_part("decord") else "decord"
    if decoder not in READERS:
        raise ValueError(f"data.decoder: there is no {decoder!r}; use auto, {', '.join(READERS)}")
    if decoder == "pyav":
        return decoder, f"pyav {av.__version__}"
    module, package = _PARTS[decoder]
    missing = missing_part(module)
    if missing:
        raise ValueError(f"data.decoder: {decoder} is not here ({missing}); use pyav, which always is")
    if decoder == "dali":
        import nvidia.dali

        return decoder, f"dali {nvidia.dali.__version__}"
    return decoder, f"{decoder} {importlib.metadata.version(package)}"


def why_pyav(decoder: str, scan: Scan) -> str:
    """Why PyAV reads a file instead of the decoder that was asked for; empty where it does not."""
    if decoder == "pyav" or not scan.frames:
        return ""
    special = scan.special or ("turned" if scan.turn and decoder == "dali" else "")
    return special or ("" if scan.codec in _CODECS[decoder] else f"codec {scan.codec}")
