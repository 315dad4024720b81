"""ImageNet and Places365 as they lie on disk, and what is said of damaged ones. Most images here are empty files."""

import io
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from fasttrain.loaders import Dataset, LoaderSpec, choose_loader, open_dataset
from fasttrain.loaders.datasets.imagenet import read_meta
from fasttrain.loaders.datasets.many import Group, ManyFiles
from fasttrain.loaders.views import evaluation
from PIL import Image
from scipy.io import savemat

WNIDS = ("n02007558", "n01440764", "n03995372")  # in the order of the development kit's numbers
SHOWN = [2, 0, 1, 1, 0, 2, 2, 2, 0, 1]  # the validation images, by these
CATEGORIES = {"/d/desert/sand": 2, "/a/airfield": 0, "/d/desert_road": 3, "/b/bakery/shop": 1}
VAL = [3, 0, 0, 2, 1, 3]


def files(folder: Path, names: list[str]) -> None:
    """Empty files, in an order of their own: what a folder lists first is not what was meant to be first."""
    for name in random.Random(len(names)).sample(names, len(names)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(dataset: Dataset, split: str) -> list[str]:
    return [Path(dataset.read.name(i)).name for i in dataset.splits[split].tolist()]


def shown(dataset: Dataset, split: str) -> dict[str, str]:
    """Class by the file's name."""
    labels = [dataset.classes[t] for t in dataset.targets_N[dataset.splits[split]]]
    return dict(zip(names(dataset, split), labels, strict=True))


def assert_sound(dataset: Dataset, *sizes: int) -> None:
    assert list(dataset.splits) == ["train", "val", "test"]
    assert tuple(map(len, dataset.splits.values())) == sizes
    together = np.concatenate(list(dataset.splits.values()))
    assert together.dtype == dataset.targets_N.dtype == np.int64
    assert sorted(together) == list(range(len(dataset)))
    assert all((np.diff(v) > 0).all() for v in dataset.splits.values())
    assert all(Path(dataset.read.name(i)).is_file() for i in range(len(dataset)))


def refused(match: str, name: str, root: Path, **options) -> None:
    with pytest.raises(ValueError, match=match):
        open_dataset(name, root, **options)


# imagenet


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}.JPEG"


VAL_WNIDS = {val_name(i + 1): WNIDS[k] for i, k in enumerate(SHOWN)}


