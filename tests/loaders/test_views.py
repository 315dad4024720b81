"""Views are pure functions of (seed, epoch, index), inside their bounds, and uniform where they should be."""

import itertools

import numpy as np
import pytest
from fasttrain.loaders.views import ViewPlan, centre_crop, evaluation
from hypothesis import given, settings
from hypothesis import strategies as st

PLANS = [
    ViewPlan(crop="pad", pad=4, flip="horizontal"),
    ViewPlan(crop="random_resized", flip="both"),
    ViewPlan(crop="random_resized", min_area=0.5, views=3),
    ViewPlan(crop="corner"),
    ViewPlan(crop="centre", centre_share=0.875, flip="none", views=1),
]


@pytest.mark.parametrize("plan", PLANS)
@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 64), max_size=5),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=30, deadline=None)
def test_a_view_depends_on_nothing_else(plan, seed, epoch, cuts, shuffle):
    """However the samples are dealt to workers, ranks and batches, in whatever order, each gets its view."""
    index = np.arange(64) * 7
    height, width = 20 + index % 50, 20 + index % 31
    whole = plan(seed=seed, epoch=epoch, index_B=index, height_B=height, width_B=width)
    order = list(range(64))
    shuffle.shuffle(order)
    bounds = [0, *sorted(cuts), 64]
    for a, b in itertools.pairwise(bounds):
        part = np.array(order[a:b], dtype=np.int64)
        view = plan(seed=seed, epoch=epoch, index_B=index[part], height_B=height[part], width_B=width[part])
        assert (view.box_B4 == whole.box_B4[part]).all()
        assert (view.flip_B2 == whole.flip_B2[part]).all()
        assert (view.number_B == whole.number_B[part]).all()


@pytest.mark.parametrize("plan", PLANS)
@given(seed=st.integers(0, 2**32), height=st.integers(1, 700), width=st.integers(1, 700))
@settings(max_examples=40, deadline=None)
def test_boxes_are_in_their_bounds(plan, seed, height, width):
    view = plan(seed=seed, epoch=3, index_B=np.arange(50), height_B=height, width_B=width)
    top, left, box_h, box_w = view.box_B4.T
    assert (box_h >= 1).all() and (box_w >= 1).all()
    if plan.crop == "pad":
        assert (np.abs(top) <= plan.pad).all() and (np.abs(left) <= plan.pad).all()
        assert (box_h == height).all() and (box_w == width).all()
    else:
        assert (top >= 0).all() and (left >= 0).all()
        assert (top + box_h <= height).all() and (left + box_w <= width).all()


@given(views=st.integers(1, 6), epoch=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_views_cycle(views, epoch):
    plan = ViewPlan(crop="random_resized", views=views)
    index = np.arange(20)
    now = plan(seed=1, epoch=epoch, index_B=index, height_B=50, width_B=60)
    again = plan(seed=1, epoch=epoch + views, index_B=index, height_B=50, width_B=60)
    assert (now.box_B4 == again.box_B4).all() and (now.flip_B2 == again.flip_B2).all()
    assert (now.number_B == epoch % views).all()


def test_one_epoch_number_a_sample():
    plan = ViewPlan(crop="pad")
    epochs = np.array([0, 5, 9])
    together = plan(seed=0, epoch=epochs, index_B=np.array([4, 4, 4]), height_B=32, width_B=32)
    for i, epoch in enumerate(epochs):
        alone = plan(seed=0, epoch=int(epoch), index_B=np.array([4]), height_B=32, width_B=32)
        assert (together.box_B4[i] == alone.box_B4[0]).all()


def test_new_views_differ_from_epoch_to_epoch():
    plan = ViewPlan(crop="pad")
    boxes = [plan(seed=0, epoch=e, index_B=np.arange(200), height_B=32, width_B=32).box_B4 for e in range(2)]
    assert (boxes[0] != boxes[1]).any(axis=1).mean() > 0.9


def test_shifts_and_flips_are_uniform_and_independent():
    n = 200_000
    view = ViewPlan(crop="pad", pad=2, flip="both")(seed=11, epoch=0, index_B=np.arange(n), height_B=32, width_B=32)
    cell = ((view.box_B4[:, 0] + 2) * 5 + view.box_B4[:, 1] + 2) * 4 + view.flip_B2 @ [2, 1]
    counts = np.bincount(cell, minlength=100)
    chi2 = ((counts - n / 100) ** 2 / (n / 100)).sum()
    assert len(counts) == 100
    assert chi2 < 148.2  # 99.9 % of chi-squared with 99 degrees of freedom


def test_random_resized_crop_is_uniform_in_area():
    n = 50_000
    view = ViewPlan(crop="random_resized", min_area=0.08)(
        seed=2, epoch=0, index_B=np.arange(n), height_B=1000, width_B=1000
    )
    box_h, box_w = view.box_B4[:, 2], view.box_B4[:, 3]
    aspect = box_w / box_h
    assert aspect.min() > 0.74 and aspect.max() < 1.35
    # of a square image every area up to 3/4 fits with every aspect ratio: uniform below that
    share = box_h * box_w / 1e6
    below = share[share < 0.75]
    counts, _ = np.histogram(below, bins=20, range=(0.08, 0.75))
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 43.8  # 99.9 %, 19 degrees of freedom
    assert abs(np.log(aspect[share < 0.75]).mean()) < 0.005


def test_an_image_of_extreme_shape_gets_the_largest_centred_box():
    box = ViewPlan(crop="random_resized", min_area=1.0)(seed=0, epoch=0, index_B=[0], height_B=10, width_B=1000).box_B4
    assert box.tolist() == [[0, 493, 10, 13]]


def test_centre_crop_matches_resize_and_crop_of_imagenet():
    assert centre_crop(np.array([375]), np.array([500]), 0.875).tolist() == [[23, 86, 328, 328]]
    assert evaluation()(seed=0, epoch=9, index_B=[3], height_B=40, width_B=40).box_B4.tolist() == [[0, 0, 40, 40]]


def test_scaling_a_view_keeps_its_corners():
    view = ViewPlan(crop="pad", pad=3)(seed=0, epoch=0, index_B=np.arange(30), height_B=24, width_B=24)
    large = view.scaled(128 / 24)
    assert (large.box_B4[:, 2:] == 128).all()
    assert np.abs(large.box_B4[:, :2] - view.box_B4[:, :2] * 128 / 24).max() <= 0.5


def test_corner_crops_have_five_scales_at_five_places():
    """Each scale at each place equally often; a square as high as the image has only three of them."""
    box_B4 = ViewPlan(crop="corner").numbered(0, np.arange(20_000), np.zeros(20_000), 100, 160).box_B4
    ways, counts = np.unique(box_B4, axis=0, return_counts=True)
    assert (ways[:, 2] == ways[:, 3]).all() and set(ways[:, 2]) == {100, 84, 70, 59, 50}
    for side in (100, 84, 70, 59, 50):
        low, right = 100 - side, 160 - side
        places = {(y, x) for y in (0, low) for x in (0, right)} | {(low // 2, right // 2)}
        its = ways[:, 2] == side
        assert {tuple(w[:2]) for w in ways[its].tolist()} == places
        each = counts[its] if side < 100 else counts[its] / np.array([2, 1, 2])
        assert (np.abs(each - 800) < 120).all()
