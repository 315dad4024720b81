"""Places365: 1,803,460 + 36,500 photographs of 365 kinds of places, in the layouts that its authors ship.

Zhou et al., "Places: A 10 Million Image Database for Scene Recognition", TPAMI 2018.
"""

import re
from collections import Counter
from pathlib import Path

from .base import Dataset, checked
from .many import Group, check_count, grouped, images_by_class, look

_LISTS = (".", "filelist_places365-standard", "filelist_places365-challenge")
_KINDS = ("standard", "challenge")  # the first that is there counts
_CATEGORIES = "categories_places365.txt"
_VAL_LIST = "places365_val.txt"
_MD5 = {
    "categories_places365.txt": "06c963b85866bd0649f97cb43dd16673",
    "places365_train_standard.txt": "30f37515461640559006b8329efbed1a",
    "places365_train_challenge.txt": "b2931dc997b8c33c27e7329c073a6b57",
    "places365_val.txt": "e9f2fd57bfd9d07630173f4e8708e4b1",
}
_CATEGORY = re.compile(r"(/[a-z]/[0-9a-z_]+(?:/[0-9a-z_]+)*)\s+([0-9]{1,6})")
_PUBLISHED = {"classes": 365, "train": 1_803_460, "val": 36_500}


def places365(root: Path, *, val_share: float, verify: bool = True) -> Dataset:
    """The official lists and folders, or the "easy format", which has class folders.

    Official: ``categories_places365.txt``, ``places365_train_standard.txt`` (or else ``places365_train_challenge.txt``) and
    ``places365_val.txt`` in ``ROOT`` or ``ROOT/filelist_places365-standard`` (``-challenge``). Training images in
    ``data_256_standard`` or ``data_256``, validation images then in ``val_256``; or in ``data_large_standard`` or
    ``data_large``, and ``val_large`` (``_challenge`` with its list); or in ``train/a/..``, and ``val``.

    Easy: ``ROOT/places365_standard/{train,val}/CLASS/*.jpg`` or ``ROOT/{train,val}/CLASS/*.jpg``, a category's ``/`` being
    ``-``. Classes are in the order of ``categories_places365.txt`` if it is there, else in that of the folders' names, which
    is the same for the names that the authors chose.

    Classes are called ``airfield``, ``apartment_building/outdoor``, .. (without ``/a/``). ``val`` is the test split (the
    official test has no labels), and ``val_share`` of ``train`` validates. ``verify``: lists are compared with the published
    checksums; the easy format has to have as many images as were published, where all 365 classes are there.

    Raises:
        ValueError: no such layout, a missing or malformed list, an unknown category, a number that is another category's, a
            listed image that is missing; names the line.
    """
    lists = {kind: path for kind in _KINDS if (path := _find(root, f"places365_train_{kind}.txt"))}
    kind, train_list = next(iter(lists.items()), ("", None))
    folders = _image_folders(root, (kind,) if kind else _KINDS)
    if train_list and folders:
        return _official(root, train_list, *folders, val_share, verify)
    base = next((b for b in (root / "places365_standard", root) if _class_folders(b / "train")), None)
    if base is not None:
        return _easy(root, base, val_share, verify)
    if folders:
        raise ValueError(
            f"data.root: there is no places365_train_standard.txt in {root}, nor in {', '.join(_LISTS[1:])}"
        )
    raise ValueError(
        f"data.root: {root} has no training images: data_256_standard, data_256, data_large_standard, data_large "
        "or train, or places365_standard/train with class folders"
    )


def _find(root: Path, name: str) -> Path | None:
    return next((root / f / name for f in _LISTS if (root / f / name).is_file()), None)


def _image_folders(root: Path, kinds: tuple[str, ...]) -> tuple[Path, Path] | None:
    """Where the training images of the official layout are, and where the validation images of the same size should be."""
    for size in ("256", "large"):
        for folder in (*(f"data_{size}_{kind}" for kind in kinds), f"data_{size}"):
            if (root / folder).is_dir():
                return root / folder, root / f"val_{size}"
    if (root / "train").is_dir() and not _class_folders(root / "train"):
        return root / "train", root / "val"
    return None


def _class_folders(train: Path) -> bool:
    """Whether a folder holds class folders, as the easy format has them; the official layout has ``a``, ``b``, .. ."""
    return train.is_dir() and any(len(name) > 1 for name in look(train)[0])


def _official(root: Path, train_list: Path, train: Path, val: Path, val_share: float, verify: bool) -> Dataset:
    categories_path, val_list = _find(root, _CATEGORIES), _find(root, _VAL_LIST)
    if categories_path is None or val_list is None:
        missing = _CATEGORIES if categories_path is None else _VAL_LIST
        raise ValueError(f"data.root: there is no {missing} in {root}, nor in {', '.join(_LISTS[1:])}")
    if not val.is_dir():
        raise ValueError(f"data.root: there is no folder {val}, for the validation images that belong to {train.name}")
    label_by_category = read_categories(categories_path, verify)
    files_by_label = _read(train_list, label_by_category, verify, in_folders=True)
    train_groups = []
    for category, label in label_by_category.items():
        files = files_by_label.get(label, [])
        if files:
            _check_files(train / category[1:], files, train_list, f"{category}/")
            train_groups.append(Group(label, train / category[1:], sorted(files)))
    files_by_label = _read(val_list, label_by_category, verify, in_folders=False)
    _check_files(val, [file for files in files_by_label.values() for file in files], val_list, "")
    val_groups = [Group(label, val, sorted(files_by_label[label])) for label in sorted(files_by_label)]
    classes = tuple(category[3:] for category in label_by_category)
    return grouped("places365", root, classes, {"train": train_groups, "val": val_groups}, val_share)


