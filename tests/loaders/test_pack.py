"""Packing: the same pixels, labels and splits from every kind of source; damage, stops, full disks; FFCV's own reader."""

import contextlib
import errno
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fasttrain.loaders import Dataset, growing, open_dataset
from fasttrain.loaders import pack as pack_module
from fasttrain.loaders.beton import ALLOCATION, FIELD, HEADER, JPEG, RAW, BetonWriter, new_images, read_beton, records
from fasttrain.loaders.crop import centre_square
from fasttrain.loaders.datasets.base import Encoded, Files, Pixels
from fasttrain.loaders.decode import decode
from fasttrain.loaders.pack import check, pack
from fasttrain.loaders.seek import END, seek_index
from PIL import Image

from . import samples
from .jpegs import jpeg, photo
from .test_more_datasets import members, shard
from .test_voc import devkit, ids

ENDS = (".partial", ".partial.log", ".json.partial")


def png(image: Image.Image, kind: str = "PNG", **how) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def tree(root: Path, files: dict[str, bytes], label: str = "a") -> Dataset:
    """A tree of one class more than it needs: ``b`` holds one photograph."""
    for name, content in {**{f"{label}/{k}": v for k, v in files.items()}, "b/last.jpg": jpeg(photo(20, 20))}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return open_dataset("folder", root)


def names(dataset: Dataset) -> list[str]:
    assert isinstance(dataset.read, Files)
    return [p.name for p in dataset.read.paths]


def refusal(function: Callable[[], object]) -> str:
    """What its ``ValueError`` says; empty where it raises none."""
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


def left_over(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.endswith(ENDS)]


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def jpegs_kept() -> dict[str, bytes]:
    image = photo(50, 38)
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    contents = {
        "420": jpeg(image, quality=90), "422": jpeg(image, subsampling=1), "444": jpeg(image, subsampling=0),
        "best": jpeg(image, quality=100), "worst": jpeg(image, quality=5), "optimised": jpeg(image, optimize=True),
        "progressive": jpeg(image, progressive=True), "restarts": jpeg(image, restart_marker_blocks=3),
        "grey": jpeg(image.convert("L")), "1x1": jpeg(photo(1, 1)), "7x5": jpeg(photo(7, 5)), "rgb": jpeg(image, keep_rgb=True),
        "17x33": jpeg(photo(17, 33)), "commented": jpeg(image, comment="words", icc_profile=b"profile" * 20_000),
        "upright": jpeg(image, exif=turned(1)), "xmp": jpeg(image, xmp=xmp), "trailing": jpeg(image) + b"more" * 9,
    }  # fmt: skip
    return {f"{k}.jpg": v for k, v in contents.items()} | {"a jpeg.png": jpeg(image)}


def images_anew() -> dict[str, bytes]:
    image = photo(50, 38)
    grey_16 = Image.fromarray(np.arange(50 * 38, dtype=np.uint16).reshape(38, 50) * 34)
    see_through = image.convert("RGBA")
    see_through.putalpha(90)
    cmyk = jpeg(image.convert("CMYK"))
    adobe = cmyk.index(b"Adobe")
    assert cmyk[adobe + 11] == 0
    contents = {
        "rgb.png": png(image), "grey.png": png(image.convert("L")), "16.png": png(grey_16), "16.tif": png(grey_16, "TIFF"),
        "palette.png": png(image.quantize(60)), "alpha.png": png(see_through), "bits.png": png(image.convert("1")),
        "clear palette.png": png(image.quantize(60), transparency=3), "grey alpha.png": png(see_through.convert("LA")),
        "one.gif": png(image, "GIF"), "two.gif": png(image, "GIF", save_all=True, append_images=[photo(50, 38, which=1)]),
        "lossy.webp": png(image, "WEBP"), "whole.webp": png(see_through, "WEBP", lossless=True), "a.bmp": png(image, "BMP"),
        "cmyk.jpg": cmyk, "ycck.jpg": cmyk[: adobe + 11] + b"\2" + cmyk[adobe + 12 :],
    }  # fmt: skip
    return contents | {f"turned {o}.jpg": jpeg(image, exif=turned(o)) for o in range(2, 9)}


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory) -> Dataset:
    return tree(tmp_path_factory.mktemp("every_kind"), jpegs_kept() | images_anew())


# what is packed


def test_what_is_decoded_is_what_was_saved(every_kind):
    place = {name: i for i, name in enumerate(names(every_kind))}
    upright = np.asarray(Image.open(io.BytesIO(jpeg(photo(50, 38)))))
    turns = {
        2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, -1), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright),
    }  # fmt: skip
    for orientation, expected in turns.items():
        assert (every_kind.read(place[f"turned {orientation}.jpg"]) == expected).all()
    assert (every_kind.read(place["xmp.jpg"]) == upright).all()
    steps = np.arange(50 * 38).reshape(38, 50, 1).repeat(3, axis=2) * 34 // 256
    for name in ("16.png", "16.tif"):
        assert (every_kind.read(place[name]) == steps).all()
    for name in ("rgb.png", "a.bmp", "alpha.png", "whole.webp"):
        assert (every_kind.read(place[name]) == np.asarray(photo(50, 38))).all()
    for i in range(len(every_kind)):
        assert every_kind.read.size(i) == every_kind.read(i).shape[:2], names(every_kind)[i]


def index_of(path: Path, sample: int, size: int) -> bytes:
    """So many bytes that lie before a sample's image."""
    ptr = int(read_beton(path).ptr_N[sample])
    return path.read_bytes()[ptr - size : ptr]


