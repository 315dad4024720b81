"""Data sets as they lie on disk, in their real formats, and what is said of damaged ones."""

import gzip
import pickle

import numpy as np
import pytest
from fasttrain.loaders import datasets as tables
from fasttrain.loaders import labelled_part, open_dataset
from fasttrain.loaders.datasets.base import split_off
from fasttrain.loaders.decode import read_image
from PIL import Image

from . import samples


def assert_splits_are_sound(dataset) -> None:
    parts = list(dataset.splits.values())
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0 and together.max() < len(dataset)
    assert set(dataset.splits) == {"train", "val", "test"}


def test_cifar10(tmp_path):
    image = samples.cifar10(tmp_path)
    dataset = open_dataset("cifar10", tmp_path, val_share=0.2, verify=False)
    assert dataset.classes == tuple(f"class{i}" for i in range(10))
    assert (np.stack([dataset.read(i) for i in range(len(dataset))]) == image).all()
    assert dataset.targets_N[:20].tolist() == [i % 10 for i in range(20)]
    assert dataset.splits["test"].tolist() == list(range(100, 120))
    assert {k: len(v) for k, v in dataset.splits.items()} == {"train": 80, "val": 20, "test": 20}
    assert_splits_are_sound(dataset)


def test_cifar100(tmp_path):
    samples.cifar100(tmp_path)
    dataset = open_dataset("cifar100", tmp_path, val_share=1 / 3, verify=False)
    assert len(dataset.classes) == 100
    assert {k: len(v) for k, v in dataset.splits.items()} == {"train": 200, "val": 100, "test": 100}
    assert np.bincount(dataset.targets_N[dataset.splits["val"]]).tolist() == [1] * 100


def test_stl10_planes_are_turned(tmp_path):
    image = samples.stl10(tmp_path)
    dataset = open_dataset("stl10", tmp_path, verify=False)
    assert (np.stack([dataset.read(i) for i in range(len(dataset))]) == image).all()
    assert dataset.targets_N[:12].tolist() == [*range(10), 0, 1]
    assert_splits_are_sound(dataset)


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist(tmp_path, packed):
    image = samples.fashion_mnist(tmp_path, packed=packed)
    dataset = open_dataset("fashion_mnist", tmp_path, verify=False)
    assert (np.stack([dataset.read(i) for i in range(len(dataset))])[..., 1] == image).all()
    assert dataset.read(0).shape == (28, 28, 3)
    assert len(dataset.splits["test"]) == 20
    inner = open_dataset("fashion_mnist", tmp_path / "FashionMNIST" / "raw", verify=False)
    assert inner.identity() == dataset.identity()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "fashion_mnist"])
def test_checksums_are_compared(tmp_path, name):
    writer = getattr(samples, name)
    writer(tmp_path, packed=True) if name == "fashion_mnist" else writer(tmp_path)
    with pytest.raises(ValueError, match="is not the published file"):
        open_dataset(name, tmp_path)


def test_elpv_is_the_real_one(need):
    need("elpv")
    dataset = open_dataset("elpv", val_share=0.2)
    assert len(dataset) == 2624
    assert np.bincount(dataset.targets_N).tolist() == [1803, 821]
    assert dataset.read(0).shape == (300, 300, 3)
    assert_splits_are_sound(dataset)
    shares = [dataset.targets_N[i].mean() for i in dataset.splits.values()]
    assert max(shares) - min(shares) < 0.01
    assert [len(dataset.splits[k]) for k in ("train", "val", "test")] == [1050, 525, 1049]
    again = open_dataset("elpv", val_share=0.2)
    assert again.identity() == dataset.identity()


def test_flat_tree(tmp_path):
    samples.image_tree(tmp_path, {"b": 20, "a": 10})
    dataset = open_dataset("folder", tmp_path, val_share=0.25)
    assert dataset.classes == ("a", "b")
    assert np.bincount(dataset.targets_N).tolist() == [10, 20]
    assert [len(dataset.splits[k]) for k in ("train", "val", "test")] == [18, 6, 6]
    assert_splits_are_sound(dataset)


def test_tree_with_splits(tmp_path):
    for split, count in (("train", 8), ("val", 3), ("test", 2)):
        samples.image_tree(tmp_path / split, {"a": count, "b": count})
    dataset = open_dataset("folder", tmp_path)
    assert [len(dataset.splits[k]) for k in ("train", "val", "test")] == [16, 6, 4]
    assert_splits_are_sound(dataset)


def test_tree_like_imagenet_reports_on_val_and_selects_on_a_part_of_train(tmp_path):
    for split, count in (("train", 20), ("val", 5)):
        samples.image_tree(tmp_path / split, {"a": count, "b": count})
    dataset = open_dataset("folder", tmp_path, val_share=0.1)
    assert [len(dataset.splits[k]) for k in ("train", "val", "test")] == [36, 4, 10]
    assert dataset.splits["test"].min() == 40


