"""What data sets that come with lists share: reading these, naming classes, completing splits."""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from .base import split_off

Label = int | str

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_MAX_CLASSES = 100_000  # of integers without a classes.txt: a label beyond is a mistake, not a class
_MAX_EMPTY = 1 << 22  # targets of a multi-label data set most of whose classes have none


def complete_splits(stratum_N: np.ndarray, given: dict[str, np.ndarray], val_share: float) -> dict[str, np.ndarray]:
    """``train``, ``val`` and ``test`` from those of them that a data set has; ``train`` has to be there.

    ``train`` alone: 20 % of it is parted off for the test. ``train`` and ``val``: ``val`` becomes the test. Without
    ``val``, or where it became the test, ``val_share`` of ``train`` is parted off for validation.

    Args:
        stratum_N: int64 [N], what to keep in proportion where images are parted off.
        given: ascending indices by split.
        val_share: of the training images.
    """
    splits = dict(given)
    if "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    train = splits["train"]
    if "test" not in splits:
        train, splits["test"] = split_off(stratum_N[train], train, 0.2, purpose=3)
    if "val" not in splits:
        train, splits["val"] = split_off(stratum_N[train], train, val_share, purpose=2)
    return {"train": train, "val": splits["val"], "test": splits["test"]}


def name_labels(
    labels_N: Sequence[Label | list[Label]], train_M: np.ndarray, folder: Path, where: Callable[[int], str]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Classes and targets (int64 [N]; float32 [N, C] for lists of labels) from labels as they were written.

    Args:
        labels_N: an integer or a class name for each sample, or a list of these for each.
        train_M: indices of the training samples: without ``FOLDER/classes.txt`` the classes are those that they have.
        folder: where ``classes.txt`` may be.
        where: index -> what to call the sample in messages.

    Raises:
        ValueError: a label that is no class; names the sample.
    """
    multi = isinstance(labels_N[0], list)
    rows: list[list[Label]] = [r if isinstance(r, list) else [r] for r in labels_N]
    named = _named_classes(folder / "classes.txt")
    if named is not None:
        found = {label for row in rows for label in row}
        texts = {label for label in found if isinstance(label, str)}
        classes, numbers = named, not texts <= set(named)
        right = (
            f"one of the {len(named)} classes in {folder / 'classes.txt'}, nor an integer from 0 to {len(named) - 1}"
        )
    else:
        found = {label for i in train_M.tolist() for label in rows[i]}
        if not found:
            raise ValueError(f"{folder}: no training sample has a label, and there is no classes.txt")
        numbers = all(isinstance(label, int) or _INTEGER.fullmatch(label) for label in found)
        if numbers:
            classes = tuple(map(str, range(min(max(map(int, found)) + 1, _MAX_CLASSES))))
            right = f"an integer from 0 to {len(classes) - 1}, as the training samples have"
        else:
            classes = tuple(sorted(label for label in found if isinstance(label, str)))
            right = f"one of the {len(classes)} class names that the training samples have"
        right += f" (all classes can be named in {folder / 'classes.txt'})"
    place = {name: i for i, name in enumerate(classes)}

    def index(label: Label, row: int) -> int:
        if isinstance(label, str):
            at = int(label) if numbers and _INTEGER.fullmatch(label) else place.get(label, -1)
        else:
            at = label if numbers or named is not None else -1
        if not 0 <= at < len(classes):
            raise ValueError(f"{where(row)}: the label {label!r} is not {right}")
        return at

    if not multi:
        return classes, np.array([index(row[0], i) for i, row in enumerate(rows)], dtype=np.int64)
    if len(rows) * len(classes) > _MAX_EMPTY and len(classes) > 16 * len(found):  # by one wrong number, say
        raise ValueError(
            f"{folder}: labels go to {len(classes) - 1}, and only {len(found)} different ones are there: write a list "
            "without gaps, or name the classes in a classes.txt that has no others"
        )
    targets_NC = np.zeros((len(rows), len(classes)), dtype=np.float32)
    for i, row in enumerate(rows):
        for label in row:
            targets_NC[i, index(label, i)] = 1
    return classes, targets_NC


def is_label(value: object) -> bool:
    """Whether a value from JSON is an integer or a non-empty text."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and bool(value.strip()))


def read_text(path: Path) -> str:
    """A UTF-8 file's content, without a byte order mark.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def printed(text: str) -> str:
    """A text from a file as a message can show it: in one line, and not all of a long one."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def csv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Line number and fields of each row; ``labels`` becomes a list."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True, skipinitialspace=True)
    try:
        header: list[str] = []
        for cells in reader:
            if not any(cells):
                continue
            if not header:
                header = [c.strip().lower() for c in cells]
                if len(set(header)) < len(header):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: a column is there twice: {printed(', '.join(header))}"
                    )
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} fields, and the header has {len(header)} "
                    f"({printed(', '.join(header))})"
                )
            row: dict = dict(zip(header, cells, strict=True))
            row |= {k: row[k].strip() for k in ("label", "split") if k in row}
            if "labels" in row:
                row["labels"] = [c for c in row["labels"].split("|") if c.strip()]
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _named_classes(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    names = tuple(line.strip() for line in read_text(path).split("\n") if line.strip())
    twice = sorted(n for n, times in Counter(names).items() if times > 1)
    if twice or not names:
        raise ValueError(f"{path}: {f'the class {twice[0]!r} is there twice' if twice else 'it names no class'}")
    return names
