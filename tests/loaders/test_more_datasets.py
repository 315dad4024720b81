"""Tar shards and lists as they lie on disk, and what is said of damaged ones."""

import io
import json
import multiprocessing
import os
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fasttrain.loaders import Dataset, open_dataset
from fasttrain.loaders.datasets import tar as tar_module
from fasttrain.loaders.datasets.base import Encoded, Files
from PIL import Image

from . import samples


def encoded(seed: int, suffix: str = ".png") -> bytes:
    out = io.BytesIO()
    Image.fromarray(samples.pixels(1, 12, seed)[0]).save(out, Image.registered_extensions()[suffix])
    return out.getvalue()


def assert_sound(dataset: Dataset, *sizes: int) -> None:
    assert list(dataset.splits) == ["train", "val", "test"]
    assert tuple(map(len, dataset.splits.values())) == sizes
    together = np.concatenate(list(dataset.splits.values()))
    assert together.dtype == np.int64
    assert sorted(together) == list(range(len(dataset)))
    assert all((np.diff(v) > 0).all() for v in dataset.splits.values())
    assert isinstance(dataset.read, Encoded)


def assert_same_pixels(dataset: Dataset, paths: list[Path]) -> None:
    files = Files(paths)
    for i in range(len(paths)):
        assert (dataset.read(i) == files(i)).all()
        assert (dataset.read.encoded(i) == files.encoded(i)).all()
        assert dataset.read.size(i) == files.size(i)


def shard(path: Path, members: dict[str, bytes | str | int], **how) -> Path:
    with tarfile.open(path, "w", **how) as file:
        for name, content in members.items():
            content = content if isinstance(content, bytes) else str(content).encode()
            about = tarfile.TarInfo(name)
            about.size = len(content)
            file.addfile(about, io.BytesIO(content))
    return path


def members(count: int, first: int = 0, classes: int = 2) -> dict[str, bytes | str | int]:
    out: dict[str, bytes | str | int] = {}
    for i in range(first, first + count):
        out |= {f"{i:06}.png": encoded(i), f"{i:06}.cls": i % classes}
    return out


# tar


def test_shards_hold_the_files_pixels(tmp_path):
    paths = []
    for k, suffix in enumerate([".png", ".jpg", ".webp", ".JPEG"]):
        contents = {f"{k}/{i}": encoded(10 * k + i, suffix.lower()) for i in range(5)}
        both = [{f"{n}{suffix}": c, f"{n}.cls": n[-1], f"{n}.txt": "not looked at"} for n, c in contents.items()]
        shard(tmp_path / f"birds-{k}.tar", {k: v for entry in both for k, v in entry.items()})
        for name, content in contents.items():
            paths.append(tmp_path / f"{name.replace('/', '-')}{suffix.lower()}")
            paths[-1].write_bytes(content)
    dataset = open_dataset("tar", tmp_path, val_share=0.25)
    assert dataset.classes == ("0", "1", "2", "3", "4")
    assert dataset.targets_N.tolist() == [0, 1, 2, 3, 4] * 4 and dataset.targets_N.dtype == np.int64
    assert dataset.read.name(7) == f"{tmp_path}/birds-1.tar/1/2.jpg"
    assert dataset.read.total_bytes(20) == sum(p.stat().st_size for p in paths)
    assert_same_pixels(dataset, paths)
    assert_sound(dataset, 10, 5, 5)
    assert not dataset.read.encoded(0).flags.writeable
    before = dataset.read.fingerprint(20)
    os.utime(tmp_path / "birds-2.tar", (1, 1))
    assert before != dataset.read.fingerprint(20)


@pytest.mark.parametrize("prefix", ["", "birds-"])
@pytest.mark.parametrize(
    ("given", "sizes", "tested"),
    [
        ("train validation test", (40, 20, 10), "test"),
        ("train val", (36, 4, 20), "val"),
        ("train test", (36, 4, 10), "test"),
        ("train", (28, 4, 8), None),  # 16 of each class are left, of which 1.6 validate
    ],
)
def test_shards_splits_go_by_their_names(tmp_path, prefix, given, sizes, tested):
    first, index = 0, {}
    for split in sorted(given.split()):
        count = {"tes": 5, "tra": 20, "val": 10}[split[:3]]
        for part in range(2):
            shard(tmp_path / f"{prefix}{split}-{part}.tar", members(count, first + part * count))
        index[split] = list(range(first, first + 2 * count))
        first += 2 * count
    dataset = open_dataset("tar", tmp_path, val_share=0.1)
    assert_sound(dataset, *sizes)
    assert tested is None or dataset.splits["test"].tolist() == index[tested]


