"""A trained target put to use: its figures on a split, and its export."""

from pathlib import Path
from typing import Any

import torch

from . import checkpoint, trainer
from .build import Parts, build, build_target
from .describe import input_shape
from .files import write_whole
from .models import Target
from .recipe import Recipe, Transfer, from_dict, to_yaml


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
    path, state = _open(name)
    recipe = _alone(from_dict(state["recipe"], overrides))
    parts: Parts = build(recipe)
    checkpoint.load_target(parts.target, _without_heads(state), path, parts.dataset.classes)
    figures = trainer.evaluate(parts, parts.target, split)
    return {
        "checkpoint": str(path),
        "split": split,
        "images": len(parts.loaders[split].spec.index_N),
        "figures": figures,
    }


def export(name: str, out: str) -> str:
    """Writes the trained target alone, without auxiliary heads, as a ``torch.export`` program.

    It takes float32 pixels [B, 3, S, S] (clips: [B, 3, T, S, S]) of 0 to 255, any B, and gives the task's logits [B, K]; the
    normalisation is inside. Load it with ``torch.export.load(FILE).module()``.

    Returns:
        A sentence on what was written.

    Raises:
        ValueError: no such run.
    """
    path, state = _open(name)
    recipe = _alone(from_dict(state["recipe"]))
    classes = tuple(state["classes"])
    target = build_target(recipe, len(classes), {})
    checkpoint.load_target(target, _without_heads(state), path, classes)
    shape = input_shape(recipe, target.backbone.dims)
    program = torch.export.export(
        _WithNormalisation(target, recipe).eval(),
        (torch.zeros(2, *shape),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )
    extra = {"classes.txt": "\n".join(classes), "recipe.yaml": to_yaml(recipe)}
    write_whole(Path(out), lambda file: torch.export.save(program, file, extra_files=extra))
    sides = ", ".join(map(str, shape))
    return f"{out}: {recipe.target.model}, {len(classes)} classes, pixels float32 [B, {sides}] of 0 to 255"


class _WithNormalisation(torch.nn.Module):
    def __init__(self, target: Target, recipe: Recipe) -> None:
        super().__init__()
        self.target = target
        ones = [1] * target.backbone.dims
        self.register_buffer("mean", torch.tensor(recipe.data.mean).view(1, 3, *ones))
        self.register_buffer("std", torch.tensor(recipe.data.std).view(1, 3, *ones))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.target((pixels - self.mean) / self.std).logits_BK  # type: ignore[operator]


def _open(name: str) -> tuple[Path, dict[str, Any]]:
    path = Path(name)
    if path.is_dir():
        path = path / "checkpoints" / "selected.pt"
        if not path.is_file():
            raise ValueError(f"{name} is no run's folder: it has no checkpoints/selected.pt")
    return path, checkpoint.load(path)


def _alone(recipe: Recipe) -> Recipe:
    """The recipe without its sources and what the backbone started from: evaluation needs none of it."""
    recipe.sources, recipe.transfer, recipe.method.name, recipe.target.weights = [], Transfer(), "scratch", None
    return recipe


def _without_heads(state: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in state["target"].items() if not k.startswith("aux_heads.")}
    return state | {"target": kept}
