"""On a CUDA device: a gradient that is not finite is left out on the device, and heard of later; checkpoints while it trains.

What is tested takes the device as an argument, and so can be tried on a CPU.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fasttrain import checkpoint
from fasttrain.build import build
from fasttrain.compare import jobs_of
from fasttrain.guard import FiniteGuard, Where
from fasttrain.log import read_lines
from fasttrain.optim import build_optimiser
from fasttrain.recipe import Optim
from fasttrain.trainer import Trainer
from fasttrain.writer import CheckpointWriter

pytestmark = pytest.mark.gpu
BAD = 3  # the step whose gradient is not finite
HEARD_BY = BAD + 5  # a GPU's host hears of it so many steps later at most
SPEC = Optim(lr=0.1, momentum=0.9, weight_decay=5e-4)


def state_of(network: nn.Module, optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of the weights and of their momentum."""
    momentum = [its["momentum_buffer"] for its in optimiser.state.values()]
    return [value.detach().clone() for value in (*network.parameters(), *momentum)]


def guarded_steps(
    device: str, count: int, bad: int | None, first: int = 0
) -> tuple[list[list[Tensor]], list[tuple[int, int, int]]]:
    """States after each of the steps ``first`` .. ``count`` - 1; and of each step that was left out its number, how many there
    have been, and at which step the host heard of it. Nothing waits for the device in between."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)).to(device)
    images = [torch.randn(16, 20, device=device) for _ in range(count)]
    optimiser, heard, states, now = build_optimiser(SPEC, network), [], [], 0
    guard = FiniteGuard(
        torch.device(device),
        allowed=1,
        tell=lambda where, so_far, late: heard.append((where.step, so_far, now)),
        stop=lambda where: ValueError(f"step {where.step}"),
    )
    for now in range(first, count):
        loss = network(images[now]).square().mean()
        (loss * float("inf") if now == bad else loss).backward()
        guard.step(optimiser, torch.nn.utils.get_total_norm([p.grad for p in network.parameters()]), Where(now, 0, now))
        optimiser.zero_grad()
        states.append(state_of(network, optimiser))
    guard.settle()
    assert guard.left_out == len(heard)
    return states, heard


def leaves_out_the_step(device: str) -> None:
    states, heard = guarded_steps(device, 10, BAD)
    assert [told[:2] for told in heard] == [(BAD, 1)] and heard[0][2] <= HEARD_BY
    assert all(torch.equal(a, b) for a, b in zip(states[BAD], states[BAD - 1], strict=True))
    assert all(bool(torch.isfinite(value).all()) for state in states for value in state)
    assert not any(torch.equal(a, b) for a, b in zip(states[BAD + 1], states[BAD], strict=True))
    clean, heard = guarded_steps(device, 10, None)
    assert heard == []
    assert all(torch.equal(a, b) for a, b in zip(clean[BAD - 1], states[BAD - 1], strict=True))


def leaves_out_the_first_step(device: str) -> None:
    """No momentum is made of it, either: what follows is as if it had never been."""
    junk = [torch.full((size,), float("nan"), device=device) for size in (600, 30, 150, 5) for _ in range(100)]
    del junk  # what lies in memory that is not written
    states, heard = guarded_steps(device, 4, 0)
    assert [told[:2] for told in heard] == [(0, 1)]
    without, heard = guarded_steps(device, 4, None, first=1)
    assert heard == [] and len(states[1:]) == len(without)
    for after, its in zip(states[1:], without, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(after, its, strict=True))


def stops_at_one_too_many(device: str) -> None:
    """The weights are those before it, although the host went on for some steps."""
    weight = nn.Parameter(torch.ones(8, device=device))
    optimiser = build_optimiser(SPEC, nn.ParameterList([weight]))
    guard = FiniteGuard(
        torch.device(device),
        allowed=0,
        tell=lambda where, so_far, late: pytest.fail("none is allowed"),
        stop=lambda where: ValueError(f"step {where.step}"),
    )
    with pytest.raises(ValueError, match=r"^step 0$"):
        for step in range(20):
            weight.grad = torch.full_like(weight, float("nan"))
            guard.step(optimiser, weight.grad.norm(), Where(step, 0, step))
    assert torch.equal(weight.detach().cpu(), torch.ones(8))


def takes_statistics_back(smoke, device: str) -> None:
    """A run with one bad step: batch norms, too, are as before it; it is told, counted, and the training goes on."""
    recipe = smoke(
        "--run.device", device, "--run.precision", "fp32", "--run.compile", "false", "--method.name", "scratch"
    )
    recipe.run.skip_nonfinite, recipe.run.log_every, recipe.optim.epochs = 1, 1, 3
    (job,) = jobs_of(recipe)
    told: list[dict] = []
    trainer = Trainer(build(job.recipe), job.folder, Path(recipe.run.dir) / "recall", told.append)
    take, states = trainer.stepper.take, []

    def watched(batch, soft, **its):
        norms = [b for name, b in trainer.target.named_buffers() if "running" in name or "tracked" in name]
        before = [v.detach().clone() for v in (*trainer.target.parameters(), *norms)]
        bad = its["where"].step == BAD
        hook = trainer.target.get_parameter("head.weight").register_hook(lambda g: g * float("nan")) if bad else None
        out = take(batch, soft, **its)
        if hook is not None:
            hook.remove()
        after = (*trainer.target.parameters(), *norms)
        states.append([torch.equal(a, b) for a, b in zip(before, after, strict=True)])
        return out

    trainer.stepper.take = watched  # type: ignore[method-assign]
    summary = trainer.fit()
    assert all(states[BAD]) and not any(all(same) for step, same in enumerate(states) if step != BAD)
    assert summary["left_out_steps"] == 1 and len(states) > HEARD_BY
    (line,) = read_lines(job.folder, "left out")
    assert line["step"] == BAD + 1 and 0 < len(line["index"]) <= recipe.data.batch
    assert any("LEFT OUT: the gradient of step 4 was not finite (1 of 1" in str(its.get("text")) for its in told)
    kept = checkpoint.load(job.folder / "checkpoints/last.pt")
    assert kept["left_out"] == 1 and all(bool(torch.isfinite(v).all()) for v in kept["target"].values())


def writes_the_state_at_the_call(folder: Path, device: str) -> None:
    """Steps are taken before, between and after two calls, with nothing that waits for the device."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.AdaptiveAvgPool2d(1))
    network = network.to(device, memory_format=torch.channels_last)
    images = torch.randn(64, 3, 32, 32, device=device)
    optimiser = build_optimiser(SPEC, network)
    writer = CheckpointWriter(folder, keep=3, report=pytest.fail)

    def state(step: int) -> dict:
        return {"target": network.state_dict(), "optimiser": optimiser.state_dict(), "position": {"step": step}}

    expected = {}
    try:
        for step in range(12):
            network(images).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
            if step in (4, 9):
                if step == 9:
                    writer.wait()
                writer.save("last.pt", state(step))
                expected[step] = [value.detach().clone() for value in network.state_dict().values()]
                expected[step] += [its["momentum_buffer"].clone() for its in optimiser.state.values()]
        writer.wait()
    finally:
        writer.close()
    for step, name in ((4, "step-000000004.pt"), (9, "last.pt")):
        found = checkpoint.load(folder / name)
        values = [*found["target"].values(), *(its["momentum_buffer"] for its in found["optimiser"]["state"].values())]
        assert found["position"]["step"] == step and len(values) == len(expected[step])
        for value, wanted in zip(values, expected[step], strict=True):
            assert torch.equal(value, wanted.cpu()) and value.stride() == wanted.stride()


def test_a_step_is_left_out_on_the_device():
    leaves_out_the_step("cuda")


def test_the_first_step_is_left_out():
    leaves_out_the_first_step("cuda")


def test_one_too_many_stops():
    stops_at_one_too_many("cuda")


def test_batch_norms_are_put_back(smoke):
    takes_statistics_back(smoke, "cuda")


def test_a_checkpoint_is_of_its_moment_while_training_goes_on(tmp_path):
    writes_the_state_at_the_call(tmp_path, "cuda")