def test_shards_without_a_split_are_parted_like_a_flat_tree(tmp_path):
    (tmp_path / "shards").mkdir()
    images = {}
    for name, count in (("a", 20), ("b", 10)):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "tree" / name / f"{i:02}.png").write_bytes(encoded(i))
            images |= {f"{name}{i:02}.png": encoded(i), f"{name}{i:02}.cls": name + "\n"}
    shard(tmp_path / "shards/0.tar", images)
    flat, shards = open_dataset("folder", tmp_path / "tree"), open_dataset("tar", tmp_path / "shards")
    assert shards.classes == flat.classes == ("a", "b")
    assert (shards.targets_N == flat.targets_N).all()
    for split, index_M in flat.splits.items():
        assert (shards.splits[split] == index_M).all()


def test_shards_classes(tmp_path):
    def classes(*labels: object, names: str = "", suffix: str = "cls") -> tuple:
        entries = {}
        for i, label in enumerate(labels):
            entries |= {f"{i}.png": b"image", f"{i}.{suffix}": json.dumps(label) if suffix == "json" else str(label)}
        shard(tmp_path / "train.tar", entries)
        (tmp_path / "classes.txt").write_text(names) if names else (tmp_path / "classes.txt").unlink(missing_ok=True)
        dataset = open_dataset("tar", tmp_path)
        return dataset.classes, dataset.targets_N.tolist()

    assert classes(2, 0, 0) == (("0", "1", "2"), [2, 0, 0])
    assert classes("dog", " cat\n", "dog") == (("cat", "dog"), [1, 0, 1])
    assert classes("dog", "cat", names="dog\ncat\nfox\n") == (("dog", "cat", "fox"), [0, 1])
    assert classes(1, 0, names="\ufeffdog\r\ncat\r\n\r\nfox") == (("dog", "cat", "fox"), [1, 0])
    assert classes("7", "5", names="5\n6\n7") == (("5", "6", "7"), [2, 0])  # names, though they look like integers
    assert classes("911", "Cayenne") == (("911", "Cayenne"), [0, 1])
    assert classes({"label": 1, "cls": 5}, {"cls": "0"}, {"label": 1}, suffix="json") == (("0", "1"), [1, 0, 1])
    assert classes({"label": 1}, {"label": "dog"}, names="dog\ncat", suffix="json") == (("dog", "cat"), [1, 0])
    many = [{"labels": ["dog", "cat"]}, {"labels": []}, {"labels": ["cat"]}]
    assert classes(*many, suffix="json") == (("cat", "dog"), [[1, 1], [0, 0], [1, 0]])
    assert open_dataset("tar", tmp_path).targets_N.dtype == np.float32
    with pytest.raises(
        ValueError, match=r"train\.tar/1\.png: the label 'fox' is not one of the 2 classes in .*classes"
    ):
        classes("dog", "fox", names="dog\ncat")
    with pytest.raises(ValueError, match=r"train\.tar/1\.png: the label '2' is not .* integer from 0 to 1"):
        classes(0, 2, names="dog\ncat")
    with pytest.raises(ValueError, match=r"train\.tar/0\.png: the label '-1' is not an integer from 0 to 3"):
        classes(-1, 3)
    with pytest.raises(
        ValueError, match=r"train\.tar/1\.png: the label '4294967295' is not an integer from 0 to 99999"
    ):
        classes(0, 4294967295)
    with pytest.raises(ValueError, match=r"train\.tar/0\.png: the label 3 is not one of the 1 class names"):
        classes({"label": 3}, {"label": "dog"}, suffix="json")
    with pytest.raises(
        ValueError, match=r"train\.tar/1\.png: one label here and a list of them in .*train\.tar/0\.png"
    ):
        classes({"label": 0}, {"labels": [0]}, suffix="json")
    with pytest.raises(ValueError, match="no training sample has a label, and there is no classes"):
        classes({"labels": []}, suffix="json")
    with pytest.raises(ValueError, match=r"classes\.txt: the class 'dog' is there twice"):
        classes(0, names="dog\ncat\ndog")
    for label in ({"label": True}, {"label": 1.0}, {"label": [1]}, {"labels": 1}, {"labels": [None]}, {"label": ""}):
        with pytest.raises(ValueError, match=r"train\.tar/0\.json: labels? is to be "):
            classes(label, suffix="json")
    with pytest.raises(ValueError, match=r"train\.tar/0\.json: an object with label, cls or labels is expected"):
        classes({"caption": "a dog"}, suffix="json")
    with pytest.raises(ValueError, match=r"train\.tar/0\.cls: cls is to be an integer or a class name, not ''"):
        classes("")


