"""What report.html shows of the data: which classes were confused, what networks look at, and a clip."""

import html
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import numpy as np

from . import figures
from .build import loader_specs, open_data
from .details import by_class, confused, over_seeds
from .loaders import Dataset, open_loader
from .pretext import pictures
from .recipe import Recipe, Source
from .saliency import WHY_NOT, Column, chosen_samples, labels, source_column, target_column
from .words import LABELS, learns

_PAIRS, _CHANGES = 15, 10  # lines of the tables
_COUNTS = 2  # numbers of clusters that have pictures


@dataclass(frozen=True)
class _Group:
    """The runs on one data set and its labels, or on one puzzle or clusters of it, and their summaries; the numbers of
    clusters that are drawn."""

    dataset: Dataset
    jobs: list
    summaries: list[dict[str, Any]]
    drawn: list[int]

    def shown(self) -> list[str]:
        """Two rows to look at closely, or the only one: one that learned from labels alone (from random weights, if there is
        one), and of the others the best where weights are selected."""
        alone = [j for j in self.jobs if j.recipe.method.name == "scratch"]
        alone.sort(key=lambda j: j.recipe.target.weights is not None)
        first = [j.row for j in alone[:1]]
        values: dict[str, list[float]] = {}
        for job, s in zip(self.jobs, self.summaries, strict=True):
            if job.row not in first:
                values.setdefault(job.row, []).append(s["val"][s["metric"]])
        return first + ([max(values, key=lambda row: mean(values[row]))] if values else [])

    def firsts(self) -> list[Any]:
        """Each row's job of the first seed."""
        return first_seeds(self.jobs)

    def of(self, row: str) -> list[tuple[Any, dict[str, Any]]]:
        """A row's jobs and summaries, seed by seed."""
        return [(j, s) for j, s in zip(self.jobs, self.summaries, strict=True) if j.row == row]


def first_seeds(jobs: list) -> list[Any]:
    """Each row's job of the first seed."""
    return list({job.row: job for job in reversed(jobs)}.values())[::-1]


def questions(jobs: list) -> list[tuple]:
    """Of each job, what its row is asked: rows for which it is the same can stand beside each other.

    That of rows that learn their data set's labels is the same for all of them, whatever the data set.
    """
    asked = {job.row: _question(job.recipe) for job in first_seeds(jobs)}
    return [asked[job.row] for job in jobs]


def _question(recipe: Recipe) -> tuple:
    what, pretext = learns(recipe), recipe.pretext
    if what == LABELS:
        return (LABELS,)
    if pretext.task != "none":
        puzzle = (pretext.grid, pretext.tile, pretext.channel_shift, pretext.replaced, pretext.grey)
        return (what, _place(recipe), puzzle, recipe.data.size)
    stage = (pretext.layer, pretext.pool, pretext.unit_length, pretext.iterations)
    return what, _place(recipe), recipe.data.labels, stage


def _place(recipe: Recipe) -> tuple:
    """Which data set."""
    return recipe.data.name, recipe.data.root, recipe.data.split


def data_sections(jobs: list, summaries: list[dict[str, Any]]) -> list[str]:
    """The sections of each data set that the rows learned, and of each puzzle or clusters of it. What cannot be made is a
    sentence that says why.

    Args:
        jobs: the runs.
        summaries: theirs, in the same order.
    """
    groups: dict[tuple, list[int]] = {}
    for i, (job, asked) in enumerate(zip(jobs, questions(jobs), strict=True)):
        groups.setdefault((asked[0] != LABELS, _place(job.recipe), asked), []).append(i)
    several = len({place for _, place, _ in groups}) > 1
    drawn = _drawn(jobs)
    out: list[str] = []
    for (own, _, _), members in sorted(groups.items(), key=lambda item: item[0][0]):
        recipe = jobs[members[0]].recipe
        parts = [", ".join(dict.fromkeys(jobs[i].row for i in members))] if own and len(groups) > 1 else []
        parts += [recipe.data.name] if several else []
        name = f": {_e(', '.join(parts))}" if parts else ""
        sections = _SECTIONS[learns(recipe).partition(",")[0]]
        try:  # the runs have compared its files with their checksums
            dataset = open_data(replace(recipe, data=replace(recipe.data, verify=False)))
        except WHY_NOT as error:
            out.append(f"<h2>{sections[0][0]}{name}</h2><p>Not shown: {_e(str(error))}</p>")
            continue
        group = _Group(dataset, [jobs[i] for i in members], [summaries[i] for i in members], drawn)
        for title, section in sections:
            made = section(group)
            out += [f"<h2>{title}{name}</h2>", *made] if made else []
    return out


