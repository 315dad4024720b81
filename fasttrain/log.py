"""What a run tells: a line per N steps and per evaluation to metrics.jsonl, TensorBoard and whoever watches."""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Watcher = Callable[[dict[str, Any]], None]


class Clock:
    """Where the time of training goes: each moment belongs to the part whose mark ends it.

    On a GPU the marks are CUDA events in the current stream, so that a part's time is that by which it held this stream up,
    whether by work or by making it wait. They are read where :meth:`settle` is called, and nothing waits in between.

    Args:
        device: where the work is done.

    Attributes:
        seconds: of each part, since the beginning.
        lately: of each part, between the last two calls of :meth:`settle`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.lately: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        """What comes before belongs to no part."""
        self.mark("")

    def mark(self, part: str) -> None:
        """What came after the last mark belongs to this part."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))

    def settle(self) -> None:
        """Adds up; waits for the device."""
        if self._device.type == "cuda" and self._marks:
            self._marks[-1][1].synchronize()
        self.lately = {}
        for (_, before), (part, after) in itertools.pairwise(self._marks):
            if part:
                took = after - before if isinstance(after, float) else before.elapsed_time(after) / 1e3
                self.lately[part] = self.lately.get(part, 0.0) + took
        for part, took in self.lately.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + took
        self._marks = self._marks[-1:]


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Each part's share of the sum, in percent."""
    total = sum(seconds.values()) or 1.0
    return {part: 100 * s / total for part, s in seconds.items()}


class RunLog:
    """Writes a run's lines.

    Args:
        folder: of the run.
        watch: takes every line too.
        tensorboard: write TensorBoard events.
        keep: bytes of an earlier metrics.jsonl to keep: what the checkpoint to go on from knew of; 0 starts anew.
        step: that checkpoint's step.
    """

    def __init__(self, folder: Path, watch: Watcher, *, tensorboard: bool, keep: int = 0, step: int = 0) -> None:
        self._watch = watch
        path = folder / "metrics.jsonl"
        path.touch()
        with open(path, "r+b") as file:
            file.truncate(keep)
        self._file = open(path, "ab")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if keep else None)

    def write(self, line: dict[str, Any]) -> None:
        """A line with ``kind`` and ``step``; its other numbers become TensorBoard scalars."""
        self._file.write((json.dumps(line) + "\n").encode())
        self._file.flush()
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name not in ("step", "epoch", "epochs"):
                    self._board.add_scalar(f"{line['kind']}/{name}", value, line["step"])
        self._watch(line)

    def position(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]
