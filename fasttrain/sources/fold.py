"""Batch normalisation folded into the convolution before it: a frozen network then has one operation less for each."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

_RELATIVE = 1e-4  # of the largest logit: what folding may change in float32


def folded(network: nn.Module, example_BCHW: Tensor) -> tuple[nn.Module, int]:
    """A copy of a network in evaluation mode, in which every batch norm that directly follows a convolution is part of it.

    Which one follows which is seen by running the network on an example, so that it may be built in any way. That folding
    changed nothing (but the last digits) is seen in the same way.

    Args:
        network: in evaluation mode.
        example_BCHW: an input for it; random numbers will do.

    Returns:
        The copy, and how many were folded: 0, and the network itself, where there are none or where it changes the output (a
        convolution whose output is read by something else, too).
    """
    if not any(isinstance(m, nn.BatchNorm2d) for m in network.modules()):
        return network, 0
    out = copy.deepcopy(network)
    with torch.no_grad():
        before = out(example_BCHW)
        pairs = _pairs(out, example_BCHW)
        for conv, norm in pairs:
            _fold(out, conv, norm)
        after = out(example_BCHW)
    if not pairs or not (after - before).abs().max() <= _RELATIVE * before.abs().max():
        return network, 0
    return out, len(pairs)


def _pairs(network: nn.Module, example_BCHW: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and batch norms that run once each, the one on the output of the other."""
    made_by: dict[int, nn.Conv2d] = {}
    kept: list[Tensor] = []  # so that no identity is given twice
    runs: dict[nn.Module, int] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def ran(module: nn.Module, given: tuple, output: Tensor) -> None:
        runs[module] = runs.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            made_by[id(output)] = module
            kept.append(output)
        elif isinstance(module, nn.BatchNorm2d) and id(given[0]) in made_by:
            pairs.append((made_by[id(given[0])], module))

    hooks = [m.register_forward_hook(ran) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    network(example_BCHW)
    for hook in hooks:
        hook.remove()
    return [(c, n) for c, n in pairs if runs[c] == runs[n] == 1 and _plain(c) and n.track_running_stats]


def _plain(conv: nn.Conv2d) -> bool:
    """Whether its forward pass uses the weights as they are; subclasses may standardise them first."""
    return type(conv)._conv_forward is nn.Conv2d._conv_forward and "Std" not in type(conv).__name__


def _fold(network: nn.Module, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    with torch.no_grad():
        bias = None if conv.bias is None else conv.bias.double()
        weight, bias = fuse_conv_bn_weights(
            conv.weight.double(),
            bias,
            norm.running_mean.double(),  # type: ignore[union-attr]
            norm.running_var.double(),  # type: ignore[union-attr]
            norm.eps,
            norm.weight.double() if norm.weight is not None else None,
            norm.bias.double() if norm.bias is not None else None,
        )
        conv.weight = _frozen(weight, conv.weight)
        conv.bias = _frozen(bias, conv.weight)
    # timm's batch norms carry what comes after them
    after = [m for m in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(m, nn.Module)]
    name = next(name for name, module in network.named_modules() if module is norm)
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, nn.Sequential(*after).eval() if after else nn.Identity())


def _frozen(value: Tensor, like: Tensor) -> nn.Parameter:
    """In the type and memory format of ``like``."""
    out = value.to(like.dtype)
    if out.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        out = out.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(out, requires_grad=False)
