"""Damaged lists, annotations and archives: what names a data set's files. And no way out of its folder by any of them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fasttrain.loaders import open_dataset
from PIL import Image

from .damaged import DamagedFiles, faults, told, watch
from .sets import opened, sound, tiny


def image(number: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number * 9 % 256, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def listed(root: Path, kind: str) -> list[Path]:
    """A list of 12 images; the files that may be damaged."""
    root.mkdir()
    rows = [{"path": f"i{i:02}.png", "label": i % 3, "split": ("train", "val", "test")[i % 5 // 2]} for i in range(12)]
    if kind == "many":
        rows = [{"path": r["path"], "labels": [r["label"], (r["label"] + 1) % 3]} for r in rows]
    for i, row in enumerate(rows):
        (root / row["path"]).write_bytes(image(i))
    if kind == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    path = root / ("list.csv" if kind == "csv" else "list.jsonl")
    path.write_text("\n".join(lines) + "\n")
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    return [path] if kind == "many" else [path, path, root / "classes.txt"]


def shards(root: Path) -> list[Path]:
    root.mkdir()
    for name, first in (("train-0.tar", 0), ("test-0.tar", 8)):
        with tarfile.open(root / name, "w", format=tarfile.PAX_FORMAT) as file:
            for i in range(first, first + 8):
                key = f"{'long-' * 30 if i == 3 else ''}{i}" + ("é" if i == 5 else "")
                for suffix, content in (("png", image(i)), ("cls", b"%d" % (i % 3))):
                    about = tarfile.TarInfo(f"{key}.{suffix}")
                    about.size = len(content)
                    file.addfile(about, io.BytesIO(content))
    return sorted(root.iterdir())


@pytest.mark.parametrize(("kind", "count"), [("csv", 80), ("jsonl", 80), ("many", 60)])
def test_damaged_lists_are_refused_or_harmless(kind, count, tmp_path):
    files = listed(tmp_path / "set", kind)
    if kind == "many":  # integers with nothing that names them
        (tmp_path / "set/classes.txt").unlink()
    outcomes = DamagedFiles(files, opened("list", tmp_path / "set", pixels=False)).watch(count, str(tmp_path))
    print(kind, told(outcomes))
    assert not faults(outcomes) and any(o.kind == "refused" for o in outcomes)


def test_damaged_shards_are_refused_or_harmless(tmp_path):
    files = shards(tmp_path / "set")
    outcomes = DamagedFiles(files, opened("tar", tmp_path / "set")).watch(120, str(tmp_path))
    print("tar", told(outcomes))
    assert not faults(outcomes) and any(o.kind == "refused" for o in outcomes)


_SIZE = {"voc": {"samples": 2, "side": 16}}
_LISTS = {  # the files of a data set that say what is in it
    "voc": ("*.txt", "*.xml"),
    "places365": ("*.txt",),
    "imagenet": ("*.txt", "*.mat"),
    "ucf101": ("*.txt",),
    "hmdb51": ("*.txt",),
}


@pytest.mark.parametrize(
    ("name", "count"), [("voc", 100), ("places365", 60), ("imagenet", 80), ("ucf101", 60), ("hmdb51", 60)]
)
def test_damaged_split_files_are_refused_or_harmless(name, count, tmp_path):
    root = tiny(name, tmp_path / "set", **_SIZE.get(name, {"classes": 4, "samples": 2, "side": 16}))
    by_pattern = [sorted(root.rglob(pattern)) for pattern in _LISTS[name]]
    files = [path for some in by_pattern for path in some[:12]]
    outcomes = DamagedFiles(files, opened(name, root, pixels=False)).watch(count, str(root))
    print(name, told(outcomes))
    assert not faults(outcomes) and any(o.kind == "refused" for o in outcomes)


def kinetics(root: Path) -> list[Path]:
    for split, first in (("train", 0), ("val", 6)):
        rows = []
        for i in range(first, first + 6):
            label, name = ("dancing ballet", "ski jumping")[i % 2], f"abcdefgh{i:03}"
            path = root / split / label.replace(" ", "_") / f"{name}_000001_000011.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no video")
            rows.append(f"{label},{name},1,11,{split}")
        (root / f"{split}.csv").write_text("\n".join(["label,youtube_id,time_start,time_end,split", *rows]) + "\n")
    return [root / "train.csv", root / "val.csv"]


def test_damaged_lists_of_kinetics_are_refused_or_harmless(tmp_path):
    files = kinetics(tmp_path / "set")
    outcomes = DamagedFiles(files, opened("kinetics400", tmp_path / "set", pixels=False)).watch(60, str(tmp_path))
    print("kinetics400", told(outcomes))
    assert not faults(outcomes) and any(o.kind == "refused" for o in outcomes)


# made to harm


_LAUGHS = "".join(f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(9))


@pytest.mark.parametrize(
    "text",
    [
        f'<!DOCTYPE annotation [<!ENTITY a0 "ha">{_LAUGHS}]><annotation><object><name>&a9;</name></object></annotation>',
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><object><name>&x;</name></object></annotation>',
        '<!DOCTYPE annotation SYSTEM "http://127.0.0.1:9/x.dtd"><annotation/>',
        "<annotation>" + "<a>" * 150_000,
        "<annotation>" * 2000 + "</annotation>" * 2000,
        "<annotation><object><name>" + "dog " * 200_000 + "</name></object></annotation>",
        "<annotation " + " ".join(f'a{i}="1"' for i in range(50_000)) + "/>",
        "<annotation>" + " " * (1 << 20) + "</annotation>",
    ],
    ids=["entities", "file", "network", "deep", "nested", "long", "attributes", "large"],
)
def test_annotations_that_are_made_to_harm_are_refused(text, tmp_path):
    root = tiny("voc", tmp_path / "set", samples=2, side=16)
    path = min(root.rglob("*.xml"))
    path.write_text(text)
    outcomes = watch(
        lambda case: None if case < 0 else opened("voc", root, pixels=False)(), [0], size=len(text), names=(path.name,)
    )
    assert [o.kind for o in outcomes] == ["refused"], outcomes


def test_lists_that_are_made_to_harm_are_refused_in_time(tmp_path):
    def told_of(name: str, root: Path, path: Path, content: bytes | str) -> str:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        size = path.stat().st_size
        read = opened(name, root, pixels=False)
        (outcome,) = watch(lambda case: read() if case >= 0 else None, [0], size=size, names=(str(root),))
        return f"{outcome.kind}: {outcome.about}"

    many = tmp_path / "many"
    (path,) = listed(many, "many")
    rows = path.read_text().splitlines()
    huge = "\n".join([*(f'{{"path": "i00.png", "labels": [{i % 3}]}}' for i in range(2)), rows[3]])
    assert told_of("list", many, path, huge).startswith("refused")
    (many / "classes.txt").write_text("\n".join(["a", *map(str, range(60_000)), "a"]))
    assert "there twice" in told_of("list", many, path, "\n".join(rows))
    assert told_of("list", many, many / "classes.txt", "\n".join(["a", *map(str, range(60_000)), "a"])).startswith(
        "refused"
    )
    assert told_of("list", many, path, "[" * 100_000).startswith("refused")

    root = tiny("places365", tmp_path / "places", classes=4, samples=2, side=16)
    lines = "\n".join(f"/a/a{i} {i}" for i in range(60_000))
    assert told_of("places365", root, root / "categories_places365.txt", lines + "\n/a/x 5").startswith("refused")

    tars = tmp_path / "tars"
    path = shards(tars)[0]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as file:
        file.addfile(tarfile.TarInfo("a/" * 300_000 + "x.y/z"))
    assert told_of("tar", tars, path, out.getvalue()).startswith("refused")


def test_one_wrong_number_does_not_make_a_hundred_thousand_classes(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    rows = [{"path": f"{i}.png", "labels": [i % 7]} for i in range(400)]
    for row in rows:
        (root / row["path"]).write_bytes(b"")
    rows[17]["labels"] = [99_998]
    (root / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="labels go to 99998, and only 8 different ones are there"):
        open_dataset("list", root)
    rows[17]["labels"] = [8]
    (root / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sound(open_dataset("list", root))["classes"] == tuple(map(str, range(9)))


# out of the folder


_OUTSIDE = ["/etc/passwd", "../outside.png", "a/../../outside.png", "link.png", "folder/outside.png", "a\0b"]


@pytest.mark.parametrize("name", _OUTSIDE)
def test_lists_of_files_do_not_lead_out_of_their_folder(name, tmp_path):
    root = tmp_path / "set"
    listed(root, "jsonl")
    (tmp_path / "outside.png").write_bytes(image())
    (root / "a").mkdir()
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "folder").symlink_to(tmp_path)
    for kind in ("list", "videos"):
        with (root / "list.jsonl").open("a") as file:
            file.write(json.dumps({"path": name, "label": 0, "split": "train"}) + "\n")
        with pytest.raises(ValueError, match=r"list\.jsonl, line 13"):
            open_dataset(kind, root)


@pytest.mark.parametrize(
    ("name", "file", "line"),
    [
        ("voc", "VOCdevkit/VOC2007/ImageSets/Main/train.txt", "../../../../outside"),
        ("voc", "VOCdevkit/VOC2007/ImageSets/Main/train.txt", "/outside"),
        ("places365", "places365_train_standard.txt", "/a/../../../outside.jpg 0"),
        ("places365", "places365_train_standard.txt", "/../outside.jpg 0"),
        ("places365", "places365_val.txt", "../outside.jpg 0"),
        ("places365", "categories_places365.txt", "/a/../.. 4"),
        ("ucf101", "ucfTrainTestlist/trainlist01.txt", "../outside_g01_c01.avi 1"),
        ("ucf101", "ucfTrainTestlist/trainlist01.txt", "Archery/../../outside_g01_c01.avi 1"),
        ("ucf101", "ucfTrainTestlist/trainlist01.txt", "/etc/v_g01_c01.avi 1"),
        ("ucf101", "ucfTrainTestlist/classInd.txt", "5 .."),
        ("hmdb51", "testTrainMulti_7030_splits/brush_hair_test_split1.txt", "../../outside.avi 1"),
        ("hmdb51", "testTrainMulti_7030_splits/brush_hair_test_split1.txt", "/outside.avi 1"),
        ("imagenet", "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", "../outside"),
        ("kinetics400", "train.csv", "dancing ballet,../outside,1,11,train"),
    ],
)
def test_split_files_do_not_lead_out_of_their_folder(name, file, line, tmp_path):
    root = tmp_path / "set"
    if name == "kinetics400":
        kinetics(root)
    else:
        tiny(name, root, **_SIZE.get(name, {"classes": 4, "samples": 2, "side": 16}))
    for suffix in ("", ".jpg", ".avi", "_g01_c01.avi", ".xml"):
        (tmp_path / f"outside{suffix}").write_bytes(b"")
    path = root / file
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=str(root)):
        open_dataset(name, root, verify=False)