def _drawn(jobs: list) -> list[int]:
    """The numbers of clusters that are shown in pictures: the first two that rows learn."""
    counts = [j.recipe.pretext.clusters for j in jobs if j.recipe.data.labels and j.recipe.pretext.task == "none"]
    return list(dict.fromkeys(counts))[:_COUNTS]


def _e(text: str) -> str:
    return html.escape(text)


# classes


def _classes(group: _Group) -> list[str]:
    """Confusion matrices or figures of each class, of the two rows; nothing of runs whose summaries are older than these."""
    found = {row: [s["details"] for _, s in group.of(row) if "details" in s] for row in group.shown()}
    details = {row: over_seeds(each) for row, each in found.items() if each}
    if not details:
        return []
    classes, multi = group.dataset.classes, group.dataset.multi_label
    seeds = max(len(each) for each in found.values())
    said = f"{' and '.join(details)}, on the test split" + (f", {seeds} seeds together." if seeds > 1 else ".")
    if len(group.firsts()) > 2:
        said += f" {group.shown()[-1]} is the best of the other rows where weights are selected."
    out = [f"<p>{_e(said)}</p>"]
    by_row = {row: by_class(its) for row, its in details.items()}
    figure = "average precision %" if multi else "share of the class that is found, %"
    fits = figures.names_fit(classes)
    if fits and multi:
        out.append(figures.class_bars(by_row, classes, figure))
    elif fits:
        out.append(figures.confusion({row: its["confusion"] for row, its in details.items()}, classes))
    else:
        out += [] if multi else [_pairs(details, classes)]
        out.append(_changes(by_row, classes, figure))
    return out


def _pairs(details: dict[str, dict[str, Any]], classes: tuple[str, ...]) -> str:
    """The errors that the last row makes most often, and how often the other does."""
    counts = {}
    for row, its in details.items():
        pairs = its["confused"] if "confused" in its else confused(its["confusion"])["confused"]
        counts[row] = {(label, answer): count for count, label, answer in pairs}
    most = sorted(list(counts.values())[-1].items(), key=lambda item: -item[1])[:_PAIRS]
    rows = []
    for (label, answer), _ in most:
        cells = "".join(f"<td>{its.get((label, answer), '')}" for its in counts.values())
        rows.append(f"<tr><td>{_e(classes[label])}<td>{_e(classes[answer])}{cells}")
    head = "".join(f"<th>{_e(row)}" for row in counts)
    note = "<p class=small>The most frequent errors; blank where an error is not among a run's 50 most frequent.</p>"
    return f"<table><tr><th>class<th>taken for{head}{''.join(rows)}</table>{note}"


def _changes(by_row: dict[str, list[float | None]], classes: tuple[str, ...], figure: str) -> str:
    """The classes that differ most between two rows, or the lowest and highest of one."""
    values = list(by_row.values())
    known = [k for k in range(len(classes)) if all(v[k] is not None for v in values)]
    difference = {k: values[-1][k] - (values[0][k] if len(values) > 1 else 0) for k in known}  # type: ignore[operator]
    order = sorted(known, key=lambda k: difference[k])
    chosen = list(dict.fromkeys(order[: -_CHANGES - 1 : -1] + order[:_CHANGES][::-1]))
    rows = []
    for k in chosen:
        cells = "".join(f"<td>{v[k]:.1f}" for v in values)
        rows.append(f"<tr><td>{_e(classes[k])}{cells}" + (f"<td>{difference[k]:+.1f}" if len(values) > 1 else ""))
    head = "".join(f"<th>{_e(row)}" for row in by_row) + ("<th>difference" if len(values) > 1 else "")
    which = "The classes that gain and lose most" if len(values) > 1 else "The highest and lowest classes"
    return f"<p class=small>{which}: {figure}.</p><table><tr><th>{head}{''.join(rows)}</table>"


# what networks look at


def _looks(group: _Group) -> list[str]:
    """Grad-CAM of the two rows' targets, with their first seeds, and of all sources."""
    index_B = chosen_samples(group.dataset)
    columns: list[Column] = []
    missing: list[str] = []

    def add(name: str, column, *arguments: Any) -> None:
        try:
            columns.append(column(*arguments, group.dataset, index_B))
        except WHY_NOT as error:
            missing.append(f"No map of {name}: {' '.join(str(error).split())[:300]}.")

    for row in group.shown():
        job, _ = group.of(row)[0]
        add(row, target_column, row, job.recipe, str(job.folder))
    sources: dict[tuple[str, str, str], tuple[Source, Recipe]] = {}
    for job in group.firsts():
        for s in job.recipe.chosen_sources():
            sources.setdefault((s.name, s.model, s.weights), (s, job.recipe))
    for source, recipe in sources.values():
        add(source.name, source_column, source, recipe)
    out = []
    if columns:
        own = [group.dataset.classes[k] for k in labels(group.dataset, index_B)]
        frame = " (of clips, their middle frames)" if group.jobs[0].recipe.data.frames else ""
        out += [
            f"<p>Grad-CAM on the first test samples of different classes{frame}: red is where a network sees what speaks for a "
            "class; of targets the sample's own class (left), of sources the class that they name. Where all "
            "is blue, nothing does. Above each stands what the network says.</p>",
            figures.looks(columns, own),
        ]
    return out + [f"<p class=small>{_e(text)}</p>" for text in missing]


