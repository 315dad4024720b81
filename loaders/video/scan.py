"""What has to be known of a video file before frames can be read from it by number, found out once.

Frame n is the n-th that a decoder gives for the whole file, in the order of presentation. Of the common kinds of files the
packets alone tell how many there are, when each is shown, and where decoding may begin: a file takes milliseconds. All
others are decoded once.
"""

import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np

MP4, MATROSKA, AVI = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"
_SEEKABLE = (MP4, MATROSKA, AVI)  # whose packets' times were found to be right, and to be found again by seeking
# FFmpeg's names of formats that are one file with all that is in it
_FORMATS = (
    *(MP4, MATROSKA, AVI, "asf", "asf_o", "av1", "dirac", "dv", "flv", "gif", "h261", "h263", "h264", "hevc", "ivf"),
    *("live_flv", "m4v", "mjpeg", "mjpeg_2000", "mpeg", "mpegts", "mpegvideo", "mxf", "nut", "obu", "ogg", "rm", "swf"),
    *("vc1", "vc1test", "vvc", "wtv", "yuv4mpegpipe"),
)
_ONE_FRAME_A_PACKET = ("h264", "hevc", "mpeg4", "vp9", "av1", "mjpeg")
_AVI_B = "B-frames in AVI"  # whose times of presentation are guessed, and several of which may share a packet
_VOP, _B_VOP = b"\0\0\1\xb6", 2  # MPEG-4 Visual (ISO/IEC 14496-2, 6.3.5): start code of a picture, coding type
_EMPTY_VOP = 12  # bytes: a shorter picture may say of itself that it is not coded, and then there is none
_IDR = 5  # type of H.264's NAL units (ISO/IEC 14496-10, table 7-1) behind which nothing refers to what was before
TRANSPOSED, MIRRORED_X, MIRRORED_Y = 1, 2, 4  # what makes a picture upright, in this order
_LATE = np.iinfo(np.int64).max
_QUARTERS = {0, TRANSPOSED | MIRRORED_Y, MIRRORED_X | MIRRORED_Y, TRANSPOSED | MIRRORED_X}


@dataclass(frozen=True)
class Scan:
    """One video file.

    Attributes:
        frames: how many can be read; 0 where it cannot be read at all.
        height: of the upright picture, in pixels.
        width: of the upright picture, in pixels.
        why: it cannot be read; empty where nothing is known against it.
        codec: FFmpeg's name of the codec.
        turn: sum of ``TRANSPOSED``, ``MIRRORED_X``, ``MIRRORED_Y``: what makes a decoded picture upright.
        pts: when each frame is shown, ascending, in the stream's own units; None where that cannot be relied on, and frames
            have to be counted from the first.
        starts: frames at which decoding may begin, ascending, 0 among them: a frame is decoded right from the last of them
            up to it. Seeking backward to its time finds it.
        special: what is unusual about the file, so that PyAV has to read it whatever decoder was asked for; or empty.
    """

    frames: int = 0
    height: int = 0
    width: int = 0
    why: str = ""
    codec: str = ""
    turn: int = 0
    pts: Sequence[int] | None = None
    starts: Sequence[int] = (0,)
    special: str = ""


@dataclass
class _Packets:
    """A file's packets in the order of decoding, and the first picture."""

    pts: list[int | None]
    key: list[bool]
    shown: list[bool]  # False: decoded, but cut away by an edit list
    doubt: str = ""  # why their number may not be that of the frames
    fixed: bool = True  # every key frame is one that nothing behind it refers past
    several: bool = False  # there are other streams of video in the file
    first: Any = None  # av.VideoFrame


def scan(path: Path) -> Scan:
    """Looks into a file. A file that cannot be read, or only in part, is no error here: see ``Scan.why``.

    A damaged file is counted up to where PyAV raises; where nothing shows that it is damaged until it is decoded (the
    packets are all there), all its packets count, and reading raises later.
    """
    try:
        with opened(path) as (container, stream):
            packets = _packets(container, stream)
            packets.several = len([s for s in container.streams.video if not _is_cover(s)]) > 1
            if not packets.doubt:
                return _found(stream, packets, sorted(_times(packets)))
        with opened(path) as (container, stream):
            return _decoded(container, stream, packets)
    except (av.FFmpegError, OSError, ValueError) as error:
        return Scan(why=reason(error))


