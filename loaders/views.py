"""Views: how a sample is shown, a pure function of (seed, epoch, index), for a whole batch at once.

A view is a box in the pixels of the stored image, and flips. The box is brought to the output size by
``loaders/resample.py``; parts of it outside the image are black. Nothing here depends on a worker, a rank, a batch or
on what was drawn before.

Shape suffixes: B batch, 4 = (top, left, height, width) in pixels of the stored image.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .philox import draw, integers, uniform

# purposes of random numbers; _SCALE + t for the t-th try of a random-resized crop; loaders/clips.py has 4
_PLACE, _FLIP, _CORNER, _SCALE = 1, 2, 3, 16
_TRIES = 10
_CORNER_SCALES = 2 ** (-np.arange(5) / 4)  # 1, 0.84, 0.71, 0.59, 0.5

Crop = Literal["pad", "random_resized", "corner", "centre"]
Flip = Literal["none", "horizontal", "both"]


@dataclass(frozen=True)
class View:
    """What a batch of samples looks like.

    Attributes:
        box_B4: int64, (top, left, height, width) in pixels of the stored image; may reach beyond it.
        flip_B2: bool, whether to mirror left-right and whether to mirror top-bottom, after the crop.
        number_B: int64, which view of its sample this is: the epoch, or ``epoch mod K`` with K views a sample.
    """

    box_B4: np.ndarray
    flip_B2: np.ndarray
    number_B: np.ndarray

    def __len__(self) -> int:
        return len(self.box_B4)

    def scaled(self, factor: float) -> "View":
        """The same view of the same images stored at ``factor`` times the size (box corners rounded to pixels)."""
        start_B2, end_B2 = self.box_B4[:, :2], self.box_B4[:, :2] + self.box_B4[:, 2:]
        start_B2, end_B2 = (np.floor(c * factor + 0.5).astype(np.int64) for c in (start_B2, end_B2))
        box_B4 = np.concatenate([start_B2, np.maximum(end_B2 - start_B2, 1)], axis=1)
        return View(box_B4, self.flip_B2, self.number_B)


@dataclass(frozen=True)
class ViewPlan:
    """Which views a recipe takes: the function ``view(seed, epoch, index)`` with everything but its arguments fixed.

    Attributes:
        crop: ``pad``: a window of the image's own size, shifted by up to ``pad`` pixels, the border black (the usual
            CIFAR augmentation). ``random_resized``: an area of ``min_area`` to 1 of the image with an aspect ratio of
            3/4 to 4/3 (Szegedy et al. 2015, as torchvision has it). ``corner``: a square in one of the corners or in the
            middle, its side 1, 0.84, 0.71, 0.59 or 0.5 of the shorter one (the multi-scale corner crop of Wang et al.
            2015, with the scales of Hara et al. 2018). ``centre``: the middle, the evaluation view.
        pad: shift in pixels of the stored image, for ``pad``.
        min_area: smallest share of the image's area, for ``random_resized``.
        centre_share: side of the square taken, as a share of the image's shorter side, for ``centre``.
        flip: mirror ``horizontal``-ly with probability 1/2, in ``both`` directions independently, or not at all.
        views: K > 0 cycles through K views a sample, view number = epoch mod K; 0 takes a new view every epoch.
        every: number the views that there are, as ``pad`` and ``centre`` have few of them: shifts and flips. The views
            shown stay those of ``views: 0``; their number is no longer the epoch but says which of :attr:`count` it is.
        only: with ``every``, the number of the one view to show of all samples; -1 for those of the epoch.
    """

    crop: Crop = "pad"
    pad: int = 4
    min_area: float = 0.08
    centre_share: float = 1.0
    flip: Flip = "horizontal"
    views: int = 0
    every: bool = False
    only: int = -1

    @property
    def count(self) -> int:
        """How many views a sample can be shown in; 0 where a new one is drawn every epoch."""
        if not self.every:
            return self.views
        return self._shifts**2 * {"none": 1, "horizontal": 2, "both": 4}[self.flip]

    @property
    def _shifts(self) -> int:
        return 2 * self.pad + 1 if self.crop == "pad" else 1

    def number(self, *, seed: int, epoch, index_B) -> np.ndarray:
        """The numbers of the views of samples ``index_B`` in ``epoch``: int64 [B].

        Raises:
            ValueError: ``every`` for a crop that has too many views to be numbered.
        """
        index_B = np.asarray(index_B, dtype=np.int64)
        epoch_B = np.broadcast_to(np.int64(epoch), index_B.shape)
        if not self.every:
            return epoch_B % self.views if self.views else epoch_B.copy()
        if self.crop in ("random_resized", "corner") or self.views:
            raise ValueError("only crop pad or centre, with views: 0, has views that can all be numbered")
        if self.only >= 0:
            return np.full(index_B.shape, self.only, dtype=np.int64)
        shift_B2, flip_B2 = _shifts(seed, epoch_B, index_B, self._shifts), flips(seed, epoch_B, index_B, self.flip)
        number_B = shift_B2[:, 0] * self._shifts + shift_B2[:, 1]
        for axis in range(("none", "horizontal", "both").index(self.flip)):
            number_B = number_B * 2 + flip_B2[:, axis]
        return number_B

    def __call__(self, *, seed: int, epoch, index_B, height_B, width_B) -> View:
        """The views of samples ``index_B`` in ``epoch`` (a number, or one per sample).

        ``height_B``, ``width_B``: sizes of the stored images in pixels (numbers, or one per sample).
        """
        return self.numbered(seed, self.number(seed=seed, epoch=epoch, index_B=index_B), index_B, height_B, width_B)

    def numbered(self, seed: int, number_B: np.ndarray, index_B, height_B, width_B) -> View:
        """The views of these numbers of samples ``index_B``."""
        index_B = np.asarray(index_B, dtype=np.int64)
        height_B, width_B = (np.broadcast_to(np.int64(a), index_B.shape) for a in (height_B, width_B))
        if self.every:
            return self._one_of_all(number_B, height_B, width_B)
        if self.crop == "pad":
            box_B4 = pad_crop(seed, number_B, index_B, height_B, width_B, self.pad)
        elif self.crop == "random_resized":
            box_B4 = random_resized_crop(seed, number_B, index_B, height_B, width_B, self.min_area)
        elif self.crop == "corner":
            box_B4 = corner_crop(seed, number_B, index_B, height_B, width_B)
        else:
            box_B4 = centre_crop(height_B, width_B, self.centre_share)
        return View(box_B4, flips(seed, number_B, index_B, self.flip), number_B)

    def _one_of_all(self, number_B: np.ndarray, height_B, width_B) -> View:
        """The views of these numbers, where there are few enough to number all of them."""
        rest_B, flip_B2 = number_B, np.zeros((len(number_B), 2), dtype=bool)
        for axis in reversed(range(("none", "horizontal", "both").index(self.flip))):
            rest_B, flip_B2[:, axis] = rest_B // 2, rest_B % 2
        if self.crop == "centre":
            return View(centre_crop(height_B, width_B, self.centre_share), flip_B2, number_B)
        top_B, left_B = rest_B // self._shifts - self.pad, rest_B % self._shifts - self.pad
        return View(np.stack([top_B, left_B, height_B, width_B], axis=1), flip_B2, number_B)


def evaluation(centre_share: float = 1.0) -> ViewPlan:
    """The one view that evaluation takes: the centre, not mirrored, the same in every epoch."""
    return ViewPlan(crop="centre", centre_share=centre_share, flip="none", views=1)


def pad_crop(seed: int, number_B, index_B, height_B, width_B, pad: int) -> np.ndarray:
    """Boxes of the image's own size, shifted by -pad .. pad pixels in each direction, each shift equally likely."""
    top_B, left_B = (_shifts(seed, number_B, index_B, 2 * pad + 1) - pad).T
    return np.stack([top_B, left_B, height_B, width_B], axis=1)


