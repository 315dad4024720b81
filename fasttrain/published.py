"""Weights that torchvision and timm publish: their files are read by us, and what is not on this machine is not fetched unasked.

Both libraries download on their own when a network is built with its weights, and torchvision's reader runs code in a file. So
a network is built here with tensors that were read before.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .fetch import file_name, library_file
from .weights import Weights, read_weights

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # in this order in a repository of the Hugging Face hub
_PATCH = threading.Lock()


def torchvision_weights(model: str, name: str, sha256: str) -> Weights:
    """The tensors of torchvision's weights, from the file that torch.hub keeps.

    Args:
        model: torchvision's name of the network.
        name: of the weights, such as ``IMAGENET1K_V1``, or ``DEFAULT``.
        sha256: of the file, or its first digits: the eight in its name are enough to have it fetched.

    Raises:
        ValueError: an unknown name, a file that is not here and may not be fetched, or one that cannot be read.
    """
    import torchvision

    known: Any = torchvision.models.get_model_weights(model)
    if name not in known.__members__:
        raise ValueError(f"torchvision has no weights {name!r} for {model}, but {', '.join(known.__members__)}")
    url = known[name].url
    path = _hub_folder() / file_name(url)
    return read_weights(library_file(f"torchvision's weights {name} of {model}", [path], [url], sha256), sha256)


def torchvision_network(model: str, name: str, sha256: str) -> tuple[nn.Module, Weights]:
    """A network with torchvision's weights, built as torchvision builds it; as :func:`torchvision_weights`."""
    import torchvision

    weights = torchvision_weights(model, name, sha256)
    try:
        with _given(torchvision.models._api, "load_state_dict_from_url", dict(weights.tensors)):
            return torchvision.models.get_model(model, weights=name), weights
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"the weights {weights.origin} do not fit {model}: {_short(error)}") from None


def timm_network(model: str, sha256: str) -> tuple[nn.Module, Weights]:
    """A network with the weights that timm publishes for its name, and their classes.

    They are looked for in the Hugging Face hub's cache and in torch.hub's, and fetched where ``sha256`` is theirs: all 64
    digits, or eight where the file's name has them.

    Args:
        model: timm's name of it, with or without a tag.
        sha256: of the file, or its first digits.

    Raises:
        ValueError: none are published, they are not here and may not be fetched, or they cannot be read or fitted.
    """
    import timm

    config: Any = timm.get_pretrained_cfg(model)
    here, urls = _places(config) if config else ([], [])
    if not urls:
        raise ValueError(f"timm publishes no weights for {model}; give a file or package:MODULE")
    weights = read_weights(library_file(f"timm's weights of {model}", here, urls, sha256), sha256)
    given = {"state_dict": dict(weights.tensors), "custom_load": False, "source": None}
    try:
        return timm.create_model(model, pretrained=True, pretrained_cfg_overlay=given), weights
    except Exception as error:  # each of timm's networks has its own way to fail
        raise ValueError(f"the weights {weights.origin} do not fit {model}: {_short(error)}") from None


def _places(config: Any) -> tuple[list[Path], list[str]]:
    """Where timm's file may be here, and its URLs."""
    here, urls = [], []
    if config.hf_hub_id:
        import huggingface_hub  # comes with timm

        repository, _, revision = config.hf_hub_id.partition("@")
        names = (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES
        for name in names:
            found = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision or None)
            if isinstance(found, str):
                here.append(Path(found))
        urls.append(huggingface_hub.hf_hub_url(repository, names[0], revision=revision or None))
    if config.url and not config.url.endswith((".npz", ".npy")):
        here.append(_hub_folder() / file_name(config.url))
        urls.append(config.url)
    return here, urls


def _hub_folder() -> Path:
    return Path(torch.hub.get_dir(), "checkpoints")


@contextmanager
def _given(module: Any, name: str, tensors: dict[str, Any]) -> Iterator[None]:
    """``module.name`` gives the tensors, whatever it is asked for."""
    with _PATCH:
        before = getattr(module, name)
        setattr(module, name, lambda *_, **__: tensors)
        try:
            yield
        finally:
            setattr(module, name, before)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
