"""On a CUDA device: what a training uses of it is in its log, its summary and its page.

What is tested takes the device as an argument, and so can be tried on a CPU.
"""

import json
from pathlib import Path

import pytest
import torch

from fasttrain.compare import run
from fasttrain.gpu_use import Use
from fasttrain.log import read_lines

pytestmark = pytest.mark.gpu
OF_GPU = {"gpu_percent", "gpu_gib"}
OF_TORCH = {"torch_gib", "torch_peak_gib"}


def trained(recipe, device: str) -> tuple[dict, set[str], str]:
    """A training's summary, the names in its lines of steps together, and its page."""
    run(recipe, lambda label, line: None)
    folder = Path(recipe.run.dir) / recipe.name
    names = {name for line in read_lines(folder, "step") for name in line}
    summary = json.loads((folder / "summary.json").read_text())
    assert names >= {"own_gib", "rss_gib"}
    assert names.issuperset(OF_TORCH) == (device == "cuda")
    for its in summary["use"].values():
        assert 0 <= its["mean"] <= its["peak"]
    return summary, names, (folder / "report.html").read_text()


def busy_samples(device: str, seconds: float) -> tuple[dict[str, float], list[str]]:
    """Means of what was sampled while the device multiplied matrices, and what was reported."""
    import time

    told: list[str] = []
    use = Use(torch.device(device), told.append, every=0.1)
    a, end = torch.randn(2048 if device == "cuda" else 64, 2048, device=device), time.monotonic() + seconds
    while time.monotonic() < end:
        a @ a.T
        if device == "cuda":
            torch.cuda.synchronize()
    found = use.lately()
    use.close()
    return found, told


def test_a_training_tells_what_it_uses(smoke):
    recipe = smoke("--run.device", "cuda", "--run.compile", "false", "--run.log_every", "1", "--optim.epochs", "2")
    summary, _, page = trained(recipe, "cuda")
    assert summary["use"].keys() >= OF_GPU | OF_TORCH | {"own_gib"}
    assert summary["use"]["torch_peak_gib"]["peak"] <= summary["use"]["gpu_gib"]["peak"] + 0.01
    assert "Use of the machine" in page and 'alt="use of the machine"' in page


def test_a_busy_gpu_is_seen_to_be_busy():
    found, told = busy_samples("cuda", 3.0)
    assert told == [] and found["gpu_percent"] > 50 and found["gpu_gib"] > 0.1
    assert found["gpu_watts"] > 10 and found["gpu_mhz"] > 100


def test_samples_wait_for_nothing_that_the_gpu_computes():
    """PyTorch raises where the host would wait for the device."""
    use = Use(torch.device("cuda"), print, every=0.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [use.lately() for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        use.close()
    assert all(line["torch_peak_gib"] >= line["torch_gib"] for line in found)
