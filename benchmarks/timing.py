"""How things are timed: side by side in one process, in turn, several times over, medians.

On a GPU between CUDA events, after a warm-up, on fresh random data that does not fit into its cache; on a CPU by the clock.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

Step = Callable[[int], Any]


@dataclass
class Case:
    """Something to be timed.

    Attributes:
        step: does it once, on the data set of that number.
        repeats: milliseconds of one step, one for each round.
        launches: kernels and copies that a step starts on the GPU.
        busy_ms: of a step, the durations of these kernels and copies added up, without what lies between them.
        peak_bytes: GPU memory that a step needs above what was there.
    """

    step: Step
    repeats: list[float] = field(default_factory=list)
    launches: int | None = None
    busy_ms: float | None = None
    peak_bytes: int | None = None

    @property
    def ms(self) -> float:
        return median(self.repeats)


def side_by_side(
    steps: Mapping[str, Step], device: torch.device, *, sets: int, rounds: int = 7, budget_s: float = 20.0
) -> dict[str, Case]:
    """Times the steps in turn.

    Args:
        steps: by name.
        device: ``cuda`` or ``cpu``.
        sets: how many data sets there are; successive steps take them in turn.
        rounds: how often each is timed. A round is as many steps as take about 10 ms, on a CPU 1 at least.
        budget_s: rounds are fewer (3 at least) where they would take longer altogether.
    """
    cases = {name: Case(step) for name, step in steps.items()}
    inner = {}
    for name, case in cases.items():
        for i in range(3):
            case.step(i % sets)
        took = _timed(case.step, device, 3, sets)
        inner[name] = max(1, min(200, math.ceil(10 / took)))
        if device.type == "cuda":
            case.launches, case.busy_ms = _on_gpu(case.step, sets)
            case.peak_bytes = _peak(case.step, device)
    once = sum(_timed(c.step, device, 1, sets) * inner[n] for n, c in cases.items()) / 1e3
    for _ in range(max(3, min(rounds, int(budget_s / once)))):
        for name, case in cases.items():
            case.repeats.append(_timed(case.step, device, inner[name], sets))
    return cases


def copy_bandwidth(device: torch.device, mib: int = 512) -> float:
    """Bytes a second, read and written, of copying a tensor of so many MiB of random floats: what memory gives at best."""
    sets = [torch.randn(mib * 2**18, device=device) for _ in range(2)]
    out = torch.empty_like(sets[0])
    case = side_by_side({"copy": lambda i: out.copy_(sets[i])}, device, sets=2)["copy"]
    return 2 * out.numel() * 4 / (case.ms / 1e3)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product: what arithmetic gives at best."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    case = side_by_side({"product": lambda i: a @ b}, device, sets=1)["product"]
    return 2 * side**3 / (case.ms / 1e3)


def cache_bytes(device: torch.device) -> int:
    """The last cache's size; 64 MiB is taken for a CPU's."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 64 * 2**20


def _timed(step: Step, device: torch.device, count: int, sets: int) -> float:
    """Milliseconds of one step."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for i in range(count):
            step(i % sets)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / count
    begin = time.perf_counter()
    for i in range(count):
        step(i % sets)
    return (time.perf_counter() - begin) / count * 1e3


def recorded(step: Step, sets: int) -> Step:
    """A step's launches on all data sets as one CUDA graph; whatever number it is given, all of them run."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(sets):
            step(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(sets):
            step(i)
    return lambda i: graph.replay()


def _on_gpu(step: Step, sets: int) -> tuple[int, float]:
    """How many kernels and copies a step starts, and how many milliseconds they take in sum, as the profiler sees it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for i in range(sets):
            step(i)
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return round(len(events) / sets), sum(e.time_range.elapsed_us() for e in events) / 1e3 / sets


def _peak(step: Step, device: torch.device) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before
