"""The order of an epoch: every index once, the same for every batch size and rank count."""

import numpy as np
from fasttrain.loaders.order import batch_count, batches, order, rank_part
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
        sizes = [len(p[b]) for p in parts]
        assert max(sizes) - min(sizes) <= 1
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
    assert [list(rank_part(np.arange(3), r, 5)) for r in range(5)] == [[], [0], [], [1], [2]]
