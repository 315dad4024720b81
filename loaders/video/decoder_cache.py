"""Scans of many files: by threads, and kept in the user's cache folder, so that a data set is looked through once."""

import gzip
import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from .scan import Scan, scan

_VERSION = "fasttrain videos 1"  # of the file's form and of what a scan finds
_NUMBERS = ("pts", "starts")
_NOT_WRITTEN_HERE = (ValueError, TypeError, AttributeError)  # by what is no cache, or a damaged one
_MAX_SIDE = 1 << 16  # pixels
_MAX_CACHE = 1 << 28  # bytes, unpacked; half a million videos have 60 MB
Key = tuple[str, int, int]  # absolute path, bytes, mtime_ns


def scan_files(paths: Sequence[Path], report: Callable[[int, int], None] | None = None) -> list[Scan]:
    """Each file's scan, from the cache where the file has not changed since; ``report(done, total)`` counts the new ones.

    A cache that is damaged or cannot be written is told of by a warning, and done without.
    """
    keys = [_key(path) for path in paths]
    place = _cache_file(paths)
    known = _load(place)
    new = [i for i, key in enumerate(keys) if key is not None and key not in known]
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "scan")
    try:
        for done, (i, found) in enumerate(zip(new, pool.map(lambda i: scan(paths[i]), new), strict=True), start=1):
            known[keys[i]] = found  # type: ignore[index]
            if report is not None:
                report(done, len(new))
    finally:  # interrupted, too: what has been found need not be looked for again
        pool.shutdown(cancel_futures=True)
        if new:
            mine = set(keys)
            _save(place, {key: found for key, found in known.items() if key in mine or _key(Path(key[0])) == key})
    missing = Scan(why="there is no such file")
    return [missing if key is None else known[key] for key in keys]


def _key(path: Path) -> Key | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return os.path.abspath(path), about.st_size, about.st_mtime_ns


def _cache_file(paths: Sequence[Path]) -> Path:
    """One for each folder that holds all of a list's files, so that parts of a data set share it."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttrain/videos"
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in paths]) if paths else ""
    return root / f"{hashlib.sha256(folder.encode(errors='surrogateescape')).hexdigest()[:24]}.json.gz"


def _load(place: Path) -> dict[Key, Scan]:
    """What a cache file holds; nothing where there is none, or none that can be read."""
    try:
        with gzip.open(place) as file:
            content = file.read(_MAX_CACHE + 1)
        if len(content) > _MAX_CACHE:
            raise ValueError(f"it has more than {_MAX_CACHE} bytes")
        version, *rows = json.loads(content)
        if version != _VERSION:
            return {}
        return {(str(path), int(size), int(time)): _unpack(row) for path, size, time, row in rows}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, EOFError, zlib.error, ArithmeticError, LookupError, RecursionError, *_NOT_WRITTEN_HERE) as error:
        warnings.warn(f"the videos are looked through again: cannot read {place}: {error}", stacklevel=4)
        return {}


def _save(place: Path, known: dict[Key, Scan]) -> None:
    rows = [_VERSION, *[[*key, _pack(found)] for key, found in known.items()]]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, prefix=place.name, delete=False) as file:
            file.write(gzip.compress(json.dumps(rows, separators=(",", ":")).encode(), compresslevel=3))
        os.replace(file.name, place)
    except OSError as error:
        warnings.warn(
            f"the videos will be looked through again the next time: cannot write {place}: {error}", stacklevel=4
        )


def _pack(found: Scan) -> dict:
    """For JSON; fields that are at their defaults are left out."""
    row = {f.name: getattr(found, f.name) for f in fields(found) if f.name not in _NUMBERS}
    row = {name: value for name, value in row.items() if value != Scan.__dataclass_fields__[name].default}
    for name in _NUMBERS:
        numbers = getattr(found, name)
        if isinstance(numbers, range):
            row[name] = {"range": [numbers.start, numbers.stop, numbers.step]}
        elif isinstance(numbers, np.ndarray):
            row[name] = numbers.tolist()
    return row


def _unpack(row: dict) -> Scan:
    for name in _NUMBERS:
        if name in row:
            numbers = row[name]
            row[name] = range(*numbers["range"]) if isinstance(numbers, dict) else np.array(numbers, dtype=np.int64)
    found = Scan(**row)
    if not all(type(value) is type(default) for value, default in zip(_plain(found), _plain(Scan()), strict=True)):
        raise ValueError("it holds something else")
    pts, starts = found.pts, found.starts
    sides = (0 < found.height <= _MAX_SIDE and 0 < found.width <= _MAX_SIDE) or not found.frames
    if found.frames < 0 or not sides or not 0 <= found.turn < 8:
        raise ValueError("it says what no video can be")
    rising = (
        starts.step > 0 if isinstance(starts, range) else np.ndim(starts) == 1 and bool((np.diff(starts) > 0).all())
    )
    if not rising or not len(starts) or starts[0] != 0 or (found.frames and starts[-1] >= found.frames):
        raise ValueError("it says where decoding begins, and that cannot be")
    if pts is not None and (len(pts) != found.frames or not (isinstance(pts, range) or np.ndim(pts) == 1)):
        raise ValueError(f"it has times of {len(pts)} frames, and there are {found.frames}")
    return found


def _plain(found: Scan) -> list:
    return [value for name, value in asdict(found).items() if name not in _NUMBERS]
