"""A small made-up data set that needs no files: for tests and for a first look at a machine."""

from functools import cache

import numpy as np

from ..philox import draw, uniform
from .base import Dataset, Pixels, train_val_test


@cache
def _images() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, H, W, 3] and class indices [N]."""
    n, side = 240, 40
    targets_N = np.arange(n, dtype=np.int64) % 3
    y, x = np.mgrid[:side, :side]
    angle_N = np.array([0.0, 0.5, 0.25])[targets_N] * np.pi
    phase_N, contrast_N = (uniform(w) for w in draw(0, 0, np.arange(n), 0)[:2])
    along = x[None] * np.sin(angle_N)[:, None, None] + y[None] * np.cos(angle_N)[:, None, None]
    wave = np.sin(0.9 * along + 2 * np.pi * phase_N[:, None, None]) * (0.3 + 0.7 * contrast_N[:, None, None])
    noise = uniform(draw(0, 1, np.arange(n * side * side * 3), 0)[0]).reshape(n, side, side, 3) - 0.5
    return np.clip(127 + 60 * wave[..., None] + 160 * noise, 0, 255).astype(np.uint8), targets_N


def toy(*, val_share: float) -> Dataset:
    """240 images of 40 x 40 in three classes (stripes that lie, stand or slant, in noise); the last 80 are for the test."""
    image_NHWC, targets_N = _images()
    splits = train_val_test(targets_N, np.arange(160), np.arange(160, 240), val_share)
    return Dataset("toy", ("lying", "standing", "slanting"), targets_N, Pixels(image_NHWC), splits, "made up")
