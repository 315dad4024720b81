"""Soft-target losses of all sources in plain PyTorch: what any faster implementation must reproduce.

Shape suffixes: B batch, C all sources' classes side by side (c: one source's), K top-k entries (k: one source's), M sources.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .problem import Probabilities, Problem, SoftTarget, TopK

Core = Callable[[Problem, Tensor, SoftTarget, Tensor | None], tuple[Tensor, list[Tensor]]]


def loss_and_gradient(
    problem: Problem, student_BC: Tensor, target: SoftTarget, valid_B: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Eq. (2) and (3) of the SSKT paper, source after source; see :func:`fasttrain.kernels.soft_target_loss`.

    With p the source's softmax and q the student's, a row's loss is ``T^2 * sum(-p log q)`` (or ``p log(p / q)``) and its
    gradient ``T * (q - p)``, both over the number of rows.

    Returns:
        losses [M], and for each source the gradient [B, c] of its loss; float32, or float64 for float64 logits.
    """
    dtype = torch.float64 if student_BC.dtype == torch.float64 else torch.float32
    weight_B = None if valid_B is None else valid_B.to(dtype)
    share = 1 / len(student_BC) if weight_B is None else _inverse(weight_B.sum())
    parts = student_BC.detach().to(dtype).split(list(problem.class_counts), dim=1)
    losses, gradients = [], []
    for s_Bc, t_Bc, temp, divisor in zip(
        parts, _dense(problem, target, dtype), problem.temperatures, problem.divisors, strict=True
    ):
        if weight_B is not None:  # rows of weight 0 may hold anything
            ignored_B1 = (weight_B == 0)[:, None]
            s_Bc, t_Bc = s_Bc.masked_fill(ignored_B1, 0), t_Bc.masked_fill(ignored_B1, 0)
        q_Bc, log_q_Bc = _softmax(s_Bc, temp)
        p_Bc, log_p_Bc = _softmax(t_Bc, temp)
        surprise_Bc = log_q_Bc.neg_() if problem.kind == "ce" else log_p_Bc.sub_(log_q_Bc)
        # a class of probability 0 adds nothing, also where its logarithm is -inf
        loss_B = surprise_Bc.mul_(p_Bc).masked_fill_(p_Bc == 0, 0).sum(1)
        gradient_Bc = q_Bc.sub_(p_Bc)
        if weight_B is not None:
            loss_B, gradient_Bc = loss_B * weight_B, gradient_Bc.mul_(weight_B[:, None])
        losses.append(loss_B.sum() * share * (temp * temp / divisor))
        gradients.append(gradient_Bc.mul_(share * (temp / divisor)))
    return torch.stack(losses), gradients


def differentiable(
    core: Core, problem: Problem, student_BC: Tensor, target: SoftTarget, valid_B: Tensor | None
) -> Tensor:
    """The losses [M] by a form of :func:`loss_and_gradient`, with its gradient."""
    if student_BC.requires_grad and torch.is_grad_enabled():
        return _Losses.apply(student_BC, core, problem, target, valid_B)
    return core(problem, student_BC, target, valid_B)[0]


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_BC: Tensor, core: Core, problem: Problem, target, valid_B) -> Tensor:
        loss_M, gradients = core(problem, student_BC, target, valid_B)
        ctx.save_for_backward(*gradients)
        ctx.dtype = student_BC.dtype
        return loss_M

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_M: Tensor):
        # multiplied before it is rounded: the scale of a GradScaler keeps float16 from 0
        parts = [(g * u).to(ctx.dtype) for g, u in zip(ctx.saved_tensors, upstream_M.unbind(), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), None, None, None, None


def _softmax(x_Bc: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    """Probabilities and their logarithms at a temperature."""
    # The maximum goes first: divided by T, logits of 1e4 would lose their small differences. Not F.log_softmax, whose
    # running sum on the CPU drops what thousands of small classes add to a large one
    d_Bc = (x_Bc - x_Bc.amax(1, keepdim=True)).div_(temp)
    e_Bc = d_Bc.exp()
    sum_B1 = e_Bc.sum(1, keepdim=True)
    return e_Bc.div_(sum_B1), d_Bc.sub_(sum_B1.log())


def _dense(problem: Problem, target: SoftTarget, dtype: torch.dtype) -> Iterator[Tensor]:
    """Each source's logits (or logarithms of probabilities) that the target stands for: [B, c]."""
    if isinstance(target, TopK):
        values = target.value_BK.detach().to(dtype).split(list(target.counts), dim=1)
        indices = target.index_BK.long().split(list(target.counts), dim=1)
        for value, index, count in zip(values, indices, problem.class_counts, strict=True):
            yield _spread(value, index, count, target.remainder).log()
    else:
        dense = target.value_BC.detach().to(dtype).log() if isinstance(target, Probabilities) else target.detach()
        yield from dense.to(dtype).split(list(problem.class_counts), dim=1)


def _spread(value_Bk: Tensor, index_Bk: Tensor, count: int, remainder: str) -> Tensor:
    """The probabilities that a source's k largest stand for, not normalised: [B, c]."""
    others = count - value_Bk.shape[1]
    rest_B1 = (1 - value_Bk.sum(1, keepdim=True)).clamp(min=0) / others if others else 0 * value_Bk[:, :1]
    if remainder == "drop":
        rest_B1 = torch.zeros_like(rest_B1)
    inside_Bk = (index_Bk >= 0) & (index_Bk < count)
    p_Bc = rest_B1.expand(-1, count).scatter(1, index_Bk.clamp(0, count - 1), value_Bk)
    return p_Bc + torch.where(inside_Bk.all(1, keepdim=True), 0.0, math.nan)


def _inverse(total: Tensor) -> Tensor:
    """1 / total; 0 of 0."""
    return torch.where(total == 0, 0.0, 1 / torch.where(total == 0, 1.0, total))
