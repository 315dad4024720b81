"""Which samples of a data set a recipe uses."""

from pathlib import Path

import numpy as np

from .loaders import Dataset, labelled_part
from .recipe import Recipe


def own_labels(recipe: Recipe) -> bool:
    """Whether the recipe learns something else than the data set's labels: puzzles, or pseudo-labels."""
    return recipe.pretext.task != "none" or recipe.data.labels is not None


def training_indices(recipe: Recipe, dataset: Dataset) -> np.ndarray:
    """The samples that a recipe trains on: int64, ascending.

    Raises:
        ValueError: see :func:`chosen_indices` and :func:`fasttrain.loaders.labelled_part`.
    """
    data, index_N = recipe.data, dataset.splits["train"]
    if data.indices:
        index_N = chosen_indices(Path(data.indices), index_N)
    if data.labelled:
        # a part of the images whose labels are not looked at is the same whatever they are called
        targets_N = np.zeros(len(dataset), dtype=np.int64) if own_labels(recipe) else dataset.targets_N
        index_N = labelled_part(targets_N, index_N, data.labelled)
    return index_N


def used_indices(recipe: Recipe, dataset: Dataset) -> np.ndarray:
    """The samples that a recipe trains on, validates with or tests on: int64, ascending."""
    parts = [training_indices(recipe, dataset), dataset.splits["val"], dataset.splits["test"]]
    return np.unique(np.concatenate(parts))


def chosen_indices(path: Path, train_N: np.ndarray) -> np.ndarray:
    """The training samples that a file names by their indices, one a line: int64, ascending.

    Raises:
        ValueError: no such file, a line that is no index, an index twice or of no training sample.
    """
    try:
        lines = path.read_text().split()
        index_M = np.sort(np.array([int(line) for line in lines], dtype=np.int64))
    except (OSError, ValueError, OverflowError) as error:
        raise ValueError(f"data.indices: cannot read {path}: {str(error)[:160]}") from None
    if not len(index_M):
        raise ValueError(f"data.indices: {path} names no sample")
    outside = np.setdiff1d(index_M, train_N)
    if len(outside):
        raise ValueError(f"data.indices: {path} names {outside[0]}, which is no sample of the training split")
    twice = index_M[:-1][np.diff(index_M) == 0]
    if len(twice):
        raise ValueError(f"data.indices: {path} names {twice[0]} twice")
    return index_M
