"""The pictures of report.html: each an ``<img>`` that holds its own PNG."""

import base64
import html
import io
from typing import Any

import numpy as np

from .log import read_lines
from .pretext.pictures import Cluster, Probe, Solved
from .saliency import Column

_NAMED = 30  # classes that a picture has room to name
_COUNTED = 12  # classes of a confusion matrix whose counts can be read
_WORDS = {"map": "mAP", "map_11point": "mAP at 11 points", "sample_ap": "AP of images", "clip_map": "mAP of clips"}
_WORDS |= {"auroc": "AUROC", "top5": "top-5 accuracy"}


def figure_name(name: str) -> str:
    """A figure as people call it: ``mAP`` for ``map``."""
    return _WORDS.get(name, name.replace("_", " "))


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # slow to import

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _embedded(figure: Any, name: str) -> str:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    data = base64.b64encode(picture.getvalue()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'


def curves(jobs: list, metrics: list[str], split: str) -> str:
    """Training loss of the task and each row's selecting figure on the split that is evaluated, a colour a row, a line a seed.

    Args:
        jobs: the runs.
        metrics: of each.
        split: what to call that split.
    """
    kinds = list(dict.fromkeys(metrics))
    figure = _figure(5.5 * (1 + len(kinds)), 3.8)
    axes = figure.subplots(1, 1 + len(kinds))
    for job, metric in zip(jobs, metrics, strict=True):
        _lines(axes[0], jobs, job, "step", "primary")
        _lines(axes[1 + kinds.index(metric)], jobs, job, "eval", metric)
    titles = ["task loss, training", *(f"{figure_name(k)} %, {split}" for k in kinds)]
    for axis, title in zip(axes, titles, strict=True):
        _finish(axis, title)
    return _embedded(figure, "curves")


def cosines(jobs: list, names: list[str]) -> str:
    """Cosines between the gradients of the task's and of auxiliary losses, beside a line at 0; a picture for each loss."""
    wide, high = min(len(names), 2), -(-len(names) // 2)
    figure = _figure(5.5 * wide, 3.4 * high)
    axes = figure.subplots(high, wide, squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        for job in jobs:
            _lines(axis, jobs, job, "step", f"cosine/{name}")
        axis.axhline(0, color="black", lw=0.8)
        _finish(axis, f"cosine with the gradient of {name}")
    for axis in axes[len(names) :]:
        _bare(axis)
    return _embedded(figure, "gradient cosines")


def use(jobs: list) -> str:
    """How busy the GPU was, where there is one, and memory: the process's own and the GPU's; empty where no log has them."""
    told = {field for job in jobs for line in read_lines(job.folder, "step") for field in line}
    titles = {
        "gpu_percent": "GPU busy, %",
        "gpu_gib": "memory of the GPU, GiB",
        "own_gib": "memory of the process, GiB",
    }
    shown = [field for field in titles if field in told]
    if not shown:
        return ""
    figure = _figure(3.7 * len(shown), 2.6)
    for axis, field in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for job in jobs:
            _lines(axis, jobs, job, "step", field)
        _finish(axis, titles[field])
        axis.set_ylim(0, 1.15 * axis.dataLim.ymax)
    return _embedded(figure, "use of the machine")


def _lines(axis: Any, jobs: list, job: Any, kind: str, field: str) -> None:
    rows = list(dict.fromkeys(j.row for j in jobs))
    lines = [line for line in read_lines(job.folder, kind) if field in line]
    if not lines:
        return
    named = job.row in axis.get_legend_handles_labels()[1]
    x, y = [line["step"] for line in lines], [line[field] for line in lines]
    marker, label = "." if len(x) < 3 else "", None if named else job.row
    axis.plot(x, y, f"C{rows.index(job.row)}", marker=marker, label=label, alpha=0.75, lw=1.3)


def _finish(axis: Any, title: str) -> None:
    axis.set(title=title, xlabel="step")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()


def clip(pictures: list[tuple[str, np.ndarray]]) -> str:
    """Titles and frames, uint8 [H, W, 3]."""
    figure = _figure(11, 1.7)
    for axis, (title, pixel_HW3) in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures, strict=True):
        axis.imshow(pixel_HW3)
        axis.set_title(title, fontsize=7)
        _bare(axis)
    return _embedded(figure, "frames of a clip")


def puzzles(solved: list[Solved]) -> str:
    """Images, each beside its puzzle, with gaps between the tiles; above them what the network says.

    Args:
        solved: at least one.
    """
    figure = _figure(2.8 * len(solved), 1.75)
    for b, (left, right) in enumerate(figure.subplots(1, 2 * len(solved), squeeze=False)[0].reshape(-1, 2)):
        left.imshow(solved[b].picture_HW3)
        right.imshow(solved[b].puzzle_HW3)
        right.set_title(solved[b].said, fontsize=8, color="C2" if solved[b].right else "C3")
        _bare(left)
        _bare(right)
    return _embedded(figure, "puzzles")


def clusters(shown: list[Cluster]) -> str:
    """The images nearest to centroids, a line a cluster.

    Args:
        shown: at least one.
    """
    figure = _figure(5.2, 0.83 * len(shown) + 0.1)
    for axis, cluster in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        axis.imshow(cluster.strip_HW3)
        axis.set_title(cluster.title.replace("$", r"\$"), fontsize=8, loc="left")
        _bare(axis)
    return _embedded(figure, "clusters")


def probes(group: dict[str, Probe]) -> str:
    """Bars of a linear classifier's figures on each stage, a colour a row; lines on them are those of random weights.

    Args:
        group: of rows whose probes can be compared.
    """
    stages = list(dict.fromkeys(stage for probe in group.values() for stage in probe.stages))
    first = next(iter(group.values()))
    figure = _figure(max(5.5, 1.1 * len(stages) + 4), 3.6)
    axis, width = figure.subplots(), 0.8 / len(group)
    for r, (row, probe) in enumerate(group.items()):
        place = [stages.index(stage) + (r - (len(group) - 1) / 2) * width for stage in probe.stages]
        trained, random = ([values[stage] for stage in probe.stages] for values in (probe.test, probe.random))
        axis.bar(place, trained, width, label=_short(row), color=f"C{r}")
        axis.bar(place, random, width, label=None if r else "random weights", fill=False, ls="--", lw=1.2)
    axis.axhline(first.chance, color="black", lw=0.8, label="always the same answer")
    axis.set_xticks(range(len(stages)), [_short(stage) for stage in stages], fontsize=8)
    axis.set(title=f"{figure_name(first.metric)} % of linear probes")
    axis.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside right upper", fontsize=8)
    return _embedded(figure, "linear probes")


def _bare(axis: Any) -> None:
    axis.set(xticks=(), yticks=())  # which would be laid out all the same
    axis.axis("off")


def looks(columns: list[Column], labels: list[str]) -> str:
    """The samples, one a line, and what each network looks at in them: red where most, each map by its own largest value.

    On the left they are as the network saw them whose input is largest.

    Args:
        columns: at least one.
        labels: the samples' own classes.
    """
    count = len(columns) + 1
    sharpest = max(columns, key=lambda column: column.picture_BHW3.shape[1])
    figure = _figure(1.6 * count, 1.75 * len(labels) + 0.2)
    for b, line in enumerate(figure.subplots(len(labels), count, squeeze=False)):
        line[0].imshow(sharpest.picture_BHW3[b])
        line[0].set_title(_short(labels[b]), fontsize=7)
        for axis, column in zip(line[1:], columns, strict=True):
            cam_HW = column.cam_BHW[b]
            axis.imshow(column.picture_BHW3[b])
            axis.imshow(cam_HW / max(cam_HW.max(), 1e-12), cmap="jet", vmin=0, vmax=1, alpha=0.45)
            above = f"{_short(column.title)}\n" if b == 0 else ""
            axis.set_title(above + _short(column.said[b]), fontsize=7)
        for axis in line:
            _bare(axis)
    return _embedded(figure, "Grad-CAM")


def confusion(matrices: dict[str, list[list[int]]], classes: tuple[str, ...]) -> str:
    """Confusion matrices of rows side by side: the colour is the answer's share of its class's samples.

    Args:
        matrices: counts [label][answer] by row.
        classes: names, of up to 30.
    """
    side = 2.2 + 0.25 * len(classes)
    figure = _figure(side * len(matrices), side)
    for axis, (row, counts) in zip(figure.subplots(1, len(matrices), squeeze=False)[0], matrices.items(), strict=True):
        count_KK = np.array(counts)
        share_KK = count_KK / np.maximum(count_KK.sum(1, keepdims=True), 1)
        axis.imshow(share_KK, cmap="Blues", vmin=0, vmax=1)
        places = range(len(classes))
        axis.set_xticks(places, [_short(c, 16) for c in classes], rotation=90, fontsize=7)
        axis.set_yticks(places, [_short(c, 16) for c in classes], fontsize=7)
        axis.set_title(row, fontsize=9)
        axis.set_xlabel("answer", fontsize=8)
        axis.set_ylabel("label", fontsize=8)
        for i, j in np.ndindex(*count_KK.shape) if len(classes) <= _COUNTED else ():
            colour = "white" if share_KK[i, j] > 0.5 else "black"
            axis.text(j, i, str(count_KK[i, j]), ha="center", va="center", fontsize=7, color=colour)
    return _embedded(figure, "confusion matrices")


def class_bars(values: dict[str, list[float | None]], classes: tuple[str, ...], title: str) -> str:
    """Percent of each class, a bar a row; none where a class has no figure.

    Args:
        values: of each class, by row.
        classes: names, of up to 30.
        title: what the figures are.
    """
    figure = _figure(9, 0.9 + 0.32 * len(classes))
    axis, height = figure.subplots(), 0.8 / len(values)
    place_K = np.arange(len(classes))
    for r, (row, percent) in enumerate(values.items()):
        axis.barh(place_K + (r - (len(values) - 1) / 2) * height, [p or 0 for p in percent], height, label=row)
    axis.set_yticks(place_K, [_short(c, 30) for c in classes], fontsize=8)
    axis.invert_yaxis()
    axis.set(title=title, xlim=(0, 100))
    axis.grid(alpha=0.3, axis="x")
    axis.legend()
    return _embedded(figure, title)


def names_fit(classes: tuple[str, ...]) -> bool:
    """Whether a picture has room for the classes' names."""
    return len(classes) <= _NAMED


def _short(text: str, most: int = 24) -> str:
    return (text if len(text) <= most else f"{text[: most - 2]}..").replace("$", r"\$")  # no formula
