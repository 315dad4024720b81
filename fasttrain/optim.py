"""The optimiser, the learning rate as a function of the step, and the moving average of the weights."""

import itertools
import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .recipe import Optim


def build_optimiser(spec: Optim, network: nn.Module, *others: nn.Module) -> torch.optim.Optimizer:
    """Fused SGD over all parameters that are trained; its learning rate is set before every step.

    ``others`` are networks that learn beside ``network``, at the full rate.

    With ``backbone_lr`` there are two groups, of the backbone and of the heads. Their ``factor`` is what each multiplies
    the step's learning rate by; a group without one takes it as it is.

    Raises:
        ValueError: ``impl: apex`` where NVIDIA's apex is not installed, or no CUDA device holds the network.
    """
    settings: dict[str, Any] = {
        "lr": spec.lr,
        "momentum": spec.momentum,
        "dampening": spec.dampening,
        "weight_decay": spec.weight_decay,
        "nesterov": spec.nesterov,
    }
    if spec.impl == "torch":
        return torch.optim.SGD(_groups(spec, network, *others), **settings, fused=True)
    try:
        from apex.optimizers import FusedSGD
    except Exception as error:  # a broken installation, or PyPI's apex, which is something else, can raise anything
        raise ValueError(
            f"optim.impl: apex cannot be used ({type(error).__name__}: {' '.join(str(error).split())[:160]}); NVIDIA's is built "
            "from its source, PyPI's is something else; torch is as fast or faster and needs nothing"
        ) from None
    if any(p.device.type != "cuda" for n in (network, *others) for p in n.parameters()):
        raise ValueError("optim.impl: apex's FusedSGD needs a CUDA device")
    return FusedSGD(_groups(spec, network, *others), **settings)


def _groups(spec: Optim, network: nn.Module, *others: nn.Module) -> list[dict[str, Any]]:
    """Parameters that are trained, as groups of an optimiser."""
    factor = spec.backbone_lr
    trained = [p for n in (network, *others) for p in n.parameters() if p.requires_grad]
    if factor == 1:
        return [{"params": trained}]
    backbone = {id(p) for p in network.get_submodule("backbone").parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) in backbone], "factor": factor, "lr": spec.lr * factor},
        {"params": [p for p in trained if id(p) not in backbone], "factor": 1.0},
    ]
    return [g for g in groups if g["params"]]


def build_average(spec: Optim, network: nn.Module) -> AveragedModel | None:
    """An exponential moving average of weights and batch-norm statistics, or None where the recipe has none."""
    if not spec.ema:
        return None
    return _Average(network, multi_avg_fn=get_ema_multi_avg_fn(spec.ema), use_buffers=True)


class _Average(AveragedModel):
    """Its own way to update sends its count to the device in every step, and on a GPU the host waits for that."""

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        if self.n_averaged:
            average_again(self, model)
            self.n_averaged += 1
        else:
            super().update_parameters(model)


def average_again(average: AveragedModel, network: nn.Module) -> None:
    """What ``average.update_parameters(network)`` does but for the first time, without its count: work of the device alone."""
    assert average.multi_avg_fn is not None and average.use_buffers
    by_type: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    ours = itertools.chain(average.module.parameters(), average.module.buffers())
    for mean, value in zip(ours, itertools.chain(network.parameters(), network.buffers()), strict=True):
        means, values = by_type.setdefault(mean.dtype, ([], []))
        means.append(mean.detach())
        values.append(value.detach())
    for means, values in by_type.values():
        average.multi_avg_fn(means, values, average.n_averaged)


class Schedule:
    """Learning rate of a step: a pure function of the step, but for ``plateau``, which also hears of validation.

    Args:
        spec: of the optimiser.
        steps_per_epoch: in batches.
    """

    def __init__(self, spec: Optim, steps_per_epoch: int) -> None:
        self.spec, self.steps_per_epoch = spec, steps_per_epoch
        self.steps = spec.epochs * steps_per_epoch
        self._best, self._waited, self._drops = math.inf, 0, 0

    def lr(self, step: int) -> float:
        """Of step 0, 1, .. (the one to be taken)."""
        return self.spec.lr * self.rise(step) * self.factor(step)

    def rise(self, step: int) -> float:
        """Of the warm-up, up to 1."""
        warmup = self.spec.warmup_epochs * self.steps_per_epoch
        return min(1.0, (step + 1) / warmup) if warmup else 1.0

    def factor(self, step: int) -> float:
        """Of the peak, without the warm-up."""
        spec = self.spec
        warmup = spec.warmup_epochs * self.steps_per_epoch
        epoch = step // self.steps_per_epoch
        if spec.schedule == "step":
            factor = spec.gamma ** sum(epoch >= m for m in spec.milestones)
        elif spec.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * max(0.0, step - warmup) / max(1.0, self.steps - warmup)))
        elif spec.schedule == "onecycle":
            factor = one_cycle(step, self.steps)
        elif spec.schedule == "plateau":
            factor = spec.gamma**self._drops
        else:
            factor = 1.0
        return factor

    def heard(self, val_loss: float) -> None:
        """Tells ``plateau`` of a validation loss; torch's ReduceLROnPlateau with its default threshold."""
        if val_loss < self._best * (1 - 1e-4):
            self._best, self._waited = val_loss, 0
            return
        self._waited += 1
        if self._waited > self.spec.patience:
            self._drops, self._waited = self._drops + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited, "drops": self._drops}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._waited, self._drops = state["best"], state["waited"], state["drops"]


def one_cycle(step: int, steps: int) -> float:
    """Factor of the peak: from 1/25 up over the first 30 % of the steps, then down to 1/250,000, both along a cosine.

    Source: Smith and Topin 2018, in the two-phase form of torch's OneCycleLR, but with the momentum left alone.
    """
    start, low, top = 1 / 25, 1 / 25 / 1e4, 0.3 * steps - 1

    def cosine(a: float, b: float, share: float) -> float:
        return b + (a - b) / 2 * (1 + math.cos(math.pi * share))

    if step <= top:
        return cosine(start, 1.0, step / max(top, 1e-9))
    return cosine(1.0, low, (step - top) / max(steps - 1 - top, 1e-9))
