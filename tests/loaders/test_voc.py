"""Pascal VOC as it lies on disk, and what is said of damaged ones."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fasttrain.loaders import open_dataset
from fasttrain.loaders.datasets.voc import CLASSES

from .test_more_datasets import assert_same_pixels, assert_sound, encoded

CAR, COW, DOG, PERSON = 6, 9, 11, 14


def annotation(*objects: tuple[str, int | str | None]) -> str:
    """As the devkit has them, an object every four lines from line 10; difficult is left out where it is None."""
    parts = "".join(
        f"\t<object>\n\t\t<name>{name}</name>\n"
        f"{'' if hard is None else f'<difficult>{hard}</difficult>'}<part><name>head</name></part>\n\t</object>\n"
        for name, hard in objects
    )
    head = (
        "<annotation>\n\t<filename>x.jpg</filename>\n\t<source>\n\t\t<database>The VOC2007 Database</database>\n"
        "\t</source>\n\t<owner>\n\t\t<name>Käthe</name>\n\t\t<name>who took it</name>\n\t</owner>\n"
    )
    return f"{head}{parts}</annotation>\n"


def devkit(year: Path, splits: dict[str, list[str]]) -> list[Path]:
    """Photograph k of a split shows a dog if k is even, and a person; returns the photographs in the order of the splits."""
    paths = []
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (year / folder).mkdir(parents=True)
    for split, ids in splits.items():
        (year / f"ImageSets/Main/{split}.txt").write_text("".join(f"{i} \n" for i in ids))
        for k, i in enumerate(ids):
            paths.append(year / f"JPEGImages/{i}.jpg")
            paths[-1].write_bytes(encoded(k, ".jpg"))
            shown = [("person", 0), ("dog", 0)] if k % 2 == 0 else [("person", 0)]
            (year / f"Annotations/{i}.xml").write_text(annotation(*shown), encoding="utf-8")
    return paths


def ids(year: int, first: int, count: int) -> list[str]:
    return [f"{year}_{i:06}" for i in range(first, first + count)]


def lists(year: Path, splits: dict[str, list[str]]) -> None:
    """The lists that the devkit has of each class, of :func:`devkit`'s photographs; Windows line ends, as in 2007's."""
    for split, names in splits.items():
        for label in CLASSES:
            shown = {"person": lambda k: True, "dog": lambda k: k % 2 == 0}.get(label, lambda k: False)
            lines = [f"{i} {' 1' if shown(k) else '-1'}\r\n" for k, i in enumerate(names)]
            (year / f"ImageSets/Main/{label}_{split}.txt").write_bytes("".join(lines).encode())


@pytest.fixture
def refused(tmp_path) -> Callable:
    """Opens the data set with other content in a file (None: without the file), which is then put back."""

    def check(path: Path, content: str | bytes | None, match: str) -> None:
        before = path.read_bytes()
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=match):
            open_dataset("voc", tmp_path)
        path.write_bytes(before)

    return check


@pytest.mark.parametrize("layout", ["VOCdevkit/VOC2007", "VOC2012", "."])
def test_one_year(tmp_path, layout):
    splits = {"train": ids(2007, 0, 6), "val": ids(2007, 10, 4), "test": ids(2007, 20, 5)}
    paths = devkit(tmp_path / layout, splits)
    dataset = open_dataset("voc", tmp_path)
    assert len(dataset.classes) == 20 and list(dataset.classes) == sorted(dataset.classes)
    assert [dataset.classes[i] for i in (CAR, COW, DOG, PERSON)] == ["car", "cow", "dog", "person"]
    assert dataset.targets_N.shape == (15, 20) and dataset.targets_N.dtype == np.float32
    assert dataset.targets_N[:, DOG].tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    assert dataset.targets_N[:, PERSON].all() and dataset.targets_N.sum() == 15 + 8
    assert_sound(dataset, 6, 4, 5)
    assert dataset.splits["val"].tolist() == [6, 7, 8, 9]
    assert_same_pixels(dataset, paths)
    assert pickle.loads(pickle.dumps(dataset)).identity() == dataset.identity()
    lists(tmp_path / layout, splits)
    assert open_dataset("voc", tmp_path).identity() == dataset.identity()


def test_difficult_objects_are_not_counted(tmp_path):
    devkit(tmp_path, {"train": ids(2007, 0, 4), "val": ids(2007, 10, 2)})
    (tmp_path / "Annotations/2007_000001.xml").write_text(
        annotation(("car", 1), ("dog", 1), ("dog", 0), ("person", 0), ("person", 1), ("cow", None)), encoding="utf-8"
    )
    (tmp_path / "Annotations/2007_000002.xml").write_text(annotation(("car", 1), ("car", 1)), encoding="utf-8")
    row, hard = open_dataset("voc", tmp_path).targets_N[1:3]
    assert (row[CAR], row[DOG], row[PERSON], row[COW]) == (-1, 1, 1, 1)
    assert np.abs(row).sum() == 4
    assert hard[CAR] == -1 and np.abs(hard).sum() == 1


def test_annotations_of_other_writers(tmp_path):
    """A declaration, a byte order mark, a comment that looks like a DTD, no white space."""
    devkit(tmp_path, {"train": ids(2007, 0, 2), "val": ids(2007, 10, 2)})
    text = (
        '\ufeff<?xml version="1.0" encoding="UTF-8"?><!-- <!DOCTYPE a> --><annotation><object><difficult>0</difficult>'
        "<name><!-- a --> co<![CDATA[w]]>\n</name></object></annotation>"
    )
    (tmp_path / "Annotations/2007_000001.xml").write_text(text, encoding="utf-8")
    row = open_dataset("voc", tmp_path).targets_N[1]
    assert row[COW] == 1 and np.abs(row).sum() == 1


def test_years_are_joined(tmp_path):
    old = {"train": ids(2007, 0, 10), "val": ids(2007, 10, 8), "test": ids(2007, 20, 6)}
    paths = devkit(tmp_path / "VOCdevkit/VOC2007", old)
    paths += devkit(tmp_path / "VOCdevkit/VOC2012", {"train": ids(2012, 0, 5), "val": ids(2012, 10, 3)})
    dataset = open_dataset("voc", tmp_path)
    assert_sound(dataset, 15, 11, 6)
    assert dataset.splits["train"].tolist() == [*range(10), *range(24, 29)]
    assert dataset.splits["test"].tolist() == list(range(18, 24))
    assert_same_pixels(dataset, paths)
    assert open_dataset("voc", tmp_path / "VOCdevkit").identity() == dataset.identity()
    (tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").unlink()
    dataset = open_dataset("voc", tmp_path, val_share=0.2)
    assert_sound(dataset, 12, 3, 11)
    assert dataset.splits["test"].tolist() == [*range(10, 18), *range(23, 26)]
    assert_sound(open_dataset("voc", tmp_path / "VOCdevkit/VOC2012", val_share=0.2), 4, 1, 3)


def test_missing_files_are_named(tmp_path, refused):
    with pytest.raises(ValueError, match=r"data\.root: .* has no VOCdevkit/VOC2007 or VOCdevkit/VOC2012, no VOC2007"):
        open_dataset("voc", tmp_path)
    devkit(tmp_path, {"train": ids(2007, 0, 3), "val": ids(2007, 10, 2), "test": ids(2007, 20, 2)})
    for split in ("train", "val"):
        match = (
            rf"data\.root: there is no .*Main/{split}\.txt: the devkit has train\.txt and val\.txt in ImageSets/Main"
        )
        refused(tmp_path / f"ImageSets/Main/{split}.txt", None, match)
    xml = tmp_path / "Annotations"
    refused(xml / "2007_000001.xml", None, r"there is no annotation .*2007_000001\.xml, for an image of train$")
    refused(xml / "2007_000020.xml", None, r"2007_000020\.xml, for an image of test; without .*test\.txt")
    refused(tmp_path / "JPEGImages/2007_000010.jpg", None, r"there is no image .*2007_000010\.jpg; 1 of 7 are missing")
    (xml / "2007_000001.xml").rename(tmp_path / "kept")
    (xml / "2007_000001.xml").mkdir()
    with pytest.raises(ValueError, match=r"there is no annotation .*2007_000001\.xml"):
        open_dataset("voc", tmp_path)
    xml.rename(tmp_path / "Other")
    with pytest.raises(ValueError, match="has no folder Annotations; the devkit has"):
        open_dataset("voc", tmp_path)


def test_lists_of_splits_name_the_line(tmp_path, refused):
    devkit(tmp_path, {"train": ids(2007, 0, 3), "val": ids(2007, 10, 2), "test": ids(2007, 20, 2)})
    main = tmp_path / "ImageSets/Main"
    refused(main / "train.txt", "\n", r"train\.txt names no images")
    for bad in ("../../x", "a b", "2007_000001.jpg", "ü", b"\xff"):
        bad = bad if isinstance(bad, bytes) else bad.encode()
        refused(main / "val.txt", b"2007_000010\r\n\r\n" + bad, r"val\.txt, line 3: '.*' is no image id")
    again = r"test\.txt, line 1: the image 2007_000001 is already in train\.txt, line 2"
    refused(main / "test.txt", "2007_000001", again)
    again = r"val\.txt, line 2: the image 2007_000010 is already in val\.txt, line 1"
    refused(main / "val.txt", "2007_000010\n2007_000010", again)


def test_annotations_name_the_line(tmp_path, refused):
    devkit(tmp_path, {"train": ids(2007, 0, 3), "val": ids(2007, 10, 2)})
    xml, name = tmp_path / "Annotations/2007_000001.xml", r"2007_000001\.xml"
    refused(
        xml, annotation(("dog", 0), ("unicorn", 0)), rf"{name}, line 14: the object 'unicorn' is none of the 20 .*cow"
    )
    refused(xml, annotation(("Dog", 0)), rf"{name}, line 10: the object 'Dog' is none")
    refused(xml, annotation(("", 0)), rf"{name}, line 10: the object '' is none")
    refused(xml, annotation(("dog", "yes")), rf"{name}, line 10: difficult is to be 0 or 1, not 'yes'")
    refused(xml, annotation(("dog</name>\n<name>cat", 0)), rf"{name}, line 12: the object has a <name> already")
    refused(xml, annotation(), rf"{name}, line 10: the annotation has no object")
    refused(
        xml, annotation(("dog", 0)).replace("annotation", "label"), rf"{name}, line 1: .* to be <annotation>, not <lab"
    )
    refused(xml, "", rf"{name}, line 1: no element found")
    refused(xml, annotation(("dog", 0))[:-14], rf"{name}, line 14: no element found")
    refused(xml, annotation(("dog", 0), ("</cat>", 0)), rf"{name}, line 15: mismatched tag")
    refused(xml, annotation(("dog", 0)) + "more", rf"{name}, line 15: junk after document element")
    refused(xml, annotation(("dog", 0)).encode("latin-1"), rf"{name}, line 7: not well-formed")
    refused(xml, " " * (1 << 20) + annotation(), rf"{name}: an annotation has at most 1048576 bytes")
    refused(xml, annotation(("&b;", 0)), rf"{name}, line 11: undefined entity")


def test_no_entities_are_read(tmp_path, refused):
    devkit(tmp_path, {"train": ids(2007, 0, 3), "val": ids(2007, 10, 2)})
    xml, secret = tmp_path / "Annotations/2007_000001.xml", tmp_path / "secret"
    secret.write_text("dog")
    for dtd in ('[<!ENTITY b "dog">]', f'[<!ENTITY b SYSTEM "{secret}">]', f'SYSTEM "{secret}"'):
        text = f"<!-- two\nlines -->\n<!DOCTYPE annotation {dtd}>" + annotation(("&b;", 0))
        for encoding in ("utf-8", "utf-16"):
            refused(xml, text.encode(encoding), r"2007_000001\.xml, line 3: an annotation has no DTD and no entities")


def test_the_lists_of_classes_are_compared(tmp_path, refused):
    splits = {"train": ids(2007, 0, 3), "val": ids(2007, 10, 2), "test": ids(2007, 20, 2)}
    devkit(tmp_path, splits)
    hard = tmp_path / "Annotations/2007_000001.xml"
    hard.write_text(annotation(("person", 0), ("car", 1)), encoding="utf-8")
    lists(tmp_path, splits)
    main = tmp_path / "ImageSets/Main"
    with pytest.raises(
        ValueError, match=r"car_train\.txt, line 2: the list has -1 \(not shown\) for 2007_000001, .* is 0"
    ):
        open_dataset("voc", tmp_path)
    (main / "car_train.txt").write_text("2007_000000 -1\n2007_000001  0\n2007_000002 -1\n")
    assert (open_dataset("voc", tmp_path).targets_N[:, CAR] == -1).sum() == 1

    dog = main / "dog_train.txt"
    wrong = (
        r"dog_train\.txt, line 2: the list has 1 \(shown\) for 2007_000001, and by Annotations/2007_000001\.xml it is "
    )
    refused(
        dog, "2007_000000  1\n2007_000001  1\n2007_000002  1\n", wrong + r"-1 \(not shown\); set data\.verify to false"
    )
    refused(
        dog, "2007_000000  1\n\n2007_000001\n", r"dog_train\.txt, line 3: '2007_000001' is not an image id and 1, 0 or"
    )
    refused(dog, "2007_000000 +1\n", r"dog_train\.txt, line 1: '2007_000000 \+1' is not an image id and 1, 0 or -1")
    refused(dog, "2007_000000 1\n2007_000010 1", r"dog_train\.txt, line 2: the image 2007_000010 is not in train\.txt")
    refused(
        dog, "2007_000000 1\n2007_000000 1", r"line 2: the image 2007_000000 is not in train\.txt, or is here twice"
    )
    refused(dog, "2007_000000 1\n2007_000001 -1", r"dog_train\.txt lacks the image 2007_000002 of train\.txt")
    refused(main / "person_test.txt", "2007_000020 -1\n2007_000021 1", r"person_test\.txt, line 1: .* for 2007_000020")
    dog.write_text("2007_000000  1\n2007_000001  1\n2007_000002  1\n")
    assert open_dataset("voc", tmp_path, verify=False).targets_N[:, DOG].tolist() == [1, 0, 1, 1, 0, 1, 0]
