"""Soft-target losses by one Triton kernel: how it is launched, differentiated, and seen by torch.compile.

Eager calls take the direct way: one launch computes loss and gradient, a second adds up the partial losses, and in
backward a third finds, on the device, that the gradient is right already. That holds if backward's upstream gradient is
what forward took it to be: 1, or with a :class:`State` what it was the last time. If it is not, that launch computes the
gradient anew. The gradient is the same bits either way, and nothing waits for the device.

Under torch.compile, torch.export and other tracing the same kernel runs as two operators, ``fasttrain::soft_target_loss``
and ``fasttrain::soft_target_grad``, functional as these need it: backward reads student and target once more.

Shape suffixes: B batch, C all sources' classes side by side, M sources.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .problem import Probabilities, Problem, SoftTarget, TopK
from .soft_target_kernel import LOGITS, PROBABILITIES, TOPK_DROP, TOPK_UNIFORM, soft_target_kernel
from .tracing import INTERPRETED, launcher, on_device_of, operator

_WIDEST = 4096  # classes in a tile; sources with more are passed over twice,
_LOOPED = 1024  # so many at a time: with 2048 some variants spill registers (kernels/resources.py)


@dataclass(frozen=True)
class Tiles:
    """How a problem is cut up: rows R and columns N of a tile, for sources of up to ``n_small`` classes smaller ones."""

    r: int
    n: int
    r_small: int
    n_small: int
    k: int
    loop: int
    warps: int


def tiles_of(class_counts: tuple[int, ...], k_counts: tuple[int, ...], rows: int = 0, widest: int = _WIDEST) -> Tiles:
    """Tiles for these sources; ``rows`` sets the rows of a tile instead of the rule."""
    most = widest if max(class_counts) <= widest else min(widest, _LOOPED)
    n, n_small = (min(most, max(16, _power_of_2(f(class_counts)))) for f in (max, min))
    k = max(2, _power_of_2(max(k_counts))) if k_counts else 2
    r, r_small = (rows or max(1, 256 // max(x, k)) for x in (n, n_small))
    loop = int(max(class_counts) > n)
    warps = 8 if loop else max(4, r * n // 256)
    return Tiles(r, n, r_small, n_small, k, loop, warps)


def _power_of_2(x: int) -> int:
    return 1 << (x - 1).bit_length()


@dataclass(frozen=True, eq=False)
class Plan:
    """What the kernel needs to know of a problem, on one device.

    Attributes:
        ints: int32 [2 (M + 1)]: where each source's classes begin, then where its top-k entries do.
        floats: [2, M] in the type of the arithmetic: temperatures and divisors.
        ones_M: likewise.
        kd: the kind of loss.
    """

    ints: Tensor
    floats: Tensor
    ones_M: Tensor
    tiles: Tiles
    kd: bool


_PLANS: dict[tuple, Plan] = {}


def plan_of(problem: Problem, k_counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Plan:
    """The plan, made once: its two small tensors are copied to the device at the first call."""
    key = (problem, k_counts, dtype, device)
    if key not in _PLANS:
        _PLANS[key] = _plan(problem, k_counts, dtype, device)
    return _PLANS[key]


def _plan(problem: Problem, k_counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Plan:
    sources = len(problem.class_counts)
    floats = (problem.temperatures, tuple(map(float, problem.divisors)))
    starts = _starts(problem.class_counts) + _starts(k_counts or (0,) * sources)
    tiles = tiles_of(problem.class_counts, k_counts, 64 if INTERPRETED else 0)  # its time goes by programs
    make = _constant if torch.compiler.is_compiling() else torch.tensor
    ints, floats_2M = make(starts, dtype=torch.int32, device=device), make(floats, dtype=dtype, device=device)
    return Plan(ints, floats_2M, torch.ones_like(floats_2M[0]), tiles, problem.kind == "kd")


def _starts(counts: tuple[int, ...]) -> tuple[int, ...]:
    return (0, *accumulate(counts))


def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that a compiled graph holds, so that it is not copied to the device in every step."""
    return torch.tensor(values, dtype=dtype, device=device)


# PyTorch 2.11 cannot hold two constants of one function (seen to work in 2.15); there the copy of a few bytes stays
if torch.__version__ >= "2.15":  # compared as a version
    _constant = torch.compiler.assume_constant_result(_constant)


