"""The random numbers are Philox4x32-10, bit for bit, and are used as pure functions."""

import numpy as np
import pytest
from fasttrain.loaders.philox import draw, integers, philox, uniform

# known answers that the authors publish with Random123 (kat_vectors, "philox4x32 10")
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert tuple(int(w) for w in philox(counter, key).reshape(4)) == answer


def test_a_batch_is_its_samples():
    index = np.array([0, 5, 2**31, 2**33 + 1, 1_281_166])
    together = draw(7, 3, index, 2)
    alone = np.concatenate([draw(7, 3, index[i : i + 1], 2) for i in range(len(index))], axis=1)
    assert (together == alone).all()


def test_every_argument_matters():
    base = draw(7, 3, np.arange(4), 2)
    others = [
        draw(8, 3, np.arange(4), 2),
        draw(7, 4, np.arange(4), 2),
        draw(7, 3, np.arange(4), 1),
        draw(7 + 2**32, 3, np.arange(4), 2),
    ]
    assert all((base != other).any() for other in others)
    assert (draw(7, 3, np.arange(4) + 2**32, 2) != base).any()


def test_uniform_and_integers_are_in_range_and_even():
    word = draw(1, 0, np.arange(100_000), 9)[0]
    share = uniform(word)
    assert share.min() >= 0 and share.max() < 1
    assert abs(share.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / 100_000**0.5
    counts = np.bincount(integers(word, 9), minlength=9)
    assert len(counts) == 9
    chi2 = ((counts - 100_000 / 9) ** 2 / (100_000 / 9)).sum()
    assert chi2 < 26.1  # 99.9 % of chi-squared with 8 degrees of freedom
