"""What a soft-target loss is asked: the target's form, the classes of each source, and the checks of both.

Shape suffixes: B batch, C all sources' classes side by side, K all sources' top-k entries side by side, M sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["ce", "kd"]
Reduction = Literal["batchmean", "mean"]


@dataclass(frozen=True)
class Probabilities:
    """A target that was kept as probabilities: ``softmax(logits)`` at temperature 1 of each source.

    At another temperature the loss uses ``p ** (1/T)``, normalised, which is ``softmax(logits / T)``. What rounding to
    float16 took from a row's sum is spread over the row by the same normalisation.

    Attributes:
        value_BC: [B, C1 + .. + CM], any float type.
    """

    value_BC: Tensor


@dataclass(frozen=True)
class TopK:
    """A target of which only each source's k largest probabilities (at temperature 1) were kept.

    It stands for a dense target that is never written: the k classes have their probabilities, and what they lack to
    1 is spread evenly over the source's other classes (``uniform``), or these are taken to be impossible (``drop``).
    Like :class:`Probabilities` it is raised to 1/T and normalised.

    Attributes:
        value_BK: [B, K1 + .. + KM], probabilities, any float type.
        index_BK: the same shape, int16, int32 or int64: classes, counted within each source, no class twice. A class
            that the source does not have makes the row's loss and gradient NaN.
        counts: K1, .., KM.
        remainder: what becomes of the rest.
    """

    value_BK: Tensor
    index_BK: Tensor
    counts: tuple[int, ...]
    remainder: Literal["uniform", "drop"] = "uniform"


SoftTarget = Tensor | Probabilities | TopK


@dataclass(frozen=True)
class Problem:
    """The constant part: hashable, so that implementations can keep what they derive from it.

    Attributes:
        class_counts: C1, .., CM.
        kind: ``ce`` or ``kd``.
        temperatures: T1, .., TM.
        reduction: ``batchmean`` or ``mean``.
    """

    class_counts: tuple[int, ...]
    kind: Kind
    temperatures: tuple[float, ...]
    reduction: Reduction

    @property
    def divisors(self) -> list[int]:
        """What each source's loss is divided by, besides the rows."""
        return [c if self.reduction == "mean" else 1 for c in self.class_counts]


def problem_of(class_counts: Sequence[int], kind: str, temperature: float | Sequence[float], reduction: str) -> Problem:
    """Checks what does not depend on a batch.

    Raises:
        ValueError: with the value.
    """
    if not class_counts or min(class_counts) < 1:
        raise ValueError(f"class counts must be one or more numbers above 0, not {list(class_counts)}")
    if kind not in ("ce", "kd"):
        raise ValueError(f"kind is ce or kd, not {kind!r}")
    if reduction not in ("batchmean", "mean"):
        raise ValueError(f"reduction is batchmean or mean, not {reduction!r}")
    each = [float(temperature)] * len(class_counts) if isinstance(temperature, (int, float)) else list(temperature)
    if len(each) != len(class_counts) or not all(0 < t < float("inf") for t in each):
        raise ValueError(f"temperatures must be above 0, one or {len(class_counts)} of them, not {temperature}")
    return Problem(tuple(class_counts), kind, tuple(each), reduction)  # type: ignore[arg-type]


def check(problem: Problem, student_BC: Tensor, target: SoftTarget, valid_B: Tensor | None) -> None:
    """Checks a batch against the problem. Looks at shapes, types and devices only: nothing waits for the device.

    Raises:
        ValueError: with the values.
    """
    if student_BC.dim() != 2 or not student_BC.is_floating_point():
        raise ValueError(f"student logits must be floats [B, C], not {student_BC.dtype} {list(student_BC.shape)}")
    batch, classes = student_BC.shape
    if not batch:
        raise ValueError("the batch is empty")
    if sum(problem.class_counts) != classes:
        raise ValueError(f"class counts {list(problem.class_counts)} do not add up to the {classes} logits")
    if isinstance(target, TopK):
        _check_top_k(problem, target, batch)
        others = [target.value_BK, target.index_BK]
    else:
        dense = target.value_BC if isinstance(target, Probabilities) else target
        if dense.shape != student_BC.shape or not dense.is_floating_point():
            raise ValueError(
                f"student and target must be floats [B, C] of one shape, not {list(student_BC.shape)} "
                f"and {dense.dtype} {list(dense.shape)}"
            )
        others = [dense]
    if valid_B is not None:
        if valid_B.shape != (batch,) or valid_B.is_complex():
            raise ValueError(f"valid_B must be [{batch}], not {list(valid_B.shape)}")
        others.append(valid_B)
    for other in others:
        if other.device != student_BC.device:
            raise ValueError(f"student and target are on two devices: {student_BC.device} and {other.device}")


def _check_top_k(problem: Problem, target: TopK, batch: int) -> None:
    counts, value, index = target.counts, target.value_BK, target.index_BK
    if len(counts) != len(problem.class_counts) or min(counts) < 1:
        raise ValueError(f"top-k counts {list(counts)} do not fit to {len(problem.class_counts)} sources")
    if any(k > c for k, c in zip(counts, problem.class_counts, strict=True)):
        raise ValueError(f"top-k counts {list(counts)} exceed the class counts {list(problem.class_counts)}")
    if value.shape != (batch, sum(counts)) or index.shape != value.shape:
        raise ValueError(
            f"top-k values and indices must be [{batch}, {sum(counts)}], "
            f"not {list(value.shape)} and {list(index.shape)}"
        )
    if not value.is_floating_point() or index.is_floating_point():
        raise ValueError(f"top-k values must be floats and indices integers, not {value.dtype} and {index.dtype}")
    if target.remainder not in ("uniform", "drop"):
        raise ValueError(f"remainder is uniform or drop, not {target.remainder!r}")
