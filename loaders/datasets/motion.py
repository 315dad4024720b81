"""Motion: a small made-up data set of clips that needs no files, in which only the motion tells the class.

Shape suffixes: N clips, T frames, H rows, W columns, P pixels of the plane's side.
"""

import hashlib
from collections.abc import Iterator
from functools import cache

import numpy as np

from ..philox import draw, integers, uniform
from ..video.base import Clips
from .base import Dataset, train_val_test

CLASSES = ("left", "right", "up", "down", "clockwise", "anticlockwise")
CLIPS, FRAMES, SIDE = 960, 24, 40
_TEST = 240  # clips at the end
_PLANE = 512  # pixels, a power of two; the texture repeats after these
_START, _COLOUR, _NOISE = 0, 1, 2  # purposes of random numbers
_SPEED = (0.6, 1.4)  # pixels a frame
_TURN = (0.04, 0.09)  # radians a frame: the mean pixel, 15 from the centre, moves at the same speed


class MotionClips(Clips):
    """Windows onto a random texture that move, or turn about their centres: frames are made when they are asked for.

    A frame is the texture seen through a window, at a place that is uniform over the whole (periodic) texture and at an
    angle that is uniform over the whole circle. Both still are after any shift and any turn: at every number, frames of all
    classes have one and the same distribution, and a still frame tells nothing of the class.
    """

    def __init__(self) -> None:
        index_N = np.arange(CLIPS)
        self.shape_N3 = np.tile(np.array([FRAMES, SIDE, SIDE], dtype=np.int64), (CLIPS, 1))
        self.targets_N = index_N % len(CLASSES)
        x_N, y_N, angle_N, speed_N = (uniform(w) for w in draw(0, 0, index_N, _START))
        self._centre_N2 = np.stack([x_N, y_N], axis=1) * _PLANE
        self._angle_N = angle_N * 2 * np.pi
        self._speed_N = _SPEED[0] + speed_N * (_SPEED[1] - _SPEED[0])
        self._turn_N = _TURN[0] + speed_N * (_TURN[1] - _TURN[0])
        self._channel_N6 = np.concatenate([integers(draw(0, k, index_N, _COLOUR)[:3], _PLANE) for k in range(2)]).T

    def name(self, index: int) -> str:
        return f"motion/{index} ({CLASSES[self.targets_N[index]]})"

    def why(self, index: int) -> str:
        return ""

    def frames(self, index: int, frame_T: np.ndarray) -> np.ndarray:
        frame_T = np.asarray(frame_T)
        if len(frame_T) and not 0 <= frame_T.min() <= frame_T.max() < FRAMES:
            raise ValueError(f"{self.name(index)} has no frame {frame_T.min()} .. {frame_T.max()}, but {FRAMES}")
        label, time_T = self.targets_N[index], frame_T.astype(np.float32)
        # the texture moves to the right where the window moves to the left; rows grow downwards
        way_x, way_y, way_turn = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, -1), (0, 0, 1))[label]
        shift_T = time_T * self._speed_N[index]
        angle_T = self._angle_N[index] + way_turn * self._turn_N[index] * time_T
        cos_T11, sin_T11 = (f(angle_T).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
        middle = (SIDE - 1) / 2
        x_T1W = (np.arange(SIDE, dtype=np.float32) - middle + way_x * shift_T[:, None])[:, None, :]
        y_TH1 = (np.arange(SIDE, dtype=np.float32) - middle + way_y * shift_T[:, None])[:, :, None]
        centre_x, centre_y = self._centre_N2[index].astype(np.float32)
        x_THW = np.rint(cos_T11 * x_T1W - sin_T11 * y_TH1 + centre_x).astype(np.int32)
        y_THW = np.rint(sin_T11 * x_T1W + cos_T11 * y_TH1 + centre_y).astype(np.int32)
        out_THWC = np.empty((len(frame_T), SIDE, SIDE, 3), dtype=np.uint8)
        texture = _plane().reshape(-1)
        for c in range(3):  # each colour shows another place of the texture
            right, below = self._channel_N6[index, c], self._channel_N6[index, c + 3]
            at_THW = ((y_THW + below) & (_PLANE - 1)) * _PLANE + ((x_THW + right) & (_PLANE - 1))
            out_THWC[..., c] = texture[at_THW]
        return out_THWC

    def every(self, index: int) -> Iterator[np.ndarray]:
        yield from self.frames(index, np.arange(FRAMES))

    def fingerprint(self, samples: int) -> str:
        about = (CLASSES, CLIPS, FRAMES, SIDE, _PLANE, _SPEED, _TURN, samples)
        return hashlib.sha256(repr(about).encode()).hexdigest()


def motion(*, val_share: float) -> Dataset:
    """960 clips of 24 frames of 40 x 40 in six classes: a texture moves left, right, up or down, or turns either way.

    The last 240 are for the test, ``val_share`` of the others validates. A mirrored clip is of another class: ``data.flip``
    has to be none.
    """
    read = MotionClips()
    splits = train_val_test(read.targets_N, np.arange(CLIPS - _TEST), np.arange(CLIPS - _TEST, CLIPS), val_share)
    return Dataset("motion", CLASSES, read.targets_N, read, splits, "made up", read.fingerprint(CLIPS))


@cache
def _plane() -> np.ndarray:
    """The texture: uint8 [P, P], periodic noise whose blobs are about 5 pixels wide."""
    noise_PP = uniform(draw(0, 0, np.arange(_PLANE * _PLANE), _NOISE)[0]).reshape(_PLANE, _PLANE)
    for axis in (0, 1):
        for _ in range(2):  # a box of 5, twice: a triangle
            noise_PP = np.sum([np.roll(noise_PP, k, axis) for k in range(-2, 3)], axis=0)
    spread_PP = (noise_PP - noise_PP.mean()) / noise_PP.std()
    return np.clip(127.5 + 55 * spread_PP, 0, 255).astype(np.uint8)
