"""What the tests of trainings in bad luck share: a small run, and looks at one from outside."""

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fasttrain import checkpoint

from . import hooks, processes

SMALL = (
    *("smoke", "--run.tensorboard", "false", "--run.log_every", "1", "--data.labelled", "60", "--data.size", "12"),
    *("--data.stored", "12", "--data.batch", "16", "--run.threads", "1", "--run.eval_every", "2"),
)
SCRATCH = (*SMALL, "--method.name", "scratch", "--optim.epochs", "8")
"""32 steps from labels alone."""
CHECKPOINTS = Path("runs/smoke/checkpoints")
SLOWLY = partial(hooks.slow_steps, 0.03)


def until(holds: Callable[[], object], run: processes.Run, seconds: float = 60) -> None:
    """Waits for something to hold while a run is going on."""
    latest = time.monotonic() + seconds
    while not holds():
        assert any(process.is_alive() for process in run.processes), f"ended before that: {run.said()}"
        assert time.monotonic() < latest, run.said()
        time.sleep(0.005)


def has_lines(place: Path, count: int) -> Callable[[], bool]:
    """Whether the log of the run in ``place`` has so many lines."""
    path = place / "runs/smoke/metrics.jsonl"
    return lambda: path.is_file() and path.read_bytes().count(b"\n") >= count


def ended(run: processes.Run, codes: list[int], seconds: float = 60) -> str:
    """Waits for the end and insists on exit codes, and that no process and no traceback is left; returns what was said."""
    found, said = run.wait(seconds), run.said()
    assert found == codes, (found, said)
    assert run.left() == [], said
    assert "Traceback" not in said, said
    return said


def sentence(said: str) -> str:
    """The one line that says why a run has ended."""
    lines = [line for line in said.splitlines() if line.startswith("fasttrain: ")]
    assert len(lines) == 1, said
    return lines[0]


def tidy(place: Path) -> None:
    """Insists that nothing is left half written."""
    assert [*place.rglob("*.tmp"), *place.rglob("*.partial")] == []


def kept_all(place: Path) -> int:
    """Insists that the last checkpoint is of the last step that was logged; returns it."""
    lines = (place / "runs/smoke/metrics.jsonl").read_text().splitlines()
    step = checkpoint.load(place / CHECKPOINTS / "last.pt")["position"]["step"]
    assert step == max(json.loads(line)["step"] for line in lines)
    return step


def stop(run: processes.Run, place: Path, lines: int) -> int:
    """Asks a run that goes on to end when its log has so many lines; returns the step that it kept."""
    until(has_lines(place, lines), run)
    run.send(signal.SIGTERM)
    ended(run, [75] * len(run.processes))
    return kept_all(place)


def ask_group(run: processes.Run) -> None:
    """SIGTERM to every process of the run, loaders' workers among them."""
    for process in run.processes:
        os.killpg(process.pid, signal.SIGTERM)  # type: ignore[arg-type]
