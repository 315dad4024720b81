"""Damaged inputs: how files are damaged, and how a reader is watched while it reads one.

A reader runs in a forked child, many cases one after the other; a child that crashes or hangs is replaced. What is asked of
every reader: the undamaged result, another one that is sound, or a ``ValueError`` that says in one sentence which file is
damaged; in less than :data:`SECONDS`, and in memory of twice the files' size and :data:`SPARE` beside what the process had.
"""

import ctypes
import hashlib
import json
import os
import resource
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import numpy as np
import torch

SECONDS, SPARE = 10.0, 32 << 20
SAME, OTHER, REFUSED = "same", "other", "refused"  # what may come out; anything else is a fault
_FIRST = 300.0  # seconds of the first reading, which may compile
_ROOM = 16 << 30  # bytes of addresses that a child may ask for: it shall not take the machine's memory
_EDGES = [n.to_bytes(8, "little", signed=n < 0) for n in (0, -1, 1 << 31, (1 << 63) - 1)]


def damaged(content: bytes, seed: int) -> bytes:
    """The content with one kind of damage; which kind, and where, are functions of ``seed``."""
    rng, kind = np.random.default_rng(seed), _KINDS[seed % len(_KINDS)]
    return kind(content, rng) if content else b"\0"


def _flipped(content: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(content)
    for at in rng.integers(0, len(out), int(rng.integers(1, 5))).tolist():
        out[at] ^= 1 << int(rng.integers(8))
    return bytes(out)


def _random(content: bytes, rng: np.random.Generator) -> bytes:
    at, size = _block(content, rng)
    return content[:at] + rng.bytes(size) + content[at + size :]


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(len(content)))]


def _zeroed(content: bytes, rng: np.random.Generator) -> bytes:
    at, size = _block(content, rng)
    return content[:at] + bytes(size) + content[at + size :]


def _doubled(content: bytes, rng: np.random.Generator) -> bytes:
    at, size = _block(content, rng)
    return content[: at + size] + content[at:]


def _swapped(content: bytes, rng: np.random.Generator) -> bytes:
    a, b = sorted(rng.integers(0, len(content), 2).tolist())
    size = min(_block(content, rng)[1], b - a)
    parts = (content[:a], content[b : b + size], content[a + size : b], content[a : a + size], content[b + size :])
    return b"".join(parts)


def _number(content: bytes, rng: np.random.Generator) -> bytes:
    """An integer of 1 to 8 bytes, of either order, becomes 0, -1, 2^31 or 2^63 - 1."""
    size = int(rng.choice([1, 2, 4, 8]))
    number = _EDGES[int(rng.integers(len(_EDGES)))][:size][:: 1 if rng.integers(2) else -1]
    at = int(rng.integers(max(len(content) - size, 1)))
    if rng.integers(2):  # where the numbers are that matter
        at = min(at, int(rng.integers(128))) // size * size
    return content[:at] + number + content[at + size :]


def _digits(content: bytes, rng: np.random.Generator) -> bytes:
    """A number in a text becomes another one, a very large one or none; in what has no digits, a byte does."""
    places = [i for i, byte in enumerate(content[: 1 << 16]) if 48 <= byte <= 57] or [0]
    at = places[int(rng.integers(len(places)))]
    written = [b"", b"-1", b"7", b"99999", b"2147483648", b"9223372036854775807", b"1e400", b"NaN", b"9" * 5000]
    return content[:at] + written[int(rng.integers(len(written)))] + content[at + 1 :]


def _longer(content: bytes, rng: np.random.Generator) -> bytes:
    return content + rng.bytes(int(rng.integers(1, 2000)))


def _gone(content: bytes, rng: np.random.Generator) -> bytes:
    at, size = _block(content, rng)
    return content[:at] + content[at + size :]


def _block(content: bytes, rng: np.random.Generator) -> tuple[int, int]:
    """A place and a size, small ones as likely as large ones."""
    size = int(2 ** rng.uniform(0, np.log2(max(len(content), 2))))
    return int(rng.integers(max(len(content) - size, 1))), size


