"""The ResNets of He et al. 2016, section 4.2: 3 stages of 16, 32 and 64 channels, option-A (parameter-free) shortcuts."""

import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone, Maps, outputs


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.pad = stride, (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.stride > 1 or self.pad:  # every second pixel, new channels zero
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x, inplace=True)


class ResNetCifar(Backbone):
    """``6 * blocks + 2`` layers; taps are the outputs of the 3 stages, at 1, 1/2 and 1/4 of the input's resolution."""

    tap_channels = (16, 32, 64)
    feature_dim = 64
    transfer_width = 64
    sections = (("conv1", "bn1"), ("stages.0",), ("stages.1",), ("stages.2",))

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.stages = nn.ModuleList()
        in_channels = 16
        for channels in self.tap_channels:
            stage = nn.Sequential()
            for i in range(blocks):
                stage.append(_Block(in_channels, channels, stride=2 if i == 0 and channels > 16 else 1))
                in_channels = channels
            self.stages.append(stage)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, pixel_BCHW: Tensor) -> Maps:
        x = F.relu(self.bn1(self.conv1(pixel_BCHW)), inplace=True)
        return outputs(self.stages, x)


def resnet20() -> Backbone:
    return ResNetCifar(3)


def resnet32() -> Backbone:
    return ResNetCifar(5)


def resnet44() -> Backbone:
    return ResNetCifar(7)
