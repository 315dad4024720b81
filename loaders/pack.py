"""Packing: any data set -> one ``.beton`` with every image checked once.

JPEGs keep their bytes where they can: 8 bits, grey or colour, upright, not larger than asked. Everything else (PNG, CMYK,
16 bits, turned by EXIF, too large) is decoded as the loaders decode it and encoded anew. What cannot be decoded is left
out and listed in ``FILE.bad.jsonl`` with the reason. The file grows under a temporary name beside a log, so that the same
call goes on after a stop; it gets its name when it is whole.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from .beton import JPEG, MAX_SIDE, RAW, BetonWriter, new_images, page_for, read_beton
from .crop import centre_square
from .datasets import Dataset
from .datasets.base import Encoded
from .datasets.beton import Packed, classes_sha256, compress, read_side_file, side_file
from .decode import decode, is_plain
from .jpeg import read_header
from .seek import damage, seek_index

_SYNC_BYTES = 64 << 20  # written between two points to which a stopped packing goes back
_RECORD = np.dtype(
    [("index", "<i8"), ("mode", "i1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8"), ("size", "<u8"),
     ("label", "<i8"), ("before", "<u4"), ("kept", "u1")]
)  # fmt: skip
_LEFT_OUT = -1  # mode of a sample that is not in the file


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


@dataclass(frozen=True)
class Progress:
    """Where a packing is: samples looked at, of how many; bytes written; samples left out."""

    done: int
    samples: int
    bytes: int
    bad: int


@dataclass(frozen=True)
class _Packed:
    """One sample, ready to be written, and its seek index; ``content`` is None where ``why`` says why it is left out."""

    content: bytes | None
    mode: int = 0
    width: int = 0
    height: int = 0
    kept: bool = False
    why: str = ""
    seek: bytes = b""


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
    made_from = {"source": _fingerprint(dataset), "options": asdict(options)}
    if out.exists():
        return _finished(out, made_from)
    partial, log = out.with_name(out.name + ".partial"), out.with_name(out.name + ".partial.log")
    bad_file = out.with_name(out.name + ".bad.jsonl")
    vector = len(dataset.classes) if dataset.multi_label else 0
    done = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        record_N, at = _resume(partial, log, bad_file, made_from, vector)
        if not len(record_N):
            _check_space(dataset, out, options)
            log.write_bytes(json.dumps(made_from).encode() + b"\n")
            bad_file.write_text("")
        rows, bad = [*record_N], int((record_N["mode"] == _LEFT_OUT).sum())
        done = len(rows)
        page = page_for(
            int((record_N["size"] + record_N["before"]).max(initial=0)) + 4 * vector, _page(dataset, options)
        )
        writer = BetonWriter(partial, samples=len(dataset), vector=vector, page=page, at=at)
        try:
            with log.open("ab") as log_to, bad_file.open("a") as bad_to:
                unsaved: list[np.void] = []
                mark = writer.at
                for index, packed in _in_order(dataset, options, range(len(rows), len(dataset)), workers):
                    done = index
                    row = _add(writer, dataset, index, packed)
                    if packed.content is None:
                        bad_to.write(
                            json.dumps({"index": index, "name": _name(dataset, index), "why": packed.why}) + "\n"
                        )
                    rows.append(row)
                    unsaved.append(row)
                    if writer.at - mark > _SYNC_BYTES or index + 1 == len(dataset):
                        writer.flush()  # data first, then the note that it is there
                        _flush(bad_to)
                        log_to.write(b"".join(r.tobytes() for r in unsaved))
                        _flush(log_to)
                        unsaved, mark = [], writer.at
                    bad += packed.content is None
                    if report:
                        report(Progress(index + 1, len(dataset), writer.at, bad))
            about = _finish(writer, dataset, np.array(rows, dtype=_RECORD), made_from, partial)
        finally:
            writer.close()
        _write(side_file(out), json.dumps(about, indent=1).encode())
        os.replace(partial, out)
        log.unlink()
        if not about["bad"]:
            bad_file.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write {partial} (sample {done} of {len(dataset)}): {error.strerror or error}; the same command goes "
            "on from what is safely on disk"
        ) from error
    return about


def check(path: Path) -> dict[str, Any]:
    """Compares a packed file's whole content with its checksum.

    Raises:
        ValueError: no ``FILE.json``, or the content is not what was packed.
    """
    beside = side_file(path)
    if not beside.is_file():
        raise ValueError(f"there is no {beside}: only files made by fasttrain pack have a checksum")
    about = read_side_file(beside)
    read_beton(path)
    found = _sha256(path)
    if found != about["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is {found}, and {about['sha256']} was packed")
    return about


def _fingerprint(dataset: Dataset) -> str:
    """Of a data set's samples, labels and splits: changes when its files do."""
    parts = [dataset.identity(), dataset.content]
    if isinstance(dataset.read, Encoded):
        parts.append(dataset.read.fingerprint(len(dataset)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _finished(out: Path, made_from: dict) -> dict[str, Any]:
    """What lies beside a file that is there already, if it is what would be made."""
    try:
        about = read_side_file(side_file(out))
    except ValueError:
        raise ValueError(
            f"{out} is there already, and no {side_file(out).name} says what it is: delete it first"
        ) from None
    if any(about.get(k) != v for k, v in made_from.items()) or about.get("bytes") != out.stat().st_size:
        raise ValueError(f"{out} is there already, packed from other data or with other options: delete it first")
    return about


def _resume(partial: Path, log: Path, bad_file: Path, made_from: dict, vector: int) -> tuple[np.ndarray, int]:
    """Records of the samples that an earlier packing has safely on disk, and where they end; what follows is cut off."""
    nothing = np.zeros(0, dtype=_RECORD), 0
    if not (partial.is_file() and log.is_file() and bad_file.is_file()):
        return nothing
    first, _, rest = log.read_bytes().partition(b"\n")
    try:
        before = json.loads(first)
    except ValueError:
        return nothing
    if before != made_from:
        what = "its options" if before.get("source") == made_from["source"] else "the data set"
        raise ValueError(f"{what} changed since the packing into {partial} began: delete that file to begin anew")
    record_N = np.frombuffer(rest[: len(rest) // _RECORD.itemsize * _RECORD.itemsize], _RECORD)
    written = record_N[record_N["mode"] != _LEFT_OUT]
    at = int((written["ptr"] + written["size"]).max(initial=0))
    at = max(at, int(written["label"].max(initial=0)) + 4 * vector) if vector and len(written) else at
    lines = bad_file.read_bytes().splitlines(keepends=True)[: len(record_N) - len(written)]
    if partial.stat().st_size < at or len(lines) < len(record_N) - len(written):
        return nothing
    os.truncate(log, len(first) + 1 + record_N.nbytes)
    os.truncate(bad_file, sum(map(len, lines)))
    return record_N, at


def _in_order(dataset: Dataset, options: Options, todo: range, workers: int) -> Iterator[tuple[int, _Packed]]:
    """Encoded samples, in order, made by threads that stay a little ahead."""
    workers = workers or len(os.sched_getaffinity(0))
    rest = iter(todo)
    with ThreadPoolExecutor(workers) as pool:
        try:
            ahead: list[tuple[int, Future]] = []
            for index in islice(rest, 4 * workers):
                ahead.append((index, pool.submit(_encode, dataset, options, index)))
            while ahead:
                index, future = ahead.pop(0)
                yield index, future.result()
                for following in islice(rest, 1):
                    ahead.append((following, pool.submit(_encode, dataset, options, following)))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _encode(dataset: Dataset, options: Options, index: int) -> _Packed:
    """One sample as it will be kept."""
    try:
        if isinstance(dataset.read, Encoded):
            content = dataset.read.encoded(index)
            name = dataset.read.name(index)
            pixels = isinstance(dataset.read, Packed) and dataset.read.raw_N[index]
            kept = None if options.raw or options.square or pixels else _kept(content.tobytes(), name, options)
            if kept is not None:
                return kept
        image_HWC = dataset.read(index)
    except ValueError as error:
        return _Packed(None, why=str(error))
    if options.square:
        image_HWC = centre_square(image_HWC, options.square)
    height, width = image_HWC.shape[:2]
    if options.max_size and max(height, width) > options.max_size:
        scale = options.max_size / max(height, width)
        size = max(round(width * scale), 1), max(round(height * scale), 1)
        image_HWC = np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0))
    height, width = image_HWC.shape[:2]
    if max(height, width) > MAX_SIDE:
        return _Packed(None, why=f"{width} x {height} pixels: sides of a .beton go to {MAX_SIDE}; set --max-size")
    if options.raw:
        return _Packed(np.ascontiguousarray(image_HWC).tobytes(), RAW, width, height)
    out = io.BytesIO()
    try:
        Image.fromarray(image_HWC).save(out, "JPEG", quality=options.quality)
    except OSError as error:
        return _Packed(None, why=f"{width} x {height} pixels cannot be encoded: {error}")
    return _Packed(out.getvalue(), JPEG, width, height, seek=_index(out.getvalue(), options))


def _kept(content: bytes, name: str, options: Options) -> _Packed | None:
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
    return _Packed(content, JPEG, width, height, kept=True, seek=_index(content, options))


def _index(jpeg: bytes, options: Options) -> bytes:
    return seek_index(jpeg) if options.seek else b""


def _add(writer: BetonWriter, dataset: Dataset, index: int, packed: _Packed) -> Any:
    row = np.zeros((), dtype=_RECORD)
    row["index"], row["mode"] = index, _LEFT_OUT
    if packed.content is not None:
        label = [dataset.targets_N[index].astype("<f4").tobytes()] if dataset.multi_label else []
        try:
            before, *places = writer.add(packed.seek, packed.content, *label)
        except ValueError as error:
            raise ValueError(f"{_name(dataset, index)}: {error}; set --max-size") from None
        row["mode"], row["ptr"], row["size"] = packed.mode, places[0], len(packed.content)
        row["before"] = places[0] - before
        row["width"], row["height"], row["kept"] = packed.width, packed.height, packed.kept
        row["label"] = places[1] if label else int(dataset.targets_N[index])
    return row[()]


def _finish(writer: BetonWriter, dataset: Dataset, record_N: np.ndarray, made_from: dict, partial: Path) -> dict:
    """Writes head and table; returns what goes beside the file."""
    good_N, bad_file = record_N["mode"] != _LEFT_OUT, partial.with_suffix(".bad.jsonl")
    if not good_N.any():
        raise ValueError(f"none of the {len(dataset)} samples of {dataset.name} can be decoded; see {bad_file}")
    chosen = record_N[good_N]
    image_N = new_images(len(chosen))
    for name in ("mode", "width", "height", "ptr"):
        image_N[name] = chosen[name]
    writer.finish(image_N, chosen["size"], chosen["label"])
    new_of_old = np.cumsum(good_N) - 1
    splits = {k: compress(new_of_old[v[good_N[v]]]) for k, v in dataset.splits.items()}
    return {
        "name": dataset.name,
        "classes": list(dataset.classes),
        "classes_sha256": classes_sha256(dataset.classes),
        "splits": splits,
        "samples": len(chosen),
        "kept": int(chosen["kept"].sum()),
        "bad": int((~good_N).sum()),
        "bytes": partial.stat().st_size,
        "sha256": _sha256(partial),
        "head_sha256": read_beton(partial).head_sha256,
    } | made_from


def _name(dataset: Dataset, index: int) -> str:
    return dataset.read.name(index) if isinstance(dataset.read, Encoded) else f"{dataset.name}, sample {index}"


def _page(dataset: Dataset, options: Options) -> int:
    """Bytes a page: 8 MiB as FFCV has it, more where a sample may need it, 2 MiB for a small data set."""
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
    largest = min(largest, most)
    page = 1 << 21 if largest * len(dataset) < 1 << 26 and largest < 1 << 19 else 1 << 23
    while page < 8 * largest and page < 1 << 31:
        page *= 2
    return page


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write(path: Path, content: bytes) -> None:
    """A whole file or none."""
    unfinished = path.with_name(path.name + ".partial")
    with unfinished.open("wb") as file:
        file.write(content)
        _flush(file)
    os.replace(unfinished, path)
