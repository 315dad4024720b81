"""A thread that notices when a run stands still, says who is late, and ends the run.

A loader that gives no batch and a process that the others wait for look alike from outside: nothing happens. The loop says what
it does, step by step (:meth:`Watchdog.doing`). If one thing takes too long, the main thread is made to raise :class:`Stalled`; if
it cannot, because it hangs inside compiled code, the process ends with exit code 75 (try again), and its children with it.

Of several processes each tells the others what it does, through the store by which they found each other. Clocks are not
compared: a process's age of an activity is counted by its own thread in turns of known length, so neither a clock that is set
nor a process that was stopped for a while (SIGSTOP, a suspended job) looks like a stall; of others, each counts how
long a beat has not changed. One that is known to have ended is not waited for.

Not covered: code that holds Python's lock and hangs. No thread of this process runs then; the other processes name it as not
heard of.
"""

import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from torch.distributed import Store

from .stragglers import WAITS, Seen, sentence

EXIT_CODE = os.EX_TEMPFAIL  # 75: the same command is worth another try
_DYING = 0.3  # seconds
_FIRST_TURN = 0.05  # seconds
_SILENT = 3  # beats in a row that have to fail to come
_KEPT = (b"resource_tracker", b"torch_shm_manager")  # children that tidy up shared memory, and end by themselves

_Activity = tuple[str, int, float]  # what, step, slack; one object for each time that it is begun

_TOGETHER = (WAITS, "computes", "waits for data")  # what nobody finishes when another process is gone

_ALONE = {
    "waits for data": "the loader has given no batch for {s:.0f} s (step {step})",
    "waits for sources": "the sources have given no soft labels for {s:.0f} s (step {step})",
    "computes": "step {step} has been computing for {s:.0f} s",
    "writes a checkpoint": "a checkpoint has been on its way to the disk for {s:.0f} s (step {step})",
    "ends": "its loaders and files have been closing for {s:.0f} s (step {step})",
    "evaluates": "an evaluation has not come further for {s:.0f} s (step {step})",
}


class Stalled(RuntimeError):
    """Nothing has happened for too long; the message says what was waited for, and of several processes who is late."""