class State:
    """Remembers, on the device, the upstream gradient that backward met last: the next forward expects it again.

    A training loop's upstream gradient is alpha, times the GradScaler's scale: the same at almost every step. The
    memory decides only what is computed when, never the result.
    """

    def __init__(self) -> None:
        self._of: dict[Plan, Tensor] = {}

    def __call__(self, plan: Plan) -> Tensor:
        """[M] on the plan's device, ones at first."""
        if plan not in self._of:
            self._of[plan] = plan.ones_M.clone()
        return self._of[plan]

    def __reduce__(self):
        return State, ()  # a copy starts without memories


def fused(
    problem: Problem, student_BC: Tensor, target: SoftTarget, valid_B: Tensor | None, state: State | None = None
) -> Tensor:
    """The losses [M] of a checked problem; see :func:`fasttrain.kernels.soft_target_loss`."""
    value, index, form, k_counts = _form_of(target)
    dtype = torch.float64 if student_BC.dtype == torch.float64 else torch.float32
    weight_sum = None if valid_B is None else valid_B.sum(dtype=dtype)
    student_BC, value = _rows_apart(student_BC), _rows_apart(value)
    index = None if index is None else _rows_apart(index)
    valid_B = None if valid_B is None else valid_B.contiguous()
    if torch.compiler.is_compiling() or torch.utils._python_dispatch.is_in_torch_dispatch_mode():
        plan = _plan(problem, k_counts, dtype, student_BC.device)
        t = plan.tiles  # not dataclasses.astuple, which Dynamo cannot trace
        sizes = [t.r, t.n, t.r_small, t.n_small, t.k, t.loop, t.warps]
        return _loss_op(student_BC, value, index, valid_B, weight_sum, plan.ints, plan.floats, sizes, plan.kd, form)
    if not (student_BC.is_cuda or INTERPRETED):
        raise ValueError(f"the triton kernels need tensors on a GPU, not on {student_BC.device}")
    plan = plan_of(problem, k_counts, dtype, student_BC.device)
    call = _Call(plan, value, index, valid_B, weight_sum, form, state)
    if student_BC.requires_grad and torch.is_grad_enabled():
        return _Direct.apply(student_BC, call)
    return _forward(call, student_BC, None, None)


def _form_of(target: SoftTarget) -> tuple[Tensor, Tensor | None, int, tuple[int, ...]]:
    if isinstance(target, TopK):
        form = TOPK_UNIFORM if target.remainder == "uniform" else TOPK_DROP
        return target.value_BK.detach(), target.index_BK, form, tuple(target.counts)
    if isinstance(target, Probabilities):
        return target.value_BC.detach(), None, PROBABILITIES, ()
    return target.detach(), None, LOGITS, ()


