"""Images named in a list: ``list.csv`` or ``list.jsonl``. Also what other data sets need to name classes and part splits."""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np

from .base import Dataset, Files, split_off

Label = int | str

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_MAX_CLASSES = 100_000  # of integers without a classes.txt: a label beyond is a mistake, not a class
_SPLITS = ("train", "val", "test")
_FIELDS = {"path", "label", "labels", "split"}


def listed(root: Path, *, val_share: float, verify: bool = True) -> Dataset:
    """``ROOT/list.csv`` or ``ROOT/list.jsonl``, or ``ROOT`` is that file; paths in it are relative to its folder.

    CSV: a header with ``path``, ``label`` and perhaps ``split`` (train, val, test); other columns are not looked at.
    JSONL: an object a line with the same keys. ``labels`` instead of ``label`` makes the data set multi-label: a list in
    JSONL, separated by ``|`` in CSV. Labels are class names or integers. Names and order of the classes are those of
    ``classes.txt`` beside the list (one a line); without it ``0`` .. ``n-1`` for integers, sorted for names, and only
    classes that training images have. Splits that are not given are parted off as ``folder`` does it.

    Raises:
        ValueError: a list that cannot be parsed, a missing column, an unknown split or label, a path that is there twice
            or leaves the folder (by ``..`` or a symbolic link), missing files; names the line.
    """
    path = _list_file(root)
    lines, names, labels_N, split_N = _parse(path)
    paths = _checked_paths(path, lines, names)
    given = {"train": np.arange(len(paths))}
    if split_N is not None:
        place_N = np.array([_SPLITS.index(s) for s in split_N])
        given = {s: np.flatnonzero(place_N == i) for i, s in enumerate(_SPLITS) if (place_N == i).any()}
    if "train" not in given:
        raise ValueError(f"{path}: no line has the split train")
    multi = isinstance(labels_N[0], list)
    classes, targets_N = name_labels(labels_N, given["train"], path.parent, lambda i: f"{path}, line {lines[i]}")
    stratum_N = np.zeros(len(paths), dtype=np.int64) if multi else targets_N
    return Dataset("list", classes, targets_N, Files(paths), complete_splits(stratum_N, given, val_share), str(path))


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
    named = _classes(folder / "classes.txt")
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


def _classes(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    names = tuple(line.strip() for line in read_text(path).split("\n") if line.strip())
    twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
    if twice or not names:
        raise ValueError(f"{path}: {f'the class {twice[0]!r} is there twice' if twice else 'it names no class'}")
    return names


def _list_file(root: Path) -> Path:
    if root.is_file():
        if root.suffix.lower() not in (".csv", ".jsonl"):
            raise ValueError(f"data.root: {root} is no list: its name has to end in .csv or .jsonl")
        return root
    found = [root / name for name in ("list.csv", "list.jsonl") if (root / name).is_file()]
    if len(found) != 1:
        has = "has both list.csv and list.jsonl: name one of them" if found else "has no list.csv and no list.jsonl"
        raise ValueError(f"data.root: {root} {has}")
    return found[0]


def _parse(path: Path) -> tuple[list[int], list[str], list[Label | list[Label]], list[str] | None]:
    """Line numbers, paths, labels and splits (None where the list has none)."""
    rows = (_csv if path.suffix.lower() == ".csv" else _jsonl)(path)
    lines, names, labels, splits = [], [], [], []
    fields: set[str] = set()
    for line, row in rows:
        at = f"{path}, line {line}"
        if not fields:
            fields = _FIELDS & row.keys()
            if "path" not in fields or len(fields & {"label", "labels"}) != 1:
                raise ValueError(
                    f"{at}: there have to be path and either label or labels, not {', '.join(map(str, row))}"
                )
        if fields != _FIELDS & row.keys():
            raise ValueError(f"{at}: it has {sorted(_FIELDS & row.keys())}, and the first has {sorted(fields)}")
        if not isinstance(row["path"], str) or not row["path"]:
            raise ValueError(f"{at}: path is to be a text, not {row['path']!r}")
        if "split" in fields and row["split"] not in _SPLITS:
            raise ValueError(f"{at}: the split {row['split']!r} is not train, val or test")
        label = row["label"] if "label" in fields else row["labels"]
        if "label" in fields and not is_label(label):
            raise ValueError(f"{at}: label is to be an integer or a class name, not {label!r}")
        if "labels" in fields and not (isinstance(label, list) and all(map(is_label, label))):
            raise ValueError(f"{at}: labels is to be a list of integers or class names, not {label!r}")
        lines.append(line)
        names.append(row["path"])
        labels.append([_stripped(x) for x in label] if isinstance(label, list) else _stripped(label))
        splits.append(row.get("split", ""))
    if not lines:
        raise ValueError(f"{path} lists no images")
    return lines, names, labels, splits if "split" in fields else None


def _stripped(label: Label) -> Label:
    return label.strip() if isinstance(label, str) else label


def _csv(path: Path) -> Iterator[tuple[int, dict]]:
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
                    raise ValueError(f"{path}, line {reader.line_num}: a column is there twice: {', '.join(header)}")
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} fields, and the header has {len(header)} "
                    f"({', '.join(header)})"
                )
            row: dict = dict(zip(header, cells, strict=True))
            row |= {k: row[k].strip() for k in ("label", "split") if k in row}
            if "labels" in row:
                row["labels"] = [c for c in row["labels"].split("|") if c.strip()]
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {line}: it is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {line}: an object is expected, not {text.strip()[:40]}")
        yield line, row


def _checked_paths(path: Path, lines: list[int], names: list[str]) -> list[Path]:
    """The files, all of them there, all different, all below the list's folder."""
    folder = path.parent
    top = folder.resolve()

    def inside(place: Path, row: int) -> Path:
        resolved = Path(os.path.realpath(place))
        if not resolved.is_relative_to(top):
            raise ValueError(f"{path}, line {lines[row]}: {names[row]} leads out of {folder}, to {resolved}")
        return resolved

    @cache
    def content(resolved: Path) -> dict[str, bool]:
        """Names of the files and symbolic links in a folder, and which of both each is."""
        try:
            with os.scandir(resolved) as entries:
                return {e.name: e.is_symlink() for e in entries if e.is_symlink() or e.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise ValueError(f"{path}: cannot read the folder {resolved}: {error.strerror}") from error

    parents: dict[PurePosixPath, Path] = {}
    seen: dict[str, int] = {}
    paths, missing = [], []
    for row, text in enumerate(names):
        name = PurePosixPath(text)
        if name.is_absolute() or ".." in name.parts or "\0" in text:
            raise ValueError(f"{path}, line {lines[row]}: {text!r} is not a path below {folder}: no '/' first, no '..'")
        if name.parent not in parents:
            parents[name.parent] = inside(folder / name.parent, row)
        file, link = parents[name.parent] / name.name, content(parents[name.parent]).get(name.name)
        file = inside(file, row) if link else file
        if link is None or (link and not file.is_file()):
            missing.append(row)
            continue
        key = str(file)
        if key in seen:
            raise ValueError(f"{path}, line {lines[row]}: {text} is there already, in line {lines[seen[key]]}")
        seen[key] = row
        paths.append(folder / name)
    if missing:
        raise ValueError(
            f"{path}, line {lines[missing[0]]}: there is no file {folder / names[missing[0]]}; "
            f"{len(missing)} of {len(names)} are missing"
        )
    return paths