@pytest.mark.parametrize("seek", [False, True])
def test_jpegs_keep_their_bytes_and_others_are_encoded(every_kind, tmp_path, seek):
    """And each one's index lies right before it, where no other reader looks."""
    out = tmp_path / "x.beton"
    about = pack(every_kind, out, quality=85, seek=seek)
    packed = open_dataset("beton", out)
    kept, without = jpegs_kept() | {"last.jpg": b""}, 0
    assert (about["samples"], about["kept"], about["bad"]) == (len(every_kind), len(kept), 0)
    for i, name in enumerate(names(every_kind)):
        source, content = every_kind.read(i), packed.read.encoded(i).tobytes()
        if name in kept:
            assert (packed.read(i) == source).all(), name
            assert content == every_kind.read.encoded(i).tobytes(), name
        else:
            assert content == jpeg(Image.fromarray(source), quality=85), name
            assert (packed.read(i) == decode(content, "")).all(), name
        index = seek_index(content)
        without += index == b""
        assert (index == b"") == (name in ("progressive.jpg", "rgb.jpg")), name
        assert (index_of(out, i, len(index)) == index) == (seek or not index), name
        assert index or index_of(out, i, 8) != b"ft-seek1", name
        assert packed.read.size(i) == packed.read(i).shape[:2] == source.shape[:2]
    assert without == 2 and about["options"]["seek"] == seek
    assert left_over(tmp_path) == [] and not (tmp_path / "x.beton.bad.jsonl").exists()
    assert check(out) == about == json.loads((tmp_path / "x.beton.json").read_text())


@pytest.mark.parametrize("options", [{}, {"square": 24}, {"max_size": 20}])
def test_an_index_costs_its_bytes_and_nothing_else_changes(tmp_path, options):
    """The same records but for the places; no index is in the table of allocations."""
    source = tree(tmp_path / "in", {f"{i}.jpg": jpeg(photo(60 + i, 40)) for i in range(9)})
    files = []
    for seek in (True, False):
        pack(source, tmp_path / f"{seek}.beton", seek=seek, **options)
        files.append(read_beton(tmp_path / f"{seek}.beton"))
    indexed, bare = files
    for name in ("mode_N", "height_N", "width_N", "size_N", "targets_N"):
        assert (getattr(indexed, name) == getattr(bare, name)).all()
    gaps = np.diff(indexed.ptr_N) - indexed.size_N[:-1]
    assert (np.diff(bare.ptr_N) == bare.size_N[:-1]).all()
    packed = open_dataset("beton", indexed.path)
    assert gaps.tolist() == [len(seek_index(packed.read.encoded(i).tobytes())) for i in range(1, 10)]
    assert gaps.min() > END


def test_pixels_have_no_index(every_kind, tmp_path):
    """Asked for or not, raw files are the same but for what they say of it."""
    files = []
    for seek in (True, False):
        about = pack(every_kind, tmp_path / f"{seek}.beton", raw=True, seek=seek)
        assert about["options"]["seek"] == seek
        files.append((tmp_path / f"{seek}.beton").read_bytes())
    assert files[0] == files[1] and b"ft-seek1" not in files[0]


def test_raw_keeps_every_pixel(every_kind, tmp_path):
    about = pack(every_kind, tmp_path / "x.beton", raw=True)
    packed = open_dataset("beton", tmp_path / "x.beton")
    assert about["kept"] == 0 and (packed.read.file.mode_N == RAW).all()
    for i in range(len(every_kind)):
        assert (packed.read(i) == every_kind.read(i)).all()


def test_only_larger_images_are_shrunk(tmp_path):
    sizes = [(40, 30), (64, 64), (65, 20), (20, 65), (200, 100), (100, 200), (1, 200), (63, 64)]
    source = tree(tmp_path / "in", {f"{i}.jpg": jpeg(photo(*s)) for i, s in enumerate(sizes)})
    about = pack(source, tmp_path / "x.beton", max_size=64)
    packed = open_dataset("beton", tmp_path / "x.beton")
    found = [packed.read.size(i)[::-1] for i in range(len(sizes))]
    assert found == [(40, 30), (64, 64), (64, 20), (20, 64), (64, 32), (32, 64), (1, 64), (63, 64)]
    assert about["kept"] == 4
    for i, size in enumerate(sizes):
        assert (packed.read.encoded(i).tobytes() == source.read.encoded(i).tobytes()) == (max(size) <= 64)
    shrunk = photo(200, 100).resize((64, 32), Image.Resampling.BICUBIC)
    assert np.abs(packed.read(4).astype(int) - np.asarray(shrunk)).mean() < 8


def test_squares(tmp_path):
    source = tree(tmp_path / "in", {f"{i}.jpg": jpeg(photo(*s)) for i, s in enumerate([(40, 30), (9, 70), (24, 24)])})
    pack(source, tmp_path / "raw.beton", square=24, raw=True)
    pack(source, tmp_path / "jpeg.beton", square=24, quality=77)
    raw, packed = (open_dataset("beton", tmp_path / f"{n}.beton") for n in ("raw", "jpeg"))
    for i in range(len(source)):
        square = centre_square(source.read(i), 24)
        assert (raw.read(i) == square).all()
        assert packed.read.encoded(i).tobytes() == jpeg(Image.fromarray(square), quality=77)