# clips


def _clip(group: _Group) -> list[str]:
    """The first clip that was learned from, and what the sources saw of it; nothing of rows of images."""
    recipe = next((job.recipe for job in group.jobs if job.recipe.data.frames), None)
    if recipe is None:
        return []
    try:
        spec, _ = loader_specs(recipe, group.dataset)
        still = recipe.transfer.still if recipe.chosen_sources() else 0
        with closing(open_loader("video", replace(spec, batch=1, still=still, drop_last=False), workers=1)) as loader:
            batch = next(iter(loader))
    except WHY_NOT as error:
        return [f"<p>Not shown: {_e(str(error))}</p>"]
    shown_T = np.unique(np.linspace(0, recipe.data.frames - 1, 8).round().astype(int))
    pictures = [(f"frame {t}", batch.pixels[0, :, t]) for t in shown_T.tolist()]
    if recipe.chosen_sources():
        side = f"{still} px" if still else "enlarged"
        shown = batch.images if batch.still is None else batch.still
        pictures.append((f"f_s: frame {recipe.data.frames // 2}, {side}", shown[0]))
    label = labels(group.dataset, batch.index[:1].numpy())[0]
    name = _e(group.dataset.classes[label]) if label >= 0 else "no class"
    said = f"<p>The first clip of the training ({name}) as the target saw it, and the frame that the sources saw.</p>"
    return [said, figures.clip([(title, pixel_3HW.permute(1, 2, 0).numpy()) for title, pixel_3HW in pictures])]


# what is learned without labels


def _puzzles(group: _Group) -> list[str]:
    """Puzzles of the evaluation, and what the networks of the first seeds say."""
    out = []
    for job in group.firsts():
        row = f"<b>{_e(job.row)}</b>: " if len(group.firsts()) > 1 else ""
        try:
            solved = pictures.puzzles(job.recipe, str(job.folder), group.dataset)
        except WHY_NOT as error:
            out.append(f"<p class=small>{row}No puzzles: {_why(error)}.</p>")
            continue
        pretext = job.recipe.pretext
        said = (
            f"The first {len(solved)} images of the test split, and their puzzles as the network saw them: {pretext.grid} x "
            f"{pretext.grid} tiles in one of {pretext.permutations} orders, up to {pretext.replaced} of them another image's. "
            "Above each stands whether the network tells the order, and the probability of its answer."
        )
        out += [f"<p>{row}{_e(said)}</p>", figures.puzzles(solved)]
    return [*out, "<p class=small>No Grad-CAM of networks that solve puzzles: they see tiles, not the image.</p>"]


def _clusters(group: _Group) -> list[str]:
    """The images nearest to some of the centroids that the rows learn to tell apart."""
    recipe = group.jobs[0].recipe
    if recipe.pretext.clusters not in group.drawn:
        return [
            f"<p>Not drawn: only clusters of the first two numbers are ({' and '.join(map(str, group.drawn))}).</p>"
        ]
    try:
        shown = pictures.clusters(recipe)
    except WHY_NOT as error:
        return [f"<p>Not shown: {_why(error)}.</p>"]
    said = (
        f"{len(shown)} of {recipe.pretext.clusters} clusters, and the {pictures.NEAREST} training images nearest to the centroid "
        f"of each, nearest first. They are taken evenly from the list of clusters from the largest to the smallest, leaving out "
        f"those with fewer than {pictures.NEAREST} training images (where fewer than {pictures.CLUSTERS} have as many, those "
        "without any). Beside a cluster's size stands its most frequent class by the data set's own labels: for information "
        "only, nothing was learned from it."
    )
    seeds = len({job.recipe.run.seed for job in group.jobs})
    return [f"<p>{_e(said)}{' Those of the first seed.' if seeds > 1 else ''}</p>", figures.clusters(shown)]


def _why(error: Exception) -> str:
    return _e(" ".join(str(error).split())[:300].rstrip("."))


_SECTIONS: dict[str, tuple[tuple[str, Callable[[_Group], list[str]]], ...]] = {
    "labels": (("Classes", _classes), ("What the networks look at", _looks), ("A clip", _clip)),
    "order of tiles": (("Puzzles", _puzzles),),
    "clusters": (("Clusters", _clusters), ("What the networks look at", _looks)),
}
