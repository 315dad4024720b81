"""Damaged data sets of few files: CIFAR's pickles, STL-10's arrays, Fashion-MNIST's idx files, packed or not."""

import gzip
import io
import pickle
import struct

import numpy as np
import pytest
from fasttrain.loaders import open_dataset
from fasttrain.loaders.datasets.cifar import _ArraysOnly

from .damaged import DamagedFiles, faults, told, watch
from .sets import opened, tiny


@pytest.mark.parametrize(
    ("name", "count"), [("cifar10", 60), ("cifar100", 30), ("stl10", 40), ("fashion_mnist", 60), ("idx", 40)]
)
def test_every_damage_is_refused_or_harmless(name, count, tmp_path):
    root = tiny("fashion_mnist" if name == "idx" else name, tmp_path / "set", samples=2)
    if name == "idx":
        for path in sorted(root.rglob("*.gz")):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    files = sorted(p for p in root.rglob("*") if p.is_file())
    kind = "fashion_mnist" if name == "idx" else name
    damage = DamagedFiles(files, opened(kind, root))
    outcomes = damage.watch(count, str(root))
    print(name, told(outcomes))
    assert not faults(outcomes) and any(o.kind == "refused" for o in outcomes)


def loaded(content: bytes) -> object:
    return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()


@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i8", "<f4", "i2"])
@pytest.mark.parametrize("protocol", range(5))
def test_arrays_of_every_protocol_are_read(dtype, protocol):
    array = np.arange(12).astype(dtype).reshape(3, 4)
    content = pickle.dumps({"data": array, "labels": [1, -2, 1 << 70], "name": "é"}, protocol=protocol)
    found, right = loaded(content), pickle.loads(content)["data"]
    assert isinstance(found, dict) and found["data"].dtype == right.dtype and np.array_equal(found["data"], right)
    assert found["labels"] == [1, -2, 1 << 70] and found["name"] == "é"


def of_array(shape: bytes, kind: bytes, state: bytes, data: bytes) -> bytes:
    """A pickle of an array of this shape, type, state of its type, and bytes."""
    start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nI0\n\x85U\x01b\x87R"
    about = b"(I1\n" + shape + b"cnumpy\ndtype\nU" + bytes([len(kind)]) + kind + b"I0\nI1\n\x87R" + state
    return b"\x80\x02" + start + about + b"\x89U" + bytes([len(data)]) + data + b"tb."


_TYPE = b"(I3\nU\x01|NNNI-1\nI-1\nI0\ntb"


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]r\xff\xff\xff\x7f.",
        b"\x80\x02" + b"c_codecs\nencode\n" * 30 + b"X\x01\0\0\0a" + b"X\x03\0\0\0hex\x86R" * 30 + b".",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"a.",
        b"\x80\x02\x58\xff\xff\xff\xffa.",
        b"\x80\x02\x8b\xff\xff\xff\x7fa.",
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nI9999999999\n\x85U\x01b\x87R.",
        b"cnumpy\nndarray\nI9999999999\n\x85\x85R.",
        of_array(b"I3\n\x85", b"O8", b"", b"abc"),
        of_array(b"I3\n\x85", b"V3", b"", b"abcabcabc"),
        of_array(b"I-1\nI-3\n\x86", b"u1", _TYPE, b"abc"),
        of_array(b"I4\n\x85", b"u1", _TYPE, b"abc"),
        of_array(b"I3\n\x85", b"u1", b"(I4\nU\x01|NNNI-1\nI-1\nI63\nNtb", b"abc"),
        of_array(b"I3\n\x85", b"u1", b"(I3\nU\x01|NNNI-1\nI-1\nI63\ntb", b"abc"),
        b"cos\nsystem\nU\x04true\x85R.",
        b"cbuiltins\neval\nU\x011\x85R.",
        b"(ios\nsystem\n.",
        b"P1\n.",
        b"\x80\x02" + b"(" * 1000 + b".",
        b"\x80\x02}}b.",
    ],
)
def test_pickles_that_are_made_to_harm_are_refused(content, tmp_path):
    root = tiny("cifar10", tmp_path / "set", samples=2)
    path = root / "cifar-10-batches-py/data_batch_2"
    path.write_bytes(content)
    read = opened("cifar10", root)
    outcomes = watch(lambda case: read() if case >= 0 else "", [0], size=len(content), names=(str(path),))
    assert [o.kind for o in outcomes] == ["refused"], outcomes


def test_the_array_that_the_harmful_ones_are_made_from_is_read():
    found = loaded(of_array(b"I3\n\x85", b"u1", _TYPE, b"abc"))
    assert isinstance(found, np.ndarray) and found.tolist() == [97, 98, 99]


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"])
def test_no_more_of_a_packed_file_is_unpacked_than_it_says(name, tmp_path):
    root = tiny("fashion_mnist", tmp_path / "set", samples=2)
    path = next(root.rglob(name))
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole + bytes(300 << 20), compresslevel=1))
    read = opened("fashion_mnist", root)
    for content in (path.read_bytes(), gzip.compress(whole[:4] + struct.pack(">I", (1 << 31) - 1) + whole[8:])):
        path.write_bytes(content)
        outcomes = watch(lambda case: read() if case >= 0 else "", [0], size=1 << 16, names=(name,))
        assert [o.kind for o in outcomes] == ["refused"], outcomes


def test_labels_beyond_the_classes_are_refused(tmp_path):
    root = tiny("fashion_mnist", tmp_path / "set", samples=2)
    path = next(root.rglob("train-labels*"))
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1] + b"\x0a"))
    with pytest.raises(ValueError, match="labels go to 10, and there are 10 classes"):
        open_dataset("fashion_mnist", root, verify=False)
