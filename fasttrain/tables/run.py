"""Which rows to train, and with what: the command ``fasttrain table``."""

import difflib
import fnmatch
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from .. import checkpoint
from ..build import Parts, build, ground
from ..compare import Job, locked, run_jobs
from ..device import choose_device, set_up
from ..recipe import Recipe
from ..show import Watch
from . import output, smoke
from .definition import TITLES, Entry, Row, rows, table
from .recipes import Place, changed, changes_of, recipe_of

OPTIONS = ("rows", "data-root", "weights", "seeds", "budget", "protocol", "parallel", "dir")
_OWN = {
    "run.seed": "seeds",
    "run.seeds": "seeds",
    "run.dir": "dir",
    "run.parallel": "parallel",
    "run.protocol": "protocol",
}
_YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built
_PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False}


@dataclass
class _Outcome:
    """A row, its runs, and what has become of them.

    Attributes:
        jobs: one for each seed.
        why_not: why it cannot run, or has not; empty if nothing is known against it.
    """

    row: Row
    jobs: list[Job]
    why_not: str = ""
    summaries: dict[Path, dict[str, Any]] = field(default_factory=dict)

    def look(self) -> None:
        """Reads what is finished.

        Raises:
            ValueError: a run in the row's folder is of another recipe.
        """
        for job in self.jobs:
            path = job.folder / "summary.json"
            if job.folder not in self.summaries and path.is_file():
                _same(yaml.load((job.folder / "recipe.yaml").read_text(), _YAML), job)
                self.summaries[job.folder] = checkpoint.read_summary(path)

    @property
    def todo(self) -> list[Job]:
        return [job for job in self.jobs if job.folder not in self.summaries]

    @property
    def state(self) -> str:
        if not self.todo:
            return "done"
        done = f"{len(self.summaries)} of {len(self.jobs)} seeds done" if self.summaries else ""
        rest = f"not run: {self.why_not}" if self.why_not else "to run"
        return f"{done}, {rest}" if done else rest


class _Watch(Watch):
    """Of rows that differ in what they learn from."""

    def __init__(self, jobs: list[Job], console: Console) -> None:
        super().__init__(jobs[0].recipe, console, len(jobs))
        self.recipes = {job.label: job.recipe for job in jobs}

    def __call__(self, label: str, line: dict[str, Any]) -> None:
        recipe = self.recipes.get(label)
        if recipe is not None:
            self.unit = recipe.unit()
        super().__call__(label, line)


def main(name: str | None, options: dict[str, str | None], listed: bool, overrides: list[str]) -> int:
    """Trains what is missing of a table and writes it.

    Args:
        name: of the table, or ``all``.
        options: values of :data:`OPTIONS` as they were given.
        listed: only say how things stand.
        overrides: fields of recipes as on the command line.

    Returns:
        0 if every chosen row is done (or only listed), else 1.

    Raises:
        ValueError: a mistake in the arguments.
    """
    budget, protocol = (
        _one_of(options, "budget", ("full", "smoke")),
        _one_of(options, "protocol", ("validation", "paper")),
    )
    names = _names(name, free=budget == "smoke" or listed or options["rows"] is not None)
    tiny = budget == "smoke"
    seeds = _number("seeds", options["seeds"], 1 if tiny else 3)
    parallel = _number("parallel", options["parallel"], max(torch.cuda.device_count(), 1))
    changes = _changes(overrides)
    root = Path(options["dir"] or "runs/tables")
    root = root / "smoke" if tiny else root
    root = root / "protocol-paper" if protocol == "paper" else root
    chosen = rows(names) if options["rows"] is None else _matching(options["rows"], rows(names))
    place = _place(options, root, tiny=tiny, listed=listed)

    def recipe(row: Row, seed: int) -> Recipe:
        own = {"run": {"protocol": protocol, "parallel": parallel}}
        made = recipe_of(row, place, seed=seed)
        return changed(changed(smoke.shrunk(made, place) if tiny else made, own), changes)

    console = Console()
    with nullcontext() if listed else locked(root):
        if tiny and not listed:
            smoke.set_the_stage(chosen, root)
        outcomes = {row: _outcome(row, seeds, recipe, place, tiny=tiny) for row in rows(names)}
        mine = {row: outcome for row, outcome in outcomes.items() if row in chosen}
        for row, outcome in mine.items() if not tiny else ():
            if outcome.todo:
                outcome.why_not = outcome.why_not or place.missing(row)
        if not listed:
            _train(mine, root / "recall", console, parallel=parallel, tiny=tiny)
        about = {"budget": budget, "protocol": protocol, "changes": _told(overrides)}
        about["command"] = "fasttrain table " + shlex.join(_given(name, options, overrides))
        _show(names, outcomes, [row.id for row in mine], about, console, None if listed else root)
    left = [outcome for outcome in mine.values() if outcome.todo]
    for why in dict.fromkeys(outcome.why_not for outcome in left if outcome.why_not):
        ids = [outcome.row.id for outcome in left if outcome.why_not == why]
        console.print(f"not run: {why}: {', '.join(ids)}", **_PLAIN)
    if left and not listed:
        console.print(f"{len(left)} of {len(mine)} rows are not done", **_PLAIN)
    return 1 if left and not listed else 0


