"""What ran when, as lanes: figures of it, and a picture of one step.

An event has a name, a lane, a start and a length. A lane's name begins with who runs in it (``target``, ``sources``, ``copies``,
``host`` or ``host waits``) and may go on after a comma, such as ``target, stream 7``. Times are microseconds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

WAITS = "host waits"
_COLOURS = {"target": "#3b6ea5", "sources": "#c9772b", "copies": "#6a9a4f", "host": "#888888", WAITS: "#c4c4c4"}
_DRAWN = 400  # places that a lane's picture has, and intervals that are kept of it
_LONGEST = 10
Interval = tuple[float, float]


@dataclass(frozen=True)
class Event:
    """Something that ran.

    Attributes:
        name: of the kernel, copy or operator.
        lane: where.
        start_us: on any clock that all events share.
        us: how long.
    """

    name: str
    lane: str
    start_us: float
    us: float


def who(lane: str) -> str:
    """The first word of a lane's name."""
    return lane.partition(",")[0]


def on_host(lane: str) -> bool:
    """Whether it is the host's."""
    return who(lane) in ("host", WAITS)


def merged(events: Iterable[Event], start_us: float, end_us: float, *, gap_us: float = 0.0) -> list[Interval]:
    """The times between start and end at which any of the events runs: ascending, apart by more than ``gap_us``."""
    out: list[Interval] = []
    spans = sorted((max(e.start_us, start_us), min(e.start_us + e.us, end_us)) for e in events)
    for a, b in spans:
        if a >= b:
            continue
        if out and a - out[-1][1] <= gap_us:
            out[-1] = (out[-1][0], max(out[-1][1], b))
        else:
            out.append((a, b))
    return out


def both(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """The times that lie in an interval of each; both are ascending, and each for itself without overlap."""
    out, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            out.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return out


def length(intervals: Iterable[Interval]) -> float:
    """Of all together, in microseconds."""
    return sum(b - a for a, b in intervals)


def reduced(events: Sequence[Event], starts_us: Sequence[float]) -> dict[str, Any]:
    """Figures of the steps that begin at these times, the last time being the end of the last step.

    Args:
        events: of one run. Where none is of a device, the host's count as the work.
        starts_us: ascending, 2 at least.

    Returns:
        ``step_ms`` (median) and ``steps_ms``; ``busy_percent``, in which any work runs; ``both_percent``, in which the target's
        and the sources' do; ``idle_percent``; ``lanes``, each with its share and how often something starts in a step;
        ``longest``, the ten names with the most time, a step; ``picture``, one step's intervals, merged where they are
        closer than ``resolution_us``.
    """
    assert len(starts_us) > 1 and list(starts_us) == sorted(starts_us)
    steps = list(pairwise(starts_us))
    start, end, count = starts_us[0], starts_us[-1], len(steps)
    lanes = sorted({e.lane for e in events}, key=_rank)
    on_device = any(not on_host(lane) for lane in lanes)
    work = [e for e in events if not on_host(e.lane) or (not on_device and who(e.lane) != WAITS)]
    counted = work if on_device else own_time(work)  # a stream's kernels may overlap, and call nothing
    inside = [e for e in counted if start <= e.start_us < end]

    def percent(intervals: Iterable[Interval]) -> float:
        return 100 * length(intervals) / (end - start)

    roles = {role: merged((e for e in work if _of(e.lane) == role), start, end) for role in ("target", "sources")}
    busy = merged(work, start, end)
    usual = sorted(steps, key=lambda s: s[1] - s[0])[count // 2]
    return {
        "step_ms": median(b - a for a, b in steps) / 1e3,
        "steps_ms": [(b - a) / 1e3 for a, b in steps],
        "busy_percent": percent(busy),
        "both_percent": percent(both(roles["target"], roles["sources"])),
        "idle_percent": 100 - percent(busy),
        "lanes": [
            {
                "name": lane,
                "percent": percent(merged((e for e in events if e.lane == lane), start, end)),
                "events_a_step": sum(e.lane == lane and start <= e.start_us < end for e in events) / count,
            }
            for lane in lanes
        ],
        "longest": _longest(inside, count),
        "picture": _picture(events, lanes, *usual),
    }


def own_time(events: Iterable[Event]) -> list[Event]:
    """Events whose lengths are without those that begin and end in them in the same lane: operators call others."""
    ordered = sorted(events, key=lambda e: (e.start_us, -e.us))
    own_us = [e.us for e in ordered]
    around: dict[str, list[int]] = {}  # of each lane, those that have not ended, the outermost first
    for at, event in enumerate(ordered):
        its = around.setdefault(event.lane, [])
        while its and ordered[its[-1]].start_us + ordered[its[-1]].us < event.start_us + event.us:
            its.pop()
        if its:
            own_us[its[-1]] -= event.us
        its.append(at)
    return [replace(e, us=us) for e, us in zip(ordered, own_us, strict=True)]


def draw(content: dict[str, Any], path: Path, title: str) -> None:
    """Writes the picture of a step as SVG: the same bytes for the same content.

    Args:
        content: from :func:`reduced`.
        path: of the file.
        title: above it.
    """
    import matplotlib  # slow to import
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    picture = content["picture"]
    lanes = picture["lanes"]
    corners = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
    with matplotlib.rc_context({"svg.hashsalt": "fasttrain", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9, 1.1 + 0.42 * len(lanes)), layout="constrained")
        axis = figure.subplots()
        for row, lane in enumerate(lanes):
            low, high = row - 0.36, row + 0.36
            boxes = [[(a, low), (b, low), (b, high), (a, high), (a, low)] for a, b in lane["intervals_us"]]
            if boxes:
                outline = Outline(np.array(boxes).reshape(-1, 2) / [1e3, 1], corners * len(boxes))
                axis.add_patch(PathPatch(outline, facecolor=_COLOURS.get(_of(lane["name"]), "#888888"), linewidth=0))
        axis.set_yticks(range(len(lanes)), [lane["name"] for lane in lanes])
        axis.set_ylim(len(lanes) - 0.4, -0.6)
        axis.set_xlim(0, picture["step_us"] / 1e3)
        axis.set_xlabel("ms")
        axis.set_title(title, loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _of(lane: str) -> str:
    """Who runs in a lane; on the host, for whom."""
    first, _, rest = lane.partition(",")
    return rest.strip() if first == "host" and rest.strip() in _COLOURS else first


def _rank(lane: str) -> tuple[int, str]:
    return list(_COLOURS).index(who(lane)) if who(lane) in _COLOURS else len(_COLOURS), lane


def _longest(events: list[Event], steps: int) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], list[float]] = {}
    for event in events:
        found.setdefault((event.name, event.lane), []).append(event.us)
    first = sorted(found.items(), key=lambda item: (-sum(item[1]), item[0]))[:_LONGEST]
    return [
        {"name": name[:200], "lane": lane, "count": len(each) / steps, "ms": sum(each) / steps / 1e3}
        for (name, lane), each in first
    ]


def _picture(events: Sequence[Event], lanes: list[str], start: float, end: float) -> dict[str, Any]:
    gap = (end - start) / _DRAWN / 2  # an interval and the gap after it are then a place at least, but for the shortest
    out = []
    for lane in lanes:
        found = merged((e for e in events if e.lane == lane), start, end, gap_us=gap)
        out.append({"name": lane, "intervals_us": [[round(a - start, 1), round(b - start, 1)] for a, b in found]})
    return {"step_us": round(end - start, 1), "resolution_us": round(gap, 3), "lanes": out}
