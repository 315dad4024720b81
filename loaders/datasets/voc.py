"""Pascal VOC 2007 and 2012, as the devkit lays them out: which of 20 classes each photograph shows."""

import re
from collections.abc import Iterator
from pathlib import Path
from xml.parsers import expat

import numpy as np

from .base import Dataset, Files
from .labels import complete_splits

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_PLACE = {name: i for i, name in enumerate(CLASSES)}
_ID = re.compile(r"[0-9A-Za-z_]+")
_LIST_VALUES = {"1": 1, "-1": 0, "0": -1}  # in the devkit's list of a class -> target
_MAX_XML = 1 << 20  # bytes; the largest published annotation has a few thousand


def voc(root: Path, *, val_share: float, verify: bool = True) -> Dataset:
    """``ROOT/VOCdevkit/VOC2007`` and ``VOC2012``, ``ROOT/VOC2007`` .., or ``ROOT`` with ``JPEGImages`` itself.

    Two years are joined, split by split. Targets are float32 [N, 20], from ``Annotations/ID.xml``: 1 for a class of which
    the photograph has an object that is not ``difficult``, -1 (not counted, as in the devkit) where it has only difficult
    ones, 0 otherwise. Splits are those of ``ImageSets/Main/{train,val,test}.txt``. Without a ``test.txt``, ``val`` is the
    test split and ``val_share`` of ``train``, a plain random part, validates.

    Args:
        root: where the data set lies.
        val_share: see above.
        verify: compare the annotations with the devkit's lists ``ImageSets/Main/CLASS_SPLIT.txt``, those that are there.

    Raises:
        ValueError: no such layout, a missing split, image or annotation, an image in two splits, and, with the line, a
            damaged list, an annotation that is damaged, has no object or one of another class, or differs from the lists.
    """
    paths: list[Path] = []
    targets: list[np.ndarray] = []
    given: dict[str, list[int]] = {}
    for year in _years(root):
        for split, ids in _ids(year).items():
            given.setdefault(split, []).extend(range(len(paths), len(paths) + len(ids)))
            paths += [year / "JPEGImages" / f"{i}.jpg" for i in ids]
            shown_M = [_shown(year / "Annotations" / f"{i}.xml", split) for i in ids]
            if verify:
                _compare_lists(year, split, ids, np.stack(shown_M))
            targets += shown_M
    there = {folder: {p.name for p in folder.iterdir()} for folder in {p.parent for p in paths}}
    missing = [p for p in paths if p.name not in there[p.parent]]
    if missing:
        raise ValueError(f"there is no image {missing[0]}; {len(missing)} of {len(paths)} are missing")
    splits = complete_splits(
        np.zeros(len(paths), dtype=np.int64), {k: np.array(v, dtype=np.int64) for k, v in given.items()}, val_share
    )
    return Dataset("voc", CLASSES, np.stack(targets), Files(paths), splits, str(root))


def _years(root: Path) -> list[Path]:
    parts = ("JPEGImages", "Annotations", "ImageSets/Main")
    for found in (
        [root / "VOCdevkit" / y for y in ("VOC2007", "VOC2012")],
        [root / y for y in ("VOC2007", "VOC2012")],
        [root],
    ):
        years = [y for y in found if (y / "ImageSets").is_dir() or (y / "JPEGImages").is_dir()]
        for year in years:
            lacks = [p for p in parts if not (year / p).is_dir()]
            if lacks:
                raise ValueError(f"data.root: {year} has no folder {lacks[0]}; the devkit has {', '.join(parts)}")
        if years:
            return years
    raise ValueError(
        f"data.root: {root} has no VOCdevkit/VOC2007 or VOCdevkit/VOC2012, no VOC2007 or VOC2012, and no {parts[0]}"
    )


def _ids(year: Path) -> dict[str, list[str]]:
    """Image ids by split, for the splits that are there."""
    out: dict[str, list[str]] = {}
    place: dict[str, str] = {}
    for split in ("train", "val", "test"):
        path = year / "ImageSets/Main" / f"{split}.txt"
        if not path.is_file():
            if split == "test":
                continue
            raise ValueError(
                f"data.root: there is no {path}: the devkit has train.txt and val.txt in ImageSets/Main, and test.txt "
                "with the test images of 2007"
            )
        out[split] = []
        for number, name in _lines(path):
            if not _ID.fullmatch(name):
                raise ValueError(
                    f"{path}, line {number}: {name!r} is no image id: letters, digits and _ only, one a line"
                )
            if name in place:
                raise ValueError(f"{path}, line {number}: the image {name} is already in {place[name]}")
            place[name] = f"{path.name}, line {number}"
            out[split].append(name)
        if not out[split]:
            raise ValueError(f"{path} names no images")
    return out


