"""ImageNet: the 1,281,167 + 50,000 photographs of ILSVRC2012 in 1000 classes, in the layouts they are handed on in.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", arXiv:1409.0575.
"""

import re
from pathlib import Path

import numpy as np

from .base import Dataset
from .labels import csv_rows, printed, read_text
from .many import Group, check_count, grouped, images_by_class, look

_KAGGLE = "ILSVRC/Data/CLS-LOC"
_DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_SOLUTION = "LOC_val_solution.csv"
_WNID = re.compile(r"n[0-9]{8}")
_VAL = re.compile(r"ILSVRC2012_val_([0-9]{8})[.]\w+")
_INTEGER = re.compile(r"[0-9]{1,9}")
_PUBLISHED = {"classes": 1000, "train": 1_281_167, "val": 50_000}
_MAX_META = 1 << 20  # bytes of meta.mat; the published one has far less
_FIELDS = ("ILSVRC2012_ID", "WNID", "num_children")


def imagenet(root: Path, *, val_share: float, verify: bool = True) -> Dataset:
    """``ROOT/train/WNID/*.JPEG`` and ``ROOT/val``, or both in ``ROOT/ILSVRC/Data/CLS-LOC`` as Kaggle packs them.

    ``val`` is sorted into folders (``val/WNID/*.JPEG``) or flat as published (``val/ILSVRC2012_val_00000001.JPEG``, ..).
    Labels of a flat one come from the development kit, unpacked to ``ROOT/ILSVRC2012_devkit_t12`` (its ``data`` has
    ``ILSVRC2012_validation_ground_truth.txt`` and ``meta.mat``), or else from Kaggle's ``ROOT/LOC_val_solution.csv``.

    Classes are the WordNet ids (n01440764, ..) that have a folder in ``train``, sorted: the order of torchvision's and timm's
    networks, which is not the one of the development kit's numbers. Any part of the 1000 will do. ``val`` is the
    test split (the official test has no labels), and ``val_share`` of ``train`` validates. ``verify``: where all
    1000 classes are there, there have to be as many images as were published.

    Raises:
        ValueError: no such layout, a folder that is no WordNet id or is empty, a validation image without label or
            of a class that ``train`` does not have, a label without image, or a damaged file; names the line.
    """
    images = next((root / f for f in (".", _KAGGLE) if (root / f / "train").is_dir()), None)
    if images is None:
        raise ValueError(f"data.root: there is no folder train in {root}, nor in {root / _KAGGLE}")
    train, val = images / "train", images / "val"
    if not val.is_dir():
        raise ValueError(f"data.root: there is no folder {val}, for the images of ILSVRC2012_img_val.tar")
    files_by_wnid = _by_wnid(train)
    classes = tuple(files_by_wnid)
    label_by_wnid = {wnid: label for label, wnid in enumerate(classes)}
    groups_by_split = {
        "train": [Group(label_by_wnid[w], train / w, files) for w, files in files_by_wnid.items()],
        "val": _validation(root, val, label_by_wnid),
    }
    if verify and len(classes) == _PUBLISHED["classes"]:
        for split, groups in groups_by_split.items():
            check_count(images / split, sum(len(g.files) for g in groups), _PUBLISHED[split])
    return grouped("imagenet", root, classes, groups_by_split, val_share)


def _by_wnid(folder: Path) -> dict[str, list[str]]:
    names, _ = look(folder)
    if not names and any(folder.glob("n*.tar")):
        raise ValueError(f"data.root: {folder} has no class folders: unpack each nXXXXXXXX.tar to a folder of its name")
    for name in names:
        if not _WNID.fullmatch(name):
            raise ValueError(f"data.root: the folder {folder / name} is not named by a WordNet id, as n01440764 is")
    return images_by_class(folder)


def _validation(root: Path, val: Path, label_by_wnid: dict[str, int]) -> list[Group]:
    folders, files = look(val)
    if folders and files:
        raise ValueError(f"data.root: {val} holds both images ({files[0]}, ..) and folders ({folders[0]}, ..)")
    if folders:
        files_by_wnid = _by_wnid(val)
        for wnid in files_by_wnid:
            if wnid not in label_by_wnid:
                raise ValueError(f"data.root: {val / wnid} is of a class that train does not have")
        return [Group(label_by_wnid[w], val / w, found) for w, found in files_by_wnid.items()]
    if not files:
        raise ValueError(f"data.root: {val} holds neither images nor class folders")
    file_by_number = _numbered(val, files)
    devkit, solution = root / _DEVKIT / "data", root / _SOLUTION
    if devkit.is_dir():
        source, wnid_by_number = devkit / _TRUTH, _official(devkit)
    elif solution.is_file():
        source, wnid_by_number = solution, read_solution(solution)
    else:
        packed = next((f" (unpack {p.name}, which is there)" for p in root.glob(f"{_DEVKIT}.tar*")), "")
        raise ValueError(
            f"data.root: {val} is not sorted into class folders, and nothing says what its images show: put the "
            f"development kit at {root / _DEVKIT}{packed} or Kaggle's {_SOLUTION} into {root}"
        )
    for number, (wnid, at) in wnid_by_number.items():
        if number not in file_by_number:
            raise ValueError(
                f"{at}: there is no image {val}/ILSVRC2012_val_{number:08}.JPEG; {len(wnid_by_number)} have a label "
                f"there, and {len(files)} images are here (sort them into class folders if they are a part)"
            )
        if wnid not in label_by_wnid:
            raise ValueError(f"{at}: the class {wnid} is none of the {len(label_by_wnid)} that have a folder in train")
    for number, file in file_by_number.items():
        if number not in wnid_by_number:
            raise ValueError(f"{source} says nothing of {val / file}; it is of {len(wnid_by_number)} images")
    files_by_label: dict[int, list[str]] = {}
    for number, file in file_by_number.items():
        files_by_label.setdefault(label_by_wnid[wnid_by_number[number][0]], []).append(file)
    return [Group(label, val, files_by_label[label]) for label in sorted(files_by_label)]


