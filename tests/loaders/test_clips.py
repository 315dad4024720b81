"""Views in time are pure functions, inside the video, and spread as they should be."""

import numpy as np
import pytest
from fasttrain.loaders import ClipPlan, evaluation
from hypothesis import given, settings
from hypothesis import strategies as st


def frames(plan: ClipPlan, number, index, count, seed: int = 0) -> np.ndarray:
    number, index, count = np.broadcast_arrays(*map(np.atleast_1d, (number, index, count)))
    return plan(seed=seed, number_B=number, index_B=index, count_B=count)


@given(length=st.integers(1, 20), stride=st.integers(1, 5), clips=st.integers(0, 4), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_frames_are_the_videos_own_and_alone_decide(length, stride, clips, seed):
    plan, count_B = ClipPlan(length, stride, clips), np.arange(1, 61)
    number_B = np.arange(60) % max(clips, 1) if clips else np.arange(60)
    whole_BT = frames(plan, number_B, np.arange(60), count_B, seed)
    assert (whole_BT >= 0).all() and (whole_BT < count_B[:, None]).all()
    fits = count_B >= plan.span
    assert (np.diff(whole_BT[fits], axis=1) == stride).all()  # no frame twice where the video is long enough
    for b in (0, 17, 59):
        assert (frames(plan, number_B[b : b + 1], b, count_B[b], seed)[0] == whole_BT[b]).all()


def test_the_centre_frame_alone_is_that_of_the_clip():
    number_B, count_B = np.arange(40), np.arange(1, 41)
    for length in (1, 2, 5, 8):
        whole, alone = ClipPlan(length, 2), ClipPlan(length, 2, only_centre=True)
        centre_B = frames(whole, number_B, 3, count_B)[:, whole.centre]
        assert (frames(alone, number_B, 3, count_B) == centre_B[:, None]).all() and alone.centre == 0


def test_a_short_video_is_repeated():
    assert frames(ClipPlan(7), 3, 5, 3)[0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert frames(ClipPlan(4, 2), 3, 5, 3)[0].tolist() == [0, 2, 1, 0]


def test_every_beginning_is_equally_likely():
    first_N = frames(ClipPlan(16, 2), np.arange(50_000), 7, 50)[:, 0]
    counts = np.bincount(first_N)
    assert len(counts) == 20  # 50 frames, of which a clip spans 31
    assert (np.abs(counts - 2500) < 250).all()
    other = frames(ClipPlan(16, 2), np.arange(50_000), 8, 50)[:, 0]
    assert abs(np.corrcoef(first_N, other)[0, 1]) < 0.02


def test_evaluation_clips_are_spread_from_the_first_frame_to_the_last():
    assert frames(ClipPlan(16, 1, 3), np.arange(3), 0, 50)[:, 0].tolist() == [0, 17, 34]
    assert frames(ClipPlan(16, 1, 1), 0, 0, 50)[0, 0] == 17
    assert frames(ClipPlan(16, 1, 3), np.arange(3), 0, 10)[:, 0].tolist() == [0, 0, 0]


def test_three_crops_lie_along_the_longer_side():
    plan, number_B = ClipPlan(8, 1, 2, 3), np.arange(6)
    for (height, width), axis in (((20, 30), 1), ((30, 20), 0)):
        view = evaluation().numbered(0, number_B, np.zeros(6), height, width)
        box_B4 = plan.placed(view, height, width).box_B4
        assert (box_B4[:, 2:] == 20).all() and (box_B4[:, 1 - axis] == 0).all()
        assert box_B4[:, axis].tolist() == [0, 5, 10, 0, 5, 10]
    first_B = frames(plan, number_B, 0, 50)[:, 0]
    assert first_B.tolist() == [0, 0, 0, 42, 42, 42]


@pytest.mark.parametrize("wrong", [(0,), (8, 0), (8, 1, -1), (8, 1, 3, 2), (8, 1, 0, 3)])
def test_a_plan_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="data\\."):
        ClipPlan(*wrong)
