"""Training on labels alone."""

from torch import Tensor

from fasttrain.models import Target
from fasttrain.sources import SoftTargets

from .base import Method


class Scratch(Method):
    """The task's loss."""

    def step(self, target: Target, x: Tensor, targets: Tensor, soft: SoftTargets | None) -> dict[str, Tensor]:
        primary = self.task.loss(self.ask(target, x).logits_BK, targets)
        return {"loss": primary, "primary": primary}
