"""The network being trained: a backbone, the task's head, and an auxiliary head for each source."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Backbone

Together = Callable[[list[Any], list[Tensor]], Tensor]


@dataclass(frozen=True)
class TargetOutput:
    """What a target says of a batch.

    Attributes:
        logits_BK: of the task, K classes.
        aux_logits_BC: guesses of the sources' logits, side by side in the order of the heads; None without heads or
            where they were not asked for.
    """

    logits_BK: Tensor
    aux_logits_BC: Tensor | None


class Target(nn.Module):
    """SSKT's multi-task network h_t (Fig. 3), of images or of clips as its backbone is.

    Auxiliary heads are put into ``aux_heads`` by their source's name afterwards, so that backbone and task head start
    from the same numbers with any sources and with none.

    Args:
        backbone: with taps.
        classes: of the task.

    Attributes:
        together: runs all auxiliary heads as one, from the heads and the taps; None runs one after the other.
        origin: what the backbone started from, for the log.
    """

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.feature_dim, classes)
        nn.init.kaiming_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.aux_heads = nn.ModuleDict()
        self.together: Together | None = None
        self.origin = "random"

    @property
    def classes(self) -> int:
        return self.head.out_features

    def channels_last(self) -> "Target":
        """Brings the convolutions' weights to channels_last, or channels_last_3d where they are 3D. Returns itself."""
        return self.to(memory_format=torch.channels_last_3d if self.backbone.dims == 3 else torch.channels_last)

    def forward(self, pixels: Tensor, aux: bool = False) -> TargetOutput:
        """Normalised pixels [B, 3, H, W], or clips [B, 3, T, H, W] -> the task's logits; with ``aux`` the auxiliary heads
        run too.

        Raises:
            ValueError: pixels of a size that the backbone cannot take.
        """
        taps, last = self.backbone(pixels)
        feature_BD = self.backbone.pool(last)
        aux_logits_BC = None
        if aux and self.aux_heads:
            heads = list(self.aux_heads.values())
            if self.together is not None:
                aux_logits_BC = self.together(heads, taps)
            else:
                aux_logits_BC = torch.cat([head(taps, feature_BD) for head in heads], dim=1)
        return TargetOutput(self.head(feature_BD), aux_logits_BC)
