"""Packing videos: a data set of them -> one ``.beton`` of their frames, each a JPEG, one video's after the other.

A clip out of such a file costs decoding its own frames, not the video up to them; and every reader of the format sees a
data set of images in it. ``FILE.json`` says which images are which video. All else is as ``loaders/pack.py`` has it: what
cannot be read is left out and listed, and the same call goes on after a stop, from a whole video.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .beton import MAX_SIDE, read_beton
from .datasets import Dataset
from .datasets.beton import Packed
from .growing import Progress, Ready, fingerprint, finished, growing, in_order, page_of
from .pack import encode, resized
from .video import Clips
from .video.packed import PackedClips, packed_clips

_AHEAD = 2  # videos that may be under way or waiting to be written, for each thread; of these the JPEGs are in memory
LUMINANCE = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # ITU-R BT.601
_COMPARED, _SIDE = 16, 112  # frames by which the loss of quality is judged, and their shorter side in pixels


@dataclass(frozen=True)
class VideoOptions:
    """How videos are packed.

    Attributes:
        short_side: of the frames in pixels; larger ones are shrunk to it. 0 to keep their size.
        quality: of the JPEGs, 1 to 100.
        seek: put an index before each JPEG, by which loaders decode only what they show (``loaders/seek.py``).
    """

    short_side: int = 128
    quality: int = 90
    seek: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality: {self.quality} is not between 1 and 100")
        if not 0 <= self.short_side <= MAX_SIDE:
            raise ValueError(f"--short-side: {self.short_side} is not between 0 (as they are) and {MAX_SIDE} pixels")


def pack_videos(
    dataset: Dataset,
    out: Path,
    *,
    short_side: int = 128,
    quality: int = 90,
    seek: bool = True,
    workers: int = 0,
    report: Callable[[Progress], Any] | None = None,
) -> dict[str, Any]:
    """Packs a data set of videos, or goes on with a packing that was stopped.

    Every video is decoded once, by one thread, and its frames are encoded as they come. A video of which any frame cannot
    be decoded is left out. All frames of a video get the first one's size.

    Args:
        dataset: its ``read`` is a :class:`Clips`. All of its splits are packed, in its order.
        out: the ``.beton`` to make.
        short_side, quality, seek: see :class:`VideoOptions`.
        workers: threads; 0 for all cores. Each keeps the JPEGs of two videos in memory.
        report: called after every video that is written.

    Returns:
        What ``FILE.json`` says: counts (``samples`` are the frames), bytes, checksums, splits (of videos), options;
        ``videos``: ``first``, each video's first frame and behind the last one's last, and ``names``; and ``ssim_112``:
        ``mean`` and ``lowest`` structural similarity of the luminance of some ``frames`` to the originals', at a shorter
        side of 112 pixels, and the mean in ``colour``.

    Raises:
        ValueError: ``out`` is there and holds something else, the data set changed since a packing began, the disk is
            full, or no video could be decoded.
    """
    options = VideoOptions(short_side, quality, seek)
    if workers < 0:
        raise ValueError(f"--workers: {workers} is below 0")
    assert isinstance(dataset.read, Clips), f"{dataset.name} holds images: pack packs them"
    read, made_from = dataset.read, {"source": fingerprint(dataset), "options": asdict(options)}
    if out.exists():
        return finished(out, made_from)
    with growing(dataset, out, made_from) as file:
        frames = int(read.shape_N3[:, 0].sum())
        file.start(images=frames, page=page_of(_largest(read, short_side), frames))
        todo = range(file.done, len(dataset))
        for future in in_order(lambda i, stopped: _encode(read, options, i, stopped), todo, workers, _AHEAD):
            try:
                images = future.result()
            except ValueError as error:
                file.leave_out(str(error))
            else:
                file.add(images)
            if report:
                report(file.progress())
        about, record_N = file.finish()
        video_V, count_V = np.unique(record_N["index"], return_counts=True)
        names = _names(read, len(dataset))
        about["videos"] = {"first": [0, *np.cumsum(count_V).tolist()], "names": [names[v] for v in video_V]}
        packed = packed_clips(Packed(read_beton(file.partial)), about["videos"], str(file.partial))
        about["ssim_112"] = _compared(read, packed, video_V)
        file.publish(about)
    return about


def ssim(one_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
    """Structural similarity of images: float64 [B]; 1 where they are equal.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE TIP 13(4), 2004, eq. 13
    with K1 = 0.01, K2 = 0.03 and a Gaussian window of 11 x 11 pixels and sigma 1.5; the mean over windows and channels.

    Args:
        one_BCHW, other_BCHW: pixels from 0 to 255, at least 11 x 11.
    """
    one, other = (x.double().flatten(0, 1)[:, None] for x in (one_BCHW, other_BCHW))
    line = torch.exp(-(torch.arange(-5.0, 6.0, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    line /= line.sum()

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, line[None, None, :, None]), line[None, None, None, :])

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mu1, mu2 = mean(one), mean(other)
    var1, var2, cov = mean(one**2) - mu1**2, mean(other**2) - mu2**2, mean(one * other) - mu1 * mu2
    value = (2 * mu1 * mu2 + c1) * (2 * cov + c2) / ((mu1**2 + mu2**2 + c1) * (var1 + var2 + c2))
    return value.mean(dim=(1, 2, 3)).unflatten(0, one_BCHW.shape[:2]).mean(dim=1)


def _encode(read: Clips, options: VideoOptions, index: int, stopped: Event) -> list[Ready]:
    """All frames of a video; a ``ValueError`` says why it cannot be packed."""
    count = int(read.shape_N3[index, 0])
    if not count:
        raise ValueError(f"cannot read the video {read.name(index)}: {read.why(index)}")
    frames: list[Ready] = []
    for image_HWC in read.every(index):
        height, width = (frames[0].height, frames[0].width) if frames else _size(image_HWC, options.short_side)
        if max(height, width) > MAX_SIDE:
            raise ValueError(f"{width} x {height} pixels: sides of a .beton go to {MAX_SIDE}; set --short-side")
        frames.append(encode(resized(image_HWC, height, width), quality=options.quality, seek=options.seek))
        if stopped.is_set() or len(frames) > count:
            break
    if len(frames) != count and not stopped.is_set():
        more = "more" if len(frames) > count else f"only {len(frames)}"
        raise ValueError(f"the video {read.name(index)} was to have {count} frames, and has {more}")
    return frames


def _size(image_HWC: np.ndarray, short_side: int) -> tuple[int, int]:
    """(height, width) as packed: the shorter side not above ``short_side``, the aspect ratio as near as whole pixels are."""
    height, width = image_HWC.shape[:2]
    short = min(height, width)
    if not 0 < short_side < short:
        return height, width
    return round(height * short_side / short), round(width * short_side / short)


def _largest(read: Clips, short_side: int) -> int:
    """Bytes of the largest frame, at a byte a pixel."""
    _, height_N, width_N = read.shape_N3.T
    short_N = np.minimum(height_N, width_N).clip(1)
    scale_N = np.minimum(short_side / short_N, 1) if short_side else 1
    return int((height_N * width_N * scale_N**2).max(initial=0))


def _names(read: Clips, samples: int) -> list[str]:
    """What the videos are called, below the folder that they share."""
    if isinstance(read, PackedClips):
        return list(read.names)
    names = [read.name(i) for i in range(samples)]
    folder = os.path.commonpath([os.path.dirname(n) for n in names])
    return [os.path.relpath(n, folder) for n in names] if folder else names


def _compared(read: Clips, packed: PackedClips, video_V: np.ndarray) -> dict[str, Any]:
    """How alike the packed and the original middle frames of some videos are; None where no original can be read again."""
    luminance, colour = [], []
    for v in np.unique(np.linspace(0, len(video_V) - 1, _COMPARED).astype(int)).tolist():
        try:
            original_HWC = read(int(video_V[v]))
        except ValueError:  # reading in order may succeed where seeking fails
            continue
        image_HWC = packed(v)
        scale = _SIDE / min(image_HWC.shape[:2])
        height, width = (round(side * scale) for side in image_HWC.shape[:2])
        pair = [
            torch.tensor(resized(image, height, width)).permute(2, 0, 1)[None] for image in (image_HWC, original_HWC)
        ]
        colour.append(float(ssim(*pair)))
        luminance.append(float(ssim(*((image * LUMINANCE).sum(1, keepdim=True) for image in pair))))
    figures = (f(v) if v else None for f, v in ((np.mean, luminance), (min, luminance), (np.mean, colour)))
    mean, lowest, in_colour = (None if f is None else round(float(f), 4) for f in figures)
    return {"mean": mean, "lowest": lowest, "colour": in_colour, "frames": len(luminance)}
