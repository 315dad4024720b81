"""What a run tells: a line per N steps and per evaluation to metrics.jsonl, TensorBoard and whoever watches."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Watcher = Callable[[dict[str, Any]], None]


class Clock:
    """Seconds of this process spent on each part of the loop. On a GPU, whose work runs behind, a part's share is the
    time for which it held the loop up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def shares(self) -> dict[str, float]:
        """Each part's share of the sum, in percent."""
        total = sum(self.seconds.values()) or 1.0
        return {part: 100 * s / total for part, s in self.seconds.items()}


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
                if isinstance(value, (int, float)) and name not in ("step", "epoch"):
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
