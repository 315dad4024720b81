"""What is said of a run's curves: whether two losses are the same within noise, whether memory grows; and a picture of them.

Shape suffixes: T lines of a log, P points that are kept of them.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

POINTS = 200  # that are kept of a curve
WITHIN = 2.0  # distances of so many times the noise are no difference
_WINDOW = 20  # a curve is smoothed over this part of its lines
_BEGINS = 0.1  # share of a loss's lines that are not compared: the first descent
_SETTLES = 0.2  # share of the time in which memory may grow
_LEAST = 20  # lines below which nothing is said
_SLACK_GIB, _SLACK = 0.016, 0.01  # of memory that may come and go: GiB, and share


def smoothed(value_T: np.ndarray) -> np.ndarray:
    """Moving means over a twentieth of the lines, without the ends: [T - window + 1]."""
    window = max(len(value_T) // _WINDOW, 1)
    return np.convolve(value_T, np.full(window, 1 / window), mode="valid")


def distance(a_T: np.ndarray, b_T: np.ndarray) -> float:
    """Root of the mean squared difference of two smoothed curves after their first descent, over the lines that both have.

    Raises:
        ValueError: fewer than 20 lines.
    """
    lines = min(len(a_T), len(b_T))
    if lines < _LEAST:
        raise ValueError(f"{lines} lines are too few to compare curves; at least {_LEAST} are needed")
    first = int(_BEGINS * lines)
    return float(np.sqrt(np.mean((smoothed(a_T[first:lines]) - smoothed(b_T[first:lines])) ** 2)))


def spread(value_T: np.ndarray) -> float:
    """The distance that two curves like this one would have, were their lines independent: from the differences of successive
    lines (von Neumann et al. 1941), whose mean square is twice the variance whatever the trend."""
    after_T = value_T[int(_BEGINS * len(value_T)) :]
    variance = float(np.mean(np.diff(after_T) ** 2)) / 2
    return float(np.sqrt(2 * variance / max(len(after_T) // _WINDOW, 1)))


@dataclass(frozen=True)
class Compared:
    """Two losses: their distance, the noise it is held against, and what that is."""

    distance: float
    noise: float
    noise_is: str

    @property
    def within(self) -> bool:
        """Whether they are the same within noise."""
        return self.distance <= WITHIN * self.noise

    def about(self) -> dict[str, Any]:
        """For a JSON file."""
        ratio = self.distance / self.noise if self.noise else None
        return {"distance": self.distance, "noise": self.noise, "noise_is": self.noise_is, "ratio": ratio} | {
            "within": self.within
        }


def compare(a_T: np.ndarray, b_T: np.ndarray, seeds: tuple[np.ndarray, np.ndarray] | None) -> Compared:
    """Holds the distance of two losses of one seed against the noise.

    Args:
        a_T, b_T: their lines, at the same steps.
        seeds: lines of two runs that differ by their seed alone: the distance of these is the noise. None: the noise is what
            the lines' own spread leaves in smoothed curves, which knows nothing of what else differs between two runs.

    Raises:
        ValueError: too few lines.
    """
    found = distance(a_T, b_T)
    if seeds is not None:
        return Compared(found, distance(*seeds), "two seeds' distance")
    return Compared(found, max(spread(a_T), spread(b_T)), "the spread of a curve's own lines")


def growth(second_T: np.ndarray, gib_T: np.ndarray) -> dict[str, Any]:
    """Memory over the last 80 % of the time: its slope (the median of those of all pairs of points: Theil 1950, Sen 1968), what
    that adds up to, and whether that is flat, which is no more than 1 % and 16 MiB.

    Args:
        second_T: when it was looked at.
        gib_T: how much there was.

    Raises:
        ValueError: fewer than 20 lines.
    """
    if len(second_T) < _LEAST:
        raise ValueError(f"{len(second_T)} lines are too few for a slope; at least {_LEAST} are needed")
    late_T = second_T >= second_T[0] + _SETTLES * (second_T[-1] - second_T[0])
    second_P, gib_P = thinned(second_T[late_T]), thinned(gib_T[late_T])
    i, j = np.triu_indices(len(second_P), 1)
    slope = float(np.median((gib_P[j] - gib_P[i]) / (second_P[j] - second_P[i])))
    grown, middle = slope * float(second_P[-1] - second_P[0]), float(np.median(gib_P))
    flat = grown <= _SLACK * middle + _SLACK_GIB
    return {"gib": middle, "gib_per_hour": slope * 3600, "grown_gib": grown, "flat": bool(flat)}


def thinned(value_T: np.ndarray) -> np.ndarray:
    """At most 200 points: means of successive lines."""
    if len(value_T) <= POINTS:
        return np.asarray(value_T, dtype=float)
    return np.array([part.mean() for part in np.array_split(np.asarray(value_T, dtype=float), POINTS)])


def picture(runs: list[dict[str, Any]]) -> str:
    """An SVG of the runs: smoothed losses, memory and how busy the GPU was. The same runs give the same bytes.

    Args:
        runs: as ``fasttrain bench long-run`` writes them.
    """
    import matplotlib
    from matplotlib.figure import Figure

    fields = {"own_gib": "process", "gpu_gib": "GPU", "torch_gib": "PyTorch"}
    drawn = ["loss", "memory"] + ["GPU"] * any("gpu_percent" in run["use"] for run in runs)
    with matplotlib.rc_context({"svg.hashsalt": "fasttrain", "svg.fonttype": "none"}):
        figure = Figure(figsize=(4.4 * len(drawn), 3.4), layout="constrained")
        axes = dict(zip(drawn, figure.subplots(1, len(drawn), squeeze=False)[0], strict=True))
        for number, run in enumerate(runs):
            colour, use = f"C{number}", run["use"]
            axes["loss"].plot(run["loss"]["step"], run["loss"]["smoothed"], colour, lw=1.2, label=run["name"])
            minutes = np.array(use["seconds"]) / 60
            for (field, name), style in zip(fields.items(), ("-", "--", ":"), strict=True):
                if field in use:
                    axes["memory"].plot(minutes, use[field], colour, ls=style, lw=1.2, label=f"{run['name']}: {name}")
            if "gpu_percent" in use:
                axes["GPU"].plot(minutes, use["gpu_percent"], colour, lw=1.2, label=run["name"])
        axes["loss"].set(title="training loss, smoothed", xlabel="step")
        axes["memory"].set(title="memory, GiB", xlabel="minutes")
        axes["memory"].set_ylim(0, 1.15 * axes["memory"].dataLim.ymax)
        if "GPU" in axes:
            axes["GPU"].set(title="GPU busy, %", xlabel="minutes", ylim=(0, 105))
        for axis in axes.values():
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
