"""Knowledge distillation: the sources know the task's own classes, and the target's own logits follow them."""

from torch import Tensor

from fasttrain.models import Target
from fasttrain.recipe import Recipe
from fasttrain.sources import SoftTargets
from fasttrain.tasks import MultiLabel, Task

from .base import Method, Setting


class Kd(Method):
    """Hinton et al. 2014: ``(1 - w) * L_task + w * T^2 * KL(softmax(t / T) || softmax(s / T))``, w ``method.weight`` (0.9) and
    T ``method.temperature`` (4), both of the settings in which KD is usually reported.

    Several teachers' losses are averaged. Of a multi-label task the divergence is that of each class's Bernoulli
    distribution (:meth:`fasttrain.tasks.Task.soft_loss`), which the paper has not.
    """

    takes_sources = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        method, count = setting.recipe.method, len(setting.recipe.chosen_sources())
        self.weight, self.temperature, self.count = method.weight, method.temperature, count
        self.soft_loss = setting.soft_target_loss([self.task.classes] * count, kind="kd", temperature=self.temperature)

    @classmethod
    def check(cls, recipe: Recipe, task: Task) -> None:
        for source in recipe.chosen_sources():
            if source.classes != task.classes:
                raise ValueError(
                    f"method.name: kd needs teachers with the task's own {task.classes} classes, and the source {source.name} "
                    f"has {source.classes}; sskt takes sources with any"
                )
        if isinstance(task, MultiLabel) and recipe.transfer.recall_top:
            raise ValueError(
                f"transfer.recall_top: {recipe.transfer.recall_top}, but kd of a multi-label task needs all logits; set it to 0"
            )

    def step(self, target: Target, x: Tensor, targets: Tensor, soft: SoftTargets | None) -> dict[str, Tensor]:
        logits_BK = self.ask(target, x).logits_BK
        assert soft is not None
        primary = self.task.loss(logits_BK, targets)
        if isinstance(self.task, MultiLabel):
            teachers = soft.logits_BC.split(self.task.classes, dim=1)
            losses = [self.task.soft_loss(logits_BK, t_BK, self.temperature) for t_BK in teachers]
        else:
            guess_BC = logits_BK if self.count == 1 else logits_BK.repeat(1, self.count)
            losses = list(self.soft_loss(guess_BC, soft.target_BC))
        loss = (1 - self.weight) * primary + self.weight * sum(losses) / self.count
        return {"loss": loss, "primary": primary} | {
            f"aux/{n}": value for n, value in zip(soft.names, losses, strict=True)
        }
