"""Rows of suites that time training steps: each a process of its own, which works only when it is its turn.

A row's process runs this module: it is given the row's name and what is asked as JSON, builds the row, takes the first
steps, and says ``{}`` (or ``{"not_run": why}``). For every line that it then reads it takes as many steps as take about
``FASTTRAIN_BENCH_TURN`` seconds, and says how many images those were, how long they took, and where the time went.
"""

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fasttrain.loaders.datasets import stored_pixels

from fasttrain.build import Parts, build
from fasttrain.device import choose_device, keep_memory, set_up
from fasttrain.recipe import Run
from fasttrain.sources import RecalledSources, SoftTargets
from fasttrain.trainer import Trainer

from .baselines import PaperStyle, TimmStyle
from .step_options import recipe

TURN = float(os.environ.get("FASTTRAIN_BENCH_TURN", "10"))  # seconds


class Row:
    """A row's process.

    Args:
        name: of the row, as `fasttrain bench step` calls it.
        asked: what :func:`fasttrain.benchmarks.step_options.prepared` gives.
        environment: variables of the process beside ours.
        module: that the process runs, with :func:`work`.

    Attributes:
        shares: of the parts of the training loop in its last turn, in percent.
    """

    def __init__(
        self,
        name: str,
        asked: dict[str, Any],
        environment: Mapping[str, str] | None = None,
        *,
        module: str = "fasttrain.benchmarks.step_rows",
    ) -> None:
        self.shares: dict[str, float] = {}
        command = [sys.executable, "-m", module, name, json.dumps(asked)]
        variables = {**os.environ, **(environment or {})}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )

    def started(self, seconds: float | None = None) -> str:
        """Waits until it has taken its first steps; returns why it cannot, or nothing.

        Args:
            seconds: it is ended where it takes longer; None for as long as it takes.
        """
        return self._within(seconds).get("not_run", "")

    def turn(self, seconds: float | None = None) -> float:
        """Images a second.

        Args:
            seconds: as of :meth:`started`.

        Raises:
            ValueError: the process has ended.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        answer = self._within(seconds)
        if "not_run" in answer:
            raise ValueError(answer["not_run"])
        self.shares = answer["shares"]
        return answer["images"] / answer["seconds"]

    def end(self) -> None:
        """Closes its input, at which it leaves."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _within(self, seconds: float | None) -> dict[str, Any]:
        if seconds is None:
            return self._answer()
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            answer = self._answer()
        finally:
            timer.cancel()
        return {"not_run": f"it was not done within {seconds:.0f} s"} if late.is_set() else answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return {"not_run": f"its process ended with {self._process.wait()}"}


def in_turns(
    workers: Mapping[str, Row], repeats: int, lost: dict[str, str], *, limit_s: float | None = None
) -> dict[str, list[float]]:
    """Images a second of every row, one figure for each time that it was its turn.

    Args:
        workers: rows that have started.
        repeats: turns of each.
        lost: takes why a row has ended, or was ended, before all of its turns; it then has no figures.
        limit_s: a row that needs longer than that for a turn is ended.
    """
    speeds: dict[str, list[float]] = {name: [] for name in workers}
    for repeat in range(repeats):
        first = repeat % max(len(workers), 1)
        for name in [*list(workers)[first:], *list(workers)[:first]]:
            if name not in speeds:
                continue
            try:
                speeds[name].append(workers[name].turn(limit_s))
            except ValueError as error:
                lost[name] = str(error)
                del speeds[name]
    return speeds


