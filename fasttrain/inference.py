"""A trained target put to use: its figures on a split."""

from pathlib import Path
from typing import Any

from . import checkpoint, trainer
from .build import Parts, build
from .recipe import Recipe, Transfer, from_dict


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


def open_run(name: str) -> tuple[Path, dict[str, Any]]:
    """A run's selected weights, or a checkpoint.

    Args:
        name: a run's folder or a checkpoint file.

    Returns:
        The checkpoint's path and its content, whose ``target`` is what is evaluated: without auxiliary heads, and the moving
        average where the run keeps one (``optim.ema``).

    Raises:
        ValueError: no such run, or a file that is no checkpoint.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "checkpoints" / "selected.pt"
        if not path.is_file():
            raise ValueError(f"{name} is no run's folder: it has no checkpoints/selected.pt")
    state = checkpoint.load(path)
    if state.get("average") is not None:  # last.pt has both; selected.pt has the average alone
        average = {k: v for k, v in state["average"].items() if k.startswith("module.")}
        state |= {"target": {k.removeprefix("module."): v for k, v in average.items()}}
    return path, checkpoint.without_heads(state)


def alone(recipe: Recipe) -> Recipe:
    """The recipe, changed: without its sources and what the backbone started from, of which a trained target needs nothing."""
    recipe.sources, recipe.transfer, recipe.method.name, recipe.target.weights = [], Transfer(), "scratch", None
    return recipe
