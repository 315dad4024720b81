"""Views in time: which frames of a video a clip shows, a pure function of (seed, epoch, index), for a whole batch at once.

A training clip begins at a random frame; evaluation shows every video as several clips, evenly spread, and each of them
perhaps as several crops. A video shorter than a clip is repeated from its beginning.

Shape suffixes: B batch, T frames of a clip, 4 = (top, left, height, width) in pixels of the stored frames.
"""

from dataclasses import dataclass, replace

import numpy as np

from .philox import draw, integers
from .views import View

_TIME = 4  # the purpose of these random numbers; loaders/views.py has the others
CROPS = (1, 3)


@dataclass(frozen=True)
class ClipPlan:
    """Which frames a recipe takes, with everything fixed but seed, epoch and index.

    Attributes:
        frames: T, of a clip.
        stride: from one frame of the clip to the next, in frames of the video.
        clips: K > 0 shows every video as K clips, evenly spread, the same in every epoch (evaluation); 0 shows it as one
            clip with a random beginning (training).
        crops: with ``clips``: 1 for what the plan of views takes, or 3 that are as large and lie at both ends of the longer
            side and in the middle.
        only_centre: serve of each clip only the frame that the sources see, as a clip of one frame.

    Raises:
        ValueError: no frames, a stride below 1, crops other than 1 and 3, or three crops of a random clip.
    """

    frames: int
    stride: int = 1
    clips: int = 0
    crops: int = 1
    only_centre: bool = False

    def __post_init__(self) -> None:
        if self.frames < 1 or self.stride < 1 or self.clips < 0:
            raise ValueError(
                f"data.frames, data.stride, data.clips: {self.frames}, {self.stride}, {self.clips} are to be at least 1"
            )
        if self.crops not in CROPS or (self.crops > 1 and not self.clips):
            raise ValueError(f"data.crops: {self.crops} is not 1 or 3")

    @property
    def span(self) -> int:
        """From a clip's first frame to the one behind its last, in frames of the video."""
        return (self.frames - 1) * self.stride + 1

    @property
    def shows(self) -> int:
        """How often an epoch shows each video."""
        return max(self.clips, 1) * self.crops

    @property
    def served(self) -> int:
        """Frames of a clip that a loader serves: T, or 1."""
        return 1 if self.only_centre else self.frames

    @property
    def centre(self) -> int:
        """Which of the frames served the sources see (f_s): frame 8 of 16, as in the published code."""
        return self.served // 2

    def __call__(self, *, seed: int, number_B: np.ndarray, index_B: np.ndarray, count_B: np.ndarray) -> np.ndarray:
        """The frames of clips: int64 [B, T] (or [B, 1]), in frames of the video.

        Args:
            seed: of the views.
            number_B: which view of its video each is; with :attr:`clips`, clip * crops + crop.
            index_B: the videos' indices.
            count_B: the videos' frames, at least 1.
        """
        room_B = np.maximum(count_B - self.span, 0)
        if not self.clips:
            first_B = integers(draw(seed, number_B, index_B, _TIME)[0], room_B + 1)
        elif self.clips == 1:
            first_B = room_B // 2
        else:
            first_B = number_B // self.crops * room_B // (self.clips - 1)
        frame_BT = first_B[:, None] + np.arange(self.frames) * self.stride
        if self.only_centre:
            frame_BT = frame_BT[:, self.frames // 2 :][:, :1]
        return frame_BT % count_B[:, None]

    def placed(self, view: View, height_B, width_B) -> View:
        """The view's boxes, brought to where the crop of each number lies."""
        if self.crops == 1:
            return view
        box_B4, at_B = view.box_B4.copy(), view.number_B % self.crops
        wide_B = np.broadcast_to(np.asarray(width_B) >= np.asarray(height_B), at_B.shape)
        for side, length_B, chosen_B in ((1, width_B, wide_B), (0, height_B, ~wide_B)):
            room_B = np.broadcast_to(length_B, at_B.shape) - box_B4[:, 2 + side]
            box_B4[:, side] = np.where(chosen_B, at_B * room_B // 2, box_B4[:, side])
        return replace(view, box_B4=box_B4)
