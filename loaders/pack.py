"""Packing: any data set -> one ``.beton`` with every image checked once.

JPEGs keep their bytes where they can: 8 bits, grey or colour, upright, not larger than asked. Everything else (PNG, CMYK,
16 bits, turned by EXIF, too large) is decoded as the loaders decode it and encoded anew. What cannot be decoded is left
out and listed in ``FILE.bad.jsonl`` with the reason. The file grows under a temporary name beside a log, so that the same
call goes on after a stop; it gets its name when it is whole.
"""

import io
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .beton import JPEG, MAX_SIDE, RAW, read_beton
from .crop import centre_square
from .datasets import Dataset
from .datasets.base import Encoded
from .datasets.beton import Packed, read_side_file, side_file
from .decode import decode, is_plain
from .growing import Growing, Progress, Ready, fingerprint, finished, growing, in_order, name_of, page_of, sha256_of
from .jpeg import read_header
from .seek import damage, seek_index
from .video import Clips
from .video.packed import packed_clips

_AHEAD = 4  # images that may be under way or waiting to be written, for each thread


@dataclass(frozen=True)
class Options:
    """How images are packed.

    Attributes:
        max_size: longest side in pixels; larger images are shrunk to it. 0 for no limit.
        square: side in pixels of the centre squares to which all images are brought; 0 for none.
        quality: of JPEGs that are encoded here, 1 to 100.
        raw: keep pixels instead of JPEGs: many times the space, no decoding.
        seek: put an index before each JPEG, by which loaders decode only what they show (``loaders/seek.py``).
    """

    max_size: int = 0
    square: int = 0
    quality: int = 90
    raw: bool = False
    seek: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality: {self.quality} is not between 1 and 100")
        if self.max_size < 0 or self.square < 0 or max(self.max_size, self.square) > MAX_SIDE:
            raise ValueError(f"--max-size, --square: sides go from 0 (no limit) to {MAX_SIDE} pixels")


def pack(
    dataset: Dataset,
    out: Path,
    *,
    max_size: int = 0,
    square: int = 0,
    quality: int = 90,
    raw: bool = False,
    seek: bool = True,
    workers: int = 0,
    report: Callable[[Progress], Any] | None = None,
) -> dict[str, Any]:
    """Packs a data set, or goes on with a packing that was stopped.

    Args:
        dataset: all of its splits are packed, in its order.
        out: the ``.beton`` to make.
        max_size, square, quality, raw, seek: see :class:`Options`. Data sets that hold pixels instead of files
            (CIFAR, STL-10) are always kept raw.
        workers: threads; 0 for all cores.
        report: called after every sample that is written.

    Returns:
        What ``FILE.json`` says: counts, bytes, checksums, splits, options.

    Raises:
        ValueError: ``out`` is there and holds something else, the data set changed since a packing began, the disk is
            full, a sample is larger than 2 GiB, or no sample could be decoded.
    """
    options = Options(max_size, square, quality, raw or not isinstance(dataset.read, Encoded), seek)
    if workers < 0:
        raise ValueError(f"--workers: {workers} is below 0")
    if isinstance(dataset.read, Clips):
        raise ValueError(f"{dataset.name} holds videos: pack_videos packs them")
    made_from = {"source": fingerprint(dataset), "options": asdict(options)}
    if out.exists():
        return finished(out, made_from)
    with growing(dataset, out, made_from) as file:
        if not file.done:
            _check_space(dataset, out, options)
        file.start(images=len(dataset), page=page_of(_largest(dataset, options), len(dataset)))
        todo = range(file.done, len(dataset))
        for future in in_order(lambda i, _: _encode(dataset, options, i), todo, workers, _AHEAD):
            try:
                ready = future.result()
            except ValueError as error:
                file.leave_out(str(error))
            else:
                _add(file, ready)
            if report:
                report(file.progress())
        about, record_N = file.finish()
        about["kept"] = int(record_N["kept"].sum())
        file.publish(about)
    return about


def check(path: Path) -> dict[str, Any]:
    """Compares a packed file's whole content with its checksum.

    Raises:
        ValueError: no ``FILE.json``, one that cannot be right, or the content is not what was packed.
    """
    beside = side_file(path)
    if not beside.is_file():
        raise ValueError(f"there is no {beside}: only files made by fasttrain pack have a checksum")
    about, packed = read_side_file(beside), Packed(read_beton(path))
    if "videos" in about:
        packed_clips(packed, about["videos"], str(beside))
    found = sha256_of(path)
    if found != about["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is {found}, and {about['sha256']} was packed")
    return about


