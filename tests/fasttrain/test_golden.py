"""Loss curves of each method, kept: a change that should not change results does not change these.

``python -m tests.fasttrain.test_golden`` writes golden.json anew. On the CPU and with the torch version it was written on,
curves are compared bit for bit; elsewhere, where convolutions sum in another order, within 1 % over the first steps.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from fasttrain.build import build
from fasttrain.compare import jobs_of
from fasttrain.device import cpu_name
from fasttrain.log import read_lines
from fasttrain.methods import METHODS
from fasttrain.recipe import load
from fasttrain.trainer import Trainer

GOLDEN = Path(__file__).with_name("golden.json")
TEACHER = "[{name: tiny, model: 'timm:test_resnet', weights: random, classes: 3, size: 32}]"
LESS = ("--data.size", "12", "--data.stored", "12", "--optim.lr", "0.01")
MAXL = ("--method.name", "maxl", "--method.generator", "resnet20", *LESS)
VARIANTS = {
    "scratch": ("--method.name", "scratch"),
    "sskt": (),
    "sskt, kd, module": ("--transfer.module", "true", "--transfer.loss", "kd", "--transfer.temperature", "3"),
    "kd": ("--method.name", "kd", "--sources", TEACHER),
    "dml": ("--method.name", "dml", "--method.peers", "[resnet20, resnet32]", *LESS),
    "maxl": MAXL,
    "maxl, first order": (*MAXL, "--method.order", "first"),
}
FIXED = (
    "--run.precision fp32 --run.device cpu --run.tensorboard false --run.log_every 1 --data.labelled 60 --data.batch 20"
)


def machine() -> dict[str, str]:
    return {"cpu": cpu_name(), "instructions": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


def curve(folder: str, variant: str) -> list[float]:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    (job,) = jobs_of(load("smoke", ["--run.dir", folder, *FIXED.split(), *VARIANTS[variant]]))
    Trainer(build(job.recipe), job.folder, job.folder / "recall", lambda _: None).fit()
    return [
        line[name] for line in read_lines(job.folder, "step") for name in ("loss", "generator/loss") if name in line
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_curve_is_as_it_was(variant, tmp_path):
    kept = json.loads(GOLDEN.read_text())
    now = curve(str(tmp_path), variant)
    if kept["machine"] == machine():
        assert now == kept["curves"][variant]
    assert len(now) == len(kept["curves"][variant]) == (12 if variant.startswith("maxl") else 6)
    assert now[:4] == pytest.approx(kept["curves"][variant][:4], rel=0.01)


def test_every_method_has_a_curve():
    assert {v.split(",")[0] for v in VARIANTS} == set(METHODS)


if __name__ == "__main__":
    curves = {}
    for name in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            curves[name] = curve(folder, name)
    GOLDEN.write_text(json.dumps({"machine": machine(), "curves": curves}, indent=1) + "\n")
