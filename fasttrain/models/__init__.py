"""Backbones by name, and the target network built around one. A new backbone is a new file and a line here."""

from collections.abc import Callable
from typing import Any

from .backbone import Backbone
from .pretrained import load_backbone
from .resnet import resnet18, resnet34, resnet50
from .resnet3d import Shortcut, resnet3d18, resnet3d34, resnet3d50
from .resnet_cifar import resnet20, resnet32, resnet44
from .target import Target
from .video import mc3_18, r2plus1d_18, r3d_18

_OF_FIXED_SHAPE: dict[str, Callable[[], Backbone]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "r3d_18": r3d_18,
    "mc3_18": mc3_18,
    "r2plus1d_18": r2plus1d_18,
}
_WITH_SHORTCUT_AND_WIDTH: dict[str, Callable[..., Backbone]] = {
    "resnet3d18": resnet3d18,
    "resnet3d34": resnet3d34,
    "resnet3d50": resnet3d50,
}
BACKBONES: dict[str, Callable[..., Backbone]] = _OF_FIXED_SHAPE | _WITH_SHORTCUT_AND_WIDTH

__all__ = ["BACKBONES", "Backbone", "Shortcut", "Target", "build_backbone", "load_backbone"]


def build_backbone(name: str, *, shortcut: Shortcut = "A", width: float = 1.0) -> Backbone:
    """A freshly initialised backbone.

    Args:
        name: in ``BACKBONES``.
        shortcut: of the 3D ResNets ``resnet3d*``; the others have their own.
        width: factor of their channels, likewise.

    Raises:
        ValueError: unknown name, or a choice that this backbone does not offer.
    """
    if name not in BACKBONES:
        raise ValueError(f"target.model: no backbone is called {name!r}; there are {', '.join(BACKBONES)}")
    chosen: dict[str, Any] = {"shortcut": shortcut, "width": width}
    if name in _OF_FIXED_SHAPE:
        for field, default in (("shortcut", "A"), ("width", 1)):
            if chosen[field] != default:
                raise ValueError(
                    f"target.{field}: {chosen[field]}, but {name} has no choice of it; only "
                    f"{', '.join(_WITH_SHORTCUT_AND_WIDTH)} have (leave it at {default})"
                )
        chosen = {}
    backbone = BACKBONES[name](**chosen)
    backbone.name = name
    return backbone
