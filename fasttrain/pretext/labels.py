"""From a trained run to pseudo-labels of any data set: features, centroids, the nearest centroid of each image.

What is computed is kept in the run's folder, in ``clusters/``, under names that end in a fingerprint of all that it depends on:

    features-DATASET-*.soft         of a data set's images, as they are needed, in the form of recalled soft labels
    centroids-K-*.safetensors       of the features of the images that the run was trained on
    labels-K-DATASET-*.soft         the nearest centroid of each image that a recipe uses, and the squared distance to it

Each step goes on where it was stopped. Labels do not depend on batches, ranks or threads.

Shape suffixes: N images, K centroids, D features, F chunk.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fasttrain.build import loader_workers, open_data
from fasttrain.device import choose_device
from fasttrain.loaders import Dataset, choose_loader, open_loader
from fasttrain.recipe import Recipe
from fasttrain.samples import training_indices, used_indices
from fasttrain.sources.cache import SoftLabelFile
from fasttrain.sources.recall import label_form

from .data import with_given_labels
from .features import StageFeatures, Trunk, collect, open_trunk, whole_images
from .files import Centroids, Place, PseudoLabels, open_labels, place_of, read_centroids, read_pseudo_labels
from .kmeans import kmeans, nearest

Report = Callable[[str], None]
_SEED = 0  # of k-means: clusters belong to a run, and no other seed has a part in them
_READ = 4096  # labels at a time


def make_labels(recipe: Recipe, report: Report) -> Path:
    """Makes the pseudo-labels that a recipe wants (``data.labels``), of the images that it uses, unless they are there.

    Args:
        recipe: with ``data.labels``, a run's folder or checkpoint.
        report: takes a line on each step that is taken.

    Returns:
        Path of the file.

    Raises:
        ValueError: no such run, data that have changed since it was trained, or a disk that is full.
    """
    assert recipe.data.labels is not None
    dataset = open_data(with_given_labels(recipe))
    place = place_of(recipe.data.labels, recipe)
    with_file = open_labels(place, dataset)
    try:
        index_N = with_file.missing(0, used_indices(recipe, dataset))
        if len(index_N):
            centroids = make_centroids(recipe.data.labels, recipe, report)
            trunk = open_trunk(recipe.data.labels, "data.labels")
            _fill_labels(with_file, index_N, trunk, place, centroids, dataset, recipe, report)
    finally:
        with_file.close()
    return with_file.path


def make_centroids(run: str, recipe: Recipe, report: Report, what: str = "data.labels") -> Centroids:
    """The centroids of a run's features, computed unless they are there.

    Args:
        run: its folder, or a checkpoint; the images that it was trained on are clustered.
        recipe: whose ``pretext`` says what is clustered, and into how many.
        report: takes a line on each step that is taken.
        what: to begin messages with.

    Raises:
        ValueError: as :func:`make_labels`, or more clusters than images.
    """
    place = place_of(run, recipe, what)
    path = place.centroids_file()
    if path.is_file():
        return read_centroids(path)
    trunk = open_trunk(run, what)
    dataset = open_data(with_given_labels(trunk.recipe))
    if trunk.dataset not in ("", open_data(trunk.recipe).identity()):
        raise ValueError(
            f"{what}: the data set {dataset.name} in {dataset.source} has changed since {trunk.path} was trained on it"
        )
    index_N = training_indices(trunk.recipe, dataset)
    device = choose_device(recipe.run.device)
    features = _make_features(trunk, place, dataset, index_N, recipe, report)
    try:
        feature_ND = _read(features, index_N).to(device)
    finally:
        features.close()
    start = time.perf_counter()
    state = path.with_suffix(".state")
    found = kmeans(
        feature_ND, place.pretext.clusters, seed=_SEED, iterations=place.pretext.iterations, state=state, report=report
    )
    its = Centroids(found.centroid_KD.float().cpu(), found.inertia / len(feature_ND), len(feature_ND))
    its.write(path)
    told = f"settled after {found.iterations} passes" if found.settled else f"{found.iterations} passes, not settled"
    report(
        f"clusters: {place.pretext.clusters} of {its.images} images, {feature_ND.shape[1]} features, {told}, "
        f"{int(found.count_K.min())} to {int(found.count_K.max())} images each, {time.perf_counter() - start:.1f} s"
    )
    return its


def read_labels(recipe: Recipe) -> PseudoLabels:
    """The pseudo-labels that a recipe names, of its data set.

    Raises:
        ValueError: they are not made yet.
    """
    dataset = open_data(with_given_labels(recipe))
    return read_pseudo_labels(recipe, dataset, used_indices(recipe, dataset))


def _make_features(
    trunk: Trunk, place: Place, dataset: Dataset, index_N: np.ndarray, recipe: Recipe, report: Report
) -> SoftLabelFile:
    """The file of a data set's features, with those of these images in it."""
    pretext = place.pretext
    network = StageFeatures(trunk, [pretext.layer], pool=pretext.pool, unit_length=pretext.unit_length)
    size = trunk.recipe.data.size
    width = network(torch.zeros(1, 3, size, size))[0].shape[1]
    path, about = place.features_file(dataset), place.features_of(dataset)
    file = SoftLabelFile(
        path, about, views=1, samples=len(dataset), form=label_form(width, getattr(torch, place.arithmetic), 0)
    )
    lacking_M = file.missing(0, index_N)
    if not len(lacking_M):
        return file
    device = choose_device(recipe.run.device)
    spec = whole_images(lacking_M, dataset, trunk.recipe.data, recipe.data.on_bad_sample)
    name = recipe.data.loader if recipe.data.loader in ("torch", "ffcv", "dali") else choose_loader(spec, device)[0]
    start = time.perf_counter()
    loader = open_loader(name, spec, device, loader_workers(recipe))
    try:
        dtype = getattr(torch, place.arithmetic)
        for index, (feature_FD,) in collect(network.to(device), loader, trunk.recipe, device, dtype):
            chunk = index.cpu().numpy()
            file.write(np.zeros_like(chunk), chunk, file.form.records(feature_FD))
        bad_M = file.missing(0, lacking_M)
        file.write(np.zeros_like(bad_M), bad_M, file.form.records(torch.zeros(len(bad_M), width)))
        file.save()
    except OSError as error:
        file.close()
        raise ValueError(f"{path}: the features of {dataset.name} cannot be kept ({error.strerror})") from None
    except BaseException:
        file.close()
        raise
    took = time.perf_counter() - start
    if len(bad_M):
        report(f"features: {len(bad_M)} images of {dataset.name} cannot be read; their features are taken to be 0")
    report(
        f"features: {len(lacking_M)} images of {dataset.name}, {width} each, {took:.1f} s ({len(lacking_M) / took:.0f} a second)"
    )
    return file


