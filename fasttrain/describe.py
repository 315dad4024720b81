"""What a recipe would run: sizes and back ends, without training and without any source's weights."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import kernels
from .build import build_target, label_bytes, loader_specs, method_of, open_data, recalls
from .device import choose_device, choose_dtype, choose_source_dtype
from .loaders import choose_loader
from .pretext.data import puzzle_of
from .pretext.source import CLUSTERS
from .recipe import Recipe
from .sources.network import build_network
from .trained import TRAINED


def describe(recipe: Recipe, source_classes: list[int] | None = None) -> dict[str, Any]:
    """Parameters, FLOPs, memory and back ends.

    Args:
        recipe: what would be trained.
        source_classes: describe a target with auxiliary heads for sources of these class counts, instead of the
            recipe's sources; data and sources are then not opened.

    Raises:
        ValueError: a mistake in the recipe.
    """
    device = choose_device(recipe.run.device)
    dtype, why = choose_dtype(recipe.run.precision, device)
    content: dict[str, Any] = {"name": recipe.name, "device": str(device)}
    content["precision"] = f"{str(dtype).removeprefix('torch.')} ({why})"
    sources = {s.name: s.classes for s in recipe.chosen_sources()}
    method = method_of(recipe) if source_classes is None else None
    if source_classes is not None:
        sources = {f"source{i + 1}": c for i, c in enumerate(source_classes)}
    classes = recipe.target.classes
    if not (classes and source_classes is not None):
        dataset = open_data(recipe)
        classes = len(dataset.classes)
        spec, evals = loader_specs(recipe, dataset)
        name, why = (recipe.data.loader, "as asked") if recipe.data.loader != "auto" else choose_loader(spec, device)
        content["loader"] = f"{name} ({why})"
        kind = "videos" if dataset.video else "images"
        content[kind] = {"train": len(spec.index_N)} | {k: len(s.index_N) for k, s in evals.items()}
        if recalls(recipe) and sources:
            content["recalled_soft_targets_bytes"] = label_bytes(
                recipe, len(spec.index_N), choose_source_dtype(recipe.transfer.precision, dtype, device)
            )
    with torch.device("meta"):
        heads = sources if method is None else method.heads(recipe, classes)
        target = build_target(recipe, classes, heads, weights=False)
        others = {} if method is None else method.networks(recipe, classes)
        target.together = None  # merged weights would be counted as activations, and grouped gradients M times
    every = sum(p.numel() for p in target.parameters())
    alone = every - sum(p.numel() for p in target.aux_heads.parameters())
    every += sum(p.numel() for network in others.values() for p in network.parameters())
    content["parameters"] = {"target": alone, "training": every}
    shape = input_shape(recipe, target.backbone.dims)
    content["input"] = list(shape)
    content["sample"] = "a puzzle" if puzzle_of(recipe) else "a clip" if len(shape) == 4 else "an image"
    content["flops_per_image"] = {"target_training": _training_flops(target, shape, bool(heads))}
    content["activation_bytes_per_image"] = _activation_bytes(target, shape, dtype)
    if source_classes is None:
        content["flops_per_image"] |= {
            s.name: _source_flops(s) for s in recipe.chosen_sources() if s.model not in (TRAINED, CLUSTERS)
        }
    content["kernels"] = "{} ({})".format(*kernels.implementation(device.type, recipe.run.kernels))
    return content


def to_text(content: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{content['name']}: on {content['device']}, {content['precision']}"]
    parameters = content["parameters"]
    lines.append(f"parameters: {parameters['target']:,} of the target alone, {parameters['training']:,} in training")
    sample = content["sample"]
    for name, flops in content["flops_per_image"].items():
        what = "target, forward and backward" if name == "target_training" else f"source {name}, forward"
        lines.append(f"{what}: {flops / 1e9:.3f} GFLOP {sample}")
    lines.append(f"activations: {content['activation_bytes_per_image'] / 2**20:.1f} MiB {sample}")
    for kind in ("images", "videos"):
        if kind in content:
            lines.append(f"{kind}: " + ", ".join(f"{n:,} {split}" for split, n in content[kind].items()))
    if "loader" in content:
        lines.append(f"loader: {content['loader']}")
    if "recalled_soft_targets_bytes" in content:
        lines.append(f"recalled soft targets: {content['recalled_soft_targets_bytes'] / 2**20:.1f} MiB")
    lines.append(f"soft-target losses: {content['kernels']}")
    return "\n".join(lines)


def input_shape(recipe: Recipe, dims: int) -> tuple[int, ...]:
    """Of one sample: (3, S, S), of a clip (3, T, S, S), or of a puzzle its tiles: (3, P, T, T)."""
    size, puzzle = recipe.data.size, puzzle_of(recipe)
    if puzzle is not None:
        return (3, puzzle.places, puzzle.side(size), puzzle.side(size))
    return (3, recipe.data.frames or 16, size, size) if dims == 3 else (3, size, size)


def _training_flops(target: torch.nn.Module, shape: tuple[int, ...], aux: bool) -> int:
    """2 FLOPs a multiply-add, forward and backward, of one sample."""
    with FlopCounterMode(display=False) as counter:
        output = target(torch.empty(2, *shape, device="meta"), aux=aux)
        loss = output.logits_BK.sum() + (output.aux_logits_BC.sum() if output.aux_logits_BC is not None else 0)
        loss.backward()
    return counter.get_total_flops() // 2


def _activation_bytes(target: torch.nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """What autograd keeps for the backward pass, without weights, if all of it is in ``dtype``."""
    parameters = {id(p) for p in target.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in parameters:
            kept[id(tensor.untyped_storage())] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = target(torch.empty(2, *shape, device="meta"), aux=True)  # noqa: F841, keeps the graph alive
    return sum(kept.values()) // 2 * torch.empty(0, dtype=dtype).element_size()


def _source_flops(spec) -> int:
    with torch.device("meta"):
        network = build_network(spec).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(2, 3, spec.size, spec.size, device="meta"))
    return counter.get_total_flops() // 2