def test_quality_is_of_those_encoded_here(tmp_path):
    source = tree(tmp_path / "in", {"0.jpg": jpeg(photo(90, 60)), "1.png": png(photo(90, 60))})
    sizes = {}
    for quality in (1, 50, 100):
        pack(source, tmp_path / f"{quality}.beton", quality=quality)
        sizes[quality] = read_beton(tmp_path / f"{quality}.beton").size_N
    assert sizes[1][0] == sizes[100][0] == len(jpeg(photo(90, 60)))
    assert sizes[1][1] < 0.7 * sizes[50][1] < 0.3 * sizes[100][1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quality": 0}, "--quality: 0 is not between 1 and 100"),
        ({"max_size": -1}, "--max-size, --square: sides go from 0"),
        ({"square": 70_000}, "--max-size, --square: sides go from 0"),
        ({"workers": -1}, "--workers: -1 is below 0"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        pack(tree(tmp_path / "in", {}), tmp_path / "x.beton", **options)
    assert not list(tmp_path.glob("x.beton*"))


# sources


def folder(root: Path) -> Dataset:
    return open_dataset("folder", samples.image_tree(root, {"a": 9, "b": 7}, suffix=".jpg"))


def cifar(root: Path) -> Dataset:
    samples.cifar10(root)
    return open_dataset("cifar10", root, verify=False)


def stl(root: Path) -> Dataset:
    samples.stl10(root, train=140, test=60)  # three pages
    return open_dataset("stl10", root, verify=False)


def voc(root: Path) -> Dataset:
    devkit(root, {"train": ids(2007, 0, 9), "val": ids(2007, 10, 4), "test": ids(2007, 20, 5)})
    return open_dataset("voc", root)


def tar(root: Path) -> Dataset:
    root.mkdir()
    shard(root / "train-0.tar", members(8))
    shard(root / "test-0.tar", members(4, 8))
    return open_dataset("tar", root)


def listed(root: Path) -> Dataset:
    """Several labels each, of a class list of which one has a name that is not ASCII."""
    samples.image_tree(root, {"x": 12}, suffix=".jpg")
    (root / "classes.txt").write_text("Käfer\nb\nc\n")
    lines = [{"path": f"x/{i:03}.jpg", "labels": ["b"] * (i % 2) + ["c"] * (i % 3)} for i in range(12)]
    (root / "list.jsonl").write_text(
        "".join(json.dumps(line | {"labels": sorted({*line["labels"]})}) + "\n" for line in lines)
    )
    return open_dataset("list", root)


def large(root: Path, others: dict[str, bytes] | None = None) -> Dataset:
    """Two of three megabytes, which do not fit into a page as it is at first, among small ones."""
    files = {f"{i:03}.jpg": jpeg(photo(60 + i % 9, 40)) for i in range(90)}
    content = b"\xff\xd8" + (b"\xff\xfe\xff\xff" + bytes(65533)) * 48 + files["000.jpg"][2:]  # 48 comments
    return tree(root, files | {f"{i:03}.jpg": content for i in (23, 56)} | (others or {}))


SOURCES = {f.__name__: f for f in (folder, cifar, stl, voc, tar, listed, large)}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_packed_source_is_the_source(kind, tmp_path):
    source = SOURCES[kind](tmp_path / "in")
    about = pack(source, tmp_path / "x.beton")
    packed = open_dataset("beton", tmp_path / "x.beton", val_share=0.5)
    assert (packed.name, packed.classes, packed.multi_label) == (source.name, source.classes, source.multi_label)
    assert packed.targets_N.dtype == source.targets_N.dtype and (packed.targets_N == source.targets_N).all()
    for split, index_M in source.splits.items():
        assert packed.splits[split].tolist() == index_M.tolist() and packed.splits[split].dtype == np.int64
    exact = isinstance(source.read, Pixels) or kind != "tar"  # tar's are PNG
    for i in range(len(source)):
        assert packed.read(i).shape == source.read(i).shape
        assert not exact or (packed.read(i) == source.read(i)).all()
    assert about["kept"] == (len(source) if exact and isinstance(source.read, Encoded) else 0)
    assert packed.content == about["sha256"]
    again = pack(packed, tmp_path / "again.beton", raw=not exact or isinstance(source.read, Pixels))
    assert again["kept"] == about["kept"]
    for i in range(len(source)):  # a packed file is a source, too
        assert (open_dataset("beton", tmp_path / "again.beton").read(i) == packed.read(i)).all()


def test_pixels_that_begin_as_a_jpeg_does(tmp_path):
    image_NHWC = np.full((2, 8, 8, 3), 255, np.uint8)
    image_NHWC[:, 0, 0, 1] = 0xD8
    splits = {split: np.arange(0) for split in ("train", "val", "test")}
    pack(Dataset("two", ("a",), np.zeros(2, np.int64), Pixels(image_NHWC), splits, ""), tmp_path / "raw.beton")
    about = pack(open_dataset("beton", tmp_path / "raw.beton"), tmp_path / "jpeg.beton")
    assert (about["samples"], about["kept"], about["bad"]) == (2, 0, 0)


def test_packing_does_not_import_ffcv(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    pack(folder(tmp_path / "in"), tmp_path / "x.beton")
    assert len(open_dataset("beton", tmp_path / "x.beton")) == 16


def ffcv_reads(path: Path, image, label, *, os_cache: bool, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All samples in the given order, through FFCV's own loader and decoders."""
    from ffcv.loader import Loader, OrderOption

    loader = Loader(
        str(path), batch_size=16, num_workers=1, order=OrderOption.SEQUENTIAL, os_cache=os_cache, drop_last=False,
        indices=order, pipelines={"image": [image], "label": [label]},
    )  # fmt: skip
    batches = [(pixels.copy(), labels.copy()) for pixels, labels in loader]
    return np.concatenate([p for p, _ in batches]), np.concatenate([t for _, t in batches])


@pytest.mark.parametrize("os_cache", [True, False])
@pytest.mark.parametrize("kind", ["stl", "folder", "voc", "large"])
def test_ffcv_reads_what_was_packed(need, kind, os_cache, tmp_path):
    need("ffcv")
    import cv2
    from ffcv.fields import IntField, NDArrayField
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, NDArrayDecoder, SimpleRGBImageDecoder
    from ffcv.reader import Reader

    path, source = tmp_path / "x.beton", SOURCES[kind](tmp_path / "in")
    pack(source, path)
    theirs = Reader(str(path))
    assert theirs.num_samples == len(source) and theirs.field_names == ["image", "label"]
    assert type(theirs.handlers["label"]) is (NDArrayField if source.multi_label else IntField)
    order = np.random.default_rng(0).permutation(len(source))
    image = CenterCropRGBImageDecoder((24, 24), 1) if kind in ("folder", "large") else SimpleRGBImageDecoder()
    label = NDArrayDecoder() if source.multi_label else IntDecoder()
    pixels, labels = ffcv_reads(path, image, label, os_cache=os_cache, order=order)
    assert (labels.reshape(len(order), -1) == source.targets_N[order].reshape(len(order), -1)).all()
    for i, shown in zip(order, pixels, strict=True):
        expected = source.read(i)
        if kind in ("folder", "large"):
            (height, width), short = expected.shape[:2], min(expected.shape[:2])
            top, left = (height - short) // 2, (width - short) // 2
            square = np.ascontiguousarray(expected[top : top + short, left : left + short])
            expected = cv2.resize(square, (24, 24), interpolation=cv2.INTER_AREA)
        if kind == "stl":
            assert (shown == expected).all()
        else:  # FFCV decodes JPEGs with a faster, coarser inverse DCT
            assert np.abs(shown.astype(int) - expected).mean() < 2


class Samples:
    """For FFCV's writer."""

    def __init__(self, *columns) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, i):
        return tuple(c[i] for c in self.columns)


def pictures() -> list[np.ndarray]:
    return [np.asarray(photo(40 + i, 30 + i % 7)) for i in range(30)]


def write_with_ffcv(folder: str) -> None:
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    words = [np.frombuffer(b"w" * (i + 1), np.uint8) for i in range(30)]
    data = Samples(pictures(), np.ones(30), np.arange(30) % 3, words, [{"i": i} for i in range(30)])
    fields = {"photo": RGBImageField("proportion"), "weight": FloatField(), "class": IntField(), "words": BytesField()}
    writer = DatasetWriter(f"{folder}/labels.beton", fields | {"more": JSONField()}, num_workers=2)
    writer.from_indexed_dataset(data, chunksize=4)
    for kind in (np.float32, np.float64):
        fields = {"image": RGBImageField("raw"), "label": NDArrayField(np.dtype(kind), (5,))}
        writer = DatasetWriter(f"{folder}/{kind.__name__}.beton", fields, num_workers=1)
        writer.from_indexed_dataset(Samples(pictures(), np.eye(5, dtype=kind)[np.arange(30) % 5]))


@pytest.fixture(scope="module")
def written_by_ffcv(tmp_path_factory, repository) -> Path:
    """Its writer forks, after which numba's threads may hang at the end of a process: one of its own."""
    folder = tmp_path_factory.mktemp("ffcv")
    code = f"from tests.loaders import test_pack as t; t.write_with_ffcv({str(folder)!r})"
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue"}
    subprocess.run([sys.executable, "-c", code], cwd=repository, env=environment, check=True, timeout=120)
    return folder


def test_a_file_of_ffcvs_writer_opens(need, request):
    need("ffcv")
    dataset = open_dataset("beton", request.getfixturevalue("written_by_ffcv") / "labels.beton", val_share=0.25)
    assert dataset.classes == ("0", "1", "2") and dataset.targets_N.tolist() == [i % 3 for i in range(30)]
    assert {k: len(v) for k, v in dataset.splits.items()} == {"train": 18, "val": 6, "test": 6}
    file = dataset.read.file
    assert file.image_field == "photo" and file.fields == ("photo", "weight", "class", "words", "more")
    assert set(file.mode_N) == {RAW, JPEG}  # half of either, at random
    for i, image in enumerate(pictures()):
        shown = dataset.read(i).astype(int)
        assert shown.shape == image.shape
        assert (shown == image).all() if file.mode_N[i] == RAW else np.abs(shown - image).mean() < 6


def test_label_vectors_of_ffcvs_writer_need_names(need, request):
    need("ffcv")
    folder = request.getfixturevalue("written_by_ffcv")
    assert (read_beton(folder / "float32.beton").targets_N == np.eye(5)[np.arange(30) % 5]).all()
    for kind, match in (
        ("float32", r"label vectors, and there is no float32\.beton\.json"),
        ("float64", r"not float32 \[C\]"),
    ):
        with pytest.raises(ValueError, match=match):
            open_dataset("beton", folder / f"{kind}.beton")


# what is left out


def damaged_images() -> dict[str, bytes]:
    whole, image = jpeg(photo(70, 50)), photo(70, 50)
    wrong = whole[:-40] + b"\xfe\xfe" * 10 + whole[-20:]  # no code begins with so many ones
    progressive = jpeg(image, progressive=True)
    return {
        "cut.jpg": whole[: len(whole) // 2], "cut end.jpg": whole[:-3], "cut progressive.jpg": progressive[:-60],
        "cut header.jpg": whole[:100], "wrong code.jpg": wrong, "text.jpg": b"this is no image", "empty.jpg": b"",
        "cut.png": png(image)[:-700], "two bytes.jpg": b"\xff\xd8", "empty.png": b"", "no frame.jpg": b"\xff\xd8\xff\xd9" * 9,
        "cut turned.jpg": jpeg(image, exif=turned(6))[:-300], "long.png": png(Image.new("L", (65_510, 1))),
        "too long.png": png(Image.new("L", (66_000, 1))),
    }  # fmt: skip


def test_damaged_images_are_left_out_and_listed(tmp_path):
    good = {f"{i:02}.jpg": jpeg(photo(30, 20 + i)) for i in range(20)}
    bad = damaged_images()
    source = tree(tmp_path / "in", {f"{i:02} {n}": c for i, (n, c) in enumerate(bad.items())} | good)
    about = pack(source, tmp_path / "x.beton", workers=3)
    assert (about["samples"], about["bad"]) == (21, len(bad))
    lines = [json.loads(line) for line in (tmp_path / "x.beton.bad.jsonl").read_text().splitlines()]
    assert {Path(line["name"]).name[3:] for line in lines} == set(bad)
    assert [line["index"] for line in lines] == sorted(line["index"] for line in lines)
    for line in lines:
        assert source.read.name(line["index"]) == line["name"] and len(line["why"]) > 20 and "\n" not in line["why"]
    why = {Path(line["name"]).name[3:]: line["why"] for line in lines}
    assert "entropy-coded data is damaged" in why["wrong code.jpg"]
    assert "sides of a .beton go to 65535; set --max-size" in why["too long.png"]
    packed = open_dataset("beton", tmp_path / "x.beton")
    whole = [i for i in range(len(source)) if i not in {line["index"] for line in lines}]
    assert packed.targets_N.tolist() == source.targets_N[whole].tolist()
    for split, index_M in source.splits.items():
        assert [whole[i] for i in packed.splits[split]] == [i for i in index_M if i in whole]
    for i, was in enumerate(whole):
        assert (packed.read(i) == source.read(was)).all()
    assert pack(source, tmp_path / "x.beton", workers=3) == about
    assert pack(source, tmp_path / "small.beton", max_size=500)["bad"] == len(bad) - 2  # the two long ones are shrunk


def test_nothing_to_pack(tmp_path):
    for name in ("a/0.jpg", "b/0.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"text")
    source = open_dataset("folder", tmp_path)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"none of the 2 samples of folder can be decoded; see .*x\.beton\.bad\.jsonl"
        ):
            pack(source, tmp_path / "x.beton")
        assert len((tmp_path / "x.beton.bad.jsonl").read_text().splitlines()) == 2


# stops


@pytest.fixture
def often(monkeypatch):
    """Every few images something is safely on disk; returns the indices of the samples that were encoded."""
    encoded: list[int] = []
    encode = pack_module._encode
    monkeypatch.setattr(growing, "SYNC_BYTES", 5_000)
    monkeypatch.setattr(pack_module, "_encode", lambda d, o, i: encoded.append(i) or encode(d, o, i))
    return encoded


def mixed(root: Path) -> Dataset:
    """Good ones and bad ones."""
    return large(root, {f"{i:03}.jpg": b"text" for i in (0, 7, 8, 40, 89)})


def mixed_labels(root: Path) -> Dataset:
    source = mixed(root)
    return Dataset(
        "many", ("a", "b", "c"), np.eye(3, dtype=np.float32)[np.arange(91) % 3], source.read, source.splits, ""
    )


def content(path: Path) -> tuple[bytes, bytes, bytes]:
    return (
        path.read_bytes(),
        path.with_name(path.name + ".json").read_bytes(),
        path.with_name(path.name + ".bad.jsonl").read_bytes(),
    )


@pytest.mark.parametrize("make", [mixed, mixed_labels])
def test_a_stopped_packing_goes_on(make, tmp_path, often):
    source = make(tmp_path / "in")
    pack(source, tmp_path / "whole.beton")
    whole = content(tmp_path / "whole.beton")
    assert read_beton(tmp_path / "whole.beton").size_N.max() > 3 << 20
    assert np.frombuffer(whole[0], HEADER, 1)["page"] == 4 << 20
    for stop in (1, 2, 10, 24, 57, 70, 89, 91):
        out = tmp_path / f"{stop}.beton"

        def report(now, stop=stop):
            if now.done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pack(source, out, report=report, workers=2)
        assert not out.exists()
        with (tmp_path / f"{stop}.beton.partial").open("ab") as partial:
            partial.write(b"not yet safe" * 1000)
        log = (tmp_path / f"{stop}.beton.partial.log").read_bytes()
        safe = (len(log) - log.index(b"\n") - 1) // growing.RECORD.itemsize
        assert stop - 20 < safe <= stop
        often.clear()
        pack(source, out)
        assert sorted(often) == list(range(safe, 91))
        assert content(out) == whole
        assert left_over(tmp_path) == []


def test_a_packing_that_is_stopped_often_arrives(tmp_path, often):
    source = mixed(tmp_path / "in")
    pack(source, tmp_path / "whole.beton")

    def report(now):
        if now.done > reached + 12:
            raise KeyboardInterrupt

    for reached in range(0, 91, 3):  # noqa: B007 - report looks at it
        with contextlib.suppress(KeyboardInterrupt):
            pack(source, tmp_path / "x.beton", report=report, workers=1)
    assert content(tmp_path / "x.beton") == content(tmp_path / "whole.beton")


def stopped(source: Dataset, out: Path, at: int = 60) -> None:
    def report(now):
        if now.done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, out, report=report)


def test_a_stopped_packing_of_other_data_is_not_gone_on_with(tmp_path, often):
    source, out = mixed(tmp_path / "in"), tmp_path / "x.beton"
    stopped(source, out)
    for options in ({"quality": 50}, {"max_size": 30}, {"raw": True}, {"seek": False}):
        with pytest.raises(ValueError, match=r"its options changed since the packing into .*x\.beton\.partial began"):
            pack(source, out, **options)
    os.utime(tmp_path / "in/a/003.jpg", (1, 1))
    with pytest.raises(ValueError, match=r"the data set changed since the packing into .* delete that file"):
        pack(open_dataset("folder", tmp_path / "in"), out)
    (tmp_path / "in/a/004.jpg").unlink()
    with pytest.raises(ValueError, match=r"the data set changed since"):
        pack(open_dataset("folder", tmp_path / "in"), out)
    (tmp_path / "x.beton.partial").unlink()
    assert pack(open_dataset("folder", tmp_path / "in"), out)["samples"] == 85
    assert check(out)["samples"] == 85


@pytest.mark.parametrize("what", ["short partial", "no bad list", "short bad list", "garbage log", "half a record"])
def test_what_a_stopped_packing_left_and_someone_damaged(what, tmp_path, often):
    source, out = mixed(tmp_path / "in"), tmp_path / "x.beton"
    pack(source, tmp_path / "whole.beton")
    stopped(source, out)
    partial, log, bad = (tmp_path / f"x.beton{s}" for s in (".partial", ".partial.log", ".bad.jsonl"))
    often.clear()
    if what == "short partial":
        os.truncate(partial, partial.stat().st_size - 80_000)
    elif what == "no bad list":
        bad.unlink()
    elif what == "short bad list":
        bad.write_bytes(bad.read_bytes().splitlines(keepends=True)[0])
    elif what == "garbage log":
        log.write_bytes(os.urandom(2000))
    else:
        os.truncate(log, log.stat().st_size - 5)
    pack(source, out)
    assert content(out) == content(tmp_path / "whole.beton")
    assert (len(often) == 91) == (what != "half a record")  # begun anew, or gone on with


def test_a_finished_file_is_not_packed_again(tmp_path, often):
    source, out = folder(tmp_path / "in"), tmp_path / "x.beton"
    about = pack(source, out)
    often.clear()
    before = out.stat().st_mtime_ns
    assert pack(source, out) == about and often == [] and out.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"x\.beton is there already, packed from other data or with other options"):
        pack(source, out, quality=10)
    (tmp_path / "in/a/000.jpg").write_bytes(jpeg(photo(9, 9)))
    with pytest.raises(ValueError, match="is there already, packed from other data"):
        pack(open_dataset("folder", tmp_path / "in"), out)
    os.truncate(out, about["bytes"] - 1)
    with pytest.raises(ValueError, match="is there already, packed from other data"):
        pack(source, out)
    for said in (None, "no JSON", "[]", "{}", "null"):
        (tmp_path / "x.beton.json").unlink(missing_ok=True) if said is None else (tmp_path / "x.beton.json").write_text(
            said
        )
        with pytest.raises(ValueError, match=r"is there already, and no x\.beton\.json says what it is"):
            pack(source, out)
    assert out.stat().st_size == about["bytes"] - 1


# full disks


def test_a_full_disk_is_named_and_packing_goes_on_when_there_is_room(tmp_path, often):
    """Files may not grow beyond some bytes: the system's own write fails, as on a full disk."""
    source, limits = mixed(tmp_path / "in"), resource.getrlimit(resource.RLIMIT_FSIZE)
    pack(source, tmp_path / "whole.beton")
    for limit in (10, 1 << 20, (2 << 20) + 9_000, (4 << 20) + 100_000, (12 << 20) + 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(
                ValueError, match=r"cannot write .*x\.beton\.partial \(sample \d+ of 91\): File too large"
            ):
                pack(source, tmp_path / "x.beton")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    often.clear()
    pack(source, tmp_path / "x.beton")
    assert len(often) < 91 - 20
    assert content(tmp_path / "x.beton") == content(tmp_path / "whole.beton")


def test_no_space_at_any_write(tmp_path, often, monkeypatch):
    source, out, fsync = mixed(tmp_path / "in"), tmp_path / "x.beton", os.fsync
    pack(source, tmp_path / "whole.beton")
    failures = 0

    def full(file):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    for room in [*range(12), 1000]:  # a file is synchronised after everything that was written into it
        left = room
        why = refusal(lambda: pack(source, out))
        assert not why or (str(out) in why and "No space left on device" in why)
        failures += why != ""
    assert failures > 5 and content(out) == content(tmp_path / "whole.beton")


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    source = folder(tmp_path / "in")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 0, 100))
    with pytest.raises(ValueError, match=r"has 0\.0 GiB free, and the images of folder take 0\.0 GiB"):
        pack(source, tmp_path / "x.beton")
    assert not list(tmp_path.glob("x.beton*"))


def test_a_place_that_cannot_be_written(tmp_path):
    source = folder(tmp_path / "in")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*file/x\.beton\.partial \(sample 0 of 16\): "):
        pack(source, tmp_path / "file/x.beton")
    (tmp_path / "x.beton.partial").mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*x\.beton\.partial \(sample 0 of 16\): Is a directory"):
        pack(source, tmp_path / "x.beton")


# opening


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory) -> Path:
    """20 images, of which some are raw, and label vectors: everything a file can hold."""
    root = tmp_path_factory.mktemp("packed")
    pack(folder(root / "in"), root / "x.beton")
    return root / "x.beton"


