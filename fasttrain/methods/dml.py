"""Deep mutual learning: networks that are trained side by side, each following what the others say."""

import torch
from torch import Tensor, nn

from fasttrain.models import Target, load_backbone
from fasttrain.recipe import Recipe
from fasttrain.sources import SoftTargets
from fasttrain.tasks import Task

from .base import Method, companion


class Dml(Method):
    """Zhang et al. 2018, for each of K networks: ``L_k = L_task,k + 1 / (K - 1) * sum_l KL(p_l || p_k)``, T = 1.

    What the others say is constant in L_k. All networks see the same batch and take their steps together, from one forward pass
    each (the published code trains them in turn, on batches of their own). The target is network 1, and what is tested.
    """

    @classmethod
    def check(cls, recipe: Recipe, task: Task) -> None:
        peers, weights = recipe.method.peers, recipe.method.peer_weights
        if peers is not None and not peers:
            raise ValueError("method.peers: dml needs at least one peer; null takes one like the target")
        if weights is not None and len(weights) != len(peer_models(recipe)):
            raise ValueError(f"method.peer_weights: {len(weights)} for {len(peer_models(recipe))} peers")

    @classmethod
    def networks(cls, recipe: Recipe, classes: int) -> dict[str, nn.Module]:
        return {
            f"peer{number}": companion(recipe, field="method.peers", model=model, classes=classes)
            for number, model in enumerate(peer_models(recipe), start=1)
        }

    @classmethod
    def load(cls, recipe: Recipe, networks: dict[str, nn.Module]) -> None:
        for network, weights in zip(networks.values(), recipe.method.peer_weights or [], strict=False):
            if weights is not None:
                try:
                    load_backbone(network.backbone, weights)  # type: ignore[arg-type]
                except ValueError as error:
                    said = str(error).replace("target.weights", "method.peer_weights")
                    raise ValueError(said.replace("target.model", "method.peers")) from None

    def step(self, target: Target, x: Tensor, targets: Tensor, soft: SoftTargets | None) -> dict[str, Tensor]:
        networks = {"target": target, **dict(self.companions.items())}  # torch 2.11 does not trace **ModuleDict
        logits = {name: self.ask(network, x).logits_BK for name, network in networks.items()}
        out: dict[str, Tensor] = {}
        losses = []
        for name, own_BK in logits.items():
            task = self.task.loss(own_BK, targets)
            follow = {n: self.task.soft_loss(own_BK, l_BK.detach(), 1.0) for n, l_BK in logits.items() if n != name}
            losses += [task, torch.stack(list(follow.values())).mean()]
            if name == "target":
                out |= {"primary": task} | {f"aux/{n}": value for n, value in follow.items()}
            else:
                out[f"primary/{name}"] = task
        return {"loss": torch.stack(losses).sum()} | out


def peer_models(recipe: Recipe) -> list[str]:
    """Backbones of the target's peers."""
    return [recipe.target.model] if recipe.method.peers is None else recipe.method.peers
