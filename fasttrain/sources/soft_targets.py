"""What sources say of a batch."""

from dataclasses import dataclass

from torch import Tensor

from fasttrain.kernels import SoftTarget, TopK


@dataclass(frozen=True)
class SoftTargets:
    """Soft labels of all sources side by side.

    Attributes:
        target_BC: logits [B, C1 + .. + CM], in the type the networks computed in or the one that was kept; or what was kept
            of them (:class:`fasttrain.kernels.TopK`).
        class_counts: C1, .., CM.
        names: of the sources, in the same order.
    """

    target_BC: SoftTarget
    class_counts: tuple[int, ...]
    names: tuple[str, ...]

    def split(self, size: int | list[int]) -> list["SoftTargets"]:
        """Those of every ``size`` samples, or of so many each."""
        whole = self.target_BC
        if isinstance(whole, TopK):
            pairs = zip(whole.value_BK.split(size), whole.index_BK.split(size), strict=True)
            parts: list[SoftTarget] = [TopK(value, index, whole.counts, whole.remainder) for value, index in pairs]
        else:
            assert isinstance(whole, Tensor)
            parts = list(whole.split(size))
        return [SoftTargets(part, self.class_counts, self.names) for part in parts]

    @property
    def logits_BC(self) -> Tensor:
        """The logits; an assertion fails where only some were kept."""
        assert isinstance(self.target_BC, Tensor)
        return self.target_BC
