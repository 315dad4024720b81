"""report.html: one self-contained page with the table, the curves, what was confused and looked at, and how it was made."""

import html
from pathlib import Path
from statistics import mean
from typing import Any

from . import figures
from .figures import figure_name
from .files import write_text
from .log import read_lines
from .pretext.pictures import Probe, read_probe
from .recipe import Recipe, to_yaml
from .report_data import data_sections, first_seeds, questions
from .saliency import WHY_NOT
from .words import (
    LABELS,
    METHODS,
    how_learned,
    learns,
    method_settings,
    own_columns,
    percent,
    place_of,
    rows_by_kind,
)

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
        *_tables(table),
        f"<p class=small>{_e(_selection(jobs, metrics))} {_runs(table)}</p>",
        "<h2>Methods</h2>",
        _methods(jobs),
        "<h2>Curves</h2>",
        *_curves(jobs, metrics, " or ".join(selects)),
        *_cosines(jobs),
        *data_sections(jobs, summaries),
        *_probes(jobs),
        "<h2>Where the time went</h2>",
        _times(jobs, summaries),
        *_use(jobs, summaries),
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


def _tables(table: dict[str, Any]) -> list[str]:
    """A table for each kind of question that the rows answer."""
    out = []
    for kind, rows in rows_by_kind(table["rows"]).items():
        own = own_columns(kind)
        out += [] if own is None else [f"<h3>{_e(kind.capitalize())}</h3>"]
        out.append(_table(rows, table["unit"], own))
        out += [] if own is None else [f"<p class=small>{_e(_OWN[kind])}</p>"]
    return out


_OWN = {
    "order of tiles": "Puzzles of the test split's images. Chance is 100 / orders. Not the data set's labels, so not to be "
    "compared with figures on those.",
    "clusters": "How often the cluster of a test image is told. Rows that learn other clusters answer other questions. The "
    "largest cluster's share is what always naming it would reach (blank where a run's summary does not say). Not the data "
    "set's labels, so not to be compared with figures on those.",
}


def _table(rows: list[dict[str, Any]], unit: str, own: tuple[str, str] | None) -> str:
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    names = list(dict.fromkeys(name for row in rows for name in row["test"]))
    names.sort(key=lambda k: (metrics.index(k) if k in metrics else len(metrics), k == "loss"))
    head = [f"{_e(figure_name(n))}{'' if n == 'loss' else ' %'}" for n in names]
    lines = [[_figure(row["test"].get(n)) for n in names] for row in rows]
    if own is not None:  # the count of classes, the figure, what chance would reach
        head = [own[0], head[0], own[1], *head[1:]]
        pairs = zip(rows, lines, strict=True)
        lines = [[str(row["classes"]), line[0], percent(row["chance"]), *line[1:]] for row, line in pairs]
    body = "".join(
        f"<tr><td>{_e(row['name'])}{''.join(f'<td>{cell}' for cell in line)}<td>{row['images_per_s']:.0f}<td>{row['seeds']}"
        for row, line in zip(rows, lines, strict=True)
    )
    return f"<table><tr><th>{''.join(f'<th>{name}' for name in head)}<th>{unit}/s<th>seeds{body}</table>"


