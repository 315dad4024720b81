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


def rank_part(batch_G: np.ndarray, rank: int, ranks: int, unit: int = 1) -> np.ndarray:
    """The part of one global batch that falls to ``rank``: a contiguous slice, sizes differing by one unit at most.

    The first ranks get what is left over, so that no rank's part of a smaller batch is larger than its part of a full one. (A
    last unit that is not full goes to the last of those that got one more, out of its order, for the same reason.)

    Args:
        batch_G: the global batch.
        rank, ranks: which of how many.
        unit: samples that stay together, from the first on; the last unit may not be full.
    """
    each, over = divmod(-(-len(batch_G) // unit), ranks)
    start, count = each * rank + min(rank, over), each + (rank < over)
    rest = len(batch_G) % unit
    if not rest:
        return batch_G[start * unit : (start + count) * unit]
    whose = (over or ranks) - 1
    start, count = start - (rank > whose), count - (rank == whose)
    part = batch_G[start * unit : (start + count) * unit]
    return np.concatenate([part, batch_G[-rest:]]) if rank == whose else part


def batches(
    index_N: np.ndarray,
    *,
    global_batch: int,
    drop_last: bool = False,
    start: int = 0,
    rank: int = 0,
    ranks: int = 1,
    unit: int = 1,
) -> Iterator[np.ndarray]:
    """Walks through an epoch's order: yields int64 [B], from global batch ``start`` on.

    Args:
        index_N: the epoch's order, from :func:`order`, or any list of indices.
        global_batch: samples per step over all ranks.
        drop_last: leave out the last batch if it is not full.
        start: number of global batches that are behind already.
        rank, ranks, unit: see :func:`rank_part`.
    """
    for b in range(start, batch_count(len(index_N), global_batch, drop_last)):
        yield rank_part(index_N[b * global_batch : (b + 1) * global_batch], rank, ranks, unit)
