"""fasttrain shard: a packed file in pieces, for machines that fetch it to a disk of their own.

    fasttrain shard FILE.beton --to FOLDER_OR_URL [--shard-size MIB] [--workers N] [--json]

  FILE.beton    made by fasttrain pack, with its FILE.beton.json beside it, or by FFCV's writer, without
  --to          a folder, or a URL that fsspec can write to: s3://, gs://, az://, .. (s3fs, gcsfs, adlfs, .. bring these)
  --shard-size  MiB of a piece; 256 if not given
  --workers     pieces under way at once; 8 if not given

Writes NAME.beton.00000, NAME.beton.00001, .., NAME.beton.json and, last, the list NAME.beton.shards.json. Each is read back and
compared. After a stop the same command sends only what is not there yet. It prints the SHA-256 of the list:

    fasttrain train RECIPE --data.name beton --data.root URL/NAME.beton.shards.json --data.sha256 DIGITS
    fasttrain train RECIPE --data.name beton --data.root FOLDER/NAME.beton.shards.json --data.cache /local/disk
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .loaders.beton import read_beton
from .loaders.datasets.beton import read_side_file, side_file
from .loaders.remote import LIST, MAX_LIST, Piece, Shards, list_of, read_list
from .loaders.urls import CHUNK, check_scheme, chunks, file_system, is_url, patiently, sha256_of, shown

_HTTP = ("http://", "https://")


def main(given: list[str]) -> int:
    """Cuts and sends; returns the exit code.

    Raises:
        ValueError: a mistake in the arguments, or what :func:`shard` raises.
    """
    reader = argparse.ArgumentParser(prog="fasttrain shard", add_help=False, exit_on_error=False, allow_abbrev=False)
    reader.add_argument("file", nargs="?")
    reader.add_argument("--to")
    for name, default in (("--shard-size", 256), ("--workers", 8)):
        reader.add_argument(name, type=int, default=default)
    reader.add_argument("--json", action="store_true")
    try:
        asked, unknown = reader.parse_known_args(given)
    except argparse.ArgumentError as error:
        raise ValueError(f"shard: {error}") from None
    if unknown:
        raise ValueError(f"shard: what is {unknown[0]!r}? See `fasttrain shard -h`")
    if asked.file is None or asked.to is None:
        raise ValueError("shard needs FILE.beton and --to FOLDER_OR_URL")
    for name in ("shard_size", "workers"):
        if getattr(asked, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {getattr(asked, name)} is below 1")
    about = shard(Path(asked.file), asked.to, size=asked.shard_size << 20, workers=asked.workers)
    if asked.json:
        print(json.dumps(about))
    else:
        print(f"{about['list']}: {about['pieces']} pieces, {about['bytes'] / 2**20:.0f} MiB, {about['sent']} sent")
        print(f"data.sha256: {about['sha256']}")
    return 0


def shard(path: Path, to: str, *, size: int, workers: int = 8) -> dict[str, Any]:
    """Cuts a packed file into pieces and writes them, with a list of them.

    Args:
        path: of the ``.beton``.
        to: folder or URL.
        size: of a piece, in bytes.
        workers: threads.

    Returns:
        Where the list is, its SHA-256, how many pieces and bytes there are, and how many pieces were sent by this call.

    Raises:
        ValueError: the file is damaged, the place cannot be written, or gives back something else than was written.
    """
    read_beton(path)
    shards = _cut(path, size)
    content = list_of(shards)
    read_list(content, path.name)
    assert len(content) <= MAX_LIST
    sent = 0
    starts = {piece.name: i * size for i, piece in enumerate(shards.pieces)}
    pool = ThreadPoolExecutor(workers)
    try:
        for i, new in enumerate(pool.map(lambda p: _send(path, starts[p.name], p, to), shards.pieces)):
            sent += new
            print(f"\r{i + 1} of {len(shards.pieces)} pieces", end="", file=sys.stderr, flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
        print(file=sys.stderr)
    if shards.about:
        _send(side_file(path), 0, shards.about, to)
    digest = hashlib.sha256(content).hexdigest()
    place = _place(to, path.name + LIST)
    with _writing(place) as out:
        out.write(content)
    if _digest(place, len(content)) != digest:
        raise ValueError(f"--to: {shown(place)} holds something else than was written there")
    return {
        "list": shown(place),
        "sha256": digest,
        "pieces": len(shards.pieces),
        "bytes": shards.whole.bytes,
        "sent": sent,
    }


def _cut(path: Path, size: int) -> Shards:
    """Sizes and checksums, in one pass over the file; it is compared with what was packed."""
    beside, whole, pieces = side_file(path), hashlib.sha256(), list[Piece]()
    with open(path, "rb") as file:
        while True:
            piece, length = hashlib.sha256(), 0
            while length < size and (chunk := file.read(min(CHUNK, size - length))):
                whole.update(chunk)
                piece.update(chunk)
                length += len(chunk)
            if not length:
                break
            pieces.append(Piece(f"{path.name}.{len(pieces):05d}", length, piece.hexdigest()))
    total = Piece(path.name, sum(p.bytes for p in pieces), whole.hexdigest())
    if not beside.is_file():
        return Shards(total, tuple(pieces), None)
    packed = read_side_file(beside)["sha256"]
    if packed != total.sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is {total.sha256}, and {packed} was packed")
    return Shards(total, tuple(pieces), Piece(beside.name, beside.stat().st_size, sha256_of(beside)))


def _send(path: Path, start: int, piece: Piece, to: str) -> bool:
    """Writes a part of a file unless it is there; whether it was not."""
    place = _place(to, piece.name)
    if _size(place) == piece.bytes and _digest(place, piece.bytes) == piece.sha256:
        return False
    with open(path, "rb") as file, _writing(place) as out:
        file.seek(start)
        left = piece.bytes
        while left and (chunk := file.read(min(CHUNK, left))):
            out.write(chunk)
            left -= len(chunk)
    if _digest(place, piece.bytes) != piece.sha256:
        raise ValueError(f"--to: {shown(place)} holds something else than was written there; or {path} has changed")
    return True


def _place(to: str, name: str) -> str:
    if is_url(to):
        check_scheme(to)
        if to.lower().startswith(_HTTP):
            raise ValueError(
                f"--to: {shown(to)} cannot be written to; name a folder, or a URL such as s3://BUCKET/FOLDER"
            )
        return f"{to.rstrip('/')}/{name}"
    return str(Path(to).expanduser() / name)


def _size(place: str) -> int | None:
    """Bytes of what is there; None where nothing is."""
    if not is_url(place):
        path = Path(place)
        return path.stat().st_size if path.is_file() else None
    system, path_there = file_system(place)
    try:
        system.invalidate_cache()
        return int(system.info(path_there)["size"])
    except Exception:  # it is not there, or cannot be asked about, which writing will tell
        return None


def _digest(place: str, limit: int) -> str:
    def read() -> str:
        out = hashlib.sha256()
        for chunk in chunks(place, limit=limit):
            out.update(chunk)
        return out.hexdigest()

    return patiently(read)


@contextmanager
def _writing(place: str) -> Iterator[IO[bytes]]:
    try:
        if is_url(place):
            system, path = file_system(place)
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            with system.open(path, "wb") as out:
                yield out
        else:
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            with open(place, "wb") as file:
                yield file
    except ValueError:
        raise
    except Exception as error:  # each of fsspec's packages has its own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise ValueError(f"--to: cannot write {shown(place)}: {reason}") from None
