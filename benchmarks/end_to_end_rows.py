"""Rows of suite ``end-to-end``: each a process of its own, which works only when it is its turn.

A row's process imports this module as ``__main__``. It is given what is asked as JSON, builds the row, takes the first steps,
and says ``{}`` (or ``{"not_run": why}``). Every line that it then reads is ``{"seconds", "epoch"}``: it works for so long, and
says how many images that were, how long they took until the device was done, and where the time went.
"""

import contextlib
import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fasttrain.build import Parts, build
from fasttrain.device import choose_device, set_up
from fasttrain.log import shares
from fasttrain.recipe import Recipe, Run
from fasttrain.sources import RecalledSources
from fasttrain.trainer import Trainer

from .step_options import recipe
from .step_rows import Row

LOADER = "loader alone"
_LEAD = 0.15  # of a turn's time, before what is timed: what the loader has ready from its rest is used up
_FIRST = {"cuda": 5, "cpu": 1}  # steps after which all is compiled


@dataclass(frozen=True)
class Kind:
    """A row: whether labels are recalled; ``synthetic``: it trains on one batch again and again."""

    recalled: bool = False
    synthetic: bool = False


KINDS = {
    LOADER: Kind(),
    "train, live": Kind(),
    "train, recalled": Kind(recalled=True),
    "synthetic data, live": Kind(synthetic=True),
    "synthetic data, recalled": Kind(recalled=True, synthetic=True),
}


