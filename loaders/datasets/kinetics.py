"""Kinetics-400: ten seconds each of 300,000 YouTube videos in 400 classes of action, in the layouts it is handed on in.

Kay et al., "The Kinetics Human Action Video Dataset", arXiv:1705.06950.
"""

import hashlib
import os
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .base import Dataset
from .labels import complete_splits, csv_rows, printed
from .paths import Tree, folder_with
from .videos import video_files

_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi")  # the first that is there counts
_CALLED = {"train": ("train",), "val": ("val", "validate"), "test": ("test",)}  # files and folders of each split
_REPLACED = ("replacement", "replacement/replacement_for_corrupted_k400")
_ID = re.compile(r"[0-9A-Za-z_-]{11}")
_SECONDS = re.compile(r"[0-9]{1,6}")


class _Clip(NamedTuple):
    """A video that a list or a folder names: its class and its file's name without suffix."""

    label: str
    stem: str
    at: str


def kinetics400(root: Path, *, val_share: float, decoder: str = "auto", verify: bool = True) -> Dataset:
    """The published lists with ``ROOT/train``, ``ROOT/val`` and perhaps ``ROOT/test``; or class folders in these alone.

    Lists: ``train.csv``, ``val.csv`` or ``validate.csv``, and perhaps ``test.csv``, in ``ROOT`` or ``ROOT/annotations``, with
    the columns ``label``, ``youtube_id``, ``time_start``, ``time_end`` (seconds); others are not looked at. A ``test.csv``
    without labels, as it was first published, is not used. Classes are all labels of ``train.csv``, sorted.

    A video is ``ID_START_END``, both times in six digits, as .mp4, .mkv, .webm or .avi, in its split's folder (``validate``
    for ``val``, too) or in the class folder in there (blanks may be underscores, capitals and marks do not matter);
    one in ``ROOT/replacement`` takes its place. Videos that are not there, mostly because YouTube has them no more, are left
    out; :attr:`Dataset.source` says how many.

    Without a labelled test split, ``val`` is the test split and ``val_share`` of ``train`` validates; without both, 20 % of
    ``train`` are the test. Without lists, classes are the folders in ``train``, and all videos in them count.

    Raises:
        ValueError: no such layout, a malformed line, a label that ``train`` does not have, a video that is listed twice or
            leads out of its split's folder, or no training video at all; names the line.
    """
    lists = folder_with(root, (".", "annotations"), "train.csv")
    if lists is not None:
        clips_by_split = _listed(lists)
    elif any(folder_with(root, (".", "annotations"), f"{name}.csv") for name in _CALLED["val"]):
        raise ValueError(f"data.root: there is a list of validation videos, but no train.csv in {root} or annotations")
    else:
        clips_by_split = _in_folders(root)
    classes = tuple(sorted({clip.label for clip in clips_by_split["train"]}))
    label_by_name = {name: i for i, name in enumerate(classes)}
    replaced = _files(root, _REPLACED)
    paths: list[Path] = []
    targets: list[int] = []
    given: dict[str, np.ndarray] = {}
    missing = listed = 0
    note = ""
    for split, clips in clips_by_split.items():
        there = _files(root, _CALLED[split])
        found = []
        for clip in clips:
            if clip.label not in label_by_name:
                raise ValueError(f"{clip.at}: the label {clip.label!r} is none of the {len(classes)} of train")
            path = _find(replaced, clip) or _find(there, clip)
            if path is not None:
                found.append((label_by_name[clip.label], clip.stem, path))
        if found:
            given[split] = np.arange(len(paths), len(paths) + len(found))
            found.sort(key=lambda f: f[:2])
            paths += [path for _, _, path in found]
            targets += [label for label, _, _ in found]
            missing, listed = missing + len(clips) - len(found), listed + len(clips)
        elif split == "train":
            raise ValueError(
                f"data.root: none of the {len(clips)} training videos is in {root / 'train'}; the first is to be "
                f"{clips[0].label}/{clips[0].stem}.mp4 or {clips[0].stem}.mp4 in there"
            )
        else:
            note += f", no videos of {split}"
    if missing:
        note += f", {missing} of {listed} listed videos missing"
    targets_N = np.array(targets, dtype=np.int64)
    splits = complete_splits(targets_N, given, val_share)
    names = "\n".join(path.name for path in paths)
    content = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()  # who is missing differs
    return Dataset("kinetics400", classes, targets_N, video_files(paths, decoder), splits, f"{root}{note}", content)


