"""What every backbone offers to the heads built on it."""

from collections.abc import Iterable

from torch import Tensor, nn

from fasttrain.weights import Weights

Maps = tuple[list[Tensor], Tensor]
"""The taps, shallow to deep, and the map that is pooled."""


class Backbone(nn.Module):
    """A network without its classifier.

    Attributes:
        name: in ``BACKBONES``, or ``timm:NAME``; set by ``build_backbone``.
        dims: 2 for one that sees images, 3 for one that sees clips.
        tap_channels: channels of each tapped feature map, shallow to deep.
        feature_dim: length of the pooled feature.
        transfer_width: width w of a transfer module on this backbone (the table in the SSKT paper's code).
        sections: names of the submodules (or parameters) that hold its tensors, from the input on: the stem, then each stage.
        library: ``torchvision`` or ``timm``, where that has weights for it; empty otherwise.
        least_size: side in pixels below which nothing is left of the last map.
        frozen: sections that are not trained, counted from the input.
    """

    name: str = ""
    dims: int = 2
    tap_channels: tuple[int, ...]
    feature_dim: int
    transfer_width: int
    sections: tuple[tuple[str, ...], ...]
    library: str = ""
    least_size: int = 1
    frozen: int = 0

    def forward(self, pixels: Tensor) -> Maps:
        """Normalised pixels -> the tapped feature maps, and the map that is pooled, often the last of them.

        [B, 3, H, W] -> [B, C_i, H_i, W_i], or clips [B, 3, T, H, W] -> [B, C_i, T_i, H_i, W_i].

        Raises:
            ValueError: pixels of a size that the network cannot take.
        """
        raise NotImplementedError

    def pool(self, last: Tensor) -> Tensor:
        """The map that is pooled -> the feature [B, feature_dim]: global average pooling, over time as well."""
        return last.mean(dim=tuple(range(2, last.dim())))

    def check_size(self, height: int, width: int) -> None:
        """Of the images, or of a clip's frames, in pixels.

        Raises:
            ValueError: a size that the network cannot take.
        """
        if min(height, width) < self.least_size:
            raise ValueError(
                f"data.size: {min(height, width)} pixels leave nothing of {self.name or 'the backbone'}'s last map; it needs "
                f"{self.least_size} or more"
            )

    def own_tensors(self, weights: Weights) -> tuple[dict[str, Tensor], str]:
        """The tensors of a weights file in its library's layout, classifier and all -> those of the backbone, by their names
        here, and how they were told apart: ``by name`` or ``by order``.

        This is for files that call their classifier ``fc``, and everything else as the backbone does: torchvision's of
        ResNets, and Hara et al.'s. Whether the tensors are all of the backbone's is not looked at.

        Raises:
            ValueError: tensors that fit no such network.
        """
        return {k: v for k, v in weights.tensors.items() if not k.startswith("fc.")}, "by name"

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
        for part in self._frozen_parts():
            part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        """As everywhere, but for what is frozen, which stays in evaluation."""
        super().train(mode)
        for part in self._frozen_parts():
            if isinstance(part, nn.Module):
                part.eval()
        return self

    def _frozen_parts(self) -> list[nn.Module | nn.Parameter]:
        if not self.frozen:
            return []
        parts: dict[str, nn.Module | nn.Parameter] = dict(self.named_modules(remove_duplicate=False))
        parts |= self.named_parameters(remove_duplicate=False)  # what has two names is found under both
        return [parts[name] for names in self.sections[: self.frozen] for name in names]


def outputs(stages: Iterable[nn.Module], x: Tensor) -> Maps:
    """What each stage gives, the first of ``x``, every other of the one before; the last one's is pooled."""
    taps = []
    for stage in stages:
        x = stage(x)
        taps.append(x)
    return taps, x
