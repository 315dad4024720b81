"""What every method offers to the trainer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.kernels import SoftTargetLoss
from fasttrain.models import Target, build_backbone
from fasttrain.models.target import TargetOutput
from fasttrain.recipe import Optim, Recipe
from fasttrain.sources import SoftTargets
from fasttrain.tasks import Task


@dataclass(frozen=True)
class Setting:
    """What a method is made from.

    Attributes:
        recipe: of the run.
        task: the target's.
        device: type of the device.
        dtype: of the arithmetic under autocast; float32 for none.
        soft_target_loss: makes the losses against soft labels, on the chosen kernels; takes the arguments of
            :class:`~fasttrain.kernels.SoftTargetLoss` but for implementation and device.
        companions: the networks that :meth:`Method.networks` made, on the device.
    """

    recipe: Recipe
    task: Task
    device: str
    dtype: torch.dtype
    soft_target_loss: Callable[..., SoftTargetLoss]
    companions: Mapping[str, nn.Module] = field(default_factory=dict)


class Method:
    """Turns pixels, labels and soft labels into one loss.

    Attributes:
        takes_sources: whether sources teach it; it then needs at least one.
        passes: passes over the training images in an epoch, by name; the first is the target's. All of an epoch's passes
            show the same views in the same order.
        companions: networks that are trained as well and never tested, by name.
    """

    takes_sources = False
    passes: tuple[str, ...] = ("target",)

    def __init__(self, setting: Setting) -> None:
        self.setting, self.task = setting, setting.task
        self.companions = nn.ModuleDict(dict(setting.companions))

    @classmethod
    def check(cls, recipe: Recipe, task: Task) -> None:
        """Insists on what the method needs.

        Raises:
            ValueError: with the field, its value and what would be right.
        """

    @classmethod
    def heads(cls, recipe: Recipe, classes: int) -> dict[str, int]:
        """Auxiliary heads of the target: their class counts, by name."""
        return {}

    @classmethod
    def networks(cls, recipe: Recipe, classes: int) -> dict[str, nn.Module]:
        """The companions, newly made."""
        return {}

    @classmethod
    def load(cls, recipe: Recipe, networks: dict[str, nn.Module]) -> None:
        """Loads what the companions start from, after all networks are made.

        Raises:
            ValueError: weights that cannot be found or do not fit.
        """

    def trained(self, target: Target, number: int) -> list[nn.Module]:
        """What pass ``number`` trains."""
        return [target, *self.companions.values()]

    def optim(self, number: int) -> Optim:
        """Of pass ``number``; the schedule is that of the recipe in every pass."""
        return self.setting.recipe.optim

    def step(self, target: Target, x: Tensor, targets: Tensor, soft: SoftTargets | None) -> dict[str, Tensor]:
        """The losses of a step of the first pass.

        Args:
            target: the network being trained.
            x: normalised pixels [B, 3, H, W], or clips [B, 3, T, H, W].
            targets: int64 [B], or float32 [B, K] of a multi-label task.
            soft: what the sources say of the batch; None without any.

        Returns:
            ``loss`` (the scalar to differentiate), ``primary`` (the task's loss on the labels), and ``aux/<name>`` of each
            auxiliary loss.
        """
        raise NotImplementedError

    def other_step(self, number: int, target: Target, x: Tensor, targets: Tensor, lr: float) -> dict[str, Tensor]:
        """The losses of a step of pass ``number`` > 0; ``loss`` is differentiated by what that pass trains.

        Args:
            number: of the pass.
            target, x, targets: see :meth:`step`.
            lr: the target's learning rate at this place in the schedule.
        """
        raise NotImplementedError

    def ask(self, network: nn.Module, x: Tensor, *, aux: bool = False) -> TargetOutput:
        """What a network of ours says of a batch, under the run's precision."""
        with self.autocast():
            return network(x, aux=aux)

    def ask_with(self, network: nn.Module, state: dict[str, Tensor], x: Tensor, *, aux: bool = False) -> TargetOutput:
        """The same with other parameters and buffers; the network's own stay as they are."""
        with self.autocast():
            return torch.func.functional_call(network, state, (x,), {"aux": aux})

    def autocast(self) -> Any:
        """The context of the run's precision."""
        setting = self.setting
        return torch.autocast(setting.device, setting.dtype, enabled=setting.dtype != torch.float32)


def companion(recipe: Recipe, *, field: str, model: str, classes: int) -> Target:
    """A newly made network to be trained beside the target; of the target's own backbone with its shortcuts and width.

    Args:
        field: that names ``model``, for messages.
        model: its backbone.
        classes: of its head.

    Raises:
        ValueError: an unknown backbone, or one that cannot see what the target sees.
    """
    own = {"shortcut": recipe.target.shortcut, "width": recipe.target.width}
    try:
        backbone = build_backbone(model, **(own if model == recipe.target.model else {}))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(str(error).replace("target.model", field)) from None
    if (backbone.dims == 3) != (recipe.data.frames > 0):
        takes, sees = ("clips", "images") if backbone.dims == 3 else ("images", "clips")
        raise ValueError(f"{field}: {model} takes {takes}, but with data.frames {recipe.data.frames} there are {sees}")
    return Target(backbone, classes)
