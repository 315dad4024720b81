"""A network that a run has trained, as a source: a teacher with the task's own classes, say."""

import hashlib
from pathlib import Path

from torch import Tensor, nn

from . import checkpoint
from .models import Target, build_backbone
from .recipe import Recipe, Source, from_dict
from .sources import SourceNetwork

TRAINED = "fasttrain"  # what Source.model calls them


def open_trained(spec: Source, classes: tuple[str, ...] | None = None) -> SourceNetwork:
    """The selected weights of a run, with the run's own input size and normalisation.

    Args:
        spec: its ``weights`` name a run's folder or a checkpoint.
        classes: names that its classes have to have, in this order; None for any.

    Raises:
        ValueError: no such run, one that solves puzzles, or ``spec`` says something else of its classes, size, mean or std than
            the run.
    """
    path = selected(spec.weights, f"sources: {spec.name}")
    state = checkpoint.load(path)
    recipe = from_dict(state["recipe"])
    if recipe.pretext.task != "none":
        raise ValueError(
            f"sources: {spec.name}: the run in {path} solves puzzles, and says nothing of whole images; its clusters do "
            "(model: clusters)"
        )
    insist_on_fit(spec, recipe, len(state["classes"]), f"the run in {path}")
    if classes is not None and list(classes) != list(state["classes"]):
        own, its = next((a, b) for a, b in zip(classes, state["classes"], strict=True) if a != b)
        raise ValueError(
            f"sources: {spec.name} has to know the task's own classes in their order; its {its!r} stands where {own!r} should"
        )
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if spec.sha256 and not sha256.startswith(spec.sha256.lower()):
        raise ValueError(f"sources: {spec.name}: {path} has the SHA-256 {sha256}, not {spec.sha256}")
    made = recipe.target
    target = Target(build_backbone(made.model, shortcut=made.shortcut, width=made.width), len(state["classes"]))
    checkpoint.load_target(target, checkpoint.without_heads(state), path, tuple(state["classes"]))
    target.channels_last()
    return SourceNetwork(spec, _Logits(target), sha256, str(path))


def insist_on_fit(spec: Source, recipe: Recipe, classes: int, what: str) -> None:
    """Insists that a source is shown what the run it comes from was trained on.

    Args:
        recipe: of that run.
        classes: of its data set.
        what: to call the run.

    Raises:
        ValueError: ``spec`` says something else of its classes, size, mean or std than the run, or the run saw clips.
    """
    facts = {
        "classes": (spec.classes, classes),
        "size": (spec.size, recipe.data.size),
        "mean": (list(spec.mean), list(recipe.data.mean)),
        "std": (list(spec.std), list(recipe.data.std)),
    }
    for field, (given, its) in facts.items():
        if given != its:
            raise ValueError(f"sources: {spec.name} has {field} {given}, but {what} was trained with {its}")
    if recipe.data.frames:
        raise ValueError(f"sources: {spec.name}: {what} was trained on clips; sources see images")


def selected(name: str, what: str) -> Path:
    """The checkpoint of a run's folder, or the file that is named.

    Raises:
        ValueError: neither; begins with ``what``.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "checkpoints" / "selected.pt"
    if not path.is_file():
        raise ValueError(f"{what}: there is no run or checkpoint {name}")
    return path


class _Logits(nn.Module):
    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.target(x_BCHW).logits_BK
