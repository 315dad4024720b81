"""Packed files that lie elsewhere, cut into pieces (``fasttrain shard``), and a cache of them on this machine's own disk.

    NAME.beton.shards.json     the list: names, sizes and SHA-256 of the pieces and of what stands beside the file
    NAME.beton.00000, ..       the pieces; one after the other they are NAME.beton
    NAME.beton.json            what `fasttrain pack` wrote beside it

and in the cache, in a folder named by the list's own SHA-256, so that two versions do not meet:

    .list.json                 the list
    NAME.beton.partial         what will be NAME.beton, and
    NAME.beton.partial.log     the numbers of the pieces that are safely in it
    NAME.beton.json, NAME.beton
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Event, Lock
from typing import Any
from urllib.parse import unquote

from .datasets.beton import read_side_file, side_file
from .urls import CHUNK, chunks, is_url, locked, patiently, read_small, sha256_of, shown, sibling, sync_folder

LIST = ".shards.json"  # behind the name of the packed file
FORMAT = 1
MAX_LIST = 64 << 20  # bytes
MAX_SIDE_FILE = 1 << 28  # bytes, as read_side_file has it
_KEPT_LIST = ".list.json"
_EVERY = 5.0  # seconds between two lines on how far it is
_LONGEST = 200  # characters of a name: endings of ours still fit behind it
_HEX = frozenset("0123456789abcdef")

Report = Callable[[str], Any]


@dataclass(frozen=True)
class Piece:
    """One file of a list: its name, its size in bytes, its SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shards:
    """What a list says: the packed file, its pieces in their order, and the file beside it, where there is one."""

    whole: Piece
    pieces: tuple[Piece, ...]
    about: Piece | None


def read_list(content: bytes, name: str) -> Shards:
    """Reads a list and checks that it can be one.

    Args:
        content: of the list.
        name: of the list, for messages.

    Raises:
        ValueError: it is damaged, names files elsewhere, or its sizes do not sum up.
    """
    try:
        given = json.loads(content)
        if given["format"] != FORMAT:
            raise ValueError(f"its format is {given['format']!r}, not {FORMAT}")
        whole = _piece(given)
        pieces = tuple(_piece(p) for p in given["pieces"])
        about = None if given["about"] is None else _piece(given["about"])
        names = [p.name for p in (whole, *pieces, *([about] if about else []))]
        if len(set(names)) < len(names):
            raise ValueError("a name is there twice")
        if not pieces or sum(p.bytes for p in pieces) != whole.bytes:
            raise ValueError(f"its pieces have {sum(p.bytes for p in pieces)} bytes, and the file {whole.bytes}")
        if about and (about.name != f"{whole.name}.json" or about.bytes > MAX_SIDE_FILE):
            raise ValueError(f"{about.name}, of {about.bytes} bytes, is not what stands beside {whole.name}")
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{name} is no list of shards as `fasttrain shard` makes it ({error!r:.100})") from None
    except ValueError as error:
        raise ValueError(f"{name} is no list of shards as `fasttrain shard` makes it: {error}") from None
    return Shards(whole, pieces, about)


def list_of(shards: Shards) -> bytes:
    """What :func:`read_list` reads."""

    def row(piece: Piece) -> dict[str, Any]:
        return {"name": piece.name, "bytes": piece.bytes, "sha256": piece.sha256}

    about = row(shards.about) if shards.about else None
    content = {"format": FORMAT, **row(shards.whole), "about": about, "pieces": [row(p) for p in shards.pieces]}
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def fetch_shards(
    place: str, *, sha256: str, cache: Path, report: Report | None = None, workers: int = 8
) -> Path:  # fmt: skip
    """Brings a packed file's pieces together in a cache, once: the same call later, or from other processes, finds the file.

    After a stop the same call goes on with the pieces that are missing. Every piece is compared with its SHA-256 when it
    arrives, and once more in the file that they make.

    Args:
        place: path or URL of the list; the pieces lie beside it.
        sha256: of the list; empty: whatever it is (only for places that are trusted).
        cache: folder on a disk of this machine's own.
        report: takes a line now and then on how far it is.
        workers: threads that read pieces.

    Returns:
        The packed file in the cache.

    Raises:
        ValueError: the list has another SHA-256 or is damaged, a piece is missing or damaged, the disk has too little room
            or cannot be written, or the network fails for longer than a few attempts take.
    """
    name, report = shown(place), report or (lambda _: None)
    if sha256 and (kept := _kept(cache / sha256[:16].lower(), sha256.lower())):
        return kept
    content = read_small(place, limit=MAX_LIST)
    found = hashlib.sha256(content).hexdigest()
    if sha256 and found != sha256.lower():
        raise ValueError(f"the list {name} has the SHA-256 {found}, not {sha256}: it is damaged, or another one's")
    shards = read_list(content, name)
    return _brought(shards, content, place, cache / found[:16], report, workers)


