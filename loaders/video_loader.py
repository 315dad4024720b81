"""The ``video`` loader: clips of videos, decoded by threads a few batches ahead, each with the sources' frame beside it.

Of files, a decoder library reads the frames (``video/files.py``) and compiled code cuts them; of a packed file, compiled code
decodes only what each frame shows. Both hold no Python lock.

Shape suffixes: B batch, T frames of a clip, S side of the output, R side of the still, C channels.
"""

import itertools
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from .base import EpochLoader, LoaderSpec, stand_ins
from .batch import Batch
from .crop import cut_clip
from .show import clip_shower, load_libjpeg
from .video import Clips, PackedClips

_AHEAD = 2  # batches that are being made, at least
_AHEAD_CLIPS = 4  # and clips a thread
_TASKS = 4  # a thread and batch


class VideoLoader(EpochLoader):
    """Serves clips of a data set of videos; threads make them, so a decoder library has to let go of Python's lock.

    Args:
        spec: with a ``clip``.
        device: where the batches shall be.
        workers: threads; 0 for one a core.

    Raises:
        ValueError: a data set of images, ``spec.stored``, or no libjpeg-turbo for a packed file; later, while it is iterated,
            a video that cannot be read and ``spec.on_bad_sample`` is ``error``.
    """

    def __init__(self, spec: LoaderSpec, device: torch.device | str = "cpu", workers: int = 0) -> None:
        super().__init__(spec, device)
        if spec.clip is None or not isinstance(spec.dataset.read, Clips):
            raise ValueError(
                f"data.loader: video serves clips (data.frames) of videos, and {spec.dataset.name} has none"
            )
        if spec.stored:
            raise ValueError(
                "data.stored: clips are cut from videos as they are stored; `fasttrain pack` makes them smaller"
            )
        self.read, self.clip = spec.dataset.read, spec.clip
        if isinstance(self.read, PackedClips):
            load_libjpeg()
            clip_shower()  # compiled by one thread
        self.workers = workers or len(os.sched_getaffinity(0))
        self._pool: ThreadPoolExecutor | None = None

    def _load(self, epoch: int, walk: Iterator[np.ndarray]) -> Iterator[Batch]:
        self._pool = self._pool or ThreadPoolExecutor(self.workers, thread_name_prefix="video")
        ahead = max(_AHEAD, -(-_AHEAD_CLIPS * self.workers // self.spec.batch))
        begun: deque[_Begun] = deque()
        try:
            for sample_B in itertools.islice(walk, ahead):
                begun.append(self._begin(epoch, sample_B))
            while begun:
                made = begun.popleft()
                for future in made.futures:
                    for index, why in future.result().items():
                        self._skip(index, why)
                for sample_B in itertools.islice(walk, 1):
                    begun.append(self._begin(epoch, sample_B))
                yield self._finish(made)
        finally:
            for future in itertools.chain(*(b.futures for b in begun)):
                future.cancel()

    def _begin(self, epoch: int, sample_B: np.ndarray) -> "_Begun":
        """Has a batch made: buffers, and the tasks that fill them."""
        spec, clip, size = self.spec, self.clip, self.spec.size_at(epoch)
        index_B, show_B = np.divmod(sample_B, spec.shows)
        number_B = show_B if clip.clips else spec.number(epoch, index_B)
        pinned = self.device.type == "cuda"
        shape = (len(index_B), clip.served, size, size, 3)
        clip_BTSSC = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        still_BRRC = torch.empty(len(index_B), spec.still, spec.still, 3, dtype=torch.uint8, pin_memory=pinned)
        begun = _Begun(clip_BTSSC, still_BRRC, index_B.copy(), number_B.copy(), [])
        assert self._pool is not None
        for part in np.array_split(np.arange(len(index_B)), max(min(_TASKS * self.workers, len(index_B)), 1)):
            begun.futures.append(self._pool.submit(self._make, begun, part, epoch))
        return begun

    def _finish(self, made: "_Begun") -> Batch:
        pixels = self._sent(made.clip_BTSSC).permute(0, 4, 1, 2, 3)
        still = self._sent(made.still_BRRC).permute(0, 3, 1, 2) if self.spec.still else None
        return self._batch_of(pixels, made.index_B, made.number_B, still)

    def _make(self, begun: "_Begun", part_P: np.ndarray, epoch: int) -> dict[int, str]:
        """Fills in clips of a batch; returns the videos that could not be read, and why."""
        bad: dict[int, str] = {}
        clip_BTSSC, still_BRRC = (t.numpy() for t in (begun.clip_BTSSC, begun.still_BRRC))
        for b in part_P.tolist():
            index, number = int(begun.index_B[b]), int(begun.number_B[b])
            for candidate in itertools.chain([index], stand_ins(self.spec, index)):
                if candidate != index and not self.clip.clips:  # a stand-in is shown in a view of its own
                    number = int(self.spec.number(epoch, np.array([candidate]))[0])
                try:
                    self._show(candidate, number, clip_BTSSC[b], still_BRRC[b])
                except ValueError as error:
                    if self.spec.on_bad_sample == "error":
                        raise
                    bad[candidate] = str(error)
                    continue
                begun.index_B[b], begun.number_B[b] = candidate, number
                break
            else:
                raise ValueError(f"{len(bad)} videos in a row cannot be read; the first: {next(iter(bad.values()))}")
        return bad

    def _show(self, index: int, number: int, clip_TSSC: np.ndarray, still_RRC: np.ndarray) -> None:
        """One view of one video.

        Raises:
            ValueError: it cannot be read.
        """
        read, spec, clip = self.read, self.spec, self.clip
        count, height, width = read.shape_N3[index].tolist()
        if not count:
            raise ValueError(f"cannot read the video {read.name(index)}: {read.why(index)}")
        index_1, number_1 = np.array([index]), np.array([number])
        frame_1T = clip(seed=spec.view_seed, number_B=number_1, index_B=index_1, count_B=np.array([count]))
        view = clip.placed(spec.plan.numbered(spec.view_seed, number_1, index_1, height, width), height, width)
        box_4, (flip_x, flip_y) = view.box_B4[0], view.flip_B2[0]
        if isinstance(read, PackedClips):
            file, frame_T = read.packed.file, frame_1T[0] + read.first_V[index]
            jpeg_T = (~read.packed.raw_N[frame_T]).astype(np.int64)
            row_6 = np.array([*box_4, flip_x, flip_y], dtype=np.int32)
            where = (read.packed.data.ctypes.data, file.ptr_N[frame_T], file.size_N[frame_T], jpeg_T, height, width)
            damaged = clip_shower()(*where, row_6, clip_TSSC, clip.centre, still_RRC)
            if damaged >= 0:
                raise ValueError(f"cannot read the video {read.name(index)}: frame {frame_1T[0, damaged]} is damaged")
            return
        frame_THWC = read.frames(index, frame_1T[0])
        cut_clip(frame_THWC, box_4, flip_x, flip_y, clip_TSSC, clip.centre, still_RRC)

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def describe(self) -> str:
        clip, how = self.clip, "a packed file" if isinstance(self.read, PackedClips) else self.read.describe()
        return (
            f"clips of {clip.frames} frames, stride {clip.stride}, from {how}; {self.workers} threads, to {self.device}"
        )


@dataclass
class _Begun:
    """A batch that is being made; ``index_B`` and ``number_B`` are those served once its tasks are done."""

    clip_BTSSC: torch.Tensor
    still_BRRC: torch.Tensor
    index_B: np.ndarray
    number_B: np.ndarray
    futures: list[Future]
