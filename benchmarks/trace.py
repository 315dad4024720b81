"""Suite ``trace``: what runs when in a training step, as figures and as a picture of one step.

    fasttrain bench trace [options of `fasttrain bench step`] [--row live] [--steps 5] [--change FIELD=VALUE]
                          [--picture FILE.svg] [--json FILE]

  --row      live, recalled, heads alone, scratch or synthetic, as `fasttrain bench step -h` explains them
  --steps    that are looked at, after as many as it takes until all is compiled and known
  --change   a field of the recipe, such as transfer.bank=graphed; may be given several times
  --picture  one step, drawn: a lane for each CUDA stream and the host's

A lane of a GPU is a stream with what the target or the sources have started there, or the copies from and to the host: which of
these it is follows from the call on the host that started a kernel. A step begins with the first kernel of the target's that is
started in it, so that the sources' kernels in it are mostly the next batch's. The host's lane has operators and calls of CUDA,
and another one the calls that wait. Without a GPU there are only the host's lanes: operators of the sources and of all else.

``busy`` is the share of the time in which any kernel runs, ``both`` that in which one of the target's and one of the sources'
do. Looking slows the host down: ``ms unwatched`` is a step of the same process just before.
"""

import argparse
import json
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from fasttrain.device import choose_device, choose_dtype

from . import step_options
from .lanes import WAITS, Event, Interval, draw, reduced
from .step_rows import Ours, opened

ROWS = ("live", "recalled", "heads alone", "scratch", "synthetic")
_STEP, _SOURCES = "fasttrain step", "fasttrain sources"  # what steps and sources' starts are called in a trace
_SETTLING = 2  # watched steps that do not count: the first are slowed by the profiler's own start
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cuGraphLaunch", "cudaMemcpy", "cudaMemset")


def run(arguments: list[str]) -> dict[str, Any]:
    """Runs and watches; prints figures, draws where asked, and returns them with the drawn intervals.

    Raises:
        ValueError: arguments that make no sense, or no data.
    """
    given = _parsed(arguments)
    changes = dict(change.partition("=")[::2] for change in given.change)
    device = choose_device("auto")
    packed = step_options.packed(given.data, clips=given.frames > 0)
    options: dict[str, Any] = {k: v for k, v in vars(given).items() if k not in ("data", "change", "picture", "steps")}
    options["changes"] = changes
    with step_options.prepared(options, packed, "bench trace") as asked:
        row = opened(given.row, asked)
        try:
            unwatched_ms, trace = _watched(row, given.steps, device)
        finally:
            row.close()
    content: dict[str, Any] = options | {"device": str(device), "unwatched_ms": unwatched_ms, "not_run": {}}
    content["dtype"] = str(choose_dtype("auto", device)[0]).removeprefix("torch.")
    events, starts_us, launches = events_of(trace, given.steps)
    content |= reduced(events, starts_us) | {"launches_a_step": launches}
    _print(content)
    if given.picture is not None:
        draw(content, given.picture, _title(content))
    return content


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = step_options.parser("trace", [name for name in step_options.EVERY if name != "repeats"])
    parser.add_argument("--row", choices=ROWS, default="live")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--change", action="append", default=[])
    parser.add_argument("--picture", type=Path)
    given = step_options.parsed(parser, arguments)
    if given.steps < 1:
        raise ValueError(f"bench trace: --steps is {given.steps}; it is 1 at least")
    if given.picture is not None and given.picture.suffix != ".svg":
        raise ValueError(f"bench trace: --picture {given.picture} is no .svg file")
    return given


