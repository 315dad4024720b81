"""Backbones by name, and the target network built around one. A new backbone is a new file and a line here."""

from collections.abc import Callable
from typing import Any

from .backbone import Backbone
from .features import densenet121, mobilenet_v2, vgg16_bn
from .pretrained import load_backbone
from .puzzle import PuzzleTarget
from .resnet import resnet18, resnet34, resnet50
from .resnet3d import Shortcut, resnet3d18, resnet3d34, resnet3d50
from .resnet_cifar import resnet20, resnet32, resnet44
from .target import Target
from .timm_backbone import PREFIX, TimmBackbone
from .video import mc3_18, r2plus1d_18, r3d_18

_OF_FIXED_SHAPE: dict[str, Callable[[], Backbone]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "densenet121": densenet121,
    "vgg16_bn": vgg16_bn,
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

__all__ = ["BACKBONES", "Backbone", "PuzzleTarget", "Shortcut", "Target", "build_backbone", "load_backbone"]


def build_backbone(name: str, *, shortcut: Shortcut = "A", width: float = 1.0) -> Backbone:
    """A freshly initialised backbone.

    Args:
        name: in ``BACKBONES``, or ``timm:NAME`` of a network of timm's that offers ``features_only``.
        shortcut: of the 3D ResNets ``resnet3d*``; the others have their own.
        width: factor of their channels, likewise.

    Raises:
        ValueError: unknown name, or a choice that this backbone does not offer.
    """
    of_timm = name.startswith(PREFIX)
    if name not in BACKBONES and not of_timm:
        raise ValueError(
            f"target.model: no backbone is called {name!r}; there are {', '.join(BACKBONES)}, and {PREFIX}NAME for any of timm's"
        )
    chosen: dict[str, Any] = {"shortcut": shortcut, "width": width}
    if name not in _WITH_SHORTCUT_AND_WIDTH:
        for field, default in (("shortcut", "A"), ("width", 1)):
            if chosen[field] != default:
                raise ValueError(
                    f"target.{field}: {chosen[field]}, but {name} has no choice of it; only "
                    f"{', '.join(_WITH_SHORTCUT_AND_WIDTH)} have (leave it at {default})"
                )
        chosen = {}
    backbone = TimmBackbone(name.removeprefix(PREFIX)) if of_timm else BACKBONES[name](**chosen)
    backbone.name = name
    return backbone
