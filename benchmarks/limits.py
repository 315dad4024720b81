"""What of the machine a stretch of a benchmark keeps busy, as far as it can be told cheaply, and so what may limit it.

CPU time is the kernel's (``/proc``), of the whole machine; the GPU's figures are NVML's (package nvidia-ml-py), asked for by a
thread. Whatever a machine does not tell is left out.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch

from fasttrain.gpu_use import opened_nvml

FULL = 0.9  # the share of its time from which on something counts as fully used
_TICKS = os.sysconf("SC_CLK_TCK")


class Watch:
    """``with watch: ...``, any number of times; :meth:`figures` are means over all of it.

    - ``cpu_cores``: cores that were busy, of the whole machine;
    - ``busiest_thread``: of this process, the share of the time that it computed: at 1, one thread is the limit;
    - ``gpu``, ``jpeg_engine``, ``video_engine``: shares of the time in which kernels ran, and these engines worked;
    - ``pcie_mb_per_s``: megabytes that came to the GPU over PCIe in a second, as NVML samples it.

    Args:
        device: the GPU whose figures are asked for; none on a CPU.
        every: seconds between two questions to NVML.
    """

    def __init__(self, device: torch.device, every: float = 0.1) -> None:
        self._every = every
        self._gauges = nvml_gauges(device) if device.type == "cuda" else {}
        self._seconds = self._cores = 0.0
        self._threads: list[tuple[float, float]] = []  # (seconds computed by the busiest thread, seconds)
        self._sampled: dict[str, list[float]] = {}

    def __enter__(self) -> "Watch":
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="limits", daemon=True) if self._gauges else None
        self._start = time.perf_counter(), _busy_seconds(), _thread_seconds()
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        began, busy, threads = self._start
        seconds = time.perf_counter() - began
        self._seconds += seconds
        self._cores += _busy_seconds() - busy
        now = _thread_seconds()
        self._threads.append((max((its - threads.get(i, 0.0) for i, its in now.items()), default=0.0), seconds))
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def figures(self) -> dict[str, float]:
        """See the class; empty before the first ``with``."""
        if not self._seconds:
            return {}
        out = {"cpu_cores": self._cores / self._seconds}
        out["busiest_thread"] = sum(busy for busy, _ in self._threads) / self._seconds
        return out | {name: mean(values) for name, values in self._sampled.items() if values}

    def _sample(self) -> None:
        while not self._ended.wait(self._every):
            for name, ask in list(self._gauges.items()):
                try:
                    self._sampled.setdefault(name, []).append(ask())
                except Exception:  # NVML's errors: this machine does not tell
                    del self._gauges[name]


def limit(figures: dict[str, float], cores: int) -> str:
    """What is fully used, in words; of several the first that would have to be more."""
    full = []
    if figures.get("cpu_cores", 0.0) >= FULL * cores:
        full.append(f"the CPU ({figures['cpu_cores']:.1f} of {cores} cores)")
    if figures.get("jpeg_engine", 0.0) >= FULL:
        full.append("the GPU's JPEG engine")
    if figures.get("busiest_thread", 0.0) >= FULL:
        full.append("one thread of this process")
    if figures.get("gpu", 0.0) >= FULL:
        full.append("the GPU (a kernel ran nearly always)")
    return ", ".join(full) or "nothing that is watched is fully used"


def nvml_gauges(device: torch.device) -> dict[str, Callable[[], float]]:
    """Questions to NVML by name; none where its package is not here, or it cannot be asked."""
    try:
        pynvml, handle = opened_nvml(device)
    except ValueError:
        return {}
    gauges: dict[str, Callable[[], float]] = {
        "gpu": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        "video_engine": lambda: pynvml.nvmlDeviceGetDecoderUtilization(handle)[0] / 100,
        "pcie_mb_per_s": lambda: pynvml.nvmlDeviceGetPcieThroughput(handle, pynvml.NVML_PCIE_UTIL_RX_BYTES) / 1e3,
    }
    if hasattr(pynvml, "nvmlDeviceGetJpgUtilization"):
        gauges["jpeg_engine"] = lambda: pynvml.nvmlDeviceGetJpgUtilization(handle)[0] / 100
    return gauges


def _busy_seconds() -> float:
    """Core-seconds in which the machine computed, since it was started."""
    with open("/proc/stat") as lines:
        user, nice, system, _, _, irq, softirq = map(int, next(lines).split()[1:8])
    return (user + nice + system + irq + softirq) / _TICKS


def _thread_seconds() -> dict[str, float]:
    """Seconds that each thread of this process has computed."""
    out = {}
    for path in Path("/proc/self/task").iterdir():
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        out[path.name] = (int(fields[11]) + int(fields[12])) / _TICKS
    return out