def _shown(path: Path, split: str) -> np.ndarray:
    """float32 [20]: 1 shown, -1 shown by difficult objects only, 0 not shown."""
    if not path.is_file():
        more = "; without ImageSets/Main/test.txt val is the test split" if split == "test" else ""
        raise ValueError(f"there is no annotation {path}, for an image of {split}{more}")
    if path.stat().st_size > _MAX_XML:
        raise ValueError(f"{path}: an annotation has at most {_MAX_XML} bytes, not {path.stat().st_size}")
    out = np.zeros(len(CLASSES), dtype=np.float32)
    for name, difficult in _Annotation(path).objects:
        if not difficult:
            out[_PLACE[name]] = 1
        elif out[_PLACE[name]] == 0:
            out[_PLACE[name]] = -1
    return out


class _Annotation:
    """Reads an annotation, by a parser that knows the lines.

    Attributes:
        objects: class of each ``<object>`` and whether it is difficult, in their order.

    Raises:
        ValueError: it is damaged, has no object, or one that is none of the classes; names the line.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.depth, self.text = path, 0, ""
        self.objects: list[tuple[str, bool]] = []
        self.object: dict[str, str] | None = None  # the one that is being read
        self.object_line = 0
        self.parser = expat.ParserCreate("utf-8")
        self.parser.buffer_text = True
        self.parser.StartElementHandler, self.parser.EndElementHandler = self.start, self.end
        self.parser.StartDoctypeDeclHandler = self.doctype
        try:
            self.parser.Parse(_bytes(path), True)
        except expat.ExpatError as error:
            raise ValueError(f"{path}, line {error.lineno}: {expat.ErrorString(error.code)}") from error
        del self.parser

    def error(self, what: str, line: int = 0) -> ValueError:
        return ValueError(f"{self.path}, line {line or self.parser.CurrentLineNumber}: {what}")

    def doctype(self, *_: object) -> None:
        raise self.error("an annotation has no DTD and no entities; this one is refused")

    def start(self, tag: str, _: dict[str, str]) -> None:
        self.depth += 1
        if self.depth == 1 and tag != "annotation":
            raise self.error(f"the outermost element is to be <annotation>, not <{tag}>")
        if self.depth == 2 and tag == "object":
            self.object, self.object_line = {}, self.parser.CurrentLineNumber
        elif self.depth == 3 and self.object is not None and tag in ("name", "difficult"):
            if tag in self.object:
                raise self.error(f"the object has a <{tag}> already")
            self.text, self.parser.CharacterDataHandler = "", self.characters

    def characters(self, text: str) -> None:
        self.text += text

    def end(self, tag: str) -> None:
        self.depth -= 1
        if self.depth == 0 and not self.objects:
            raise self.error("the annotation has no object")
        if self.object is None:
            return
        if self.depth == 2 and self.parser.CharacterDataHandler is not None:
            self.object[tag], self.parser.CharacterDataHandler = self.text.strip(), None
        elif self.depth == 1:
            name, difficult = self.object.get("name", ""), self.object.get("difficult", "0")
            if name not in _PLACE:
                classes = f"none of the 20 classes of Pascal VOC ({', '.join(CLASSES)})"
                raise self.error(f"the object {name!r} is {classes}", self.object_line)
            if difficult not in ("0", "1"):
                raise self.error(f"difficult is to be 0 or 1, not {difficult!r}", self.object_line)
            self.objects.append((name, difficult == "1"))
            self.object = None


def _compare_lists(year: Path, split: str, ids: list[str], targets_MC: np.ndarray) -> None:
    """Compares the annotations of a split with the devkit's lists of each class, where there are some.

    Raises:
        ValueError: a list has other images or other values; names the line.
    """
    for name, target_M in zip(CLASSES, targets_MC.T.astype(int).tolist(), strict=True):
        path = year / "ImageSets/Main" / f"{name}_{split}.txt"
        if not path.is_file():
            continue
        left = dict(zip(ids, target_M, strict=True))
        for number, line in _lines(path):
            image, _, value = line.partition(" ")
            listed, shown = _LIST_VALUES.get(value.strip()), left.pop(image, None)
            if listed is None:
                raise ValueError(f"{path}, line {number}: {line!r} is not an image id and 1, 0 or -1")
            if shown is None:
                raise ValueError(f"{path}, line {number}: the image {image} is not in {split}.txt, or is here twice")
            if shown != listed:
                says = {1: "1 (shown)", 0: "-1 (not shown)", -1: "0 (only difficult ones)"}
                raise ValueError(
                    f"{path}, line {number}: the list has {says[listed]} for {image}, and by Annotations/{image}.xml "
                    f"it is {says[shown]}; set data.verify to false if the annotations are right"
                )
        if left:
            raise ValueError(f"{path} lacks the image {next(iter(left))} of {split}.txt")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and content of each line that is not empty; what is not UTF-8 becomes a character that no list has."""
    for number, line in enumerate(_bytes(path).decode("utf-8-sig", errors="replace").split("\n"), 1):
        if stripped := line.strip():
            yield number, stripped


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
