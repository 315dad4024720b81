"""Self-supervised knowledge transfer: the task's loss and, of each source, the loss against its soft label."""

from torch import Tensor

from fasttrain.kernels import SoftTargetLoss
from fasttrain.models.target import TargetOutput
from fasttrain.recipe import Transfer
from fasttrain.sources import SoftTargets
from fasttrain.tasks import SingleLabel


class Sskt:
    """Eq. (5) of the SSKT paper: ``L = L_task + alpha * sum_m L_aux,m``.

    Args:
        task: its loss is L_task.
        transfer: alpha.
        aux_loss: the L_aux,m of all sources.
    """

    def __init__(self, task: SingleLabel, transfer: Transfer, aux_loss: SoftTargetLoss | None) -> None:
        assert aux_loss is not None
        self.task, self.transfer, self.aux_loss = task, transfer, aux_loss

    def step(self, output: TargetOutput, targets_B: Tensor, soft: SoftTargets | None) -> dict[str, Tensor]:
        assert soft is not None and output.aux_logits_BC is not None
        primary = self.task.loss(output.logits_BK, targets_B)
        assert soft.class_counts == self.aux_loss.problem.class_counts
        aux_M = self.aux_loss(output.aux_logits_BC, soft.target_BC)
        loss = primary + self.transfer.alpha * aux_M.sum()
        return {"loss": loss, "primary": primary} | {f"aux/{name}": aux_M[m] for m, name in enumerate(soft.names)}