class Process(Row):
    """A row's process.

    Args:
        name: of :data:`KINDS`.
        asked: see :func:`recipe_of`.
    """

    def __init__(self, name: str, asked: dict[str, Any]) -> None:
        self.shares: dict[str, float] = {}
        command = [sys.executable, "-m", "fasttrain.benchmarks.end_to_end_rows", name, json.dumps(asked)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def work(self, seconds: float, epoch: int | None, *, within: float) -> float:
        """Works for so many seconds: images a second.

        Args:
            seconds: of what is timed.
            epoch: whose images to take, again and again; None: one epoch after the other.
            within: seconds after which the process is ended.

        Raises:
            ValueError: it has ended, or was.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"seconds": seconds, "epoch": epoch}) + "\n")
            self._process.stdin.flush()
        answer = self._within(within)
        if "not_run" in answer:
            raise ValueError(answer["not_run"])
        self.shares = answer["shares"]
        return answer["images"] / answer["seconds"]


def recipe_of(name: str, asked: dict[str, Any]) -> Recipe:
    """What a row trains.

    Args:
        name: of the row.
        asked: as of ``step_options.recipe``, whose loader decides how images are cut, and ``serves``: the loader to take.
    """
    kind = KINDS[name]
    changes = {"data__loader": "synthetic" if kind.synthetic else asked["serves"], "run__tensorboard": "false"}
    changes["transfer__recall"] = str(kind.recalled or name == LOADER).lower()
    if kind.recalled and "data__grow_from" in asked.get("changes", {}):
        changes["transfer__still"] = str(asked["source_size"])  # recalled labels need a size that does not grow
    if name == LOADER:  # neither kind of sources wants a still here: the pixels are the same for both
        changes["method__name"] = "scratch"
    return recipe(asked, **changes)


# --- in a row's process


class Training:
    """The trainer's own steps, log lines among them, through as many epochs as it takes."""

    def __init__(self, parts: Parts, folder: Path, recall: Path) -> None:
        self.parts, self.trainer = parts, Trainer(parts, folder, recall, lambda line: None)
        sources = self.trainer.sources
        if isinstance(sources, RecalledSources) and parts.loader_name != "synthetic":
            sources.fill(parts.open_loader, parts.source_spec)
        self.trainer.target.train()
        self.loader = self.trainer.loader
        self._epoch: int | None = None
        self._walk = self._ready()
        self._images, self._mark = 0, time.perf_counter()
        self._before: dict[str, float] = {}

    def of_epoch(self, epoch: int | None) -> None:
        """What comes next is that epoch's."""
        if epoch is not None:
            self._walk.close()
            self._epoch = epoch
            self._walk = self._ready()

    def one(self) -> int:
        """Takes a step; returns how many images it learned from."""
        its, ready = self.trainer, next(self._walk)
        images = its._take_step(ready)
        its.step += 1
        its.position = ready.position
        self._images += images
        if its.step % its.recipe.run.log_every == 0:
            self._settle()
            its._log_steps(self._images, time.perf_counter() - self._mark)
            its.clock.mark("other")
            self._images, self._mark = 0, time.perf_counter()
        return images

    def start(self) -> None:
        """What is timed begins."""
        self._settle()
        self._before = dict(self.trainer.clock.seconds)
        self.trainer.clock.start()

    def shares(self) -> dict[str, float]:
        """Where the time went since then, in percent."""
        self._settle()
        return shares({k: s - self._before.get(k, 0.0) for k, s in self.trainer.clock.seconds.items()})

    def _settle(self) -> None:
        self.trainer.clock.settle()

    def _ready(self) -> Generator[Any, None, None]:
        while True:
            if self._epoch is not None:
                self.loader.set_epoch(self._epoch)
            yield from self.trainer._ahead()


class Loading:
    """Only the batches, until they are on the device."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.loader = parts, parts.loaders["train"]
        self._epoch: int | None = None
        self._walk = self._batches()

    def of_epoch(self, epoch: int | None) -> None:
        """What comes next is that epoch's."""
        if epoch is not None:
            self._walk.close()
            self._epoch = epoch
            self._walk = self._batches()

    def one(self) -> int:
        """Takes a batch; returns how many images it has."""
        return len(next(self._walk))

    def start(self) -> None:
        """What is timed begins."""

    def shares(self) -> dict[str, float]:
        """There is one part."""
        return {"data": 100.0}

    def _batches(self) -> Generator[Any, None, None]:
        while True:
            if self._epoch is not None:
                self.loader.set_epoch(self._epoch)
            yield from self.loader


def opened(name: str, asked: dict[str, Any]) -> Training | Loading:
    """A row that has taken its first steps."""
    parts, folder = build(recipe_of(name, asked)), Path(asked["folder"])
    own = folder / f"{asked['serves']}, {name}"
    row = Loading(parts) if name == LOADER else Training(parts, own, folder / "recall")
    for epoch in asked["epochs"]:
        row.of_epoch(epoch)
        for _ in range(_FIRST[parts.device.type]):
            row.one()
    if parts.device.type == "cuda":
        torch.cuda.synchronize()
    return row


def work_for(row: Training | Loading, seconds: float, device: torch.device) -> tuple[int, float]:
    """Steps until the time is over: images, and seconds until the device was done with them."""
    begin, images = time.perf_counter(), 0
    while not images or time.perf_counter() - begin < seconds:
        images += row.one()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return images, time.perf_counter() - begin


def turn(row: Training | Loading, seconds: float, epoch: int | None, device: torch.device) -> dict[str, Any]:
    """What a row says of a turn."""
    row.of_epoch(epoch)
    gc.collect()
    work_for(row, _LEAD * seconds, device)
    row.start()
    images, took = work_for(row, seconds, device)
    return {"images": images, "seconds": took, "shares": row.shares()}


def _main(name: str, asked: dict[str, Any]) -> None:
    device = choose_device("auto")
    set_up(Run(), device)
    try:
        row = opened(name, asked)
    except Exception as error:  # missing parts: the other rows can run
        traceback.print_exc()
        print(json.dumps({"not_run": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}), flush=True)
        return
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(row, **json.loads(line), device=device)), flush=True)
    for loader in row.parts.loaders.values():
        loader.close()


if __name__ == "__main__":
    _main(sys.argv[1], json.loads(sys.argv[2]))