def _numbered(val: Path, files: list[str]) -> dict[int, str]:
    file_by_number: dict[int, str] = {}
    for file in files:
        match = _VAL.fullmatch(file)
        if match is None:
            raise ValueError(
                f"data.root: {val / file} is not named as a validation image is: ILSVRC2012_val_00000001.JPEG"
            )
        if file_by_number.setdefault(int(match[1]), file) != file:
            raise ValueError(
                f"data.root: {val / file} and {file_by_number[int(match[1])]} have one and the same number"
            )
    return file_by_number


def _official(devkit: Path) -> dict[int, tuple[str, str]]:
    """Class of each validation image by its number, and the line that says it."""
    wnid_by_id = read_meta(devkit / "meta.mat")
    out: dict[int, tuple[str, str]] = {}
    for number, line in enumerate(read_text(devkit / _TRUTH).rstrip().split("\n"), start=1):
        at, text = f"{devkit / _TRUTH}, line {number}", line.strip()
        wnid = wnid_by_id.get(int(text)) if _INTEGER.fullmatch(text) else None
        if wnid is None:
            raise ValueError(
                f"{at}: an ILSVRC2012_ID from {min(wnid_by_id)} to {max(wnid_by_id)} is expected, not {text[:40]!r}"
            )
        out[number] = wnid, at
    return out


def read_meta(path: Path) -> dict[int, str]:
    """WordNet ids by ILSVRC2012_ID, from the development kit's ``meta.mat``; of classes that have no sub-classes.

    Raises:
        ValueError: missing, damaged, or not what it should be.
    """
    from scipy.io import loadmat  # when it is asked for: slow to import

    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.stat().st_size > _MAX_META:
        raise ValueError(f"{path}: it has at most {_MAX_META} bytes, not {path.stat().st_size}")
    try:
        synsets = np.atleast_1d(loadmat(path, squeeze_me=True, variable_names=["synsets"])["synsets"])
        columns = zip(*(synsets[field] for field in _FIELDS), strict=True)
        rows = [(int(number), str(wnid)) for number, wnid, below in columns if not below]
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(
            f"cannot read {path}: {' '.join(str(error).split())[:200]} (it is to hold synsets with {', '.join(_FIELDS)}; "
            "unpack the kit again)"
        ) from error
    wnid_by_id = dict(rows)
    wrong = next((w for w in wnid_by_id.values() if not _WNID.fullmatch(w)), None)
    if wrong is not None or not rows or len(set(wnid_by_id.values())) < len(rows):
        why = f"{wrong!r} is no WordNet id" if wrong is not None else "its classes are not one for each number"
        raise ValueError(f"cannot read {path}: {why}")
    return wnid_by_id


def read_solution(path: Path) -> dict[int, tuple[str, str]]:
    """Class of each validation image by its number, and the line that says it, from Kaggle's list.

    Raises:
        ValueError: a malformed line, a missing column, an image that is there twice; names the line.
    """
    out: dict[int, tuple[str, str]] = {}
    for line, row in csv_rows(path):
        at = f"{path}, line {line}"
        if not {"imageid", "predictionstring"} <= row.keys():
            raise ValueError(
                f"{at}: there are to be columns ImageId and PredictionString, not {printed(', '.join(row))}"
            )
        match = _VAL.fullmatch(f"{row['imageid'].strip()}.JPEG")
        wnid = row["predictionstring"].strip().partition(" ")[0]
        if match is None or not _WNID.fullmatch(wnid):
            raise ValueError(
                f"{at}: an image (ILSVRC2012_val_00000001) and what begins with a WordNet id are expected, not "
                f"{row['imageid'][:40]!r} and {row['predictionstring'][:40]!r}"
            )
        if int(match[1]) in out:
            raise ValueError(f"{at}: {row['imageid']} is there already, in {out[int(match[1])][1]}")
        out[int(match[1])] = wnid, at
    if not out:
        raise ValueError(f"{path} lists nothing")
    return out
