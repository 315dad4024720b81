"""What a trained backbone makes of whole images: the features of its stages.

An image's features do not depend on the batch that it came in: they are computed in chunks of one size, the last one filled up.

Shape suffixes: B batch, F chunk, N images, C channels, H W of a map, D features.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain import interrupts
from fasttrain.checkpoint import open_run
from fasttrain.kernels import network_input
from fasttrain.loaders import Dataset, LoaderSpec, evaluation
from fasttrain.loaders.base import BadSamples, EpochLoader
from fasttrain.models import Backbone, build_backbone
from fasttrain.models.puzzle import standardised
from fasttrain.recipe import Data, Recipe, from_dict

_CHUNK = {"cpu": 16, "cuda": 128}  # images at a time


@dataclass(frozen=True)
class Trunk:
    """A run's backbone, and how it wants to be shown images.

    Attributes:
        backbone: in evaluation, frozen, on the CPU.
        recipe: of the run.
        sha256: of the file of its weights.
        path: of that file.
        dataset: fingerprint of the data set that the run learned from, with its labels; empty where it is not known.
    """

    backbone: Backbone
    recipe: Recipe
    sha256: str
    path: Path
    dataset: str

    @property
    def solves_puzzles(self) -> bool:
        """Whether it has learned from tiles, each normalised by itself; whole images are then shown to it likewise."""
        return self.recipe.pretext.task != "none"


class StageFeatures(nn.Module):
    """Features of some of a backbone's stages.

    Args:
        trunk: the backbone and how it wants its input.
        layers: stages, 1 for the first; 0 for what the network pools for its head.
        pool: side to which a stage's map is pooled, if it is larger; or one for each of ``layers`` (layer 0 has no use for it).
        average: pool by the mean, not by the maximum.
        unit_length: scale each stage's features to length 1.

    Raises:
        ValueError: a stage that the backbone does not have.
    """

    def __init__(
        self,
        trunk: Trunk,
        layers: Sequence[int],
        *,
        pool: int | Sequence[int] = 1,
        average: bool = False,
        unit_length: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.layers, self.average, self.unit_length = trunk.backbone, tuple(layers), average, unit_length
        self.pool = (pool,) * len(self.layers) if isinstance(pool, int) else tuple(pool)
        assert len(self.pool) == len(self.layers) and min(self.pool) > 0
        self.standardise = trunk.solves_puzzles
        count = len(trunk.backbone.tap_channels)
        for layer in self.layers:
            if not 0 <= layer <= count:
                raise ValueError(
                    f"pretext.layer: {layer}, but {trunk.backbone.name} has stages 1 to {count} (0: what it pools)"
                )

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Normalised pixels [B, 3, H, W] -> float32 [B, D], one of each layer."""
        taps, last = self.backbone(standardised(x_BCHW).to(x_BCHW.dtype) if self.standardise else x_BCHW)
        return [
            self._feature(taps[layer - 1] if layer else None, last, side)
            for layer, side in zip(self.layers, self.pool, strict=True)
        ]

    def _feature(self, tap_BCHW: Tensor | None, last: Tensor, side: int) -> Tensor:
        if tap_BCHW is None:
            feature_BD = self.backbone.pool(last).float()
        else:
            pooled = F.adaptive_avg_pool2d if self.average else F.adaptive_max_pool2d
            feature_BD = pooled(tap_BCHW.float(), min(side, *tap_BCHW.shape[2:])).flatten(1)
        return F.normalize(feature_BD, dim=1) if self.unit_length else feature_BD


def open_trunk(name: str, what: str) -> Trunk:
    """The backbone that a run has trained.

    Args:
        name: a run's folder or a checkpoint.
        what: to begin messages with.

    Raises:
        ValueError: no such run, or one on clips.
    """
    try:
        path, state = open_run(name)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    recipe = from_dict(state["recipe"])
    made = recipe.target
    backbone = build_backbone(made.model, shortcut=made.shortcut, width=made.width)
    if backbone.dims == 3:
        raise ValueError(f"{what}: the run in {path} was trained on clips; its features of images cannot be made")
    given = {k.removeprefix("backbone."): v for k, v in state["target"].items() if k.startswith("backbone.")}
    backbone.load_state_dict(given)
    backbone.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return Trunk(backbone, recipe, hashlib.sha256(path.read_bytes()).hexdigest(), path, state.get("dataset", ""))


def whole_images(index_N: np.ndarray, dataset: Dataset, shown: Data, on_bad_sample: BadSamples) -> LoaderSpec:
    """What to load so that images are seen whole, as evaluation shows them.

    Args:
        index_N: int64, the samples.
        dataset: theirs.
        shown: whose sizes they are brought to.
        on_bad_sample: what to do about one that cannot be read.
    """
    return LoaderSpec(
        dataset=dataset,
        index_N=index_N,
        plan=evaluation(shown.centre_share),
        size=shown.size,
        stored=shown.stored,
        batch=max(shown.batch, 250),
        shuffle=False,
        on_bad_sample=on_bad_sample,
    )


@torch.no_grad()
def collect(
    network: StageFeatures, loader: EpochLoader, recipe: Recipe, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """One pass of a loader: yields the indices int64 [F] of the images of a chunk, and their features, float32 [F, D] of each
    layer, on the device; the last chunk may be shorter.

    Args:
        network: on the device.
        loader: of whole images; closed at the end.
        recipe: whose ``data.mean`` and ``data.std`` normalise the pixels: the trunk's.
        device: of both.
        dtype: of the arithmetic under autocast; float32 for none.
    """
    mean, std = (torch.tensor(v, device=device) for v in (recipe.data.mean, recipe.data.std))
    size = _CHUNK[device.type]

    def features(pixel_BCHW: Tensor) -> list[Tensor]:
        missing = size - len(pixel_BCHW)
        whole = torch.cat([pixel_BCHW, pixel_BCHW[-1:].expand(missing, -1, -1, -1)]) if missing else pixel_BCHW
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = network(network_input(whole, mean, std))
        return [feature_FD[: len(pixel_BCHW)].float() for feature_FD in out]

    rest: tuple[Tensor, Tensor] | None = None
    with interrupts.held(), closing(loader):
        loader.set_epoch(0)
        for batch in loader:
            index, pixels = batch.index, batch.pixels
            if rest is not None:
                index, pixels = torch.cat([rest[0], index]), torch.cat([rest[1], pixels])
            full = len(index) // size * size
            for at in range(0, full, size):
                yield index[at : at + size], features(pixels[at : at + size])
                interrupts.check()
            rest = (index[full:], pixels[full:]) if full < len(index) else None
        if rest is not None:
            yield rest[0], features(rest[1])