def test_a_class_that_only_other_splits_have_is_refused(tmp_path):
    shard(tmp_path / "train-0.tar", members(4))
    shard(tmp_path / "val-0.tar", members(4, 4, classes=3))
    with pytest.raises(
        ValueError, match=r"val-0\.tar/000005\.png: the label '2' is not .* as the training samples have"
    ):
        open_dataset("tar", tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert open_dataset("tar", tmp_path).classes == ("a", "b", "c")


@pytest.mark.parametrize("how", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_tar_format(tmp_path, how):
    long = "/".join(["folder" * 5] * 4) if how == tarfile.USTAR_FORMAT else "/".join(["ordner-ü" * 10] * 5)
    entries = {f"./{long}/{i}.{k}": v for i in range(3) for k, v in (("png", encoded(i)), ("cls", i))}
    more = {} if how == tarfile.USTAR_FORMAT else {"a" * 300 + ".png": encoded(3), "a" * 300 + ".cls": 3}
    hidden = {".hidden.png": b"", "readme": b"no suffix", "folder.d/._9.png": b""}
    path = shard(tmp_path / "0.tar", entries | more | hidden | {"b.png": encoded(4), "b.cls": 2}, format=how)
    with tarfile.open(path, "a", format=how) as file:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE):
            about = tarfile.TarInfo("folder.more/" + "x" * 90)
            about.type, about.linkname = kind, "y" * (90 if how == tarfile.USTAR_FORMAT else 200)
            file.addfile(about)
        about = tarfile.TarInfo("c.d/last.png")
        about.size, about.pax_headers = 3, {"comment": "größer"}
        file.addfile(about, io.BytesIO(b"end"))
        about = tarfile.TarInfo("c.d/last.cls")
        about.size, about.uid = 1, 1 << 40 if how != tarfile.USTAR_FORMAT else 0
        file.addfile(about, io.BytesIO(b"0"))
    dataset = open_dataset("tar", tmp_path)
    with tarfile.open(path) as file:
        expected = [(m.name, file.extractfile(m).read()) for m in file if m.isreg() and m.name[-4:] == ".png"]
    expected = [(n, c) for n, c in expected if not n.rpartition("/")[2].startswith(".")]
    assert len(dataset) == len(expected) == (5 if how == tarfile.USTAR_FORMAT else 6)
    for i, (name, content) in enumerate(expected):
        assert dataset.read.name(i).removeprefix(f"{path}/") == name
        assert bytes(dataset.read.encoded(i)) == content


def test_sizes_in_base_256_and_in_pax_headers(tmp_path):
    head = bytearray(tarfile.TarInfo("a.png").tobuf())
    head[124:136] = b"\x80" + (5).to_bytes(11, "big")
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + sum(head[156:]) + 8 * 32)
    label = tarfile.TarInfo("a.cls")
    label.size = 1
    body = bytes(head) + b"image".ljust(512, b"\0") + label.tobuf() + b"3".ljust(512, b"\0")
    extended = tarfile.TarInfo("pax")
    extended.type, extended.size = tarfile.XHDTYPE, len(b"10 size=7\n")
    empty = tarfile.TarInfo("b.png")
    body += (
        extended.tobuf(tarfile.USTAR_FORMAT)
        + b"10 size=7\n".ljust(512, b"\0")
        + empty.tobuf()
        + b"picture".ljust(512, b"\0")
    )
    label = tarfile.TarInfo("b.cls")
    label.size = 1
    body += label.tobuf() + b"0".ljust(512, b"\0")
    (tmp_path / "0.tar").write_bytes(body + bytes(1024))
    dataset = open_dataset("tar", tmp_path)
    assert [bytes(dataset.read.encoded(i)) for i in range(2)] == [b"image", b"picture"]
    (tmp_path / "0.tar").write_bytes(body.replace(b"10 size=7", b"10 size=x") + bytes(1024))
    with pytest.raises(ValueError, match=r"0\.tar is damaged: a pax header has the record b'10 size=x"):
        open_dataset("tar", tmp_path)


