"""Labels that a recipe makes of its own, in the place of a data set's: those of puzzles, or pseudo-labels."""

from dataclasses import replace

import numpy as np

from fasttrain.loaders import Dataset, Puzzle
from fasttrain.recipe import Recipe
from fasttrain.samples import used_indices

from .files import read_pseudo_labels


def with_given_labels(recipe: Recipe) -> Recipe:
    """The recipe, learning what the data set's own labels say."""
    return replace(recipe, data=replace(recipe.data, labels=None), pretext=replace(recipe.pretext, task="none"))


def puzzle_of(recipe: Recipe) -> Puzzle | None:
    """The puzzle that is made of every image; None without ``pretext.task: jigsaw``."""
    pretext = recipe.pretext
    if pretext.task == "none":
        return None
    return Puzzle(
        pretext.grid, pretext.permutations, pretext.tile, pretext.channel_shift, pretext.replaced, pretext.grey
    )


def with_own_labels(dataset: Dataset, recipe: Recipe) -> Dataset:
    """The data set with the labels that the recipe makes: of puzzles, those of each image's first view; or the clusters.

    Raises:
        ValueError: puzzles that cannot be made, or pseudo-labels that are not there or of other images.
    """
    puzzle = puzzle_of(recipe)
    if puzzle is not None:
        puzzle.side(recipe.data.size)
        index_N = np.arange(len(dataset))
        targets_N = puzzle.labels(seed=recipe.data.seed, number_B=np.zeros_like(index_N), index_B=index_N)
        return replace(dataset, classes=puzzle.names, targets_N=targets_N)
    if recipe.data.labels is not None:
        labels = read_pseudo_labels(recipe, dataset, used_indices(recipe, dataset))
        names = tuple(f"cluster {i}" for i in range(labels.count))
        return replace(dataset, classes=names, targets_N=labels.label_N)
    return dataset
