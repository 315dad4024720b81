"""The ResNets of He et al. 2016, table 1, as torchvision builds them: 4 stages of 64 to 512 planes, for large images."""

from typing import Any

from torch import Tensor

from .backbone import Backbone, Maps, outputs


class ResNet(Backbone):
    """torchvision's network without its classifier; a state dict of torchvision's fits, but for ``fc``.

    Taps are the outputs of ``layer1`` .. ``layer4``, at 1/4, 1/8, 1/16 and 1/32 of the input's resolution (rounded up).

    Args:
        name: in ``torchvision.models``, of a ResNet.
    """

    transfer_width = 1000
    sections = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
    library = "torchvision"

    def __init__(self, name: str) -> None:
        super().__init__()
        import torchvision  # slow to import, and the small ResNets do without

        network: Any = torchvision.models.get_model(name, weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = network.conv1, network.bn1, network.relu, network.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = (getattr(network, f"layer{i}") for i in range(1, 5))
        expansion = network.layer1[0].expansion  # channels that a block gives, for each of its planes
        self.tap_channels = tuple(planes * expansion for planes in (64, 128, 256, 512))
        self.feature_dim = network.fc.in_features

    def forward(self, pixel_BCHW: Tensor) -> Maps:
        x = self.maxpool(self.relu(self.bn1(self.conv1(pixel_BCHW))))
        return outputs((self.layer1, self.layer2, self.layer3, self.layer4), x)


def resnet18() -> Backbone:
    return ResNet("resnet18")


def resnet34() -> Backbone:
    return ResNet("resnet34")


def resnet50() -> Backbone:
    return ResNet("resnet50")