def test_a_shard_that_is_cut_off_anywhere_is_refused(tmp_path):
    path = shard(tmp_path / "0.tar", members(3))
    content = path.read_bytes()
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512  # of the last member; zeros follow
    for at in [*range(0, end, 256), end - 1, end + 100]:
        path.write_bytes(content[:at])
        with pytest.raises(ValueError, match=r"0\.tar is cut off"):
            open_dataset("tar", tmp_path)
    path.write_bytes(content[: end + 512])
    assert len(open_dataset("tar", tmp_path)) == 3
    path.write_bytes(content[: content.index(b"000000.cls") + 512])
    with pytest.raises(ValueError, match=r"0\.tar is cut off in its member 000000\.cls: it ends at byte \d+ of \d+"):
        open_dataset("tar", tmp_path)


def test_damaged_shards_raise_nothing_but_value_errors(tmp_path):
    path = shard(tmp_path / "0.tar", members(2) | {"a" * 200 + ".png": b"image", "a" * 200 + ".cls": 1})
    content, rng, refused = path.read_bytes(), random.Random(0), []
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(8192)] = rng.choice([0, 0x37, 0x80, 0xFF, rng.randrange(256)])
        path.write_bytes(damaged)
        try:
            dataset = open_dataset("tar", tmp_path)
            [dataset.read.encoded(i) for i in range(len(dataset))]
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert all(str(path) in message for message in refused)


def test_samples_that_are_not_whole(tmp_path):
    def opening(**entries):
        shard(tmp_path / "0.tar", {k.replace("_", "."): v for k, v in entries.items()})
        return open_dataset("tar", tmp_path)

    with pytest.raises(ValueError, match=r"0\.tar/b\.png: the sample b has no label \(\.cls or \.json\): \.png, \.txt"):
        opening(a_png=b"x", a_cls=0, b_png=b"x", b_txt=b"x")
    with pytest.raises(
        ValueError, match=r"0\.tar/b\.cls: the sample b has no image \(\.jpg, \.png, \.\.\): \.cls, \.v2\.png"
    ):
        opening(a_png=b"x", a_cls=0, b_cls=0, b_v2_png=b"x")
    with pytest.raises(ValueError, match=r"0\.tar/a\.cls: the sample a has 2 images: \.cls, \.png, \.jpg"):
        opening(a_cls=0, a_png=b"x", a_jpg=b"x")
    with pytest.raises(ValueError, match=r"0\.tar/a\.PNG: the sample a has a a\.png already"):
        opening(a_png=b"x", a_PNG=b"x", a_cls=0)
    with pytest.raises(ValueError, match=r"0\.tar/a\.txt: there is a sample a already, further up in this shard"):
        opening(a_png=b"x", a_cls=0, b_png=b"x", b_cls=0, a_txt=b"x")
    with pytest.raises(ValueError, match=r"cannot read the label .*0\.tar/a\.cls"):
        opening(a_png=b"x", a_cls=b"\xff")
    with pytest.raises(ValueError, match=r"cannot read the label .*0\.tar/a\.json"):
        opening(a_png=b"x", a_json=b"{")
    with pytest.raises(ValueError, match=r"0\.tar/a\.cls: a label has at most 1048576 bytes, not 1048577"):
        opening(a_png=b"x", a_cls=bytes(1048577))
    with pytest.raises(ValueError, match="hold no samples"):
        opening()
    dataset = opening(a_png=b"no image", a_cls=0)
    with pytest.raises(ValueError, match=r"cannot read the image .*0\.tar/a\.png"):
        dataset.read(0)


