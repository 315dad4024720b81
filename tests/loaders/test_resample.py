"""Cutting views: exact, independent of batching, close to Pillow."""

import numpy as np
import pytest
import torch
from fasttrain.loaders.crop import centre_square
from fasttrain.loaders.resample import _places, _places_there, cut, cut_from_store
from fasttrain.loaders.views import View, ViewPlan
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


def photographs(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Images with edges and texture: uint8 [N, H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, height // 8 + 2, width // 8 + 2, 3))
    fine = coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]
    return torch.from_numpy(np.clip(fine + rng.normal(0, 12, fine.shape), 0, 255).astype(np.uint8))


def view_of(boxes, flips=None) -> View:
    flips = np.zeros((len(boxes), 2), dtype=bool) if flips is None else np.array(flips)
    return View(np.array(boxes), flips, np.zeros(len(boxes), dtype=np.int64))


def test_the_whole_image_comes_back():
    image = photographs(2, 24, 24)
    out = cut(image, view_of([[0, 0, 24, 24]] * 2), 24)
    assert (out.permute(0, 2, 3, 1) == image).all()
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_shift_flip_and_black_border():
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3, 1).expand(1, 3, 3, 3).contiguous()
    shifted = cut(image, view_of([[-1, 1, 3, 3]]), 3)[0, 0]
    assert shifted.tolist() == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]
    assert cut(image, view_of([[0, 0, 3, 3]], [[True, False]]), 3)[0, 0].tolist() == [[3, 2, 1], [6, 5, 4], [9, 8, 7]]
    assert cut(image, view_of([[0, 0, 3, 3]], [[False, True]]), 3)[0, 0].tolist() == [[7, 8, 9], [4, 5, 6], [1, 2, 3]]


def test_indexing_and_weights_give_the_same_bytes():
    """A box of the output's own size is cut by indexing; forced through the resize it is the same."""
    image = photographs(6, 20, 20)
    plan = ViewPlan(crop="pad", pad=5, flip="both")
    view = plan(seed=3, epoch=0, index_B=np.arange(6), height_B=20, width_B=20)
    mixed = View(
        np.concatenate([view.box_B4, [[0, 0, 10, 10]]]),
        np.concatenate([view.flip_B2, [[False, False]]]),
        np.concatenate([view.number_B, [0]]),
    )
    together = cut(torch.cat([image, image[:1]]), mixed, 20)  # one box that is resized sends all through the weights
    assert (together[:6] == cut(image, view, 20)).all()


@given(
    size=st.integers(4, 40),
    boxes=st.lists(
        st.tuples(st.integers(-5, 30), st.integers(-5, 40), st.integers(1, 40), st.integers(1, 50)),
        min_size=2,
        max_size=5,
    ),
    flip=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_batch_is_its_images(size, boxes, flip):
    image = photographs(len(boxes), 36, 45)
    view = view_of(boxes, [[flip, not flip]] * len(boxes))
    together = cut(image, view, size)
    for b in range(len(boxes)):
        alone = cut(image[b : b + 1], view_of(boxes[b : b + 1], [[flip, not flip]]), size)
        assert (together[b] == alone[0]).all()


@given(
    height=st.integers(20, 120),
    width=st.integers(20, 120),
    size=st.sampled_from([8, 24, 32, 64]),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_within_two_levels_of_pillow(height, width, size, data):
    """Crop, then Pillow's own bilinear (antialiased) resize."""
    image = photographs(1, height, width)
    top, left = data.draw(st.integers(0, height - 10)), data.draw(st.integers(0, width - 10))
    box_h, box_w = data.draw(st.integers(5, height - top)), data.draw(st.integers(5, width - left))
    ours = cut(image, view_of([[top, left, box_h, box_w]]), size)[0].permute(1, 2, 0).numpy().astype(int)
    crop = Image.fromarray(image[0, top : top + box_h, left : left + box_w].numpy())
    theirs = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(ours - theirs).max() <= 2
    assert np.abs(ours - theirs).mean() < 0.3


def test_an_even_image_stays_even():
    """Weights sum to exactly 1 everywhere: no seam, no change of brightness."""
    image = torch.full((1, 61, 47, 3), 201, dtype=torch.uint8)
    for size in (7, 24, 100):
        assert (cut(image, view_of([[3, 2, 55, 40]]), size) == 201).all()


def test_a_store_is_cut_like_a_batch():
    store = photographs(9, 16, 16)
    index = np.array([8, 0, 3, 3])
    for size, crop in ((16, "pad"), (10, "random_resized")):
        view = ViewPlan(crop=crop)(seed=1, epoch=2, index_B=index, height_B=16, width_B=16)
        assert (cut_from_store(store, index, view, size) == cut(store[index], view, size)).all()


@pytest.mark.parametrize("flip", ["none", "horizontal", "both"])
def test_places_are_computed_alike_on_a_device(flip):
    """What a GPU computes of a view's five numbers is what the host does."""
    store, index = photographs(9, 20, 16), np.array([8, 0, 3, 3, 1])
    view = ViewPlan(crop="pad", pad=5, flip=flip)(seed=1, epoch=2, index_B=index, height_B=20, width_B=16)
    for a, b in zip(_places(store, index, view, 12), _places_there(store, index, view, 12), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_centre_square():
    image = photographs(1, 30, 50)[0].numpy()
    assert (centre_square(image, 30) == image[:, 10:40]).all()
    view = View(np.array([[0, 10, 30, 30]]), np.zeros((1, 2), dtype=bool), np.zeros(1, dtype=np.int64))
    expected = cut(torch.from_numpy(image)[None], view, 12)[0].permute(1, 2, 0)
    assert (centre_square(image, 12) == expected.numpy()).all()


@pytest.mark.gpu
def test_a_gpu_cuts_the_same_bytes():
    image = photographs(32, 50, 60)
    view = ViewPlan(crop="random_resized", flip="both")(seed=0, epoch=0, index_B=np.arange(32), height_B=50, width_B=60)
    torch.set_float32_matmul_precision("high")  # TF32: still exact
    try:
        assert (cut(image.cuda(), view, 24).cpu() == cut(image, view, 24)).all()
    finally:
        torch.set_float32_matmul_precision("highest")
