"""The network that solves puzzles: every tile through one trunk, then all of them together (Noroozi and Favaro 2016, fig. 3).

Shape suffixes: B batch, P places, N tiles of all puzzles (B * P), C channels, T side of a tile, D feature, W width.
"""

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .target import Target, TargetOutput

_LEAST = 1e-3  # below this a tile has no contrast; normalised pixels have a standard deviation of about 1


class PuzzleTarget(Target):
    """Tells in which order the tiles of an image lie.

    The trunk, a backbone of ours, sees each tile by itself, normalised by its own mean and standard deviation: nothing but its
    content is left to tell where it belongs. The layer after it is shared by all tiles, too.

    Args:
        backbone: for images.
        places: tiles of a puzzle.
        classes: orders to tell apart.
        width: units of a tile's layer (1024 in the published network).
        hidden: units of the layer that joins the tiles (4096 there).
    """

    def __init__(self, backbone: Backbone, *, places: int, classes: int, width: int, hidden: int) -> None:
        super().__init__(backbone, classes)
        self.places = places
        self.tile = nn.Sequential(nn.Linear(backbone.feature_dim, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True))
        self.join = nn.Sequential(nn.Linear(places * width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True))
        self.head = nn.Linear(hidden, classes)

    def forward(self, pixels: Tensor, aux: bool = False) -> TargetOutput:
        """Normalised tiles [B, 3, P, T, T] -> logits of the orders [B, K].

        Raises:
            ValueError: tiles of a size that the trunk cannot take.
        """
        tile_NCTT = standardised(pixels.transpose(1, 2).flatten(0, 1))
        feature_ND = self.backbone.pool(self.backbone(tile_NCTT)[1])
        tile_BPW = self.tile(feature_ND).unflatten(0, (-1, self.places))
        return TargetOutput(self.head(self.join(tile_BPW.flatten(1))), None)


def standardised(pixel_NCHW: Tensor) -> Tensor:
    """Each channel of each image with mean 0 and standard deviation 1; one without contrast becomes 0. float32, channels_last."""
    x_NCHW = pixel_NCHW.float()
    mean_NC11 = x_NCHW.mean(dim=(2, 3), keepdim=True)
    centred_NCHW = x_NCHW - mean_NC11
    variance_NC11 = centred_NCHW.square().mean(dim=(2, 3), keepdim=True)
    deviation_NC11 = variance_NC11.clamp(min=_LEAST**2).sqrt()  # not the other way round: the root has no gradient at 0
    return (centred_NCHW / deviation_NC11).contiguous(memory_format=torch.channels_last)
