"""Which of several processes is late: from what each says that it does, to one sentence (see ``watchdog.py``)."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAITS = "waits for the other processes"
_NAMED = 4  # of those that are late; the rest is counted


@dataclass
class Seen:
    """What is known of another process.

    Attributes:
        beat: the last one that was read, None if there never was one: host, pid, place (in which space of processes the pid
            counts), what, step, s (for how many seconds), beat (its number).
        changed: when its number was first seen, in seconds of this process's monotonic clock.
        gone: it has ended: took its beat away, or is a process of this machine that is no more.
    """

    beat: dict[str, Any] | None
    changed: float
    gone: bool = False

    def look(self, beat: dict[str, Any] | None, now: float, me: dict[str, Any]) -> None:
        """Takes note of the beat that is in the store now, None for none; ``me`` is this process's host and place."""
        if beat is None:
            self.gone = self.beat is not None
            return
        if self.beat is None or self.beat["beat"] != beat["beat"]:
            self.changed = now
        self.beat = beat
        here = me["place"] and (beat["host"], beat["place"]) == (me["host"], me["place"])
        self.gone = bool(here) and not _alive(beat["pid"])


def sentence(seen: dict[int, Seen], now: float, *, silent: float) -> str:
    """Who is late, and who waits.

    Args:
        seen: of every process, by rank, this one's too.
        now: seconds of this process's monotonic clock.
        silent: seconds without a new beat after which a process counts as not heard of.
    """
    lost = {r for r, s in seen.items() if s.beat is None or s.gone or now - s.changed > silent}
    beats = {r: s.beat for r, s in seen.items() if s.beat is not None and r not in lost}
    least = min((beat["step"] for beat in beats.values()), default=0)
    ahead = any(beat["step"] > least for beat in beats.values())
    late = lost or {r for r, b in beats.items() if b["what"] != WAITS or (ahead and b["step"] == least)}
    if not late:
        return f"all {len(seen)} processes wait for one another at step {least}: what one has sent has not come to the others"
    said = [_of(rank, seen[rank], now, rank in lost) for rank in sorted(late)[:_NAMED]]
    if len(late) > _NAMED:
        said.append(f"{len(late) - _NAMED} more are late")
    waiting = sorted(r for r, b in beats.items() if r not in late and b["what"] == WAITS)
    if waiting:
        verb = "waits" if len(waiting) == 1 else "wait"
        said.append(f"{_ranks(waiting)} {verb} for {'it' if len(late) == 1 else 'them'}")
    return "; ".join(said)


def _of(rank: int, seen: Seen, now: float, lost: bool) -> str:
    beat = seen.beat
    if beat is None:
        return f"rank {rank} has not been heard of"
    who, silence = f"rank {rank} ({beat['host']}, pid {beat['pid']})", now - seen.changed
    if not lost:
        return f"{who} {beat['what']}, for {beat['s'] + silence:.0f} s now, at step {beat['step']}"
    last = f'(last: "{beat["what"]}" at step {beat["step"]})'
    return f"{who} has ended {last}" if seen.gone else f"{who} has not been heard of for {silence:.0f} s {last}"


def _ranks(ranks: list[int]) -> str:
    """``rank 3``, ``ranks 0 to 2, 5``; of sorted numbers."""
    runs = []
    for _, group in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        run = [rank for _, rank in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(runs)}"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False
