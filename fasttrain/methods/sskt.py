"""Self-supervised knowledge transfer: the task's loss and, of each source, the loss against its soft label."""

from torch import Tensor

from fasttrain.kernels import soft_target_loss
from fasttrain.models.target import TargetOutput
from fasttrain.recipe import Transfer
from fasttrain.sources import SoftTargets
from fasttrain.tasks import SingleLabel


class Sskt:
    """Eq. (5) of the SSKT paper: ``L = L_task + alpha * sum_m L_aux,m``."""

    def __init__(self, task: SingleLabel, transfer: Transfer) -> None:
        self.task, self.transfer = task, transfer

    def step(self, output: TargetOutput, targets_B: Tensor, soft: SoftTargets | None) -> dict[str, Tensor]:
        assert soft is not None and output.aux_logits_BC is not None
        primary = self.task.loss(output.logits_BK, targets_B)
        aux_M = soft_target_loss(
            output.aux_logits_BC,
            soft.logits_BC,
            soft.class_counts,
            kind=self.transfer.loss,
            temperature=self.transfer.temperature,
            reduction=self.transfer.kd_reduction,
        )
        loss = primary + self.transfer.alpha * aux_M.sum()
        return {"loss": loss, "primary": primary} | {f"aux/{name}": aux_M[m] for m, name in enumerate(soft.names)}