def measured(
    names: Iterable[str], make: Callable[[str], Row], repeats: int, not_run: dict[str, str]
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Starts rows, one after the other, and lets them take turns; nothing of them is left afterwards.

    Args:
        names: of the rows.
        make: a row's process.
        repeats: turns of each.
        not_run: takes why a row has no figures.

    Returns:
        Images a second in each turn, and the shares of the last one in percent, by row.
    """
    workers: dict[str, Row] = {}
    try:
        for name in names:
            workers[name] = make(name)
            why = workers[name].started()
            if why:
                not_run[name] = why
                workers.pop(name).end()
        speeds = in_turns(workers, repeats, not_run)
        return speeds, {name: worker.shares for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.end()


# --- in a row's process


class Ours:
    """Our trainer, step after step, through as many epochs as it takes.

    Attributes:
        first: steps until all is as it stays: compiled, and every soft label known that is to be recalled.
    """

    def __init__(self, parts: Parts, folder: Path, *, constant: bool = False) -> None:
        self.trainer = Trainer(parts, folder, folder.parent / "recall", lambda line: None)
        if constant:
            self.trainer.sources = _Constant(parts)  # type: ignore[assignment]
        self.trainer.target.train()
        self.first = 3 if parts.device.type == "cuda" else 1
        if isinstance(self.trainer.sources, RecalledSources):
            self.first = max(self.first, len(parts.loaders["train"]) + 1)
        self._walk = self.trainer._ahead()

    def steps(self, count: int) -> int:
        """Takes them; returns how many images they were."""
        images = 0
        while count:
            ready = next(self._walk, None)
            if ready is None:
                self._walk = self.trainer._ahead()
                continue
            self.trainer._take_step(ready)
            images += len(ready.batch)
            count -= 1
        return images

    def shares(self) -> dict[str, float]:
        """Where the time went since :meth:`start`, in percent."""
        from fasttrain.log import shares

        self.trainer.clock.settle()
        return shares(self.trainer.clock.lately)

    def start(self) -> None:
        """What is timed begins."""
        self.trainer.clock.settle()
        self.trainer.clock.start()

    def close(self) -> None:
        """Ends threads and closes files."""
        trainer = self.trainer
        self._walk = iter(())
        trainer.writer.close()
        trainer.log.close()
        trainer.stepper.close()
        if trainer.sources is not None:
            trainer.sources.close()
        for loader in trainer.parts.loaders.values():
            loader.close()


class _Constant:
    """Soft targets that cost nothing: the same for every batch."""

    def __init__(self, parts: Parts) -> None:
        counts = tuple(n.spec.classes for n in parts.networks)
        logits_BC = torch.randn(parts.recipe.data.batch, sum(counts), device=parts.device)
        self.soft = SoftTargets(logits_BC, counts, tuple(n.spec.name for n in parts.networks))

    def start(self, batch) -> Callable[[], SoftTargets]:
        return lambda: self.soft

    def describe(self) -> str:
        return "constant"

    def close(self) -> None:
        pass


class _Loader:
    def __init__(self, parts: Parts) -> None:
        self.loader = parts.loaders["train"]
        self._walk = iter(self.loader)

    def steps(self, count: int) -> int:
        images = 0
        while count:
            batch = next(self._walk, None)
            if batch is None:
                self._walk = iter(self.loader)
                continue
            images += len(batch)
            count -= 1
        return images


def opened(name: str, asked: dict[str, Any]) -> Any:
    """A row, ready to take steps."""
    device = choose_device("auto")
    folder = Path(asked["folder"]) / name
    if not name.startswith(("paper", "timm")):
        set_up(Run(), device)
        changes = {"synthetic": {"data__loader": "synthetic"}, "live": {"transfer__recall": "false"}}.get(name, {})
        changes |= {"method__name": "scratch"} if name == "scratch" else {}
        parts = build(recipe(asked, **changes))
        if name == "loader":
            return _Loader(parts)
        return Ours(parts, folder / "run", constant=name in ("heads alone", "synthetic"))
    if "memory kept" in name:
        keep_memory()
    parts = build(recipe(asked, run__compile="false"))
    dataset, index_N = parts.dataset, parts.train_spec.index_N
    images_NHWC = stored_pixels(dataset, index_N, asked["size"]).numpy()
    labels_N = np.asarray(dataset.targets_N[index_N])
    networks = [n.network for n in parts.networks]
    given: dict[str, Any] = {"source_size": asked["source_size"], "batch": asked["batch"], "device": device, "lr": 0.01}
    style = PaperStyle if name.startswith("paper") else TimmStyle
    return style(images_NHWC, labels_N, parts.target, networks, dtype=parts.dtype, **given)


def work(name: str, asked: dict[str, Any], open_row: Callable[[str, dict[str, Any]], Any] = opened) -> None:
    """All that a row's process does."""
    try:
        row, device = open_row(name, asked), choose_device("auto")
        row.steps(getattr(row, "first", 3 if device.type == "cuda" else 1))
    except Exception as error:  # missing parts: the other rows can run
        traceback.print_exc()
        print(json.dumps({"not_run": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}), flush=True)
        return

    def timed(count: int) -> tuple[int, float]:
        start = time.perf_counter()
        images = row.steps(count)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return images, time.perf_counter() - start

    if device.type == "cuda":
        torch.cuda.synchronize()
    _, once = timed(1)
    count = max(1, min(2000, round(TURN / once)))
    _give_back()
    print("{}", flush=True)
    for _ in sys.stdin:
        timed(3 if device.type == "cuda" else 1)  # memory that was given back is asked for anew
        gc.collect()
        if hasattr(row, "start"):
            row.start()
        images, seconds = timed(count)
        found = row.shares() if hasattr(row, "shares") else {}
        print(json.dumps({"images": images, "seconds": seconds, "shares": found}), flush=True)
        _give_back()
    if hasattr(row, "close"):
        row.close()


def _give_back() -> None:
    """While a row sleeps others need the memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    work(sys.argv[1], json.loads(sys.argv[2]))
