"""Each implementation of the soft-target losses against formulas in float64, and the same mistakes refused by all.

Without a GPU the Triton kernel runs in Triton's interpreter (tests/conftest.py): its arithmetic, not its speed.
"""

import copy
import pickle

import numpy as np
import pytest
import torch
from fasttrain.kernels import Probabilities, SoftTargetLoss, TopK, soft_target_loss
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from .oracle import answer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ("reference", "triton")
FORMS = ("logits", "probabilities", "uniform", "drop")
# half a unit in the last place, of what is rounded to a type in the end; and its smallest step
ROUNDING = {torch.float32: (0.0, 0.0), torch.bfloat16: (2**-8, 0.0), torch.float16: (2**-11, 2**-25)}
TRUNCATED = 2**-7  # Triton's interpreter cuts float32 off to bfloat16; a GPU rounds


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, need) -> str:
    if request.param == "triton":
        need("triton")
    return request.param


def as_form(form: str, logits_BC: Tensor, counts, k: int = 8, dtype=torch.float16):
    """The target in one of its forms, made of logits."""
    if form == "logits":
        return logits_BC
    parts = [part.float().softmax(1) for part in logits_BC.split(list(counts), dim=1)]
    if form == "probabilities":
        return Probabilities(torch.cat(parts, dim=1).to(dtype))
    tops = [part.topk(min(k, part.shape[1]), dim=1) for part in parts]
    values = torch.cat([t.values for t in tops], dim=1).to(dtype)
    indices = torch.cat([t.indices for t in tops], dim=1).to(torch.int32)
    return TopK(values, indices, tuple(t.values.shape[1] for t in tops), form)


def on(device: str, target):
    """A target in any form, on a device."""
    if isinstance(target, TopK):
        return TopK(target.value_BK.to(device), target.index_BK.to(device), target.counts, target.remainder)
    if isinstance(target, Probabilities):
        return Probabilities(target.value_BC.to(device))
    return target.to(device)


def computed(student, target, counts, weight=None, upstream=None, **options) -> tuple[Tensor, Tensor]:
    """Losses and gradient on the CPU, with the student's memory layout kept."""
    leaf = student.to(DEVICE).detach().requires_grad_()
    weight = None if weight is None else weight.to(DEVICE)
    loss_M = soft_target_loss(leaf, on(DEVICE, target), counts, valid_B=weight, **options)
    assert loss_M.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    given_M = torch.ones(len(counts)) if upstream is None else torch.tensor(upstream)
    loss_M.backward(given_M.to(loss_M))
    assert leaf.grad is not None and leaf.grad.dtype == student.dtype
    return loss_M.detach().cpu(), leaf.grad.cpu()


def compare(ours: tuple[Tensor, Tensor], theirs, kind: str, dtype: torch.dtype, implementation: str = "") -> None:
    """Relative errors under 1e-5. Of KL and of the gradient: relative to the terms whose difference they are."""
    loss_M, grad_BC = (x.double().numpy() for x in ours)
    np.testing.assert_array_equal(np.isfinite(loss_M), np.isfinite(theirs.loss))
    with np.errstate(all="ignore"):
        floor = 1e-7 * theirs.cross_entropy if kind == "kd" else 0
        wrong = np.abs(loss_M - theirs.loss) > 1e-5 * np.abs(theirs.loss) + floor + 1e-30
    assert not wrong[np.isfinite(theirs.loss)].any(), (loss_M, theirs.loss)
    relative, step = ROUNDING[dtype]
    if dtype == torch.bfloat16 and implementation == "triton" and DEVICE == "cpu":
        relative = TRUNCATED
    limit = 1e-5 * theirs.size + relative * np.abs(theirs.grad) + step + 1e-35
    excess = np.abs(grad_BC - theirs.grad) - limit
    assert (excess <= 0).all(), (excess.max(), np.unravel_index(excess.argmax(), excess.shape))


