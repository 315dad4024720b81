"""fasttrain pretext: a puzzle, clusters of what a network learned from it, pseudo-labels, and a target that learns from those.

    fasttrain pretext RECIPE [--budget full|smoke] [--probe] [--rows] [--field value ...]

  RECIPE     a packaged name (pretext, pretext-fashion) or a YAML file. Its rows are the steps; a recipe without rows gets these:
               puzzle         pretext.model (null: the target's network) solves puzzles of the training images, with one seed
               pseudo-labels  the target learns which cluster of the puzzle network's features an image falls into
               fine-tuned     the target, from there, learns the labels (data.labelled of them)
               scratch        the same from random weights
  --budget   smoke: every row for one epoch, small and with one seed, to see that it runs; its figures mean nothing
  --probe    linear probes of every stage of every row's first seed, with data.labelled labels; the report shows them
  --rows     only print the recipe with its rows, to be changed and run

`fasttrain train` runs the same rows. Each step is kept where it was made: checkpoints, features, centroids and pseudo-labels lie
in the folder of the row that solved the puzzle. Stopped at any moment, the same command goes on. docs/pretext.md says more.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import compare, show
from ..recipe import Recipe, from_dict, load, row, to_yaml
from ..report_data import first_seeds

_SMOKE: dict[str, Any] = {"optim": {"epochs": 1, "warmup_epochs": 0.0}, "run": {"eval_every": 1, "checkpoint_every": 1}}
_IMAGES, _CLUSTERS, _ORDERS, _UNITS, _LABELLED = 64, 4, 12, 16, 32  # of --budget smoke
_Report = Callable[[str], None]


def main(name: str, overrides: list[str], *, budget: str, probe: bool, rows: bool) -> int:
    """The command.

    Args:
        name: of the recipe.
        overrides: fields as on the command line.
        budget: ``full`` or ``smoke``.
        probe: linear probes of every row.
        rows: only print the recipe.

    Raises:
        ValueError: a mistake in the recipe, or one in which nothing is learned without labels.
    """
    if budget not in ("full", "smoke"):
        raise ValueError(f"--budget is full or smoke, not {budget!r}")
    recipe = with_steps(load(name, overrides))
    if budget == "smoke":
        recipe = shrunk(recipe)
    if rows:
        print(to_yaml(recipe), end="")
        return 0
    console = Console()
    jobs = compare.jobs_of(recipe)
    for text in told(jobs):
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    with show.Watch(recipe, console, len(jobs)) as watch:

        def note(text: str) -> None:
            watch("", {"kind": "note", "text": text})

        table = compare.run(
            recipe, watch, also=(lambda jobs: probes(jobs, recipe.data.labelled, note)) if probe else None
        )
    console.print(show.table(table))
    folder = Path(recipe.run.dir) / recipe.name
    console.print(f"{folder}/report.html, {folder}/table.json", highlight=False, soft_wrap=True)
    return 0


def with_steps(recipe: Recipe) -> Recipe:
    """The recipe with the rows of the four steps, if it has none.

    Raises:
        ValueError: its rows learn nothing without labels.
    """
    if not recipe.rows:
        plain = {"method": {"name": "scratch"}}
        every: dict[str, Any] = {"labelled": 0, "indices": None}
        puzzle = {"target": {"model": recipe.pretext.model or recipe.target.model, "weights": None, "classes": 0}}
        return _changed(
            recipe,
            rows={
                "puzzle": plain
                | puzzle
                | {"data": every | {"pad": 0}, "pretext": {"task": "jigsaw"}, "run": {"once": True}},
                "pseudo-labels": plain | {"data": every | {"labels": "row:puzzle"}, "target": {"classes": 0}},
                "fine-tuned": plain | {"target": {"weights": "row:pseudo-labels"}},
                "scratch": plain,
            },
        )
    made = [row(recipe, changes) for changes in recipe.rows.values()]
    if not any(r.pretext.task != "none" or r.data.labels for r in made):
        raise ValueError("rows: none of them has pretext.task or data.labels; `fasttrain train` runs such a recipe")
    return recipe


def shrunk(recipe: Recipe) -> Recipe:
    """The same rows, small: one epoch on a few images."""
    rows = {}
    for name, changes in recipe.rows.items():
        its = row(recipe, changes)
        own = its.pretext.task != "none" or its.data.labels is not None
        small = replace(
            its,
            data=replace(its.data, labelled=_IMAGES if own else _LABELLED, indices=None, batch=min(its.data.batch, 16)),
            pretext=replace(
                its.pretext,
                permutations=min(its.pretext.permutations, _ORDERS),
                clusters=min(its.pretext.clusters, _CLUSTERS),
                width=min(its.pretext.width, _UNITS),
                hidden=min(its.pretext.hidden, _UNITS),
            ),
            sources=[
                replace(s, classes=min(s.classes, _CLUSTERS)) if s.model == "clusters" else s for s in its.sources
            ],
            optim=replace(its.optim, **_SMOKE["optim"]),
            run=replace(its.run, **_SMOKE["run"]),
        )
        rows[name] = {k: v for k, v in asdict(small).items() if k not in ("name", "rows")}
    out = _changed(recipe, rows=rows, name=f"{recipe.name}-smoke")
    return replace(out, run=replace(out.run, seeds=1))


def told(jobs: list) -> list[str]:
    """The steps, in words."""
    solving = [j.row for j in jobs if j.recipe.pretext.task != "none"]
    labelled = {j.row: j.recipe.pretext.clusters for j in jobs if j.recipe.data.labels is not None}
    rest = list(dict.fromkeys(j.row for j in jobs if j.row not in solving and j.row not in labelled))
    out = []
    if solving:
        out.append(f"1. puzzle: {', '.join(dict.fromkeys(solving))}")
    if labelled:
        counts = sorted(set(labelled.values()))
        out.append(f"2. clusters: {', '.join(map(str, counts))}")
        out.append(f"3. pseudo-labels: {', '.join(labelled)}")
    if rest:
        out.append(f"4. labels: {', '.join(rest)}")
    return out


def probes(jobs: list, labelled: int, report: _Report) -> dict[str, Any]:
    """Linear probes of every row's first seed, unless they are there: ``{"probes": {row: what fasttrain.probe.probe returns}}``.

    Args:
        labelled: labels that a probe gets; 0 for all.
        report: takes a line on each.
    """
    from ..probe import probe

    out = {}
    for job in first_seeds(jobs):
        path = job.folder / "probe.json"
        if not path.is_file():
            found = probe(str(job.folder), labelled=labelled)
            best = max(found["rows"], key=lambda its: its["val"][found["metric"]])
            report(f"{job.row}: linear probes; on validation the best is of {best['name']}")
        out[job.row] = json.loads(path.read_text())
    return {"probes": out}


def _changed(recipe: Recipe, **changes: Any) -> Recipe:
    return from_dict(asdict(recipe) | changes)