def _shifts(seed: int, number_B, index_B, count: int) -> np.ndarray:
    """int64 [B, 2] of 0 .. count - 1: down, right."""
    word_4B = draw(seed, number_B, index_B, _PLACE)
    return np.stack([integers(word_4B[i], count) for i in (0, 1)], axis=1)


def random_resized_crop(seed: int, number_B, index_B, height_B, width_B, min_area: float) -> np.ndarray:
    """Boxes of a uniform share of the area and a log-uniform aspect ratio in 3/4 .. 4/3.

    The first of ten tries that fits into the image is taken; where none does, the largest centred box within the
    aspect limits (torchvision's RandomResizedCrop does the same).
    """
    ratio_B = width_B / height_B
    fit_h_B = np.where(ratio_B < 3 / 4, np.round(width_B * 4 / 3), height_B).astype(np.int64)
    fit_w_B = np.where(ratio_B > 4 / 3, np.round(height_B * 4 / 3), width_B).astype(np.int64)
    fit_h_B, fit_w_B = np.minimum(fit_h_B, height_B), np.minimum(fit_w_B, width_B)
    box_B4 = np.stack([(height_B - fit_h_B) // 2, (width_B - fit_w_B) // 2, fit_h_B, fit_w_B], axis=1)
    todo = np.arange(len(index_B))
    for t in range(_TRIES):
        if not len(todo):
            break
        h, w = height_B[todo], width_B[todo]
        word_4B = draw(seed, number_B[todo], index_B[todo], _SCALE + t)
        area = h * w * (min_area + (1 - min_area) * uniform(word_4B[0]))
        aspect = np.exp((2 * uniform(word_4B[1]) - 1) * np.log(4 / 3))
        box_w, box_h = (np.round(np.sqrt(a)).astype(np.int64) for a in (area * aspect, area / aspect))
        fits = (box_w > 0) & (box_h > 0) & (box_w <= w) & (box_h <= h)
        top, left = (
            integers(word_4B[2], np.maximum(h - box_h, 0) + 1),
            integers(word_4B[3], np.maximum(w - box_w, 0) + 1),
        )
        box_B4[todo[fits]] = np.stack([top, left, box_h, box_w], axis=1)[fits]
        todo = todo[~fits]
    return box_B4


def corner_crop(seed: int, number_B, index_B, height_B, width_B) -> np.ndarray:
    """Square boxes of one of five scales, in the middle or in one of the corners, each equally likely."""
    word_4B = draw(seed, number_B, index_B, _CORNER)
    scale_B, place_B = _CORNER_SCALES[integers(word_4B[0], 5)], integers(word_4B[1], 5)
    side_B = np.maximum((np.minimum(height_B, width_B) * scale_B).astype(np.int64), 1)
    room_2B = np.stack([height_B - side_B, width_B - side_B])
    half_25 = np.array([[1, 0, 0, 2, 2], [1, 0, 2, 0, 2]])  # of the room that is left: middle, then the corners
    top_B, left_B = half_25[:, place_B] * room_2B // 2
    return np.stack([top_B, left_B, side_B, side_B], axis=1)


def centre_crop(height_B, width_B, share: float) -> np.ndarray:
    """Square boxes in the middle, their side ``share`` of the image's shorter side."""
    side_B = np.maximum(np.round(np.minimum(height_B, width_B) * share).astype(np.int64), 1)
    return np.stack([(height_B - side_B) // 2, (width_B - side_B) // 2, side_B, side_B], axis=1)


def flips(seed: int, number_B, index_B, flip: Flip) -> np.ndarray:
    """bool [B, 2]: mirror left-right, mirror top-bottom."""
    word_4B = draw(seed, number_B, index_B, _FLIP)
    flip_B2 = (word_4B[:2] >> np.uint32(31)).astype(bool).T.copy()
    flip_B2[:, 0] &= flip != "none"
    flip_B2[:, 1] &= flip == "both"
    return flip_B2
