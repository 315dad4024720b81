"""Suite ``tuning``: single changes to a training step, measured beside what was predicted of each.

    fasttrain bench tuning [--sweep NAME,NAME] [--budget SECONDS] [--seconds 5] [--repeats 3] [--data FOLDER|FILE.beton]
                           [--target NAME] [--models NAME,NAME] [--size N] [--source-size N] [--batch N] [--images N]
                           [--no-module] [--list] [--json FILE]

  --sweep    all if not given: compile, compile-small, bank, precision, batch, together, optimiser, layout, loader
             (benchmarks/tuning_table.py has bases, changes and predictions)
  --budget   seconds for all of it; what does not fit is listed. Not given: as long as it takes
  --seconds  of a turn, --repeats turns of each
  --target   and the options after it replace those of every sweep's base, whose predictions then say nothing
  --list     the changes and their predictions; nothing runs

The sweep with the largest predicted gain comes first. Every row is a process of its own (`fasttrain bench step -h`); the rows of
a sweep take turns with its base, and the figures are ratios of medians. ``as predicted``: within 10 % of the prediction.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fasttrain.loaders import Dataset
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fasttrain.device import choose_device

from . import step_options
from .step_rows import Row, in_turns
from .tuning_table import SWEEPS, Sweep, Variant

_REPLACE = ("target", "models", "module", "size", "source-size", "batch", "images")
_WITHIN = 0.1
_BETWEEN = 3.0  # seconds that a turn takes beside what is timed
BASE = "base"


def run(arguments: list[str]) -> dict[str, Any]:
    """Measures; prints a table for each sweep, and returns rows and what could not run.

    Raises:
        ValueError: arguments that make no sense, or no data.
    """
    given = _parsed(arguments)
    replaced = {k: v for k, v in vars(given).items() if k in {n.replace("-", "_") for n in _REPLACE}}
    device = choose_device("auto")
    content: dict[str, Any] = {
        "device": str(device),
        "replaced": replaced,
        "budget_s": given.budget if given.budget < float("inf") else None,
        "turn_s": given.seconds,
    }
    content |= {"rows": [], "not_run": {}}
    if given.list:
        content["rows"] = [_predicted(sweep, variant) for sweep in given.sweep for variant in sweep.variants]
        for row in content["rows"]:
            print(f"{row['name']}: {row['predicted']:.2f} of the base. {row['why']}")
        return content
    purse = _Purse(given.budget, given.seconds, given.repeats, time.monotonic())
    data = step_options.packed(given.data, clips=False)
    comparable = device.type == "cuda" and not replaced
    with _Processes(data, replaced, purse) as processes:
        for sweep in given.sweep:
            found = _measured(sweep, processes, content["not_run"], comparable)
            content["rows"] += found
            _print(found)
    content["seconds"] = purse.spent()
    return content


@dataclass
class _Purse:
    """The seconds that may be spent."""

    budget_s: float
    turn_s: float
    repeats: int
    begun: float
    longest_start_s: float = 0.0

    def spent(self) -> float:
        return time.monotonic() - self.begun

    def left_to_start(self, rows: int) -> float:
        """Seconds in which a further row may start, if it and so many others are to have their turns."""
        return self.budget_s - self.spent() - (rows + 1) * self.repeats * (self.turn_s + _BETWEEN)

    def allows(self, rows: int) -> bool:
        """Whether a further row can be expected to start in time."""
        return self.left_to_start(rows) > self.longest_start_s


class _Processes:
    """Starts rows, keeps bases for the sweeps that share them, and ends all in the end."""

    def __init__(self, data: Dataset, replaced: Mapping[str, Any], purse: _Purse) -> None:
        self.data, self.replaced, self.purse = data, replaced, purse
        self._stack = contextlib.ExitStack()
        self._bases: dict[str, Row] = {}

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def base(self, sweep: Sweep) -> Row | str:
        """The sweep's base, or why it cannot run."""
        key = json.dumps([sweep.row, dict(sweep.base), dict(sweep.fields)], sort_keys=True)
        if key not in self._bases:
            row = self.start(sweep, Variant(BASE, 1.0, ""), 0)
            if isinstance(row, str):
                return row
            self._bases[key] = row
            self._stack.callback(row.end)
        return self._bases[key]

    def start(self, sweep: Sweep, variant: Variant, others: int) -> Row | str:
        """A row that has taken its first steps, or why it has not."""
        purse = self.purse
        if not purse.allows(others):
            return f"the budget of {purse.budget_s:.0f} s has no room for it"
        options = {**sweep.base, **self.replaced, **variant.options}
        begun = time.monotonic()
        try:
            asked = self._stack.enter_context(step_options.prepared(options, self.data, "bench tuning"))
        except ValueError as error:
            return str(error)
        asked["changes"] = {k: str(v) for k, v in {**sweep.fields, **variant.fields}.items()}
        row = Row(sweep.row, asked, {"FASTTRAIN_BENCH_TURN": str(purse.turn_s), **variant.environment})
        left = purse.left_to_start(others)
        why = row.started(None if left == float("inf") else left)
        if why:
            row.end()
            return why
        purse.longest_start_s = max(purse.longest_start_s, time.monotonic() - begun)
        return row