def fetch_packed(path: Path, *, cache: Path, report: Report | None = None) -> Path:
    """Copies a packed file that is not cut into pieces, with what stands beside it, to a cache; as :func:`fetch_shards`.

    Raises:
        ValueError: there is nothing beside it to compare it with, or as :func:`fetch_shards`.
    """
    beside = side_file(path)
    if not beside.is_file():
        raise ValueError(
            f"{path} has no {beside.name} with its SHA-256, so a copy could not be compared; see `fasttrain shard`"
        )
    about = read_side_file(beside)
    name = _safe(path.name)
    whole = Piece(name, about["bytes"], about["sha256"])
    shards = Shards(whole, (whole,), Piece(beside.name, beside.stat().st_size, sha256_of(beside)))
    content = list_of(shards)
    folder = cache / hashlib.sha256(content).hexdigest()[:16]
    return _brought(shards, content, str(path), folder, report or (lambda _: None), 1)


def list_place(root: str) -> str:
    """Where the list is: ``root`` itself, or beside the packed file that ``root`` names."""
    name = (root.partition("?")[0] if is_url(root) else root).rpartition("/")[2]
    return root if name.endswith(LIST) else sibling(root, unquote(name) + LIST)


def _piece(given: Any) -> Piece:
    name, size, digest = given["name"], given["bytes"], given["sha256"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{size!r:.40} is no size in bytes")
    if not isinstance(digest, str) or len(digest) != 64 or not _HEX.issuperset(digest):
        raise ValueError(f"{digest!r:.80} is no SHA-256")
    return Piece(_safe(name), size, digest)


def _safe(name: Any) -> str:
    """A file's name that stays in its folder."""
    if not isinstance(name, str) or not 1 <= len(name.encode(errors="replace")) <= _LONGEST:
        raise ValueError(f"{name!r:.80} is no file's name of 1 to {_LONGEST} bytes")
    if name.startswith(".") or not name.isprintable() or {"/", "\\", ":", "?", "#"} & set(name):
        raise ValueError(f"{name!r} is no plain file's name")
    return name


def _kept(folder: Path, sha256: str) -> Path | None:
    """The packed file, where an earlier call brought it there."""
    try:
        content = (folder / _KEPT_LIST).read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content).hexdigest() != sha256:
        return None
    shards = read_list(content, str(folder / _KEPT_LIST))
    return folder / shards.whole.name if _is_there(shards, folder) else None


def _is_there(shards: Shards, folder: Path) -> bool:
    wanted = [shards.whole] + ([shards.about] if shards.about else [])
    files = [(folder / piece.name, piece.bytes) for piece in wanted]
    return all(file.is_file() and file.stat().st_size == size for file, size in files)


