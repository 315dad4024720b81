"""Centroids and pseudo-labels on disk: where they are kept, what they depend on, and how they are read."""

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fasttrain.device import choose_device, choose_dtype, choose_source_dtype
from fasttrain.files import write_whole
from fasttrain.loaders import Dataset
from fasttrain.recipe import Pretext, Recipe
from fasttrain.sources.cache import CacheError, SoftLabelFile, file_name
from fasttrain.trained import selected


@dataclass(frozen=True)
class Centroids:
    """What k-means has found.

    Attributes:
        centroid_KD: float32.
        mean_distance2: squared distance to the nearest centroid, its mean over the images that were clustered.
        images: how many were clustered.
    """

    centroid_KD: Tensor
    mean_distance2: float
    images: int

    def write(self, path: Path) -> None:
        """Writes them whole."""
        about = {"images": str(self.images), "mean_distance2": repr(self.mean_distance2)}
        write_whole(path, lambda file: file.write(save({"centroids": self.centroid_KD}, about)))


def read_centroids(path: Path) -> Centroids:
    """Centroids from their file.

    Raises:
        ValueError: it cannot be read, or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            # a copy: reading through a map of a file that is cut off meanwhile is a signal
            centroid_KD = file.get_tensor("centroids").clone()
        centroids = Centroids(centroid_KD, float(about["mean_distance2"]), int(about["images"]))
        if centroid_KD.dtype != torch.float32 or centroid_KD.ndim != 2 or not centroid_KD.isfinite().all():
            raise ValueError(f"its centroids are {centroid_KD.dtype} of shape {list(centroid_KD.shape)}, or not finite")
        if not (math.isfinite(centroids.mean_distance2) and centroids.mean_distance2 >= 0 and centroids.images > 0):
            raise ValueError(f"it was made of {centroids.images} images at a distance of {centroids.mean_distance2}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise ValueError(f"cannot read the centroids {path}: {why}; remove it, and it is made anew") from error
    return centroids


@dataclass(frozen=True)
class Nearest:
    """How a pseudo-label is kept: the nearest centroid, and the squared distance to it.

    Attributes:
        classes: centroids.
    """

    classes: int

    @property
    def fields(self) -> np.dtype:
        """Of one record."""
        return np.dtype([("label", np.int32, (1,)), ("distance2", np.float32, (1,))])

    @property
    def record_bytes(self) -> int:
        return self.fields.itemsize

    @property
    def kept(self) -> str:
        """In words."""
        return "the nearest centroid"

    def holds(self, record: np.void) -> bool:
        """Whether the record names a centroid that there is."""
        return 0 <= record["label"][0] < self.classes


@dataclass(frozen=True)
class PseudoLabels:
    """What clusters say of a data set.

    Attributes:
        label_N: int64, the nearest centroid of each image; -1 for those that the recipe does not use.
        distance2_N: float32, the squared distance to it; there infinite.
        count: centroids.
        path: of the file.
    """

    label_N: np.ndarray
    distance2_N: np.ndarray
    count: int
    path: Path


@dataclass(frozen=True)
class Place:
    """Where the clusters of a run's features are kept, and what they depend on.

    Attributes:
        weights: file of the run's selected weights.
        folder: of the files: ``clusters`` in the run's own.
        sha256: of the weights; size, normalisation and images of the run are in their file, too.
        pretext: of the recipe that asks.
        arithmetic: type that the features are computed in.
    """

    weights: Path
    folder: Path
    sha256: str
    pretext: Pretext
    arithmetic: str

    @property
    def stage(self) -> dict[str, Any]:
        """What features depend on, besides the images."""
        pretext = self.pretext
        chosen = {
            "layer": pretext.layer,
            "pool": pretext.pool if pretext.layer else 0,
            "unit_length": pretext.unit_length,
        }
        return {"weights": self.sha256, "arithmetic": self.arithmetic, "stage": chosen}

    @property
    def clusters(self) -> dict[str, Any]:
        """What centroids depend on."""
        return self.stage | {"clusters": self.pretext.clusters, "iterations": self.pretext.iterations}

    def features_of(self, dataset: Dataset) -> dict[str, Any]:
        """What the features of a data set's images depend on."""
        return self.stage | {"dataset": _named(dataset)}

    def labels_of(self, dataset: Dataset) -> dict[str, Any]:
        """What the pseudo-labels of a data set's images depend on."""
        return self.clusters | {"dataset": _named(dataset)}

    def features_file(self, dataset: Dataset) -> Path:
        return self.folder / file_name(f"features-{dataset.name}", self.features_of(dataset))

    def centroids_file(self) -> Path:
        name = file_name(f"centroids-{self.pretext.clusters}", self.clusters)
        return self.folder / Path(name).with_suffix(".safetensors")

    def labels_file(self, dataset: Dataset) -> Path:
        return self.folder / file_name(f"labels-{self.pretext.clusters}-{dataset.name}", self.labels_of(dataset))