def _names(name: str | None, *, free: bool) -> list[str]:
    if name == "all":
        if not free:
            raise ValueError(
                "table: all of them would train for weeks; add --rows '*' if that is meant, or --budget smoke"
            )
        return list(TITLES)
    if name not in TITLES:
        raise ValueError(f"table: there is no table {name!r}; there are {', '.join(TITLES)}, and all")
    return [name]


def _one_of(options: dict[str, str | None], name: str, values: tuple[str, ...]) -> str:
    """The first value if none was given."""
    value = options[name] or values[0]
    if value not in values:
        raise ValueError(f"--{name}: {value!r} is none of {', '.join(values)}")
    return value


def _number(name: str, text: str | None, default: int) -> int:
    if text is None:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--{name}: {text!r} is no whole number above 0")
    return int(text)


def _changes(overrides: list[str]) -> dict[str, Any]:
    for given in overrides:
        name = given.removeprefix("--").partition("=")[0]
        if given.startswith("--") and name in _OWN:
            raise ValueError(f"--{name}: of a table, say --{_OWN[name]}")
    return changes_of(overrides)


def _told(overrides: list[str]) -> list[str]:
    """``["--optim.lr", "0.05"]`` -> ``["optim.lr 0.05"]``."""
    return [part.strip() for part in " ".join(overrides).replace("=", " ").split("--") if part.strip()]


def _given(name: str | None, options: dict[str, str | None], overrides: list[str]) -> list[str]:
    return [str(name), *(f"--{k}={v}" for k, v in options.items() if v is not None), *overrides]


def _matching(patterns: str, known: list[Row]) -> list[Row]:
    """The rows that a list of patterns chooses, with the teachers that they need.

    Raises:
        ValueError: a pattern that chooses none, with the ids that are near.
    """
    chosen: set[Row] = set()
    for pattern in patterns.split(","):
        found = [row for row in known if fnmatch.fnmatchcase(row.id, pattern) or (pattern and pattern in row.id)]
        if not found:
            near = difflib.get_close_matches(pattern, [row.id for row in known], 3, cutoff=0.3)
            more = f"; near are {', '.join(near)}" if near else ""
            raise ValueError(f"--rows: no row's id is like {pattern!r} or holds it{more}; --list shows all")
        chosen |= {*found, *(row.teacher for row in found if row.teacher)}
    return [row for row in known if row in chosen]


def _place(options: dict[str, str | None], root: Path, *, tiny: bool, listed: bool) -> Place:
    if tiny:
        return Place(root, root / "data", root / "weights")
    data = Path(options["data-root"]).expanduser() if options["data-root"] else None
    if data is None and not listed:
        raise ValueError(
            "table needs --data-root DIR, the folder of data sets (`fasttrain table -h`), or --budget smoke"
        )
    weights = Path(options["weights"]).expanduser() if options["weights"] else data / "weights" if data else None
    for name, folder in (("data-root", data), ("weights", weights if options["weights"] else None)):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--{name}: there is no folder {folder}")
    return Place(root, data, weights)


def _outcome(row: Row, seeds: int, recipe: Callable[[Row, int], Recipe], place: Place, *, tiny: bool) -> _Outcome:
    after = (place.folder(row.teacher, 0),) if row.teacher else ()
    count = 1 if row.method == "teacher" else seeds  # one teaches the students of all seeds
    name = f"SMOKE {row.id}" if tiny else row.id
    out = _Outcome(row, [Job(name, recipe(row, k), place.folder(row, k), after) for k in range(count)])
    try:
        out.look()
    except ValueError as error:
        out.why_not = str(error)
    return out


