"""Video files like UCF101's and Kinetics', made of photographs that Debian packages ship, for the video benchmark.

    ucf         AVI, MPEG-4 part 2 (xvid), 320 x 240, 25 frames a second, a key frame every 12, no B-frames, 440 kbit/s
    kinetics    MP4, H.264, 340 x 256, 30 frames a second, key frames up to 250 apart, B-frames, 500 kbit/s

Codecs, sizes, distances of key frames and bit rates are those of files of the two data sets (UCF101's v_SoccerJuggling_g23_c01
has 2.1 KB a frame, three clips of Kinetics-400 1.3 to 2.5 KB). A file is a hand-held camera that pans, turns and zooms over one
photograph, with a piece of another one moving before it, and sensor noise. A video is a pure function of its number and the
photographs; the bytes also depend on FFmpeg and on how many cores x264 finds.
"""

import json
import multiprocessing
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from fasttrain.loaders.philox import draw, uniform
from PIL import Image
from rich.progress import track

from .photographs import CACHE, fetch


@dataclass(frozen=True)
class Kind:
    """A kind of video file: name of FFmpeg's encoder, its options, pixels, frames and bits a second, length."""

    suffix: str
    encoder: str
    options: dict[str, str]
    width: int
    height: int
    rate: int
    bits: int
    frames: int


KINDS = {
    "ucf": Kind(".avi", "mpeg4", {"g": "12", "bf": "0"}, 320, 240, 25, 440_000, 180),
    "kinetics": Kind(".mp4", "libx264", {"g": "250", "preset": "medium"}, 340, 256, 30, 500_000, 300),
}
_CLASSES = 4  # folders, so that a data set can be made of it
# x264's AVX-512 code reads memory that nobody wrote while it chooses B-frames: of the same frames it then makes other files
_STEADY = {"x264-params": "asm=AVX2"}


def make(folder: Path, kind: str, count: int, *, photographs: list[Path] | None = None) -> Path:
    """Writes ``folder/CLASS/NUMBER.avi`` (or .mp4) and ``folder/list.csv``, unless they are there already.

    Args:
        folder: new, or of an earlier call.
        kind: a key of :data:`KINDS`.
        count: how many.
        photographs: what to film; without it those that ``benchmarks/photographs.py`` fetches.

    Raises:
        ValueError: fewer than 12, the folder holds something else, or there are no photographs to be had.
    """
    if count < 3 * _CLASSES:
        raise ValueError(f"{count} videos: {3 * _CLASSES} are needed, for {_CLASSES} classes to be in all three splits")
    about = {"version": 1, "kind": kind, "count": count}
    note = folder / "clips.json"
    if note.is_file() and json.loads(note.read_text()) == about:
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} holds something else than {count} videos of kind {kind}: name a new folder, or remove it"
        )
    photographs = photographs or fetch(CACHE.expanduser())
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    names = [f"class{i % _CLASSES}/{i:04}{KINDS[kind].suffix}" for i in range(count)]
    for name in names[:_CLASSES]:
        (part / name).parent.mkdir(parents=True)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = []
        for i, name in enumerate(names):
            pictures = photographs[i % len(photographs)], photographs[(7 * i + 3) % len(photographs)]
            jobs.append(pool.submit(_film, part / name, kind, i, *pictures))
        for job in track(jobs, f"{kind} clips", disable=not sys.stdout.isatty()):
            job.result()
    # the last of each class is for the test, the one before validates
    splits = ["train"] * max(count - 2 * _CLASSES, 0) + ["val"] * _CLASSES + ["test"] * _CLASSES
    lines = [f"{name},{name.partition('/')[0]},{split}\n" for name, split in zip(names, splits[-count:], strict=True)]
    (part / "list.csv").write_text("path,label,split\n" + "".join(lines))
    (part / note.name).write_text(json.dumps(about))
    part.replace(folder)
    return folder


def _film(path: Path, kind: str, number: int, photograph: Path, other: Path) -> None:
    import av

    k = KINDS[kind]
    with av.open(str(path), "w") as container:
        steady = _STEADY if k.encoder == "libx264" and _has_avx512() else {}
        stream: Any = container.add_stream(k.encoder, rate=Fraction(k.rate), options=k.options | steady)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = k.width, k.height, "yuv420p", k.bits
        if k.encoder == "mpeg4":
            stream.codec_context.codec_tag = "XVID"
        for image in _frames(k, number, photograph, other):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _has_avx512() -> bool:
    about = Path("/proc/cpuinfo")
    return about.is_file() and "avx512" in about.read_text()


def _frames(k: Kind, number: int, photograph: Path, other: Path):
    """uint8 [H, W, 3], one after the other."""
    scene, piece = (_opened(p, 3 * k.height) for p in (photograph, other))
    t = np.arange(k.frames)
    random_86 = np.stack([uniform(word) for word in draw(number, np.arange(6), np.arange(8)[:, None], 0)[:2]]).reshape(
        2, 8, 6
    )
    period, phase = 40 + 200 * random_86[0], 2 * np.pi * random_86[1]

    def path(i: int, *, shake: float = 0.0) -> np.ndarray:
        """-1 .. 1, smooth; a hand's trembling is added."""
        slow = sum(np.sin(2 * np.pi * t / period[i, j] + phase[i, j]) for j in range(2)) / 2
        return slow + shake * sum(np.sin(2 * np.pi * t / (period[i, j] / 12) + phase[i, j]) for j in range(2, 4))

    zoom, angle = 1.6 + 0.4 * path(0), 0.15 * path(1, shake=0.02)
    x, y = path(2, shake=0.01), path(3, shake=0.01)
    left, top = 0.5 + 0.45 * path(4), 0.5 + 0.45 * path(5)
    noise = np.random.default_rng(number)
    for i in range(k.frames):
        out = _seen(scene, k, zoom[i], angle[i], x[i], y[i])
        side = k.height // 3
        before = _seen(piece, k, 1.2, -angle[i], 0.3 * y[i], 0.3 * x[i]).crop((0, 0, side, side))
        out.paste(before, (int(left[i] * (k.width - side)), int(top[i] * (k.height - side))))
        grain = noise.standard_normal((k.height, k.width, 1)) * 2.0
        yield np.clip(np.asarray(out, dtype=np.float32) + grain, 0, 255).astype(np.uint8)


def _opened(path: Path, short: int) -> Image.Image:
    image = Image.open(path).convert("RGB")
    scale = short / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _seen(scene: Image.Image, k: Kind, zoom: float, angle: float, x: float, y: float) -> Image.Image:
    """The part of the scene that a camera shows: ``zoom`` pixels of the scene for one of the frame."""
    c, s = zoom * np.cos(angle), zoom * np.sin(angle)
    reach = zoom * np.hypot(k.width, k.height) / 2
    centre_x = scene.width / 2 + x * max(scene.width / 2 - reach, 0)
    centre_y = scene.height / 2 + y * max(scene.height / 2 - reach, 0)
    matrix = (
        *(c, -s, centre_x - c * k.width / 2 + s * k.height / 2),
        *(s, c, centre_y - s * k.width / 2 - c * k.height / 2),
    )
    return scene.transform((k.width, k.height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
