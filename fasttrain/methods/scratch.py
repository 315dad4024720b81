"""Training on labels alone."""

from torch import Tensor

from fasttrain.kernels import SoftTargetLoss
from fasttrain.models.target import TargetOutput
from fasttrain.recipe import Transfer
from fasttrain.sources import SoftTargets
from fasttrain.tasks import SingleLabel


class Scratch:
    """The task's loss."""

    def __init__(self, task: SingleLabel, transfer: Transfer, aux_loss: SoftTargetLoss | None = None) -> None:
        self.task = task

    def step(self, output: TargetOutput, targets_B: Tensor, soft: SoftTargets | None) -> dict[str, Tensor]:
        primary = self.task.loss(output.logits_BK, targets_B)
        return {"loss": primary, "primary": primary}