def encode(image_HWC: np.ndarray, *, quality: int, seek: bool) -> Ready:
    """An image as a JPEG with its colours at half resolution (4:2:0), and with its seek index where ``seek`` says so.

    Raises:
        ValueError: it is too large.
    """
    height, width = image_HWC.shape[:2]
    _check_sides(height, width)
    out = io.BytesIO()
    try:
        Image.fromarray(image_HWC).save(out, "JPEG", quality=quality)
    except OSError as error:
        raise ValueError(f"{width} x {height} pixels cannot be encoded: {error}") from error
    content = out.getvalue()
    return Ready(content, JPEG, width, height, seek=seek_index(content) if seek else b"")


def resized(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image resized by an antialiased bicubic filter: uint8 [height, width, 3]."""
    if image_HWC.shape[:2] == (height, width):
        return image_HWC
    image = Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.asarray(image)


def _encode(dataset: Dataset, options: Options, index: int) -> Ready:
    """One sample as it will be kept; a ``ValueError`` says why it cannot be."""
    if isinstance(dataset.read, Encoded):
        content = dataset.read.encoded(index)
        name = dataset.read.name(index)
        pixels = isinstance(dataset.read, Packed) and dataset.read.raw_N[index]
        kept = None if options.raw or options.square or pixels else _kept(content.tobytes(), name, options)
        if kept is not None:
            return kept
    image_HWC = dataset.read(index)
    if options.square:
        image_HWC = centre_square(image_HWC, options.square)
    height, width = image_HWC.shape[:2]
    if options.max_size and max(height, width) > options.max_size:
        scale = options.max_size / max(height, width)
        image_HWC = resized(image_HWC, max(round(height * scale), 1), max(round(width * scale), 1))
    if not options.raw:
        return encode(image_HWC, quality=options.quality, seek=options.seek)
    height, width = image_HWC.shape[:2]
    _check_sides(height, width)
    return Ready(np.ascontiguousarray(image_HWC).tobytes(), RAW, width, height)


def _kept(content: bytes, name: str, options: Options) -> Ready | None:
    """A JPEG that stays as it is; None for an image that has to be encoded anew.

    Raises:
        ValueError: it is a damaged JPEG.
    """
    if content[:2] != b"\xff\xd8":
        return None
    try:
        head = read_header(content)
    except ValueError as error:
        raise ValueError(f"cannot read the image {name}: {error}") from None
    if not is_plain(head):
        return None
    if options.max_size and max(head.width, head.height) > options.max_size:
        return None
    height, width = decode(content, name).shape[:2]
    why = damage(content)
    if why:
        raise ValueError(f"cannot read the image {name}: {why}")
    return Ready(content, JPEG, width, height, kept=True, seek=seek_index(content) if options.seek else b"")


def _check_sides(height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"{width} x {height} pixels: sides of a .beton go to {MAX_SIDE}; set --max-size")


def _add(file: Growing, ready: Ready) -> None:
    try:
        file.add([ready])
    except ValueError as error:
        raise ValueError(f"{name_of(file.dataset, file.done)}: {error}; set --max-size") from None


def _largest(dataset: Dataset, options: Options) -> int:
    """Bytes of the largest of some images."""
    sides = [s for s in (options.max_size, options.square) if s]
    most = 3 * min(sides) ** 2 if sides else 1 << 31
    probe = [int(i) for i in np.linspace(0, len(dataset) - 1, min(len(dataset), 64)).astype(int)]
    largest = 0
    for index in probe:
        try:
            if isinstance(dataset.read, Encoded) and not options.raw:
                largest = max(largest, len(dataset.read.encoded(index)))
            else:
                largest = max(largest, dataset.read(index).size)
        except ValueError:
            continue
    return min(largest, most)


def _check_space(dataset: Dataset, out: Path, options: Options) -> None:
    """Refuses to begin where the disk cannot hold what is to be kept as it is."""
    if not isinstance(dataset.read, Encoded) or options.max_size or options.square or options.raw:
        return
    need = dataset.read.total_bytes(len(dataset))
    free = shutil.disk_usage(out.parent).free
    if need > free:
        raise ValueError(
            f"{out.parent} has {free / 2**30:.1f} GiB free, and the images of {dataset.name} take {need / 2**30:.1f} GiB"
        )