def place_of(run: str, recipe: Recipe, what: str = "data.labels") -> Place:
    """Where the clusters of a run are, as a recipe wants them.

    Args:
        run: its folder, or a checkpoint.
        recipe: whose ``pretext`` says which, and which ``run`` what it computes in.
        what: to begin messages with.

    Raises:
        ValueError: no such run.
    """
    path = selected(run, what)
    device = choose_device(recipe.run.device)
    dtype = choose_source_dtype("auto", choose_dtype(recipe.run.precision, device)[0], device)
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return Place(path, folder / "clusters", _sha256(path), recipe.pretext, str(dtype).removeprefix("torch."))


def open_labels(place: Place, dataset: Dataset) -> SoftLabelFile:
    """The file of a data set's pseudo-labels, made where it is not there.

    Raises:
        CacheError: it cannot be made, or is damaged.
    """
    form = Nearest(place.pretext.clusters)
    path, about = place.labels_file(dataset), place.labels_of(dataset)
    return SoftLabelFile(path, about, views=1, samples=len(dataset), form=form)


def read_pseudo_labels(recipe: Recipe, dataset: Dataset, index_M: np.ndarray) -> PseudoLabels:
    """The pseudo-labels of a data set that a recipe names.

    Args:
        recipe: with ``data.labels``.
        dataset: with its own labels.
        index_M: int64, the images whose labels are wanted.

    Raises:
        ValueError: no such run, or its pseudo-labels of these images are not made yet.
    """
    assert recipe.data.labels is not None
    place = place_of(recipe.data.labels, recipe)
    path = place.labels_file(dataset)
    why = f"data.labels: {recipe.data.labels} has no pseudo-labels of {dataset.name} from {place.pretext.clusters} clusters"
    if not path.is_file():
        raise ValueError(f"{why} yet; `fasttrain train` and `fasttrain pretext` make them")
    file = open_labels(place, dataset)
    try:
        if len(file.missing(0, index_M)):
            raise CacheError(f"{why} for all of its images; `fasttrain train` and `fasttrain pretext` make the rest")
        record_M = file.read(np.zeros_like(index_M), index_M)
    finally:
        file.close()
    label_N = np.full(len(dataset), -1, dtype=np.int64)
    distance2_N = np.full(len(dataset), np.inf, dtype=np.float32)
    label_N[index_M], distance2_N[index_M] = record_M["label"][:, 0], record_M["distance2"][:, 0]
    return PseudoLabels(label_N, distance2_N, place.pretext.clusters, path)


def _named(dataset: Dataset) -> dict[str, str]:
    return {"name": dataset.name, "content": dataset.identity()}


def _sha256(path: Path) -> str:
    about = path.stat()
    return _sha256_of(str(path.resolve()), about.st_mtime_ns, about.st_size)


@cache
def _sha256_of(path: str, changed_ns: int, size: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
