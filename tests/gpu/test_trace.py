"""On a CUDA device: target and sources are seen in streams of their own, and kernels of a CUDA graph are seen at all."""

import json

import pytest
import torch
from fasttrain.benchmarks import trace

from ..benchmarks.test_step_bench import few_photographs

pytestmark = pytest.mark.gpu
TINY = ["--size", "32", "--models", "test_resnet,test_resnet", "--source-size", "64", "--batch", "16", "--images", "32"]


def traced(folder, monkeypatch, *options: str) -> dict:
    """What the suite finds of small networks."""
    monkeypatch.setenv("HOME", str(folder))
    few_photographs(folder / "photographs")
    picture = folder / "step.svg"
    given = [*TINY, "--data", str(folder / "photographs"), "--steps", "3", "--picture", str(picture), *options]
    content = trace.run(given)
    assert picture.stat().st_size < 300_000 and len(json.dumps(content)) < 200_000
    assert 0 < content["busy_percent"] <= 100 and len(content["steps_ms"]) == 3
    return content


def lanes_hold(content: dict, device: torch.device, roles: set[str]) -> None:
    """Lanes of these roles, each with something in every step."""
    lanes = {lane["name"]: lane["events_a_step"] for lane in content["lanes"]}
    if device.type == "cpu":
        assert set(lanes) == {f"host, {role}" for role in roles}
        return
    streams = {role: {name.partition(", ")[2] for name in lanes if name.startswith(role)} for role in roles}
    assert all(streams.values()) and "host" in lanes
    if len(roles) == 2:
        assert not streams["target"] & streams["sources"]
    assert content["launches_a_step"] > 0
    assert all(not one["lane"].startswith("host") for one in content["longest"])


@pytest.mark.parametrize("bank", ["folded", "graphed"])
def test_live_sources_have_a_stream_of_their_own(tmp_path, monkeypatch, bank):
    content = traced(tmp_path, monkeypatch, "--compile", "false", "--change", f"transfer.bank={bank}")
    lanes_hold(content, torch.device("cuda"), {"target", "sources"})


@pytest.mark.parametrize("compiled", ["graphs", "step"])
def test_a_step_of_graphs_has_its_kernels(tmp_path, monkeypatch, compiled):
    content = traced(tmp_path, monkeypatch, "--compile", compiled, "--row", "scratch")
    lanes_hold(content, torch.device("cuda"), {"target"})
    kernels = sum(lane["events_a_step"] for lane in content["lanes"] if lane["name"].startswith("target"))
    assert kernels > 2 * content["launches_a_step"]
