"""The order of an epoch, a pure function of (seed, epoch), cut into global batches and these into ranks.

A global batch holds the same indices on 1 rank and on 8, so a run may go on with another number of GPUs.
"""

import math
from collections.abc import Iterator

import numpy as np

from .philox import draw

_BALANCE = 1 << 20  # + class: the order within a class of a balanced epoch
_ORDER = 0  # the purpose of these random numbers; loaders/views.py has the others


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of 0 .. n-1: int64 [n].

    Every index gets a 64-bit random key of (seed, epoch, index); the order is that of the keys.
    """
    word_4N = draw(seed, epoch, np.arange(n), _ORDER).astype(np.uint64)
    return np.argsort((word_4N[0] << np.uint64(32)) | word_4N[1], kind="stable").astype(np.int64)


def balanced_order(seed: int, epoch: int, targets_N: np.ndarray) -> np.ndarray:
    """Positions 0 .. n-1 with every class equally often (to within one): int64 [n].

    A class goes through its members in a new random order as often as it takes; which of them come once more than
    others changes from epoch to epoch.

    Raises:
        ValueError: ``targets_N`` is not a class index for each.
    """
    if targets_N.ndim != 1:
        raise ValueError("data.balance: a multi-label data set cannot be balanced by class")
    n, classes = len(targets_N), np.unique(targets_N)
    rank_C = order(seed, epoch, len(classes))  # the classes that get the remainder
    parts = []
    for c, label in enumerate(classes):
        member = np.flatnonzero(targets_N == label)
        count = n // len(classes) + int(rank_C[c] < n % len(classes))
        word_4M = draw(seed, epoch, np.arange(-(-count // len(member)) * len(member)), _BALANCE + int(label))
        key = (word_4M[0].astype(np.uint64) << np.uint64(32)) | word_4M[1]
        rounds = [member[np.argsort(k, kind="stable")] for k in key.reshape(-1, len(member))]
        parts.append(np.concatenate(rounds)[:count] if rounds else member[:0])
    return np.concatenate(parts)[order(seed, epoch, n)]


def batch_count(n: int, global_batch: int, drop_last: bool = False) -> int:
    """How many global batches an epoch over ``n`` samples has."""
    return n // global_batch if drop_last else math.ceil(n / global_batch)


def part_sizes(n: int, parts: int, unit: int = 1) -> list[int]:
    """Sizes of the parts into which a global batch is cut: in the batch's order, as even as can be, the first ones larger.

    None holds a single sample, whose batch norm would have no variance: a batch too small for that leaves the last parts
    empty. Sizes do not depend on how many ranks share the parts.

    Args:
        n: samples of the global batch.
        parts: how many parts.
        unit: samples that stay together, from the first on; what is left of the last unit goes to the last part in use.
    """
    filled = min(parts, max(n // max(unit, 2), 1))
    each, over = divmod(n // unit, filled)
    sizes = [(each + (p < over)) * unit for p in range(filled)]
    sizes[-1] += n % unit
    return sizes + [0] * (parts - filled)


def rank_part(batch_G: np.ndarray, rank: int, ranks: int, unit: int = 1, parts: int = 0) -> np.ndarray:
    """What falls to ``rank`` of one global batch: a slice, of ``parts / ranks`` of its parts.

    Args:
        batch_G: the global batch.
        rank, ranks: which of how many.
        unit: see :func:`part_sizes`.
        parts: of the global batch, a multiple of ``ranks``; 0: one a rank.
    """
    sizes, each = part_sizes(len(batch_G), parts or ranks, unit), (parts or ranks) // ranks
    start = sum(sizes[: rank * each])
    return batch_G[start : start + sum(sizes[rank * each : (rank + 1) * each])]


def batches(
    index_N: np.ndarray,
    *,
    global_batch: int,
    drop_last: bool = False,
    start: int = 0,
    rank: int = 0,
    ranks: int = 1,
    unit: int = 1,
    parts: int = 0,
) -> Iterator[np.ndarray]:
    """Walks through an epoch's order: yields int64 [B], from global batch ``start`` on.

    Args:
        index_N: the epoch's order, from :func:`order`, or any list of indices.
        global_batch: samples per step over all ranks.
        drop_last: leave out the last batch if it is not full.
        start: number of global batches that are behind already.
        rank, ranks, unit, parts: see :func:`rank_part`.
    """
    for b in range(start, batch_count(len(index_N), global_batch, drop_last)):
        yield rank_part(index_N[b * global_batch : (b + 1) * global_batch], rank, ranks, unit, parts)
