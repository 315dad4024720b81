"""Clips on a CUDA device: the loader's bytes, the network's input, and whole training steps."""

import itertools

import numpy as np
import pytest
import torch
from fasttrain.kernels import network_input
from fasttrain.loaders import ClipPlan, LoaderSpec, ViewPlan, open_dataset, open_loader

from fasttrain.build import build
from fasttrain.compare import jobs_of
from fasttrain.log import read_lines
from fasttrain.recipe import load
from fasttrain.trainer import Trainer

pytestmark = pytest.mark.gpu
SOURCES = "[{name: a, model: test_resnet, weights: random, size: 64}]"


def test_the_loader_serves_the_same_bytes():
    dataset = open_dataset("motion")
    given = LoaderSpec(
        dataset, np.arange(96), ViewPlan("corner"), size=24, stored=0, batch=20, still=32, clip=ClipPlan(6, 2)
    )
    for ours, theirs in zip(*(open_loader("video", given, device, 4) for device in ("cuda", "cpu")), strict=True):
        assert ours.pixels.is_cuda and ours.pixels.is_contiguous(memory_format=torch.channels_last_3d)
        for name in ("pixels", "still", "targets", "index", "view"):
            assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name)), name


@pytest.mark.parametrize("implementation", ["plain", "triton"])
def test_the_input_of_clips_is_that_of_their_frames(implementation):
    clip_BTHWC = torch.randint(0, 256, (3, 5, 40, 40, 3), dtype=torch.uint8, device="cuda")
    mean, std = (torch.rand(3, device="cuda") * 50 + k for k in (100, 30))
    found = network_input(clip_BTHWC.permute(0, 4, 1, 2, 3), mean, std, implementation=implementation)
    frames = clip_BTHWC.flatten(0, 1).permute(0, 3, 1, 2)
    wanted = ((frames.double() - mean.view(3, 1, 1)) / std.view(3, 1, 1)).unflatten(0, (3, 5)).transpose(1, 2)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        ("--run.compile", "true"),
        ("--run.compile", "graphs"),
        ("--transfer.module", "true", "--transfer.together", "grouped"),
    ],
)
def test_clips_are_learned(tmp_path, how):
    """Eager, compiled, replayed as graphs, with merged transfer modules: in bf16 with a source the loss falls."""
    given = ("--data.views", "2", "--transfer.still", "40", "--method.name", "sskt", "--sources", SOURCES)
    common = ("--run.dir", str(tmp_path), "--run.tensorboard", "false", "--run.compile", "false", "--optim.epochs", "8")
    recipe = load("motion", [*given, *common, *how])
    recipe.rows = {}
    (job,) = jobs_of(recipe)
    Trainer(build(job.recipe), job.folder, tmp_path / "recall", lambda _: None).fit()
    losses = [line["primary"] for line in read_lines(job.folder, "step")]
    assert losses[-1] < 0.5 * losses[0]
    assert all(a["step"] < b["step"] for a, b in itertools.pairwise(read_lines(job.folder, "step")))
