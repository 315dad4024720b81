"""Soft-target losses by one Triton kernel: how it is launched, differentiated, and seen by torch.compile.

Eager calls take the direct way: one launch computes loss and gradient, a second adds up the partial losses, and in
backward a third finds, on the device, that the gradient is right already. That holds if backward's upstream gradient is
what forward took it to be: 1, or with a :class:`State` what it was the last time. If it is not, that launch computes the
gradient anew. The gradient is the same bits either way, and nothing waits for the device.

Under torch.compile, torch.export and other tracing the same kernel runs as two operators, ``fasttrain::soft_target_loss``
and ``fasttrain::soft_target_grad``, functional as these need it: backward reads student and target once more.

Shape suffixes: B batch, C all sources' classes side by side, M sources.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import launch
from .problem import Probabilities, Problem, SoftTarget, TopK
from .soft_target_kernel import LOGITS, PROBABILITIES, TOPK_DROP, TOPK_UNIFORM, soft_target_kernel
from .tiles import DEFAULT, Tiles, Tiling, groups_of, tiles_of
from .tracing import INTERPRETED, launcher, on_device_of, operator

_NO_GROUPS = (1, False)


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


def plan_of(
    problem: Problem,
    k_counts: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    tiling: Tiling = DEFAULT,
    groups: tuple[int, bool] = _NO_GROUPS,
) -> Plan:
    """The plan, made once: its two small tensors are copied to the device at the first call."""
    key = (problem, k_counts, dtype, device, tiling, groups)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _plan(*key)
    return plan


def _plan(
    problem: Problem, k_counts: tuple[int, ...], dtype: torch.dtype, device: torch.device, tiling: Tiling, groups
) -> Plan:
    sources = len(problem.class_counts)
    floats = (problem.temperatures, tuple(map(float, problem.divisors)))
    starts = _starts(problem.class_counts) + _starts(k_counts or (0,) * sources)
    if INTERPRETED and not tiling.rows:  # its time goes by programs
        tiling = replace(tiling, rows=64)
    tiles = tiles_of(problem.class_counts, k_counts, tiling, groups)
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
    problem: Problem,
    student_BC: Tensor,
    target: SoftTarget,
    valid_B: Tensor | None,
    state: State | None = None,
    tiling: Tiling = DEFAULT,
) -> Tensor:
    """The losses [M] of a checked problem; see :func:`fasttrain.kernels.soft_target_loss`. ``tiling`` changes their speed."""
    value, index, form, k_counts = _form_of(target)
    dtype = torch.float64 if student_BC.dtype == torch.float64 else torch.float32
    weight_sum = None if valid_B is None else valid_B.sum(dtype=dtype)
    student_BC, value = _rows_apart(student_BC), _rows_apart(value)
    index = None if index is None else _rows_apart(index)
    valid_B = None if valid_B is None else valid_B.contiguous()
    if torch.compiler.is_compiling() or torch.utils._python_dispatch.is_in_torch_dispatch_mode():
        plan = _plan(problem, k_counts, dtype, student_BC.device, tiling, _NO_GROUPS)
        sizes = plan.tiles.sizes
        return _loss_op(student_BC, value, index, valid_B, weight_sum, plan.ints, plan.floats, sizes, plan.kd, form)
    _check_device(student_BC)
    groups = _NO_GROUPS
    if tiling.wide:
        groups = groups_of(student_BC, None if index is not None else value, problem.class_counts)
    plan = plan_of(problem, k_counts, dtype, student_BC.device, tiling, groups)
    call = _Call(plan, value, index, valid_B, weight_sum, form, state)
    if student_BC.requires_grad and torch.is_grad_enabled():
        return _Direct.apply(student_BC, call)
    return _forward(call, student_BC, None, None)


def _check_device(student_BC: Tensor) -> None:
    if not (student_BC.is_cuda or INTERPRETED):
        raise ValueError(f"the triton kernels need tensors on a GPU, not on {student_BC.device}")


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
        ctx.grad_BC = _gradient(student_BC, call.plan.tiles.wide)
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
        if grad_BC is None:
            grad_BC = _gradient(student_BC, ctx.call.plan.tiles.wide)
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


def _gradient(student_BC: Tensor, wide: int) -> Tensor:
    """Memory for the gradient, whose rows begin as far from a multiple of ``wide`` as the student's do."""
    rows, classes = student_BC.shape
    more = (student_BC.stride(0) - classes) % wide
    whole = torch.empty((rows, classes + more), dtype=student_BC.dtype, device=student_BC.device)
    return whole[:, :classes] if more else whole


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
    index_or = student if index is None else index
    weight_or = student if weight is None else weight
    numbers = (
        rows, student.stride(0), target.stride(0), 0 if index is None else index.stride(0),
        0 if grad is None else grad.stride(0), upstream.stride(0),
    )  # fmt: skip
    constants = (
        kd, form, weight is not None, partial is not None, grad is not None, check, used is not None and not check,
        remembered is not None, floats.dtype == torch.float64, tiles.r, tiles.n, tiles.r_small, tiles.n_small, tiles.k,
        bool(tiles.loop), tiles.wide, bool(tiles.edges),
    )  # fmt: skip
    arguments = (
        student, target, index_or, weight_or, floats if weight_sum is None else weight_sum,
        student if grad is None else grad, floats if partial is None else partial, ints, floats, upstream,
        floats if used is None else used, floats if remembered is None else remembered, *numbers, *constants,
    )  # fmt: skip
    key = None
    if kernel is soft_target_kernel and not INTERPRETED:
        # tensors that were allocated here begin at multiples of 16 bytes, those of a caller may not
        given = (student, target, index_or, weight_or, upstream)
        key = (numbers, constants, tiles.warps, student.device, *[(x.dtype, x.data_ptr() % 16) for x in given])
    with on_device_of(student):
        launch(kernel, key, ((rows + tiles.r - 1) // tiles.r, sources, 1), arguments, tiles.warps)


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
