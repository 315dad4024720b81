"""The transfer modules of all sources, run together: one wide convolution in the place of several narrow ones.

Every source has a transfer module of its own, and all of them read the same taps. Here their bottlenecks on a tap run side by
side: the first 1x1 convolutions as one, whose output channels are all sources', and the others as grouped convolutions, one
group a source. Weights are put side by side when they are used; parameters and statistics stay in the modules, and so do
checkpoints and the optimiser's state.

It is exact. Batch norm has statistics for each channel, so it does not see what is beside it. Channels that are padded have
weights, biases, scales and shifts of zero: zero goes through convolution, batch norm and ReLU, and no gradient comes back.

Shape suffixes: B batch, C channels (of all sources side by side), S space (H, W; of clips T, H, W), M sources, W width of the
transfer module.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .heads import Bottleneck, TransferModule, pooled

Form = Literal["plain", "shared", "grouped"]
_Norm = nn.BatchNorm2d | nn.BatchNorm3d


def run_together(
    modules: Sequence[TransferModule], taps: list[Tensor], *, form: Form, pad_to: int, recompute: bool
) -> Tensor:
    """The logits that the modules give one by one, side by side: [B, C1 + .. + CM].

    In training the modules' running statistics move on as if each had run by itself.

    Args:
        modules: of one shape, all in training or all in evaluation; class counts may differ.
        taps: [B, C_i, H_i, W_i], or [B, C_i, T_i, H_i, W_i] where the modules are of 3 dimensions; shallow to deep.
        form: ``plain`` runs module after module. ``shared`` merges the first 1x1 convolutions, which read the tap, and
            leaves the others to each source. ``grouped`` merges all three.
        pad_to: a source's channels in merged convolutions become a multiple of this (zeros); 1 for no padding. ``plain``
            has nothing to pad.
        recompute: keep none of the activations between a tap and its pooled feature, compute them again in the backward
            pass.
    """
    assert len({(m.linear.in_features, m.training, *_tap_channels(m)) for m in modules}) == 1, "modules differ"
    assert pad_to >= 1 and form in ("plain", "shared", "grouped")
    if form == "plain":
        if not recompute:
            no_feature = taps[-1].new_empty(0)
            return torch.cat([module(taps, no_feature) for module in modules], dim=1)
        alone = [run_together([m], taps, form="grouped", pad_to=1, recompute=True) for m in modules]
        return torch.cat(alone, dim=1)
    pooled_MN: list[list[Tensor]] = [[] for _ in modules]
    norms: list[list[_Norm]] = []
    statistics: list[Tensor] = []
    for i, tap_BCS in enumerate(taps):
        branches = [cast(Bottleneck, m.branches[i]) for m in modules]
        lanes = [branches] if form == "grouped" else [[b] for b in branches]

        def run(tap_BCS: Tensor, lanes: list[list[Bottleneck]] = lanes) -> tuple[Tensor, ...]:
            return _bottlenecks(tap_BCS, lanes, pad_to)

        if recompute:
            pooled_BC, *found = checkpoint(run, tap_BCS, use_reentrant=False, preserve_rng_state=False)
        else:
            pooled_BC, *found = run(tap_BCS)
        for pooled_N, pooled_BW in zip(pooled_MN, pooled_BC.chunk(len(modules), dim=1), strict=True):
            pooled_N.append(pooled_BW[:, : modules[0].linear.in_features])
        statistics += found
        norms.append([_norm(b, 0) for b in branches])
        norms += [[_norm(b, layer) for b in lane] for lane in lanes for layer in (1, 2)]
    if modules[0].training:
        _move_on(norms, statistics)
    return torch.cat([module.logits(pooled_N) for module, pooled_N in zip(modules, pooled_MN, strict=True)], dim=1)


def _bottlenecks(tap_BCS: Tensor, lanes: list[list[Bottleneck]], pad_to: int) -> tuple[Tensor, ...]:
    """Bottlenecks on one tap: pooled [B, C] and the statistics of each batch norm. After the first convolution, which is one
    for all, each lane has its own two. Nothing is changed, so that this can be called twice for one step."""
    x_BCS, first = _layer(tap_BCS, list(chain(*lanes)), 0, 1, pad_to)
    of_lanes, statistics = [], [first]
    for lane, part_BCS in zip(lanes, x_BCS.chunk(len(lanes), dim=1), strict=True):
        for layer in (1, 2):
            part_BCS, found = _layer(part_BCS, lane, layer, len(lane), pad_to)
            statistics.append(found)
        of_lanes.append(pooled(part_BCS))
    return _joined(of_lanes, dim=1), *statistics


def _layer(x_BCS: Tensor, branches: list[Bottleneck], layer: int, groups: int, pad_to: int) -> tuple[Tensor, Tensor]:
    """Convolution, batch norm and ReLU number ``layer`` of all branches at once: output and statistics.

    The statistics [2, C] are the batch's means and unbiased variances in training, else the running ones.
    """
    convs, norms = [_conv(b, layer) for b in branches], [_norm(b, layer) for b in branches]
    conv, norm = convs[0], norms[0]
    rows, columns = -(-conv.out_channels // pad_to) * pad_to, x_BCS.shape[1] // groups
    weight = _joined([_padded(c.weight, rows, columns) for c in convs])
    bias, scale, shift = (
        _joined([_padded(v, rows) for v in vectors if v is not None])
        for vectors in ([c.bias for c in convs], [n.weight for n in norms], [n.bias for n in norms])
    )
    convolve = F.conv2d if weight.dim() == 4 else F.conv3d
    x_BCS = convolve(x_BCS, weight, bias, conv.stride, conv.padding, groups=groups)
    assert norm.running_mean is not None
    if norm.training:  # with a momentum of 1, what batch norm leaves in these are the batch's own
        statistics = norm.running_mean.new_zeros(2, len(norms) * rows)
    else:
        running = ([n.running_mean for n in norms], [n.running_var for n in norms])
        statistics = torch.stack([_joined([_padded(v, rows) for v in vs if v is not None]) for vs in running])
    x_BCS = F.batch_norm(x_BCS, statistics[0], statistics[1], scale, shift, norm.training, 1.0, norm.eps)
    return F.relu(x_BCS, inplace=True), statistics


@torch.no_grad()
def _move_on(norms: list[list[_Norm]], statistics: list[Tensor]) -> None:
    """Running statistics as after PyTorch's batch norm in training. Those [2, C] of a batch belong to the norms, side by side."""
    running, of_batch, counts = [], [], []
    for beside, of_beside in zip(norms, statistics, strict=True):
        for norm, part in zip(beside, of_beside.chunk(len(beside), dim=1), strict=True):
            running += [cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)]
            of_batch += list(part[:, : norm.num_features])
            counts.append(cast(Tensor, norm.num_batches_tracked))
    torch._foreach_lerp_(running, of_batch, cast(float, norms[0][0].momentum))
    torch._foreach_add_(counts, 1)


def _padded(tensor: Tensor, *shape: int) -> Tensor:
    """Zeros at the ends of the first dimensions, up to this shape."""
    missing = [n - have for n, have in zip(shape, tensor.shape, strict=False)]
    if not any(missing):
        return tensor
    ends = [0, 0] * (tensor.dim() - len(shape))
    for m in reversed(missing):
        ends += [0, m]
    return F.pad(tensor, ends)


def _joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _conv(branch: Bottleneck, layer: int) -> nn.Conv2d | nn.Conv3d:
    return cast("nn.Conv2d | nn.Conv3d", branch[3 * layer])


def _norm(branch: Bottleneck, layer: int) -> _Norm:
    return cast(_Norm, branch[3 * layer + 1])


def _tap_channels(module: TransferModule) -> list[int]:
    return [_conv(cast(Bottleneck, b), 0).in_channels for b in module.branches]
