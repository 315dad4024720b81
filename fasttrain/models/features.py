"""torchvision's networks whose convolutions are one sequence of modules, ``features``, with a ``classifier`` after it.

MobileNetV2 (Sandler et al. 2018), DenseNet-121 (Huang et al. 2017) and VGG-16 with batch norm (Simonyan and Zisserman 2015).
The SSKT paper gives no width for their transfer modules. Its code gives all of its networks for large images, whose last
stages have 512 to 2048 channels, the width 1000, and only those for CIFAR another: so it is 1000 here.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.weights import Weights

from .backbone import Backbone, Maps


class Features(Backbone):
    """torchvision's network without its classifier; a state dict of torchvision's fits, but for ``classifier``.

    Args:
        name: in ``torchvision.models``.
        taps: channels of the maps that are tapped, by the name of the module in ``features`` that gives them.
        ends: names of the modules in ``features`` with which a section ends; what follows the last is one more.
        feature_dim: channels of the last map.
        least_size: side in pixels below which nothing is left of the last map.
    """

    transfer_width = 1000
    library = "torchvision"

    def __init__(
        self, name: str, taps: Mapping[str, int], *, ends: Collection[str], feature_dim: int, least_size: int = 1
    ) -> None:
        super().__init__()
        import torchvision  # slow to import, and others do without

        network: Any = torchvision.models.get_model(name, weights=None)
        self.features: nn.Sequential = network.features
        self.tap_names, self.tap_channels = tuple(taps), tuple(taps.values())
        self.feature_dim, self.least_size = feature_dim, least_size
        sections: list[list[str]] = [[]]
        for part, module in self.features.named_children():
            if any(True for _ in module.parameters()):
                sections[-1].append(f"features.{part}")
            if part in ends:
                sections.append([])
        self.sections = tuple(tuple(names) for names in sections if names)

    def forward(self, pixel_BCHW: Tensor) -> Maps:
        self.check_size(pixel_BCHW.shape[2], pixel_BCHW.shape[3])
        x_BCHW, taps = pixel_BCHW, []
        for part, module in self.features.named_children():
            x_BCHW = module(x_BCHW)
            if part in self.tap_names:
                taps.append(x_BCHW)
        return taps, x_BCHW

    def own_tensors(self, weights: Weights) -> tuple[dict[str, Tensor], str]:
        """As everywhere; here the classifier is called so."""
        return {k: v for k, v in weights.tensors.items() if not k.startswith("classifier.")}, "by name"


class DenseNet(Features):
    """Its last batch norm is followed by a ReLU that is no module."""

    def forward(self, pixel_BCHW: Tensor) -> Maps:
        taps, last_BCHW = super().forward(pixel_BCHW)
        return taps, F.relu(last_BCHW)

    def own_tensors(self, weights: Weights) -> tuple[dict[str, Tensor], str]:
        """torchvision's files are older than its names: a layer's ``norm1`` is ``norm.1`` there."""
        tensors, how = super().own_tensors(weights)
        return {re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", k): v for k, v in tensors.items()}, how


def mobilenet_v2() -> Backbone:
    """Taps are the outputs of 6 of the 7 bottleneck stages, at 1/4 (24 channels), 1/8, 1/16, 1/16, 1/32 and 1/32 of the input's
    resolution (rounded up); the pooled map is that of the convolution to 1280 channels after them.

    The paper draws 6 and does not say which is left out. Here it is the first: it is one block of 16 channels, has seen the
    least, and at 1/2 of the resolution a transfer module on it costs 2.8 times what those on all the others cost together.
    The dropout of torchvision's classifier is left out. Sections are the stem and the 7 stages, the last with the
    convolution after it.
    """
    taps = {"3": 24, "6": 32, "10": 64, "13": 96, "16": 160, "17": 320}
    return Features("mobilenet_v2", taps, ends=("0", "1", "3", "6", "10", "13", "16"), feature_dim=1280)


def densenet121() -> Backbone:
    """Taps are the outputs of the 3 transition layers, at 1/8, 1/16 and 1/32 of the input's resolution; the pooled map is that
    of the last dense block, normalised and after the ReLU. Sections are the stem and the 4 dense blocks, each with what follows.
    """
    taps = {"transition1": 128, "transition2": 256, "transition3": 512}
    return DenseNet("densenet121", taps, ends=("pool0", *taps), feature_dim=1024, least_size=29)


def vgg16_bn() -> Backbone:
    """Taps are the outputs of the 5 max-poolings, at 1/2 to 1/32 of the input's resolution (rounded down).

    The last is pooled to 512 numbers: torchvision's two layers of 4096 are part of its classifier and left out, and with
    them 86 % of the parameters. Sections are the convolutions before each pooling; there is no other stem.
    """
    taps = {"6": 64, "13": 128, "23": 256, "33": 512, "43": 512}
    return Features("vgg16_bn", taps, ends=tuple(taps), feature_dim=512, least_size=32)
