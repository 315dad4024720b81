"""A target's figures on a split. Several processes share the images; the first one has all answers, in their order."""

from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import interrupts, ranks
from .build import Parts
from .details import condensed
from .kernels import network_input
from .loaders.base import LoaderSpec
from .loaders.order import batches
from .stragglers import WAITS


def evaluate(parts: Parts, target: torch.nn.Module, split: str) -> dict[str, float]:
    """The task's figures on a split, under the run's precision; the same in every process.

    Raises:
        Asked: in every process, where one of them was asked to end meanwhile.
    """
    answers = _answers(parts, target, split)
    return ranks.here().first_does(lambda: _figures(parts, *answers))


def evaluate_in_detail(parts: Parts, target: torch.nn.Module, split: str) -> tuple[dict[str, float], dict[str, Any]]:
    """What :func:`evaluate` gives, and what a report shows besides: the task's ``details``, condensed."""
    logits_NK, targets_N, index_N = _answers(parts, target, split)

    def both() -> tuple[dict[str, float], dict[str, Any]]:
        figures = _figures(parts, logits_NK, targets_N, index_N)
        answers = (logits_NK, targets_N)
        if parts.recipe.data.frames:
            answers = parts.task.by_video(logits_NK, targets_N, index_N)
        return figures, condensed(parts.task.details(*answers))

    return ranks.here().first_does(both)


def _figures(parts: Parts, logits_NK: Tensor, targets_N: Tensor, index_N: Tensor) -> dict[str, float]:
    if parts.recipe.data.frames:
        return parts.task.evaluate_videos(logits_NK, targets_N, index_N)
    return parts.task.evaluate(logits_NK, targets_N)


@torch.no_grad()
def _answers(parts: Parts, target: torch.nn.Module, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, K], targets and indices of a split's samples, of clips one each; of a process but the first only its own."""
    its = ranks.here()
    target.eval()
    mean, std = (torch.tensor(v, device=parts.device) for v in (parts.recipe.data.mean, parts.recipe.data.std))
    logits, targets, index = [], [], []
    with interrupts.held(), closing(parts.loaders[split]) as loader:
        loader.set_epoch(0)
        its.doing("waits for data")
        for batch in loader:
            its.doing("evaluates")
            if len(batch):
                with torch.autocast(parts.device.type, parts.dtype, enabled=parts.dtype != torch.float32):
                    logits.append(target(network_input(batch.pixels, mean, std)).logits_BK.float())
                targets.append(batch.targets)
                index.append(batch.index)
            if its.several:
                its.doing(WAITS)
            if its.agree(interrupts.asked()):
                interrupts.settle()
                raise interrupts.Asked
            its.doing("waits for data")
    if not its.several:
        return torch.cat(logits), torch.cat(targets), torch.cat(index)
    at = [_places(loader.spec, rank) for rank in range(its.count)]
    width = its.told(logits[0].shape[1] if its.first else 0)  # a process may have no sample at all
    targets_N = torch.from_numpy(parts.dataset.targets_N)
    nothing = (torch.empty(0, width), targets_N[:0], torch.empty(0, dtype=torch.int64))
    sizes = [len(places) for places in at]
    whole = [
        its.rows(torch.cat(rows) if rows else none, sizes)
        for rows, none in zip((logits, targets, index), nothing, strict=True)
    ]
    if its.first:
        order_N = torch.from_numpy(np.argsort(np.concatenate(at), kind="stable"))
        whole = [rows[order_N] for rows in whole]
    return whole[0], whole[1], whole[2]


def _places(spec: LoaderSpec, rank: int) -> np.ndarray:
    """Where the samples that a process is served stand in the split: int64."""
    every = np.arange(len(spec.index_N) * spec.shows)
    walk = batches(every, global_batch=spec.batch, rank=rank, ranks=spec.ranks, unit=spec.unit, parts=spec.parts)
    return np.concatenate([every[:0], *walk])
