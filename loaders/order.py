"""The order of an epoch, a pure function of (seed, epoch), cut into global batches and these into ranks.

A global batch holds the same indices on 1 rank and on 8, so a run may go on with another number of GPUs.
"""

import math
from collections.abc import Iterator

import numpy as np

from .philox import draw

_ORDER = 0  # the purpose of these random numbers; loaders/views.py has the others


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of 0 .. n-1: int64 [n].

    Every index gets a 64-bit random key of (seed, epoch, index); the order is that of the keys.
    """
    word_4N = draw(seed, epoch, np.arange(n), _ORDER).astype(np.uint64)
    return np.argsort((word_4N[0] << np.uint64(32)) | word_4N[1], kind="stable").astype(np.int64)


def batch_count(n: int, global_batch: int, drop_last: bool = False) -> int:
    """How many global batches an epoch over ``n`` samples has."""
    return n // global_batch if drop_last else math.ceil(n / global_batch)


def rank_part(batch_G: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    """The part of one global batch that falls to ``rank``: a contiguous slice, sizes differing by one at most."""
    return batch_G[len(batch_G) * rank // ranks : len(batch_G) * (rank + 1) // ranks]


def batches(
    index_N: np.ndarray, *, global_batch: int, drop_last: bool = False, start: int = 0, rank: int = 0, ranks: int = 1
) -> Iterator[np.ndarray]:
    """Walks through an epoch's order: yields int64 [B], from global batch ``start`` on.

    Args:
        index_N: the epoch's order, from :func:`order`, or any list of indices.
        global_batch: samples per step over all ranks.
        drop_last: leave out the last batch if it is not full.
        start: number of global batches that are behind already.
    """
    for b in range(start, batch_count(len(index_N), global_batch, drop_last)):
        yield rank_part(index_N[b * global_batch : (b + 1) * global_batch], rank, ranks)