def test_mistakes_name_the_place(tmp_path):
    with pytest.raises(ValueError, match="no data set is called 'cifar11'; there are"):
        open_dataset("cifar11", tmp_path)
    with pytest.raises(ValueError, match="there is no folder /nope"):
        open_dataset("folder", "/nope")
    with pytest.raises(ValueError, match="needs the folder"):
        open_dataset("stl10")
    with pytest.raises(ValueError, match="has no class folders"):
        open_dataset("folder", tmp_path)
    with pytest.raises(ValueError, match="has no folder cifar-10-batches-py"):
        open_dataset("cifar10", tmp_path)
    samples.image_tree(tmp_path, {"a": 3})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        open_dataset("folder", tmp_path)
    samples.image_tree(tmp_path / "other/train", {"a": 3})
    samples.image_tree(tmp_path / "other/val", {"a": 3, "z": 1})
    with pytest.raises(ValueError, match=r"train does not have: \['z'\]"):
        open_dataset("folder", tmp_path / "other")


def test_truncated_files(tmp_path):
    samples.stl10(tmp_path)
    path = tmp_path / "stl10_binary/train_X.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="do not hold equally many"):
        open_dataset("stl10", tmp_path, verify=False)
    samples.fashion_mnist(tmp_path, packed=True)
    path = tmp_path / "FashionMNIST/raw/train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cannot read .*train-images"):
        open_dataset("fashion_mnist", tmp_path, verify=False)
    path.write_bytes(gzip.compress(b"\x01\x02\x03\x04" * 8))
    with pytest.raises(ValueError, match="no idx file"):
        open_dataset("fashion_mnist", tmp_path, verify=False)


class _Trap:
    def __reduce__(self):
        return (print, ("code in a pickle ran",))


def test_a_pickle_with_code_in_it_is_refused(tmp_path, capfd):
    samples.cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps({"data": _Trap()}, protocol=2))
    with pytest.raises(ValueError, match=r"data_batch_3: it names .*print, and only arrays are expected"):
        open_dataset("cifar10", tmp_path, verify=False)
    assert "ran" not in capfd.readouterr().out


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_modes_become_rgb(tmp_path, mode):
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (16, 1))
    image = (
        Image.fromarray(grey.astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(grey).convert("RGB").convert(mode)
    )
    path = tmp_path / ("image.tif" if mode in ("CMYK", "I;16") else "image.png")
    image.save(path)
    out = read_image(path)
    assert out.shape == (16, 64, 3) and out.dtype == np.uint8
    if mode in ("L", "LA", "RGBA", "I;16"):
        assert (out[..., 0] == grey).all()


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (40, 20, 3)


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_unreadable_images_name_their_file(tmp_path, content):
    path = tmp_path / "image.jpg"
    if content == "truncated":
        Image.fromarray(samples.pixels(1, 64)[0]).save(path)
        content = path.read_bytes()[:600]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the image .*image\.jpg"):
        read_image(path)


def test_labelled_part_keeps_proportions_and_nests():
    targets = np.array([0] * 90 + [1] * 30)
    index = np.arange(120)
    small, large = (labelled_part(targets, index, n) for n in (40, 80))
    assert np.bincount(targets[small]).tolist() == [30, 10]
    assert np.bincount(targets[large]).tolist() == [60, 20]
    assert set(small) <= set(large)
    for bad in (1, 121):
        with pytest.raises(ValueError, match="is not between 2"):
            labelled_part(targets, index, bad)


def test_split_off_is_fixed_and_stratified():
    stratum = np.array([0] * 70 + [1] * 30)
    rest, held = split_off(stratum, np.arange(100) * 2, 0.3, purpose=2)
    assert np.bincount(stratum[held // 2]).tolist() == [21, 9]
    assert sorted([*rest, *held]) == list(range(0, 200, 2))
    assert (split_off(stratum, np.arange(100) * 2, 0.3, purpose=2)[1] == held).all()
    assert (split_off(stratum, np.arange(100) * 2, 0.3, purpose=3)[1] != held).any()


def test_toy_is_balanced():
    dataset = open_dataset("toy")
    assert np.bincount(dataset.targets_N).tolist() == [80, 80, 80]
    assert_splits_are_sound(dataset)


def test_every_data_set_is_in_the_table():
    assert set(tables.DATASETS) == {
        "beton", "cifar10", "cifar100", "elpv", "fashion_mnist", "folder", "hmdb51", "imagenet", "kinetics400", "list", "motion",
        "places365", "stl10", "tar", "toy", "ucf101", "videos", "voc",
    }  # fmt: skip
