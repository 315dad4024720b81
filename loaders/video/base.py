"""What a data set of videos is here: frames that can be read by video and number."""

from collections.abc import Iterator

import numpy as np


class Clips:
    """``read`` of a data set of videos.

    Frame 0 is the first that is shown; the numbers are those that decoding the whole file by PyAV gives. Sizes and pixels
    are those of the upright picture. Called with an index alone it gives the video's middle frame, so that a data set of
    videos is one of images, too.

    Attributes:
        shape_N3: int64 [N, 3], each video's frames, height and width in pixels; 0 frames for one that cannot be read.
        in_files: whether a clip costs decoding a file of its video up to it.
    """

    shape_N3: np.ndarray
    in_files = False

    def name(self, index: int) -> str:
        """What to call the video in messages: its path, or packed file and number."""
        raise NotImplementedError

    def why(self, index: int) -> str:
        """Why a video cannot be read at all; empty where nothing is known against it."""
        raise NotImplementedError

    def frames(self, index: int, frame_T: np.ndarray) -> np.ndarray:
        """Frames by number, in any order, repeated as often as asked: uint8 [T, H, W, 3].

        Raises:
            ValueError: naming the video, where it cannot be read or has no such frame.
        """
        raise NotImplementedError

    def every(self, index: int) -> Iterator[np.ndarray]:
        """All frames in order, uint8 [H, W, 3] each; raises as :meth:`frames` does."""
        raise NotImplementedError

    def fingerprint(self, samples: int) -> str:
        """Changes when the files of videos 0 .. ``samples`` - 1 do, as far as their names, sizes and times tell."""
        raise NotImplementedError

    def total_bytes(self, samples: int) -> int:
        """Size of the files of videos 0 .. ``samples`` - 1; 0 where that is not known."""
        return 0

    def describe(self) -> str:
        """What the frames are read from and by, for the run's log."""
        return "memory"

    def __call__(self, index: int) -> np.ndarray:
        """The middle frame: uint8 [H, W, 3]."""
        count = int(self.shape_N3[index, 0])
        if not count:
            raise ValueError(f"cannot read the video {self.name(index)}: {self.why(index)}")
        return self.frames(index, np.array([count // 2]))[0]
