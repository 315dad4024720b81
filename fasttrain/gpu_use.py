"""What a training uses of its machine: how busy the GPU is, its memory, power and clock, and the memory of the process.

The GPU's figures are NVML's (package nvidia-ml-py): a thread asks for them once a second, and neither it nor the driver waits
for what the GPU computes. They are of the whole GPU, whoever uses it. Without a GPU there is no thread.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Gauge = Callable[[], dict[str, float]]
_STATM = Path("/proc/self/statm")
_GIB = 2**30


class Use:
    """Gathers samples, and gives means of those since the last time.

    Figures, each absent where the machine does not tell it:

    - ``gpu_percent``: share of the time in which a kernel ran, as NVML counts it: a busy GPU need not be a fast one;
    - ``gpu_gib``: memory in use on the GPU; ``gpu_watts``; ``gpu_mhz``: clock of its multiprocessors;
    - ``torch_gib``, ``torch_peak_gib``: memory of PyTorch's tensors now, and the most since the process began;
    - ``rss_gib``: resident memory of this process, with the pages of files that it has mapped; ``own_gib``: without these and
      without shared memory, which is what grows where something leaks.

    Args:
        device: where the training computes.
        report: takes a line on what cannot be told, once.
        gauge: what is asked for the GPU's figures; None: NVML where ``device`` is a GPU, else nothing.
        every: seconds between two samples.
    """

    def __init__(
        self, device: torch.device, report: Callable[[str], None], *, gauge: Gauge | None = None, every: float = 1.0
    ) -> None:
        self._device, self._report, self._every = device, report, every
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._lately: dict[str, list[float]] = {}
        self._all: dict[str, _Sum] = {}
        self._wrong = ""
        self._gauge = gauge
        if gauge is None and device.type == "cuda":
            try:
                self._gauge = nvml_gauge(device)
            except ValueError as error:
                self._wrong = str(error)
        self._thread: threading.Thread | None = None
        if self._gauge is not None:
            self._thread = threading.Thread(target=self._watch, name="GPU use", daemon=True)
            self._thread.start()

    def lately(self) -> dict[str, float]:
        """Means of what was sampled since the last call, and the memory as it is now."""
        with self._lock:
            samples, self._lately = self._lately, {}
            wrong, self._wrong = self._wrong, ""
        if wrong:
            self._report(f"NO FIGURES OF THE GPU'S USE: {wrong}")
        now = process_memory() | torch_memory(self._device)
        with self._lock:
            for name, value in now.items():
                self._all.setdefault(name, _Sum()).add(value)
        return {name: sum(values) / len(values) for name, values in samples.items()} | now

    def whole(self) -> dict[str, dict[str, float]]:
        """Mean and peak of each figure since the beginning, of this process: what a run that went on used before is not in it."""
        self.lately()
        with self._lock:
            return {name: {"mean": its.mean, "peak": its.peak} for name, its in self._all.items()}

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        assert self._gauge is not None
        while True:
            try:
                found = self._gauge()
            except ValueError as error:
                with self._lock:
                    self._wrong = str(error)
                return
            with self._lock:
                for name, value in found.items():
                    self._lately.setdefault(name, []).append(value)
                    self._all.setdefault(name, _Sum()).add(value)
            if self._ended.wait(self._every):
                return


class _Sum:
    """Mean and peak of values, none of which is kept."""

    def __init__(self) -> None:
        self.total, self.count, self.peak = 0.0, 0, 0.0

    def add(self, value: float) -> None:
        self.total, self.count, self.peak = self.total + value, self.count + 1, max(self.peak, value)

    @property
    def mean(self) -> float:
        return self.total / self.count


def opened_nvml(device: torch.device) -> tuple[Any, Any]:
    """The module ``pynvml``, and NVML's handle of a GPU.

    Raises:
        ValueError: why it cannot be asked.
    """
    try:
        import pynvml
    except ImportError:
        raise ValueError("the package nvidia-ml-py is not here (pip install nvidia-ml-py)") from None
    try:
        pynvml.nvmlInit()
        # the order of GPUs is not NVML's where CUDA_VISIBLE_DEVICES names some of them
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except pynvml.NVMLError as error:
        raise ValueError(f"NVML says: {error}") from None
    return pynvml, handle


def nvml_gauge(device: torch.device) -> Gauge:
    """Asks NVML for a GPU's figures; those that it does not tell here (some of a part of a GPU) are left out.

    Raises:
        ValueError: why there are none. The gauge raises it, too, where NVML fails later.
    """
    pynvml, handle = opened_nvml(device)
    asked: dict[str, Gauge] = {
        "utilisation": lambda: {"gpu_percent": float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)},
        "memory": lambda: {"gpu_gib": pynvml.nvmlDeviceGetMemoryInfo(handle).used / _GIB},
        "power": lambda: {"gpu_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3},
        "clock": lambda: {"gpu_mhz": float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))},
    }

    def gauge() -> dict[str, float]:
        out: dict[str, float] = {}
        for name, ask in list(asked.items()):
            try:
                out |= ask()
            except pynvml.NVMLError as error:
                del asked[name]
                if not asked:
                    raise ValueError(f"NVML says: {error}") from None
        return out

    return gauge


def process_memory() -> dict[str, float]:
    """``rss_gib`` and ``own_gib`` of this process; nothing where there is no Linux to tell them."""
    try:
        resident, shared = map(int, _STATM.read_text().split()[1:3])
    except OSError:
        return {}
    page = os.sysconf("SC_PAGE_SIZE") / _GIB
    return {"rss_gib": resident * page, "own_gib": (resident - shared) * page}


def torch_memory(device: torch.device) -> dict[str, float]:
    """``torch_gib`` and ``torch_peak_gib`` of PyTorch's allocator on a GPU; the host waits for nothing."""
    if device.type != "cuda":
        return {}
    now, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return {"torch_gib": now / _GIB, "torch_peak_gib": peak / _GIB}


def in_short(line: dict[str, float]) -> str:
    """A few words of a line's figures for the terminal; nothing where it has none of the GPU's."""
    if "gpu_percent" not in line:
        return ""
    return f"GPU {line['gpu_percent']:.0f} %" + (f", {line['gpu_gib']:.1f} GiB" if "gpu_gib" in line else "")
