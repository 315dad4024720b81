"""Small videos of every kind for the tests, and the real ones that ``scripts/clips.sh`` fetches."""

import os
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT = 96, 64
# the user's own, whatever tests set later
REAL_CLIPS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttrain/clips"


@cache
def _texture(height: int, width: int) -> np.ndarray:
    """Smooth random waves: uint8 [H, W, 3]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / 16.0
    waves = [sum(np.sin(a * y + b * x + c) for a, b, c in rng.uniform(-2, 2, (5, 3)) * [1, 1, 3]) for _ in range(3)]
    return np.clip(128 + 25 * np.stack(waves, axis=2), 0, 255).astype(np.uint8)


def picture(number: int, *, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A moving texture that has the frame's number in its upper half as eight black or white blocks: uint8 [H, W, 3]."""
    image = np.roll(_texture(height, width), (number, 2 * number), axis=(0, 1)).copy()
    bh, bw = height // 4, width // 4
    for bit in range(8):
        row, column = divmod(bit, 4)
        image[row * bh : (row + 1) * bh, column * bw : (column + 1) * bw] = 235 if number >> bit & 1 else 16
    return image


def number_of(image: np.ndarray) -> int:
    """The number in an upright :func:`picture`."""
    bh, bw = image.shape[0] // 4, image.shape[1] // 4
    blocks = [image[r * bh + 2 : (r + 1) * bh - 2, c * bw + 2 : (c + 1) * bw - 2] for r in (0, 1) for c in range(4)]
    return sum(int(block.mean() > 128) << bit for bit, block in enumerate(blocks))


def write(
    path: Path,
    codec: str,
    *,
    count: int = 40,
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    width: int = WIDTH,
    height: int = HEIGHT,
    rate: Fraction = Fraction(25),
    ticks: list[int] | None = None,
    container: dict[str, str] | None = None,
    gop: int = 12,
    b_frames: int = 0,
    sound: bool = False,
    **about,
) -> Path:
    """Encodes frames 0 .. ``count`` - 1; ``ticks`` are their times in milliseconds, otherwise the rate is constant."""
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        context = stream.codec_context
        context.gop_size, context.max_b_frames, context.thread_count = gop, b_frames, 1
        for name, value in about.items():
            setattr(context, name, value)
        if ticks is not None:
            context.time_base = stream.time_base = Fraction(1, 1000)
        tone = out.add_stream("aac" if path.suffix == ".mp4" else "mp2", rate=16000) if sound else None
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number, width=width, height=height), format="rgb24")
            frame.pts = number if ticks is None else ticks[number]
            frame.time_base = 1 / rate if ticks is None else Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        if tone is not None:
            _hum(out, tone)
    return path


def _hum(out, stream, seconds: float = 1.5) -> None:
    for start in range(0, int(16000 * seconds), 1000):
        wave = np.sin(np.arange(start, start + 1000) / 10).astype(np.float32)
        wave = wave[None] if stream.codec_context.format.name == "fltp" else (wave[None] * 9000).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(wave, format=stream.codec_context.format.name, layout="mono")
        frame.sample_rate, frame.pts = 16000, start
        out.mux(stream.encode(frame))
    out.mux(stream.encode())


X264 = {"preset": "veryfast", "crf": "18"}
_KEYS = "keyint=12:min-keyint=12:scenecut=0"
_H265 = {"preset": "ultrafast", "crf": "18"}
_XVID = {"qscale": "3"}
_ONE = "log-level=none:pools=1:frame-threads=1:"
_TICKS = np.random.default_rng(1).integers(10, 90, 40).cumsum().tolist()

# clips that can be read from the first frame to the last, and what to write them with
_WRITTEN: dict[str, tuple[str, dict]] = {
    "long.mp4": ("libx264", {"options": X264, "gop": 30, "b_frames": 2, "sound": True}),
    "short.mp4": ("libx264", {"options": X264, "gop": 4}),
    "open.mp4": ("libx264", {"options": {**X264, "x264-params": f"open-gop=1:{_KEYS}"}, "b_frames": 2}),
    "refresh.mp4": ("libx264", {"options": {**X264, "intra-refresh": "1"}}),
    "varying.mp4": ("libx264", {"options": X264, "ticks": _TICKS, "b_frames": 2}),
    "varying.mkv": ("libx264", {"options": X264, "ticks": _TICKS, "b_frames": 2}),
    "fragments.mp4": (
        "libx264",
        {"options": X264, "b_frames": 2, "container": {"movflags": "frag_keyframe+empty_moov"}},
    ),
    "b_frames.ts": ("libx264", {"options": X264, "b_frames": 2}),
    "h264.avi": ("libx264", {"options": X264, "b_frames": 2}),
    "one.mp4": ("libx264", {"options": X264, "count": 1}),
    "three.mp4": ("libx264", {"options": X264, "count": 3, "b_frames": 2}),
    "odd444.mp4": ("libx264", {"options": X264, "width": 65, "height": 49, "pix_fmt": "yuv444p"}),
    "interlaced.mp4": ("libx264", {"options": {**X264, "flags": "+ildct+ilme"}}),
    "bt709.mp4": ("libx264", {"options": X264, "color_range": 1, "colorspace": 1}),
    "full_range.mp4": ("libx264", {"options": X264, "color_range": 2, "pix_fmt": "yuvj420p"}),
    "ten_bits.mp4": ("libx264", {"options": X264, "pix_fmt": "yuv420p10le"}),
    "hevc.mp4": ("libx265", {"options": {**_H265, "x265-params": f"{_ONE}open-gop=0:{_KEYS}"}, "b_frames": 2}),
    "hevc_open.mp4": ("libx265", {"options": {**_H265, "x265-params": f"{_ONE}open-gop=1:{_KEYS}"}, "b_frames": 2}),
    "xvid.avi": ("mpeg4", {"options": _XVID, "codec_tag": "XVID"}),
    "xvid_odd.avi": ("mpeg4", {"options": _XVID, "width": 65, "height": 49}),
    "xvid_b_frames.avi": ("mpeg4", {"options": _XVID, "b_frames": 2, "codec_tag": "XVID"}),
    "mpeg4.mp4": ("mpeg4", {"options": _XVID, "b_frames": 2}),
    "mpeg2.mpg": ("mpeg2video", {"options": _XVID, "b_frames": 2}),
    "mjpeg.avi": ("mjpeg", {"pix_fmt": "yuvj420p", "count": 20}),
    "vp8.webm": ("libvpx", {"options": {"cpu-used": "5", "b": "1M", "auto-alt-ref": "1", "lag-in-frames": "16"}}),
    "vp9.webm": ("libvpx-vp9", {"options": {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "0"}}),
}
_TURNED = {"turned90.mp4": (90, False), "turned180.mp4": (180, False), "turned270.mkv": (-90, False)}
_TURNED |= {"mirrored.mp4": (0, True), "turned90_mirrored.mp4": (90, True)}
WHOLE = (*_WRITTEN, *_TURNED, "latin1.mp4", "edit_list.mp4")