def test_what_is_no_shard(tmp_path):
    with pytest.raises(ValueError, match=r"data\.root: .* holds no \.tar"):
        open_dataset("tar", tmp_path)
    shard(tmp_path / "train-0.tar", members(2))
    shard(tmp_path / "extra.tar", members(2))
    with pytest.raises(ValueError, match=r"extra\.tar: other shards are named train\*, val\* or test\*"):
        open_dataset("tar", tmp_path)
    (tmp_path / "extra.tar").unlink()
    (tmp_path / "train-0.tar").rename(tmp_path / "test-0.tar")
    with pytest.raises(ValueError, match=r"has no samples in shards named train\*\.tar"):
        open_dataset("tar", tmp_path)
    (tmp_path / "test-0.tar").write_bytes(b"text" * 1000)
    with pytest.raises(ValueError, match=r"test-0\.tar is damaged, or no tar: no header at byte 0"):
        open_dataset("tar", tmp_path)
    with tarfile.open(tmp_path / "test-0.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"test-0\.tar is compressed \(gzip\): unpack it"):
        open_dataset("tar", tmp_path)
    (tmp_path / "test-0.tar").rename(tmp_path / "test-0.tar.gz")
    with pytest.raises(ValueError, match=r"test-0\.tar\.gz is compressed, .* unpack it to a \.tar"):
        open_dataset("tar", tmp_path)


def test_a_shard_that_changes_while_it_is_read(tmp_path):
    path = shard(tmp_path / "0.tar", members(3))
    dataset = open_dataset("tar", tmp_path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"cannot read the image .*0\.tar/000002\.png: the shard was cut off"):
        dataset.read(2)
    dataset = pickle.loads(pickle.dumps(dataset))
    path.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*0\.tar"):
        dataset.read(0)


def _pixel_sum(read: Encoded, index: int) -> int:
    return int(np.asarray(Image.open(io.BytesIO(read.encoded(index).tobytes()))).sum(dtype=np.int64))


def test_shards_are_read_after_pickling_and_in_forked_processes(tmp_path, monkeypatch):
    for k in range(5):
        shard(tmp_path / f"{k}.tar", members(4, 4 * k))
    monkeypatch.setattr(tar_module, "_MAX_MAPS", 2)
    read = open_dataset("tar", tmp_path).read
    first = len(pickle.dumps(read))
    views = [read.encoded(i) for i in range(20)]  # more shards than maps
    assert len(read._maps) <= 2
    assert len(pickle.dumps(read)) == first
    again = pickle.loads(pickle.dumps(read))
    assert all((again.encoded(i) == v).all() for i, v in enumerate(views))
    expected = [_pixel_sum(read, i) for i in range(20)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(_pixel_sum, [(read, i) for i in range(20)]) == expected
    before = read._maps
    child = os.fork()
    if child == 0:
        os._exit(0 if [_pixel_sum(read, i) for i in range(20)] == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read._maps is before and (views[0] == again.encoded(0)).all()


# list


def images(root: Path, *names: str) -> list[Path]:
    paths = [root / n for n in names]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))
    return paths


def test_list_csv(tmp_path):
    paths = images(tmp_path, "a/0.png", "a/1, 2.png", "b c/0.png", "top.png", '"quoted".png')
    (tmp_path / "list.csv").write_bytes(
        b'\xef\xbb\xbfPath, label ,width,split\r\na/0.png,dog,3,train\r\n\r\n"a/1, 2.png",cat,,val\r\n'
        b'b c/0.png,"cat",4,test\r\n./top.png,dog,1,train\r\n"""quoted"".png", cat ,1,train'
    )
    dataset = open_dataset("list", tmp_path)
    assert dataset.classes == ("cat", "dog")
    assert dataset.targets_N.tolist() == [1, 0, 0, 1, 0]
    assert {k: v.tolist() for k, v in dataset.splits.items()} == {"train": [0, 3, 4], "val": [1], "test": [2]}
    assert_same_pixels(dataset, paths)
    assert dataset.read.name(1) == str(paths[1])
    assert open_dataset("list", tmp_path / "list.csv").identity() == dataset.identity()
    (tmp_path / "classes.txt").write_text("fox\ndog\ncat\n")
    named = open_dataset("list", tmp_path)
    assert named.classes == ("fox", "dog", "cat") and named.targets_N.tolist() == [1, 2, 2, 1, 2]
    assert pickle.loads(pickle.dumps(named)).identity() == named.identity()


def test_list_jsonl(tmp_path):
    paths = images(tmp_path, *(f"{i}.png" for i in range(30)))
    rows = [json.dumps({"path": p.name, "label": i % 3}) for i, p in enumerate(paths)]
    (tmp_path / "all.jsonl").write_text("\ufeff" + "\r\n\n".join(rows), encoding="utf-8")
    dataset = open_dataset("list", str(tmp_path / "all.jsonl"), val_share=0.25)
    assert dataset.classes == ("0", "1", "2") and dataset.targets_N.tolist() == [0, 1, 2] * 10
    assert_sound(dataset, 18, 6, 6)
    assert np.bincount(dataset.targets_N[dataset.splits["test"]]).tolist() == [2, 2, 2]
    assert_same_pixels(dataset, paths)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_list_of_several_labels(tmp_path, form):
    images(tmp_path, *(f"{i}.png" for i in range(20)))
    shown = [["dog", "cat"], [], ["fox"], ["dog"]] * 5
    if form == "csv":
        lines = ["path,labels", *(f"{i}.png,{' | '.join(s)}" for i, s in enumerate(shown))]
    else:
        lines = [json.dumps({"labels": s, "path": f"{i}.png"}) for i, s in enumerate(shown)]
    (tmp_path / f"list.{form}").write_text("\n".join(lines))
    dataset = open_dataset("list", tmp_path, val_share=0.25)
    assert dataset.multi_label and dataset.targets_N.dtype == np.float32
    assert dataset.classes == ("cat", "dog", "fox")
    assert dataset.targets_N[:4].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert_sound(dataset, 12, 4, 4)


@pytest.mark.parametrize(
    ("given", "sizes"),
    [("train val test", (10, 10, 10)), ("train val", (8, 2, 10)), ("train test", (8, 2, 10)), ("train", (6, 2, 2))],
)
def test_list_splits(tmp_path, given, sizes):
    rows = [(f"{split}{i}.png", i % 2, split) for split in given.split() for i in range(10)]
    images(tmp_path, *(r[0] for r in rows))
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *(",".join(map(str, r)) for r in rows)]))
    dataset = open_dataset("list", tmp_path, val_share=0.2)
    assert_sound(dataset, *sizes)
    held = {rows[i][2] for i in dataset.splits["test"]}
    assert held == {"test" if "test" in given else given.split()[-1]}


