"""Images named in a list: ``list.csv`` or ``list.jsonl``."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from .base import Dataset, Files
from .labels import Label, complete_splits, csv_rows, is_label, name_labels, printed, read_text
from .paths import Tree

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
    return read_list("list", root, val_share, Files)


def read_list(name: str, root: Path, val_share: float, read: Callable[[list[Path]], Callable]) -> Dataset:
    """The data set ``name`` of a list as :func:`listed` describes it; ``read`` makes ``Dataset.read`` from the paths."""
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
    return Dataset(name, classes, targets_N, read(paths), complete_splits(stratum_N, given, val_share), str(path))


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
    rows = (csv_rows if path.suffix.lower() == ".csv" else _jsonl)(path)
    lines, names, labels, splits = [], [], [], []
    fields: set[str] = set()
    for line, row in rows:
        at = f"{path}, line {line}"
        if not fields:
            fields = _FIELDS & row.keys()
            if "path" not in fields or len(fields & {"label", "labels"}) != 1:
                raise ValueError(
                    f"{at}: there have to be path and either label or labels, not {printed(', '.join(map(str, row)))}"
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
        raise ValueError(f"{path} lists nothing")
    return lines, names, labels, splits if "split" in fields else None


def _stripped(label: Label) -> Label:
    return label.strip() if isinstance(label, str) else label


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
    tree = Tree(folder)
    seen: dict[Path, int] = {}
    paths, missing = [], []
    for row, text in enumerate(names):
        at, name = f"{path}, line {lines[row]}", PurePosixPath(text)
        if name.is_absolute() or ".." in name.parts or "\0" in text:
            raise ValueError(f"{at}: {text!r} is not a path below {folder}: no '/' first, no '..'")
        try:
            real = tree.real(str(name.parent), name.name)
        except ValueError as error:
            raise ValueError(f"{at}: {error}") from error
        if real is None:
            missing.append(row)
        elif real in seen:
            raise ValueError(f"{at}: {printed(text)} is there already, in line {lines[seen[real]]}")
        else:
            seen[real] = row
            paths.append(folder / name)
    if missing:
        raise ValueError(
            f"{path}, line {lines[missing[0]]}: there is no file {printed(str(folder / names[missing[0]]))}; "
            f"{len(missing)} of {len(names)} are missing"
        )
    return paths
