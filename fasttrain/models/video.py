"""torchvision's networks for clips: the ResNets of Tran et al. 2018, "A closer look at spatiotemporal convolutions"."""

from typing import Any

from torch import Tensor

from .backbone import Backbone, Maps, outputs


class VideoResNet(Backbone):
    """torchvision's network without its classifier; a state dict of torchvision's fits, but for ``fc``.

    Taps are the outputs of ``layer1`` .. ``layer4``, at 1/2, 1/4, 1/8 and 1/16 of the input's height and width (rounded up)
    and, but for MC3, at 1, 1/2, 1/4 and 1/8 of its frames.

    Args:
        name: in ``torchvision.models.video``.
    """

    dims = 3
    transfer_width = 1000
    sections = (("stem",), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
    library = "torchvision"

    def __init__(self, name: str) -> None:
        super().__init__()
        import torchvision  # slow to import, and the others do without

        network: Any = torchvision.models.get_model(name, weights=None)
        self.stem = network.stem
        self.layer1, self.layer2, self.layer3, self.layer4 = (getattr(network, f"layer{i}") for i in range(1, 5))
        self.tap_channels = (64, 128, 256, 512)
        self.feature_dim = network.fc.in_features

    def forward(self, clip_BCTHW: Tensor) -> Maps:
        x_BCTHW = self.stem(clip_BCTHW)
        return outputs((self.layer1, self.layer2, self.layer3, self.layer4), x_BCTHW)


def r3d_18() -> Backbone:
    return VideoResNet("r3d_18")


def mc3_18() -> Backbone:
    return VideoResNet("mc3_18")


def r2plus1d_18() -> Backbone:
    return VideoResNet("r2plus1d_18")
