"""Checkpoints: whole files of tensors and plain values, sealed by a checksum, read without running code in them.

A run's folder ``checkpoints`` holds ``last.pt`` (all of a run), ``selected.pt`` (the target alone) and, with ``run.keep``
above 1, ``step-000001234.pt``: what last.pt was before. :mod:`fasttrain.writer` writes them in the background.
"""

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from . import interrupts
from .files import write_whole
from .recipe import Recipe
from .torch_files import HoldsCode, read_torch

FORMAT = 2  # 1 had no checksum, and is still read

LAST = "last.pt"
_STEP = re.compile(r"step-(\d{9,})\.pt")


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint whole: a run killed meanwhile leaves the one before it; Ctrl-C waits until it is written."""
    with interrupts.held(firm=True):
        write(path, content)


def write(path: Path, content: dict[str, Any], *, ready: Callable[[], None] = lambda: None) -> None:
    """Writes a checkpoint whole, with its checksum in it.

    Args:
        path: of the file.
        content: tensors and plain values.
        ready: called when all of it is on the disk, under another name.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    content = {k: v for k, v in content.items() if k != "sha256"} | {"format": FORMAT}
    content["sha256"] = digest(content)
    write_whole(path, lambda file: _dump(content, file), ready=ready)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU, and compares it with its checksum. Those of format 1 have none, and are read.

    Raises:
        ValueError: missing, damaged, with code in it, or not one of ours.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        content = read_torch(path, f"the checkpoint {path}")
    except HoldsCode:
        raise ValueError(f"the checkpoint {path} holds code and was not loaded") from None
    if not isinstance(content, dict) or content.get("format") not in (1, FORMAT):
        raise ValueError(f"{path} is not a checkpoint of this version of fasttrain")
    said = content.pop("sha256", None)
    if (said is not None or content["format"] != 1) and said != digest(content):
        raise ValueError(f"the checkpoint {path} is damaged: its content is not what its SHA-256 says")
    return content


def newest(folder: Path, report: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that can be read, and its content; None where there is none.

    Args:
        folder: the run's ``checkpoints``.
        report: is told which were damaged, and which is used instead.

    Raises:
        ValueError: there are some, and all are damaged.
    """
    paths = [path for path in (folder / LAST,) if path.is_file()]
    paths += [path for _, path in steps(folder)]
    wrong: list[str] = []
    for path in paths:
        try:
            content = load(path)
        except ValueError as error:
            wrong.append(str(error))
            report(f"WARNING: {error}; trying the checkpoint before it")
            continue
        if wrong:
            report(f"WARNING: going on from {path} instead: the steps after it are done again")
        return path, content
    if wrong:
        raise ValueError(
            f"no checkpoint in {folder} can be read ({wrong[0]}): restore one from a copy, or remove the run's folder "
            "to begin again"
        )
    return None


def steps(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints before last.pt that are kept in ``folder``: step and path, newest first."""
    found = ((_STEP.fullmatch(path.name), path) for path in folder.glob("step-*.pt"))
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def digest(content: Any) -> str:
    """SHA-256 over all that a checkpoint holds, in its order: types, names, plain values, and tensors' types, shapes,
    strides and bytes. Tensors are not copied, and other threads run meanwhile."""
    out = hashlib.sha256()
    _feed(content, out.update)
    return out.hexdigest()


def _feed(value: Any, update: Callable[[Any], None]) -> None:
    if isinstance(value, Tensor):
        update(f"tensor {value.dtype} {list(value.shape)} {list(value.stride())};".encode())
        if value.numel():
            update(_memory(value).numpy().data)
    elif isinstance(value, dict):
        update(f"{type(value).__name__} {len(value)};".encode())
        for key, item in value.items():
            _feed(key, update)
            _feed(item, update)
        if isinstance(value, OrderedDict):
            _feed(value.__dict__.get("_metadata"), update)  # a state dict's
    elif isinstance(value, (list, tuple)):
        update(f"{type(value).__name__} {len(value)};".encode())
        for item in value:
            _feed(item, update)
    elif isinstance(value, set):
        update(f"set {len(value)};".encode())
        for text in sorted(f"{type(item).__name__} {item!r};" for item in value):
            update(text.encode("utf-8", "surrogatepass"))
    else:
        assert value is None or isinstance(value, (str, int, float, bytes, torch.dtype, torch.device)), type(value)
        text = value.hex() if isinstance(value, (float, bytes)) else str(value)
        data = text.encode("utf-8", "surrogatepass")
        update(f"{type(value).__name__} {len(data)} ".encode() + data)


def _memory(tensor: Tensor) -> Tensor:
    """A tensor's bytes in the order in which they lie in memory; a copy only of what has gaps."""
    tensor = tensor.detach().cpu()
    packed = tensor.permute(sorted(range(tensor.dim()), key=lambda d: -tensor.stride()[d]))
    packed = packed.contiguous()
    out = torch.empty(0, dtype=torch.uint8)
    size = packed.element_size()
    return out.set_(packed.untyped_storage(), packed.storage_offset() * size, (packed.numel() * size,), (1,))


class _Noting:
    """A file that keeps its error, which torch.save turns into another one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _dump(content: dict[str, Any], file: BinaryIO) -> None:
    noting: Any = _Noting(file)
    try:
        torch.save(content, noting)
    except RuntimeError:
        if noting.error is None:
            raise
        raise noting.error from None


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
_MAY_DIFFER |= {"checkpoint_steps", "keep", "timeout", "skip_nonfinite"}


def same_recipe(stored: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Insists that a run goes on with the recipe it began with; where it runs and what it logs may differ. A field that
    there was not when it began counts as what it is by default.

    Raises:
        ValueError: with the first field that differs.
    """
    for name, stored_value, value in _differences(_with_defaults(stored, asdict(Recipe())), now, ""):
        if name.startswith("run.") and name.removeprefix("run.") in _MAY_DIFFER:
            continue
        if name in ("data.workers", "data.hw_decoder_load", "data.cache", "data.sha256", "data.root"):
            continue
        raise ValueError(
            f"{folder} holds a run with {name} {stored_value!r}, and this one has {value!r}: choose another --name or "
            "--run.dir, or remove the folder"
        )


def _with_defaults(stored: Any, default: Any) -> Any:
    if not isinstance(stored, dict) or not isinstance(default, dict):
        return stored
    return default | {key: _with_defaults(value, default.get(key)) for key, value in stored.items()}


def _differences(a: Any, b: Any, name: str):
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a | b:
            yield from _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b and (a, b) != ((), []):
        yield name, a, b


def read_summary(path: Path) -> dict[str, Any]:
    """A finished run's summary.json.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the run tests its weights again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it is no summary): remove it, and the run tests its weights again")
    return content
