"""Pascal VOC 2007 and 2012, as the devkit lays them out: which of 20 classes each photograph shows."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from .base import Dataset, Files
from .labels import complete_splits, read_text

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_PLACE = {name: i for i, name in enumerate(CLASSES)}
_ID = re.compile(r"[0-9A-Za-z_]+")
_MAX_XML = 1 << 20  # bytes; the largest published annotation has a few thousand


def voc(root: Path, *, val_share: float, verify: bool = True) -> Dataset:
    """``ROOT/VOCdevkit/VOC2007`` and ``VOC2012``, ``ROOT/VOC2007`` .., or ``ROOT`` with ``JPEGImages`` itself.

    Two years are joined, split by split. Targets are float32 [N, 20], from ``Annotations/ID.xml``: 1 for a class of which
    the photograph has an object that is not ``difficult``, -1 (not counted, as in the devkit) where it has only difficult
    ones, 0 otherwise. Splits are those of ``ImageSets/Main/{train,val,test}.txt``. Without a ``test.txt``, ``val`` is the
    test split and ``val_share`` of ``train``, a plain random part, validates.

    Raises:
        ValueError: no such layout, a missing or damaged annotation, a missing image, an image in two splits.
    """
    paths: list[Path] = []
    targets: list[np.ndarray] = []
    given: dict[str, list[int]] = {}
    for year in _years(root):
        for split, ids in _ids(year).items():
            given.setdefault(split, []).extend(range(len(paths), len(paths) + len(ids)))
            paths += [year / "JPEGImages" / f"{i}.jpg" for i in ids]
            targets += [_shown(year / "Annotations" / f"{i}.xml", split) for i in ids]
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
    place: dict[str, Path] = {}
    for split in ("train", "val", "test"):
        path = year / "ImageSets/Main" / f"{split}.txt"
        if split != "train" and not path.is_file():
            continue
        out[split] = [line.strip() for line in read_text(path).split("\n") if line.strip()]
        if not out[split]:
            raise ValueError(f"{path} names no images")
        for i in out[split]:
            if not _ID.fullmatch(i):
                raise ValueError(f"{path}: {i!r} is no image id: letters, digits and _ only, one a line")
            if i in place:
                raise ValueError(f"{path}: the image {i} is already in {place[i].name}")
            place[i] = path
    return out


def _shown(path: Path, split: str) -> np.ndarray:
    """float32 [20]: 1 shown, -1 shown by difficult objects only, 0 not shown."""
    if not path.is_file():
        more = "; without ImageSets/Main/test.txt val is the test split" if split == "test" else ""
        raise ValueError(f"there is no annotation {path}, for an image of {split}{more}")
    if path.stat().st_size > _MAX_XML:
        raise ValueError(f"{path}: an annotation has at most {_MAX_XML} bytes, not {path.stat().st_size}")
    text = read_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError(f"{path}: an annotation has no DTD and no entities; this one is refused")
    try:
        objects = ElementTree.fromstring(text).findall("object")
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    out = np.zeros(len(CLASSES), dtype=np.float32)
    for item in objects:
        name = item.findtext("name", "").strip()
        if name not in _PLACE:
            raise ValueError(f"{path}: the object {name!r} is none of the 20 classes of Pascal VOC")
        if item.findtext("difficult", "0").strip() != "1":
            out[_PLACE[name]] = 1
        elif out[_PLACE[name]] == 0:
            out[_PLACE[name]] = -1
    return out
