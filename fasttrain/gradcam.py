"""Grad-CAM: which places of an image speak for a class (Selvaraju et al. 2017, arXiv:1610.02391, Eq. 1 and 2).

Shape suffixes: B batch, C channels of the map, K classes, T H W time and space.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import Target


@dataclass(frozen=True)
class Explained:
    """What a network says of a batch, and where it sees it.

    Attributes:
        logits_BK: float32.
        class_B: int64, the classes that are explained.
        cam: float32 [B, H, W] or [B, T, H, W], 0 and above, at the resolution of the network's last map.
    """

    logits_BK: Tensor
    class_B: Tensor
    cam: Tensor


def explain(network: nn.Module, x: Tensor, class_B: Tensor | None = None) -> Explained:
    """Grad-CAM of the map that a network in evaluation pools, each sample by itself. The network stays as it is.

    Args:
        network: a target, or any classifier of images that pools or flattens a map [B, C, H, W] (or [B, H, W, C]); it is
            found by what its modules take and give.
        x: normalised pixels [B, 3, H, W], of a target for clips [B, 3, T, H, W].
        class_B: int64, the classes to explain; None: those of the largest logits.

    Raises:
        ValueError: the network pools no map with more than one place.
    """
    target = next((m for m in network.modules() if isinstance(m, Target)), None)
    with torch.enable_grad():
        map_, logits_BK, axis = _of_classifier(network, x) if target is None else (*_of_target(target, x), 1)
        if class_B is None:
            class_B = logits_BK.argmax(1)
        return Explained(logits_BK.detach().float(), class_B, grad_cam(map_, logits_BK, class_B, channel_axis=axis))


def grad_cam(map_: Tensor, logits_BK: Tensor, class_B: Tensor, *, channel_axis: int = 1) -> Tensor:
    """``ReLU(sum_c w_c A_c)``, where ``w_c`` is the mean over all places of the gradient of the class's logit by ``A_c``.

    Args:
        map_: A, [B, C, H, W] or [B, C, T, H, W], in whose graph the logits are; a sample's logits come from its own alone.
        logits_BK: of the network.
        class_B: int64, the classes.
        channel_axis: where C is, if not there.

    Returns:
        float32 [B, H, W] or [B, T, H, W].
    """
    (slope,) = torch.autograd.grad(logits_BK.gather(1, class_B[:, None]).sum(), map_)
    slope, map_ = slope.movedim(channel_axis, 1), map_.movedim(channel_axis, 1)
    weight = slope.mean(tuple(range(2, map_.dim())), keepdim=True)
    return (weight * map_).sum(1).relu().detach().float()


def enlarged(cam: Tensor, *, size: int, frames: int = 0) -> Tensor:
    """Brought to an image's side in pixels, bilinearly: [B, size, size]; of clips the frame in the middle of ``frames``."""
    if cam.dim() == 3:
        return F.interpolate(cam[:, None], (size, size), mode="bilinear")[:, 0]
    return F.interpolate(cam[:, None], (frames, size, size), mode="trilinear")[:, 0, frames // 2]


def _of_target(target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        _, last = target.backbone(x)
    if prod(last.shape[-2:]) == 1:
        raise ValueError("its last map has one place only")
    last = last.detach().requires_grad_()
    return last, target.head(target.backbone.pool(last))


@dataclass(frozen=True)
class _Seen:
    """A tensor that a module took (``before``) or gave."""

    module: nn.Module
    before: bool
    shape: torch.Size


def _of_classifier(network: nn.Module, x_BCHW: Tensor) -> tuple[Tensor, Tensor, int]:
    """The map that is pooled, the logits in its graph, and the axis of its channels."""
    place, axis = _pooled(network, x_BCHW)
    kept: list[Tensor] = []

    def cut(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or tensor.shape != place.shape:
            return tensor
        # not the leaf itself: a ReLU that follows may write to it, and what it writes is then the map
        kept.append(tensor.detach().clone().requires_grad_().clone())
        return kept[-1]

    if place.before:
        handle = place.module.register_forward_pre_hook(lambda module, given: (cut(given[0]), *given[1:]))
    else:
        handle = place.module.register_forward_hook(lambda module, given, made: cut(made))
    try:
        logits_BK = network(x_BCHW)
    finally:
        handle.remove()
    return kept[-1], logits_BK, axis


def _pooled(network: nn.Module, x_BCHW: Tensor) -> tuple[_Seen, int]:
    """Where the last map of several places is seen, and which of its axes are the channels: the one that is left after it."""
    seen: list[_Seen] = []

    def note(module: nn.Module, before: bool, tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            seen.append(_Seen(module, before, tensor.shape))

    handles: list[Any] = []
    for module in network.modules():
        handles.append(module.register_forward_pre_hook(lambda m, given: note(m, True, given[0] if given else None)))
        handles.append(module.register_forward_hook(lambda m, given, made: note(m, False, made)))
    try:
        with torch.no_grad():
            network(x_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    maps = [i for i, s in enumerate(seen[:-1]) if len(s.shape) == 4 and prod(s.shape[2:]) > 1]
    if maps and seen[maps[-1]].shape != x_BCHW.shape:
        place, left = seen[maps[-1]], seen[maps[-1] + 1].shape[1]
        if left in (place.shape[1], prod(place.shape[1:])):
            return place, 1
        if left == place.shape[3] and prod(place.shape[1:3]) > 1:
            return place, 3
    raise ValueError("it pools no map of several places")
