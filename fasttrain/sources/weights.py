"""Fits weights into a source's network."""

import hashlib

import torch
from torch import Tensor, nn

from fasttrain.weights import Weights


def fit(network: nn.Module, weights: Weights, name: str) -> str:
    """Loads weights into a network, by name, or by order where only the names differ.

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
    if given[name].shape[1:] == wanted[name].shape[1:]:
        return f"; set the source's classes to {given[name].shape[0]}?"
    return ""
