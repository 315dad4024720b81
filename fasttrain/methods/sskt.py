"""Self-supervised knowledge transfer: the task's loss and, of each source, the loss against its soft label."""

from torch import Tensor

from fasttrain.models import Target
from fasttrain.recipe import Recipe
from fasttrain.sources import SoftTargets

from .base import Method, Setting


class Sskt(Method):
    """Eq. (5) of the SSKT paper: ``L = L_task + alpha * sum_m L_aux,m``, with an auxiliary head for each source."""

    takes_sources = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        transfer = setting.recipe.transfer
        self.alpha = transfer.alpha
        self.aux_loss = setting.soft_target_loss(
            [s.classes for s in setting.recipe.chosen_sources()],
            kind=transfer.loss,
            temperature=transfer.temperature,
            reduction=transfer.kd_reduction,
        )

    @classmethod
    def heads(cls, recipe: Recipe, classes: int) -> dict[str, int]:
        return {s.name: s.classes for s in recipe.chosen_sources()}

    def step(self, target: Target, x: Tensor, targets: Tensor, soft: SoftTargets | None) -> dict[str, Tensor]:
        output = self.ask(target, x, aux=True)
        assert soft is not None and output.aux_logits_BC is not None
        primary = self.task.loss(output.logits_BK, targets)
        assert soft.class_counts == self.aux_loss.problem.class_counts
        aux_M = self.aux_loss(output.aux_logits_BC, soft.target_BC)
        loss = primary + self.alpha * aux_M.sum()
        return {"loss": loss, "primary": primary} | {f"aux/{name}": aux_M[m] for m, name in enumerate(soft.names)}
