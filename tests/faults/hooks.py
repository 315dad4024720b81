"""What is wrong with a machine, made in a process before the command line begins there: ``before`` of ``processes.start``."""

import ctypes
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FOR_FILES = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
_CAPABILITY_VERSION_3 = 0x20080522


def all_of(*hooks: Callable[[], object]) -> None:
    """Several of these."""
    for hook in hooks:
        hook()


def impatient(seconds: float) -> None:
    """A process that stands still, and cannot raise an error, is ended after so long."""
    from fasttrain.watchdog import Watchdog

    defaults = Watchdog.__init__.__kwdefaults__
    assert defaults is not None and "patience" in defaults
    defaults["patience"] = seconds


def slow_steps(seconds: float) -> None:
    """Each step takes so much longer: there is time to do something meanwhile, on fast machines, too."""
    from fasttrain.step import Stepper

    take = Stepper.take

    def slowly(*given: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return take(*given, **named)

    Stepper.take = slowly  # type: ignore[method-assign]


def slow_disk(seconds: float) -> None:
    """Each fsync takes so long."""
    sync = os.fsync

    def slowly(file: int) -> None:
        time.sleep(seconds)
        sync(file)

    os.fsync = slowly  # type: ignore[assignment]


def jumping_clock(seed: int) -> None:
    """The time of day jumps by up to 30 days, to and fro, at every look."""
    jumps, now, now_ns = random.Random(seed), time.time, time.time_ns
    days = 30 * 86400
    time.time = lambda: now() + jumps.uniform(-days, days)
    time.time_ns = lambda: now_ns() + jumps.randint(-days * 10**9, days * 10**9)


def obeyed_permissions() -> None:
    """root, too, may write only what its permission bits say."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(24)  # effective, permitted and inheritable, of two words
    assert libc.capget(header, data) == 0
    words = struct.unpack("=6I", data.raw)
    kept = struct.pack("=6I", words[0] & ~_FOR_FILES, *words[1:])
    assert libc.capset(header, ctypes.create_string_buffer(kept, 24)) == 0


def hanging_image(image: Path, fifo: Path, rank: int) -> None:
    """In the process of this rank an image is on a disk that does not answer: whoever reads it is blocked in open()."""
    from fasttrain.loaders.datasets import base

    read = base.read_bytes
    if int(os.environ.get("RANK", "0")) == rank:
        base.read_bytes = lambda path: read(fifo if path == image else path)