_KINDS = (_flipped, _random, _cut, _number, _digits, _zeroed, _flipped, _doubled, _number, _swapped, _longer, _gone)


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        kind: :data:`SAME`, :data:`OTHER`, :data:`REFUSED`, or a fault: ``raised``, ``unclear``, ``unsound``, ``crashed``,
            ``hung``, ``memory``.
        about: the message, or whatever tells more.
        case: the seed.
    """

    kind: str
    about: str
    case: int


def watch(
    read: Callable[[int], object], cases: Sequence[int], *, size: int, names: Sequence[str], seconds: float = SECONDS
) -> list[Outcome]:
    """Runs ``read(case)`` for each of the cases in forked children, and watches it.

    Args:
        read: damages its input as the case says, reads it, and returns what it has read; an ``AssertionError`` says that
            this is not sound. Case -1 is the undamaged input, whose result the others are compared with; it is read twice,
            so that what is loaded or compiled but once is not taken for what a case costs.
        cases: seeds.
        size: bytes of all files of the input.
        names: of which one has to stand in each message.
        seconds: after which a case hangs.
    """
    out: list[Outcome] = []
    left = list(cases)
    while left:
        for case, kind, about in _child(read, left, size, tuple(names), seconds):
            out.append(Outcome(kind, about, case))
            left.remove(case)
    return out


def faults(outcomes: Sequence[Outcome]) -> list[str]:
    """Those that should not be."""
    return [f"case {o.case}: {o.kind}: {o.about}" for o in outcomes if o.kind not in (SAME, OTHER, REFUSED)]


def told(outcomes: Sequence[Outcome]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(o.kind for o in outcomes).items()))


class DamagedFiles:
    """``read`` for :func:`watch`: one of some files is damaged in place, by turns, and ``reader`` reads what it belongs to.

    Attributes:
        size: bytes of all files of the input.
    """

    def __init__(self, files: Sequence[Path], reader: Callable[[], object], size: int = 0) -> None:
        self.files, self.reader = list(files), reader
        self._content = [path.read_bytes() for path in self.files]
        self.size = size or sum(map(len, self._content))

    def __call__(self, case: int) -> object:
        number = max(case, 0) % len(self.files)
        path, content = self.files[number], self._content[number]
        if case < 0:
            return self.reader()
        try:
            path.write_bytes(damaged(content, case // len(self.files)))
            return self.reader()
        finally:
            path.write_bytes(content)

    def watch(self, count: int, *names: str, seed: int = 0) -> list[Outcome]:
        """``count`` damaged inputs; the files are whole again afterwards."""
        called = names or tuple(path.name for path in self.files)
        try:
            return watch(self, range(seed, seed + count), size=self.size, names=called)
        finally:
            for path, content in zip(self.files, self._content, strict=True):
                path.write_bytes(content)


def digest(value: object) -> str:
    """Of arrays, tensors, dataclasses, containers and plain values."""
    about = hashlib.sha256()
    for part in _parts(value):
        about.update(part)
    return about.hexdigest()


def _parts(value: object) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            yield from _parts(getattr(value, f.name))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield repr(name).encode()
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        yield f"{type(value).__name__}{len(value)}".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode()


def _child(
    read: Callable, cases: list[int], size: int, names: tuple[str, ...], seconds: float
) -> Iterator[tuple[int, str, str]]:
    """The outcomes of the cases of one child, up to the last of them or to the one at which it ended."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        try:
            _cases(read, cases, size, names, seconds, send)
        finally:
            os._exit(0)
    os.close(send)
    begun, ended = -1, False
    try:
        lines, patience = b"", _FIRST
        while not ended:
            ready, _, _ = select.select([receive], [], [], patience)
            if not ready:
                os.kill(child, signal.SIGKILL)
                assert begun >= 0, f"the undamaged input is not read within {patience:.0f} s"
                yield begun, "hung", f"longer than {patience:.0f} s"
                return
            more = os.read(receive, 1 << 16)
            ended = not more
            *whole, lines = (lines + more).split(b"\n")
            for line in whole:
                begun, kind, about = json.loads(line)
                patience = seconds + 2
                if kind:
                    yield begun, kind, about
                    begun = -1
    finally:
        os.close(receive)
        _, status = os.waitpid(child, 0)
    if begun >= 0:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        yield begun, "crashed", signal.strsignal(number) or "" if number else f"exit code {status >> 8}"
    else:
        assert not os.WIFSIGNALED(status), "the undamaged input is not read"


def _cases(read: Callable, cases: list[int], size: int, names: tuple[str, ...], seconds: float, send: int) -> None:
    """In the child: runs the cases, and sends [case, "", ""] before and [case, kind, about] after each."""

    def say(*what: object) -> None:
        os.write(send, json.dumps(what).encode() + b"\n")

    torch.set_num_threads(1)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, resource.RLIM_INFINITY))
    right = [digest(read(-1)) for _ in range(2)]
    assert right[0] == right[1], "two readings of the undamaged input differ"
    for case in cases:
        say(case, "", "")
        before, start = _peak(), time.monotonic()
        try:
            found = digest(read(case))
            kind, about = (SAME, "") if found == right[0] else (OTHER, "")
        except ValueError as error:
            about = str(error)
            clear = about.strip() and "\n" not in about and any(name in about for name in names)
            kind = REFUSED if clear else "unclear"
        except AssertionError as error:
            kind, about = "unsound", repr(error)
        except BaseException as error:
            kind, about = "raised", repr(error)[:300]
        more, took = _peak(reset=False) - before, time.monotonic() - start
        if took > seconds:
            kind, about = "hung", f"{took:.1f} s"
        elif more > 2 * size + SPARE:
            kind, about = "memory", f"{more >> 20} MiB for a file of {size} bytes ({kind}: {about[:200]})"
        say(case, kind, about[:2000])


def _peak(reset: bool = True) -> int:
    """The most memory that this process has held, in bytes; ``reset``: from now on, so that this is what it holds."""
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is not what it holds, and may be taken again unseen
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
