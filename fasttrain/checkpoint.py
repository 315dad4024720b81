"""Checkpoints: whole files of tensors and plain values, read without running code in them."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from . import interrupts
from .files import write_whole

FORMAT = 1


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint whole: a run killed meanwhile leaves the one before it; Ctrl-C waits until it is written."""
    with interrupts.held(firm=True):
        write_whole(path, lambda file: torch.save(content | {"format": FORMAT}, file))


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU.

    Raises:
        ValueError: missing, damaged, with code in it, or not one of ours.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"the checkpoint {path} holds code and was not loaded") from None
    except Exception as error:  # zipfile and torch each have their own
        raise ValueError(f"cannot read the checkpoint {path}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version of fasttrain")
    return content


def load_target(target: torch.nn.Module, state: dict[str, Any], path: Path, classes: tuple[str, ...]) -> None:
    """Loads a target's tensors from a checkpoint's ``target`` entry.

    Raises:
        ValueError: it is of another number of classes, or of another network.
    """
    rows = state["target"]["head.weight"].shape[0]
    wanted = target.get_parameter("head.weight").shape[0]
    if rows != wanted or list(state["classes"]) != list(classes):
        raise ValueError(
            f"the checkpoint {path} is of {rows} classes ({_some(state['classes'])}), and the data has {wanted} "
            f"({_some(classes)})"
        )
    try:
        target.load_state_dict(state["target"])
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ValueError(f"the checkpoint {path} is of another network: {' '.join(lines[1:2]).strip()[:200]}") from None


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
    state = load(path)
    if state.get("average") is not None:  # last.pt has both; selected.pt has the average alone
        average = {k: v for k, v in state["average"].items() if k.startswith("module.")}
        state |= {"target": {k.removeprefix("module."): v for k, v in average.items()}}
    return path, without_heads(state)


def without_heads(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the target alone: auxiliary heads are left out."""
    kept = {k: v for k, v in state["target"].items() if not k.startswith("aux_heads.")}
    return state | {"target": kept}


def _some(names) -> str:
    return ", ".join(list(names)[:4]) + (", .." if len(names) > 4 else "")


_MAY_DIFFER = {
    "dir",
    "device",
    "compile",
    "kernels",
    "threads",
    "parallel",
    "seeds",
    "log_every",
    "tensorboard",
    "checkpoint_every",
}
_MAY_DIFFER |= {"checkpoint_steps", "keep", "timeout"}


def same_recipe(stored: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Insists that a run goes on with the recipe it began with; where it runs and what it logs may differ.

    Raises:
        ValueError: with the first field that differs.
    """
    for name, stored_value, value in _differences(stored, now, ""):
        if name.startswith("run.") and name.removeprefix("run.") in _MAY_DIFFER:
            continue
        if name in ("data.workers", "data.hw_decoder_load", "data.cache"):
            continue
        raise ValueError(
            f"{folder} holds a run with {name} {stored_value!r}, and this one has {value!r}: choose another --name or "
            "--run.dir, or remove the folder"
        )


def _differences(a: Any, b: Any, name: str):
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a | b:
            yield from _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b and (a, b) != ((), []):
        yield name, a, b


def read_summary(path: Path) -> dict[str, Any]:
    """A finished run's summary.json."""
    return json.loads(path.read_text())
