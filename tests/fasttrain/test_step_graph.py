"""run.compile step, with a recorder that stands for a CUDA graph (tape.py): the same training as step by step, bit for bit."""

from pathlib import Path

import pytest
import torch
from fasttrain.kernels import TopK

from fasttrain import build as build_module
from fasttrain import checkpoint, ranks
from fasttrain import step as step_module
from fasttrain.build import build
from fasttrain.compare import jobs_of
from fasttrain.device import check_step, choose_compile
from fasttrain.log import read_lines
from fasttrain.sources import SoftTargets
from fasttrain.step_graph import WARM_UP, StepGraph
from fasttrain.trainer import Trainer

from .tape import Tape


@pytest.fixture
def taped(monkeypatch):
    """Lets run.compile step run here; returns the tapes that were made."""
    tapes: list[Tape] = []

    def recorder(device: torch.device) -> Tape:
        tapes.append(Tape(device))
        return tapes[-1]

    monkeypatch.setattr(build_module, "choose_compile", lambda wanted, device: (str(wanted).lower(), "a test"))
    monkeypatch.setattr(step_module, "recorder_for", recorder)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return tapes


def trained(recipe, bad: int | None = None) -> Path:
    """A run's folder; ``bad``: the step whose soft labels are no numbers."""
    (job,) = jobs_of(recipe)
    trainer = Trainer(build(job.recipe), job.folder, Path(recipe.run.dir) / recipe.name / "recall", lambda line: None)
    take = trainer.stepper.take

    def watched(batch, soft, **its):
        if its["where"].step == bad:
            soft = SoftTargets(soft.logits_BC * float("nan"), soft.class_counts, soft.names)
        return take(batch, soft, **its)

    trainer.stepper.take = watched  # type: ignore[method-assign]
    trainer.fit()
    return job.folder


def left_by(folder: Path) -> tuple[list, dict]:
    """What training computed of a run's log, and its last checkpoint without times."""
    told = ("kind", "epoch", "step", "index", "lr", "loss", "primary", "accuracy", "aux", "cosine")
    lines = [
        {k: v for k, v in line.items() if k.split("/")[0] in told}
        for kind in ("step", "eval", "left out")
        for line in read_lines(folder, kind)
    ]
    state = checkpoint.load(folder / "checkpoints/last.pt")
    return lines, {k: v for k, v in state.items() if k not in ("times", "log_bytes", "recipe")}


def same(a, b) -> bool:
    """Whether two checkpoints hold the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


SMALL = (
    "--data.labelled",
    "88",
    "--data.size",
    "12",
    "--data.stored",
    "12",
    "--data.batch",
    "20",
    "--run.log_every",
    "3",
)
VARIANTS = {
    "recalled, ema, clip, skip": ("--optim.ema", "0.9", "--optim.clip_norm", "1", "--run.skip_nonfinite", "1"),
    "live": ("--transfer.recall", "false", "--optim.schedule", "cosine"),
    "top-k, two rates, cosines": (
        *("--transfer.recall_top", "5", "--optim.backbone_lr", "0.5", "--run.cosine_every", "3"),
        *("--transfer.module", "true"),
    ),
    "scratch, no momentum": ("--method.name", "scratch", "--optim.momentum", "0", "--optim.ema", "0.9"),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_recorded_run_is_the_eager_run(smoke, taped, variant):
    """Log, weights, momentum, moving average and sums, over epochs whose last batch is short."""
    common = (*SMALL, *variant)
    folders = [trained(smoke(*common, "--name", how, "--run.compile", how)) for how in ("off", "step")]
    (eager, eager_state), (ours, our_state) = map(left_by, folders)
    assert ours == eager
    assert {k for k in eager_state if not same(eager_state[k], our_state[k])} == set()
    (tape,) = taped
    others = {0, 4, 9} | (set(range(0, 10, 3)) if "--run.cosine_every" in variant else set())  # first, short, measured
    assert (our_state["position"]["step"], tape.recorded, tape.warmed) == (10, 1, WARM_UP)
    assert tape.replayed == 10 - len(others) - WARM_UP


def test_a_step_that_is_not_finite_is_left_out(smoke, taped):
    """And heard of later; batch norms are put back, and it is not counted."""
    common = (*SMALL, "--run.skip_nonfinite", "1", "--run.log_every", "1")
    folders = [trained(smoke(*common, "--name", how, "--run.compile", how), bad=5) for how in ("off", "step")]
    (eager, eager_state), (ours, our_state) = map(left_by, folders)
    assert taped[0].replayed > 4
    assert sum("index" in line for line in ours) == 1
    assert ours == eager
    assert {k for k in eager_state if not same(eager_state[k], our_state[k])} == set()


def test_one_too_many_stops_with_the_weights_before_it(smoke, taped):
    folders = []
    for how in ("off", "step"):
        recipe = smoke(*SMALL, "--run.checkpoint_steps", "1", "--name", how, "--run.compile", how)
        with pytest.raises(ValueError, match=r"the gradient is not finite at step 6 "):
            trained(recipe, bad=5)
        (job,) = jobs_of(recipe)
        folders.append(job.folder)
    states = [checkpoint.load(folder / "checkpoints/last.pt") for folder in folders]
    assert [s["position"]["step"] for s in states] == [5, 5]
    assert same(states[0]["target"], states[1]["target"]) and same(states[0]["optimisers"], states[1]["optimisers"])


class Stopped(BaseException):
    """Stands for a kill."""


def test_goes_on_in_mid_epoch_on_the_same_curve(smoke, taped):
    """A checkpoint knows nothing of what was recorded."""
    common = (
        *SMALL,
        "--run.log_every",
        "1",
        "--run.checkpoint_steps",
        "2",
        "--optim.epochs",
        "3",
        "--optim.ema",
        "0.9",
    )
    whole = left_by(trained(smoke(*common, "--name", "whole", "--run.compile", "off")))
    (job,) = jobs_of(smoke(*common, "--name", "stopped", "--run.compile", "step"))
    seen: list[dict] = []

    def stop(line: dict) -> None:
        seen.append(line)
        if sum(its["kind"] == "step" for its in seen) == 7:
            raise Stopped

    with pytest.raises(Stopped):
        Trainer(build(job.recipe), job.folder, Path(job.recipe.run.dir) / "stopped" / "recall", stop).fit()
    ended = left_by(trained(job.recipe))
    assert ended[0] == whole[0] and same(ended[1], whole[1])
    assert [tape.recorded for tape in taped] == [1, 1]


def scalars(pixels, targets, soft):
    """A step that returns its inputs' sums."""
    sums = {"pixels": pixels.sum(dtype=torch.float32), "targets": targets.sum(dtype=torch.float32)}
    if soft is not None:
        its = soft.target_BC
        sums["soft"] = (its.value_BK * its.index_BK).sum() if isinstance(its, TopK) else its.sum()
    return sums, torch.isfinite(sums["pixels"])