def refused(tmp_path: Path, content: str | bytes, match: str, name: str = "list.csv") -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=match) as error:
        open_dataset("list", tmp_path)
    assert name in str(error.value)
    (tmp_path / name).unlink()


def test_lists_that_cannot_be_parsed(tmp_path):
    images(tmp_path, "a.png", "b.png")
    for content in ("file,label\na.png,0", "a.png,0\nb.png,1", "path,class\na.png,0", "path,label,labels\na.png,0,0"):
        refused(tmp_path, content, r"list\.csv, line 2: there have to be path and either label or labels, not ")
    refused(tmp_path, "path,label,Path\na.png,0,b.png", "line 1: a column is there twice: path, label, path")
    refused(tmp_path, "path,label\n\na.png,0,1", r"line 3: 3 fields, and the header has 2 \(path, label\)")
    refused(tmp_path, 'path,label\na.png,0\n"b.png,1', "line 3: unexpected end of data")
    refused(tmp_path, "path,label\na.png,0\nb.png,", "line 3: label is to be an integer or a class name, not ''")
    refused(tmp_path, "path,label\n,0", "line 2: path is to be a text, not ''")
    for content in ("", "path,label\n", "\n\n"):
        refused(tmp_path, content, r"list\.csv lists nothing")
    refused(
        tmp_path,
        "path,label,split\na.png,0,train\nb.png,0,valid",
        "line 3: the split 'valid' is not train, val or test",
    )
    refused(tmp_path, "path,label,split\na.png,0,test\nb.png,0,val", "no line has the split train")
    refused(tmp_path, "path,label\na.png,0\nb.png,1\n./a.png,1", r"line 4: \./a\.png is there already, in line 2")
    refused(tmp_path, b"path,label\n\xe9.png,0", "cannot read .*utf-8")
    refused(
        tmp_path,
        "path,label,split\na.png,x,train\nb.png,y,test",
        "line 3: the label 'y' is not one of the 1 class names",
    )

    def line(**more) -> str:
        return json.dumps({"path": "a.png", "label": 0} | more) + "\n"

    refused(tmp_path, line() + "{", "line 2: it is no JSON", "list.jsonl")
    refused(tmp_path, "[" * 100_000, "line 1: it is no JSON", "list.jsonl")
    refused(tmp_path, "[1]", "line 1: an object is expected", "list.jsonl")
    refused(tmp_path, '{"path": "a.png"}', "line 1: there have to be path and", "list.jsonl")
    refused(tmp_path, line() + line(split="train"), "line 2: it has .*'split'.*, and the first has", "list.jsonl")
    refused(tmp_path, line(path=3), "line 1: path is to be a text, not 3", "list.jsonl")
    refused(tmp_path, line(label=0.5), "line 1: label is to be an integer", "list.jsonl")
    refused(tmp_path, '{"path": "a.png", "labels": "a|b"}', "line 1: labels is to be a list", "list.jsonl")
    refused(tmp_path, line(split=["train"]), r"line 1: the split \['train'\] is not", "list.jsonl")