def _same(stored: dict[str, Any], job: Job) -> None:
    """Insists that a finished run is of this recipe; only where data and weights lie may differ."""
    now = asdict(job.recipe)
    for content in (stored, now):
        content["data"] |= dict.fromkeys(("name", "root", "indices", "verify", "decoder", "loader"))
        content["target"]["weights"] = content["target"]["weights"] is not None
        content["sources"] = [source | {"weights": ""} for source in content["sources"]]
    try:
        checkpoint.same_recipe(stored, now, job.folder)
    except ValueError as error:
        raise ValueError(str(error).replace("--name or --run.dir", "--dir")) from None


def _train(outcomes: dict[Row, _Outcome], recall: Path, console: Console, *, parallel: int, tiny: bool) -> None:
    """Trains what is missing, seed by seed; what goes wrong with a row is noted there, and the others go on."""
    of = {job.folder: outcome for outcome in outcomes.values() for job in outcome.jobs}
    todo = _todo(outcomes)
    if todo:
        set_up(todo[0].recipe.run, choose_device(todo[0].recipe.run.device))
    if not tiny:
        _look_for_mistakes(todo, of)
        todo = _todo(outcomes)
    if not todo:
        return
    with _Watch(todo, console) as watch:
        for name in dict.fromkeys(of[job.folder].row.data for job in todo) if parallel > 1 else ():
            try:
                mine = [job for job in todo if of[job.folder].row.data == name]
                run_jobs(mine, recall / name, watch, parallel=parallel)
            except ValueError as error:
                console.print(f"stopped: {error}. The rest of {name} runs one after the other.", **_PLAIN)
        while todo:
            job = todo[0]
            outcome = of[job.folder]
            try:
                if (job.folder / "summary.json").is_file():  # by what ran side by side
                    outcome.look()
                else:
                    outcome.summaries[job.folder] = run_jobs([job], recall / outcome.row.data, watch)[0]
            except ValueError as error:
                outcome.why_not = " ".join(str(error).split())
            if tiny and job.folder in outcome.summaries:
                smoke.tidy(job.folder, outcome.row)
            todo = _todo(outcomes)


def _todo(outcomes: dict[Row, _Outcome]) -> list[Job]:
    """What can run, a seed after the other, so that rows can be compared early; teachers before all."""
    for outcome in outcomes.values():
        teacher = outcomes[outcome.row.teacher] if outcome.row.teacher else None
        if teacher and teacher.why_not and teacher.todo and not outcome.why_not:
            outcome.why_not = f"its teacher {teacher.row.id}: {teacher.why_not}"
    todo = [(o.row.method != "teacher", job) for o in outcomes.values() if not o.why_not for job in o.todo]
    return [job for _, job in sorted(todo, key=lambda one: (one[0], one[1].recipe.run.seed))]


def _look_for_mistakes(jobs: list[Job], of: dict[Path, _Outcome]) -> None:
    """Builds each row once, before any is trained: mistakes come to light now, not in days."""
    last: Parts | None = None  # the next one shares its decoded images
    for job in {job.row: job for job in reversed(jobs)}.values():
        try:
            if any(not (folder / "summary.json").is_file() for folder in job.after):
                ground(job.recipe)
            else:
                last = build(job.recipe)
        except ValueError as error:
            of[job.folder].why_not = " ".join(str(error).split())
    del last


def _show(
    names: list[str],
    outcomes: dict[Row, _Outcome],
    chosen: list[str],
    about: dict[str, Any],
    console: Console,
    folder: Path | None,
) -> None:
    """Prints the tables and, with a folder, writes them."""
    found = {row: list(outcome.summaries.values()) for row, outcome in outcomes.items()}
    states = {row: outcome.state for row, outcome in outcomes.items()}
    paths: list[Path] = []
    for name in names:
        entries = list(table(name))
        teachers = dict.fromkeys(entry.row.teacher for entry in entries if entry.row.teacher)
        content = output.content_of(
            name, [*entries, *(Entry(row, None, None) for row in teachers)], found, states, about
        )
        if any(row["id"] in chosen for row in content["rows"]):
            console.print(output.terminal(content, chosen))
            for note in content["notes"]:
                console.print(f"  {note}", **_PLAIN)
            paths += output.write(folder, content) if folder else []
    for path in paths:
        if path.suffix == ".md":
            console.print(f"{path}, and beside it .csv, .json, .png", **_PLAIN)
