"""What every backbone offers to the heads built on it."""

from collections.abc import Iterable

from torch import Tensor, nn


class Backbone(nn.Module):
    """A network without its classifier.

    Attributes:
        name: in ``BACKBONES``; set by ``build_backbone``.
        dims: 2 for one that sees images, 3 for one that sees clips.
        tap_channels: channels of each tapped feature map, shallow to deep.
        feature_dim: length of the pooled feature.
        transfer_width: width w of a transfer module on this backbone (the table in the SSKT paper's code).
        sections: names of the submodules that hold its tensors, from the input on: the stem, then each stage.
        of_torchvision: torchvision has weights for it, under the same name.
        frozen: sections that are not trained, counted from the input.
    """

    name: str = ""
    dims: int = 2
    tap_channels: tuple[int, ...]
    feature_dim: int
    transfer_width: int
    sections: tuple[tuple[str, ...], ...]
    of_torchvision: bool = False
    frozen: int = 0

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Normalised pixels -> the tapped feature maps; the last is the one that is pooled.

        [B, 3, H, W] -> [B, C_i, H_i, W_i], or clips [B, 3, T, H, W] -> [B, C_i, T_i, H_i, W_i].
        """
        raise NotImplementedError

    def pool(self, tap: Tensor) -> Tensor:
        """The last tap -> the feature [B, feature_dim]: global average pooling, over time as well."""
        return tap.mean(dim=tuple(range(2, tap.dim())))

    def freeze(self, count: int) -> None:
        """Trains the first ``count`` sections no more: neither their parameters nor their batch norms' statistics move.

        Raises:
            ValueError: more sections than there are.
        """
        if not 0 <= count <= len(self.sections):
            raise ValueError(
                f"target.frozen: {count}, but {self.name or 'the backbone'} has {len(self.sections)} sections (the stem "
                f"and {len(self.sections) - 1} stages): 0 .. {len(self.sections)}"
            )
        self.frozen = count
        for module in self._frozen_modules():
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        """As everywhere, but for what is frozen, which stays in evaluation."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        return [self.get_submodule(name) for names in self.sections[: self.frozen] for name in names]


def outputs(stages: Iterable[nn.Module], x: Tensor) -> list[Tensor]:
    """What each stage gives, the first of ``x``, every other of the one before."""
    taps = []
    for stage in stages:
        x = stage(x)
        taps.append(x)
    return taps