def vectors_file(path: Path, raw: int = 5, jpegs: int = 5) -> Path:
    """A file of raw images, JPEGs and label vectors, without a FILE.json."""
    writer = BetonWriter(path, samples=raw + jpegs, vector=6, page=1 << 21)
    images, sizes, labels = new_images(raw + jpegs), [], []
    for i in range(raw + jpegs):
        image = np.asarray(photo(20 + i, 10))
        part = image.tobytes() if i < raw else jpeg(Image.fromarray(image))
        images[i]["ptr"], label = writer.add(part, np.arange(6, dtype="<f4").tobytes())
        images[i]["mode"], images[i]["width"], images[i]["height"] = RAW if i < raw else JPEG, 20 + i, 10
        sizes.append(len(part))
        labels.append(label)
    writer.finish(images, np.array(sizes), np.array(labels))
    writer.close()
    return path


def copied(path: Path, to: Path, *, beside: bool = True) -> Path:
    to.mkdir(exist_ok=True)
    shutil.copy(path, to / path.name)
    if beside:
        shutil.copy(f"{path}.json", to / f"{path.name}.json")
    return to / path.name


@pytest.mark.parametrize("beside", [True, False])
def test_a_file_that_is_cut_off_anywhere_is_refused(packed_file, tmp_path, beside):
    path = copied(packed_file, tmp_path / "cut", beside=beside)
    whole = path.read_bytes()
    table = int(np.frombuffer(whole, HEADER, 1)["table"][0])
    head = HEADER.itemsize + 2 * FIELD.itemsize + 16 * records(1).itemsize
    ends = [0, 1, 23, 24, 1000, head - 1, head, 1 << 20, table - 1, table, table + 1, table + 48]
    for end in [*ends, len(whole) - 24, len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"cut/x\.beton"):
            open_dataset("beton", path)
    path.write_bytes(whole + bytes(24))
    if beside:
        with pytest.raises(ValueError, match=rf"{path} has {len(whole) + 24} bytes, and {len(whole)} were packed"):
            open_dataset("beton", path)


