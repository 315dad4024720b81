"""Packed sets in the trainer and under the real command line: to the end, resumed, interrupted, with damaged samples."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fasttrain.loaders import open_dataset
from fasttrain.loaders.pack import pack

from fasttrain.compare import jobs_of
from fasttrain.recipe import Recipe
from tests.loaders import samples

from .test_command_line import SMOKE, wait_for
from .test_trainer import Stopped, curve, fit

PACKED = ("--data.name", "beton", "--data.stored", "0", "--data.crop", "random_resized", "--data.size", "20")


@pytest.fixture
def beton(tmp_path) -> Path:
    """90 JPEGs of two sizes in three classes."""
    sizes = ((40, 30), (33, 52))
    tree = samples.image_tree(tmp_path / "tree", dict.fromkeys("abc", 30), sizes=sizes, suffix=".jpg")
    pack(open_dataset("folder", tree), tmp_path / "set.beton", workers=1)
    return tmp_path / "set.beton"


@pytest.fixture
def packed(smoke, need, beton):
    """The smoke recipe on a packed set, with a loader."""

    def make(loader: str, *overrides: str) -> Recipe:
        if loader in ("ffcv", "dali"):
            need(loader)
        return smoke(*PACKED, "--data.root", str(beton), "--data.loader", loader, "--data.workers", "1", *overrides)

    return make


EVERY_STEP = ("--run.log_every", "1", "--run.checkpoint_steps", "1", "--data.batch", "16", "--optim.epochs", "2")
SCRATCH = ("--method.name", "scratch", "--data.views", "0")
GROWING = (*SCRATCH, "--data.grow_from", "12", "--data.grow_epochs", "[0, 1]", "--data.balance", "true")


@pytest.mark.parametrize(("loader", "how"), [("ffcv", GROWING), ("ffcv", ()), ("dali", GROWING)])
def test_stopped_and_resumed_is_bit_identical(packed, loader, how):
    """From scratch with growing images and balanced classes, and with recalled soft labels."""
    whole = fit(packed(loader, *EVERY_STEP, *how, "--name", "whole"))
    for stop_at in (2, 4):  # inside the first epoch and the second, with other threads
        with pytest.raises(Stopped):
            fit(packed(loader, *EVERY_STEP, *how, "--name", "stopped"), stop_at)
    folder = fit(packed(loader, *EVERY_STEP, *how, "--name", "stopped", "--data.workers", "2"))
    assert len(curve(folder)) >= 10 and curve(folder) == curve(whole)
    summaries = [json.loads((f / "summary.json").read_text()) for f in (whole, folder)]
    assert summaries[0]["test"] == summaries[1]["test"]
    assert summaries[0]["bad_samples"] == {"train": 0, "val": 0, "test": 0}
    assert any(line.startswith(f"loader: {loader} (as asked); {loader} ") for line in summaries[0]["log"])


def test_ffcv_trains_as_torch_does(packed):
    """The same curve, bit for bit: no box is twice as large as the output."""
    same = (*SCRATCH, *EVERY_STEP, "--data.size", "28", "--optim.epochs", "1")
    curves = [curve(fit(packed(loader, *same, "--name", loader))) for loader in ("torch", "ffcv")]
    assert curves[0] == curves[1]


def damage(recipe: Recipe, split: str, number: int = 0) -> int:
    """Overwrites the head of a split's sample on disk; returns its index."""
    dataset = open_dataset("beton", recipe.data.root)
    index = int(dataset.splits[split][number])
    with open(recipe.data.root, "r+b") as file:
        file.seek(int(dataset.read.file.ptr_N[index]))
        file.write(bytes(30))
    return index


def test_bad_samples_are_counted(packed):
    """Also over a stop, and where soft labels are recalled."""
    recipe = packed("ffcv", "--data.on_bad_sample", "skip", *EVERY_STEP)
    damage(recipe, "train"), damage(recipe, "train", 7), damage(recipe, "test")
    with pytest.raises(Stopped):
        fit(recipe, 7)
    folder = fit(recipe)
    assert json.loads((folder / "summary.json").read_text())["bad_samples"] == {"train": 2, "val": 0, "test": 1}


@pytest.mark.parametrize("loader", ["ffcv", "torch"])
def test_a_bad_sample_ends_the_run(packed, loader):
    recipe = packed(loader, *SCRATCH)
    index = damage(recipe, "train")
    with pytest.raises(ValueError, match=rf"^cannot read the image .*set\.beton, sample {index}: "):
        fit(recipe)
    assert not (jobs_of(recipe)[0].folder / "summary.json").exists()


def test_a_changed_set_is_refused(packed, beton):
    """Packed again with one other image: the same samples, labels and splits."""
    recipe = packed("ffcv", *SCRATCH, *EVERY_STEP)
    with pytest.raises(Stopped):
        fit(recipe, 2)
    shutil.copy(beton.parent / "tree/a/003.jpg", beton.parent / "tree/a/004.jpg")
    for file in (beton, Path(f"{beton}.json")):
        file.unlink()
    pack(open_dataset("folder", beton.parent / "tree"), beton, workers=1)
    with pytest.raises(ValueError, match=r"^data: .*set\.beton has changed since the run in .*smoke began$"):
        fit(recipe)


def session(leader: int) -> list[str]:
    """Processes that run in a session, zombies aside."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended just now
            continue
        if int(its) == leader and state != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.parametrize(
    ("loader", "how"),
    [("ffcv", ()), ("torch", ()), ("torch", ("--run.seeds", "3", "--run.parallel", "2"))],
    ids=["ffcv", "torch", "side by side"],
)
def test_ctrl_c(tmp_path, beton, need, loader, how):
    """In the middle of training, sent to all processes as a terminal does: 75, one sentence, nobody left, it goes on."""
    if loader == "ffcv":
        need("ffcv")
    command = [sys.executable, "-m", "fasttrain", *SMOKE, *PACKED, "--data.root", str(beton), "--data.loader", loader]
    command += [*SCRATCH, "--data.workers", "2", "--optim.epochs", "9999", *how]
    last = tmp_path / "runs/smoke" / ("seed0" if how else "") / "checkpoints/last.pt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, start_new_session=True, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        wait_for(last, process)
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 75, said
        assert re.fullmatch(r"fasttrain: asked to end[^\n]*; the same command goes on\n", said)
        time.sleep(0.2)
        assert session(process.pid) == []
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
