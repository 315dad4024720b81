"""Sources in 8 bits, emulated: what fp8 or int8 arithmetic would say, without hardware that has it.

Weights and inputs of convolutions and linear layers are rounded to what 8 bits hold; products and sums are in float32, as
tensor cores add them (fp8 in float32, int8 exactly), and everything between the layers is float32, too. So the emulation
is at least as exact as any real path: what misses a limit here misses it on a GPU.

Weights have a scale for each output channel. Inputs have one that calibration photographs set (``static``), one for the batch
(``tensor``), one for each image (``image``), or, for 1x1 convolutions, which are matrix products, one for each pixel (``pixel``).

Shape suffixes: B batch, C channels, O output channels, H W height and width.
"""

import copy
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

FP8_LARGEST = 448.0  # of e4m3 (torch.finfo)
Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Setting:
    """One way to compute in 8 bits.

    Attributes:
        kind: ``fp8`` (e4m3), ``int8`` (symmetric), or ``int8u``: int8 weights, inputs in 0 .. 255 where none is negative.
        scales: of the inputs: ``static``, ``tensor``, ``image`` or ``pixel``.
        pointwise: only 1x1 convolutions and linear layers: what ``torch._scaled_mm`` and ``torch._int_mm`` compute.
        ends: whether the first and the last layer are in 8 bits, too.
    """

    kind: str
    scales: str
    pointwise: bool
    ends: bool

    @property
    def name(self) -> str:
        layers = "1x1 convolutions" if self.pointwise else "all convolutions"
        kind = {"int8u": "int8, unsigned inputs"}.get(self.kind, self.kind)
        return f"{kind} (emulated), {layers}{'' if self.ends else ' but first and last'}, {self.scales} scales"


def settings() -> list[Setting]:
    """What is tried: every kind of scale on every set of layers."""
    out = [Setting(k, s, p, e) for k, p, e, s in product(KINDS, (False, True), (True, False), ("static", "image"))]
    out += [Setting(k, "tensor", False, False) for k in ("fp8", "int8")]
    return out + [Setting(k, "pixel", True, False) for k in KINDS]


KINDS = ("fp8", "int8", "int8u")


def emulated(network: nn.Module, setting: Setting, calibration_BCHW: Tensor) -> nn.Module:
    """A copy of a network in evaluation mode, batch norms folded, that computes in 8 bits.

    Args:
        network: float32; its layers run in the order in which they are run on the calibration images.
        setting: how.
        calibration_BCHW: the network's input for a few images; they set ``static`` scales.
    """
    out = copy.deepcopy(network)
    ranges = _ranges(out, calibration_BCHW)
    layers = list(ranges) if setting.ends else list(ranges)[1:-1]
    for layer in layers:
        if setting.pointwise and not _pointwise(layer):
            continue
        least, most = ranges[layer]
        kind = "int8" if setting.kind == "int8u" and least < 0 else setting.kind
        with torch.no_grad():
            by_output = (-1, *[1] * (layer.weight.dim() - 1))
            largest_O = layer.weight.abs().flatten(1).amax(1).view(by_output)
            layer.weight.copy_(rounded(layer.weight, largest_O, kind.removesuffix("u")))
        static = torch.tensor(max(-least, most))
        layer.register_forward_pre_hook(_Inputs(kind, setting.scales, static))
    return out


def rounded(x: Tensor, largest: Tensor, kind: str) -> Tensor:
    """float32 values as 8 bits hold them, where ``largest`` (broadcast) is the largest value that they can have to hold."""
    if kind == "fp8":
        scale = largest.clamp(min=1e-12) / FP8_LARGEST
        return (x / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).to(x.dtype) * scale
    low, high = (0, 255) if kind == "int8u" else (-127, 127)
    scale = largest.clamp(min=1e-12) / high
    return (x / scale).round().clamp(low, high) * scale


class _Inputs:
    """Rounds a layer's input before it runs."""

    def __init__(self, kind: str, scales: str, static: Tensor) -> None:
        self.kind, self.scales, self.static = kind, scales, static

    def __call__(self, layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = given[0]
        if self.scales == "static":
            largest = self.static
        elif self.scales == "tensor":
            largest = x.abs().max()
        else:
            others = [1] if self.scales == "pixel" else list(range(1, x.dim()))
            largest = x.abs().amax(others, keepdim=True)
        return (rounded(x, largest, self.kind), *given[1:])


def _ranges(network: nn.Module, x_BCHW: Tensor) -> dict[Layer, tuple[float, float]]:
    """Each layer's smallest and largest input, in the order in which the layers run."""
    seen: dict[Layer, tuple[float, float]] = {}

    def look(layer: Layer, given: tuple[Tensor, ...]) -> None:
        seen[layer] = (float(given[0].min()), float(given[0].max()))

    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [m.register_forward_pre_hook(look) for m in layers]
    with torch.no_grad():
        network(x_BCHW)
    for hook in hooks:
        hook.remove()
    return seen


def _pointwise(layer: Layer) -> bool:
    return isinstance(layer, nn.Linear) or (layer.kernel_size == (1, 1) and layer.groups == 1)
