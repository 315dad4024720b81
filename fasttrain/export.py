"""A trained target alone, for use elsewhere: weights (safetensors), a ``torch.export`` program, ONNX, and a model card.

Each takes pixels of 0 to 255, float32 [B, 3, S, S] (clips: [B, 3, T, S, S]), any B, and gives the task's logits [B, K]; the
normalisation is inside. What took part in the training only (auxiliary heads, peers, generators) is in none of them.
"""

import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from . import checkpoint, model_card
from .build import build_target
from .describe import input_shape
from .environment import versions
from .files import write_text, write_whole
from .inference import alone, open_run
from .models import Target
from .recipe import Recipe, from_dict

_SUFFIXES = {".pt2": "a torch.export program", ".safetensors": "weights and a model card", ".onnx": "ONNX"}
_FORMAT = 1
_KEY = "fasttrain"  # of the facts: in the header of safetensors, ONNX's metadata, and with .json a file in a .pt2
_BATCHES = (1, 3)
_TOLERANCE = 1e-4  # of the largest logit


class Exported(nn.Module):
    """A target with its normalisation: pixels of 0 to 255, float32 or uint8 [B, 3, S, S] or [B, 3, T, S, S] -> logits [B, K].

    Args:
        target: without auxiliary heads.
        about: what ``fasttrain export`` writes beside the weights.

    Attributes:
        classes: names of the K classes.
        input_shape: of one sample, without B.
    """

    def __init__(self, target: Target, about: dict[str, Any]) -> None:
        super().__init__()
        self.target = target
        self.classes, self.input_shape = tuple(about["classes"]), tuple(about["input"])
        shape = [1, 3] + [1] * target.backbone.dims
        self.register_buffer("mean", torch.tensor(about["mean"], dtype=torch.float32).view(shape))
        self.register_buffer("std", torch.tensor(about["std"], dtype=torch.float32).view(shape))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.target((pixels - self.mean) / self.std).logits_BK  # type: ignore[operator]


