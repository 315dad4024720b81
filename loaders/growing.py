"""A ``.beton`` while it is packed: it grows under a temporary name beside a log, and goes on after a stop.

    FILE.partial        what will be FILE
    FILE.partial.log    what is being packed, and a record of each image that is safely in FILE.partial
    FILE.bad.jsonl      the samples that are left out, and why

A sample is an image or, in a data set of videos, all frames of a video; its records are in the log together or not at all.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Event
from typing import IO, Any

import numpy as np

from .beton import JPEG, RAW, BetonWriter, new_images, page_for, read_beton
from .datasets import Dataset
from .datasets.base import Encoded
from .datasets.beton import classes_sha256, compress, read_side_file, side_file
from .video import Clips

SYNC_BYTES = 64 << 20  # written between two points to which a stopped packing goes back
RECORD = np.dtype(
    [("index", "<i8"), ("mode", "i1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8"), ("size", "<u8"),
     ("label", "<i8"), ("before", "<u4"), ("kept", "u1"), ("follow", "<u4")]
)  # fmt: skip  # index: of the sample; follow: how many records of the same sample come behind
LEFT_OUT = -1  # mode of a sample that is not in the file


@dataclass(frozen=True)
class Progress:
    """Where a packing is: samples looked at, of how many; bytes written; samples left out."""

    done: int
    samples: int
    bytes: int
    bad: int


@dataclass(frozen=True)
class Ready:
    """One image as it will be in the file: its bytes, how to read them, its seek index; ``kept``: as it was found."""

    content: bytes
    mode: int
    width: int
    height: int
    kept: bool = False
    seek: bytes = b""


class Growing:
    """What :func:`growing` gives.

    Attributes:
        done: samples looked at.
        bad: how many of them are left out.
    """

    def __init__(self, dataset: Dataset, out: Path, made_from: dict[str, Any]) -> None:
        self.dataset, self.out, self.made_from = dataset, out, made_from
        self.partial, self._log = (out.with_name(out.name + end) for end in (".partial", ".partial.log"))
        self._bad_file = out.with_name(out.name + ".bad.jsonl")
        self._vector = len(dataset.classes) if dataset.multi_label else 0
        self._head = json.dumps(made_from).encode() + b"\n"
        self._unsaved: list[np.ndarray] = []
        self._writer: BetonWriter | None = None
        self._notes: list[IO] = []
        self.done = self.bad = self._at = self._largest = 0

    def resume(self) -> None:
        """Takes over what an earlier packing has safely on disk.

        Raises:
            ValueError: that was of other data, or with other options.
        """
        self.out.parent.mkdir(parents=True, exist_ok=True)
        record_N, self._at = self._safe()
        if len(record_N):
            self.done, self.bad = int(record_N["index"][-1]) + 1, int((record_N["mode"] == LEFT_OUT).sum())
            self._largest = int((record_N["size"] + record_N["before"]).max()) + 4 * self._vector

    def start(self, *, images: int, page: int) -> None:
        """Opens the file for what is to come.

        Args:
            images: how many there will be at most, together with those that are there already.
            page: bytes a page, see :class:`fasttrain.loaders.beton.BetonWriter`.
        """
        if not self.done:
            self._log.write_bytes(self._head)
            self._bad_file.write_text("")
        self._writer = BetonWriter(
            self.partial, samples=images, vector=self._vector, page=page_for(self._largest, page), at=self._at
        )
        self._mark = self._writer.at
        self._notes = [self._log.open("ab"), self._bad_file.open("ab")]

    def add(self, images: Sequence[Ready]) -> None:
        """Appends the next sample.

        Raises:
            ValueError: an image is larger than 2 GiB; without a word on what to do about it.
        """
        assert self._writer is not None
        target = self.dataset.targets_N[self.done]
        label = [target.astype("<f4").tobytes()] if self._vector else []
        row_N = np.zeros(len(images), dtype=RECORD)
        for row, image in zip(row_N, images, strict=True):
            before, ptr, *at = self._writer.add(image.seek, image.content, *label)
            row["mode"], row["width"], row["height"] = image.mode, image.width, image.height
            row["ptr"], row["size"], row["before"] = ptr, len(image.content), ptr - before
            row["label"], row["kept"] = at[0] if at else int(target), image.kept
        row_N["follow"] = np.arange(len(images))[::-1]
        self._note(row_N)

    def leave_out(self, why: str) -> None:
        """Passes the next sample over."""
        row_N = np.zeros(1, dtype=RECORD)
        row_N["mode"] = LEFT_OUT
        line = {"index": self.done, "name": name_of(self.dataset, self.done), "why": why}
        self._notes[1].write(json.dumps(line).encode() + b"\n")
        self.bad += 1
        self._note(row_N)

    def progress(self) -> Progress:
        assert self._writer is not None
        return Progress(self.done, len(self.dataset), self._writer.at, self.bad)

    def finish(self) -> tuple[dict[str, Any], np.ndarray]:
        """Writes head and table; returns what goes beside the file, and the records of the images in it.

        Raises:
            ValueError: none of the samples is in it.
        """
        assert self._writer is not None
        self._close_notes()
        record_N = self._read_log()
        out_N = record_N["mode"] == LEFT_OUT
        good_S = np.ones(len(self.dataset), dtype=bool)
        good_S[record_N["index"][out_N]] = False
        if not good_S.any():
            raise ValueError(
                f"none of the {len(good_S)} samples of {self.dataset.name} can be decoded; see {self._bad_file}"
            )
        record_N = record_N[~out_N] if out_N.any() else record_N
        image_N = new_images(len(record_N))
        for name in ("mode", "width", "height", "ptr"):
            image_N[name] = record_N[name]
        self._writer.finish(image_N, record_N["size"], record_N["label"])
        new_of_old = np.cumsum(good_S) - 1
        return {
            "name": self.dataset.name,
            "classes": list(self.dataset.classes),
            "classes_sha256": classes_sha256(self.dataset.classes),
            "splits": {k: compress(new_of_old[v[good_S[v]]]) for k, v in self.dataset.splits.items()},
            "samples": len(record_N),
            "bad": self.bad,
            "bytes": self.partial.stat().st_size,
            "sha256": sha256_of(self.partial),
            "head_sha256": read_beton(self.partial).head_sha256,
        } | self.made_from, record_N

    def publish(self, about: dict[str, Any]) -> None:
        """Gives the finished file its name, with ``about`` beside it."""
        self.close()
        _write(side_file(self.out), json.dumps(about, indent=1).encode())
        os.replace(self.partial, self.out)
        self._log.unlink()
        if not about["bad"]:
            self._bad_file.unlink()

    def close(self) -> None:
        self._close_notes()
        if self._writer is not None:
            self._writer.close()

    def _close_notes(self) -> None:
        while self._notes:
            self._notes.pop().close()

    def _note(self, row_N: np.ndarray) -> None:
        """The records of a sample that was written; from time to time all that is not yet safe is made so."""
        assert self._writer is not None
        row_N["index"] = self.done
        self._unsaved.append(row_N)
        if self._writer.at - self._mark > SYNC_BYTES or self.done + 1 == len(self.dataset):
            log, bad = self._notes
            self._writer.flush()  # data first, then the note that it is there
            _flush(bad)
            log.write(b"".join(r.tobytes() for r in self._unsaved))
            _flush(log)
            self._unsaved, self._mark = [], self._writer.at
        self.done += 1

    def _read_log(self) -> np.ndarray:
        """Records of whole samples."""
        with self._log.open("rb") as file:
            file.readline()
            content = file.read()
        record_N = np.frombuffer(content, dtype=RECORD, count=len(content) // RECORD.itemsize)
        whole = np.flatnonzero(record_N["follow"] == 0)[-1:]
        return record_N[: whole[0] + 1 if len(whole) else 0]

    def _safe(self) -> tuple[np.ndarray, int]:
        """Records of the samples that are safely on disk, and where they end; what follows is cut off."""
        nothing = np.zeros(0, dtype=RECORD), 0
        if not (self.partial.is_file() and self._log.is_file() and self._bad_file.is_file()):
            return nothing
        with self._log.open("rb") as file:
            first = file.readline()
        try:
            before = json.loads(first)
        except ValueError:
            return nothing
        if not isinstance(before, dict):
            return nothing
        if before != self.made_from:
            what = "its options" if before.get("source") == self.made_from["source"] else "the data set"
            raise ValueError(
                f"{what} changed since the packing into {self.partial} began: delete that file to begin anew"
            )
        record_N = self._read_log()
        if not self._sound(record_N):
            return nothing
        written = record_N[record_N["mode"] != LEFT_OUT]
        at = int((written["ptr"] + written["size"]).max(initial=0))
        at = max(at, int(written["label"].max(initial=0)) + 4 * self._vector) if self._vector and len(written) else at
        left_out = len(record_N) - len(written)
        lines = self._bad_file.read_bytes().splitlines(keepends=True)[:left_out]
        if self.partial.stat().st_size < at or len(lines) < left_out:
            return nothing
        os.truncate(self._log, len(first) + record_N.nbytes)
        os.truncate(self._bad_file, sum(map(len, lines)))
        return record_N, at

    def _sound(self, record_N: np.ndarray) -> bool:
        """Whether records of a log can be those of a packing of this data set."""
        last, size = record_N["follow"] == 0, self.partial.stat().st_size
        if (record_N["index"] != np.cumsum(last) - last).any() or (record_N["index"] >= len(self.dataset)).any():
            return False
        written = record_N[record_N["mode"] != LEFT_OUT]
        inside = (written["ptr"] <= size) & (written["size"] <= size) & (written["before"] <= written["ptr"])
        kind = (written["mode"] == JPEG) | (written["mode"] == RAW)
        label = True if self._vector else written["label"] == self.dataset.targets_N[written["index"]]
        return bool((inside & kind & (written["width"] > 0) & (written["height"] > 0) & label).all())


@contextmanager
def growing(dataset: Dataset, out: Path, made_from: dict[str, Any]) -> Iterator[Growing]:
    """A file that is being packed, as far as an earlier packing came.

    Args:
        dataset: whose samples are to be in it.
        out: the ``.beton`` to make.
        made_from: ``source`` and ``options``: what has to be the same for the packing to go on.

    Raises:
        ValueError: an earlier packing was of other data or with other options; and, in place of any ``OSError`` from within
            the ``with`` block, that the file cannot be written.
    """
    file = Growing(dataset, out, made_from)
    try:
        try:
            file.resume()
            yield file
        finally:
            file.close()
    except OSError as error:
        raise ValueError(
            f"cannot write {file.partial} (sample {file.done} of {len(dataset)}): {error.strerror or error}; the same "
            "command goes on from what is safely on disk"
        ) from error


def in_order(make: Callable[[int, Event], Any], todo: range, workers: int, ahead: int) -> Iterator[Future]:
    """What ``make`` gives for the numbers ``todo``, in order, made by threads that stay a little ahead.

    Args:
        make: called with a number and an event; once that is set, nobody waits for its result any more.
        todo: the numbers.
        workers: threads; 0 for all cores.
        ahead: how many results may be under way or waiting, for each thread.
    """
    workers = workers or len(os.sched_getaffinity(0))
    rest, stopped = iter(todo), Event()
    with ThreadPoolExecutor(workers) as pool:
        try:
            waiting = [pool.submit(make, number, stopped) for number in islice(rest, ahead * workers)]
            while waiting:
                yield waiting.pop(0)
                waiting += [pool.submit(make, number, stopped) for number in islice(rest, 1)]
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


def finished(out: Path, made_from: dict[str, Any]) -> dict[str, Any]:
    """What lies beside a file that is there already.

    Raises:
        ValueError: it is not what would be made.
    """
    try:
        about = read_side_file(side_file(out))
    except ValueError:
        raise ValueError(
            f"{out} is there already, and no {side_file(out).name} says what it is: delete it first"
        ) from None
    if any(about.get(k) != v for k, v in made_from.items()) or about.get("bytes") != out.stat().st_size:
        raise ValueError(f"{out} is there already, packed from other data or with other options: delete it first")
    return about


def fingerprint(dataset: Dataset) -> str:
    """Of a data set's samples, labels and splits: changes when its files do."""
    parts = [dataset.identity(), dataset.content]
    if isinstance(dataset.read, Encoded | Clips):
        parts.append(dataset.read.fingerprint(len(dataset)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def name_of(dataset: Dataset, index: int) -> str:
    """What to call a sample in messages."""
    if isinstance(dataset.read, Encoded | Clips):
        return dataset.read.name(index)
    return f"{dataset.name}, sample {index}"


def page_of(largest: int, images: int) -> int:
    """Bytes a page: 8 MiB as FFCV has it, more where an image may need it, 2 MiB for a small data set.

    Args:
        largest: bytes of the largest image, as far as one knows.
        images: how many there are.
    """
    page = 1 << 21 if largest * images < 1 << 26 and largest < 1 << 19 else 1 << 23
    while page < 8 * largest and page < 1 << 31:
        page *= 2
    return page


def sha256_of(path: Path) -> str:
    """Of a file's whole content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write(path: Path, content: bytes) -> None:
    """A whole file or none."""
    unfinished = path.with_name(path.name + ".partial")
    with unfinished.open("wb") as file:
        file.write(content)
        _flush(file)
    os.replace(unfinished, path)
