"""Tiny data sets in official formats: each is read as the real one would be."""

import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from fasttrain.loaders import open_dataset
from fasttrain.loaders.datasets.imagenet import read_meta
from fasttrain.loaders.datasets.voc import CLASSES
from fasttrain.loaders.tiny import TINY, write_tiny

CLIPS = ("hmdb51", "ucf101")
CLASS_COUNTS = {"cifar10": 10, "cifar100": 100, "fashion_mnist": 10, "stl10": 10, "voc": 20, "hmdb51": 2, "ucf101": 2}
CLASS_COUNTS |= {"imagenet": 4, "places365": 4}
SHAPES = {"cifar10": (32, 32), "cifar100": (32, 32), "fashion_mnist": (28, 28), "stl10": (96, 96)}


def digest(root: Path) -> dict[str, str]:
    """Of every file."""
    found = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def test_there_is_one_for_each_data_set_of_the_paper():
    assert set(TINY) == set(CLASS_COUNTS)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_set_is_read_like_the_real_one(tmp_path, name):
    root = write_tiny(name, tmp_path / "deep" / name)
    assert root == tmp_path / "deep" / name and [p.name for p in root.parent.iterdir()] == [name]
    dataset = open_dataset(name, root, verify=False)
    assert dataset.name == name and len(dataset.classes) == CLASS_COUNTS[name]
    sizes = {split: len(index_M) for split, index_M in dataset.splits.items()}
    assert sizes["val"] >= 2 and sizes["test"] >= 6 and sum(sizes.values()) == len(dataset)
    for split, least in (("train", 5), ("val", 1), ("test", 3)):
        targets = dataset.targets_N[dataset.splits[split]]
        count_C = (targets == 1).sum(axis=0) if dataset.multi_label else np.bincount(targets)
        assert len(count_C) == CLASS_COUNTS[name] and count_C.min() >= least
    assert dataset.multi_label == (name == "voc") and dataset.video == (name in CLIPS)
    for split in dataset.splits:
        image_HWC = dataset.read(int(dataset.splits[split][-1]))
        assert image_HWC.dtype == np.uint8 and image_HWC.std() > 5
        assert image_HWC.shape[:2] in (SHAPES.get(name, (48, 64)), SHAPES.get(name, (64, 48)))


@pytest.mark.parametrize("name", TINY)
def test_the_same_arguments_give_the_same_files(tmp_path, name):
    first, again, other = (tmp_path / n for n in "abc")
    options = {"samples": 2, "side": 32}
    write_tiny(name, first, **options)
    (again / "x").mkdir(parents=True)
    (again / "x").rmdir()
    write_tiny(name, again, **options)  # into a folder that is there, and empty
    write_tiny(name, other, **options, seed=1)
    assert digest(first) == digest(again)
    assert set(digest(first)) == set(digest(other)) and digest(first) != digest(other)
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*")}
    assert write_tiny(name, first, **options) == first
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*")} == before
    dataset = open_dataset(name, first, verify=False, val_share=0.5)
    assert all(len(index_M) for index_M in dataset.splits.values())


def test_images_tell_their_class(tmp_path):
    """The mean colour does, so that a network has something to learn."""
    for name in ("cifar10", "imagenet", "places365"):
        dataset = open_dataset(name, write_tiny(name, tmp_path / name), verify=False)
        colour_N3 = np.stack([dataset.read(i).mean(axis=(0, 1)) for i in range(len(dataset))])
        train, test = dataset.splits["train"], dataset.splits["test"]
        mean_C3 = np.stack(
            [colour_N3[train][dataset.targets_N[train] == c].mean(axis=0) for c in range(len(dataset.classes))]
        )
        nearest = ((colour_N3[test][:, None] - mean_C3) ** 2).sum(axis=2).argmin(axis=1)
        assert (nearest == dataset.targets_N[test]).all()