def test_every_byte_before_the_pages_is_looked_at(packed_file, tmp_path):
    path = copied(packed_file, tmp_path / "changed")
    whole = path.read_bytes()
    head = HEADER.itemsize + 2 * FIELD.itemsize + 16 * records(1).itemsize
    rng = random.Random(0)
    for at in [*range(HEADER.itemsize), *rng.sample(range(HEADER.itemsize, head), 60), head - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"changed/x\.beton"):
            open_dataset("beton", path)
    path.write_bytes(whole)
    assert len(open_dataset("beton", path)) == 16


def test_random_bytes_are_no_beton(tmp_path):
    rng = random.Random(0)
    for size in (0, 10, 24, 100, 5000, 100_000):
        (tmp_path / "x.beton").write_bytes(rng.randbytes(size))
        with pytest.raises(ValueError, match=r"cannot read .*x\.beton"):
            open_dataset("beton", tmp_path / "x.beton")
    with pytest.raises(ValueError, match="there is no folder or file"):
        open_dataset("beton", tmp_path / "y.beton")
    with pytest.raises(ValueError, match=r"cannot read .*: Is a directory"):
        open_dataset("beton", tmp_path)


@pytest.mark.parametrize("kind", ["labels", "vectors"])
def test_damaged_heads_and_tables_raise_nothing_but_value_errors(kind, packed_file, tmp_path):
    path = copied(packed_file, tmp_path / "x", beside=False) if kind == "labels" else vectors_file(tmp_path / "x.beton")
    whole = path.read_bytes()
    table = int(np.frombuffer(whole, HEADER, 1)["table"][0])
    n = len(read_beton(path))
    places = [*range(HEADER.itemsize)] * 20
    places += [*range(HEADER.itemsize + FIELD.itemsize + 17, HEADER.itemsize + FIELD.itemsize + 17 + 290)]
    places += [*range(HEADER.itemsize + 2 * FIELD.itemsize, HEADER.itemsize + 2 * FIELD.itemsize + 24 * n)]
    places += [*range(table, len(whole))]
    rng, opened = random.Random(0), 0
    tracemalloc.start()
    try:
        for _ in range(300):
            changed = bytearray(whole)
            for _ in range(rng.randint(1, 3)):
                at, value = rng.choice(places), rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
                size = min(rng.choice([1, 1, 2, 4, 8]), len(whole) - at)
                changed[at : at + size] = bytes([value]) * size
            path.write_bytes(changed)
            why = refusal(lambda: read_beton(path)) or (
                kind == "labels" and refusal(lambda: open_dataset("beton", path))
            )
            opened += not why
            assert not why or str(path) in why
            if why or kind == "vectors":
                continue
            dataset = open_dataset("beton", path)
            for i in (0, len(dataset) - 1):
                why = refusal(lambda dataset=dataset, i=i: dataset.read(i))
                assert not why or str(path) in why
        assert tracemalloc.get_traced_memory()[1] < 60 << 20
    finally:
        tracemalloc.stop()
    assert 20 < opened < 290


