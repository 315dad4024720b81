"""A trained target put to use: its figures on a split."""

from typing import Any

from . import checkpoint, trainer
from .build import Parts, build
from .checkpoint import open_run
from .recipe import Recipe, Transfer, from_dict

__all__ = ["alone", "evaluate_run", "open_run"]


def evaluate_run(name: str, split: str, overrides: list[str]) -> dict[str, Any]:
    """The task's figures of a run's selected weights, or of a checkpoint.

    Args:
        name: a run's folder or a checkpoint file.
        split: ``test`` or ``val``.
        overrides: fields that differ from the run's recipe, such as ``["--data.root", "/elsewhere"]``.

    Raises:
        ValueError: no such run, or data of other classes than the checkpoint's.
    """
    if split not in ("test", "val"):
        raise ValueError(f"--split is test or val, not {split!r}")
    path, state = open_run(name)
    recipe = alone(from_dict(state["recipe"], overrides))
    parts: Parts = build(recipe)
    checkpoint.load_target(parts.target, state, path, parts.dataset.classes)
    figures = trainer.evaluate(parts, parts.target, split)
    return {
        "checkpoint": str(path),
        "split": split,
        "images": len(parts.loaders[split].spec.index_N),
        "figures": figures,
    }


def alone(recipe: Recipe) -> Recipe:
    """The recipe, changed: without its sources and what the backbone started from, of which a trained target needs nothing."""
    recipe.sources, recipe.transfer, recipe.method.name, recipe.target.weights = [], Transfer(), "scratch", None
    return recipe