def _figure(value: dict[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.2f}" + (f" ± {value['std']:.2f}" if value["std"] is not None else "")


def _methods(jobs: list) -> str:
    """Of each row: its target, its method and the method's own fields; what it learns, if not all learn labels."""
    own = any(learns(job.recipe) != LABELS for job in jobs)
    rows = []
    for row in dict.fromkeys(job.row for job in jobs):
        recipe = next(job.recipe for job in jobs if job.row == row)  # of the first seed
        target = recipe.target.model + (f" from {place_of(recipe.target.weights)}" if recipe.target.weights else "")
        cells = [row, target, *([how_learned(recipe)] if own else []), recipe.method.name, _fields(recipe)]
        rows.append("<tr>" + "".join(f"<td>{_e(cell)}" for cell in cells))
    head = "<th><th>target" + ("<th>learns" if own else "") + "<th>method<th>"
    return f"<table class=words><tr>{head}{''.join(rows)}</table>"


def _fields(recipe: Recipe) -> str:
    taught = ", ".join(f"{s.name} ({s.model})" for s in recipe.chosen_sources())
    kind = "teachers" if recipe.method.name == "kd" else "sources"
    said = [f"{kind} {taught}" if taught else "", method_settings(recipe)]
    alone = METHODS["scratch"] if learns(recipe) == LABELS else "these alone"
    return "; ".join(text for text in said if text) or alone


def _curves(jobs: list, metrics: list[str], split: str) -> list[str]:
    """Curves of rows that answer one question share axes; no others do."""
    asked, out = questions(jobs), []
    for key in sorted(dict.fromkeys(asked), key=lambda key: key[0] != LABELS):
        mine = [i for i, its in enumerate(asked) if its == key]
        if len(set(asked)) > 1:
            out.append(f"<h3>{_e(learns(jobs[mine[0]].recipe).capitalize())}</h3>")
        out.append(figures.curves([jobs[i] for i in mine], [metrics[i] for i in mine], split))
    return out


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


def _probes(jobs: list) -> list[str]:
    """Linear probes of the rows' stages, where `fasttrain probe` has measured any of the first seeds."""
    probes: dict[str, Probe] = {}
    missing = []
    for job in first_seeds(jobs):
        try:
            found = read_probe(job.folder)
        except WHY_NOT as error:
            missing.append(f"<p class=small>Not shown: {_e(str(error))}</p>")
            continue
        probes |= {job.row: found} if found is not None else {}
    alike: dict[tuple, dict[str, Probe]] = {}
    for row, probe in probes.items():
        alike.setdefault(probe.measured, {})[row] = probe
    out = []
    for group in alike.values():
        out += [f"<p>{_e(next(iter(group.values())).words())}</p>", figures.probes(group), _probe_table(group)]
    return ["<h2>Linear probes</h2>", *out, *missing] if out or missing else []


def _probe_table(group: dict[str, Probe]) -> str:
    """Each row's figures stage by stage, and below them those of random weights."""
    stages = list(dict.fromkeys(stage for probe in group.values() for stage in probe.stages))
    body = ""
    for row, probe in group.items():
        for name, values in ((row, probe.test), (f"{row}: random weights", probe.random)):
            cells = "".join(f"<td>{percent(values.get(stage))}" for stage in stages)
            body += f"<tr><td>{_e(name)}{cells}"
    return f"<table><tr><th>{''.join(f'<th>{_e(stage)}' for stage in stages)}{body}</table>"


_USE = {"gpu_percent": "GPU busy, %", "gpu_gib": "GPU GiB", "gpu_watts": "watts", "gpu_mhz": "MHz"}
_USE |= {"torch_peak_gib": "PyTorch's most, GiB", "own_gib": "process GiB"}


def _use(jobs: list, summaries: list[dict[str, Any]]) -> list[str]:
    """What the runs used of their machine: a line each, and curves; nothing of runs whose summaries are older than these."""
    told = [s.get("use", {}) for s in summaries]
    shown = [name for name in _USE if any(name in its for its in told)]
    if not shown:
        return []
    rows = []
    for job, its in zip(jobs, told, strict=True):
        cells = [f"{its[n]['mean']:.4g} ({its[n]['peak']:.4g})" if n in its else "" for n in shown]
        rows.append(f"<tr><td>{_e(job.label)}{''.join(f'<td>{cell}' for cell in cells)}")
    head = "".join(f"<th>{_e(_USE[n])}" for n in shown)
    note = "<p class=small>Means, and peaks in brackets. The GPU's figures are of all that it does, not of this run alone.</p>"
    gpu = note if "gpu_percent" in shown else "<p class=small>Means, and peaks in brackets.</p>"
    return [
        "<h2>Use of the machine</h2>",
        f"<table><tr><th>{head}{''.join(rows)}</table>",
        gpu,
        figures.use(jobs),
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
