"""What a training uses of its machine: samples, their means, and where they are told. NVML is a stand-in here."""

import io
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console

from fasttrain import gpu_use
from fasttrain.gpu_use import Use, in_short, nvml_gauge, process_memory
from fasttrain.log import RunLog, read_lines
from fasttrain.show import Watch

CPU = torch.device("cpu")


def until(holds) -> None:
    latest = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < latest
        time.sleep(0.002)


class Gauge:
    """Gives 1, 2, 3, .. percent; ``allowed`` of them, then waits to be ended."""

    def __init__(self, allowed: int) -> None:
        self.allowed, self.count, self.gone = allowed, 0, threading.Event()

    def __call__(self) -> dict[str, float]:
        if self.count == self.allowed:
            self.gone.set()
            return {}
        self.count += 1
        return {"gpu_percent": float(self.count)}


def test_means_are_of_what_came_since_the_last_line_and_peaks_of_all():
    gauge = Gauge(4)
    use = Use(CPU, print, gauge=gauge, every=0.001)
    until(gauge.gone.is_set)
    assert use.lately()["gpu_percent"] == 2.5
    gauge.allowed = 6
    gauge.gone.clear()
    until(gauge.gone.is_set)
    assert use.lately()["gpu_percent"] == 5.5
    assert "gpu_percent" not in use.lately()  # no sample since
    assert use.whole()["gpu_percent"] == {"mean": 3.5, "peak": 6.0}
    use.close()


def test_without_a_gpu_there_is_no_thread_and_memory_is_told():
    before = threading.active_count()
    use = Use(CPU, print)
    assert threading.active_count() == before
    found = use.lately()
    assert found.keys() == {"rss_gib", "own_gib"} and 0 < found["own_gib"] <= found["rss_gib"]
    use.close()


def test_own_memory_grows_with_what_the_process_keeps_and_not_with_files_it_maps(tmp_path):
    import numpy as np

    size = 64 * 2**20
    (tmp_path / "file").write_bytes(bytes(size))
    before = process_memory()
    mapped = np.memmap(tmp_path / "file", dtype=np.uint8, mode="r")
    assert mapped.sum() == 0  # all of its pages are touched
    after = process_memory()
    assert after["rss_gib"] - before["rss_gib"] > 0.06 and after["own_gib"] - before["own_gib"] < 0.01
    kept = np.ones(size, dtype=np.uint8)
    assert process_memory()["own_gib"] - after["own_gib"] > 0.06 and len(kept) == size


def test_the_thread_ends_when_asked_and_waits_for_no_sample():
    use = Use(CPU, print, gauge=lambda: {"gpu_percent": 1.0}, every=1000)
    begin = time.monotonic()
    use.close()
    assert time.monotonic() - begin < 5 and not any(t.name == "GPU use" for t in threading.enumerate())


def test_a_gauge_that_fails_later_is_told_once():
    told: list[str] = []
    gone = threading.Event()

    def gauge():
        gone.set()
        raise ValueError("NVML says: the GPU is lost")

    use = Use(CPU, told.append, gauge=gauge, every=0.001)
    assert gone.wait(5)
    use._thread.join()
    use.lately()
    use.lately()
    use.close()
    assert told == ["NO FIGURES OF THE GPU'S USE: NVML says: the GPU is lost"]


@pytest.fixture
def nvml(monkeypatch):
    """A stand-in for NVML, whose GPU has no power meter."""
    module = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def unknown(handle):
        raise NVMLError("Not Supported")

    module.NVMLError, module.NVML_CLOCK_SM = NVMLError, 1
    module.nvmlInit = lambda: None
    module.asked = []
    module.nvmlDeviceGetHandleByUUID = lambda uuid: module.asked.append(uuid) or "handle"
    module.nvmlDeviceGetUtilizationRates = lambda handle: SimpleNamespace(gpu=97, memory=3)
    module.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(used=3 * 2**30)
    module.nvmlDeviceGetPowerUsage = unknown
    module.nvmlDeviceGetClockInfo = lambda handle, kind: {1: 1980}[kind]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    about = SimpleNamespace(uuid="f00d")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    return module


def test_nvml_is_asked_for_this_gpu_and_what_it_does_not_tell_is_left_out(nvml):
    gauge = nvml_gauge(torch.device("cuda"))
    wanted = {"gpu_percent": 97.0, "gpu_gib": 3.0, "gpu_mhz": 1980.0}
    assert gauge() == wanted and gauge() == wanted
    assert nvml.asked == ["GPU-f00d"]


def test_nvml_that_tells_nothing_any_more_is_told(nvml):
    gauge = nvml_gauge(torch.device("cuda"))
    for name in ("UtilizationRates", "MemoryInfo", "ClockInfo"):
        setattr(nvml, f"nvmlDeviceGet{name}", lambda *_: nvml.nvmlDeviceGetPowerUsage(None))
    with pytest.raises(ValueError, match="NVML says: Not Supported"):
        gauge()


@pytest.mark.parametrize("missing", ["package", "driver"])
def test_what_is_missing_is_told_once(missing, nvml, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(gpu_use, "torch_memory", lambda device: {"torch_gib": 1.0})
    if missing == "package":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    else:
        monkeypatch.setattr(nvml, "nvmlInit", lambda: nvml.nvmlDeviceGetPowerUsage(None))
    use = Use(torch.device("cuda"), told.append)
    assert use.lately()["torch_gib"] == 1.0 and "gpu_percent" not in use.lately()
    use.close()
    why = (
        "the package nvidia-ml-py is not here (pip install nvidia-ml-py)"
        if missing == "package"
        else "NVML says: Not Supported"
    )
    assert told == [f"NO FIGURES OF THE GPU'S USE: {why}"]


def test_lines_of_steps_have_it_and_others_do_not(tmp_path):
    told: list[dict] = []
    log = RunLog(tmp_path, told.append, tensorboard=False, device=CPU)
    log.write({"kind": "step", "step": 1, "loss": 1.0})
    log.write({"kind": "eval", "step": 1, "loss": 1.0})
    use = log.use()
    log.close()
    (step,), (evaluation,) = read_lines(tmp_path, "step"), read_lines(tmp_path, "eval")
    assert {"rss_gib", "own_gib"} < step.keys() and evaluation.keys() == {"kind", "step", "loss"}
    assert told[0] == step and use["own_gib"]["peak"] >= step["own_gib"]


def test_processes_that_write_no_log_tell_nothing():
    log = RunLog(None, print, tensorboard=False, device=CPU)
    assert log.use() == {}
    log.close()


def test_the_terminal_has_it_in_short(smoke):
    assert in_short({"gpu_percent": 93.4, "gpu_gib": 41.26}) == "GPU 93 %, 41.3 GiB"
    assert in_short({"own_gib": 1.0}) == ""
    said = io.StringIO()
    line = {"kind": "step", "epoch": 0, "epochs": 1, "step": 5, "steps": 9, "images_per_s": 10.0, "gpu_percent": 93.0}
    with Watch(smoke(), Console(file=said, width=200), 1) as watch:
        watch("run", line)
    assert "10 images/s, waits 0 % for data, 0 % for sources, GPU 93 %" in said.getvalue()