def events_of(trace: list[dict[str, Any]], steps: int) -> tuple[list[Event], list[float], float]:
    """A trace of :mod:`torch.profiler` as events in lanes.

    Args:
        trace: ``traceEvents`` of its JSON, in which the last ``steps + 1`` steps are marked.
        steps: that count.

    Returns:
        The events; when each step begins, and the last one ends, in microseconds; the host's calls a step that start something
        on the GPU.
    """
    timed = [e for e in trace if e.get("ph") == "X" and "dur" in e]
    marks = sorted(
        (e["ts"], e["ts"] + e["dur"]) for e in timed if e.get("cat") == "user_annotation" and e["name"] == _STEP
    )
    marks = marks[-steps - 1 :]
    assert len(marks) == steps + 1
    begins = [a for a, _ in marks]
    for_sources = _inside([e for e in timed if e.get("cat") == "user_annotation" and e["name"] == _SOURCES])
    calls = [e for e in timed if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    caller = {e["args"]["correlation"]: e for e in calls if "correlation" in e.get("args", {})}
    ran = [e for e in timed if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    calls_of = [caller.get(e["args"].get("correlation")) for e in ran]
    roles = _roles(ran, calls_of, for_sources)
    events = [
        Event(e["name"], f"{role}, stream {e['args'].get('stream')}", e["ts"], e["dur"])
        for e, role in zip(ran, roles, strict=True)
    ]
    first: dict[str, dict[int, float]] = {}  # of each of the target's streams, when each step begins
    for event, role, call in zip(events, roles, calls_of, strict=True):
        if role == "target" and call is not None:
            step, its = bisect_right(begins, call["ts"]) - 1, first.setdefault(event.lane, {})
            its[step] = min(event.start_us, its.get(step, event.start_us))
    starts = begins
    if first:
        busiest = first[max(first, key=lambda lane: sum(e.us for e in events if e.lane == lane))]
        if all(step in busiest for step in range(steps + 1)):
            starts = [busiest[step] for step in range(steps + 1)]
    for e in timed:
        if e.get("cat") in ("cpu_op", "cuda_runtime", "cuda_driver"):
            lane = WAITS if "Synchronize" in e["name"] else "host"
            events.append(Event(e["name"], lane if ran else f"host, {_whose(e, for_sources)}", e["ts"], e["dur"]))
    launches = {
        e["args"].get("correlation")
        for e in calls
        if begins[0] <= e["ts"] < begins[-1] and e["name"].startswith(_LAUNCHES)
    }
    return events, starts, len(launches) / steps


def _roles(
    ran: list[dict[str, Any]],
    calls: list[dict[str, Any] | None],
    for_sources: Callable[[dict[str, Any]], bool],
) -> list[str]:
    """Whose each kernel or copy is: by the call that started it; where that is not known, as most of its stream."""
    known = ["" if c is None else "sources" if for_sources(c) else "target" for c in calls]
    votes: dict[Any, Counter[str]] = {}
    for e, role in zip(ran, known, strict=True):
        votes.setdefault(e["args"].get("stream"), Counter())[role] += 1
    out = []
    for e, role in zip(ran, known, strict=True):
        its = votes[e["args"].get("stream")]
        role = role or ("sources" if its["sources"] > its["target"] else "target")
        out.append("copies" if e["cat"] == "gpu_memcpy" and "DtoD" not in e["name"] else role)
    return out


def _whose(event: dict[str, Any], for_sources: Callable[[dict[str, Any]], bool]) -> str:
    return "sources" if for_sources(event) else "target"


def _inside(spans: list[dict[str, Any]]) -> Callable[[dict[str, Any]], bool]:
    """Whether something begins in one of the spans of its own thread."""
    by_thread: dict[Any, list[Interval]] = {}
    for span in spans:
        by_thread.setdefault(span["tid"], []).append((span["ts"], span["ts"] + span["dur"]))
    for its in by_thread.values():
        its.sort()

    def check(event: dict[str, Any]) -> bool:
        its = by_thread.get(event["tid"], [])
        at = bisect_right(its, (event["ts"], float("inf"))) - 1
        return at >= 0 and event["ts"] < its[at][1]

    return check


def _watched(row: Ours, steps: int, device: torch.device) -> tuple[float, list[dict[str, Any]]]:
    """Milliseconds of a step that nobody watches, and the trace of some that are watched."""
    _name_sources(row)

    def take() -> float:
        begin = time.perf_counter()
        with record_function(_STEP):
            row.steps(1)
        return time.perf_counter() - begin

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    row.steps(row.first)
    settle()
    begin = time.perf_counter()
    for _ in range(steps):
        take()
    settle()
    unwatched_ms = (time.perf_counter() - begin) / steps * 1e3
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=kinds, acc_events=True) as profiler:
        for _ in range(_SETTLING + steps + 1):
            take()
        settle()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return unwatched_ms, json.loads(path.read_text())["traceEvents"]


def _name_sources(row: Ours) -> None:
    """What the host does to start the sources has a name in the trace."""
    sources = row.trainer.sources
    if sources is None:
        return
    start = sources.start

    def named(batch):
        with record_function(_SOURCES):
            take = start(batch)

        def taken():
            with record_function(_SOURCES):
                return take()

        return taken

    sources.start = named  # type: ignore[method-assign]


def _title(content: dict[str, Any]) -> str:
    of = ", ".join(name.rpartition(":")[2] for name in content["models"])
    sources = "" if content["row"] == "scratch" else f" ({of} at {content['source_size']} px)"
    return (
        f"{content['target']} at {content['size']} px, {content['row']}{sources}, batch {content['batch']}, "
        f"{content['dtype']}, {content['device']}: {content['step_ms']:.2f} ms"
    )


def _print(content: dict[str, Any]) -> None:
    table = Table(title=_title(content), title_justify="left", box=SIMPLE_HEAD)
    for heading in ("lane", "of the time", "events a step"):
        table.add_column(heading, justify="left" if heading == "lane" else "right")
    for lane in content["lanes"]:
        table.add_row(lane["name"], f"{lane['percent']:.1f} %", f"{lane['events_a_step']:.0f}")
    longest = Table(box=SIMPLE_HEAD)
    for heading in ("longest", "lane", "a step", "ms a step"):
        longest.add_column(heading, justify="left" if heading in ("longest", "lane") else "right")
    for one in content["longest"]:
        longest.add_row(one["name"][:60], one["lane"], f"{one['count']:.0f}", f"{one['ms']:.3f}")
    console = Console()
    console.print(table, longest)
    shares = ", ".join(f"{name} {content[f'{name}_percent']:.1f} %" for name in ("busy", "both", "idle"))
    unwatched, launches = content["unwatched_ms"], content["launches_a_step"]
    console.print(f"{shares}; {launches:.0f} launches a step; {unwatched:.2f} ms unwatched", highlight=False)
