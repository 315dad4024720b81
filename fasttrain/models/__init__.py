"""Backbones by name, and the target network built around one. A new backbone is a new file and a line here."""

from collections.abc import Callable

from .backbone import Backbone
from .resnet import resnet18, resnet34, resnet50
from .resnet_cifar import resnet20, resnet32, resnet44
from .target import Target

BACKBONES: dict[str, Callable[[], Backbone]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
}

__all__ = ["BACKBONES", "Backbone", "Target", "build_backbone"]


def build_backbone(name: str) -> Backbone:
    """A freshly initialised backbone.

    Raises:
        ValueError: unknown name.
    """
    if name not in BACKBONES:
        raise ValueError(f"target.model: no backbone is called {name!r}; there are {', '.join(BACKBONES)}")
    return BACKBONES[name]()
