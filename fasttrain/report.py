"""report.html: one self-contained page with the table, the curves, what was confused and looked at, and how it was made."""

import html
from pathlib import Path
from statistics import mean
from typing import Any

from . import figures
from .figures import figure_name
from .files import write_text
from .log import read_lines
from .recipe import Recipe, to_yaml
from .report_data import data_sections
from .words import METHODS, method_settings, place_of

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1d2733 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .9rem; border-bottom: 1px solid #d5dbe3 }
td, th { text-align: right } td:first-child, th:first-child, table.words td, table.words th { text-align: left }
img { max-width: 100%; margin: .5rem 0 } pre { background: #f3f5f8; padding: 1rem; overflow-x: auto; font-size: 13px }
p.small { color: #5b6878; font-size: 14px }
"""


def write(path: Path, recipe: Recipe, table: dict[str, Any], jobs: list, summaries: list[dict[str, Any]]) -> None:
    """Writes the page.

    Args:
        path: of the file.
        recipe: as it was run.
        table: from :func:`fasttrain.compare.tabulate`.
        jobs: the runs, each with ``row``, ``label``, ``recipe`` and ``folder``.
        summaries: their summaries, in the same order.
    """
    machine, versions = table["environment"]["machine"], table["environment"]["versions"]
    gpu = ", ".join(machine["gpu"]) or "no GPU"
    metrics = [s["metric"] for s in summaries]
    selects = dict.fromkeys("test" if job.recipe.run.protocol == "paper" else "validation" for job in jobs)
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{_e(recipe.name)}</title><style>{_STYLE}</style>",
        f"<h1>{_e(recipe.name)}</h1>",
        "<h2>Test split</h2>",
        _table(table, list(dict.fromkeys(metrics))),
        f"<p class=small>{_e(_selection(jobs, metrics))} {_runs(table)}</p>",
        "<h2>Methods</h2>",
        _methods(jobs),
        "<h2>Curves</h2>",
        figures.curves(jobs, metrics, " or ".join(selects)),
        *_cosines(jobs),
        *data_sections(jobs, summaries),
        "<h2>Where the time went</h2>",
        _times(jobs, summaries),
        "<h2>Sources and data</h2>",
        f"<pre>{_e(chr(10).join(dict.fromkeys(line for s in summaries for line in s['log'])))}</pre>",
        "<h2>Made on</h2>",
        f"<p>{_e(machine['cpu'])}, {machine['cores']} threads a run, {_e(gpu)}; {_e(machine['system'])}; commit "
        f"{_e(str(table['environment']['commit']))}; {_e(', '.join(f'{k} {v}' for k, v in versions.items()))}</p>",
        "<h2>Recipe</h2>",
        f"<pre>{_e(to_yaml(recipe))}</pre>",
    ]
    write_text(path, "\n".join(parts) + "\n")


def _e(text: str) -> str:
    return html.escape(text)


def _runs(table: dict[str, Any]) -> str:
    count = table["side_by_side"]
    return f"Speeds are of one run while {count} trained side by side." if count > 1 else ""


def _selection(jobs: list, metrics: list[str]) -> str:
    """Which weights were tested, and what the test split had to do with it; of which rows, if not of all."""
    rows_by_text: dict[str, list[str]] = {}
    for job, metric in zip(jobs, metrics, strict=True):
        run = job.recipe.run
        if run.protocol == "paper" and run.select == "best":
            text = (
                f"Weights were selected by {figure_name(metric)} on the test split itself, as in the paper, and nothing was held "
                "out for validation: the figures are too good by what selecting gains."
            )
        elif run.protocol == "paper":
            text = "Weights are the last epoch's. Nothing was held out; the test split, looked at in training, chose nothing."
        elif run.select == "best":
            text = (
                f"Weights were selected by {figure_name(metric)} on the validation split; the test split was looked at once "
                "per run."
            )
        else:
            text = "Weights are the last epoch's; the test split was looked at once per run."
        rows_by_text.setdefault(text, []).append(job.row)
    if len(rows_by_text) == 1:
        return next(iter(rows_by_text))
    return " ".join(f"{', '.join(dict.fromkeys(rows))}: {text}" for text, rows in rows_by_text.items())


def _table(table: dict[str, Any], metrics: list[str]) -> str:
    names = list(dict.fromkeys(name for row in table["rows"] for name in row["test"]))
    names.sort(key=lambda k: (metrics.index(k) if k in metrics else len(metrics), k == "loss"))
    head = "".join(f"<th>{_e(figure_name(n))}{'' if n == 'loss' else ' %'}" for n in names)
    rows = []
    for row in table["rows"]:
        cells = "".join(f"<td>{_figure(row['test'].get(n))}" for n in names)
        rows.append(f"<tr><td>{_e(row['name'])}{cells}<td>{row['images_per_s']:.0f}<td>{row['seeds']}")
    return f"<table><tr><th>{head}<th>{table['unit']}/s<th>seeds{''.join(rows)}</table>"


def _figure(value: dict[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.2f}" + (f" ± {value['std']:.2f}" if value["std"] is not None else "")


def _methods(jobs: list) -> str:
    """Of each row: its target, its method and the method's own fields."""
    rows = []
    for row in dict.fromkeys(job.row for job in jobs):
        recipe = next(job.recipe for job in jobs if job.row == row)  # of the first seed
        target = recipe.target.model + (f" from {place_of(recipe.target.weights)}" if recipe.target.weights else "")
        cells = (row, target, recipe.method.name, _fields(recipe))
        rows.append("<tr>" + "".join(f"<td>{_e(cell)}" for cell in cells))
    return f"<table class=words><tr><th><th>target<th>method<th>{''.join(rows)}</table>"


def _fields(recipe: Recipe) -> str:
    taught = ", ".join(f"{s.name} ({s.model})" for s in recipe.chosen_sources())
    kind = "teachers" if recipe.method.name == "kd" else "sources"
    said = [f"{kind} {taught}" if taught else "", method_settings(recipe)]
    return "; ".join(text for text in said if text) or METHODS["scratch"]


def _cosines(jobs: list) -> list[str]:
    """Where ``run.cosine_every`` had them measured: curves, and a line for each row and auxiliary loss."""
    values: dict[tuple[str, str], list[float]] = {}
    for job in jobs:
        for line in read_lines(job.folder, "step"):
            for field in line:
                if field.startswith("cosine/"):
                    values.setdefault((job.row, field.removeprefix("cosine/")), []).append(line[field])
    if not values:
        return []
    rows = "".join(
        f"<tr><td>{_e(row)}<td>{_e(name)}<td>{mean(its):+.3f}<td>{100 * mean(v < 0 for v in its):.0f}"
        for (row, name), its in values.items()
    )
    return [
        "<h2>Gradient cosines</h2>",
        "<p>Between the gradients of the task's loss and of each auxiliary loss, by the backbone's parameters: above 0 a step "
        "along one helps the other, below 0 it hinders it. Points are means of what was measured since the one before.</p>",
        figures.cosines(jobs, list(dict.fromkeys(name for _, name in values))),
        f"<table><tr><th><th>auxiliary loss<th>mean cosine<th>points below 0, %{rows}</table>",
    ]


def _times(jobs: list, summaries: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(k for s in summaries for k in s["time_share_percent"]))
    head = "".join(f"<th>{_e(n)} %" for n in names)
    rows = []
    for job, s in zip(jobs, summaries, strict=True):
        cells = "".join(f"<td>{s['time_share_percent'].get(n, 0):.1f}" for n in names)
        rows.append(f"<tr><td>{_e(job.label)}{cells}<td>{s['train_seconds']:.1f}")
    said = dict.fromkeys(f"{job.row}: {s['advice']}" for job, s in zip(jobs, summaries, strict=True) if s.get("advice"))
    advice = "".join(f"<p>{_e(text)}</p>" for text in said)
    return f"<table><tr><th>{head}<th>seconds of training{''.join(rows)}</table>{advice}"
