"""What a run tells: a line per N steps and per evaluation to metrics.jsonl, TensorBoard and whoever watches."""

import io
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from .gpu_use import Use

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
    """Writes a run's lines. A disk that is full, or fails, ends nothing: it is told once, and lines wait in memory until there is
    room again; the file never holds a part of a line. TensorBoard's events are given up instead.

    Args:
        folder: of the run; None: nothing is written, and nobody told (every process of a run but the first).
        watch: takes every line too.
        tensorboard: write TensorBoard events.
        keep: bytes of an earlier metrics.jsonl to keep: what the checkpoint to go on from knew of; 0 starts anew.
        step: that checkpoint's step.
        device: where the training computes: lines of steps then tell what it uses of the machine (``gpu_use.py``).
    """

    def __init__(
        self,
        folder: Path | None,
        watch: Watcher,
        *,
        tensorboard: bool,
        keep: int = 0,
        step: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self._watch: Watcher = watch if folder is not None else lambda line: None
        self._waiting: list[bytes] = []
        self._failing = False
        self._board: Any = None
        self._file: io.FileIO | None = None
        self._use: Use | None = None
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        self._file = open(path, "ab", buffering=0)
        self._whole = _whole_lines(path, keep)  # bytes
        if self._whole < keep:
            self._note(
                f"{path} is shorter than the checkpoint says: the lines of its last {keep - self._whole} bytes are lost"
            )
        self._file.truncate(self._whole)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            with self._giving_up_board():
                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if keep else None)
        if device is not None:
            self._use = Use(device, self._note)

    def write(self, line: dict[str, Any]) -> None:
        """A line with ``kind`` and ``step``; its other numbers become TensorBoard scalars."""
        if self._file is None:
            return
        if self._use is not None and line["kind"] == "step":
            line = line | self._use.lately()
        self._waiting.append((json.dumps(line) + "\n").encode())
        self._flush()
        with self._giving_up_board():
            for name, value in line.items():
                numbers = isinstance(value, (int, float)) and name not in ("step", "epoch", "epochs")
                if self._board is not None and numbers:
                    self._board.add_scalar(f"{line['kind']}/{name}", value, line["step"])
        self._watch(line)

    def use(self) -> dict[str, dict[str, float]]:
        """Mean and peak of what this process has used of the machine since its log began."""
        return self._use.whole() if self._use is not None else {}

    def position(self) -> int:
        """Bytes of whole lines in the file, for a checkpoint: a run that goes on from it keeps these and writes after them.

        Lines that wait for room are tried once more. If there still is none, they are not counted: should the run end before
        there is, and go on from this checkpoint, they are lost; none is there twice.
        """
        if self._file is None:
            return 0
        self._flush()
        return self._whole

    def close(self) -> None:
        """Lines that still find no room are lost, and counted in a note."""
        if self._file is None:
            return
        if self._use is not None:
            self._use.close()
        self._flush()
        if self._waiting:
            self._note(f"{self._file.name}: its last {len(self._waiting)} lines were never written")
        with suppress(OSError):
            self._file.close()
        with self._giving_up_board():
            if self._board is not None:
                self._board.close()

    def _flush(self) -> None:
        """Writes what waits, line by line, and cuts off what was written of a line that has no room."""
        if self._file is None or not self._waiting:
            return
        late = len(self._waiting) - 1
        try:
            if self._failing:
                self._file.truncate(self._whole)  # what it may have left
            while self._waiting:
                rest = memoryview(self._waiting[0])
                while rest:
                    rest = rest[self._file.write(rest) :]
                self._whole += len(self._waiting.pop(0))
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._whole)
            if not self._failing:
                self._note(
                    f"{self._file.name} cannot be written ({error.strerror}): its lines wait in memory until there is room; "
                    "training goes on"
                )
            self._failing = True
        else:
            if self._failing:
                self._note(f"{self._file.name} is written again, with {late} lines that waited")
            self._failing = False

    @contextmanager
    def _giving_up_board(self) -> Iterator[None]:
        """TensorBoard's own thread writes; what that meets comes out of the next call."""
        try:
            yield
        except OSError as error:
            self._board = None
            self._note(f"TensorBoard's events cannot be written any more ({error.strerror or error}); training goes on")

    def _note(self, text: str) -> None:
        self._watch({"kind": "note", "text": text})


def _whole_lines(path: Path, keep: int) -> int:
    """``keep``, or where the file is shorter than that, the bytes of its whole lines: a machine that lost its power may have a
    checkpoint on disk, and not all that was written before it."""
    if path.stat().st_size >= keep:
        return keep
    return path.read_bytes().rfind(b"\n") + 1


def read_lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]
