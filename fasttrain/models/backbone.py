"""What every backbone offers to the heads built on it."""

from torch import Tensor, nn


class Backbone(nn.Module):
    """A network without its classifier.

    Attributes:
        tap_channels: channels of each tapped feature map, shallow to deep.
        feature_dim: length of the pooled feature.
        transfer_width: width w of a transfer module on this backbone (the table in the SSKT paper's code).
    """

    tap_channels: tuple[int, ...]
    feature_dim: int
    transfer_width: int

    def forward(self, pixel_BCHW: Tensor) -> list[Tensor]:
        """Normalised pixels -> the tapped feature maps [B, C_i, H_i, W_i]; the last is the one that is pooled."""
        raise NotImplementedError

    def pool(self, tap_BCHW: Tensor) -> Tensor:
        """The last tap -> the feature [B, feature_dim]: global average pooling."""
        return tap_BCHW.mean(dim=(2, 3))
