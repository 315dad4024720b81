"""On a CUDA device: run.compile step. One graph a step, no waiting, the same training as step by step.

What is tested takes the device and so can be tried on a CPU, with the recorder of tests/fasttrain/tape.py.
"""

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from fasttrain.kernels import network_input
from torch import nn

from fasttrain import checkpoint
from fasttrain.build import build
from fasttrain.compare import jobs_of
from fasttrain.log import read_lines
from fasttrain.recipe import Recipe
from fasttrain.step_graph import WARM_UP, CudaRecorder, StepGraph
from fasttrain.trainer import Trainer

pytestmark = pytest.mark.gpu
FIRST = 1 + WARM_UP + 1  # steps until one is replayed
FEW = 32  # kernels and copies of a step outside its graph: loader, labels, inputs, rate, random state, flag, sums
COMMON = ("--data.labelled", "88", "--data.batch", "20", "--run.log_every", "1", "--optim.ema", "0.9")


def trainer_of(recipe: Recipe, *, compiled: bool = False) -> Trainer:
    """With Inductor's kernels only where asked for: it takes most of a minute for each network."""
    (job,) = jobs_of(recipe)
    folder = Path(recipe.run.dir) / recipe.name / "recall"
    trainer = Trainer(build(job.recipe), job.folder, folder, lambda line: None)
    if not compiled:
        trainer.stepper.losses = trainer.stepper._losses
    return trainer


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder, "step")]


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """The same kernels every time, and all digits of float32."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def trains_alike(smoke, device: str, *how: str) -> None:
    """In float32, with and without: losses of all steps, weights and moving average; rates in checkpoints are numbers."""
    folders = []
    for compile_ in ("false", "step"):
        recipe = smoke(*COMMON, *how, "--run.device", device, "--run.precision", "fp32", "--run.compile", compile_,
                       "--name", compile_, "--optim.lr", "0.01", "--optim.clip_norm", "5")  # fmt: skip
        trainer = trainer_of(recipe)
        trainer.fit()
        folders.append(trainer.folder)
        if trainer.stepper.graph is not None:  # but for the first, and two epochs' last batches, which are short
            assert trainer.stepper.graph.replays == 10 - 1 - WARM_UP - 2
    plain, ours = (losses_of(folder) for folder in folders)
    assert len(plain) == 10 and plain == pytest.approx(ours, rel=1e-4)
    assert plain[:FIRST] == pytest.approx(ours[:FIRST], rel=1e-6)
    states = [checkpoint.load(folder / "checkpoints/last.pt") for folder in folders]
    for name in ("target", "average"):
        for key, value in states[0][name].items():
            assert torch.allclose(value.double(), states[1][name][key].double(), rtol=1e-3, atol=1e-4), key
    rates = [[group["lr"] for group in state["optimisers"][0]["param_groups"]] for state in states]
    assert rates[0] == rates[1] and all(isinstance(rate, float) for rate in rates[1])


class Stopped(BaseException):
    """Stands for a kill."""


def goes_on(smoke, device: str) -> None:
    """Stopped in the middle of the second epoch, after the checkpoint of step 6."""
    how = ("--run.device", device, "--run.precision", "fp32", "--run.compile", "step", "--run.checkpoint_steps", "2")
    whole = trainer_of(smoke(*COMMON, *how, "--optim.lr", "0.01", "--name", "whole"))
    whole.fit()
    recipe = smoke(*COMMON, *how, "--optim.lr", "0.01", "--name", "stopped")
    stopped = trainer_of(recipe)
    write = stopped.log.write

    def stop(line: dict) -> None:
        write(line)
        if line["kind"] == "step" and line["step"] == 7:
            raise Stopped

    stopped.log.write = stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        stopped.fit()
    again = trainer_of(recipe)
    assert again.step == 6
    again.fit()
    assert losses_of(again.folder) == pytest.approx(losses_of(whole.folder), rel=1e-5)


def leaves_out_a_step(smoke, device: str) -> None:
    """Labels of step 6 that are no numbers: the weights never see it, the host hears of it, and the rest is learned."""
    recipe = smoke(*COMMON, "--run.device", device, "--run.precision", "fp32", "--run.compile", "step",
                   "--run.skip_nonfinite", "1", "--optim.lr", "0.01")  # fmt: skip
    trainer = trainer_of(recipe)
    take, states = trainer.stepper.take, []

    def watched(batch, soft, **its):
        if its["where"].step == 5:
            soft = type(soft)(soft.logits_BC * float("nan"), soft.class_counts, soft.names)
        out = take(batch, soft, **its)
        states.append([v.detach().clone() for v in trainer.target.state_dict().values()])
        return out

    trainer.stepper.take = watched  # type: ignore[method-assign]
    summary = trainer.fit()
    assert trainer.stepper.graph is not None and trainer.stepper.graph.replays >= 4
    assert summary["left_out_steps"] == 1 and all(bool(v.isfinite().all()) for state in states for v in state)
    (line,) = read_lines(trainer.folder, "left out")
    assert line["step"] == 6
    unchanged = [all(map(torch.equal, a, b)) for a, b in itertools.pairwise(states)]
    assert [step for step, same in enumerate(unchanged) if same] == [4]
    assert [line["step"] for line in read_lines(trainer.folder, "step") if "loss" not in line] == [6]


def random_numbers_follow_the_seed(recorder, device: str) -> None:
    """Dropout in a replay is that of the seed that was set before it, as in a step of its own."""

    def work(pixels, targets, soft):
        x = network_input(pixels, mean, std)
        return {"sum": nn.functional.dropout(x, 0.5).square().sum()}, targets.any()

    mean, std = torch.zeros(3, device=device), torch.ones(3, device=device)
    pixels = torch.randint(1, 255, (4, 3, 8, 8), dtype=torch.uint8, device=device)
    targets = torch.ones(4, dtype=torch.int64, device=device)
    graph, expected, found = StepGraph(work, recorder), [], []
    for k in range(3 * FIRST):
        for run, out in ((work, expected), (graph, found)):
            torch.manual_seed(k // 2)
            out.append(float(run(pixels, targets, None)[0]["sum"]))
    assert found == pytest.approx(expected, rel=1e-6)
    assert found[0::2] == found[1::2] and len(set(found)) == len(found) // 2


def steps_after(trainer: Trainer, count: int):
    """Takes steps until one is replayed, and then yields after each of ``count`` more."""
    trainer.target.train()
    taken = 0
    while True:
        for ready in trainer._ahead():
            trainer._take_step(ready)
            trainer.step += 1
            taken += 1
            if taken > 3 * FIRST:
                yield
            if taken == 3 * FIRST + count:
                return


@pytest.mark.parametrize(
    "how", [(), ("--transfer.recall", "false", "--transfer.bank", "folded"), ("--method.name", "scratch")]
)
def test_the_same_training(smoke, how):
    trains_alike(smoke, "cuda", *how)


def test_going_on_in_mid_epoch(smoke):
    goes_on(smoke, "cuda")


def test_a_step_is_left_out(smoke):
    leaves_out_a_step(smoke, "cuda")


def test_random_numbers():
    random_numbers_follow_the_seed(CudaRecorder(torch.device("cuda")), "cuda")


def test_the_compiled_and_recorded_step_learns(smoke):
    """In the type of the GPU's choice, with Inductor's kernels in the graph."""
    trainer = trainer_of(
        smoke("--run.compile", "step", "--optim.epochs", "12", "--transfer.module", "true"), compiled=True
    )
    assert trainer.fit()["test"]["accuracy"] > 80
    assert trainer.stepper.graph is not None and trainer.stepper.graph.replays > 12


def test_a_steady_step_is_one_graph(smoke):
    """And a few kernels and copies beside it; it needs no new memory."""
    trainer = trainer_of(smoke(*COMMON, "--run.compile", "step", "--data.drop_last", "true"))
    steps, count = steps_after(trainer, 21), 20
    next(steps)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(count):
            next(steps)
        torch.cuda.synchronize()
    calls = Counter(event.name for event in profiler.events() if event.name.startswith(("cuda", "cu")))
    launched = sum(
        number for name, number in calls.items() if "LaunchKernel" in name or "Memcpy" in name or "Memset" in name
    )
    assert calls["cudaGraphLaunch"] == count, calls
    assert launched <= FEW * count, calls
    assert torch.cuda.memory_reserved() <= before + 2**21


def test_nothing_waits(smoke):
    """PyTorch raises where the host would wait for the device."""
    trainer = trainer_of(smoke(*COMMON, "--run.compile", "step", "--data.drop_last", "true", "--optim.clip_norm", "1"))
    steps = steps_after(trainer, 12)
    next(steps)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.clock.settle()
    assert trainer.clock.lately["target"] > 0
