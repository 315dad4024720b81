"""Whether an auxiliary loss pulls the network where its task does: cosines between gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .methods import Method
from .models import Target
from .sources import SoftTargets

_SCALE = 1024.0  # of the losses, so that float16 holds small gradients; a cosine does not see it


def gradient_cosines(
    method: Method, target: Target, x: Tensor, targets: Tensor, soft: SoftTargets | None
) -> dict[str, Tensor]:
    """Cosine between the gradients of the task's and of each auxiliary loss, by the backbone's parameters (Du et al. 2018).

    Above 0 an auxiliary loss's step helps the task's loss to first order, below 0 it hinders it.

    Args:
        method: whose losses they are; those called ``aux/..`` are compared with ``primary``.
        target, x, targets, soft: as for :meth:`fasttrain.methods.Method.step`.

    Returns:
        A float32 scalar for each auxiliary loss, by its name without ``aux/`` (empty for a method without any); 0 where a
        gradient is 0, as of a backbone all of which is frozen. Training goes on as if nothing had been measured: networks,
        their running statistics and the random state stay as they are.
    """
    parameters = [p for p in target.backbone.parameters() if p.requires_grad]
    with _unchanged((target, method.companions), x.device):
        losses = method.step(target, x, targets, soft)
        aux = {n.removeprefix("aux/"): loss for n, loss in losses.items() if n.startswith("aux/")}
        if not aux or not parameters:
            return {name: torch.zeros((), device=x.device) for name in aux}
        task = _gradient(losses["primary"], parameters)
        return {n: torch.cosine_similarity(task, _gradient(loss, parameters), dim=0) for n, loss in aux.items()}


def _gradient(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(loss * _SCALE, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    ).float()


@contextmanager
def _unchanged(networks: tuple[nn.Module, ...], device: torch.device) -> Iterator[None]:
    """Puts back the networks' buffers, in place, and the random state."""
    buffers = [b for network in networks for b in network.buffers()]
    before = [b.clone() for b in buffers]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
