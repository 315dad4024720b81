"""The learning rate against torch's own schedulers, and the moving average."""

import subprocess
import sys
import types

import pytest
import torch
from torch.optim import SGD, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fasttrain.optim import Schedule, build_average, build_optimiser
from fasttrain.recipe import Optim


def theirs(make, steps: int, lr: float = 0.3) -> list[float]:
    optimiser = SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimiser)
    out = []
    for _ in range(steps):
        out.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return out


def ours(steps: int, **fields) -> list[float]:
    schedule = Schedule(Optim(lr=0.3, epochs=10, **fields), 7)
    return [schedule.lr(s) for s in range(steps)]


def test_one_cycle():
    expected = theirs(lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=70, cycle_momentum=False), 69)
    assert ours(69, schedule="onecycle") == pytest.approx(expected, rel=1e-9)


def test_cosine():
    expected = theirs(lambda o: lr_scheduler.CosineAnnealingLR(o, 70), 70)
    assert ours(70, schedule="cosine") == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_steps():
    expected = theirs(lambda o: lr_scheduler.MultiStepLR(o, [3 * 7, 8 * 7], 0.2), 70)
    assert ours(70, schedule="step", milestones=[3, 8]) == pytest.approx(expected)


def test_constant_and_warm_up():
    assert ours(70, schedule="constant") == [0.3] * 70
    rising = ours(70, schedule="constant", warmup_epochs=2)
    assert rising[:3] == pytest.approx([0.3 / 14, 0.6 / 14, 0.9 / 14])
    assert rising[13:] == [0.3] * 57
    cosine = ours(70, schedule="cosine", warmup_epochs=2)
    assert max(cosine) == pytest.approx(0.3) and cosine.index(max(cosine)) in (13, 14)


def test_plateau():
    losses = [1.0, 0.9, 0.95, 0.95, 0.95, 0.8, 0.9, 0.9, 0.9, 0.9]
    optimiser = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.2, patience=2)
    schedule = Schedule(Optim(lr=0.3, epochs=10, schedule="plateau", gamma=0.2, patience=2), 7)
    restored = Schedule(schedule.spec, 7)
    for loss in losses:
        scheduler.step(loss)
        restored.load_state_dict(schedule.state_dict())
        schedule.heard(loss)
        restored.heard(loss)
        assert schedule.lr(0) == restored.lr(0) == pytest.approx(optimiser.param_groups[0]["lr"])
    assert schedule.lr(0) == pytest.approx(0.3 * 0.2**2)


def test_the_optimiser_is_the_papers_sgd():
    network = torch.nn.Linear(3, 2)
    optimiser = build_optimiser(Optim(nesterov=True, dampening=0.0), network)
    group = optimiser.param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["nesterov"], group["fused"]) == (0.9, 5e-4, True, True)
    assert len(group["params"]) == 2


def test_moving_average():
    network = torch.nn.Linear(2, 2, bias=False)
    average = build_average(Optim(ema=0.9), network)
    expected = network.weight.detach().clone()
    for step in range(4):
        with torch.no_grad():
            network.weight += 1
        average.update_parameters(network)
        expected = network.weight.detach().clone() if step == 0 else 0.9 * expected + 0.1 * network.weight.detach()
    assert torch.allclose(average.module.weight, expected)
    assert build_average(Optim(), network) is None


def test_moving_average_is_torchs():
    """Statistics and counters of batch norms too, to the last bit; its state is torch's."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    ours = build_average(Optim(ema=0.9), network)
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        network(torch.randn(2, 3, 8, 8))
        with torch.no_grad():
            network[0].weight.mul_(1.5)
        for average in (ours, theirs):
            average.update_parameters(network)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_apex_that_is_not_there(monkeypatch):
    """Also PyPI's package of that name, which is something else."""
    for modules in ({"apex": None}, {"apex": types.ModuleType("apex"), "apex.optimizers": None}):
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        with pytest.raises(ValueError, match=r"optim\.impl: apex cannot be used .*PyPI's is something else"):
            build_optimiser(Optim(impl="apex"), torch.nn.Linear(2, 2))


def test_apex_needs_a_gpu(monkeypatch):
    stub = types.ModuleType("apex.optimizers")
    stub.FusedSGD = torch.optim.SGD
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", stub)
    with pytest.raises(ValueError, match="apex's FusedSGD needs a CUDA device"):
        build_optimiser(Optim(impl="apex"), torch.nn.Linear(2, 2))


def test_memory_is_kept():
    """Many large tensors, made and freed again and again: after the first time no page is asked for."""
    code = (
        "import resource, sys, torch; from fasttrain.device import keep_memory\n"
        "if sys.argv[1] == 'kept': assert keep_memory()\n"
        "def once(): [torch.ones(2**22) for _ in range(10)]\n"
        "once(); once()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(5): once()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    faults = {
        how: int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "not")
    }
    assert faults["kept"] < faults["not"] / 10
