"""Auxiliary heads of the target, one a source: linear, or with SSKT's transfer module."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

_LAYERS: dict[int, tuple[type[nn.Conv2d | nn.Conv3d], type[nn.BatchNorm2d | nn.BatchNorm3d]]] = {
    2: (nn.Conv2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.BatchNorm3d),
}


class AuxiliaryHead(nn.Module):
    """Guesses a source's logits [B, classes] from the target's taps and pooled feature."""

    def forward(self, taps: list[Tensor], feature_BD: Tensor) -> Tensor:
        raise NotImplementedError


class LinearHead(AuxiliaryHead):
    """One linear layer on the pooled feature."""

    def __init__(self, feature_dim: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(feature_dim, classes)

    def forward(self, taps: list[Tensor], feature_BD: Tensor) -> Tensor:
        return self.linear(feature_BD)


class TransferModule(AuxiliaryHead):
    """SSKT's transfer module (Fig. 3): a bottleneck on every tap, pooled, combined, then one linear layer.

    Args:
        tap_channels: channels of each tap.
        width: w; the bottlenecks are 1x1 to w/2, 3x3 with stride 2, 1x1 to w.
        classes: of the source.
        combine: ``sum`` of the branches (the paper) or their ``mean`` (the published code).
        dims: 2 for taps [B, C, H, W], 3 for those of clips [B, C, T, H, W]: 1x1x1 and 3x3x3 convolutions.
    """

    def __init__(
        self,
        tap_channels: Sequence[int],
        width: int,
        classes: int,
        combine: Literal["sum", "mean"] = "sum",
        *,
        dims: int = 2,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList([Bottleneck(c, width, dims) for c in tap_channels])
        self.linear = nn.Linear(width, classes)
        self.combine = combine

    def forward(self, taps: list[Tensor], feature_BD: Tensor) -> Tensor:
        return self.logits([pooled(b(t)) for b, t in zip(self.branches, taps, strict=True)])

    def logits(self, pooled: list[Tensor]) -> Tensor:
        """The branches' pooled features, [B, w] each -> combined, and through the linear layer."""
        pooled_NBW = torch.stack(pooled)
        return self.linear(pooled_NBW.sum(0) if self.combine == "sum" else pooled_NBW.mean(0))


class Bottleneck(nn.Sequential):
    """What a transfer module does with one tap: 1x1 to w/2, 3x3 with stride 2, 1x1 to w, each with BN and ReLU."""

    def __init__(self, in_channels: int, width: int, dims: int = 2) -> None:
        assert dims in _LAYERS, dims
        conv, norm = _LAYERS[dims]
        half = width // 2
        layers: list[nn.Module] = []
        for layer in (
            conv(in_channels, half, 1),
            conv(half, half, 3, stride=2, padding=1),
            conv(half, width, 1),
        ):
            layers += [layer, norm(layer.out_channels), nn.ReLU(inplace=True)]
        super().__init__(*layers)


def pooled(tap: Tensor) -> Tensor:
    """Global average: [B, C, H, W] or [B, C, T, H, W] -> [B, C]."""
    return tap.mean(dim=tuple(range(2, tap.dim())))
