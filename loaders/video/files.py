"""Videos in files."""

import hashlib
import os
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock

import av
import numpy as np

from .base import Clips
from .decoder_cache import scan_files
from .decoders import READERS, PyavReader, Reader, choose_decoder, why_pyav
from .scan import Scan, opened, reason, upright

_KEPT = 8  # readers that nobody uses at the moment, and that stay open


class VideoFiles(Clips):
    """``read`` of videos in files, decoded on the CPU.

    May be used by several threads at once, and in processes forked off one that has used it.

    Args:
        paths: one file each.
        decoder: ``decord``, ``torchcodec``, ``pyav`` or ``dali``; ``auto``: decord where it can be imported, else pyav. Each
            leaves the kinds of files that it would not read frame for frame to PyAV.
        report: called with (files looked into, files to look into) while the files are looked through, which happens when
            their shapes are first asked for.

    Raises:
        ValueError: the decoder is unknown or not here.
    """

    in_files = True

    def __init__(
        self, paths: list[Path], decoder: str = "auto", report: Callable[[int, int], None] | None = None
    ) -> None:
        self.paths = paths
        self.decoder, self._version = choose_decoder(decoder)
        self._report = report
        self._scans: list[Scan] | None = None
        self._idle: OrderedDict[tuple[int, int], Reader] = OrderedDict()  # by (video, a number); the oldest first
        self._shape_N3: np.ndarray | None = None
        self._count = 0
        self._told: set[int] = set()
        self._lock, self._scan_lock = Lock(), Lock()
        _EVERY.add(self)

    def __reduce__(self) -> tuple:
        """A copy in another process opens its own files; what was found out lies in the cache folder."""
        return VideoFiles, (self.paths, self.decoder)

    @property
    def scans(self) -> list[Scan]:
        """What is known of each file."""
        if self._scans is None:
            with self._scan_lock:
                if self._scans is None:
                    self._scans = scan_files(self.paths, self._report)
        return self._scans

    @property
    def shape_N3(self) -> np.ndarray:  # type: ignore[override]
        """int64 [N, 3], each video's frames, height and width in pixels; 0 frames for one that cannot be read."""
        if self._shape_N3 is None:
            rows = [(s.frames, s.height, s.width) for s in self.scans]
            self._shape_N3 = np.array(rows, dtype=np.int64).reshape(-1, 3)
        return self._shape_N3

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def why(self, index: int) -> str:
        return self.scans[index].why if not self.scans[index].frames else ""

    def frames(self, index: int, frame_T: np.ndarray) -> np.ndarray:
        scan, frame_T = self._readable(index), np.asarray(frame_T, dtype=np.int64)
        outside = frame_T[(frame_T < 0) | (frame_T >= scan.frames)]
        if len(outside):
            raise ValueError(
                f"cannot read the video {self.name(index)}: there is no frame {outside[0]}, only 0 to {scan.frames - 1}"
            )
        try:
            return self._read(index, frame_T)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise ValueError(
                f"cannot read the video {self.name(index)}: {reason(error)}{_asked(error, frame_T)}"
            ) from error

    def every(self, index: int) -> Iterator[np.ndarray]:
        """All frames in order, uint8 [H, W, 3] each, by PyAV; raises as :meth:`frames` does."""
        scan, number = self._readable(index), 0
        try:
            with opened(self.paths[index]) as (container, stream):
                for frame in container.decode(stream):
                    image_HWC = upright(frame.to_ndarray(format="rgb24"), scan.turn)
                    if image_HWC.shape[:2] != (scan.height, scan.width):
                        raise ValueError("it is of another size than the first")
                    yield np.ascontiguousarray(image_HWC)
                    number += 1
                    if number == scan.frames:
                        return
            raise ValueError("it is not in what can be decoded")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise ValueError(f"cannot read the video {self.name(index)}: frame {number}: {reason(error)}") from error

    def fingerprint(self, samples: int) -> str:
        about = [(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in self.paths[:samples]]
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def total_bytes(self, samples: int) -> int:
        return sum(p.stat().st_size for p in self.paths[:samples])

    def describe(self) -> str:
        """The decoder, and how many videos PyAV reads instead, and why."""
        why = Counter(filter(None, (why_pyav(self.decoder, s) for s in self.scans)))
        if not why:
            return self._version
        reasons = ", ".join(f"{count} {text}" for text, count in why.most_common())
        return f"{self._version}; pyav for {why.total()} of {len(self.paths)} videos ({reasons})"

    def close(self) -> None:
        """Closes the files that are open; they are opened again when they are read again."""
        with self._lock:
            idle, self._idle = self._idle, OrderedDict()
        for reader in idle.values():
            reader.close()

    def _readable(self, index: int) -> Scan:
        scan = self.scans[index]
        if not scan.frames:
            raise ValueError(f"cannot read the video {self.name(index)}: {scan.why}")
        return scan

    def _read(self, index: int, frame_T: np.ndarray) -> np.ndarray:
        scan = self.scans[index]
        if self.decoder != "pyav" and not why_pyav(self.decoder, scan):
            try:
                out_THWC = self._by(READERS[self.decoder], index, frame_T)
                if out_THWC.shape == (len(frame_T), scan.height, scan.width, 3):
                    return out_THWC
                why = f"its frames are of shape {out_THWC.shape}"
            except Exception as error:  # each library raises its own
                why = reason(error)
            self._tell(index, why)
            reader = PyavReader(self.paths[index], scan)
            try:
                return reader.frames(frame_T)
            finally:
                reader.close()
        return self._by(PyavReader, index, frame_T)

    def _tell(self, index: int, why: str) -> None:
        """Once for each file: a decoder failed on one of a kind that it can read, so it is damaged."""
        if index not in self._told:
            self._told.add(index)
            warnings.warn(f"{self.decoder} cannot read {self.name(index)}, pyav is asked: {why[:200]}", stacklevel=5)

    def _by(self, kind: Callable[[Path, Scan], Reader], index: int, frame_T: np.ndarray) -> np.ndarray:
        """Reads with an open reader that is idle, or a new one, and keeps it if it did not fail."""
        with self._lock:
            key = next((k for k in reversed(self._idle) if k[0] == index), None)
            reader = None if key is None else self._idle.pop(key)
        reader = reader or kind(self.paths[index], self.scans[index])
        try:
            out_THWC = reader.frames(frame_T)
        except Exception:
            reader.close()
            raise
        if not reader.keep:
            reader.close()
            return out_THWC
        old = None
        with self._lock:
            self._count += 1
            self._idle[index, self._count] = reader
            if len(self._idle) > _KEPT:
                _, old = self._idle.popitem(last=False)
        if old is not None:
            old.close()
        return out_THWC


def _asked(error: Exception, frame_T: np.ndarray) -> str:
    """Which frames were asked for, where the message does not name one."""
    return "" if str(error).startswith("frame ") else f" (frames {frame_T.min()} to {frame_T.max()})"


_EVERY: "weakref.WeakSet[VideoFiles]" = weakref.WeakSet()
_LEFT: list[OrderedDict] = []


def _forked() -> None:
    """A forked process shares its parent's open files and their positions, and has none of the libraries' threads: it neither
    uses nor closes the parent's readers. Locks may have been held by threads that it does not have."""
    for files in _EVERY:
        files._lock, files._scan_lock = Lock(), Lock()
        _LEFT.append(files._idle)
        files._idle = OrderedDict()


os.register_at_fork(after_in_child=_forked)