def _brought(shards: Shards, content: bytes, place: str, folder: Path, report: Report, workers: int) -> Path:
    out = folder / shards.whole.name
    if _is_there(shards, folder):
        return out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", lambda: report(f"{out.name}: another process is fetching it")) as alone:
            if not alone:
                raise ValueError(f"data.cache: the file system of {folder} has no locks; name a folder on a local disk")
            if not _is_there(shards, folder):
                _Fetch(shards, place, folder, report).run(workers)
                _write(folder / _KEPT_LIST, content)
                os.replace(folder / f"{out.name}.partial", out)
                sync_folder(folder)
                (folder / f"{out.name}.partial.log").unlink()
    except OSError as error:
        raise ValueError(f"data.cache: cannot keep {out.name} in {folder}: {error.strerror or error}") from None
    return out


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class _Fetch:
    """Pieces on their way into one file; only one process at a time has it."""

    def __init__(self, shards: Shards, place: str, folder: Path, report: Report) -> None:
        self.shards, self.place, self.folder, self.report = shards, place, folder, report
        name = shards.whole.name
        self.partial, self.log = (folder / f"{name}.partial", folder / f"{name}.partial.log")
        self.starts = list(accumulate((p.bytes for p in shards.pieces), initial=0))
        self._stop, self._lock = Event(), Lock()
        self._arrived, self._told = 0, 0.0

    def run(self, workers: int) -> None:
        """All pieces and what stands beside them are safely on the disk afterwards, under temporary names."""
        about, total = self.shards.about, self.shards.whole.bytes
        done = self._noted()
        self._check_room(total + (about.bytes if about else 0) - sum(self.shards.pieces[i].bytes for i in done))
        if about:
            content = read_small(sibling(self.place, about.name), limit=about.bytes)
            if hashlib.sha256(content).hexdigest() != about.sha256:
                raise ValueError(f"{shown(sibling(self.place, about.name))} is damaged: its SHA-256 is not the list's")
            _write(self.folder / about.name, content)
        handle = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.ftruncate(handle, total)
            _write(self.log, _lines(done))
            self._fetch(handle, [i for i in range(len(self.shards.pieces)) if i not in done], workers)
            wrong = self._compared(handle, workers)
            if wrong:  # what an earlier call noted, and the disk has lost or changed since
                self.report(f"{self.shards.whole.name}: {len(wrong)} pieces changed on the disk and are fetched again")
                _write(self.log, _lines(set(range(len(self.shards.pieces))) - set(wrong)))
                self._fetch(handle, wrong, workers)
                if again := self._compared(handle, workers):
                    name = self.shards.pieces[again[0]].name
                    raise ValueError(f"data.cache: {self.folder} does not keep what is written to it ({name})")
            os.fsync(handle)
        finally:
            os.close(handle)

    def _noted(self) -> set[int]:
        """Numbers of the pieces that are safely in the file; a line that was cut off does not count."""
        if not self.partial.is_file() or not self.log.is_file():
            self.log.unlink(missing_ok=True)
            return set()
        *lines, _ = self.log.read_bytes().split(b"\n")
        numbers = {int(line) for line in lines if line.isdigit() and len(line) < 12}
        return {i for i in numbers if i < len(self.shards.pieces)}

    def _check_room(self, wanted: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if wanted > free:
            raise ValueError(
                f"data.cache: {self.folder} has room for {free / 2**30:.2f} GiB, and {self.shards.whole.name} needs "
                f"{wanted / 2**30:.2f} GiB more; make room, or name a folder on another disk"
            )

    def _fetch(self, handle: int, numbers: list[int], workers: int) -> None:
        todo = sum(self.shards.pieces[i].bytes for i in numbers)
        self._arrived, self._told, begin = 0, time.monotonic(), time.monotonic()
        if numbers:
            self.report(f"{self.shards.whole.name}: fetching {_mib(todo)} from {shown(self.place)} to {self.folder}")
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

        def one(i: int) -> None:
            patiently(lambda: self._piece(handle, i, todo), self._stop.wait)
            os.fsync(handle)
            with self._lock:
                os.write(log, f"{i}\n".encode())

        try:
            self._in_threads(one, numbers, workers)
            os.fsync(log)
        finally:
            os.close(log)
        if numbers:
            rate = todo / 2**20 / max(time.monotonic() - begin, 1e-9)
            self.report(f"{self.shards.whole.name}: {_mib(todo)} fetched, {rate:.0f} MiB/s")

    def _piece(self, handle: int, i: int, todo: int) -> None:
        piece, at, digest, size = self.shards.pieces[i], self.starts[i], hashlib.sha256(), 0
        place = sibling(self.place, piece.name)
        try:
            for chunk in chunks(place, limit=piece.bytes):
                if self._stop.is_set():
                    raise ValueError("stopped")
                digest.update(chunk)
                _write_at(handle, chunk, at + size)
                size += len(chunk)
                self._tell(len(chunk), todo)
            if digest.hexdigest() != piece.sha256:
                what = f"{size} bytes of {piece.bytes}" if size != piece.bytes else "its SHA-256 is not the list's"
                raise ValueError(f"the piece {shown(place)} is damaged: {what}")
        except BaseException:
            self._tell(-size, todo)
            raise

    def _tell(self, size: int, todo: int) -> None:
        with self._lock:
            self._arrived += size
            now = time.monotonic()
            if now - self._told < _EVERY:
                return
            self._told = now
        self.report(f"{self.shards.whole.name}: {_mib(self._arrived)} of {_mib(todo)} fetched")

    def _compared(self, handle: int, workers: int) -> list[int]:
        """Numbers of the pieces that are not as they should be in the file, ascending."""
        wrong: list[int] = []

        def one(i: int) -> None:
            piece, digest = self.shards.pieces[i], hashlib.sha256()
            for at in range(0, piece.bytes, CHUNK):
                digest.update(os.pread(handle, min(CHUNK, piece.bytes - at), self.starts[i] + at))
            if digest.hexdigest() != piece.sha256:
                wrong.append(i)

        self._in_threads(one, list(range(len(self.shards.pieces))), workers)
        return sorted(wrong)

    def _in_threads(self, work: Callable[[int], None], numbers: list[int], workers: int) -> None:
        """The first error is raised as soon as the others have noticed it, a piece at most later."""
        pool = ThreadPoolExecutor(workers)
        try:
            futures = [pool.submit(work, i) for i in numbers]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
            self._stop.clear()


def _write_at(handle: int, chunk: bytes, at: int) -> None:
    left = memoryview(chunk)
    while left:
        count = os.pwrite(handle, left, at)
        left, at = left[count:], at + count


def _lines(numbers: set[int]) -> bytes:
    return "".join(f"{i}\n" for i in sorted(numbers)).encode()


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