def read_list(path: Path, unlabelled: bool = False) -> list[_Clip]:
    """The videos of one of the published lists; none if it has no labels and ``unlabelled`` allows that.

    Raises:
        ValueError: a malformed line, a missing column or value, a video that is there twice; names the line.
    """
    clips: list[_Clip] = []
    line_by_stem: dict[str, int] = {}
    for line, row in csv_rows(path):
        at = f"{path}, line {line}"
        lacks = [c for c in ("label", "youtube_id", "time_start", "time_end") if c not in row]
        if unlabelled and lacks == ["label"]:
            return []
        if lacks:
            raise ValueError(f"{at}: there is no column {lacks[0]}, but {printed(', '.join(row))}")
        name, start, end = (row[c].strip() for c in ("youtube_id", "time_start", "time_end"))
        if not row["label"]:
            raise ValueError(f"{at}: the label is empty")
        if not _ID.fullmatch(name):
            raise ValueError(
                f"{at}: {name!r} is no YouTube id: 11 letters, digits, - and _ (a spreadsheet may have changed it)"
            )
        if not (_SECONDS.fullmatch(start) and _SECONDS.fullmatch(end)):
            raise ValueError(f"{at}: whole seconds are expected as times, not {start!r} and {end!r}")
        stem = f"{name}_{int(start):06}_{int(end):06}"
        if stem in line_by_stem:
            raise ValueError(f"{at}: {stem} is there already, in line {line_by_stem[stem]}")
        line_by_stem[stem] = line
        clips.append(_Clip(row["label"], stem, at))
    if not clips:
        raise ValueError(f"{path} lists nothing")
    return clips


def _listed(lists: Path) -> dict[str, list[_Clip]]:
    """The videos of each split that has a list with labels; no video is in two."""
    clips_by_split: dict[str, list[_Clip]] = {}
    at_by_stem: dict[str, str] = {}
    for split, names in _CALLED.items():
        there = [lists / f"{n}.csv" for n in names if (lists / f"{n}.csv").is_file()]
        if len(there) > 1:
            raise ValueError(f"data.root: {lists} has both {there[0].name} and {there[1].name}: remove one")
        clips = read_list(there[0], unlabelled=split == "test") if there else []
        if clips:
            clips_by_split[split] = clips
        for clip in clips:
            if at_by_stem.setdefault(clip.stem, clip.at) != clip.at:
                raise ValueError(f"{clip.at}: {clip.stem} is there already, in {at_by_stem[clip.stem]}")
    return clips_by_split


def _in_folders(root: Path) -> dict[str, list[_Clip]]:
    """The videos in the class folders of each split's folder; a class has the name that its folder in ``train`` has."""
    clips_by_split: dict[str, list[_Clip]] = {}
    name_by_key: dict[str, str] = {}
    for split, names in _CALLED.items():
        folder = next((root / n for n in names if (root / n).is_dir()), root / split)
        tree, seen = Tree(folder), dict[str, str]()
        for place in tree.folders():
            key = _key(place)
            if seen.setdefault(key, place) != place:
                raise ValueError(
                    f"data.root: the class folders {seen[key]} and {place} in {folder} are spelt too much alike"
                )
            name = name_by_key.setdefault(key, place) if split == "train" else name_by_key.get(key, place)
            stems = sorted({os.path.splitext(f)[0] for f in tree.files(place) if _is_video(f)})
            if not stems:
                raise ValueError(f"data.root: the class folder {folder / place} holds no videos")
            clips_by_split.setdefault(split, []).extend(_Clip(name, s, str(folder / place)) for s in stems)
    if "train" not in clips_by_split:
        raise ValueError(
            f"data.root: there is no train.csv in {root} or annotations, and no class folders with videos in {root / 'train'}"
        )
    return clips_by_split


class _Files(NamedTuple):
    """Videos below some folders, by class folder and name without suffix; "" for those that are in no class folder."""

    trees: list[Tree]
    found: dict[tuple[str, str], tuple[int, str, str]]  # which tree, folder, file


def _files(root: Path, folders: tuple[str, ...]) -> _Files:
    trees = [Tree(root / f) for f in folders if (root / f).is_dir()]
    found: dict[tuple[str, str], tuple[int, str, str]] = {}
    for i, tree in enumerate(trees):
        for place in (".", *tree.folders()):
            by_suffix = sorted((f for f in tree.files(place) if _is_video(f)), key=_rank)
            for file in by_suffix:
                key = "" if place == "." else _key(place)
                found.setdefault((key, os.path.splitext(file)[0]), (i, place, file))
    return _Files(trees, found)


def _find(files: _Files, clip: _Clip) -> Path | None:
    at = files.found.get((_key(clip.label), clip.stem)) or files.found.get(("", clip.stem))
    if at is None:
        return None
    tree, place, file = files.trees[at[0]], at[1], at[2]
    try:
        return tree.root.joinpath(place, file) if tree.real(place, file) else None
    except ValueError as error:
        raise ValueError(f"{clip.at}: {error}") from error


def _is_video(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in _SUFFIXES and not file.startswith(".")


def _rank(file: str) -> tuple[int, str]:
    return _SUFFIXES.index(os.path.splitext(file)[1].lower()), file


@cache
def _key(label: str) -> str:
    """What a class's name and its folder's have in common: letters and digits, in lower case."""
    return re.sub(r"[\W_]+", "", label.casefold())