def given(k: int, batch: int = 4, form: str = "logits"):
    """Inputs that differ from step to step."""
    soft = None
    if form == "logits":
        soft = SoftTargets(torch.full((batch, 3), float(k)), (3,), ("a",))
    elif form == "top":
        soft = SoftTargets(TopK(torch.full((batch, 2), float(k)), torch.arange(2).repeat(batch, 1), (2,)), (3,), ("a",))
    return torch.full((batch, 3, 2, 2), k, dtype=torch.uint8), torch.full((batch,), 10 * k), soft


@pytest.mark.parametrize("form", ["logits", "top", "none"])
def test_every_call_is_a_step_of_its_own_inputs(form):
    tape, done = Tape(), []
    graph = StepGraph(lambda *inputs: done.append(inputs) or scalars(*inputs), tape)
    for k in range(8):
        inputs = given(k, form=form)
        found = {name: float(value) for name, value in graph(*inputs)[0].items()}
        assert found == {name: float(value) for name, value in scalars(*inputs)[0].items()}
        for values in inputs[:2]:  # what the loader does with its memory afterwards is its own affair
            values.fill_(77)
    assert len(done) == WARM_UP + 1 and graph.replays == 8 - WARM_UP
    assert len({inputs[0].data_ptr() for inputs in done}) == 1


def test_another_shape_is_recorded_anew():
    tape = Tape()
    graph = StepGraph(scalars, tape)
    for batch in (4, 6):
        for k in range(WARM_UP + 2):
            assert float(graph(*given(k, batch))[0]["targets"]) == batch * 10 * k
    assert tape.recorded == 2 and tape.warmed == 2 * WARM_UP


def test_what_reads_a_number_is_not_recorded():
    graph = StepGraph(lambda pixels, *_: ({"loss": pixels.sum() * float(pixels.sum())}, pixels.any()), Tape())
    for k in range(WARM_UP):
        graph(*given(k))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        graph(*given(5))


def test_what_cannot_be_recorded_is_refused(smoke, monkeypatch):
    with pytest.raises(ValueError, match=r"^run\.compile: step needs a CUDA device$"):
        choose_compile("step", torch.device("cpu"))
    assert choose_compile("step", torch.device("cuda"))[0] == "step"
    check_step(smoke(), torch.bfloat16)
    for how, said in (
        (("--run.accumulate", "2"), r"run\.accumulate 2 parts"),
        (("--optim.impl", "apex"), r"not optim\.impl apex"),
        (("--run.cosine_every", "1"), r"run\.cosine_every 1"),
    ):
        with pytest.raises(ValueError, match=r"^run\.compile: step .*" + said):
            check_step(smoke(*how), torch.bfloat16)
    with pytest.raises(ValueError, match=r"run\.precision to bf16"):
        check_step(smoke(), torch.float16)
    monkeypatch.setattr(ranks, "_HERE", ranks.Ranks(count=2))
    with pytest.raises(ValueError, match="here are 2"):
        check_step(smoke(), torch.bfloat16)
