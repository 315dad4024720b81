"""The soft-target losses against a float64 formula written out on its own."""

import numpy as np
import pytest
import torch
from fasttrain.kernels import soft_target_loss
from fasttrain.kernels.reference import soft_target_loss as reference
from hypothesis import given, settings
from hypothesis import strategies as st


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def formula(student: np.ndarray, target: np.ndarray, counts, kind: str, temperatures, reduction: str) -> list[float]:
    """Eq. (2) and (3) of the paper in float64, times T^2, the mean over the batch."""
    out, start = [], 0
    for count, t in zip(counts, temperatures, strict=True):
        p = softmax(target[:, start : start + count].astype(np.float64) / t)
        q = softmax(student[:, start : start + count].astype(np.float64) / t)
        value = -(p * np.log(q)).sum() if kind == "ce" else (p * (np.log(p) - np.log(q))).sum()
        out.append(t * t * value / len(student) / (count if reduction == "mean" else 1))
        start += count
    return out


@given(
    batch=st.integers(1, 40),
    counts=st.lists(st.integers(2, 120), min_size=1, max_size=4),
    kind=st.sampled_from(["ce", "kd"]),
    reduction=st.sampled_from(["batchmean", "mean"]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_values(batch, counts, kind, reduction, seed, data):
    temperatures = data.draw(st.lists(st.floats(0.5, 20), min_size=len(counts), max_size=len(counts)))
    rng = np.random.default_rng(seed)
    student, target = (rng.normal(0, 3, (batch, sum(counts))).astype(np.float32) for _ in range(2))
    ours = reference(
        torch.from_numpy(student),
        torch.from_numpy(target),
        counts,
        kind=kind,
        temperature=temperatures,
        reduction=reduction,
    )
    theirs = formula(student, target, counts, kind, temperatures, reduction)
    # KL is a difference of two sums of the size of ce's: that is the scale of its rounding; a logarithm near 0 has
    # that of 1
    scale = np.array(formula(student, target, counts, "ce", temperatures, reduction))
    assert (np.abs(ours.numpy() - theirs) <= 2e-6 * scale + 1e-7 * np.square(temperatures)).all()


def test_gradient_is_what_the_formula_says():
    """d/ds = T * (softmax(s/T) - softmax(t/T)) / B, in float64 from numpy."""
    torch.manual_seed(1)
    student = torch.randn(6, 30, requires_grad=True)
    target = torch.randn(6, 30)
    for kind in ("ce", "kd"):
        student.grad = None
        soft_target_loss(student, target, [10, 20], kind=kind, temperature=[2.0, 0.7]).sum().backward()
        for start, count, t in ((0, 10, 2.0), (10, 20, 0.7)):
            part = slice(start, start + count)
            s, y = (x.detach().numpy()[:, part].astype(np.float64) / t for x in (student, target))
            assert np.abs(student.grad.numpy()[:, part] - t * (softmax(s) - softmax(y)) / 6).max() < 1e-7


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_ce_and_kd_have_equal_gradients_and_differ_by_the_entropy(temperature):
    student = torch.randn(8, 50, dtype=torch.float32)
    target = torch.randn(8, 50) * 3
    gradients, values = [], []
    for kind in ("ce", "kd"):
        s = student.clone().requires_grad_()
        loss = soft_target_loss(s, target, [50], kind=kind, temperature=temperature)
        loss.sum().backward()
        gradients.append(s.grad)
        values.append(loss.item())
    assert torch.allclose(*gradients, atol=1e-7, rtol=1e-5)
    p = torch.softmax(target.double() / temperature, dim=1)
    entropy = -(p * p.log()).sum(1).mean() * temperature**2
    assert values[0] - values[1] == pytest.approx(float(entropy), rel=1e-5)


def test_the_published_reduction_divides_by_the_classes():
    student, target = torch.randn(4, 15), torch.randn(4, 15)
    whole = soft_target_loss(student, target, [5, 10], kind="kd")
    assert torch.allclose(
        soft_target_loss(student, target, [5, 10], kind="kd", reduction="mean"), whole / torch.tensor([5, 10])
    )
    theirs = torch.nn.KLDivLoss()(student[:, :5].log_softmax(1), target[:, :5].softmax(1))
    assert torch.allclose(soft_target_loss(student, target, [5, 10], kind="kd", reduction="mean")[0], theirs)


def test_computed_in_float32_whatever_comes_in():
    student, target = torch.randn(16, 40).bfloat16(), torch.randn(16, 40).half()
    loss = soft_target_loss(student, target, [40])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, soft_target_loss(student.float(), target.float(), [40]))
    leaf = student.clone().requires_grad_()
    soft_target_loss(leaf, target, [40]).sum().backward()
    assert leaf.grad.dtype == torch.bfloat16


def test_extreme_logits_and_impossible_classes():
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
    target = torch.tensor([[1e4, -1e4, 0.0], [0.0, -torch.inf, 0.0]])
    for kind in ("ce", "kd"):
        assert torch.isfinite(soft_target_loss(student, target, [3], kind=kind)).all()
    ruled_out = torch.tensor([[0.0, -torch.inf, 0.0]])
    assert float(soft_target_loss(ruled_out, ruled_out, [3], kind="kd")) == pytest.approx(0)
    assert float(soft_target_loss(ruled_out, torch.zeros(1, 3), [3])) == torch.inf


def test_not_a_number_stays_one():
    student, target = torch.randn(3, 6), torch.randn(3, 6)
    student[1, 2] = torch.nan
    out = soft_target_loss(student, target, [4, 2])
    assert out.isnan().tolist() == [True, False]


def test_no_gradient_into_the_sources():
    target = torch.randn(3, 6, requires_grad=True)
    soft_target_loss(torch.randn(3, 6, requires_grad=True), target, [6]).sum().backward()
    assert target.grad is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_BC": torch.zeros(2, 5)}, "one shape are needed, not [2, 6] and [2, 5]"),
        ({"class_counts": [3, 4]}, "class counts [3, 4] do not add up to the 6 logits"),
        ({"class_counts": []}, "do not add up"),
        ({"temperature": 0.0}, "temperatures must be above 0"),
        ({"temperature": [1.0, -1.0]}, "temperatures must be above 0"),
        ({"temperature": [1.0]}, "one or 2 of them"),
        ({"kind": "mse"}, "kind is ce or kd, not 'mse'"),
        ({"reduction": "sum"}, "reduction is batchmean or mean, not 'sum'"),
        ({"target_BC": torch.zeros(2, 6, device="meta")}, "two devices: cpu and meta"),
    ],
)
def test_mistakes(changes, message):
    arguments = {
        "student_logits_BC": torch.zeros(2, 6),
        "target_BC": torch.zeros(2, 6),
        "class_counts": [2, 4],
    } | changes
    with pytest.raises(ValueError) as error:
        soft_target_loss(**arguments)
    assert message in str(error.value)
