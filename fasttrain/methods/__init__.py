"""Methods: they turn what the target says, labels and soft labels into one loss. A new one is a file and a line here."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from fasttrain.kernels import SoftTargetLoss
from fasttrain.models.target import TargetOutput
from fasttrain.recipe import Transfer
from fasttrain.sources import SoftTargets
from fasttrain.tasks import SingleLabel

from .scratch import Scratch
from .sskt import Sskt

__all__ = ["METHODS", "Method", "Scratch", "Sskt"]


class Method(Protocol):
    """Loss of one step."""

    def step(self, output: TargetOutput, targets_B: Tensor, soft: SoftTargets | None) -> dict[str, Tensor]:
        """Returns ``loss`` (the scalar to differentiate), ``primary``, and ``aux/<source>`` of each source."""
        ...


# task, recipe.transfer, and the losses against the sources (None without any) -> method
METHODS: dict[str, Callable[[SingleLabel, Transfer, SoftTargetLoss | None], Method]] = {
    "scratch": Scratch,
    "sskt": Sskt,
}
