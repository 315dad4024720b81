"""Videos in a packed file: its images are their frames, one video's after the other (``loaders/pack_video.py``)."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import Clips

if TYPE_CHECKING:  # it imports this module
    from ..datasets.beton import Packed


class PackedClips(Clips):
    """Frames out of a ``.beton``, decoded one by one; none but those that are asked for are looked at.

    Attributes:
        packed: the file's images.
        first_V: int64 [V + 1], the first image of each video, and behind the last one's last.
        names: what the videos were called where they were packed.
    """

    def __init__(self, packed: "Packed", first_V: np.ndarray, names: Sequence[str]) -> None:
        self.packed, self.first_V, self.names = packed, first_V, names
        first = first_V[:-1]
        self.shape_N3 = np.stack(
            [np.diff(first_V), packed.file.height_N[first], packed.file.width_N[first]], axis=1
        ).astype(np.int64)

    def name(self, index: int) -> str:
        return f"{self.packed.file.path}, video {index} ({self.names[index]})"

    def why(self, index: int) -> str:
        """Nothing: what is in a packed file could be read when it was packed."""
        return ""

    def frames(self, index: int, frame_T: np.ndarray) -> np.ndarray:
        frame_T, (count, height, width) = np.asarray(frame_T, dtype=np.int64), self.shape_N3[index].tolist()
        wrong = frame_T[(frame_T < 0) | (frame_T >= count)]
        if len(wrong):
            raise ValueError(f"{self.name(index)} has no frame {wrong[0]}: it has {count}")
        out_THWC = np.empty((len(frame_T), height, width, 3), dtype=np.uint8)
        frame_U, place_T = np.unique(frame_T, return_inverse=True)
        for place, frame in enumerate(frame_U.tolist()):
            out_THWC[place_T == place] = self.packed(int(self.first_V[index]) + frame)
        return out_THWC

    def every(self, index: int) -> Iterator[np.ndarray]:
        for frame in range(int(self.first_V[index]), int(self.first_V[index + 1])):
            yield self.packed(frame)

    def fingerprint(self, samples: int) -> str:
        about = (self.packed.file.head_sha256, self.first_V[: samples + 1].tolist(), list(self.names[:samples]))
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def total_bytes(self, samples: int) -> int:
        return int(self.packed.file.size_N[: self.first_V[samples]].sum())


def packed_clips(packed: "Packed", videos: Any, where: str) -> PackedClips:
    """The videos in a packed file, and whether what is said of them can be.

    Args:
        packed: the file's images.
        videos: ``{"first": [..], "names": [..]}`` as :func:`fasttrain.loaders.pack_video.pack_videos` writes it.
        where: the file that says so, for messages.

    Raises:
        ValueError: it is malformed, does not fit the images, or a video's frames differ in size or label.
    """
    first, names = (videos.get(k) if isinstance(videos, dict) else None for k in ("first", "names"))
    if not isinstance(first, list) or not isinstance(names, list):
        raise ValueError(f"{where}: videos is to have two lists, first and names")
    if not all(type(x) is int for x in first) or not all(isinstance(x, str) for x in names):
        raise ValueError(f"{where}: videos' first is to be a list of whole numbers, and names one of names")
    if len(first) != len(names) + 1 or not names:
        raise ValueError(
            f"{where}: videos has {len(names)} names and {len(first)} numbers: one more than names is right"
        )
    images = len(packed.file)
    if first[0] != 0 or first[-1] != images or any(a >= b for a, b in pairwise(first)):
        raise ValueError(f"{where}: videos' first does not ascend from 0 to {images}, the frames in the file")
    first_V = np.array(first, dtype=np.int64)
    file = packed.file
    for what, of_N in (("size", file.height_N), ("size", file.width_N), ("label", file.targets_N)):
        differs = (of_N[1:] != of_N[:-1]).reshape(images - 1, -1).any(axis=1)  # from the image before
        differs[first_V[1:-1] - 1] = False
        if differs.any():
            video = int(np.searchsorted(first_V, np.argmax(differs) + 1, side="right")) - 1
            raise ValueError(f"{where}: the frames of video {video} ({names[video]}) differ in {what}")
    return PackedClips(packed, first_V, names)
