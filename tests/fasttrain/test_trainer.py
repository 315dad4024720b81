"""The loop: bit-identical when resumed, exact in what it optimises, silent sources in evaluation."""

import json
import re
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fasttrain.kernels import network_input

from fasttrain import evaluation, interrupts
from fasttrain import step as stepper
from fasttrain import trainer as trainer_module
from fasttrain.advice import advise
from fasttrain.build import build
from fasttrain.checkpoint import same_recipe
from fasttrain.compare import _shared_out, jobs_of, run
from fasttrain.log import Clock, read_lines, shares
from fasttrain.recipe import all_fields
from fasttrain.sources import SourceBank
from fasttrain.tasks import SingleLabel
from fasttrain.trainer import Trainer


@pytest.fixture
def small(smoke):
    """Less work a step than smoke, for tests that do not ask whether anything is learned."""
    return lambda *overrides: smoke("--data.labelled", "60", "--data.size", "12", "--data.stored", "12", *overrides)


class Stopped(BaseException):
    """Stands for a kill: nothing in the code under test handles it."""


def fit(recipe, stop_at: int | None = None, lines: list | None = None) -> Path:
    """Runs a recipe's one run; ``stop_at``: as if killed after so many lines of its log."""
    (job,) = jobs_of(recipe)
    seen = [] if lines is None else lines

    def watch(line) -> None:
        seen.append(line)
        if stop_at is not None and sum(s["kind"] in ("step", "eval") for s in seen) == stop_at:
            raise Stopped

    Trainer(build(job.recipe), job.folder, Path(recipe.run.dir) / recipe.name / "recall", watch).fit()
    return job.folder


def curve(folder: Path) -> list[tuple]:
    """All that training computed, without times."""
    steps = [(s["step"], s["loss"], s["primary"], s["lr"]) for s in read_lines(folder, "step")]
    return steps + [(e["epoch"], e["loss"], e["accuracy"]) for e in read_lines(folder, "eval")]


