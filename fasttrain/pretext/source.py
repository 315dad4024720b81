"""Clusters as a source: a network whose classes are the centroids of its own features; its soft labels say how near they are.

So a network that has learned without labels teaches as any other source does: live or recalled, of every view of an image.
"""

import hashlib

import torch
from torch import Tensor, nn

from fasttrain.recipe import Recipe, Source
from fasttrain.sources import SourceNetwork

from .features import StageFeatures, open_trunk
from .files import place_of, read_centroids

CLUSTERS = "clusters"  # what Source.model calls them


class ClusterLogits(nn.Module):
    """``-d^2 / (softness * mean d^2)`` of the distances d to the centroids; its softmax is the soft assignment.

    Args:
        features: of one stage.
        centroid_KD: float32.
        scale: ``softness * mean d^2``.
    """

    def __init__(self, features: StageFeatures, centroid_KD: Tensor, scale: float) -> None:
        super().__init__()
        self.features, self.scale = features, scale
        self.register_buffer("centroid_KD", centroid_KD)

    def _apply(self, fn, recurse=True):
        """As everywhere, but the centroids stay float32: they are subtracted from each other."""
        kept_KD = self.get_buffer("centroid_KD")
        super()._apply(fn, recurse)
        self.centroid_KD = kept_KD.to(self.get_buffer("centroid_KD").device)
        return self

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] -> float32 [B, K]. The constant ``|x|^2`` is left out: softmax takes no notice of it."""
        (feature_BD,) = self.features(x_BCHW)
        centroid_KD = self.get_buffer("centroid_KD")
        with torch.autocast(x_BCHW.device.type, enabled=False):  # differences of squares
            return (2 * feature_BD.float() @ centroid_KD.T - centroid_KD.square().sum(1)) / self.scale


def open_clusters(spec: Source, recipe: Recipe) -> SourceNetwork:
    """The clusters of a run's features, as a frozen network.

    Args:
        spec: its ``weights`` name a run's folder or a checkpoint; its classes are ``pretext.clusters``.
        recipe: whose ``pretext`` says which clusters.

    Raises:
        ValueError: no such run, clusters that are not made yet, or ``spec`` says something else than the run.
    """
    what, count = f"sources: {spec.name}", recipe.pretext.clusters
    if spec.classes != count:
        raise ValueError(f"{what} has classes {spec.classes}, and pretext.clusters is {count}")
    trunk = open_trunk(spec.weights, what)
    data = trunk.recipe.data
    wanted = {"size": (spec.size, data.size), "mean": (spec.mean, data.mean), "std": (spec.std, data.std)}
    for field, (given, its) in wanted.items():
        if given != its:
            raise ValueError(f"{what} has {field} {given}, but the run in {trunk.path} was trained with {its}")
    place = place_of(spec.weights, recipe, what)
    path = place.centroids_file()
    if not path.is_file():
        raise ValueError(
            f"{what}: {spec.weights} has no {count} clusters yet; `fasttrain train` and `fasttrain pretext` make them"
        )
    centroids = read_centroids(path)
    pretext = recipe.pretext
    features = StageFeatures(trunk, [pretext.layer], pool=pretext.pool, unit_length=pretext.unit_length)
    network = ClusterLogits(features, centroids.centroid_KD, pretext.softness * centroids.mean_distance2)
    its_bytes = centroids.centroid_KD.numpy().tobytes() + repr((place.stage, network.scale)).encode()
    return SourceNetwork(spec, network, hashlib.sha256(its_bytes).hexdigest(), f"{count} clusters of {trunk.path}")