def test_paths_stay_in_the_lists_folder(tmp_path):
    (tmp_path / "outside").mkdir()
    root = tmp_path / "set"
    outside, inside = images(tmp_path, "outside/x.png", "set/a.png")
    (root / "link.png").symlink_to(outside)
    (root / "folder").symlink_to(outside.parent)
    (root / "here.png").symlink_to(inside)
    (root / "loop.png").symlink_to("loop.png")
    for path in (str(inside), "../outside/x.png", "folder/../a.png", "..", "a.png\0b"):
        row = json.dumps({"path": path, "label": 0})
        refused(root, row, r"line 1: .* is not a path below .*: no '/' first, no '\.\.'", "list.jsonl")
    for path in ("link.png", "folder/x.png", "folder/none.png"):
        refused(root, f"path,label\na.png,0\n{path},0", rf"line 3: {path} leads out of .*set, to .*outside")
    refused(root, "path,label\na.png,0\nhere.png,0", r"line 3: here\.png is there already, in line 2")
    for path in ("loop.png", "b.png", "c/d.png", "a.png/b.png", "folder2", ".", "x" * 5000 + "/a.png"):
        if path.startswith("x"):
            refused(root, f"path,label\na.png,0\n{path},0", "list.csv")
        else:
            refused(root, f"path,label\na.png,0\n{path},0\ne.png,0", r"line 3: there is no file .*; 2 of 3 are missing")
    (tmp_path / "alias").symlink_to(root)
    (root / "list.csv").write_text("path,label\nhere.png,0\n")
    assert open_dataset("list", tmp_path / "alias", val_share=0).read(0).shape == (12, 12, 3)


def test_what_is_no_list(tmp_path):
    with pytest.raises(ValueError, match=r"data\.root: there is no folder or file .*none"):
        open_dataset("list", tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no list\.csv and no list\.jsonl"):
        open_dataset("list", tmp_path)
    for name in ("list.csv", "list.jsonl", "list.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"has both list\.csv and list\.jsonl"):
        open_dataset("list", tmp_path)
    with pytest.raises(ValueError, match=r"list\.txt is no list: its name has to end in"):
        open_dataset("list", tmp_path / "list.txt")
    with pytest.raises(ValueError, match=r"data\.root: there is no folder .*list\.txt"):
        open_dataset("folder", tmp_path / "list.txt")
