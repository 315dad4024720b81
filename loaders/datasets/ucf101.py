"""UCF101: 13,320 clips of YouTube videos in 101 classes of action, as its authors ship it.

Soomro et al., "UCF101: A Dataset of 101 Human Actions Classes From Videos in The Wild", CRCV-TR-12-01, 2012.
"""

import re
from pathlib import Path

from .base import Dataset
from .paths import folder_with
from .videos import Entry, numbered_lines, official, official_split

_LISTS = (".", "ucfTrainTestlist", "UCF101TrainTestSplits-RecognitionTask/ucfTrainTestlist")
_VIDEOS = ("UCF-101", "UCF101")
_CLASS = re.compile(r"([0-9]{1,6})\s+([^\s/\\]+)")
_LINE = re.compile(r"([^\s/\\]+)/([^\s/\\]+_(g[0-9]+)_c[0-9]+[.]avi)(?:\s+([0-9]{1,6}))?")


def ucf101(root: Path, *, val_share: float, split: int = 1, decoder: str = "auto", verify: bool = True) -> Dataset:
    """Class folders in ``ROOT/UCF-101``, ``ROOT/UCF101`` or ``ROOT``; split files where their archive unpacks them.

    These are ``classInd.txt``, ``trainlist0N.txt`` and ``testlist0N.txt``, in ``ROOT``, ``ROOT/ucfTrainTestlist`` or
    ``ROOT/UCF101TrainTestSplits-RecognitionTask/ucfTrainTestlist``. Classes are in the order of ``classInd.txt``. The class
    of a video is the folder that its line names; capitals do not matter (the files and lists of ``HandstandPushups`` are
    not spelt alike), and a number behind it has to be that class's.

    There is no official validation split: ``val_share`` of each class's training videos, whole groups (``gNN`` in a name:
    clips of one recording; test clips are of other groups as published).

    Raises:
        ValueError: no such layout, a malformed line, an unknown class, a video that is missing, named twice, or outside of
            the folder; names the line.
    """
    official_split("ucf101", split)
    lists = folder_with(root, _LISTS, f"trainlist{split:02}.txt")
    if lists is None:
        raise ValueError(f"data.root: there is no trainlist{split:02}.txt in {root}, nor in {' or '.join(_LISTS[1:])}")
    classes = read_classes(lists / "classInd.txt")
    label_by_name = {name.casefold(): i for i, name in enumerate(classes)}
    entries = [
        read_line(text, part, label_by_name, at)
        for part in ("train", "test")
        for at, text in numbered_lines(lists / f"{part}list{split:02}.txt")
    ]
    folder = next((root / f for f in _VIDEOS if (root / f).is_dir()), root)
    return official("ucf101", folder, classes, entries, val_share, decoder, split)


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names from ``classInd.txt``: ``NUMBER NAME`` a line, numbers from 1 on in any order.

    Raises:
        ValueError: another line, a number or a name that is there twice, a number that is left out.
    """
    name_by_number: dict[int, str] = {}
    seen: set[str] = set()
    for at, text in numbered_lines(path):
        match = _CLASS.fullmatch(text)
        if match is None:
            raise ValueError(f"{at}: a number and a class name are expected, not {text[:80]!r}")
        if int(match[1]) in name_by_number or match[2].casefold() in seen:
            raise ValueError(f"{at}: {text}: this number or name is there already")
        name_by_number[int(match[1])] = match[2]
        seen.add(match[2].casefold())
    if not name_by_number or sorted(name_by_number) != list(range(1, len(name_by_number) + 1)):
        raise ValueError(f"{path}: classes are to be numbered 1, 2, .. without a gap; it has {len(name_by_number)}")
    return tuple(name_by_number[i + 1] for i in range(len(name_by_number)))


def read_line(text: str, split: str, label_by_name: dict[str, int], at: str) -> Entry:
    """``CLASS/v_CLASS_gNN_cNN.avi``, perhaps with the class's number, counted from 1.

    Args:
        text: the line.
        split: that it is of.
        label_by_name: class indices by name in lower case.
        at: what to call the line in messages.

    Raises:
        ValueError: it is malformed, the class is unknown, or the number is another class's.
    """
    match = _LINE.fullmatch(text)
    if match is None:
        raise ValueError(f"{at}: CLASS/NAME_gNN_cNN.avi, perhaps with a number, is expected, not {text[:120]!r}")
    label = label_by_name.get(match[1].casefold())
    if label is None:
        raise ValueError(f"{at}: the class {match[1]} is not in classInd.txt")
    if match[4] is not None and int(match[4]) != label + 1:
        raise ValueError(f"{at}: {match[1]} has the number {label + 1} in classInd.txt, not {match[4]}")
    return Entry(split, label, match[2], match[3], at)
