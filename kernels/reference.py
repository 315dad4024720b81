"""Soft-target losses of all sources at once, in plain PyTorch: what any faster implementation must reproduce.

Shape suffixes: B batch, C all sources' classes side by side, M sources.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["ce", "kd"]
Reduction = Literal["batchmean", "mean"]


def soft_target_loss(
    student_logits_BC: Tensor,
    target_BC: Tensor,
    class_counts: Sequence[int],
    *,
    kind: Kind = "ce",
    temperature: float | Sequence[float] = 1.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """The auxiliary loss of each source: Eq. (2) and (3) of the SSKT paper with the source's soft label, times T^2.

    For source m with logits t, the target's guess s and temperature T, averaged over the batch:

    * ``ce``: ``-T^2 * sum_c softmax(t/T)_c * log_softmax(s/T)_c``
    * ``kd``: ``T^2 * KL(softmax(t/T) || softmax(s/T))``

    The two differ by the source's entropy, which is constant in s: their gradients are equal.

    Args:
        student_logits_BC: the target's auxiliary logits, the sources' classes side by side; any float type.
        target_BC: the sources' logits, likewise; no gradient flows into them.
        class_counts: C1, .., CM; they sum to C.
        kind: which of the two.
        temperature: T > 0, one for all or one for each source.
        reduction: ``batchmean``, or ``mean``: divided by the source's class count too, as the published SSKT code has
            it (PyTorch's ``KLDivLoss`` default), which makes the auxiliary loss all but vanish.

    Returns:
        float32 [M], computed in float32.

    Raises:
        ValueError: shapes, devices, class counts or temperatures that do not fit.
    """
    temperatures = _checked(student_logits_BC, target_BC, class_counts, kind, temperature, reduction)
    losses = []
    student_parts = student_logits_BC.float().split(list(class_counts), dim=1)
    target_parts = target_BC.detach().float().split(list(class_counts), dim=1)
    for s_BC, t_BC, temp in zip(student_parts, target_parts, temperatures, strict=True):
        log_s_BC, log_t_BC = F.log_softmax(s_BC / temp, dim=1), F.log_softmax(t_BC / temp, dim=1)
        p_BC = log_t_BC.exp()
        # a class of probability 0 adds nothing, also where its logarithm is -inf
        surprise_BC = -log_s_BC if kind == "ce" else log_t_BC - log_s_BC
        loss = torch.where(p_BC == 0, 0.0, p_BC * surprise_BC).sum() * (temp * temp / len(s_BC))
        losses.append(loss / s_BC.shape[1] if reduction == "mean" else loss)
    return torch.stack(losses)


def _checked(student, target, class_counts, kind, temperature, reduction) -> list[float]:
    if student.dim() != 2 or student.shape != target.shape:
        raise ValueError(f"logits [B, C] of one shape are needed, not {list(student.shape)} and {list(target.shape)}")
    if student.device != target.device:
        raise ValueError(f"the logits are on two devices: {student.device} and {target.device}")
    if not len(student):
        raise ValueError("the batch is empty")
    if not class_counts or sum(class_counts) != student.shape[1] or min(class_counts) < 1:
        raise ValueError(f"class counts {list(class_counts)} do not add up to the {student.shape[1]} logits")
    if kind not in ("ce", "kd"):
        raise ValueError(f"kind is ce or kd, not {kind!r}")
    if reduction not in ("batchmean", "mean"):
        raise ValueError(f"reduction is batchmean or mean, not {reduction!r}")
    each = [float(temperature)] * len(class_counts) if isinstance(temperature, (int, float)) else list(temperature)
    if len(each) != len(class_counts) or not all(t > 0 for t in each):
        raise ValueError(f"temperatures must be above 0, one or {len(class_counts)} of them, not {temperature}")
    return each