def test_places_that_overflow_are_refused(tmp_path):
    path = vectors_file(tmp_path / "x.beton", raw=0)
    whole = bytearray(path.read_bytes())
    table = int(np.frombuffer(whole, HEADER, 1)["table"][0])
    record = HEADER.itemsize + 2 * FIELD.itemsize
    at = 2**63 - 100
    assert whole[record + 5 : record + 13] == whole[table + 8 : table + 16]
    whole[record + 5 : record + 13] = whole[table + 8 : table + 16] = at.to_bytes(8, "little")
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="its table of allocations is damaged"):
        read_beton(path)


def test_labels_beyond_the_classes(packed_file, tmp_path):
    path = copied(packed_file, tmp_path / "x")
    whole = path.read_bytes()
    at = HEADER.itemsize + 2 * FIELD.itemsize + 16
    assert whole[at : at + 8] == bytes(8)
    for label in (2, -1, 10**15, 2**63 - 1):
        path.write_bytes(whole[:at] + label.to_bytes(8, "little", signed=True) + whole[at + 8 :])
        with pytest.raises(ValueError, match=r"its records are not those that x\.beton\.json knows"):
            open_dataset("beton", path)
        with pytest.raises(ValueError, match=rf"labels go from .*{label}.*, and there are 2 classes"):
            open_dataset("beton", path, verify=False)
        if label != 2:
            shutil.move(f"{path}.json", tmp_path / "aside")
            with pytest.raises(ValueError, match=rf"labels go from .*{label}.*, and there are"):
                open_dataset("beton", path)
            shutil.move(tmp_path / "aside", f"{path}.json")