@contextmanager
def opened(path: Path):
    """(container, its video stream) for one thread's use.

    Raises:
        ValueError: there is no video in it.
        av.FFmpegError, OSError: it cannot be opened.
    """
    with open_container(path) as container:
        yield container, video_stream(container)


def open_container(path: Path) -> Any:
    """A video file, opened: a file, and none that is a list of others (playlists and the like), whatever its name says."""
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(_FORMATS)}
    return av.open(f"file:{path}", options=options, metadata_errors="ignore")


def video_stream(container: Any) -> Any:
    """The first stream that is a video and no cover picture, to be decoded by one thread."""
    for stream in container.streams.video:
        if not _is_cover(stream):
            stream.thread_count = 1
            return stream
    raise ValueError("it has no video")


def reason(error: Exception) -> str:
    """What FFmpeg said, in one line, without the file's name."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def upright(image_HWC: np.ndarray, turn: int) -> np.ndarray:
    """The picture as it is to be seen; ``turn`` as in :class:`Scan`."""
    if turn & TRANSPOSED:
        image_HWC = image_HWC.transpose(1, 0, 2)
    return image_HWC[:: -1 if turn & MIRRORED_Y else 1, :: -1 if turn & MIRRORED_X else 1]


def _is_cover(stream: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _packets(container: Any, stream: Any) -> _Packets:
    found = _Packets([], [], [])
    kind, codec, extra = container.format.name, _codec(stream), stream.codec_context.extradata or b""
    doubts: list[str] = []
    try:
        for packet in container.demux(stream):
            if found.first is None:
                found.first = next(iter(packet.decode()), None)
            if not packet.size:
                continue  # the end of the stream
            found.pts.append(packet.pts)
            found.key.append(packet.is_keyframe)
            found.shown.append(not packet.is_discard)
            if packet.is_corrupt:
                doubts.append("damaged")
            if codec == "mpeg4" and not _one_picture(bytes(packet), b_frames=kind != AVI):
                doubts.append(_AVI_B if kind == AVI else "packets without a picture")
            if codec == "h264" and packet.is_keyframe:
                found.fixed &= _is_idr(bytes(packet), extra)
    except av.FFmpegError:
        doubts.append("damaged")
    if kind not in _SEEKABLE or (kind == AVI and codec in ("h264", "hevc")):
        doubts.append("timestamps cannot be relied on")
    if codec not in _ONE_FRAME_A_PACKET:
        doubts.append(f"codec {codec}")
    if stream.codec_context.field_order > 1 or (found.first is not None and found.first.interlaced_frame):
        doubts.append("interlaced")
    if None in found.pts or len(set(found.pts)) != len(found.pts):
        doubts.append("timestamps missing")
    elif (
        found.first is None or not found.key or not found.key[0] or min(_times(found), default=0) < (found.pts[0] or 0)
    ):
        doubts.append("no key frame at the beginning")
    if kind != MATROSKA and stream.frames != len(found.pts):
        doubts.append("fewer packets than the header says" if stream.frames else "no number of packets in the header")
    found.doubt = doubts[0] if doubts else ""
    return found


def _times(packets: _Packets) -> list[int]:
    return [p for p, shown in zip(packets.pts, packets.shown, strict=True) if shown and p is not None]


def _decoded(container: Any, stream: Any, packets: _Packets) -> Scan:
    """Decodes all of the file, up to the first packet that PyAV cannot decode."""
    times: list[int | None] = []
    why = ""
    try:
        for frame in container.decode(stream):
            packets.first = frame if not times else packets.first
            times.append(frame.pts)
    except av.FFmpegError as error:
        why = reason(error)
    if not times:
        return Scan(why=why or "it has no frames", codec=_codec(stream))
    known = None not in times and all(a < b for a, b in pairwise(times))  # type: ignore[operator]
    known &= container.format.name in _SEEKABLE and set(times) <= set(packets.pts) and packets.doubt != _AVI_B
    if not known:
        special = packets.doubt or "timestamps cannot be relied on"
        return Scan(
            len(times), *_shape(packets.first), codec=_codec(stream), turn=_turn(packets.first)[0], special=special
        )
    if sorted(_times(packets)) == times and packets.doubt.startswith(("codec", "no number")):
        packets.doubt = ""  # the packets did tell
    return _found(stream, packets, times)


def _found(stream: Any, packets: _Packets, times: list) -> Scan:
    """Of a file whose timestamps are to be relied on; ``times`` are those of its frames."""
    pts_F = np.array(times, dtype=np.int64)
    pts_P = np.array([_LATE if p is None else p for p in packets.pts], dtype=np.int64)
    key_K = np.flatnonzero(np.array(packets.key) & (pts_P != _LATE))
    later_P = np.minimum.accumulate(pts_P[::-1])[::-1]  # the earliest time at or behind each packet
    start_K = np.searchsorted(pts_F, pts_P[key_K])
    starts = np.unique(np.append(0, start_K[start_K < len(pts_F)]))
    turn, quarter = _turn(packets.first)
    special = packets.doubt
    if not special and not (packets.fixed and (later_P[key_K] == pts_P[key_K]).all()):
        special = "open GOPs"
    special = special or ("frames cut away by an edit list" if not all(packets.shown) else "")
    special = special or ("several video streams" if packets.several else "")
    special = special or ("" if quarter else "mirrored or turned by no right angle")
    return Scan(
        len(times),
        *_shape(packets.first),
        codec=_codec(stream),
        turn=turn,
        pts=compact(pts_F),
        starts=compact(starts),
        special=special,
    )


def compact(numbers: np.ndarray) -> Sequence[int]:
    """A range, where the numbers are evenly spaced; else themselves."""
    step = np.diff(numbers)
    if len(numbers) > 1 and (step == step[0]).all() and step[0]:
        return range(int(numbers[0]), int(numbers[-1]) + int(step[0]), int(step[0]))
    return range(int(numbers[0]), int(numbers[0]) + 1) if len(numbers) == 1 else numbers  # type: ignore[return-value]


def _codec(stream: Any) -> str:
    return stream.codec_context.codec.canonical_name


def _shape(frame: Any) -> tuple[int, int]:
    """(height, width) of the upright picture."""
    return (frame.width, frame.height) if _turn(frame)[0] & TRANSPOSED else (frame.height, frame.width)


def _turn(frame: Any) -> tuple[int, bool]:
    """(what makes the picture upright, whether it is a turn by a right angle), from the display matrix.

    The matrix takes (x, y) to (a x + c y, b x + d y), y pointing down; [a, b, u, c, d, v, x, y, w] in 16.16 fixed point
    (FFmpeg's libavutil/display.h).
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 0, True
    matrix = np.frombuffer(bytes(data), dtype=np.dtype(np.int32).newbyteorder(sys.byteorder))
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
    across = abs(b) + abs(c) > abs(a) + abs(d)
    x, y = (c, b) if across else (a, d)
    turn = TRANSPOSED * across | MIRRORED_X * (x < 0) | MIRRORED_Y * (y < 0)
    return turn, turn in _QUARTERS and not ((a or d) and (b or c))


def _one_picture(packet: bytes, *, b_frames: bool) -> bool:
    """Whether an MPEG-4 packet holds one coded picture, and none that is shown before it is decoded unless ``b_frames``."""
    at = packet.find(_VOP)
    if at < 0 or len(packet) - at < _EMPTY_VOP or packet.find(_VOP, at + 4) >= 0:
        return False
    return b_frames or packet[at + 4] >> 6 != _B_VOP


def _is_idr(packet: bytes, extradata: bytes) -> bool:
    """Whether an H.264 packet is an IDR picture. Its NAL units follow lengths where the header is an ``avcC``
    (ISO/IEC 14496-15, 5.3.3.1), start codes elsewhere."""
    at = 0
    if extradata[:1] != b"\1":
        while (at := packet.find(b"\0\0\1", at) + 3) > 2:
            if packet[at : at + 1] and packet[at] & 31 == _IDR:
                return True
        return False
    size = (extradata[4] & 3) + 1
    while at + size < len(packet):
        if packet[at + size] & 31 == _IDR:
            return True
        at += size + int.from_bytes(packet[at : at + size], "big")
    return False
