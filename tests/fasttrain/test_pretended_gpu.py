"""Trainings on a GPU that is pretended (``pretended.py``): devices are not mixed, and the host does not wait in the loop."""

from pathlib import Path

import pytest
import torch

from fasttrain.build import build
from fasttrain.compare import jobs_of
from fasttrain.log import read_lines
from fasttrain.pretext.kmeans import kmeans, nearest
from fasttrain.trainer import Trainer

from .pretended import GPU, Waits, pretended_gpu

COMMON = ("--run.compile", "false", "--run.log_every", "1", "--optim.epochs", "1", "--data.labelled", "40")
TWO = (
    "[{name: a, model: test_resnet, weights: random, size: 32}, "
    "{name: b, model: test_resnet, weights: random, classes: 20, size: 32}]"
)
MODULE = "--transfer.module true --transfer.together grouped --transfer.recompute true --run.accumulate 2 --run.skip_nonfinite 1"


def trainer_of(recipe, device: str) -> Trainer:
    recipe.run.device, recipe.name = device, f"{recipe.name}-{device}"
    (job,) = jobs_of(recipe)
    return Trainer(build(job.recipe), job.folder, Path(recipe.run.dir) / recipe.name / "recall", lambda _: None)


def test_two_devices_are_not_mixed_and_who_waits_is_found(monkeypatch):
    with pretended_gpu(monkeypatch) as gpu:
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.is_cuda and (there + 1).device == GPU and there.cpu().device == here.device
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            there + here
        gpu.may_wait = False
        for waits in (lambda: float(there[0]), lambda: here.to("cuda"), lambda: there[there > 0], lambda: there.cpu()):
            with pytest.raises(Waits):
                waits()
        assert here.pin_memory().to("cuda", non_blocking=True).is_cuda


@pytest.mark.parametrize("how", ["", "--transfer.recall false --transfer.bank graphed --run.cosine_every 1"])
def test_the_curve_is_the_cpus(smoke, monkeypatch, how):
    curves = []
    for device in ("cpu", "cuda"):
        fields = [f for f in how.split() if device == "cuda" or f not in ("--transfer.bank", "graphed")]
        recipe = smoke(*COMMON, "--run.precision", "fp32", *fields)
        if device == "cuda":
            with pretended_gpu(monkeypatch):
                trainer = trainer_of(recipe, device)
                trainer.fit()
        else:
            trainer = trainer_of(recipe, device)
            trainer.fit()
        curves.append([line["loss"] for line in read_lines(trainer.folder, "step")])
    assert len(curves[0]) == 2 and curves[1] == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.parametrize(
    "how",
    [
        f"--run.precision bf16 {MODULE}",
        "--run.precision fp16 --transfer.recall_top 5 --optim.epochs 3 --optim.ema 0.9",
        "--transfer.every_view true --data.views 0 --transfer.still 48 --transfer.recall_gib 0 --data.loader torch "
        "--data.workers 0",
        "--method.name maxl --method.generator resnet20 --run.precision fp32",
        "--method.name scratch --data.views 0 --pretext.task jigsaw --pretext.permutations 9 --data.size 36 --data.stored 36 "
        "--data.pad 0 --pretext.width 8 --pretext.hidden 16",
    ],
)
def test_it_trains(smoke, monkeypatch, how):
    with pretended_gpu(monkeypatch):
        summary = trainer_of(smoke(*COMMON, *how.split(), *(("--sources", TWO) if MODULE in how else ())), "cuda").fit()
    assert summary["steps"] >= 2 and 0 <= summary["test"]["accuracy"] <= 100


@pytest.mark.parametrize(
    "how",
    [
        "--run.precision bf16 --transfer.recall false --transfer.module true --run.skip_nonfinite 3 --run.accumulate 2",
        "--run.precision fp16",
        "--run.precision bf16 --run.compile step",
    ],
)
def test_nothing_waits_in_the_loop(smoke, monkeypatch, how):
    recipe = smoke(*COMMON, "--optim.clip_norm", "1", "--optim.ema", "0.9", *how.split())
    with pretended_gpu(monkeypatch) as gpu:
        monkeypatch.setattr(torch, "compile", lambda function, **how: function)
        trainer = trainer_of(recipe, "cuda")
        trainer.target.train()
        for epoch in range(3):  # labels are met, and what is made once is made
            gpu.may_wait = epoch < 2
            for ready in trainer._ahead():
                trainer._take_step(ready)
        gpu.may_wait = True
        trainer.clock.settle()
    assert {"data", "target"} <= set(trainer.clock.lately)


def test_clusters(monkeypatch):
    x = torch.randn(8, 20)[torch.randint(8, (400,))] + 0.3 * torch.randn(400, 20)
    here = kmeans(x, 8, seed=1, iterations=20)
    with pretended_gpu(monkeypatch):
        there = kmeans(x.cuda(), 8, seed=1, iterations=20)
        assert there.centroid_KD.is_cuda and torch.equal(there.centroid_KD.cpu(), here.centroid_KD)
        assert nearest(x.cuda(), there.centroid_KD, 3)[0].is_cuda
