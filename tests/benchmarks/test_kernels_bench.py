"""The kernels' suite: rows that move memory in groups, and goals as far as they were measured."""

import pytest
import torch
from fasttrain.benchmarks import kernels


def row(name: str, ms: float, busy_ms: float, launches: int = 5) -> dict:
    return {"name": f"{name} C=1365", "ms": ms, "busy_ms": busy_ms, "floor_ms": 0.016, "launches": launches}


def test_goals_are_of_what_was_measured():
    rows = [row("fasttrain, B=8192", 0.1, 0.02), row("eager, B=8192", 0.3, 0.2), row("compiled, B=8192", 0.2, 0.02)]
    goals = {goal["name"]: (round(goal["measured"], 3), goal["held"]) for goal in kernels.goals_of(rows)}
    assert goals == {
        "B=8192: share of the copy bandwidth by ms, 0.8 at least": (0.16, False),
        "B=8192: share of the copy bandwidth by busy_ms, 0.8 at least": (0.8, True),
        "B=8192: ms of eager over fasttrain's, 4 at least": (3.0, False),
        "B=8192: busy_ms of eager over fasttrain's, 4 at least": (10.0, True),
        "B=8192: ms of compiled over fasttrain's, 1.3 at least": (2.0, True),
        "B=8192: busy_ms of compiled over fasttrain's, 1.3 at least": (1.0, False),
    }
    goals = kernels.goals_of([row("fasttrain, B=512", 0.1, 0.02), row("compiled, B=512", 0.2, 0.01)])
    assert [(goal["measured"], goal["held"]) for goal in goals] == [(3, True), (2.0, True), (0.5, False)]
    assert kernels.goals_of([row("fasttrain, B=256", 0.1, 0.02)]) == []


def test_rows_in_groups_have_the_gradient_of_the_others(need, monkeypatch):
    """Of padded rows, too. Their steps are the suite's own."""
    need("triton")
    found = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *given: found.append(grad(*given)) or found[-1])
    data = [[torch.randn(8, 29) * 3 for _ in range(2)]]
    data[0][0].requires_grad_()
    steps = kernels._in_groups((20, 9), data)
    assert list(steps) == ["fasttrain, in groups", "fasttrain, in groups, padded rows"]
    steps["eager"] = kernels._step(kernels.eager((20, 9)), data)
    for step in steps.values():
        step(0)
    groups, padded, eager = (gradient for (gradient,) in found)
    assert groups.stride() == (29, 1) and padded.stride() == (32, 1)
    torch.testing.assert_close(groups, eager, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(padded, eager, rtol=1e-4, atol=1e-6)


def test_mistakes():
    with pytest.raises(ValueError, match="numbers must be above 0"):
        kernels.run(["--batch", "0"])
