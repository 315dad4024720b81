"""What sources say of a batch."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SoftTargets:
    """Logits of all sources side by side.

    Attributes:
        logits_BC: [B, C1 + .. + CM], in the type the networks computed in.
        class_counts: C1, .., CM.
        names: of the sources, in the same order.
    """

    logits_BC: Tensor
    class_counts: tuple[int, ...]
    names: tuple[str, ...]