def meta(path: Path, wnids=WNIDS, **more) -> None:
    """Synsets 1, 2, .. without children, and one above them, which no image is of."""
    rows = [(i + 1, w, 0) for i, w in enumerate(wnids)] + [(len(wnids) + 1, "n00001740", len(wnids))]
    synsets = np.array(rows, dtype=[("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("num_children", "f8")])[:, None]
    savemat(path, {"synsets": synsets, "other": 1, **more})


def devkit(root: Path) -> Path:
    data = root / "ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    meta(data / "meta.mat")
    lines = "".join(f"{k + 1}\n" for k in SHOWN)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)
    return data


def solution(root: Path) -> Path:
    """Kaggle's list, whose order is its own."""
    rows = [f"{Path(n).stem},{w} 85 1 499 272 {w} 1 2 3 4 \r\n" for n, w in VAL_WNIDS.items()]
    path = root / "LOC_val_solution.csv"
    path.write_bytes(("ImageId,PredictionString\r\n" + "".join(random.Random(0).sample(rows, len(rows)))).encode())
    return path


def train(folder: Path, count: int = 10) -> None:
    files(folder / "train", [f"{w}/{w}_{i * 7}.JPEG" for w in WNIDS for i in range(count)])
    (folder / "train/ILSVRC2012_img_train.txt").touch()
    (folder / "train" / WNIDS[0] / "._n02007558_1.JPEG").touch()


def flat(folder: Path) -> None:
    files(folder / "val", list(VAL_WNIDS))


def test_imagenet_classes_are_sorted_wordnet_ids_not_the_kits_numbers(tmp_path):
    train(tmp_path)
    flat(tmp_path)
    devkit(tmp_path)
    dataset = open_dataset("imagenet", tmp_path)
    assert dataset.name == "imagenet" and dataset.classes == ("n01440764", "n02007558", "n03995372")
    assert dataset.classes != WNIDS  # what the numbers 1, 2, 3 mean
    assert_sound(dataset, 27, 3, 10)
    assert shown(dataset, "test") == VAL_WNIDS
    assert all(n.startswith(w) for s in ("train", "val") for n, w in shown(dataset, s).items())
    assert open_dataset("imagenet", tmp_path, val_share=0).splits["train"].tolist() == list(range(30))


@pytest.mark.parametrize("layout", ["flat", "sorted", "csv", "kaggle", "kit before csv", "links"])
def test_imagenet_layouts(tmp_path, layout):
    root = tmp_path / "set"
    folder = root / "ILSVRC/Data/CLS-LOC" if layout == "kaggle" else root
    train(tmp_path if layout == "links" else folder)
    if layout in ("sorted", "links"):
        files(folder / "val", [f"{w}/{n}" for n, w in VAL_WNIDS.items()])
    else:
        flat(folder)
        (solution if layout in ("csv", "kaggle") else devkit)(root)
    if layout == "kit before csv":
        (root / "LOC_val_solution.csv").write_text("ImageId\n")
    if layout == "links":  # as parts of ImageNet are often made
        (root / "train").mkdir()
        for wnid in WNIDS:
            (root / "train" / wnid).symlink_to(tmp_path / "train" / wnid)
    dataset = open_dataset("imagenet", root, val_share=0.2)
    assert_sound(dataset, 24, 6, 10)
    assert shown(dataset, "test") == VAL_WNIDS
    assert dataset.targets_N.tolist() == [0] * 10 + [1] * 10 + [2] * 10 + [0] * 3 + [1] * 3 + [2] * 4
    together = [Path(dataset.read.name(i)).name for i in range(len(dataset))]
    assert together[:3] == ["n01440764_0.JPEG", "n01440764_14.JPEG", "n01440764_21.JPEG"]
    assert together[30:] == sorted(VAL_WNIDS, key=lambda n: (VAL_WNIDS[n], n))
    assert pickle.loads(pickle.dumps(dataset)).identity() == dataset.identity()


def test_imagenet_knows_which_files_it_has(tmp_path):
    train(tmp_path)
    files(tmp_path / "val", [f"{w}/{n}" for n, w in VAL_WNIDS.items()])
    before = open_dataset("imagenet", tmp_path)
    place = tmp_path / "train" / WNIDS[0]
    (place / f"{WNIDS[0]}_7.JPEG").rename(place / f"{WNIDS[0]}_8.JPEG")
    after = open_dataset("imagenet", tmp_path)
    assert (before.targets_N == after.targets_N).all() and before.identity() != after.identity()


def test_opening_asks_for_no_file(tmp_path, monkeypatch):
    """As many calls of stat for 300 images as for 30: a million would take a minute otherwise, on a network more."""
    calls = []
    for part, count in (("few", 10), ("many", 100)):
        train(tmp_path / part, count)
        flat(tmp_path / part)
        devkit(tmp_path / part)
        real, seen = os.stat, []
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", lambda *a, real=real, seen=seen, **k: seen.append(a) or real(*a, **k))
            assert len(open_dataset("imagenet", tmp_path / part)) == 3 * count + 10
        calls.append(len(seen))
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (lambda ls: [*ls[:3], "4", *ls[4:]], r"truth\.txt, line 4: an ILSVRC2012_ID from 1 to 3 is expected, not '4'"),
        (lambda ls: [*ls[:3], "0", *ls[4:]], r"line 4: an ILSVRC2012_ID from 1 to 3 is expected, not '0'"),
        (lambda ls: [*ls[:3], "-1", *ls[4:]], r"line 4: an ILSVRC2012_ID from 1 to 3 is expected, not '-1'"),
        (lambda ls: [*ls[:3], "", *ls[4:]], r"line 4: an ILSVRC2012_ID from 1 to 3 is expected, not ''"),
        (lambda ls: [*ls[:3], "n01440764", *ls[4:]], "line 4: an ILSVRC2012_ID from 1 to 3 is expected, not 'n0144"),
        (lambda ls: [*ls, "1"], r"line 11: there is no image .*val.ILSVRC2012_val_00000011\.JPEG; 11 have .*, and 10 images"),
        (lambda ls: ls[:8], r"truth\.txt says nothing of .*val_00000009\.JPEG; it is of 8 images"),
        (lambda ls: [], r"truth\.txt, line 1: an ILSVRC2012_ID"),
    ],
)  # fmt: skip
def test_imagenet_ground_truth_that_is_wrong(tmp_path, line, match):
    train(tmp_path)
    flat(tmp_path)
    path = devkit(tmp_path) / "ILSVRC2012_validation_ground_truth.txt"
    path.write_text("\r\n".join([*line(path.read_text().splitlines()), ""]))
    refused(match, "imagenet", tmp_path)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("ILSVRC2012_val_00000011,n01440764 1 2 3 4", r"solution\.csv, line 3: there is no image .*00000011\.JPEG"),
        ("ILSVRC2012_val_00000001,n01440765 1 2 3 4", r"line \d+: ILSVRC2012_val_00000001 is there already, in .*, line 3"),
        ("ILSVRC2012_val_00000001,1 2 3 4", "line 3: an image .* and what begins with a WordNet id are expected, not '.*1 2"),
        ("../x,n01440764", "line 3: an image .* and what begins with a WordNet id are expected"),
        ("ILSVRC2012_val_00000001", "line 3: 1 fields, and the header has 2"),
    ],
)  # fmt: skip
def test_imagenet_kaggles_list_that_is_wrong(tmp_path, line, match):
    train(tmp_path)
    flat(tmp_path)
    path = solution(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    refused(match, "imagenet", tmp_path)


def test_imagenet_a_validation_image_of_an_unknown_class(tmp_path):
    train(tmp_path)
    flat(tmp_path)
    data = devkit(tmp_path)
    for path in sorted((tmp_path / "train/n01440764").iterdir()):
        path.unlink()
    refused(r"data\.root: the class folder .*n01440764 holds no images", "imagenet", tmp_path)
    (tmp_path / "train/n01440764").rmdir()
    refused(r"truth\.txt, line 3: the class n01440764 is none of the 2 .* in train", "imagenet", tmp_path)
    data.parent.rename(tmp_path / "unused")
    path = solution(tmp_path)
    refused(r"solution\.csv, line \d+: the class n01440764 is none of the 2", "imagenet", tmp_path)
    path.write_text("ImageId,Prediction\nILSVRC2012_val_00000001,n01440764\n")
    refused(
        "line 2: there are to be columns ImageId and PredictionString, not imageid, prediction", "imagenet", tmp_path
    )
    path.write_text("ImageId,PredictionString\n")
    refused(r"solution\.csv lists nothing", "imagenet", tmp_path)
    for file in (tmp_path / "val").iterdir():
        file.unlink()
    refused("val holds neither images nor class folders", "imagenet", tmp_path)
    files(tmp_path / "val", ["n01440764/ILSVRC2012_val_00000003.JPEG"])
    refused(r"val.n01440764 is of a class that train does not have", "imagenet", tmp_path)


def test_imagenet_folders_that_are_wrong(tmp_path, fasttrain):
    root = tmp_path / "set"
    root.mkdir()
    refused(r"data\.root: there is no folder train in .*, nor in .*ILSVRC/Data/CLS-LOC", "imagenet", root)
    (root / "train").mkdir()
    refused(r"there is no folder .*val, for the images of ILSVRC2012_img_val\.tar", "imagenet", root)
    flat(root)
    refused(r"data\.root: .*train has no class folders", "imagenet", root)
    (root / "train/n01440764.tar").touch()
    refused(r"unpack each nXXXXXXXX\.tar to a folder of its name", "imagenet", root)
    (root / "train/goldfish").mkdir()
    refused(r"the folder .*train.goldfish is not named by a WordNet id, as n01440764 is", "imagenet", root)
    (root / "train/goldfish").rmdir()
    train(root)
    refused(
        r"put the development kit at .*ILSVRC2012_devkit_t12 or Kaggle's LOC_val_solution\.csv into", "imagenet", root
    )
    (root / "ILSVRC2012_devkit_t12.tar.gz").touch()
    out = fasttrain("pack", "imagenet", "--root", str(root), "--out", str(tmp_path / "x.beton"))
    assert out.returncode == 2 and "(unpack ILSVRC2012_devkit_t12.tar.gz, which is there)" in out.stderr
    data = devkit(root)
    (data / "meta.mat").rename(data / "meta")
    refused(r"there is no file .*meta\.mat", "imagenet", root)
    (data / "meta").rename(data / "meta.mat")
    (data / "ILSVRC2012_validation_ground_truth.txt").rename(data / "truth.txt")
    refused(r"cannot read .*ground_truth\.txt: No such file", "imagenet", root)
    (data / "truth.txt").rename(data / "ILSVRC2012_validation_ground_truth.txt")
    open_dataset("imagenet", root)
    (root / "val/ILSVRC2012_val_00000010.jpg").touch()
    refused("have one and the same number", "imagenet", root)
    (root / "val/ILSVRC2012_val_00000010.jpg").rename(root / "val/ILSVRC2012_val_10.JPEG")
    refused(r"ILSVRC2012_val_10\.JPEG is not named as a validation image is", "imagenet", root)
    (root / "val/ILSVRC2012_val_10.JPEG").unlink()
    (root / "val/n01440764").mkdir()
    refused(r"val holds both images \(.*_00000001\.JPEG, \.\.\) and folders \(n01440764, \.\.\)", "imagenet", root)


def test_imagenet_meta_that_is_damaged(tmp_path):
    path = tmp_path / "meta.mat"
    meta(path)
    whole = path.read_bytes()
    assert read_meta(path) == {1: "n02007558", 2: "n01440764", 3: "n03995372"}
    for content in (b"", whole[:60], whole[:200], whole[: len(whole) // 2], b"x" * 500, whole[:128] + b"\xff" * 400):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*meta\.mat: .*unpack the kit again"):
            read_meta(path)
    for content in ({"other": 1}, {"synsets": 1}, {"synsets": np.array([(1,)], dtype=[("WNID", "f8")])}):
        savemat(path, content)
        with pytest.raises(ValueError, match=r"cannot read .*meta\.mat: .*unpack the kit again"):
            read_meta(path)
    for wnids, match in (
        (["n1"], "'n1' is no WordNet id"),
        ([WNIDS[0]] * 2, "its classes are not one for each number"),
    ):
        meta(path, wnids)
        with pytest.raises(ValueError, match=match):
            read_meta(path)
    meta(path, WNIDS[:1])
    assert read_meta(path) == {1: WNIDS[0]}


def test_imagenet_that_was_unpacked_in_part(tmp_path):
    wnids = [f"n{i:08}" for i in range(1000)]
    files(tmp_path / "train", [f"{w}/{w}_1.JPEG" for w in wnids])
    files(tmp_path / "val", [f"{w}/{val_name(1)}" for w in wnids[:5]])
    refused(r"train holds 1,000 images, and 1,281,167 were published: .* data\.verify to false", "imagenet", tmp_path)
    assert_sound(open_dataset("imagenet", tmp_path, verify=False, val_share=0), 1000, 0, 5)


# places365


def places_names() -> list[str]:
    """Four images a category, in an order that is not that of their classes."""
    lines = [f"{c}/{i + 1:08}.jpg {label}" for c, label in CATEGORIES.items() for i in range(4)]
    return random.Random(1).sample(lines, len(lines))


def places(
    root: Path, lists: str = ".", train: str = "data_256_standard", val: str = "val_256", kind="standard"
) -> Path:
    (root / lists).mkdir(parents=True, exist_ok=True)
    val_lines = [f"Places365_val_{i + 1:08}.jpg {label}" for i, label in enumerate(VAL)]
    files(root / train, [line.split()[0][1:] for line in places_names()])
    files(root / val, [line.split()[0] for line in val_lines])
    categories = [f"{c} {label}" for c, label in CATEGORIES.items()]
    content = {
        "categories_places365": categories,
        f"places365_train_{kind}": places_names(),
        "places365_val": val_lines,
    }
    for name, lines in content.items():
        (root / lists / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return root / lists


@pytest.mark.parametrize("lists", [".", "filelist_places365-standard"])
@pytest.mark.parametrize(
    ("train", "val"),
    [("data_256_standard", "val_256"), ("data_256", "val_256"), ("data_large_standard", "val_large"),
     ("data_large", "val_large"), ("train", "val")],
)  # fmt: skip
def test_places365_official_layouts(tmp_path, lists, train, val):
    places(tmp_path, lists, train, val)
    if "large" in train:
        (tmp_path / "val_256").mkdir()  # of another size than the training images
    dataset = open_dataset("places365", tmp_path, verify=False, val_share=0.25)
    assert dataset.name == "places365"
    assert dataset.classes == ("airfield", "bakery/shop", "desert/sand", "desert_road")
    assert_sound(dataset, 12, 4, 6)
    assert dataset.targets_N.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + sorted(VAL)
    assert [dataset.read.name(i) for i in (0, 3, 8)] == [
        str(tmp_path / train / n)
        for n in ("a/airfield/00000001.jpg", "a/airfield/00000004.jpg", "d/desert/sand/00000001.jpg")
    ]
    assert dict(zip(names(dataset, "test"), dataset.targets_N[dataset.splits["test"]].tolist(), strict=True)) == {
        f"Places365_val_{i + 1:08}.jpg": label for i, label in enumerate(VAL)
    }


def test_places365_standard_comes_before_challenge(tmp_path):
    lists = places(tmp_path, "filelist_places365-challenge", "data_large_challenge", "val_large", kind="challenge")
    dataset = open_dataset("places365", tmp_path, verify=False)
    assert len(dataset) == 22 and "data_large_challenge" in dataset.read.name(0)
    places(tmp_path, "filelist_places365-standard", "data_large_standard", "val_large")
    (lists / "places365_train_challenge.txt").write_text("")
    other = open_dataset("places365", tmp_path, verify=False)
    assert "data_large_standard" in other.read.name(0) and other.identity() != dataset.identity()


@pytest.mark.parametrize("base", ["places365_standard", "."])
def test_places365_easy_format(tmp_path, base):
    """Folder names in their order, with - for /, are in the official order; _ for / would not be."""
    easy = [c[3:].replace("/", "-") for c in CATEGORIES]
    for split, count in (("train", 4), ("val", 2)):
        files(tmp_path / base / split, [f"{n}/{split}{i}.jpg" for n in easy for i in range(count)])
        (tmp_path / base / f"{split}.txt").write_text("".join(f"{split}/{n}/{split}0.jpg\n" for n in easy))
    alone = open_dataset("places365", tmp_path, val_share=0.25)
    assert alone.classes == ("airfield", "bakery/shop", "desert/sand", "desert_road")
    assert_sound(alone, 12, 4, 8)
    lists = places(tmp_path / "lists")
    (lists / "categories_places365.txt").rename(tmp_path / "categories_places365.txt")
    named = open_dataset("places365", tmp_path, verify=False, val_share=0.25)
    assert named.identity() == alone.identity()
    (lists / "places365_train_standard.txt").rename(tmp_path / "places365_train_standard.txt")
    assert open_dataset("places365", tmp_path, verify=False, val_share=0.25).identity() == alone.identity()
    for number, category in enumerate(sorted(CATEGORIES, reverse=True)):
        with open(tmp_path / "categories_places365.txt", "a" if number else "w") as out:
            out.write(f"{category} {number}\n")
    backwards = open_dataset("places365", tmp_path, verify=False, val_share=0.25)
    assert backwards.classes == alone.classes[::-1]
    assert all(n.startswith("train") for n in names(backwards, "train"))
    refused("categories_places365.txt is not the published file", "places365", tmp_path)
    files(tmp_path / base / "val", ["desert_sand/1.jpg"])
    refused(r"val.desert_sand is not one of the 4 in .*categories_places365\.txt", "places365", tmp_path, verify=False)
    (tmp_path / "categories_places365.txt").unlink()
    refused(r"val.desert_sand is not one of the 4 that train has", "places365", tmp_path)


@pytest.mark.parametrize(
    ("file", "line", "match"),
    [
        ("train_standard", "/a/airport/00000001.jpg 0", r"standard\.txt, line 3: the category /a/airport is not in categories"),
        ("train_standard", "/a/airfield/00000001.jpg 2", "line 3: /a/airfield has the number 0 in categories_places365"
         ".txt, not 2"),
        ("train_standard", "/a/airfield/00000001.jpg", r"line 3: an image and the number of its category .*\(/a/airfield/0"),
        ("train_standard", "airfield/00000001.jpg 0", "line 3: an image and the number"),
        ("train_standard", "/a/airfield/00000009.jpg 0", r"line 3: there is no file .*a/airfield/00000009\.jpg; 1 of 5 are"),
        ("train_standard", "/a/airfield/../airfield/00000001.jpg 0", r"line 3: the category /a/airfield/\.\./airfield is not in"),
        ("train_standard", "/a/airfield/00000001.jpg 0", r"line \d+: /a/airfield/00000001\.jpg is there already, in line \d+"),
        ("val", "Places365_val_00000001.jpg 4", r"places365_val\.txt, line 3: no category has the number 4"),
        ("val", "Places365_val_00000001.jpg", "line 3: an image and the number of its category .*Places365_val_00000001"),
        ("val", "../Places365_val_00000001.jpg 1", "line 3: an image and the number of its"),
        ("val", "/a/airfield/00000001.jpg 0", "line 3: an image and the number"),
        ("val", "Places365_val_00000007.jpg 1", r"line 3: there is no file .*val_256.Places365_val_00000007\.jpg; 1 of 7"),
        ("val", "Places365_val_00000001.jpg 1", r"line 3: Places365_val_00000001\.jpg is there already, in line 1"),
        ("categories", "/a/airfield 4", r"categories_places365\.txt, line 3: /a/airfield 4: this category or number is there"),
        ("categories", "/a/alley 1", r"line \d: .*: this category or number is there already"),
        ("categories", "/a/alley 5", r"categories are to be numbered 0, 1, .. without a gap; it has 5"),
        ("categories", "/../alley 4", "line 3: a category .* and its number are expected, not '/../alley 4'"),
        ("categories", "airfield 4", "line 3: a category .* and its number are expected, not 'airfield 4'"),
    ],
)  # fmt: skip
def test_places365_lines_that_are_wrong(tmp_path, file, line, match):
    path = places(tmp_path) / ("categories_places365.txt" if file == "categories" else f"places365_{file}.txt")
    lines = path.read_text().splitlines()
    path.write_text("\r\n".join([*lines[:2], line, *lines[2:], ""]))
    refused(match, "places365", tmp_path, verify=False)


def test_places365_folders_that_are_wrong(tmp_path):
    refused(r"data\.root: .* has no training images: data_256_standard, data_256, .*train", "places365", tmp_path)
    places(tmp_path)
    refused(r"categories_places365\.txt is not the published file .*data\.verify to false", "places365", tmp_path)
    for name in ("categories_places365.txt", "places365_val.txt", "places365_train_standard.txt"):
        (tmp_path / name).rename(tmp_path / "away")
        refused(rf"there is no {name} in .*, nor in filelist_places365-standard", "places365", tmp_path, verify=False)
        (tmp_path / name).write_bytes(b"\xff\xfe\n")
        refused(rf"cannot read .*{name}", "places365", tmp_path, verify=False)
        (tmp_path / name).write_text("\n")
        refused(rf"{name} lists nothing|{name}: categories are", "places365", tmp_path, verify=False)
        (tmp_path / "away").rename(tmp_path / name)
    open_dataset("places365", tmp_path, verify=False)
    (tmp_path / "data_256_standard/d/desert_road").rename(tmp_path / "away")
    refused(r"there is no file .*d/desert_road/0000000\d\.jpg; 4 of 4 are missing", "places365", tmp_path, verify=False)
    (tmp_path / "val_256").rename(tmp_path / "val_large")
    refused("no folder .*val_256, for the validation images that belong to", "places365", tmp_path, verify=False)


def test_places365_easy_format_that_was_unpacked_in_part(tmp_path):
    for split in ("train", "val"):
        files(tmp_path / split, [f"place{i:03}/1.jpg" for i in range(365)])
    refused(r"train holds 365 images, and 1,803,460 were published", "places365", tmp_path)
    assert_sound(open_dataset("places365", tmp_path, verify=False, val_share=0), 365, 0, 365)


# files


def test_many_files(tmp_path):
    rng, contents = np.random.default_rng(0), []
    groups = [
        Group(0, tmp_path / "a", ["x.JPEG", "ä b.png"]),
        Group(1, tmp_path / "c", []),
        Group(2, tmp_path, ["z.jpg"]),
    ]
    for group in groups:
        group.folder.mkdir(exist_ok=True)
        for file in group.files:
            image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
            out = io.BytesIO()
            image.save(out, "PNG" if file.endswith("png") else "JPEG")
            (group.folder / file).write_bytes(out.getvalue())
            contents.append(out.getvalue())
    paths = [tmp_path / "a/x.JPEG", tmp_path / "a/ä b.png", tmp_path / "z.jpg"]
    read = pickle.loads(pickle.dumps(ManyFiles(groups)))
    assert [read.name(i) for i in range(3)] == list(map(str, paths))
    assert [read.encoded(i).tobytes() for i in range(3)] == contents
    assert [read(i).shape for i in range(3)] == [(20, 30, 3)] * 3 and read.size(1) == (20, 30)
    assert (read(1) == np.asarray(Image.open(paths[1]))).all()
    assert read.total_bytes(3) == sum(map(len, contents)) and read.total_bytes(1) == len(contents[0])
    before = read.fingerprint(3), read.fingerprint(2)
    paths[2].write_bytes(contents[0] + b"\0")
    assert read.fingerprint(3) != before[0] and read.fingerprint(2) == before[1]
    paths[1].unlink()
    with pytest.raises(ValueError, match=r"cannot read the image .*a/ä b\.png: No such file"):
        read(1)


def test_images_of_any_size_are_not_resident(tmp_path):
    places(tmp_path)
    dataset = open_dataset("places365", tmp_path, verify=False)
    spec = LoaderSpec(dataset, dataset.splits["train"], evaluation(), size=32, stored=0, batch=4)
    loader, why = choose_loader(spec, torch.device("cpu"))
    assert loader == "torch" and "files of any size are not resident" in why