def _fill_labels(
    file: SoftLabelFile,
    index_N: np.ndarray,
    trunk: Trunk,
    place: Place,
    centroids: Centroids,
    dataset: Dataset,
    recipe: Recipe,
    report: Report,
) -> None:
    features = _make_features(trunk, place, dataset, index_N, recipe, report)
    try:
        device = choose_device(recipe.run.device)
        centroid_KD = centroids.centroid_KD.to(device)
        for at in range(0, len(index_N), _READ):
            chunk = index_N[at : at + _READ]
            label_F1, distance2_F1 = nearest(_read(features, chunk).to(device), centroid_KD)
            record_F = np.empty(len(chunk), dtype=file.form.fields)
            record_F["label"], record_F["distance2"] = label_F1.cpu().numpy(), distance2_F1.cpu().numpy()
            file.write(np.zeros_like(chunk), chunk, record_F)
        file.save()
    except OSError as error:
        raise ValueError(f"{file.path}: pseudo-labels cannot be kept ({error.strerror})") from None
    finally:
        features.close()
    report(f"pseudo-labels: {len(index_N)} images of {dataset.name}, {place.pretext.clusters} clusters")


def _read(features: SoftLabelFile, index_N: np.ndarray) -> Tensor:
    """float16 or float32 [N, D]; an assertion fails where some are missing."""
    assert not len(features.missing(0, index_N))
    return torch.from_numpy(features.read(np.zeros_like(index_N), index_N)["logits"].copy())
