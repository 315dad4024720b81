"""The orders of a puzzle's tiles: how many, how far apart, and that no place knows some tiles better than others."""

from itertools import combinations
from math import factorial

import numpy as np
import pytest
from fasttrain.loaders.permutations import least_distance, permutations

ROWS = {  # grid, orders -> the smallest distance of any two
    (2, 4): 4,
    (2, 12): 3,
    (2, 24): 2,
    (3, 9): 9,
    (3, 72): 8,
    (3, 504): 7,
    (3, 1512): 6,
}


def distance(order_KT: np.ndarray) -> int:
    """By counting agreements: the product of one-hot codes."""
    count, places = order_KT.shape
    code_KT = np.eye(places, dtype=np.int64)[order_KT].reshape(count, -1)
    agreements = code_KT @ code_KT.T
    np.fill_diagonal(agreements, 0)
    return places - int(agreements.max())


@pytest.mark.parametrize(("grid", "count"), ROWS)
def test_orders_are_as_far_apart_as_the_table_says(grid, count):
    order_KT = permutations(grid, count)
    assert order_KT.shape == (count, grid**2) and order_KT.dtype == np.int64
    assert (np.sort(order_KT, axis=1) == np.arange(grid**2)).all()
    assert distance(order_KT) == least_distance(order_KT) == ROWS[grid, count]


@pytest.mark.parametrize(("grid", "count"), ROWS)
def test_sets_are_groups(grid, count):
    order_KT = permutations(grid, count)
    power_T = (grid**2) ** np.arange(grid**2)
    products = order_KT[:, order_KT[: min(count, 100)]]  # of every order after each of the first hundred
    assert set((products @ power_T).ravel().tolist()) == set((order_KT @ power_T).tolist())


@pytest.mark.parametrize(("grid", "count"), [row for row in ROWS if row != (3, 1512)])
def test_no_set_with_this_distance_is_larger(grid, count):
    """Two orders with distance d agree in n - d places at most, so any n - d + 1 places tell them apart. There are n! / (d - 1)!
    ways to fill these (Frankl and Deza's bound). Each occurs once."""
    order_KT, n, d = permutations(grid, count), grid**2, ROWS[grid, count]
    assert count == factorial(n) // factorial(d - 1)
    for places in combinations(range(n), n - d + 1):
        assert len(np.unique(order_KT[:, places], axis=0)) == count, places


@pytest.mark.parametrize("grid", [2, 3])
def test_any_count_is_at_least_as_far_apart_as_its_row(grid):
    rows = [(count, d) for (g, count), d in ROWS.items() if g == grid]
    counts = range(2, 25) if grid == 2 else (2, 8, 9, 10, 71, 72, 73, 100, 503, 505, 701, 1000, 1511)
    for count in counts:
        order_KT = permutations(grid, count)
        assert len(order_KT) == len(np.unique(order_KT, axis=0)) == count
        assert order_KT[0].tolist() == list(range(grid**2))
        wanted = next(d for most, d in rows if count <= most)
        assert distance(order_KT) >= wanted, count
        assert (permutations(grid, count) == order_KT).all() and not order_KT.flags.writeable


@pytest.mark.parametrize(("grid", "count"), ROWS)
def test_every_tile_comes_to_every_place_equally_often(grid, count):
    """After any number of orders to within one, after full rounds exactly."""
    code_KPT = np.eye(grid**2, dtype=np.int64)[permutations(grid, count)]
    often_KPT = code_KPT.cumsum(axis=0)
    spread_K = np.ptp(often_KPT.reshape(count, -1), axis=1)
    assert spread_K.max() == 1
    assert (spread_K[grid**2 - 1 :: grid**2] == 0).all()


@pytest.mark.parametrize(
    ("grid", "count", "message"),
    [
        (4, 10, r"^pretext\.grid: 4 is not 2 or 3$"),
        (3, 1513, r"^pretext\.permutations: 1513 is not between 2 and 1512, for a grid of 3 x 3$"),
        (2, 25, r"^pretext\.permutations: 25 is not between 2 and 24, for a grid of 2 x 2$"),
        (3, 1, r"^pretext\.permutations: 1 is not between 2 and 1512"),
    ],
)
def test_what_there_is_not_is_refused(grid, count, message):
    with pytest.raises(ValueError, match=message):
        permutations(grid, count)