@st.composite
def problems(draw):
    sizes = st.one_of(st.integers(2, 64), st.integers(2, 1500), st.integers(2, 22_000))
    counts = draw(st.lists(sizes, min_size=1, max_size=4))
    return {
        "counts": counts,
        "batch": min(draw(st.integers(1, 600)), max(1, 100_000 // sum(counts))),
        "form": draw(st.sampled_from(FORMS)),
        "kind": draw(st.sampled_from(["ce", "kd"])),
        "reduction": draw(st.sampled_from(["batchmean", "mean"])),
        "temperatures": draw(st.lists(st.floats(0.5, 20), min_size=len(counts), max_size=len(counts))),
        "dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        "layout": draw(st.sampled_from(["contiguous", "wider", "transposed", "expanded"])),
        "weights": draw(st.sampled_from(["none", "bool", "float"])),
        "rows": draw(st.sampled_from(["plain", "plain", "huge", "one-hot", "uniform", "ruled out", "agreeing"])),
        "k": draw(st.integers(1, 40)),
        "upstream": draw(st.sampled_from(["ones", "others"])),
        "seed": draw(st.integers(0, 10_000)),
    }


def laid_out(x_BC: Tensor, layout: str) -> Tensor:
    if layout == "wider":
        wide = x_BC.new_full((x_BC.shape[0], x_BC.shape[1] + 3), torch.nan)
        wide[:, 1:-2] = x_BC
        return wide[:, 1:-2]
    return x_BC.t().contiguous().t() if layout == "transposed" else x_BC


def with_rows(student_BC: Tensor, target_BC: Tensor, rows: str, form: str) -> tuple[Tensor, Tensor]:
    """Every other row something that breaks plain formulas."""
    odd = slice(0, None, 2)
    if rows == "huge":
        student_BC[odd] = student_BC[odd].sign() * 1e4
        target_BC[odd] = target_BC[odd].sign() * 9999.5
        target_BC[odd, 0] = 9999.25
    elif rows == "one-hot":
        target_BC[odd] = -1e4
        target_BC[odd, 0] = 1e4
    elif rows == "uniform":
        target_BC[odd] = 3.0
    elif rows == "ruled out":  # with a target of probability 0 there, and without
        student_BC[odd, -1] = -torch.inf
        target_BC[0, -1] = -torch.inf
    elif rows == "agreeing":
        student_BC[odd] = target_BC[odd] + 0.01 * student_BC[odd]
    return student_BC, target_BC


# few examples of many settings each: `pytest --hypothesis-profile=long` draws ten times as many
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(problem=problems())
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_values_and_gradients(need, implementation, problem):
    if implementation == "triton":
        need("triton")
    counts, dtype, kind = problem["counts"], problem["dtype"], problem["kind"]
    torch.manual_seed(problem["seed"])
    shape = (problem["batch"], sum(counts))
    student, logits = with_rows(torch.randn(shape) * 3, torch.randn(shape) * 3, problem["rows"], problem["form"])
    student, logits = student.to(dtype), logits.to(dtype)
    target = as_form(problem["form"], logits, counts, problem["k"])
    weight = None
    if problem["weights"] != "none":
        weight = torch.rand(len(student)) < 0.7
        assume(problem["rows"] == "plain" or problem["layout"] == "contiguous")
        student[~weight] = torch.nan  # whatever was in memory
        weight = weight if problem["weights"] == "bool" else weight * torch.rand(len(student))
    if problem["layout"] == "expanded" and problem["form"] == "logits":
        target = logits[:1].expand(shape)
    elif problem["form"] == "logits":
        target = laid_out(target, problem["layout"])
    upstream = None if problem["upstream"] == "ones" else [1.5 * 10 ** (m - 1) for m in range(len(counts))]
    options = {"kind": kind, "reduction": problem["reduction"]}
    ours = computed(
        laid_out(student, problem["layout"]),
        target,
        counts,
        weight,
        upstream,
        temperature=problem["temperatures"],
        implementation=implementation,
        **options,
    )
    theirs = answer(
        student, target, counts, temperatures=problem["temperatures"], weight=weight, upstream=upstream, **options
    )
    if implementation == "reference":  # plain formulas have plain formulas' rounding: of a logarithm near 0, and of KL
        theirs.cross_entropy = theirs.cross_entropy * 20 + 2 * np.square(problem["temperatures"])
        kind = "kd"
    compare(ours, theirs, kind, dtype, implementation)


@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize("widest", [16, 4096])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["ce", "kd"])
def test_tiles_of_any_size(rows, widest, form, kind, need):
    """However the problem is cut up: one row at a time or several, in one tile or in a loop, small sources apart."""
    need("triton")
    from fasttrain.kernels.tiles import Tiling

    in_tiles(Tiling(widest=widest, rows=rows), form, kind, (3, 70, 16))


@pytest.mark.parametrize("widest", [16, 4096])
@pytest.mark.parametrize("form", ["logits", "probabilities", "uniform"])
@pytest.mark.parametrize(
    ("counts", "layout", "dtype"),
    [
        ((3, 70, 16), "contiguous", torch.float32),
        ((3, 70, 16), "padded", torch.bfloat16),
        ((8, 64, 16), "contiguous", torch.bfloat16),
    ],
)
def test_memory_moved_in_groups(counts, layout, dtype, form, widest, need):
    """Also where groups hold elements of neighbours, which are NaN where there is room between rows."""
    need("triton")
    from fasttrain.kernels.tiles import Tiling

    in_tiles(Tiling(widest=widest, rows=4, wide=True), form, "kd", counts, layout, dtype)


def in_tiles(tiling, form: str, kind: str, counts, layout: str = "contiguous", dtype=torch.float32) -> None:
    from fasttrain.kernels import fused
    from fasttrain.kernels.problem import problem_of
    from fasttrain.kernels.tiles import groups_of

    temperatures, classes = (1.0, 2.0, 0.7), sum(counts)
    student, logits = torch.randn(8, classes) * 3, torch.randn(8, classes) * 3
    student[0, :20] = -torch.inf  # the loop's first tile holds no class
    logits[0, 3:25] = -torch.inf
    student[1, 5], logits[2, classes - 9] = -torch.inf, -torch.inf
    student, logits = student.to(dtype), logits.to(dtype)
    target = as_form(form, logits, counts, 4)
    leaf = student.to(DEVICE)
    if layout == "padded":
        leaf = leaf.new_full((8, 104), torch.nan)[:, 8 : 8 + classes].copy_(leaf)
        target = target.new_full((8, 104), torch.nan)[:, 8 : 8 + classes].copy_(target) if form == "logits" else target
    leaf.requires_grad_()
    if tiling.wide:
        dense = {"logits": target, "probabilities": getattr(target, "value_BC", None)}.get(form)
        wide, edges = groups_of(leaf, dense, counts)
        if layout == "contiguous" or form != "probabilities":
            assert wide == 16 // dtype.itemsize and edges == (counts[0] == 3)
    problem = problem_of(counts, kind, temperatures, "batchmean")
    loss_M = fused.fused(problem, leaf, on(DEVICE, target), None, None, tiling)
    (grad_BC,) = torch.autograd.grad(loss_M.sum(), leaf)
    ours = loss_M.detach().cpu(), grad_BC.cpu()
    theirs = answer(student, target, counts, kind=kind, temperatures=temperatures, reduction="batchmean")
    # rows in which the student rules out all of the first source's classes have no softmax
    assert np.isnan(theirs.loss[0]) and ours[0][0].isnan() and ours[1][0, : counts[0]].isnan().all()
    ours[0][0], theirs.loss[0] = 0, 0
    ours[1][0, : counts[0]] = 0
    theirs.grad[0, : counts[0]] = theirs.size[0, : counts[0]] = 0
    compare(ours, theirs, kind, dtype, "triton")


def test_both_kinds_have_one_gradient(implementation):
    """ce and kd differ by the source's entropy, which does not depend on the student."""
    student, target = torch.randn(8, 50), torch.randn(8, 50)
    options = {"temperature": 3.0, "implementation": implementation}
    (ce, ce_grad), (kd, kd_grad) = (computed(student, target, [50], kind=k, **options) for k in ("ce", "kd"))
    assert torch.allclose(ce_grad, kd_grad, atol=1e-7, rtol=1e-5)
    p = torch.softmax(target.double() / 3, dim=1)
    assert float(ce - kd) == pytest.approx(float(-(p * p.log()).sum(1).mean() * 9), rel=1e-5)


def test_the_published_reduction_divides_by_the_classes(implementation):
    student, target = torch.randn(4, 15), torch.randn(4, 15)
    options = {"kind": "kd", "implementation": implementation}
    whole, _ = computed(student, target, [5, 10], **options)
    mean, _ = computed(student, target, [5, 10], reduction="mean", **options)
    assert torch.allclose(mean, whole / torch.tensor([5, 10]))
    theirs = torch.nn.KLDivLoss()(student[:, :5].log_softmax(1), target[:, :5].softmax(1))
    assert torch.allclose(mean[0], theirs)


def test_a_sure_and_right_student_keeps_its_digits(need):
    """Its loss is about exp(-20): log(1 + that) rounds to 0 in float32."""
    need("triton")
    student, target = torch.tensor([[0.0, -20.0]]), torch.tensor([[1e4, -1e4]])
    loss, _ = computed(student, target, [2], implementation="triton")
    assert float(loss) == pytest.approx(float(np.log1p(np.exp(-20.0))), rel=1e-5)


def test_a_student_close_to_its_source_keeps_digits_of_kl(need):
    need("triton")
    target = torch.randn(4, 300, dtype=torch.float64)
    student = target + 1e-3 * torch.randn(4, 300, dtype=torch.float64)
    student, target = student.float(), target.float()
    loss, _ = computed(student, target, [300], kind="kd", implementation="triton")
    theirs = answer(student, target, [300], kind="kd", temperatures=[1.0], reduction="batchmean").loss[0]
    assert 0 < theirs < 1e-6 and float(loss) == pytest.approx(theirs, rel=1e-3)
    same, grad = computed(student, student, [300], kind="kd", implementation="triton")
    assert float(same) == 0 and not grad.any()


def test_not_a_number_is_never_hidden(implementation):
    for what in ("student", "target"):
        for form in FORMS:
            student, logits = torch.randn(5, 60), torch.randn(5, 60)
            target = as_form(form, logits, [40, 20])
            values = target.value_BK if isinstance(target, TopK) else getattr(target, "value_BC", target)
            (student if what == "student" else values)[1, 2] = torch.nan
            loss, grad = computed(student, target, [40, 20], implementation=implementation)
            assert loss.isnan().tolist() == [True, False], (what, form)
            expected = torch.zeros(5, 60, dtype=torch.bool)
            expected[1, :40] = True
            assert torch.equal(grad.isnan(), expected), (what, form)


def test_a_class_the_source_does_not_have(implementation):
    for wrong in (-1, 40, 2_000_000_000):
        target = as_form("uniform", torch.randn(3, 60), [40, 20])
        target.index_BK[1, 0] = wrong
        loss, grad = computed(torch.randn(3, 60), target, [40, 20], implementation=implementation)
        assert loss.isnan().tolist() == [True, False] and grad.isnan().any(1).tolist() == [False, True, False]


def test_rows_of_weight_0_are_not_looked_at(implementation):
    student, target = torch.randn(6, 30), torch.randn(6, 30)
    valid = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    part = computed(student[valid], target[valid], [30], implementation=implementation)
    student[~valid], target[~valid] = torch.nan, torch.inf
    whole = computed(student, target, [30], valid, implementation=implementation)
    assert torch.allclose(whole[0], part[0]) and torch.allclose(whole[1][valid], part[1])
    assert not whole[1][~valid].any()
    none = computed(student, target, [30], torch.zeros(6), implementation=implementation)
    assert float(none[0]) == 0 and not none[1].any()


def test_weights_of_rows(implementation):
    """A weight of 2 is the row twice."""
    student, target = torch.randn(3, 30), torch.randn(3, 30)
    twice = computed(student[[0, 1, 1, 2]], target[[0, 1, 1, 2]], [30], implementation=implementation)
    loss, grad = computed(student, target, [30], torch.tensor([1.0, 2.0, 1.0]), implementation=implementation)
    assert torch.allclose(loss, twice[0])
    assert torch.allclose(grad, torch.stack([twice[1][0], twice[1][1] + twice[1][2], twice[1][3]]), atol=1e-8)


def test_no_gradient_into_the_sources(implementation):
    target = torch.randn(3, 6, device=DEVICE, requires_grad=True)
    student = torch.randn(3, 6, device=DEVICE, requires_grad=True)
    soft_target_loss(student, target, [6], implementation=implementation).sum().backward()
    assert target.grad is None and student.grad is not None


def test_gradcheck(implementation):
    """Numerical derivatives, in float64."""
    student = torch.randn(4, 9, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight = torch.tensor([1.0, 0.0, 0.5, 2.0], device=DEVICE)
    for form, kind in zip(FORMS, ("ce", "kd", "kd", "ce"), strict=True):
        target = on(DEVICE, as_form(form, torch.randn(4, 9), [4, 5], 2))

        def loss(x, target=target, kind=kind):
            options = {"kind": kind, "temperature": [0.7, 3.0], "implementation": implementation}
            return soft_target_loss(x, target, [4, 5], valid_B=weight, **options)

        assert torch.autograd.gradcheck(loss, (student,), fast_mode=True)


def test_two_backward_passes_give_the_same(implementation):
    """What the first one gave away, .grad perhaps, is left alone by the second, whatever its upstream gradient."""
    student = torch.randn(5, 40, device=DEVICE, requires_grad=True)
    loss = soft_target_loss(student, torch.randn(5, 40, device=DEVICE), [30, 10], implementation=implementation)
    gradients = []
    for upstream in ([1.0, 1.0], [3.0, 0.5], [1.0, 1.0]):
        (grad,) = torch.autograd.grad(loss, student, torch.tensor(upstream, device=DEVICE), retain_graph=True)
        gradients.append(grad)
    assert torch.equal(gradients[0], gradients[2])
    factor = torch.tensor([3.0] * 30 + [0.5] * 10, device=DEVICE)
    assert torch.allclose(gradients[1], gradients[0] * factor, rtol=1e-6)
    loss.sum().backward()
    assert torch.equal(student.grad, gradients[0])


def test_the_module_remembers_and_changes_nothing(need):
    """The remembered upstream gradient decides when the gradient is computed, not what it is."""
    need("triton")
    module = SoftTargetLoss([30, 10], kind="kd", temperature=2.0, implementation="triton", device=DEVICE)
    student, target = torch.randn(5, 40, dtype=torch.bfloat16), torch.randn(5, 40)
    for scale in (1.0, 65536.0, 65536.0, 0.5):
        grads = []
        for loss_of in (
            module,
            lambda s, t: soft_target_loss(s, t, [30, 10], kind="kd", temperature=2.0, implementation="triton"),
        ):
            leaf = student.to(DEVICE).requires_grad_()
            (loss_of(leaf, target.to(DEVICE)).sum() * scale).backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)


def test_what_changed_before_backward_is_noticed(implementation):
    """Backward may need student and target again: changed in place they are refused, not used."""
    student, target = torch.randn(4, 12, device=DEVICE, requires_grad=True), torch.randn(4, 12, device=DEVICE)
    loss = soft_target_loss(student, target, [12], implementation=implementation)
    expected = (student.detach().softmax(1) - target.softmax(1)) / 4
    target.zero_()
    if implementation == "triton":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()
    else:  # has all it needs
        loss.sum().backward()
        assert torch.allclose(student.grad, expected, atol=1e-7)


def test_the_module_can_be_copied_and_kept(need):
    need("triton")
    for implementation in IMPLEMENTATIONS:
        module = SoftTargetLoss((3, 4), kind="kd", implementation=implementation, device=DEVICE)
        student, target = torch.randn(5, 7, device=DEVICE), torch.randn(5, 7, device=DEVICE)
        expected = module(student, target)
        for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(again(student, target), expected)


def test_float16_gradients_of_a_scaled_loss_do_not_vanish(implementation):
    """A GradScaler's factor is applied before the gradient is rounded to float16, where it would be 0."""
    student, target = (torch.randn(256, 1000) * 0.1).half(), (torch.randn(256, 1000) * 0.1).half()
    _, grad = computed(student, target, [1000], upstream=[65536.0], implementation=implementation)
    theirs = answer(student, target, [1000], kind="ce", temperatures=[1.0], reduction="batchmean", upstream=[65536.0])
    assert np.abs(theirs.grad / 65536).max() < 2**-18  # float16 has 2**-24 and nothing below
    compare((torch.tensor(theirs.loss), grad), theirs, "ce", torch.float16)


def test_without_gradient(implementation):
    student, target = torch.randn(4, 12, device=DEVICE), torch.randn(4, 12, device=DEVICE)
    loss = soft_target_loss(student, target, [12], implementation=implementation)
    assert not loss.requires_grad
    student.requires_grad_()
    assert torch.equal(loss, soft_target_loss(student, target, [12], implementation=implementation).detach())
    with torch.no_grad():
        assert not soft_target_loss(student, target, [12], implementation=implementation).requires_grad


ARGUMENTS = {"student_logits_BC": torch.zeros(2, 6), "target_BC": torch.zeros(2, 6), "class_counts": [2, 4]}
TOP = TopK(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int64), (1, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_BC": torch.zeros(2, 5)}, "of one shape, not [2, 6] and torch.float32 [2, 5]"),
        ({"target_BC": torch.zeros(2, 6).long()}, "of one shape, not [2, 6] and torch.int64 [2, 6]"),
        ({"target_BC": Probabilities(torch.zeros(1, 6))}, "not [2, 6] and torch.float32 [1, 6]"),
        ({"student_logits_BC": torch.zeros(2, 6).long()}, "floats [B, C], not torch.int64 [2, 6]"),
        ({"student_logits_BC": torch.zeros(6)}, "floats [B, C], not torch.float32 [6]"),
        ({"student_logits_BC": torch.zeros(0, 6), "target_BC": torch.zeros(0, 6)}, "the batch is empty"),
        ({"class_counts": [3, 4]}, "class counts [3, 4] do not add up to the 6 logits"),
        ({"class_counts": []}, "one or more numbers above 0, not []"),
        ({"class_counts": [6, 0]}, "one or more numbers above 0, not [6, 0]"),
        ({"temperature": 0.0}, "temperatures must be above 0, one or 2 of them, not 0.0"),
        ({"temperature": [1.0, -1.0]}, "temperatures must be above 0, one or 2 of them, not [1.0, -1.0]"),
        ({"temperature": [1.0]}, "one or 2 of them, not [1.0]"),
        ({"temperature": float("nan")}, "temperatures must be above 0"),
        ({"kind": "mse"}, "kind is ce or kd, not 'mse'"),
        ({"reduction": "sum"}, "reduction is batchmean or mean, not 'sum'"),
        ({"implementation": "cuda"}, "implementation is one of auto, triton, compiled, reference, not 'cuda'"),
        ({"valid_B": torch.ones(3)}, "valid_B must be [2], not [3]"),
        ({"target_BC": torch.zeros(2, 6, device="meta")}, "two devices: cpu and meta"),
        ({"valid_B": torch.zeros(2, device="meta")}, "two devices: cpu and meta"),
        ({"target_BC": TopK(TOP.value_BK, TOP.index_BK, (3,))}, "top-k counts [3] do not fit to 2 sources"),
        ({"target_BC": TopK(TOP.value_BK, TOP.index_BK, (3, 0))}, "top-k counts [3, 0] do not fit"),
        (
            {"target_BC": TopK(torch.ones(2, 4), torch.ones(2, 4).int(), (3, 1))},
            "[3, 1] exceed the class counts [2, 4]",
        ),
        ({"target_BC": TopK(TOP.value_BK, TOP.index_BK[:1], (1, 2))}, "must be [2, 3], not [2, 3] and [1, 3]"),
        (
            {"target_BC": TopK(TOP.value_BK, TOP.value_BK, (1, 2))},
            "indices integers, not torch.float32 and torch.float32",
        ),
        ({"target_BC": TopK(TOP.value_BK, TOP.index_BK, (1, 2), "half")}, "remainder is uniform or drop, not 'half'"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ValueError) as error:
        soft_target_loss(**(ARGUMENTS | changes))
    assert message in str(error.value)
