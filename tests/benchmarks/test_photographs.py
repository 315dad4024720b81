"""The loader benchmark's photographs: Qt's resource files are read, and a set is the same wherever it is made."""

import io
import struct
import zlib

import numpy as np
import pytest
from fasttrain.benchmarks import photographs
from fasttrain.benchmarks.photographs import entries, make, unpack
from PIL import Image


def resources(files: dict[str, tuple[int, bytes]], version: int) -> bytes:
    """A Qt resource file: a folder ``a`` with these files in it (flags and content as stored)."""
    names, contents, rows = b"", b"", []
    time = b"" if version == 1 else bytes(8)
    for name, flags, content in [("", 2, b""), ("a", 2, b""), *((k, *v) for k, v in files.items())]:
        place = (1, len(rows) + 1) if not name else (len(files), 2) if name == "a" else (0, len(contents))
        rows.append(struct.pack(">IHII", len(names), flags, *place) + time)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        contents += b"" if flags == 2 else struct.pack(">I", len(content)) + content
    start = 20 if version < 3 else 24
    tree = b"".join(rows)
    header = struct.pack(">4s4I", b"qres", version, start, start + len(tree), start + len(tree + contents))
    return header.ljust(start, b"\0") + tree + contents + names


@pytest.mark.parametrize("version", [1, 2, 3])
def test_entries_of_a_resource_file(version):
    packed = struct.pack(">I", 500) + zlib.compress(b"packed" * 100)
    rcc = resources({"plain.webp": (0, b"plain"), "ü.txt": (1, packed), "zstd": (4, b"?")}, version)
    assert dict(entries(rcc)) == {"a/plain.webp": b"plain", "a/ü.txt": b"packed" * 100}


def test_other_files_are_refused():
    with pytest.raises(ValueError, match="not a Qt resource file"):
        entries(b"RIFF" + bytes(30))


def test_photographs_are_picked_from_packages(tmp_path):
    def image(side: int, kind: str) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (2 * side, side)).save(out, kind)
        return out.getvalue()

    erase = {"bear.webp": (0, image(510, "WEBP")), "dot.webp": (0, image(8, "WEBP")), "main.qml": (0, b"Item {}")}
    for name, content in {
        "backgrounds/mate/nature/Garden.jpg": b"garden",
        "backgrounds/mate/nature/Storm.jpg": b"too even",
        "backgrounds/life_by_Somebody.jpg": b"life",
        "wallpapers/Path/contents/images/100x50.jpg": b"path",
        "wallpapers/Path/contents/images/1920x1080.jpg": b"a larger path",
        "wallpapers/Flow/contents/images/1920x1080.jpg": b"drawn",
        "gcompris-qt/rcc/erase.rcc": resources(erase, 3),
        "gcompris-qt/rcc/chess.rcc": b"not looked at",
    }.items():
        path = tmp_path / "usr/share" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    unpack(tmp_path, tmp_path / "photographs")
    found = {path.name: path.read_bytes() for path in (tmp_path / "photographs").iterdir()}
    assert found == {
        "Garden.jpg": b"garden",
        "Path.jpg": b"a larger path",
        "erase-bear.webp": erase["bear.webp"][1],
        "life_by_Somebody.jpg": b"life",
    }


@pytest.fixture
def sources(tmp_path):
    """Two photographs, one with detail enough and one smaller than a file should be."""
    paths = []
    for name, shape, noise in (("sharp", (900, 1300), 30), ("small", (300, 420), 4)):
        rows, columns = np.indices(shape)
        grain = np.random.default_rng(0).normal(0, noise, (*shape, 3))
        pixels = np.stack((rows, columns, rows + columns), 2) / 9 + grain
        paths.append(tmp_path / f"{name}.png")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1])
    return paths


def test_a_set_is_the_same_everywhere(tmp_path, sources):
    made = [make(tmp_path / name, 6, workers=1, photographs=sources) for name in ("one", "two")]
    one, two = ({p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.jpg")} for folder in made)
    assert one == two and len(set(one.values())) == 6
    assert sorted(map(str, one)) == [
        *("sharp/00000.jpg", "sharp/00002.jpg", "sharp/00004.jpg"),
        *("small/00001.jpg", "small/00003.jpg", "small/00005.jpg"),
    ]
    sizes = set()
    for path, data in one.items():
        with Image.open(made[0] / path) as image:
            sizes.add(image.size)
            assert image.format == "JPEG" and image.mode == "RGB" and "progressive" not in image.info
            assert [component[1:3] for component in image.layer] == [(2, 2), (1, 1), (1, 1)]
        assert path.parts[0] == "small" or 70_000 < len(data) < 110_000
    assert sizes == {(500, 375), (375, 500)}


def test_a_finished_set_is_left_alone_and_others_are_not_overwritten(tmp_path, sources, monkeypatch):
    make(tmp_path / "set", 2, workers=1, photographs=sources)
    monkeypatch.setattr(photographs, "ProcessPoolExecutor", None)
    make(tmp_path / "set", 2, photographs=sources)
    with pytest.raises(ValueError, match="holds something else than 3 files"):
        make(tmp_path / "set", 3, photographs=sources)
    with pytest.raises(ValueError, match="count: 0 files"):
        make(tmp_path / "none", 0, photographs=sources)


def test_photographs_that_were_brought_along_need_no_apt(tmp_path, sources, monkeypatch):
    """The cache's folder alone is enough, and the set is that of a machine that has apt."""
    (tmp_path / "carried/photographs").mkdir(parents=True)
    for path in sources:
        path.rename(tmp_path / "carried/photographs" / path.name)
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = make(tmp_path / "set", 4, workers=1, cache=tmp_path / "carried")
    assert len(list(folder.glob("*/*.jpg"))) == 4


def test_without_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="apt-get and dpkg-deb is not here"):
        make(tmp_path / "set", 2, cache=tmp_path / "cache")
    assert not list(tmp_path.iterdir())
