"""Ctrl-C at places of our choosing.

Python raises KeyboardInterrupt wherever the process happens to be. In the middle of a DataLoader or of torch.save it comes
out as another exception, and it kills loaders' processes, to which a terminal sends it too. Where it is held, it is noted
(also in processes forked there, where nobody looks at the note) and raised by :func:`check`, between two steps.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_HELD: list["_Note"] = []  # the blocks that hold it, the innermost last


class _Note:
    def __init__(self, firm: bool) -> None:
        self.firm, self.came = firm, False

    def __call__(self, number, frame) -> None:
        if self.came and not self.firm:
            raise KeyboardInterrupt
        self.came = True


@contextmanager
def held(*, firm: bool = False) -> Iterator[None]:
    """Holds Ctrl-C back until :func:`check` is called, or the block ends, with an exception too.

    Args:
        firm: a second one is held back as well, instead of being raised at once.
    """
    if threading.current_thread() is not threading.main_thread():  # no other is ever interrupted
        yield
        return
    note = _Note(firm)
    before = signal.signal(signal.SIGINT, note)
    _HELD.append(note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _HELD.remove(note)
        if note.came and callable(before):  # Python's own, or the block's around this one
            before(signal.SIGINT, None)


def note() -> bool:
    """Counts as Ctrl-C if it is being held, and says whether it is: for other signals' handlers."""
    if _HELD:
        _HELD[-1].came = True
    return bool(_HELD)


def check() -> None:
    """Raises KeyboardInterrupt if Ctrl-C came while it was held."""
    if _HELD and _HELD[-1].came:
        _HELD[-1].came = False
        raise KeyboardInterrupt