def make(folder: Path) -> dict[str, Path]:
    """Writes the clips of :data:`WHOLE`."""
    paths = {name: write(folder / name, codec, **how) for name, (codec, how) in _WRITTEN.items()}
    for name, (degrees, mirrored) in _TURNED.items():
        paths[name] = copied(paths["long.mp4"], folder / name, degrees=degrees, mirrored=mirrored)
    paths["latin1.mp4"] = folder / "latin1.mp4"
    copied(paths["short.mp4"], paths["latin1.mp4"], title="Zoe")
    content = paths["latin1.mp4"].read_bytes()
    assert content.count(b"Zoe") == 1
    paths["latin1.mp4"].write_bytes(content.replace(b"Zoe", b"Zo\xeb"))
    paths["edit_list.mp4"] = copied(paths["long.mp4"], folder / "edit_list.mp4", begin=8)
    return paths


def copied(
    source: Path,
    path: Path,
    *,
    degrees: int = 0,
    mirrored: bool = False,
    title: str = "",
    begin: int = 0,
    last: int = 0,
) -> Path:
    """The same packets, to be shown turned counterclockwise (and then mirrored), with a title, with an edit list that
    leaves out the first frames, or without those behind the ``last``."""
    with av.open(str(source)) as given, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        if degrees or mirrored:
            stream.set_display_rotation(degrees, hflip=mirrored)
        if title:
            out.metadata["title"] = title
        packets = [p for p in given.demux(given.streams.video[0]) if p.size]
        step = sorted(p.pts for p in packets)[1] if len(packets) > 1 else 0
        for packet in packets[: last or None]:
            packet.pts, packet.dts = packet.pts - begin * step, packet.dts - begin * step
            packet.stream = stream
            out.mux(packet)
    return path


def only_sound(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        _hum(out, out.add_stream("aac", rate=16000))
    return path


def damaged(source: Path, path: Path, packets: Sequence[int]) -> Path:
    """A copy in which most of these packets (in the order of decoding) is zeros."""
    content = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        places = [(p.pos, p.size) for p in container.demux(container.streams.video[0]) if p.size]
    for at, size in (places[i] for i in packets):
        begin = min(max(size // 4, 16 if path.suffix == ".avi" else 0), size)  # AVI's and MPEG-4's headers stay
        content[at + begin : at + size] = bytes(size - begin)
    path.write_bytes(content)
    return path


def truth(path: Path) -> list[np.ndarray]:
    """All frames that PyAV decodes, upright: uint8 [H, W, 3] each. Turned by numpy alone."""
    turn = _TURNED.get(path.name, (0, False))
    out = []
    with av.open(str(path), metadata_errors="ignore") as container:
        container.streams.video[0].thread_count = 1
        try:
            for frame in container.decode(video=0):
                image = np.rot90(frame.to_ndarray(format="rgb24"), turn[0] // 90)
                out.append(image[:, ::-1] if turn[1] else image)
        except av.FFmpegError:
            pass
    return out


REAL_FRAMES = {  # as PyAV decodes them; their containers say one more of HMDB51's
    "R6llTwEh07w.mp4": 303,
    "RATRACE_wave_f_nm_np1_fr_goo_37.avi": 72,
    "SOX5yA1l24A.mp4": 332,
    "SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi": 74,
    "TrumanShow_wave_f_nm_np1_fr_med_26.avi": 48,
    "WUzgd7C1pWA.mp4": 327,
    "hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi": 83,
    "v_SoccerJuggling_g23_c01.avi": 240,
    "v_SoccerJuggling_g24_c01.avi": 251,
}


def fetch_real_clips() -> tuple[Path | None, str]:
    """(the folder of videos from UCF101, HMDB51 and Kinetics, or None; what the script said)."""
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        ["sh", str(root / "scripts/clips.sh"), str(REAL_CLIPS)], capture_output=True, text=True, timeout=300
    )
    return (None if done.returncode else REAL_CLIPS), (done.stdout + done.stderr).strip()
