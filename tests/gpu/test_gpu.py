"""On a CUDA device: training in every precision, compiled, resumed, and the same as on the CPU where it has to be."""

import json
from pathlib import Path

import pytest
import torch
from fasttrain.kernels import soft_target_loss

from fasttrain.build import build
from fasttrain.compare import jobs_of
from fasttrain.log import read_lines
from fasttrain.trainer import Trainer

pytestmark = pytest.mark.gpu


def fit(recipe) -> Path:
    (job,) = jobs_of(recipe)
    Trainer(build(job.recipe), job.folder, Path(recipe.run.dir) / recipe.name / "recall", lambda _: None).fit()
    return job.folder


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("recall", ["true", "false"])
def test_it_learns(smoke, precision, recall):
    name = f"{precision}-{recall}"
    common = ("--run.compile", "false", "--optim.epochs", "12", "--name", name)
    folder = fit(smoke("--run.precision", precision, "--transfer.recall", recall, *common))
    assert json.loads((folder / "summary.json").read_text())["test"]["accuracy"] > 80


def test_float32_begins_like_the_cpu(smoke, exact):
    common = ("--run.precision", "fp32", "--run.log_every", "1", "--optim.epochs", "1", "--run.compile", "false")
    curves = []
    for device in ("cuda", "cpu"):
        folder = fit(smoke(*common, "--run.device", device, "--name", device))
        curves.append([s["loss"] for s in read_lines(folder, "step")])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_compiled(smoke):
    folder = fit(
        smoke("--run.compile", "true", "--data.drop_last", "true", "--optim.epochs", "12", "--name", "compiled")
    )
    assert json.loads((folder / "summary.json").read_text())["test"]["accuracy"] > 80


def test_resume(smoke):
    recipe = smoke("--optim.epochs", "2", "--run.checkpoint_steps", "3", "--run.compile", "false")
    (job,) = jobs_of(recipe)

    def stop(line) -> None:
        if line["kind"] == "eval":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(build(job.recipe), job.folder, job.folder / "recall", stop).fit()
    summary = Trainer(build(job.recipe), job.folder, job.folder / "recall", lambda _: None).fit()
    assert summary["steps"] == 8


def test_soft_target_loss():
    student, target = torch.randn(64, 1365), torch.randn(64, 1365) * 3
    here = soft_target_loss(student, target, [1000, 365], temperature=2.0)
    there = soft_target_loss(student.cuda(), target.cuda(), [1000, 365], temperature=2.0)
    assert torch.allclose(here, there.cpu(), rtol=1e-5)
    with pytest.raises(ValueError, match="two devices"):
        soft_target_loss(student.cuda(), target, [1365])
