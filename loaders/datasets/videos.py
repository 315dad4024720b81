"""Videos named in a list; and what sets of videos share that come as class folders with official split files."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..video.base import Clips
from .base import Dataset, split_off_groups
from .labels import read_text
from .listed import read_list
from .paths import Tree

_EVERY_SECONDS = 5.0


def videos(root: Path, *, val_share: float, decoder: str = "auto", verify: bool = True) -> Dataset:
    """A list of videos: ``list.csv`` or ``list.jsonl`` as ``listed`` describes it, with paths of videos.

    Splits that it does not give are parted off video by video: name them where several were cut from one recording.

    Raises:
        ValueError: as ``listed`` does; or an unknown decoder.
    """
    return read_list("videos", root, val_share, lambda paths: video_files(paths, decoder))


def video_files(paths: list[Path], decoder: str) -> Clips:
    """``read`` of videos in files, none of which is opened yet; raises ``ValueError`` for an unknown decoder.

    When they are looked through, stderr hears how far that is, every few seconds.
    """
    from ..video.files import VideoFiles  # when it is asked for: images are loaded without PyAV

    said = time.monotonic()

    def report(done: int, count: int) -> None:
        nonlocal said
        if time.monotonic() - said > _EVERY_SECONDS:
            said = time.monotonic()
            print(f"looking through videos, once: {done} of {count}", file=sys.stderr, flush=True)

    return VideoFiles(paths, decoder, report)


class Entry(NamedTuple):
    """A video that an official split names.

    Attributes:
        split: ``train`` or ``test``.
        label: class index.
        file: its name in its class's folder.
        recording: what it was cut from, as far as its name tells.
        at: file and line that name it, for messages.
    """

    split: str
    label: int
    file: str
    recording: str
    at: str


def official(
    name: str, folder: Path, classes: tuple[str, ...], entries: list[Entry], val_share: float, decoder: str, split: int
) -> Dataset:
    """The data set of an official split, its videos in the order of classes and names.

    ``val_share`` of each class's training videos validate, whole recordings: clips of one recording look alike, and which
    of them were seen would tell their class. The names of folders and files need not be spelt in the same case as on disk.

    Args:
        name: of the data set.
        folder: that holds the class folders.
        classes: in the order of the class indices.
        entries: what the split files name.
        val_share: share of the training videos.
        decoder: of :func:`video_files`.
        split: the split's number.

    Raises:
        ValueError: a video that is not there or leads out of ``folder``, that is named twice, or a class without training
            videos; names the line.
    """
    tree = Tree(folder)
    place_by_case = _by_case(tree.folders())
    file_by_case: dict[str, dict[str, str]] = {}
    entry_by_path: dict[Path, Entry] = {}
    found, missing = [], []
    for entry in entries:
        label = classes[entry.label]
        place = place_by_case.get(label) or place_by_case.get(label.casefold())
        if place is None:
            packed = f": unpack {label}.rar, which is there" if f"{label}.rar" in tree.files() else ""
            raise ValueError(f"{entry.at}: there is no folder {folder / label}{packed}")
        try:
            if place not in file_by_case:
                file_by_case[place] = _by_case(tree.files(place))
            file = file_by_case[place].get(entry.file) or file_by_case[place].get(entry.file.casefold())
            path = tree.real(place, file) if file else None
        except ValueError as error:
            raise ValueError(f"{entry.at}: {error}") from error
        if path is None or file is None:
            missing.append((entry, folder / place / entry.file))
            continue
        other = entry_by_path.setdefault(path, entry)
        if other is not entry:
            also = "" if other.split == entry.split else f", for {other.split}"
            raise ValueError(f"{entry.at}: {entry.file} is there already, in {other.at}{also}")
        found.append((entry.label, folder / place / file, entry))
    if missing:
        (entry, path), *_ = missing
        raise ValueError(f"{entry.at}: there is no file {path}; {len(missing)} of {len(entries)} are missing")
    found.sort(key=lambda f: f[:2])
    targets_N = np.array([label for label, _, _ in found], dtype=np.int64)
    group_by_recording: dict[tuple[int, str], int] = {}
    group_N = np.array([group_by_recording.setdefault((n, e.recording), len(group_by_recording)) for n, _, e in found])
    index_by_split = {s: np.flatnonzero([e.split == s for _, _, e in found]) for s in ("train", "test")}
    train, test = index_by_split["train"], index_by_split["test"]
    empty = np.setdiff1d(np.arange(len(classes)), targets_N[train])
    if len(empty):
        raise ValueError(f"data.root: split {split} in {folder} has no training videos of {classes[empty[0]]}")
    train, val = split_off_groups(targets_N[train], group_N[train], train, val_share, purpose=2)
    read = video_files([path for _, path, _ in found], decoder)
    splits = {"train": train, "val": val, "test": test}
    return Dataset(name, classes, targets_N, read, splits, f"{folder}, split {split}")


def official_split(name: str, split: int) -> int:
    """``split``; raises ``ValueError`` where it is none of the three that the authors of ``name`` give."""
    if split not in (1, 2, 3):
        raise ValueError(f"data.split: {split} is not 1, 2 or 3, the official splits of {name}")
    return split


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """What to call a line in messages, and its text, for all lines that are not empty; raises ``ValueError`` if not UTF-8."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def _by_case(names: list[str]) -> dict[str, str]:
    """Names by themselves, and by themselves in lower case."""
    return {n.casefold(): n for n in reversed(names)} | {n: n for n in names}