def _easy(root: Path, base: Path, val_share: float, verify: bool) -> Dataset:
    files = {split: images_by_class(base / split) for split in ("train", "val")}
    path = _find(root, _CATEGORIES) or _find(base, _CATEGORIES)
    if path is None:
        label_by_name = {name: label for label, name in enumerate(files["train"])}
        right = f"one of the {len(label_by_name)} that train has"
    else:
        label_by_name = {c[3:].replace("/", "-"): label for c, label in read_categories(path, verify).items()}
        right = f"one of the {len(label_by_name)} in {path}"
    groups_by_split: dict[str, list[Group]] = {}
    for split, files_by_name in files.items():
        for name in files_by_name:
            if name not in label_by_name:
                raise ValueError(f"data.root: the class folder {base / split / name} is not {right}")
        groups_by_split[split] = [
            Group(label, base / split / n, files_by_name[n]) for n, label in label_by_name.items() if n in files_by_name
        ]
        if verify and len(files["train"]) == _PUBLISHED["classes"]:
            check_count(base / split, sum(map(len, files_by_name.values())), _PUBLISHED[split])
    classes = tuple(name.replace("-", "/") for name in label_by_name)
    return grouped("places365", root, classes, groups_by_split, val_share)


def read_categories(path: Path, verify: bool) -> dict[str, int]:
    """Class indices by category (``/a/airfield``), in their order.

    Raises:
        ValueError: it is not the published file and ``verify`` is set, a malformed line, a category or a number that is there
            twice or left out; names the line.
    """
    label_by_category: dict[str, int] = {}
    seen: set[int] = set()
    for number, line in enumerate(_text(path, verify).split("\n"), start=1):
        if not line.strip():
            continue
        match = _CATEGORY.fullmatch(line.strip())
        if match is None:
            raise ValueError(
                f"{path}, line {number}: a category (/a/airfield) and its number are expected, not {line.strip()[:80]!r}"
            )
        if match[1] in label_by_category or int(match[2]) in seen:
            raise ValueError(f"{path}, line {number}: {line.strip()}: this category or number is there already")
        label_by_category[match[1]] = int(match[2])
        seen.add(int(match[2]))
    if not label_by_category or max(label_by_category.values()) != len(label_by_category) - 1:
        raise ValueError(
            f"{path}: categories are to be numbered 0, 1, .. without a gap; it has {len(label_by_category)}"
        )
    return dict(sorted(label_by_category.items(), key=lambda item: item[1]))


def _text(path: Path, verify: bool) -> str:
    content = checked(path, _MD5[path.name] if verify else None)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _read(path: Path, label_by_category: dict[str, int], verify: bool, in_folders: bool) -> dict[int, list[str]]:
    """The files of each class that a list names: ``/a/airfield/00000001.jpg 0`` a line, or ``Places365_val_00000001.jpg 165``.

    Raises:
        ValueError: as :func:`places365` does, but for files that are missing.
    """
    number_by_category = {c: str(label) for c, label in label_by_category.items()} if in_folders else {}
    files_by_number: dict[str, list[str]] = {str(label): [] for label in label_by_category.values()}
    for line, text in enumerate(_text(path, verify).split("\n"), start=1):
        image, _, number = text.strip().rpartition(" ")
        category, _, file = image.rpartition("/")
        if number_by_category.get(category) == number or (
            not in_folders and not category and number in files_by_number
        ):
            files_by_number[number].append(file)
        elif text.strip():
            raise ValueError(f"{path}, line {line}: {_wrong(text, category, number, number_by_category, in_folders)}")
    found = {int(number): files for number, files in files_by_number.items() if files}
    if not found:
        raise ValueError(f"{path} lists nothing")
    return found


def _wrong(text: str, category: str, number: str, number_by_category: dict[str, str], in_folders: bool) -> str:
    """What is wrong with a line of a list."""
    if not number.isdecimal() or (not category.startswith("/") if in_folders else category):
        like = "/a/airfield/00000001.jpg 0" if in_folders else "Places365_val_00000001.jpg 165"
        return f"an image and the number of its category are expected ({like}), not {text.strip()[:80]!r}"
    if not in_folders:
        return f"no category has the number {number} in {_CATEGORIES}"
    if category not in number_by_category:
        return f"the category {category} is not in {_CATEGORIES}"
    return f"{category} has the number {number_by_category[category]} in {_CATEGORIES}, not {number}"


def _check_files(folder: Path, files: list[str], path: Path, category: str) -> None:
    """Raises ``ValueError`` where a file that ``path`` lists is not in its folder, or is listed twice; names the line."""
    there = set(look(folder)[1]) if folder.is_dir() else set()
    if not there.issuperset(files):
        file = next(f for f in files if f not in there)
        count = len(set(files) - there)
        raise ValueError(
            f"{path}, line {_lines_of(path, category + file)[0]}: there is no file {folder / file}; {count:,} of "
            f"{len(files):,} are missing in that folder"
        )
    if len(set(files)) < len(files):
        file = next(f for f, times in Counter(files).items() if times > 1)
        first, second, *_ = _lines_of(path, category + file)
        raise ValueError(f"{path}, line {second}: {category}{file} is there already, in line {first}")


def _lines_of(path: Path, image: str) -> list[int]:
    lines = enumerate(_text(path, verify=False).split("\n"), start=1)
    return [line for line, text in lines if text.strip().rpartition(" ")[0] == image]
