"""The 3D ResNets of Hara et al. 2018, "Can spatiotemporal 3D CNNs retrace the history of 2D CNNs and ImageNet?".

Modules have the names of the authors' code, so that its checkpoints fit by name (but for ``fc``).

Shape suffixes: B batch, C channels, T time, H W space.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone, Maps, outputs

Shortcut = Literal["A", "B"]


class _Shortcut(nn.Module):
    """Type A, without parameters: every ``stride``-th value each way, new channels zero.

    The authors' code cuts the gradient here; this one lets it through.
    """

    def __init__(self, missing: int, stride: int) -> None:
        super().__init__()
        self.missing, self.stride = missing, stride

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        s = self.stride
        return F.pad(x_BCTHW[:, :, ::s, ::s, ::s], (0, 0, 0, 0, 0, 0, 0, self.missing))


class _Block(nn.Module):
    """Two 3x3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(planes)
        self.conv2 = nn.Conv3d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(planes)
        self.downsample = downsample

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        out_BCTHW = F.relu(self.bn1(self.conv1(x_BCTHW)), inplace=True)
        out_BCTHW = self.bn2(self.conv2(out_BCTHW))
        return F.relu(out_BCTHW + (self.downsample(x_BCTHW) if self.downsample else x_BCTHW), inplace=True)


class _Bottleneck(nn.Module):
    """1x1x1 down, 3x3x3 with the stride, 1x1x1 up to four times the planes."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(planes)
        self.conv2 = nn.Conv3d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(planes)
        self.conv3 = nn.Conv3d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(planes * self.expansion)
        self.downsample = downsample

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        out_BCTHW = F.relu(self.bn1(self.conv1(x_BCTHW)), inplace=True)
        out_BCTHW = F.relu(self.bn2(self.conv2(out_BCTHW)), inplace=True)
        out_BCTHW = self.bn3(self.conv3(out_BCTHW))
        return F.relu(out_BCTHW + (self.downsample(x_BCTHW) if self.downsample else x_BCTHW), inplace=True)


class ResNet3d(Backbone):
    """Taps are the outputs of ``layer1`` .. ``layer4``: at 1/2, 1/4, 1/8 and 1/16 of the clip's frames and 1/4, 1/8, 1/16 and
    1/32 of its height and width, rounded up.

    Args:
        block: with two convolutions, or with a bottleneck.
        blocks: of each stage.
        shortcut: where a block changes the shape: A (no parameters) or B (1x1x1 convolution and batch norm).
        width: factor of all channels; the stem has 64 at 1. A transfer module's width is 1000 times this, rounded to an
            even number.

    Raises:
        ValueError: a width that leaves no channel.
    """

    dims = 3
    sections = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))

    def __init__(
        self, block: type[_Block] | type[_Bottleneck], blocks: tuple[int, ...], *, shortcut: Shortcut, width: float
    ) -> None:
        super().__init__()
        stem = round(64 * width)
        if stem < 1:
            raise ValueError(
                f"target.width: {width:g} leaves the stem {stem} of its 64 channels; 1 is the published width"
            )
        self.conv1 = nn.Conv3d(3, stem, 7, (1, 2, 2), 3, bias=False)
        self.bn1 = nn.BatchNorm3d(stem)
        in_channels, stages = stem, []
        for i, count in enumerate(blocks):
            planes, stride = stem * 2**i, 1 if i == 0 else 2
            stage = nn.Sequential(
                block(in_channels, planes, stride, _downsample(block, in_channels, planes, stride, shortcut))
            )
            in_channels = planes * block.expansion
            stage.extend(block(in_channels, planes, 1, None) for _ in range(count - 1))
            stages.append(stage)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.tap_channels = tuple(stem * 2**i * block.expansion for i in range(4))
        self.feature_dim = in_channels
        self.transfer_width = max(2, 2 * round(500 * width))
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, clip_BCTHW: Tensor) -> Maps:
        x_BCTHW = F.relu(self.bn1(self.conv1(clip_BCTHW)), inplace=True)
        x_BCTHW = F.max_pool3d(x_BCTHW, 3, 2, 1)
        return outputs((self.layer1, self.layer2, self.layer3, self.layer4), x_BCTHW)


def _downsample(
    block: type[_Block] | type[_Bottleneck], in_channels: int, planes: int, stride: int, shortcut: Shortcut
) -> nn.Module | None:
    channels = planes * block.expansion
    if stride == 1 and in_channels == channels:
        return None
    if shortcut == "A":
        return _Shortcut(channels - in_channels, stride)
    return nn.Sequential(nn.Conv3d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm3d(channels))


def resnet3d18(*, shortcut: Shortcut, width: float) -> Backbone:
    return ResNet3d(_Block, (2, 2, 2, 2), shortcut=shortcut, width=width)


def resnet3d34(*, shortcut: Shortcut, width: float) -> Backbone:
    return ResNet3d(_Block, (3, 4, 6, 3), shortcut=shortcut, width=width)


def resnet3d50(*, shortcut: Shortcut, width: float) -> Backbone:
    return ResNet3d(_Bottleneck, (3, 4, 6, 3), shortcut=shortcut, width=width)
