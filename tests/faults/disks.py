"""Disks that are full or may not be written to: mounted where this is permitted, or what comes next to that."""

import ctypes
import os
import resource
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import processes

_LIBC = ctypes.CDLL(None, use_errno=True)
_READ_ONLY, _REMOUNT, _BIND, _DETACH = 1, 32, 4096, 2


@contextmanager
def tmpfs(place: Path, mib: int) -> Iterator[None]:
    """A small disk at ``place``, while the block lasts."""
    place.mkdir()
    _mount("tmpfs", place, "tmpfs", 0, f"size={mib}m")
    try:
        yield
    finally:
        _LIBC.umount2(str(place).encode(), _DETACH)


@contextmanager
def read_only(place: Path) -> Iterator[None]:
    """What is in ``place`` can only be read, while the block lasts."""
    _mount(str(place), place, "", _BIND, "")
    try:
        _mount("", place, "", _REMOUNT | _BIND | _READ_ONLY, "")
        yield
    finally:
        _LIBC.umount2(str(place).encode(), _DETACH)


def _mount(what: str, place: Path, kind: str, flags: int, options: str) -> None:
    if _LIBC.mount(what.encode(), str(place).encode(), kind.encode(), flags, options.encode()):
        raise OSError(ctypes.get_errno(), f"cannot mount {what or kind} at {place}")


def may_mount() -> bool:
    """Whether this process is permitted to."""
    with tempfile.TemporaryDirectory() as folder, suppress(OSError), tmpfs(Path(folder) / "disk", 1):
        return True
    return False


class Disk(ABC):
    """Where a run writes to, which something else can fill."""

    full: str
    """What the system calls it."""

    @abstractmethod
    def fill(self, run: processes.Run) -> None:
        """No room is left; to be called again and again, as files that the run removes make some."""

    @abstractmethod
    def empty(self, run: processes.Run) -> None:
        """There is room again."""


class Tmpfs(Disk):
    """A small one of its own, mounted at ``place``."""

    full = "No space left on device"

    def __init__(self, place: Path) -> None:
        self._filler = place / "filler"

    def fill(self, run: processes.Run) -> None:
        with suppress(OSError), open(self._filler, "ab", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass

    def empty(self, run: processes.Run) -> None:
        self._filler.unlink()


class Limit(Disk):
    """Any disk: the run's process is forbidden files as large as a checkpoint."""

    full = "File too large"

    def fill(self, run: processes.Run) -> None:
        self._allow(run, 300_000)

    def empty(self, run: processes.Run) -> None:
        self._allow(run, resource.RLIM_INFINITY)

    def _allow(self, run: processes.Run, size: int) -> None:
        for process in run.processes:
            with suppress(ProcessLookupError):
                resource.prlimit(process.pid or os.getpid(), resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