@pytest.mark.parametrize("name", CLIPS)
def test_tiny_clips_move_and_have_three_splits(tmp_path, name):
    root = write_tiny(name, tmp_path / name, classes=3, samples=4)
    tested = []
    for split in (1, 2, 3):
        dataset = open_dataset(name, root, split=split, val_share=0.25)
        assert [len(dataset.splits[s]) for s in ("train", "val", "test")] == [9, 3, 6]
        tested.append({dataset.read.name(i) for i in dataset.splits["test"]})
    assert not tested[0] & tested[1] and not tested[1] & tested[2] and not tested[0] & tested[2]
    assert (dataset.read.shape_N3 == [24, 48, 64]).all()
    clip_THWC = dataset.read.frames(0, np.arange(24)).astype(int)
    assert clip_THWC.shape == (24, 48, 64, 3) and np.abs(np.diff(clip_THWC, axis=0)).mean(axis=(1, 2, 3)).min() > 2


def test_the_tiny_development_kit_counts_backwards(tmp_path):
    """As the real one, its numbers are not in the order of the classes."""
    root = write_tiny("imagenet", tmp_path / "set", classes=5)
    dataset = open_dataset("imagenet", root)
    wnid_by_id = read_meta(root / "ILSVRC2012_devkit_t12/data/meta.mat")
    assert tuple(wnid_by_id.values()) == dataset.classes[::-1]
    assert (root / "val/ILSVRC2012_val_00000001.JPEG").is_file()


def test_tiny_voc_has_difficult_objects(tmp_path):
    targets_NC = open_dataset("voc", write_tiny("voc", tmp_path / "set")).targets_N
    assert ((targets_NC == 1).sum(axis=1) == 2).all() and ((targets_NC == -1).sum(axis=1) == 1).all()
    shown = [CLASSES.index(name) for name in ("bicycle", "dog", "bottle")]
    assert targets_NC[1, shown].tolist() == [1, 1, -1]
    devkit = tmp_path / "set/VOCdevkit/VOC2007/ImageSets/Main"
    for label, name in enumerate(CLASSES):  # the lists say the same as the annotations
        values = [int(line.split()[1]) for s in ("train", "val", "test") for line in open(devkit / f"{name}_{s}.txt")]
        assert [{1: 1, 0: -1, -1: 0}[v] for v in values] == targets_NC[:, label].tolist()


def test_a_folder_that_holds_anything_else_is_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    for folder in (tmp_path, tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="holds something else: name one that is new or empty"):
            write_tiny("stl10", folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "train"]
    root = write_tiny("stl10", tmp_path / "set")
    for options in ({"samples": 4}, {"seed": 1}, {"side": 32}):
        with pytest.raises(ValueError, match="holds something else"):
            write_tiny("stl10", root, **options)
    (root / "tiny.json").write_text(json.dumps({"name": "stl10"}))
    with pytest.raises(ValueError, match="holds something else"):
        write_tiny("stl10", root)


def test_several_may_write_the_same_at_once(tmp_path):
    roots = []
    threads = [threading.Thread(target=lambda: roots.append(write_tiny("voc", tmp_path / "set"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert roots == [tmp_path / "set"] * 4 and [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("kinetics400", {}, "name: there is no tiny 'kinetics400'; there are cifar10, cifar100, "),
        ("cifar10", {"classes": 4}, "classes: a tiny cifar10 has 10, not 4"),
        ("places365", {"classes": 3}, "classes: a tiny places365 has 4 to 10, not 3"),
        ("hmdb51", {"classes": 11}, "classes: a tiny hmdb51 has 2 to 10, not 11"),
        ("voc", {"samples": 1}, "samples, side: at least 2, and a multiple of 8 from 16 on, are expected, not 1, 64"),
        ("ucf101", {"side": 60}, "expected, not 6, 60"),
        ("ucf101", {"side": 8}, "expected, not 6, 8"),
    ],
)
def test_mistakes(tmp_path, name, options, match):
    with pytest.raises(ValueError, match=match):
        write_tiny(name, tmp_path / "set", **options)
    assert not list(tmp_path.iterdir())


def test_a_tiny_set_is_packed_by_the_command_line(tmp_path, fasttrain):
    write_tiny("imagenet", tmp_path / "set")
    out = fasttrain("pack", "imagenet", "--root", str(tmp_path / "set"), "--out", str(tmp_path / "x.beton"))
    assert out.returncode == 0, out.stderr
    packed, files = open_dataset("beton", tmp_path / "x.beton"), open_dataset("imagenet", tmp_path / "set")
    assert packed.classes == files.classes and (packed.targets_N == files.targets_N).all()
