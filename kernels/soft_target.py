"""The losses between a target's auxiliary logits and its sources' soft labels, as a function and as a module."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .dispatch import function, implementation
from .problem import Kind, Reduction, SoftTarget, check, problem_of


def soft_target_loss(
    student_logits_BC: Tensor,
    target_BC: SoftTarget,
    class_counts: Sequence[int],
    *,
    kind: Kind = "ce",
    temperature: float | Sequence[float] = 1.0,
    reduction: Reduction = "batchmean",
    valid_B: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """The auxiliary loss of each source: Eq. (2) and (3) of the SSKT paper with the source's soft label, times T^2.

    For source m with logits t, the target's guess s and temperature T, averaged over the batch:

    * ``ce``: ``-T^2 * sum_c softmax(t/T)_c * log_softmax(s/T)_c``
    * ``kd``: ``T^2 * KL(softmax(t/T) || softmax(s/T))``

    The two differ by the source's entropy, which is constant in s: their gradients are equal.

    On CUDA one fused launch computes loss and gradient of all sources; see ``kernels/fused.py``. A NaN in a row of a
    source makes that source's loss and that row's gradient NaN.

    Args:
        student_logits_BC: the target's auxiliary logits, the sources' classes side by side; any float type.
        target_BC: the sources' logits, likewise, or a recalled form of them: :class:`Probabilities`, :class:`TopK`.
            No gradient flows into them.
        class_counts: C1, .., CM; they sum to C.
        kind: which of the two.
        temperature: T > 0, one for all or one for each source.
        reduction: ``batchmean``, or ``mean``: divided by the source's class count too, as the published SSKT code has
            it (PyTorch's ``KLDivLoss`` default), which makes the auxiliary loss all but vanish.
        valid_B: bool [B], the rows that count, or float weights of the rows, 0 or more. The losses are divided by their
            sum instead of by B (if it is 0, they are 0). Rows of weight 0 are not looked at and get a gradient of 0.
        implementation: ``auto``, ``triton``, ``compiled`` or ``reference``.

    Returns:
        float32 [M], computed in float32; float64 for float64 logits (of which 7 digits hold).

    Raises:
        ValueError: shapes, types, devices, class counts or temperatures that do not fit.
    """
    problem = problem_of(class_counts, kind, temperature, reduction)
    check(problem, student_logits_BC, target_BC, valid_B)
    run = function(_chosen(student_logits_BC.device.type, implementation))
    return run(problem, student_logits_BC, target_BC, valid_B, None)


class SoftTargetLoss(nn.Module):
    """:func:`soft_target_loss` for a training loop: its constant arguments are checked once.

    It also remembers, on the device, by what its losses were multiplied in the last backward pass (alpha, the scale of a
    GradScaler). The next forward pass computes the gradient for that, so that backward has nothing left to do.

    Args:
        class_counts, kind, temperature, reduction, implementation: see :func:`soft_target_loss`.
        device: the type of device it will run on, for choosing the implementation now; cuda if there is one.

    Attributes:
        implementation: the one chosen.
        why: a sentence on that.
    """

    def __init__(
        self,
        class_counts: Sequence[int],
        *,
        kind: Kind = "ce",
        temperature: float | Sequence[float] = 1.0,
        reduction: Reduction = "batchmean",
        implementation: str = "auto",
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.problem = problem_of(class_counts, kind, temperature, reduction)
        self.implementation, self.why = _implementation(
            device or ("cuda" if torch.cuda.is_available() else "cpu"), implementation
        )
        self._run = function(self.implementation)
        self._state = None
        if self.implementation == "triton":
            from .fused import State

            self._state = State()

    def forward(self, student_logits_BC: Tensor, target_BC: SoftTarget, valid_B: Tensor | None = None) -> Tensor:
        """The losses [M]."""
        check(self.problem, student_logits_BC, target_BC, valid_B)
        return self._run(self.problem, student_logits_BC, target_BC, valid_B, self._state)

    def extra_repr(self) -> str:
        return f"{self.problem}, implementation={self.implementation}"


_implementation = implementation


@torch.compiler.assume_constant_result
def _chosen(device: str, wanted: str) -> str:
    return _implementation(device, wanted)[0]
