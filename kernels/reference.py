"""Soft-target losses of all sources in plain PyTorch: what any faster implementation must reproduce.

Shape suffixes: B batch, C all sources' classes side by side (c: one source's), K top-k entries (k: one source's).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .problem import Probabilities, Problem, SoftTarget, TopK


def reference(problem: Problem, student_BC: Tensor, target: SoftTarget, valid_B: Tensor | None) -> Tensor:
    """Eq. (2) and (3) of the SSKT paper, source after source: [M] in float32, or float64 for float64 logits.

    See :func:`fasttrain.kernels.soft_target_loss`.
    """
    dtype = torch.float64 if student_BC.dtype == torch.float64 else torch.float32
    weight_B = None if valid_B is None else valid_B.to(dtype)
    total = float(len(student_BC)) if weight_B is None else weight_B.sum()
    parts = student_BC.to(dtype).split(list(problem.class_counts), dim=1)
    targets = log_targets(problem, target, dtype)
    losses = []
    for s_Bc, log_p_Bc, temp, divisor in zip(parts, targets, problem.temperatures, problem.divisors, strict=True):
        if weight_B is not None:  # rows of weight 0 may hold anything
            ignored_B1 = (weight_B == 0)[:, None]
            s_Bc, log_p_Bc = s_Bc.masked_fill(ignored_B1, 0), log_p_Bc.masked_fill(ignored_B1, 0)
        log_q_Bc = _log_softmax(s_Bc, temp)
        p_Bc = log_p_Bc.exp()
        # a class of probability 0 adds nothing, also where its logarithm is -inf
        surprise_Bc = -log_q_Bc if problem.kind == "ce" else log_p_Bc - log_q_Bc
        loss_B = torch.where(p_Bc == 0, 0.0, p_Bc * surprise_Bc).sum(1)
        if weight_B is not None:
            loss_B = loss_B * weight_B
        losses.append(_divided(loss_B.sum(), total) * (temp * temp / divisor))
    return torch.stack(losses)


def log_targets(problem: Problem, target: SoftTarget, dtype: torch.dtype) -> Iterator[Tensor]:
    """Each source's log-probabilities at its temperature, dense: [B, c] in ``dtype``."""
    if isinstance(target, TopK):
        values = target.value_BK.to(dtype).split(list(target.counts), dim=1)
        indices = target.index_BK.long().split(list(target.counts), dim=1)
        for value, index, count, temp in zip(values, indices, problem.class_counts, problem.temperatures, strict=True):
            yield _log_softmax(_spread(value, index, count, target.remainder).log(), temp)
    else:
        dense = target.value_BC.to(dtype).log() if isinstance(target, Probabilities) else target.to(dtype)
        parts = dense.detach().split(list(problem.class_counts), dim=1)
        for part, temp in zip(parts, problem.temperatures, strict=True):
            yield _log_softmax(part, temp)


def _spread(value_Bk: Tensor, index_Bk: Tensor, count: int, remainder: str) -> Tensor:
    """The dense probabilities that a source's k largest stand for, not normalised: [B, c]."""
    value_Bk = value_Bk.detach()
    others = count - value_Bk.shape[1]
    rest_B1 = (1 - value_Bk.sum(1, keepdim=True)).clamp(min=0) / others if others else 0 * value_Bk[:, :1]
    if remainder == "drop":
        rest_B1 = torch.zeros_like(rest_B1)
    inside_Bk = (index_Bk >= 0) & (index_Bk < count)
    p_Bc = rest_B1.expand(-1, count).scatter(1, index_Bk.clamp(0, count - 1), value_Bk)
    return p_Bc + torch.where(inside_Bk.all(1, keepdim=True), 0.0, math.nan)


def _log_softmax(x_Bc: Tensor, temp: float) -> Tensor:
    # the maximum goes first: divided by T, logits of 1e4 would lose their small differences. Not F.log_softmax, whose
    # running sum on the CPU drops what thousands of small classes add to a large one (5 digits left, of 7)
    d_Bc = (x_Bc - x_Bc.detach().amax(1, keepdim=True)) / temp
    return d_Bc - d_Bc.logsumexp(1, keepdim=True)


def _divided(sum_: Tensor, total: float | Tensor) -> Tensor:
    if isinstance(total, Tensor):
        return torch.where(total == 0, 0.0, sum_ / torch.where(total == 0, 1.0, total))
    return sum_ / total