def _measured(sweep: Sweep, processes: _Processes, not_run: dict[str, str], comparable: bool) -> list[dict[str, Any]]:
    """A sweep's rows, the base first."""
    base = processes.base(sweep)
    workers, lost = {} if isinstance(base, str) else {BASE: base}, {BASE: base} if isinstance(base, str) else {}
    variants: dict[str, Variant] = {}
    speeds: dict[str, list[float]] = {}
    try:
        for variant in sweep.variants if workers else ():
            row = processes.start(sweep, variant, len(workers))
            if isinstance(row, str):
                lost[variant.name] = row
            else:
                workers[variant.name], variants[variant.name] = row, variant
        if variants:
            purse = processes.purse
            speeds = in_turns(workers, purse.repeats, lost, limit_s=60 + 10 * purse.turn_s)
    finally:
        for name, row in workers.items():
            if name != BASE:
                row.end()
    if BASE in lost:
        lost = {v.name: f"its base: {lost[BASE]}" for v in sweep.variants}
        speeds = {}
    not_run |= {f"{sweep.name}: {name}": why for name, why in lost.items()}
    return _ratios(sweep, variants, speeds, comparable)


def _ratios(
    sweep: Sweep, variants: Mapping[str, Variant], speeds: Mapping[str, list[float]], comparable: bool
) -> list[dict[str, Any]]:
    rows = []
    for name, found in speeds.items():
        row: dict[str, Any] = {"name": f"{sweep.name}: {name}", "images_per_s": median(found), "repeats": found}
        if name == BASE:
            row |= {"sweep": sweep.name, "options": dict(sweep.base), "fields": dict(sweep.fields), "relative_to": {}}
        else:
            ratio = median(found) / median(speeds[BASE])
            predicted = _predicted(sweep, variants[name])
            near = abs(ratio / predicted["predicted"] - 1) <= _WITHIN if comparable else None
            row |= predicted | {"relative_to": {BASE: ratio}, "as_predicted": near}
        rows.append(row)
    return rows


def _predicted(sweep: Sweep, variant: Variant) -> dict[str, Any]:
    name = f"{sweep.name}: {variant.name}"
    return {"name": name, "sweep": sweep.name, "predicted": variant.predicted, "why": variant.why}


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = step_options.parser("tuning", _REPLACE, defaults=False)
    parser.add_argument("--sweep", type=step_options.names, default=[s.name for s in SWEEPS])
    parser.add_argument("--budget", type=float, default=float("inf"))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--list", action="store_true", default=False)
    given = step_options.parsed(parser, arguments)
    if given.budget <= 0 or given.seconds <= 0:
        raise ValueError(f"bench tuning: --budget {given.budget} and --seconds {given.seconds} must be above 0")
    unknown = [name for name in given.sweep if name not in {s.name for s in SWEEPS}]
    if unknown:
        known = ", ".join(s.name for s in SWEEPS)
        raise ValueError(f"bench tuning: there is no sweep {unknown[0]!r}; there are {known}")
    chosen = [s for s in SWEEPS if s.name in given.sweep]
    given.sweep = sorted(chosen, key=lambda s: -s.gain)
    return given


def _print(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    table = Table(box=SIMPLE_HEAD)
    table.add_column("row", no_wrap=True)
    for heading in ("images/s", "x base", "predicted", "as predicted"):
        table.add_column(heading, justify="right", width=max(map(len, heading.split())))
    for row in rows:
        ratio = row["relative_to"].get(BASE)
        figures = [f"{ratio:.2f}", f"{row['predicted']:.2f}"] if ratio else ["", ""]
        near = {True: "yes", False: "no", None: ""}[row.get("as_predicted")]
        table.add_row(row["name"], f"{row['images_per_s']:.1f}", *figures, near)
    Console().print(table)