VARIANTS = {
    "sskt": (),
    "scratch": ("--method.name", "scratch"),
    "live": ("--transfer.recall", "false"),
    "module": ("--transfer.module", "true", "--transfer.loss", "kd", "--transfer.temperature", "2"),
    "ema, clip, plateau": ("--optim.ema", "0.9", "--optim.clip_norm", "1", "--optim.schedule", "plateau"),
    "files": ("--data.loader", "torch", "--data.workers", "0", "--data.views", "0"),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_stopped_and_resumed_is_bit_identical(small, tmp_path, variant):
    common = (
        *variant,
        "--data.batch",
        "16",
        "--run.log_every",
        "1",
        "--run.checkpoint_steps",
        "2",
        "--optim.epochs",
        "3",
    )
    whole = fit(small(*common, "--name", "whole"))
    stopped = small(*common, "--name", "stopped")
    for stop_at in (4, 4, 4):  # inside the first epoch, then wherever that gets to
        with pytest.raises(Stopped):
            fit(stopped, stop_at)
    lines: list = []
    folder = fit(stopped, None, lines)
    assert any(line["kind"] == "note" and line["text"].startswith("going on from") for line in lines)
    assert curve(folder) == curve(whole)
    first, second = (torch.load(f / "checkpoints/selected.pt", weights_only=True)["target"] for f in (whole, folder))
    assert all(torch.equal(first[k], second[k]) for k in first)
    figures = [json.loads((f / "summary.json").read_text())["test"] for f in (whole, folder)]
    assert figures[0] == figures[1]


def test_the_same_command_twice_does_nothing_twice(small, monkeypatch):
    recipe = small()
    folder = fit(recipe)
    before = {p: p.read_bytes() for p in folder.rglob("*.json*")}
    for name in ("evaluate", "evaluate_in_detail"):
        monkeypatch.setattr(trainer_module, name, None)  # the test split is not looked at again
    fit(recipe)
    assert {p: p.read_bytes() for p in folder.rglob("*.json*")} == before


def test_one_step_is_the_papers_equation(small, tmp_path):
    """Eq. (4) and (5) by hand: gradient of CE + alpha * sum_m T^2 CE(soft), SGD with weight decay, from the same start."""
    recipe = small(
        "--transfer.alpha", "0.5", "--transfer.temperature", "2", "--optim.schedule", "constant", "--optim.epochs", "1"
    )
    parts = build(recipe)
    (job,) = jobs_of(recipe)
    trainer = Trainer(parts, job.folder, tmp_path / "recall", lambda _: None)
    before = {k: v.detach().clone() for k, v in parts.target.named_parameters()}
    batch = next(iter(parts.loaders["train"]))
    soft = trainer.sources(batch)
    parts.target.train()
    pixels = network_input(batch.pixels, trainer.mean, trainer.std)
    out = parts.target(pixels, aux=True)
    ce = -out.logits_BK.double().log_softmax(1)[torch.arange(len(batch)), batch.targets].mean()
    p = (soft.logits_BC.double() / 2).softmax(1)
    aux = -(p * (out.aux_logits_BC.double() / 2).log_softmax(1)).sum(1).mean() * 4
    (ce + 0.5 * aux).backward()
    gradients = {k: v.grad.clone() for k, v in parts.target.named_parameters()}
    parts.target.zero_grad()
    trainer._take_step(trainer._begin(iter([batch])))
    assert float(trainer.sums["loss"]) == pytest.approx(float((ce + 0.5 * aux).detach()), rel=1e-5)
    assert float(trainer.sums["aux/tiny"]) == pytest.approx(float(aux.detach()), rel=1e-5)
    for name, value in parts.target.named_parameters():
        expected = before[name] - 0.05 * (gradients[name] + 5e-4 * before[name])
        assert torch.allclose(value, expected, atol=2e-6), name


def test_the_fused_kernel_trains_like_the_reference(small, need):
    """Through the whole loop, in Triton's interpreter where there is no GPU; and the log says which of them it is."""
    need("triton")
    common = ("--transfer.alpha", "0.5", "--transfer.loss", "kd", "--run.precision", "fp32", "--run.log_every", "1")
    common += ("--optim.lr", "0.001")  # small steps do not blow up what rounding changes
    curves = []
    for name in ("reference", "triton"):
        folder = fit(small(*common, "--run.kernels", name, "--optim.epochs", "2", "--name", name))
        curves.append([(line["loss"], line["aux/tiny"]) for line in read_lines(folder, "step")])
        log = json.loads((folder / "summary.json").read_text())["log"]
        assert f"soft-target losses: {name} (as asked)" in log
    assert len(curves[0]) == 4
    np.testing.assert_allclose(curves[0], curves[1], rtol=2e-5)
    assert "soft-target losses: " not in " ".join(build(small("--method.name", "scratch")).log)


def test_sources_and_heads_never_run_in_evaluation(small, monkeypatch):
    parts = build(small("--transfer.recall", "false"))

    def forbidden(*_):
        raise AssertionError("ran in evaluation")

    monkeypatch.setattr(SourceBank, "logits", forbidden)
    for head in parts.target.aux_heads.values():
        monkeypatch.setattr(head, "forward", forbidden)
    figures = trainer_module.evaluate(parts, parts.target, "val")
    assert 0 <= figures["accuracy"] <= 100
    with pytest.raises(AssertionError, match="ran in evaluation"):
        Trainer(parts, Path(parts.recipe.run.dir) / "x", Path(parts.recipe.run.dir) / "r", lambda _: None).fit()


def test_sources_do_not_change_and_get_no_gradient(small):
    recipe = small("--transfer.recall", "false", "--optim.epochs", "1")
    parts = build(recipe)
    (job,) = jobs_of(recipe)
    before = {k: v.clone() for k, v in parts.networks[0].state_dict().items()}
    Trainer(parts, job.folder, job.folder / "recall", lambda _: None).fit()
    assert all(torch.equal(before[k], v) for k, v in parts.networks[0].state_dict().items())
    assert all(p.grad is None for p in parts.networks[0].parameters())


def test_recalled_training_is_live_training(small, tmp_path):
    """Float32 on the CPU: the same curve, bit for bit, while labels are met (2 epochs) and while they are recalled (2 more);
    also in batches of another size, from a cache that another run has filled, with stills, and with every view numbered."""
    for name, how in {
        "views": ("--data.views", "2"),
        "still": ("--data.views", "2", "--transfer.still", "16"),
        "every": ("--data.views", "0", "--transfer.every_view", "true", "--data.pad", "1"),
    }.items():
        cache = ("--transfer.cache", str(tmp_path / name))
        common = (*how, "--run.log_every", "1", "--optim.epochs", "4")
        live = curve(fit(small(*common, "--name", f"{name}-live", "--transfer.recall", "false")))
        met = curve(fit(small(*common, *cache, "--name", f"{name}-met", "--transfer.recall_gib", "0")))
        assert met == live, name
        again = curve(fit(small(*common, *cache, "--name", f"{name}-again")))
        assert again == live, name
        other = (*common, "--data.batch", "9", "--run.seed", "3")
        live = curve(fit(small(*other, "--name", f"{name}-other-live", "--transfer.recall", "false")))
        assert curve(fit(small(*other, *cache, "--name", f"{name}-other"))) == live, name


def test_it_learns(smoke):
    """The made-up stripes: far above the third that guessing finds, with soft labels from a random source too."""
    folder = fit(smoke("--optim.epochs", "12", "--data.size", "16", "--data.stored", "16"))
    assert json.loads((folder / "summary.json").read_text())["test"]["accuracy"] > 80


def test_half_precision_trains(small):
    for precision in ("bf16", "fp16"):
        folder = fit(small("--run.precision", precision, "--name", precision, "--optim.epochs", "1"))
        assert all(s["loss"] < 20 for s in read_lines(folder, "step"))


def test_compiled_trains_alike(small, monkeypatch):
    """The compiler's front end and autograd, without the minutes that its code generation takes on a CPU; tests/gpu has
    the whole of it."""
    common = ("--run.log_every", "1", "--optim.epochs", "1", "--data.drop_last", "true")
    plain = curve(fit(small(*common, "--name", "plain")))
    calls: list = []

    def compiled(function, **_):
        calls.append(function)
        return compile_(function, backend="aot_eager", fullgraph=True)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", compiled)
    other = curve(fit(small(*common, "--name", "compiled", "--run.compile", "true")))
    assert len(calls) == 1
    assert [c[1] for c in other] == pytest.approx([p[1] for p in plain], rel=1e-3)


def test_accumulated_gradients_are_those_of_the_parts(small, tmp_path):
    """Weighted by their sizes, the last being smaller; batch norm sees the parts; top-k labels are cut as logits are."""
    for top in ("0", "5"):
        common = (
            "--data.batch",
            "20",
            "--run.accumulate",
            "3",
            "--optim.schedule",
            "constant",
            "--transfer.recall_top",
            top,
        )
        parts = build(small(*common, "--optim.weight_decay", "0", "--optim.momentum", "0"))
        trainer = Trainer(parts, tmp_path / f"run{top}", tmp_path / "recall", lambda _: None)
        parts.target.train()
        batch = next(iter(parts.loaders["train"]))
        soft = trainer.sources(batch)
        start = {k: v.detach().clone() for k, v in parts.target.state_dict().items()}
        for at in (slice(0, 7), slice(7, 14), slice(14, 20)):
            share = (at.stop - at.start) / 20
            x = network_input(batch.pixels[at], trainer.mean, trainer.std)
            piece = soft.split(7)[at.start // 7]
            (parts.method.step(parts.target, x, batch.targets[at], piece)["loss"] * share).backward()
        expected = {k: start[k] - 0.05 * p.grad for k, p in parts.target.named_parameters()}
        parts.target.zero_grad()
        parts.target.load_state_dict(start)
        trainer._take_step(trainer._begin(iter([batch])))
        for name, value in parts.target.named_parameters():
            assert torch.allclose(value, expected[name], atol=1e-6), name
    with pytest.raises(ValueError, match=r"run\.accumulate: 21 parts of a batch of 20"):
        small("--data.batch", "20", "--run.accumulate", "21")


@pytest.mark.parametrize("form", ["shared", "grouped"])
def test_transfer_modules_together_train_alike(small, form):
    two = (
        "[{name: a, model: test_resnet, weights: random, size: 32}, "
        "{name: b, model: test_resnet, weights: random, classes: 20, size: 32}]"
    )
    common = ("--sources", two, "--transfer.module", "true", "--run.log_every", "1", "--optim.lr", "0.001")
    plain = curve(fit(small(*common, "--name", "plain")))
    how = ("--transfer.together", form, "--transfer.pad_to", "64", "--transfer.recompute", "true")
    other = curve(fit(small(*common, *how, "--name", form)))
    assert [c[1] for c in other] == pytest.approx([p[1] for p in plain], rel=1e-4)


def test_each_moment_belongs_to_a_part(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fasttrain.log.time.perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"))
    for part, took in (("data", 3.0), ("sources", 1.0), ("target", 5.0), ("sources", 0.5)):
        now[0] += took
        clock.mark(part)
    clock.settle()
    now[0] += 100
    clock.start()  # an evaluation, say
    now[0] += 2
    clock.mark("data")
    assert clock.seconds == clock.lately == {"data": 3.0, "sources": 1.5, "target": 5.0}
    clock.settle()
    assert clock.lately == {"data": 2.0} and clock.seconds == {"data": 5.0, "sources": 1.5, "target": 5.0}
    clock.settle()
    assert clock.lately == {}
    assert shares({"data": 1.0, "target": 3.0}) == {"data": 25.0, "target": 75.0}


def test_the_account_of_the_time(small):
    """In each line of the log the shares of its steps, the advice in summary and report; what is slow is found."""
    parts = build(small("--transfer.recall", "false", "--run.log_every", "2", "--optim.epochs", "3"))
    (job,) = jobs_of(parts.recipe)
    trainer = Trainer(parts, job.folder, job.folder / "recall", lambda _: None)
    logits = trainer.sources.logits

    def slow(pixels):
        time.sleep(0.5)
        return logits(pixels)

    trainer.sources.logits = slow
    summary = trainer.fit()
    for line in read_lines(job.folder, "step"):
        found = {k: v for k, v in line.items() if k.endswith("_share")}
        assert sum(found.values()) == pytest.approx(100) and {"data_share", "target_share", "optimiser_share"} <= set(
            found
        )
        assert line["sources_share"] > 30
    assert summary["advice"].startswith("waits ") and "transfer.recall true" in summary["advice"]
    assert set(summary["time_share_percent"]) <= {"data", "sources", "target", "optimiser", "other"}


def test_advice(small):
    def said(share: dict[str, float], *how: str, loader: str = "ffcv", **given) -> str:
        return advise(share, small(*how), loader, **({"recalled": False, "compiled": False} | given))

    assert said({"data": 4.0, "sources": 9.0, "target": 87.0}) == ""
    text = said({"data": 31.4, "sources": 9.0, "target": 60.0})
    assert text.startswith("waits 31 % for data: ") and "--max-size" in text
    assert "fasttrain pack" in said({"data": 31.0}, loader="torch")
    assert "hw_decoder_load" in said({"data": 31.0}, loader="dali")
    assert "data.views 4" in said({"sources": 31.0}, "--data.views", "0")
    assert "fasttrain cache" in said({"sources": 31.0}, recalled=True)
    assert said({"processes": 31.0, "data": 12.0}).startswith(
        "waits 31 % for the other processes: try a larger data.batch"
    )
    for name in re.findall(r"(?:data|transfer|run|optim)\.\w+", text):
        assert name in all_fields()


def test_a_run_leaves_what_it_should(small, tmp_path):
    recipe = small("--run.tensorboard", "true")
    folder = fit(recipe)
    assert {p.name for p in folder.iterdir()} >= {
        "recipe.yaml",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "tensorboard",
    }
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last.pt", "selected.pt", "step-000000002.pt"}
    assert list((folder / "tensorboard").glob("events.*"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["sources"]["tiny"]["sha256"] == build(recipe).networks[0].sha256
    assert sum(summary["time_share_percent"].values()) == pytest.approx(100)
    assert (
        summary["images_per_s"] > 0
        and summary["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    )
    step = read_lines(folder, "step")[0]
    told = {
        "loss",
        "primary",
        "aux/tiny",
        "lr",
        "images_per_s",
        "data_share",
        "sources_share",
        "target_share",
        "advice",
    }
    assert told <= set(step)


def test_best_or_last(small):
    for select in ("best", "last"):
        folder = fit(small("--run.select", select, "--optim.epochs", "6", "--name", select, "--method.name", "scratch"))
        lines = read_lines(folder, "eval")
        summary = json.loads((folder / "summary.json").read_text())
        best = max(lines, key=lambda e: e["accuracy"])["epoch"]  # the first of equal ones
        assert summary["selected_epoch"] == (best if select == "best" else 6)


def test_a_gradient_that_is_not_finite_stops_the_run(small, tmp_path):
    """Before the weights have it; the step and its samples are named."""
    recipe = small("--optim.lr", "1e15", "--optim.schedule", "constant", "--optim.epochs", "3")
    said = r"the gradient is not finite at step (\d+) \(epoch 1, batch \1 of it: samples .*no checkpoint yet.*1e\+15 may be too"
    with pytest.raises(ValueError, match=said):
        fit(recipe)
    (found,) = tmp_path.rglob("nonfinite.json")
    told = json.loads(found.read_text())
    spec = build(recipe).train_spec
    start = told["batch"] * spec.batch
    assert (
        told["index"] == spec.epoch_order(0)[start : start + spec.batch].tolist() and told["step"] == told["batch"] + 1
    )


@pytest.mark.parametrize("parts", ["1", "2"])
def test_steps_that_are_not_finite_are_left_out_if_asked(small, monkeypatch, parts):
    """Weights, momentum, average and statistics of batch norm are as if the step had not been; one more stops the run."""
    forward, seen = stepper.network_input, []

    def poisoned(pixels, mean, std):
        seen.append(len(seen))
        return forward(pixels, mean, std) * (float("nan") if len(seen) in (2, 3) else 1)

    monkeypatch.setattr(stepper, "network_input", poisoned)
    common = ("--optim.schedule", "constant", "--optim.ema", "0.5", "--run.accumulate", parts, "--run.log_every", "1")
    lines: list = []
    folder = fit(small(*common, "--run.skip_nonfinite", "2", "--name", "asked"), None, lines)
    told = [line for line in lines if line["kind"] == "left out"]
    assert [line["step"] for line in told] == ([2, 3] if parts == "1" else [1, 2]) and len(told[0]["index"]) > 1
    state = torch.load(folder / "checkpoints/last.pt", weights_only=True)
    assert state["left_out"] == 2 and all(v.isfinite().all() for v in state["target"].values())
    assert all(v.isfinite().all() for v in state["average"].values())
    steps = [line for line in lines if line["kind"] == "step"]
    assert all(np.isfinite(line["loss"]) for line in steps if "loss" in line) and sum("loss" in s for s in steps) == 2
    seen.clear()
    with pytest.raises(ValueError, match=r"not finite .* run\.skip_nonfinite 2 leaves such steps out"):
        fit(small(*common, "--run.skip_nonfinite", "1", "--name", "more"))


def test_a_step_that_is_left_out_is_told_on_the_command_line(fasttrain, monkeypatch):
    forward, seen = stepper.network_input, []

    def poisoned(pixels, mean, std):
        seen.append(len(seen))
        return forward(pixels, mean, std) * (float("nan") if len(seen) == 2 else 1)

    monkeypatch.setattr(stepper, "network_input", poisoned)
    done = fasttrain(
        "train", "smoke", "--run.tensorboard", "false", "--run.log_every", "1", "--run.skip_nonfinite", "1"
    )
    assert (
        done.returncode == 0 and "LEFT OUT: the gradient of step 2 was not finite (1 of 1 steps so far)" in done.stdout
    )


@pytest.mark.parametrize("moment", ["evaluation", "last step", "test"])
def test_asked_to_end_around_an_evaluation(small, tmp_path, monkeypatch, moment):
    """Nothing of the epoch is lost, and the evaluation is done when the run goes on."""
    common = ("--optim.epochs", "2", "--data.batch", "16", "--run.log_every", "1")
    whole = fit(small(*common, "--name", "whole"))
    recipe = small(*common, "--name", "asked")
    parts_of = {"evaluation": evaluation, "test": evaluation, "last step": stepper}[moment]
    forward, seen = parts_of.network_input, []

    def asking(*arguments):
        seen.append(len(seen))
        if len(seen) == {"evaluation": 1, "last step": 4, "test": 3}[moment]:  # of 4 steps; val is one batch
            signal.raise_signal(signal.SIGTERM)
        return forward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(parts_of, "network_input", asking)
        with pytest.raises(interrupts.Preempted, match=r"asked to end, after step \d+; the checkpoint of it is in"):
            fit(recipe)
    folder = jobs_of(recipe)[0].folder
    state = torch.load(folder / "checkpoints/last.pt", weights_only=True)
    assert state["position"]["step"] == (8 if moment == "test" else 4)
    assert (len(read_lines(folder, "eval")) == 2) if moment == "test" else not read_lines(folder, "eval")
    fit(recipe)
    assert curve(folder) == curve(whole)


def test_checkpoints_of_before_a_field_was_there_go_on(small):
    now = asdict(small("--optim.lr", "0.01"))
    before = {**now, "run": {k: v for k, v in now["run"].items() if k not in ("keep", "sync_batch_norm")}}
    same_recipe(before, now, Path("runs/x"))
    with pytest.raises(ValueError, match=r"runs/x holds a run with run\.sync_batch_norm False, and this one has True"):
        same_recipe(before, asdict(small("--optim.lr", "0.01", "--run.sync_batch_norm", "true")), Path("runs/x"))


def test_synchronised_batch_norm_is_of_whole_batches(small):
    for options in (("--run.accumulate", "2"), ("--transfer.recompute", "true"), ("--transfer.together", "grouped")):
        with pytest.raises(ValueError, match=r"^run\.sync_batch_norm: it normalises whole batches"):
            small("--run.sync_batch_norm", "true", *options)


def test_another_recipe_in_the_same_folder_is_refused(small):
    fit(small())
    with pytest.raises(ValueError, match=r"holds a run with optim\.lr 0\.05, and this one has 0\.1: choose another"):
        fit(small("--optim.lr", "0.1"))
    fit(small("--run.log_every", "7", "--run.threads", "1"))  # where it runs and what it logs may differ


def test_last_batch_of_one_image_is_refused(smoke):
    with pytest.raises(ValueError, match="leave a last batch of 1"):
        build(smoke("--data.batch", "126"))
    build(smoke("--data.batch", "126", "--data.drop_last", "true"))


def test_figures_of_a_task():
    logits = torch.tensor([[2.0, 0], [0, 1], [3, 0], [1, 0]])
    figures = SingleLabel(2).evaluate(logits, torch.tensor([0, 1, 0, 1]))
    assert figures["accuracy"] == 75 and figures["balanced_accuracy"] == 75 and figures["auroc"] == 100
    assert figures["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0, 1])))
    )
    uneven = SingleLabel(2).evaluate(torch.tensor([[1.0, 0]] * 4), torch.tensor([0, 0, 0, 1]))
    assert (uneven["accuracy"], uneven["balanced_accuracy"]) == (75, 50)
    assert "top5" in SingleLabel(6).evaluate(torch.eye(6), torch.arange(6))


def test_balanced_accuracy_is_scikit_learns():
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    logits, targets = torch.randn(200, 2), (torch.rand(200) < 0.3).long()
    figures = SingleLabel(2).evaluate(logits, targets)
    assert figures["balanced_accuracy"] == pytest.approx(
        100 * balanced_accuracy_score(targets, logits.argmax(1)), abs=1e-4
    )
    assert figures["auroc"] == pytest.approx(100 * roc_auc_score(targets, logits[:, 1] - logits[:, 0]), abs=1e-4)


def test_the_metric_suits_the_balance():
    assert SingleLabel(2).metric(torch.tensor([0] * 70 + [1] * 30)) == "balanced_accuracy"
    assert SingleLabel(2).metric(torch.tensor([0] * 55 + [1] * 45)) == "accuracy"


def test_seeds_differ_in_start_and_order_but_not_in_views(small):
    a, b = (build(small("--run.seed", str(s))) for s in (0, 1))
    assert not torch.equal(a.target.head.weight, b.target.head.weight)
    first, second = (torch.cat([x.index for x in p.loaders["train"]]) for p in (a, b))
    assert not torch.equal(first, second)
    rows = [
        {int(i): p for x in parts.loaders["train"] for i, p in zip(x.index, x.pixels, strict=True)} for parts in (a, b)
    ]
    assert all(torch.equal(rows[0][i], rows[1][i]) for i in rows[0])


def test_scratch_and_sskt_start_from_the_same_backbone(small):
    plain, taught = build(small("--method.name", "scratch")), build(small())
    for key, value in plain.target.state_dict().items():
        assert torch.equal(value, taught.target.state_dict()[key]), key


def test_threads_are_shared_out():
    assert _shared_out(2, 9, 2) == [1] * 8 + [2]
    assert _shared_out(16, 5, 4) == [4] * 4 + [16]
    assert _shared_out(1, 2, 2) == [1, 1]


def test_a_comparison_in_turn_and_side_by_side(small, tmp_path):
    rows = {"scratch": {"method": {"name": "scratch"}}, "sskt": {}}
    tables = []
    for parallel in (1, 2):
        recipe = small("--seeds", "2", "--optim.epochs", "1", "--run.parallel", str(parallel), "--run.threads", "1")
        recipe = replace(recipe, name=f"p{parallel}", rows=rows)
        lines: list[tuple] = []
        tables.append(run(recipe, lambda *line, to=lines: to.append(line)))
        seen = [(label, line["kind"]) for label, line in lines]
        assert sum(kind == "done" for _, kind in seen) == 4
        assert {label for label, kind in seen if kind == "done"} == {f"{r}, seed {s}" for r in rows for s in (0, 1)}
        root = tmp_path / "runs" / recipe.name
        table = json.loads((root / "table.json").read_text())
        assert table == tables[-1]
        page = (root / "report.html").read_text()
        assert "data:image/png;base64," in page and "http" not in page.replace("http-equiv", "") and "scratch" in page
    for a, b in zip(tables[0]["rows"], tables[1]["rows"], strict=True):
        assert {k: a[k] for k in ("name", "method", "sources", "mean", "std", "seeds", "test")} == {
            k: b[k] for k in ("name", "method", "sources", "mean", "std", "seeds", "test")
        }
    row = tables[0]["rows"][1]
    assert (row["method"], row["sources"], row["seeds"]) == ("sskt", ["tiny"], 2)
    figures = [
        json.loads((tmp_path / f"runs/p1/sskt/seed{s}/summary.json").read_text())["test"]["accuracy"] for s in (0, 1)
    ]
    assert row["mean"] == pytest.approx(sum(figures) / 2)
    assert row["std"] == pytest.approx(abs(figures[0] - figures[1]) / 2**0.5)