def load(path: str | Path) -> Exported:
    """The target in a ``.safetensors`` file of ``fasttrain export``, on the CPU, in evaluation mode.

    Raises:
        ValueError: no such file, not one of ours, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(_KEY, "null"))
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path} as safetensors: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise ValueError(
            f"{path} does not say what its weights are of: it is not from this version's `fasttrain export`"
        )
    target = build_target(from_dict({"target": about["target"]}), len(about["classes"]), {})
    checkpoint.load_target(target, {"target": tensors, "classes": about["classes"]}, path, about["classes"])
    return Exported(target, about).eval()


def export(name: str, out: str) -> dict[str, Any]:
    """Writes a trained target, after each file has been run beside the target itself.

    Args:
        name: a run's folder (its selected weights) or a checkpoint file.
        out: a file whose suffix names the format: ``.pt2``, ``.safetensors`` (with a model card, ``.md``, beside it) or
            ``.onnx``; or a folder, ``DIR/`` or one that is there, for all three and their card, ``README.md``.

    Returns:
        ``{"checkpoint", "model", "parameters", "classes", "input", "largest_logit", "files": [{"path", "format", "bytes",
        "sha256", "largest_difference"}], "card"}``: the differences are of logits, over batches of 1 and 3 random samples.

    Raises:
        ValueError: no such run, one that solves puzzles, another suffix, a part that is not installed, a network that cannot be
            exported, or an exported one that says something else than the target (by more than 1e-4 of the largest logit);
            nothing is then written.
    """
    paths, card = _places(out)
    path, state = open_run(name)
    trained = from_dict(state["recipe"])
    if trained.pretext.task != "none":
        raise ValueError(
            f"the run in {path} solves puzzles, which nobody else asks for; train a target from it (target.weights: {path}) and "
            "export that"
        )
    recipe = alone(from_dict(state["recipe"]))
    target = build_target(recipe, len(state["classes"]), {})
    checkpoint.load_target(target, state, path, tuple(state["classes"]))
    about = _about(recipe, target, state["classes"])
    module = Exported(target, about).eval().requires_grad_(False)
    trials = _trials(module)
    largest = float(torch.cat([logits_BK for _, logits_BK in trials]).abs().max())
    content: dict[str, Any] = {
        "checkpoint": str(path),
        "model": recipe.target.model,
        "parameters": sum(p.numel() for p in target.parameters()),
        "classes": state["classes"],
        "input": about["input"],
        "largest_logit": largest,
    }
    with tempfile.TemporaryDirectory() as folder:
        made = {suffix: Path(folder, p.name) for suffix, p in paths.items()}
        _write(made, module, about)
        files = [_checked(made[suffix], paths[suffix], trials, largest) for suffix in paths]
        content |= {"files": files, "card": str(card) if card else None}
        text = model_card.text(trained, state, _summary_of(path, state), content)
        for suffix in paths:
            write_whole(paths[suffix], partial(_copy, made[suffix]))
    if card is not None:
        write_text(card, text)
    return content


def to_text(content: dict[str, Any]) -> str:
    """For people: a line for each file."""
    sides = ", ".join(map(str, content["input"]))
    batches = " and ".join(map(str, _BATCHES))
    lines = [
        f"{file['path']}: {content['model']}, {len(content['classes'])} classes, pixels float32 [B, {sides}] of 0 to 255; run "
        f"on batches of {batches}, its logits differ from the target's by {file['largest_difference']:.1e} at most (they "
        f"reach {content['largest_logit']:.3g})"
        for file in content["files"]
    ]
    return "\n".join(lines + ([f"{content['card']}: the model card"] if content["card"] else []))


def _places(out: str) -> tuple[dict[str, Path], Path | None]:
    """Where each format goes, by its suffix, and the card."""
    path = Path(out)
    card: Path | None
    if path.is_dir() or out.endswith("/"):
        if path.is_file():
            raise ValueError(f"--out: {out} is a file, not a folder")
        paths, card = {suffix: path / f"model{suffix}" for suffix in _SUFFIXES}, path / "README.md"
    elif path.suffix in _SUFFIXES:
        paths, card = {path.suffix: path}, path.with_suffix(".md") if path.suffix == ".safetensors" else None
    else:
        known = ", ".join(f"{suffix} ({what})" for suffix, what in _SUFFIXES.items())
        raise ValueError(
            f"--out: {out} has the suffix {path.suffix!r}; there are {known}, or a folder, DIR/, for all of them"
        )
    if card is not None and card.is_file() and not model_card.is_ours(card):
        raise ValueError(
            f"--out: the model card would replace {card}, which fasttrain did not write; choose another place"
        )
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if ".onnx" in paths and missing:
        raise ValueError(f"--out: ONNX needs {' and '.join(missing)}: pip install fasttrain[onnx]")
    return paths, card


def _about(recipe: Recipe, target: Target, classes: list[str]) -> dict[str, Any]:
    """What it takes to build the target again."""
    return {
        "format": _FORMAT,
        "fasttrain": versions().get("fasttrain", "not installed"),
        "target": asdict(recipe.target) | {"weights": None, "sha256": "", "frozen": 0},
        "classes": list(classes),
        "input": list(input_shape(recipe, target.backbone.dims)),
        "mean": recipe.data.mean,
        "std": recipe.data.std,
    }


def _write(paths: dict[str, Path], module: Exported, about: dict[str, Any]) -> None:
    facts = json.dumps(about)
    if ".safetensors" in paths:
        header = {"format": "pt", _KEY: facts}
        safetensors.torch.save_file(module.target.state_dict(), paths[".safetensors"], header)
    if paths.keys() <= {".safetensors"}:
        return
    try:
        _write_programs(paths, module, facts)
    except Exception as error:  # of torch.export, of the ONNX converter: they have no common class
        reason = " ".join(str(error).split())[:200]
        network = module.target.backbone.name
        raise ValueError(
            f"{network} cannot be exported as a program ({reason}); .safetensors takes its weights"
        ) from error


def _write_programs(paths: dict[str, Path], module: Exported, facts: str) -> None:
    program = torch.export.export(
        module, (torch.zeros(2, *module.input_shape),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    for node in program.graph.nodes:  # names files of this machine
        node.meta.pop("stack_trace", None)
    if ".pt2" in paths:
        torch.export.save(program, paths[".pt2"], extra_files={f"{_KEY}.json": facts})
    if ".onnx" in paths:
        names: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["logits"]}
        made = torch.onnx.export(program, dynamo=True, verbose=False, dynamic_shapes=({0: "batch"},), **names)
        assert made is not None
        made.model.metadata_props[_KEY] = facts
        made.save(paths[".onnx"])


@torch.no_grad()
def _trials(module: Exported) -> list[tuple[Tensor, Tensor]]:
    """Random pixels, and what the target says of them: what an exported file has to say, too."""
    generator = torch.Generator().manual_seed(0)
    shape = module.input_shape
    pixels = [torch.randint(0, 256, (batch, *shape), generator=generator).float() for batch in _BATCHES]
    return [(x, module(x)) for x in pixels]


def _checked(file: Path, place: Path, trials: list[tuple[Tensor, Tensor]], largest: float) -> dict[str, Any]:
    """Runs an exported file, read back from the disk.

    Raises:
        ValueError: it says something else than the target, or not numbers.
    """
    run = _runner(file)
    with torch.no_grad():
        difference = float(torch.cat([run(pixels) - logits_BK for pixels, logits_BK in trials]).abs().max())
    if not difference <= _TOLERANCE * largest:  # of NaN, too
        raise ValueError(
            f"the exported {place} is not the target: its logits differ by {difference:.2g} where they reach {largest:.2g}, "
            f"more than {_TOLERANCE:g} of that; nothing was written"
        )
    facts = {"path": str(place), "format": file.suffix.removeprefix("."), "bytes": file.stat().st_size}
    return facts | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "largest_difference": difference}


def _runner(file: Path) -> Callable[[Tensor], Tensor]:
    if file.suffix == ".safetensors":
        return load(file)
    if file.suffix == ".pt2":
        return torch.export.load(file).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


def _copy(source: Path, file: BinaryIO) -> None:
    with open(source, "rb") as opened:
        shutil.copyfileobj(opened, file)


def _summary_of(path: Path, state: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of the run that a checkpoint lies in, if it is of these very weights."""
    place = path.parent.parent / "summary.json"
    if path.name != "selected.pt" or not place.is_file():
        return None
    summary = checkpoint.read_summary(place)
    return summary if (summary["selected_epoch"], summary["val"]) == (state["epoch"], state["val"]) else None
