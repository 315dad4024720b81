"""Ctrl-C, SIGTERM and SIGUSR1 at places of our choosing.

Python raises KeyboardInterrupt wherever the process happens to be. In the middle of a DataLoader or of torch.save it comes
out as another exception, and it kills loaders' processes, to which a terminal sends it too. Where it is held, it is noted
(also in processes forked there, where nobody looks at the note) and raised by :func:`check`, between two steps. Schedulers
ask a job to end by SIGTERM or SIGUSR1: these are held alike.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_HELD: list["_Note"] = []  # the blocks that hold it, the innermost last


class Asked(KeyboardInterrupt):
    """This process was asked to end, and it is a good moment."""


class Preempted(KeyboardInterrupt):
    """A training has ended because it was asked to: the same command goes on."""


class _Note:
    def __init__(self, firm: bool) -> None:
        self.firm, self.came = firm, 0  # the signal's number

    def __call__(self, number, frame) -> None:
        if self.came and not self.firm and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.came = number


@contextmanager
def held(*, firm: bool = False) -> Iterator[None]:
    """Holds Ctrl-C, SIGTERM and SIGUSR1 back until :func:`check` is called, or the block ends, with an exception too.

    Args:
        firm: a second Ctrl-C is held back as well, instead of being raised at once.
    """
    if threading.current_thread() is not threading.main_thread():  # no other is ever interrupted
        yield
        return
    note = _Note(firm)
    before = {number: signal.signal(number, note) for number in _SIGNALS}
    _HELD.append(note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _HELD.remove(note)
        if note.came:
            handler = before[signal.Signals(note.came)]
            if callable(handler):  # Python's own, or the block's around this one
                handler(note.came, None)
            elif handler == signal.SIG_DFL:
                signal.raise_signal(note.came)


@contextmanager
def ends_cleanly() -> Iterator[None]:
    """Where nothing holds them back, Ctrl-C, SIGTERM and SIGUSR1 raise :class:`Preempted` in the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _raise_preempted) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_preempted(number, frame) -> None:
    raise Preempted


def note() -> bool:
    """Counts as Ctrl-C if it is being held, and says whether it is: for other signals' handlers."""
    if _HELD:
        _HELD[-1].came = signal.SIGINT
    return bool(_HELD)


def asked() -> bool:
    """Whether one came while it was held, here or in a block around, and nobody has raised it yet."""
    return any(note.came for note in _HELD)


def check() -> None:
    """Raises :class:`Asked`, a KeyboardInterrupt, if one came while it was held."""
    if asked():
        settle()
        raise Asked


def settle() -> None:
    """What came is done with."""
    for note in _HELD:
        note.came = 0
