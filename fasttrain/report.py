"""report.html: one self-contained page with the table, the curves, and what the figures were made on."""

import base64
import html
import io
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .build import loader_specs, open_data
from .files import write_text
from .loaders import open_loader
from .log import read_lines
from .recipe import Recipe, to_yaml

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1d2733 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .9rem; border-bottom: 1px solid #d5dbe3 }
td, th { text-align: right } td:first-child, th:first-child { text-align: left }
img { max-width: 100%; margin: .5rem 0 } pre { background: #f3f5f8; padding: 1rem; overflow-x: auto; font-size: 13px }
p.small { color: #5b6878; font-size: 14px }
"""


def write(path: Path, recipe: Recipe, table: dict[str, Any], jobs: list, summaries: list[dict[str, Any]]) -> None:
    """Writes the page.

    Args:
        path: of the file.
        recipe: as it was run.
        table: from :func:`fasttrain.compare.tabulate`.
        jobs: the runs, each with ``row``, ``label`` and ``folder``.
        summaries: their summaries, in the same order.
    """
    machine, versions = table["environment"]["machine"], table["environment"]["versions"]
    gpu = ", ".join(machine["gpu"]) or "no GPU"
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{_e(recipe.name)}</title><style>{_STYLE}</style>",
        f"<h1>{_e(recipe.name)}</h1>",
        "<h2>Test split</h2>",
        _table(table),
        f"<p class=small>{_e(table['metric'].replace('_', ' '))} is what weights were selected by, on the validation "
        f"split; the test split was looked at once per run. {_runs(table)}</p>",
        "<h2>Curves</h2>",
        _curves(jobs, table["metric"]),
        *_clip(recipe),
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


def _table(table: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for row in table["rows"] for name in row["test"]))
    names.sort(key=lambda k: (k != table["metric"], k == "loss"))
    head = "".join(f"<th>{_e(n.replace('_', ' '))}{'' if n == 'loss' else ' %'}" for n in names)
    rows = []
    for row in table["rows"]:
        cells = "".join(f"<td>{_figure(row['test'].get(n))}" for n in names)
        rows.append(f"<tr><td>{_e(row['name'])}{cells}<td>{row['images_per_s']:.0f}<td>{row['seeds']}")
    return f"<table><tr><th>{head}<th>{table['unit']}/s<th>seeds{''.join(rows)}</table>"


def _figure(value: dict[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.2f}" + (f" ± {value['std']:.2f}" if value["std"] is not None else "")


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


def _clip(recipe: Recipe) -> list[str]:
    """The first clip that was learned from, and what the sources saw of it; nothing of a recipe of images."""
    if not recipe.data.frames:
        return []
    from matplotlib.figure import Figure

    dataset = open_data(recipe)
    spec, _ = loader_specs(recipe, dataset)
    still = recipe.transfer.still if recipe.chosen_sources() else 0
    with closing(open_loader("video", replace(spec, batch=1, still=still, drop_last=False), workers=1)) as loader:
        batch = next(iter(loader))
    shown_T = np.unique(np.linspace(0, recipe.data.frames - 1, 8).round().astype(int))
    pictures = [(f"frame {t}", batch.pixels[0, :, t]) for t in shown_T.tolist()]
    if recipe.chosen_sources():
        side = f"{still} px" if still else "enlarged"
        shown = batch.images if batch.still is None else batch.still
        pictures.append((f"f_s: frame {recipe.data.frames // 2}, {side}", shown[0]))
    figure = Figure(figsize=(11, 1.7), dpi=110, layout="constrained")
    for axis, (title, pixel_CHW) in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures, strict=True):
        axis.imshow(pixel_CHW.permute(1, 2, 0).numpy())
        axis.set_title(title, fontsize=7)
        axis.axis("off")
    name = _e(dataset.classes[int(batch.targets[0])])
    said = f"<p>The first clip of the training ({name}) as the target saw it, and the frame that the sources saw.</p>"
    return ["<h2>A clip</h2>", said, _embedded(figure, "frames of a clip")]


def _embedded(figure: Any, name: str) -> str:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}">'


def _curves(jobs: list, metric: str) -> str:
    """Training loss of the task and the selecting figure on the validation split, a colour a row, a line a seed."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(11, 3.8), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2)
    rows = list(dict.fromkeys(j.row for j in jobs))
    for job in jobs:
        colour, first = f"C{rows.index(job.row)}", job is next(j for j in jobs if j.row == job.row)
        for axis, kind, field in ((axes[0], "step", "primary"), (axes[1], "eval", metric)):
            lines = read_lines(job.folder, kind)
            x, y = [line["step"] for line in lines], [line[field] for line in lines]
            axis.plot(
                x, y, colour, marker="." if len(x) < 3 else "", label=job.row if first else None, alpha=0.75, lw=1.3
            )
    for axis, title in ((axes[0], "task loss, training"), (axes[1], f"{metric.replace('_', ' ')} %, validation")):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    return _embedded(figure, "curves")
