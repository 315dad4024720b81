"""The order of an epoch: every index once, the same for every batch size and rank count."""

import numpy as np
import pytest
from fasttrain.loaders.order import balanced_order, batch_count, batches, order, part_sizes, rank_part
from hypothesis import given, settings
from hypothesis import strategies as st

SEED = st.integers(0, 2**64 - 1)


@given(seed=SEED, epoch=st.integers(0, 10_000), n=st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_is_a_permutation_and_a_function(seed, epoch, n):
    first = order(seed, epoch, n)
    assert (np.sort(first) == np.arange(n)).all()
    assert (first == order(seed, epoch, n)).all()


@given(
    seed=SEED,
    n=st.integers(1, 2000),
    batch=st.integers(1, 300),
    ranks=st.integers(1, 9),
    drop_last=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_ranks_cut_the_same_global_batches(seed, n, batch, ranks, drop_last):
    epoch = order(seed, 1, n)
    whole = list(batches(epoch, global_batch=batch, drop_last=drop_last))
    parts = [list(batches(epoch, global_batch=batch, drop_last=drop_last, rank=r, ranks=ranks)) for r in range(ranks)]
    assert len(whole) == batch_count(n, batch, drop_last)
    for b, global_batch in enumerate(whole):
        assert (np.concatenate([p[b] for p in parts]) == global_batch).all()
        sizes = [len(p[b]) for p in parts if len(p[b])]
        assert max(sizes) - min(sizes) <= 1 and (min(sizes) > 1 or len(global_batch) == 1)
    served = np.concatenate([*whole, np.empty(0, np.int64)])
    assert (served == epoch[: len(served)]).all()
    assert len(served) == (n // batch * batch if drop_last else n)


@given(n=st.integers(1, 500), batch=st.integers(1, 60), start=st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_going_on_is_the_rest(n, batch, start):
    epoch = order(3, 2, n)
    whole = list(batches(epoch, global_batch=batch))
    rest = list(batches(epoch, global_batch=batch, start=start))
    assert [list(b) for b in rest] == [list(b) for b in whole[start:]]


def test_epochs_and_seeds_differ():
    assert (order(0, 0, 1000) != order(0, 1, 1000)).any()
    assert (order(0, 0, 1000) != order(1, 0, 1000)).any()


def test_every_place_is_equally_likely():
    n, epochs = 8, 4000
    places = np.stack([np.argsort(order(5, e, n)) for e in range(epochs)])
    for index in range(n):
        counts = np.bincount(places[:, index], minlength=n)
        chi2 = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
        assert chi2 < 29.9  # 99.99 % of chi-squared with 7 degrees of freedom


def test_rank_part_of_a_small_batch():
    """No part of one sample, whose batch norm would have no variance."""
    assert [list(rank_part(np.arange(3), r, 5)) for r in range(5)] == [[0, 1, 2], [], [], [], []]
    assert [list(rank_part(np.arange(5), r, 3)) for r in range(3)] == [[0, 1, 2], [3, 4], []]
    assert [list(rank_part(np.arange(1), r, 2)) for r in range(2)] == [[0], []]


@given(batch=st.integers(1, 300), ranks=st.integers(1, 20))
def test_no_part_of_a_smaller_batch_is_larger(batch, ranks):
    """Memory for a rank's part of a full batch is enough for all; parts of two or three samples are small in any case."""
    parts = [[len(rank_part(np.arange(g), r, ranks)) for g in range(batch + 1)] for r in range(ranks)]
    assert all(max(p) <= max(p[-1], 3) for p in parts)


@given(n=st.integers(1, 300), each=st.integers(1, 5), ranks=st.integers(1, 9), unit=st.integers(1, 3))
def test_parts_are_the_same_for_any_number_of_ranks(n, each, ranks, unit):
    """Ranks share out parts that do not know of them, whole units in order."""
    sizes = part_sizes(n, each * ranks, unit)
    assert sum(sizes) == n and len(sizes) == each * ranks
    start, shares = 0, [rank_part(np.arange(n), r, ranks, unit, each * ranks) for r in range(ranks)]
    for rank, share in enumerate(shares):
        mine = sizes[rank * each : (rank + 1) * each]
        assert list(share) == list(range(start, start + sum(mine)))
        start += len(share)
    assert all(size % unit == 0 for size in sizes[: sum(s > 0 for s in sizes) - 1])


@given(
    seed=SEED,
    epoch=st.integers(0, 1000),
    target_N=st.lists(st.sampled_from([0, 1, 1, 1, 1, 1, 3, 70]), min_size=1, max_size=300).map(np.array),
)
def test_balanced(seed, epoch, target_N):
    """Every class equally often, and each of its members, to within one; an epoch as long as it was; a function."""
    chosen = balanced_order(seed, epoch, target_N)
    assert len(chosen) == len(target_N) and chosen.dtype == np.int64
    assert (chosen == balanced_order(seed, epoch, target_N)).all()
    labels = np.unique(target_N)
    counts = [(target_N[chosen] == label).sum() for label in labels]
    assert max(counts) - min(counts) <= 1
    for label in labels:
        times = [(chosen == member).sum() for member in np.flatnonzero(target_N == label)]
        assert max(times) - min(times) <= 1


def test_balanced_epochs_differ_and_use_all_members_alike():
    target_N = np.array([0] * 90 + [1] * 7 + [2] * 3)
    first, second = (balanced_order(5, e, target_N) for e in (0, 1))
    assert (first != second).any() and (balanced_order(6, 0, target_N) != first).any()
    times = sum(np.bincount(balanced_order(5, e, target_N), minlength=100) for e in range(300))
    for members, draws in ((range(90), 10_000 / 90), (range(90, 97), 10_000 / 7), (range(97, 100), 10_000 / 3)):
        assert np.abs(times[list(members)] / draws - 1).max() < (0.35 if draws < 200 else 0.02)
    halves = [np.bincount(target_N[h], minlength=3) for h in (first[:50], first[50:])]
    assert np.abs(halves[0] - halves[1]).max() < 20  # classes are mixed


def test_only_classes_are_balanced():
    with pytest.raises(ValueError, match=r"^data\.balance: a multi-label data set cannot be balanced"):
        balanced_order(0, 0, np.zeros((4, 2), dtype=np.float32))
