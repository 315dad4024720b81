"""HMDB51: 6,766 clips of films and internet videos in 51 classes of action, as its authors ship it.

Kuehne et al., "HMDB: A Large Video Database for Human Motion Recognition", ICCV 2011.
"""

import re
from pathlib import Path

from .base import Dataset
from .paths import Tree, folder_with
from .videos import Entry, numbered_lines, official, official_split

_LISTS = (
    *(".", "testTrainMulti_7030_splits", "test_train_splits"),
    "test_train_splits/testTrainMulti_7030_splits",
)
_VIDEOS = ("hmdb51_org", "hmdb51")
_LINE = re.compile(r"([^/\\\0]+[.]avi)\s+([012])")
_ABOUT = re.compile(r"_[a-z]+_[a-z]+_np[0-9]+_[a-z]+_[a-z]+_[0-9]+[.]avi\Z")  # visible part, camera, .., number
_SPLIT = {"1": "train", "2": "test"}


def hmdb51(root: Path, *, val_share: float, split: int = 1, decoder: str = "auto", verify: bool = True) -> Dataset:
    """Class folders in ``ROOT/hmdb51_org``, ``ROOT/hmdb51`` or ``ROOT``; split files where their archive unpacks them.

    These are ``CLASS_test_splitN.txt`` in ``ROOT``, ``ROOT/testTrainMulti_7030_splits`` or ``ROOT/test_train_splits``
    (``/testTrainMulti_7030_splits``): ``NAME.avi 1`` for training, ``2`` for the test, ``0`` for neither, which leaves a
    video out. Classes are those that have such a file, sorted.

    There is no official validation split: ``val_share`` of each class's training videos, whole recordings. A recording is
    what a name says before ``_CLASS_``: in the official splits no test clip shares it with a training clip of its class. One
    film may show several classes, and be on both sides with different ones, there as here.

    Raises:
        ValueError: no such layout, a malformed line, a folder of videos that has no split file, a video that is missing,
            named twice, or outside of the folder; names the line.
    """
    official_split("hmdb51", split)
    suffix = f"_test_split{split}.txt"
    lists = folder_with(root, _LISTS, f"*{suffix}")
    if lists is None:
        raise ValueError(f"data.root: there is no CLASS{suffix} in {root}, nor in {' or '.join(_LISTS[1:])}")
    classes = tuple(sorted(p.name.removesuffix(suffix) for p in lists.glob(f"*{suffix}")))
    folder = next((root / f for f in _VIDEOS if (root / f).is_dir()), root)
    tree = Tree(folder)
    for name in tree.folders():
        if name not in classes and any(f.endswith(".avi") for f in tree.files(name)):
            raise ValueError(f"data.root: {folder / name} holds videos, and there is no {lists / (name + suffix)}")
    entries = [
        entry
        for label, name in enumerate(classes)
        for at, text in numbered_lines(lists / (name + suffix))
        if (entry := read_line(text, name, label, at))
    ]
    return official("hmdb51", folder, classes, entries, val_share, decoder, split)


def read_line(text: str, name: str, label: int, at: str) -> Entry | None:
    """``NAME.avi`` and 0, 1 or 2; None for 0.

    Args:
        text: the line.
        name: of the class.
        label: its index.
        at: what to call the line in messages.

    Raises:
        ValueError: it is malformed.
    """
    match = _LINE.fullmatch(text)
    if match is None:
        raise ValueError(f"{at}: a file's name that ends in .avi, and 0, 1 or 2, are expected, not {text[:120]!r}")
    if match[2] == "0":
        return None
    return Entry(_SPLIT[match[2]], label, match[1], recording(match[1], name), at)


def recording(file: str, name: str) -> str:
    """What a video of the class ``name`` was cut from: its name before ``_CLASS_..``; all of it where that is not there."""
    about = _ABOUT.search(file)
    before = file[: about.start()] if about else ""
    return before.removesuffix(f"_{name}") if before.endswith(f"_{name}") else file
