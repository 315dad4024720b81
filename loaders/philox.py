"""Philox4x32-10: random numbers as a pure function of a counter and a key, for a whole batch at once.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The tests hold it against the known
answers that its authors publish. Numpy's own Philox is another variant (4x64) and cannot be asked for the numbers of
many counters in one call.
"""

import numpy as np
from numba import njit

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter_4: tuple, key_2: tuple[int, int]) -> np.ndarray:
    """Four random 32-bit words for every counter.

    Args:
        counter_4: four numbers or integer arrays that broadcast to one shape [B], each below 2**32.
        key_2: two numbers below 2**32.

    Returns:
        uint32 [4, B].
    """
    counters = np.stack(np.broadcast_arrays(*(np.asarray(c).astype(np.uint64) for c in counter_4)))
    flat_4N, word_4N = counters.reshape(4, -1), np.empty((4, counters[0].size), dtype=np.uint32)
    _rounds(flat_4N, np.uint64(key_2[0]), np.uint64(key_2[1]), word_4N)
    return word_4N.reshape(counters.shape)


@njit(cache=True, nogil=True)
def _rounds(counter_4N, key0, key1, word_4N):
    """Ten rounds for each column."""
    for n in range(counter_4N.shape[1]):
        c0, c1, c2, c3 = counter_4N[0, n], counter_4N[1, n], counter_4N[2, n], counter_4N[3, n]
        k0, k1 = key0, key1
        for _ in range(10):
            product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
            c0, c1 = (product1 >> _SHIFT) ^ c1 ^ k0, product1 & _LOW
            c2, c3 = (product0 >> _SHIFT) ^ c3 ^ k1, product0 & _LOW
            k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
        word_4N[0, n], word_4N[1, n], word_4N[2, n], word_4N[3, n] = c0, c1, c2, c3


def draw(seed: int, epoch, index_B, purpose: int) -> np.ndarray:
    """Four random words per sample, of (seed, epoch, index) and of what they are for, and of nothing else.

    Args:
        seed: any integer from 0 to 2**64 - 1.
        epoch: one number, or one per sample.
        index_B: the samples' indices in their data set, below 2**64.
        purpose: numbers for different purposes (crop, flip, order, ...) are independent.

    Returns:
        uint32 [4, B].
    """
    index_B = np.asarray(index_B).astype(np.uint64)
    counter = (index_B & _LOW, index_B >> _SHIFT, np.asarray(epoch).astype(np.uint64) & _LOW, np.uint64(purpose))
    return philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))


def uniform(word_B: np.ndarray) -> np.ndarray:
    """float64 [B] in [0, 1) from uint32 [B]."""
    return word_B.astype(np.float64) * 2.0**-32


def integers(word_B: np.ndarray, below) -> np.ndarray:
    """int64 [B] in [0, below) from uint32 [B]; ``below`` is a number or int64 [B].

    Multiply-and-shift; the bias is at most ``below / 2**32``.
    """
    return ((word_B.astype(np.uint64) * np.asarray(below).astype(np.uint64)) >> _SHIFT).astype(np.int64)