class Watchdog:
    """Watches the main thread until it is closed.

    Made outside of the main thread, it reports, but raises nothing and ends nothing.

    Args:
        seconds: that one activity may take.
        rank, ranks: this process's number, and how many there are.
        store: by which the processes find each other; None: this one is alone. A connection of its own is made.
        report: is told the sentence, from the watchdog's thread.
        folder: where the stacks of all threads go (``stalled-rankN.txt``); None: nowhere.
        patience: seconds for the main thread to raise :class:`Stalled`, and once more to be done with what that led to.

    Raises:
        ValueError: ``seconds`` is not above 0.
    """

    def __init__(
        self,
        *,
        seconds: float,
        rank: int = 0,
        ranks: int = 1,
        store: Store | None = None,
        report: Callable[[str], object],
        folder: Path | None = None,
        patience: float = 20.0,
    ) -> None:
        if not seconds > 0:
            raise ValueError(f"run.timeout: {seconds} is not above 0 seconds")
        self._seconds, self._rank, self._ranks, self._patience = seconds, rank, ranks, patience
        self._report, self._folder = report, folder
        self._interval = min(5.0, seconds / 10)
        self._now: _Activity | None = None
        self._age, self._number = 0.0, 0
        self._rest = 0  # the step after which nothing is done
        self._stalled: _Activity | None = None  # what the signal is about
        self._raised: _Activity | None = None  # what Stalled has ended
        self._said = ""
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "place": _process_space()}
        self._seen: dict[int, Seen] = {}
        self._unreachable = False
        self._look_lock, self._end_lock = threading.Lock(), threading.Lock()
        self._closing = threading.Event()
        self._store: Store | None = None
        if store is not None and ranks > 1:
            self._store = store.clone()
            self._store.set_timeout(timedelta(seconds=max(2.0, self._interval)))
            self._beat()
        self._signal, self._main = None, threading.get_ident()
        if threading.current_thread() is threading.main_thread():
            self._signal = _unused_signal()
            signal.signal(self._signal, self._stop_main)
        self._thread = threading.Thread(target=self._watch, name="fasttrain-watchdog", daemon=True)
        self._thread.start()

    def doing(self, what: str, step: int, slack: float = 1.0) -> None:
        """The main thread begins something new; said again, it begins again.

        Args:
            what: "waits for data", "computes", ..; only "waits for the other processes" is taken for waiting for them.
            step: number of the step.
            slack: factor of the seconds allowed, for what is known to be slow (a first step that is compiled).
        """
        self._now = (what, step, slack)

    def idle(self) -> None:
        """Nothing is watched until the next :meth:`doing`."""
        self._rest = self._now[1] if self._now is not None else self._rest
        self._now = None

    def meet(self) -> None:
        """Learns who the others are, when all have begun: one that ends at once is known by its process then."""
        if self._store is not None:
            self._look()

    def late(self) -> str:
        """Who is late, in one sentence: for when waiting for the others failed by itself.

        Takes up to four beats, to learn who is not heard of any more; a process of this machine that is dead is known at once.
        """
        if self._store is None:
            return "no other process takes part"
        if self._said:  # while this process stands still: known already
            return self._said
        for _ in range(2 * (_SILENT + 1)):
            self._look()
            if any(seen.gone for seen in self._seen.values()):
                break
            if self._unreachable:  # a process that is killed closes its connections before it is gone
                time.sleep(_DYING)
                self._look()
                break
            time.sleep(self._interval / 2)
        return self._who()

    def close(self) -> None:
        """Ends the thread and takes this process's beat out of the store."""
        with self._end_lock:
            already = self._closing.is_set()
            self._closing.set()
        if already:
            return
        self._thread.join()
        if self._signal is not None:
            signal.signal(self._signal, signal.SIG_DFL)
        if self._store is not None:
            with suppress(RuntimeError):  # the store may have gone before
                self._store.delete_key(_key(self._rank))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch(self) -> None:
        """The thread: counts how long the present activity has taken, in turns."""
        activity, before, deadline, extended = None, time.monotonic(), 0.0, False
        while not self._closing.wait(self._turn()):
            now = time.monotonic()
            turn, before = min(now - before, 2 * self._interval), now  # a process that slept has not been late
            if self._now is not activity:
                activity, self._age, self._said, extended = self._now, 0.0, "", False
            elif activity is not None:
                self._age += turn
            self._beat()
            if not self._met():
                self._look()
            if activity is None:
                continue
            limit = self._seconds * activity[2]
            stands = self._age > 2 * self._interval
            if stands or self._age > limit / 2:
                self._look()
            dead = stands and activity[0] in _TOGETHER and any(seen.gone for seen in self._seen.values())
            if self._age <= limit and not dead:  # Gloo's own threads hear of a death only where they talk to who died
                continue
            if not self._said:
                self._tell(activity)
                deadline = self._age + self._patience
            elif self._raised is activity and not extended:  # what follows has as long again
                deadline, extended = self._age + self._patience, True
            elif self._age > deadline:
                self._end(activity)

    def _turn(self) -> float:
        """Seconds to the next turn: short ones until the others are known, to have their numbers should the store die."""
        return self._interval if self._met() else min(_FIRST_TURN * 2 ** min(self._number, 20), self._interval)

    def _met(self) -> bool:
        return self._store is None or sum(seen.beat is not None for seen in self._seen.values()) == self._ranks - 1

    def _tell(self, activity: _Activity) -> None:
        self._said = self._who() if self._store is not None else self._alone(activity)
        self._dump()
        with suppress(Exception):  # a terminal that is gone must not keep the run from ending
            self._report(self._said)
        with self._end_lock:
            if self._signal is not None and not self._closing.is_set():
                self._stalled = activity
                signal.pthread_kill(self._main, self._signal)

    def _stop_main(self, number: int, frame: Any) -> None:
        """The signal's handler, in the main thread: raises, unless that went on in the meantime, or is tidied up after a first
        one, which a second would hide."""
        stalled, self._stalled = self._stalled, None
        if isinstance(sys.exc_info()[1], Stalled):
            return
        if stalled is not None and stalled is self._now and not self._closing.is_set():
            self._raised = stalled
            raise Stalled(self._said)

    def _end(self, activity: _Activity) -> None:
        """Ends the process at once, and with it the children that would be left."""
        if self._signal is None:
            return
        with self._end_lock:
            if self._closing.is_set() or self._now is not activity:
                return
            with suppress(OSError):
                os.write(2, f"fasttrain: {self._said}; it cannot be stopped, so it ends\n".encode())
            for pid in _descendants(os.getpid()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os._exit(EXIT_CODE)

    def _dump(self) -> None:
        if self._folder is not None:
            with suppress(OSError), open(self._folder / f"stalled-rank{self._rank}.txt", "w") as file:
                file.write(f"{self._said}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    def _alone(self, activity: _Activity) -> str:
        what, step, _ = activity
        text = _ALONE.get(what, 'step {step}: nothing but "{what}" for {s:.0f} s')
        return text.format(what=what, step=step, s=self._age)

    def _mine(self) -> dict[str, Any]:
        what, step, _ = self._now or ("is idle", self._rest, 1.0)
        return self._me | {"what": what, "step": step, "s": round(self._age, 1), "beat": self._number}

    def _beat(self) -> None:
        self._number += 1
        if self._store is not None:
            with suppress(RuntimeError):  # whoever keeps the store is gone: waiting for the others will fail
                self._store.set(_key(self._rank), json.dumps(self._mine()))

    def _look(self) -> None:
        """Reads the others' beats, and notes when each was last seen to change."""
        if self._store is None:
            return
        with self._look_lock:
            beats, now = self._read(self._store), time.monotonic()
            self._unreachable = beats is None
            for rank in self._others():
                seen = self._seen.setdefault(rank, Seen(None, now))
                seen.look(seen.beat if beats is None else beats.get(rank), now, self._me)

    def _read(self, store: Store) -> dict[int, dict[str, Any]] | None:
        """The others' beats, or None if the store does not answer, twice: a beat may be taken away while it is asked for."""
        for _ in range(2):
            with suppress(RuntimeError, ValueError):  # of one that is being taken away there may be nothing
                ranks = self._others()
                if not store.check([_key(rank) for rank in ranks]):
                    ranks = [rank for rank in ranks if store.check([_key(rank)])]
                texts = store.multi_get([_key(rank) for rank in ranks]) if ranks else []
                return {rank: json.loads(text) for rank, text in zip(ranks, texts, strict=True)}
        return None

    def _others(self) -> list[int]:
        return [rank for rank in range(self._ranks) if rank != self._rank]

    def _who(self) -> str:
        now = time.monotonic()
        with self._look_lock:
            seen = {rank: Seen(None, now) for rank in self._others()} | self._seen
        if self._unreachable:  # what the others do is not known any more, but for those of this machine that are dead
            gone = {rank: its for rank, its in seen.items() if its.gone}
            if gone:
                return f"{sentence(gone, now, silent=math.inf)}; the processes' store does not answer"
            return (
                "the processes' store does not answer: who keeps it, the first process or torchrun, has ended or cannot be "
                "reached"
            )
        return sentence(seen | {self._rank: Seen(self._mine(), now)}, now, silent=_SILENT * self._interval)


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _process_space() -> str:
    """In which processes' numbers mean the same: the kernel's own name for this process's space of them."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _unused_signal() -> int:
    """A real-time signal that nobody handles."""
    numbers = range(signal.SIGRTMIN, signal.SIGRTMAX + 1)
    return next(number for number in numbers if signal.getsignal(number) == signal.SIG_DFL)


def _descendants(pid: int) -> list[int]:
    """The processes below one, but for those that tidy up after it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
                if not any(kept in (entry / "cmdline").read_bytes() for kept in _KEPT):
                    children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found
