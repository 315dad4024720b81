"""The soft-target losses and their gradient in float64 and numpy, written from the formulas alone.

Shape suffixes: B batch, C all sources' classes side by side (c: one source's), k one source's top-k entries.
"""

from dataclasses import dataclass

import numpy as np
from fasttrain.kernels import Probabilities, TopK


@dataclass
class Answer:
    """float64: losses [M] and gradient [B, C]; ``size_BC`` is the size of the two terms whose difference it is."""

    loss: np.ndarray
    grad: np.ndarray
    size: np.ndarray
    cross_entropy: np.ndarray


def answer(student, target, counts, *, kind, temperatures, reduction, weight=None, upstream=None) -> Answer:
    """Of torch tensors (or recalled targets). Rows of weight 0 are left out."""
    student_BC = student.detach().double().numpy()
    batch = len(student_BC)
    weight_B = np.ones(batch) if weight is None else weight.double().numpy()
    share = 1 / weight_B.sum() if weight_B.sum() else 0.0
    upstream = np.ones(len(counts)) if upstream is None else upstream
    out = Answer(np.zeros(len(counts)), np.zeros_like(student_BC), np.zeros_like(student_BC), np.zeros(len(counts)))
    first = k_first = 0
    for m, (count, t) in enumerate(zip(counts, temperatures, strict=True)):
        part = slice(first, first + count)
        k = target.counts[m] if isinstance(target, TopK) else 0
        divisor = count if reduction == "mean" else 1
        for b in np.flatnonzero(weight_B):
            with np.errstate(all="ignore"):
                log_p = log_target(target, b, part, slice(k_first, k_first + k), t)
                log_q = log_softmax(student_BC[b, part] / t)
            p, q = np.exp(log_p), np.exp(log_q)
            some = p != 0  # a NaN is some
            surprise = -(p[some] * log_q[some]).sum()
            value = surprise if kind == "ce" else (p[some] * (log_p[some] - log_q[some])).sum()
            factor = weight_B[b] * share / divisor
            out.loss[m] += t * t * factor * value
            out.cross_entropy[m] += t * t * factor * abs(surprise)
            out.grad[b, part] = t * factor * upstream[m] * (q - p)
            out.size[b, part] = t * factor * abs(upstream[m]) * (q + p)
        first, k_first = first + count, k_first + k
    return out


def log_target(target, b: int, part: slice, k_part: slice, t: float) -> np.ndarray:
    """A row of one source: log-probabilities at its temperature, dense."""
    if isinstance(target, TopK):
        value_k = target.value_BK[b, k_part].double().numpy()
        index_k = target.index_BK[b, k_part].long().numpy()
        count = part.stop - part.start
        others = count - len(value_k)
        rest = max(1 - value_k.sum(), 0) / others if others and target.remainder == "uniform" else 0
        p_c = np.full(count, float(rest))
        p_c[index_k] = value_k
        return log_softmax(np.log(p_c) / t)
    if isinstance(target, Probabilities):
        return log_softmax(np.log(target.value_BC[b, part].double().numpy()) / t)
    return log_softmax(target[b, part].detach().double().numpy() / t)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """With log1p of the sum without its largest term: a sure answer keeps its digits."""
    d = x - x.max()
    top = int(np.argmax(d))
    rest = np.exp(np.delete(d, top)).sum()
    return d - np.log1p(rest)