def _rows_apart(x: Tensor) -> Tensor:
    """Rows may lie anywhere; within a row the elements must be neighbours."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


@dataclass(eq=False)
class _Call:
    plan: Plan
    target: Tensor
    index: Tensor | None
    weight: Tensor | None
    weight_sum: Tensor | None
    form: int
    state: State | None


class _Direct(torch.autograd.Function):
    """Gradient in the forward pass, checked in the backward pass."""

    @staticmethod
    def forward(ctx, student_BC: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        ctx.grad_BC = torch.empty(student_BC.shape, dtype=student_BC.dtype, device=student_BC.device)
        ctx.used_M = torch.empty_like(call.plan.ones_M)
        # saved, not only kept: changed in place before backward, they would be noticed
        ctx.save_for_backward(student_BC, call.target, call.index, call.weight, call.weight_sum)
        return _forward(call, student_BC, ctx.grad_BC, ctx.used_M)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_M: Tensor) -> tuple[Tensor, None]:
        student_BC, target, index, weight, weight_sum = ctx.saved_tensors
        grad_BC, ctx.grad_BC = ctx.grad_BC, None
        first = grad_BC is not None  # a second backward pass may not touch what the first one gave away
        if not first:
            grad_BC = torch.empty(student_BC.shape, dtype=student_BC.dtype, device=student_BC.device)
        plan, state = ctx.call.plan, ctx.call.state
        remembered = None if state is None else state(plan)
        _launch(
            soft_target_kernel, plan.tiles, student_BC, target, index, weight, weight_sum, plan.ints,
            plan.floats, plan.kd, ctx.call.form, grad=grad_BC, upstream=upstream_M,
            used=ctx.used_M if first else None, remembered=remembered, check=first,
        )  # fmt: skip
        return grad_BC, None


def _forward(call: _Call, student_BC: Tensor, grad_BC: Tensor | None, used_M: Tensor | None) -> Tensor:
    plan = call.plan
    upstream = plan.ones_M if call.state is None else call.state(plan)
    partial = _partial(student_BC, plan.floats, plan.tiles.r)
    _launch(
        soft_target_kernel, plan.tiles, student_BC, call.target, call.index, call.weight, call.weight_sum, plan.ints,
        plan.floats, plan.kd, call.form, grad=grad_BC, upstream=upstream, used=used_M, partial=partial,
    )  # fmt: skip
    return partial.sum(1)


def _partial(student_BC: Tensor, floats_2M: Tensor, rows: int) -> Tensor:
    """Where the kernel puts the sums of its row tiles, for each source."""
    return floats_2M.new_empty(floats_2M.shape[1], (student_BC.shape[0] + rows - 1) // rows)


def _launch(
    kernel, tiles: Tiles, student: Tensor, target: Tensor, index: Tensor | None, weight: Tensor | None,
    weight_sum: Tensor | None, ints: Tensor, floats: Tensor, kd: bool, form: int, *, upstream: Tensor,
    grad: Tensor | None = None, partial: Tensor | None = None, used: Tensor | None = None,
    remembered: Tensor | None = None, check: bool = False,
) -> None:  # fmt: skip
    """One launch. What is not needed is filled up with a tensor that is there: no pointer is ever empty."""
    rows, sources = student.shape[0], floats.shape[1]
    with on_device_of(student):
        kernel[((rows + tiles.r - 1) // tiles.r, sources)](
            student, target, student if index is None else index, student if weight is None else weight,
            floats if weight_sum is None else weight_sum, student if grad is None else grad,
            floats if partial is None else partial, ints, floats, upstream,
            floats if used is None else used, floats if remembered is None else remembered,
            rows, student.stride(0), target.stride(0), 0 if index is None else index.stride(0),
            0 if grad is None else grad.stride(0), upstream.stride(0),
            KD=kd, FORM=form, WEIGHTED=weight is not None, LOSS=partial is not None, GRAD=grad is not None,
            CHECK=check, KEEP=used is not None and not check, REMEMBER=remembered is not None,
            DOUBLE=floats.dtype == torch.float64, R=tiles.r, N=tiles.n, R_SMALL=tiles.r_small,
            N_SMALL=tiles.n_small, K=tiles.k, LOOP=bool(tiles.loop), num_warps=tiles.warps,
        )  # fmt: skip


# -- operators, for tracing -------------------------------------------------------------------------------------------


def _loss(
    student: Tensor, target: Tensor, index: Tensor | None, weight: Tensor | None, weight_sum: Tensor | None,
    ints: Tensor, floats: Tensor, sizes: list[int], kd: bool, form: int,
) -> Tensor:  # fmt: skip
    tiles = Tiles(*sizes)
    partial = _partial(student, floats, tiles.r)
    _launch(
        launcher(soft_target_kernel), tiles, student, target, index, weight, weight_sum, ints, floats, kd, form,
        upstream=torch.ones_like(floats[0]), partial=partial,
    )  # fmt: skip
    return partial.sum(1)


def _grad(
    student: Tensor, target: Tensor, index: Tensor | None, weight: Tensor | None, weight_sum: Tensor | None,
    ints: Tensor, floats: Tensor, sizes: list[int], kd: bool, form: int, upstream: Tensor,
) -> Tensor:  # fmt: skip
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _launch(
        launcher(soft_target_kernel), Tiles(*sizes), student, target, index, weight, weight_sum, ints, floats, kd,
        form, upstream=upstream, grad=grad,
    )  # fmt: skip
    return grad


_loss_op = operator("fasttrain::soft_target_loss", _loss, lambda student, *rest: rest[5].new_empty(rest[5].shape[1]))
_grad_op = operator("fasttrain::soft_target_grad", _grad, lambda student, *rest: student.new_empty(student.shape))


def _save(ctx, inputs, output) -> None:
    student, target, index, weight, weight_sum, ints, floats, ctx.sizes, ctx.kd, ctx.form = inputs
    ctx.save_for_backward(student, target, index, weight, weight_sum, ints, floats)


def _backward(ctx, upstream_M: Tensor):
    student, target, index, weight, weight_sum, ints, floats = ctx.saved_tensors
    grad = _grad_op(student, target, index, weight, weight_sum, ints, floats, ctx.sizes, ctx.kd, ctx.form, upstream_M)
    return grad, None, None, None, None, None, None, None, None, None


_loss_op.register_autograd(_backward, setup_context=_save)
