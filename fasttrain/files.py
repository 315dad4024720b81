"""Files that are either whole or not there: write, fsync, rename."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, ready: Callable[[], object] = lambda: None) -> None:
    """Writes a file under a temporary name beside ``path`` and renames it when it is on the disk.

    Args:
        path: of the file.
        write: takes the open file and writes its content.
        ready: called when the content is on the disk, before the file gets its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        ready()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def insist_on_room(folder: Path, wanted: int, what: str) -> None:
    """Insists on free space before it is needed.

    Args:
        folder: where it is needed; it need not be there yet.
        wanted: bytes.
        what: takes them.

    Raises:
        ValueError: there is less.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise ValueError(f"run.dir: {in_words(free)} free in {folder}, and {what} takes {in_words(wanted)}")


def size_of(state: Any) -> int:
    """Bytes that a checkpoint of a state takes, roughly: tensors, and what is said of each value."""
    if isinstance(state, dict):
        return 64 + sum(size_of(key) + size_of(value) for key, value in state.items())
    if isinstance(state, (list, tuple, set)):
        return 64 + sum(map(size_of, state))
    if isinstance(state, (str, bytes)):
        return 16 + len(state)
    return 512 + int(state.nbytes) if hasattr(state, "nbytes") else 16


def in_words(size: int) -> str:
    """Bytes as people read them: ``1.2 GiB``."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):.1f} {unit}"
    return f"{size} bytes"


def make_folder(folder: Path) -> None:
    """Makes a folder of a run, if it is not there, and removes what a process that was killed left unfinished in it.

    Raises:
        ValueError: it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"run.dir: cannot write to {folder} ({error.strerror})") from None
    remove_unfinished(folder)


def remove_unfinished(folder: Path) -> None:
    """Removes what a process that was killed left unfinished in ``folder``; no other may be writing there."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