EDITS = {
    "classes reordered": ({"classes": ["b", "a"]}, r"x\.beton\.json: the class list has changed"),
    "class renamed": ({"classes": ["a", "c"]}, r"x\.beton\.json: the class list has changed"),
    "classes no list": ({"classes": "ab"}, r"x\.beton\.json lacks classes: it was not made by fasttrain pack"),
    "classes no names": ({"classes": [1, 2]}, r"x\.beton\.json: classes are to be names"),
    "bytes": ({"bytes": 5}, r"x\.beton has \d+ bytes, and 5 were packed"),
    "head": ({"head_sha256": "0"}, r"x\.beton has changed since it was packed: its records"),
    "beyond": ({"splits": {"train": [[0, 17]], "val": [], "test": []}}, r"json: its split train names samples beyond the 16"),
    "far beyond": ({"splits": {"train": [[0, 10**15]], "val": [], "test": []}}, "train names samples beyond the 16"),
    "overflow": ({"splits": {"train": [[0, 10**25]], "val": [], "test": []}}, "its split train is no list of runs"),
    "negative": ({"splits": {"train": [[-1, 3]], "val": [], "test": []}}, "its split train names samples beyond"),
    "backwards": ({"splits": {"train": [[5, 3]], "val": [], "test": []}}, "its split train does not ascend"),
    "unsorted": ({"splits": {"train": [[5, 8], [0, 3]], "val": [], "test": []}}, "its split train does not ascend"),
    "no runs": ({"splits": {"train": [1, 2, 3], "val": [], "test": []}}, "its split train is no list of runs"),
    "words": ({"splits": {"train": "all", "val": [], "test": []}}, "its split train is no list of runs"),
    "nothing": ({"splits": {"train": None, "val": [], "test": []}}, "its split train is no list of runs"),
    "no test": ({"splits": {"train": [], "val": []}}, "splits train, val and test"),
    "splits no dict": ({"splits": [1]}, r"x\.beton\.json lacks splits"),
    "no name": ({"name": None}, r"x\.beton\.json lacks name"),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_what_lies_beside_is_compared(edit, packed_file, tmp_path):
    path, (change, match) = copied(packed_file, tmp_path / "x"), EDITS[edit]
    about = json.loads(Path(f"{path}.json").read_text())
    Path(f"{path}.json").write_text(json.dumps(about | change))
    with pytest.raises(ValueError, match=match):
        open_dataset("beton", path)


@pytest.mark.parametrize(
    "text", ["", "no JSON", "[]", "[[1]]", "null", "3", '"name"', "[" * 100_000, b"\xff\xfe", "{}"]
)
def test_what_lies_beside_is_something_else(text, packed_file, tmp_path):
    path = copied(packed_file, tmp_path / "x")
    Path(f"{path}.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for function in (lambda: open_dataset("beton", path), lambda: check(path)):
        with pytest.raises(ValueError, match=r"x\.beton\.json"):
            function()


@pytest.mark.parametrize(
    "key", ["name", "classes", "classes_sha256", "splits", "bytes", "sha256", "head_sha256", "samples"]
)
def test_what_lies_beside_lacks_something(key, packed_file, tmp_path):
    path = copied(packed_file, tmp_path / "x")
    about = json.loads(Path(f"{path}.json").read_text())
    Path(f"{path}.json").write_text(json.dumps({k: v for k, v in about.items() if k != key}))
    with pytest.raises(ValueError, match=rf"x\.beton\.json lacks {key}: it was not made by fasttrain pack"):
        open_dataset("beton", path)


def test_without_what_lies_beside_classes_are_numbers(packed_file, tmp_path):
    path = copied(packed_file, tmp_path / "x", beside=False)
    dataset = open_dataset("beton", path, val_share=0)
    assert dataset.classes == ("0", "1") and len(dataset.splits["test"]) == 3 and len(dataset.splits["val"]) == 0
    with pytest.raises(ValueError, match=r"there is no .*x\.beton\.json: only files made by fasttrain pack"):
        check(path)


def test_one_changed_byte_anywhere_is_found(packed_file, tmp_path):
    path = copied(packed_file, tmp_path / "x")
    whole, rng = path.read_bytes(), random.Random(0)
    file = read_beton(path)
    pages = [int(p + s // 2) for p, s in zip(file.ptr_N, file.size_N, strict=True)]
    for at in [*rng.sample(pages, 5), pages[-1] + 500_000, 10, len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"x\.beton"):
            check(path)
        if at in pages:
            open_dataset("beton", path)  # does not read the pixels
    path.write_bytes(whole)
    assert check(path)["samples"] == 16


# the writer


def test_pages_are_what_ffcv_expects(tmp_path):
    with pytest.raises(ValueError, match="a page of 3145728 bytes is not a power of 2"):
        BetonWriter(tmp_path / "x", samples=1, page=3 << 20)
    writer = BetonWriter(tmp_path / "x", samples=100, page=1 << 21)
    rng, sizes = (
        random.Random(0),
        [5, (1 << 21) - 5, 1 << 21, 1, *(random.Random(1).randrange(1 << 20) for _ in range(20))],
    )
    places = [writer.add(rng.randbytes(size))[0] for size in sizes]
    assert places[:4] == [1 << 21, (1 << 21) + 5, 2 << 21, 3 << 21]
    assert all(p >> 21 == (p + s - 1) >> 21 for p, s in zip(places, sizes, strict=True))
    places.append(writer.add(bytes(5 << 20))[0])  # doubled twice
    assert writer.page == 8 << 20 and places[-1] >> 23 == (places[-1] + (5 << 20) - 1) >> 23
    assert all(p >> 23 == (p + s - 1) >> 23 for p, s in zip(places, [*sizes, 5 << 20], strict=True))
    writer.close()


def test_a_page_fits_what_is_kept_not_what_was_there(tmp_path):
    source = tree(tmp_path / "in", {f"{i}.png": png(Image.effect_noise((1300, 1300), 90)) for i in range(2)})
    for options in ({"square": 32, "raw": True}, {"square": 32}, {"max_size": 32}):
        about = pack(source, tmp_path / f"{len(list(tmp_path.iterdir()))}.beton", **options)
        assert about["bytes"] < 5 << 20


def test_the_table_of_allocations_has_everything(packed_file):
    file = read_beton(packed_file)
    whole = packed_file.read_bytes()
    table = np.frombuffer(whole[int(np.frombuffer(whole, HEADER, 1)["table"][0]) :], ALLOCATION)
    assert table["sample"].tolist() == list(range(16))
    assert (table["ptr"] == file.ptr_N).all() and (table["size"] == file.size_N).all()
