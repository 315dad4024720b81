"""Suite ``checkpoints``: what checkpoints cost the training, milliseconds of a step with and without them.

    fasttrain bench checkpoints [--target resnet18] [--size 64] [--batch 32] [--steps 40] [--every 20] [--rounds 5]
                                [--seconds 10,60,600] [--folder FOLDER] [--threads N] [--json FILE]

  --target    backbone; of 1000 classes, trained by SGD with momentum
  --size      side of the images, which are random
  --steps     of a round
  --every     steps from one checkpoint to the next; the first comes after half of them
  --seconds   from one checkpoint to the next: for which the share of the training's time is told
  --folder    where the checkpoints lie; without it a temporary one, which may be in memory
  --threads   of the CPU

``none`` saves nothing. ``background`` is fasttrain/writer.py: the loop waits for a copy of its state in memory, and a thread
seals and writes it, on the CPU that the loop computes on, too. ``foreground`` does the same in the loop. Rounds take turns,
after one of each that does not count; ``ms`` is the median of a round's mean step. ``checkpoint`` is what one costs: the median
over the rounds of the time above that of ``none`` in the same round, divided by the checkpoints. ``snapshot`` is how long a call
takes, ``written`` how long it takes until the file is on the disk, while nothing else goes on: where that is longer than the
steps from one to the next, a checkpoint gives way to the one after it.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fasttrain import checkpoint
from fasttrain.build import build_target
from fasttrain.device import set_up
from fasttrain.files import size_of
from fasttrain.optim import build_optimiser
from fasttrain.recipe import Recipe, Run
from fasttrain.recipe import Target as TargetSpec
from fasttrain.writer import CheckpointWriter

Save = Callable[[dict[str, Any]], None]


def run(arguments: list[str]) -> dict[str, Any]:
    """Measures; prints a table, and returns rows.

    Raises:
        ValueError: arguments that make no sense.
    """
    given, device = _parsed(arguments), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    set_up(Run(threads=given.threads), device)
    try:
        used = torch.get_num_threads()
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            rows, size = _measured(given, Path(folder), device)
    finally:
        torch.set_num_threads(threads)
    title = f"checkpoints of {given.target}, {size / 2**20:.1f} MiB, {device}, {used} threads"
    _print(title, rows, given.seconds)
    content: dict[str, Any] = {"target": given.target, "size": given.size, "batch": given.batch, "every": given.every}
    return content | {"bytes": size, "threads": used, "device": str(device), "rows": rows, "not_run": {}}


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fasttrain bench checkpoints", exit_on_error=False, add_help=False)
    parser.add_argument("--target", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=lambda text: [int(s) for s in text.split(",")], default=[10, 60, 600])
    parser.add_argument("--folder")
    parser.add_argument("--threads", type=int, default=0)
    try:
        given, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"bench checkpoints: {error}") from None
    numbers = (given.size, given.batch, given.steps, given.every, given.rounds, *given.seconds, given.threads + 1)
    if rest or min(numbers) < 1:
        raise ValueError(
            f"bench checkpoints: {' '.join(rest) or 'numbers must be above 0'}; see `fasttrain bench checkpoints -h`"
        )
    if given.every > given.steps:
        raise ValueError(f"bench checkpoints: --every {given.every} is more than the {given.steps} steps of a round")
    if given.folder and not Path(given.folder).is_dir():
        raise ValueError(f"bench checkpoints: --folder {given.folder} is no folder")
    return given


class _Training:
    """Steps of a target on random images, and its state as the trainer saves it."""

    def __init__(self, given: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(0)
        recipe = Recipe(target=TargetSpec(model=given.target))
        self.target = build_target(recipe, 1000, {}).train().to(device).to(memory_format=torch.channels_last)
        self.optimiser = build_optimiser(recipe.optim, self.target)
        pixels = torch.randn(given.batch, 3, given.size, given.size, device=device)
        self.pixels = pixels.contiguous(memory_format=torch.channels_last)
        self.targets_B = torch.randint(1000, (given.batch,), device=device)
        self.done = 0

    def step(self) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.pixels.is_cuda):
            logits_BK = self.target(self.pixels).logits_BK
        torch.nn.functional.cross_entropy(logits_BK.float(), self.targets_B).backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.done += 1

    def state(self) -> dict[str, Any]:
        state = {"target": self.target.state_dict(), "optimisers": [self.optimiser.state_dict()]}
        return state | {"position": {"step": self.done}}


def _measured(given: argparse.Namespace, folder: Path, device: torch.device) -> tuple[list[dict[str, Any]], int]:
    training, said = _Training(given, device), list[str]()
    writer = CheckpointWriter(folder, keep=1, report=said.append)
    ways: dict[str, Save | None] = {
        "none": None,
        "background": lambda state: writer.save(checkpoint.LAST, state),
        "foreground": lambda state: checkpoint.save(folder / "foreground.pt", state),
    }
    repeats: dict[str, list[float]] = {name: [] for name in ways}
    calls: dict[str, list[float]] = {name: [] for name in ways}
    written: dict[str, list[float]] = {name: [] for name in ways}
    try:
        for number in range(given.rounds + 1):
            for name, save in ways.items():
                seconds, took = _round(training, given, save)
                writer.wait()
                if number:
                    repeats[name].append(seconds * 1e3 / given.steps)
                    calls[name] += took
            begin = time.perf_counter()  # a checkpoint while nothing else goes on
            writer.save(checkpoint.LAST, training.state())
            writer.wait()
            written["background"].append((time.perf_counter() - begin) * 1e3)
    finally:
        writer.close()
    saves = len(range(given.every // 2, given.steps, given.every))
    rows = []
    for name, times in repeats.items():
        above = median(a - b for a, b in zip(times, repeats["none"], strict=True)) * given.steps / saves
        row: dict[str, Any] = {"name": name, "ms": median(times), "repeats": times}
        row["relative_to"] = {} if name == "none" else {"none": median(repeats["none"]) / median(times)}
        if name != "none":
            share = {str(s): 100 * above / (above + s * 1e3) for s in given.seconds}
            row |= {"checkpoint_ms": above, "snapshot_ms": median(calls[name]) * 1e3, "share_percent": share}
            row["written_ms"] = median(written[name] or [1e3 * s for s in calls[name]])
        rows.append(row)
    return rows, size_of(training.state())


def _round(training: _Training, given: argparse.Namespace, save: Save | None) -> tuple[float, list[float]]:
    """Seconds of a round, and of each call that saves."""
    calls = []
    begin = time.perf_counter()
    for number in range(given.steps):
        training.step()
        if save is not None and number % given.every == given.every // 2:
            asked = time.perf_counter()
            save(training.state())
            calls.append(time.perf_counter() - asked)
    if training.pixels.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, calls


def _print(title: str, rows: list[dict[str, Any]], seconds: list[int]) -> None:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("row", no_wrap=True)
    for head in ("ms a step", "checkpoint ms", "snapshot ms", "written ms", *(f"% per {s} s" for s in seconds)):
        table.add_column(head, justify="right")
    for row in rows:
        figures = [f"{row[name]:.1f}" if name in row else "" for name in ("checkpoint_ms", "snapshot_ms", "written_ms")]
        shares = [f"{row['share_percent'][str(s)]:.3f}" if "share_percent" in row else "" for s in seconds]
        table.add_row(row["name"], f"{row['ms']:.2f}", *figures, *shares)
    Console().print(table)
