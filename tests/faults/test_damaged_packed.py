"""Damaged packed files: ``.beton`` of images, label vectors and videos, seek indices, ``FILE.json``; read in every way."""

import json
from pathlib import Path

import numpy as np
import pytest
from fasttrain.loaders import open_dataset
from fasttrain.loaders.beton import ALLOCATION, FIELD, HEADER, read_beton, records
from fasttrain.loaders.datasets.beton import Packed
from fasttrain.loaders.pack import pack
from fasttrain.loaders.pack_video import pack_videos
from fasttrain.loaders.show import clip_shower, load_libjpeg

from .damaged import DamagedFiles, damaged, digest, faults, told, watch
from .sets import opened, samples_of, sound, tiny

_KINDS = {"jpegs": "places365", "vectors": "voc", "raw": "stl10", "videos": "ucf101"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Packed files by kind, of 12 to 40 samples."""
    root, out = tmp_path_factory.mktemp("packed"), {}
    for kind, name in _KINDS.items():
        size = {"samples": 2} if kind in ("vectors", "raw") else {"classes": 4, "samples": 2, "side": 32}
        dataset = open_dataset(name, tiny(name, root / kind, **size), verify=False)
        out[kind] = root / f"{kind}.beton"
        (pack_videos if kind == "videos" else pack)(dataset, out[kind], workers=1)
    return out


class Heads:
    """``read`` for ``watch``: damages the parts of a packed file that say where things are; the pages stay as they are."""

    def __init__(self, path: Path, reader) -> None:
        self.path, self.reader, self.content = path, reader, path.read_bytes()
        header = np.frombuffer(self.content, HEADER, 1)[0]
        self.table, count = int(header["table"]), len(read_beton(path))
        self.head = HEADER.itemsize + 2 * FIELD.itemsize + count * records(1).itemsize
        self.size = len(self.content)

    def __call__(self, case: int) -> object:
        content, part = self.content, case % 4
        if case < 0:
            return self.reader()
        if part == 0:  # the header
            content = damaged(content[: HEADER.itemsize], case // 4) + content[HEADER.itemsize :]
        elif part == 1:  # fields and records
            content = content[: HEADER.itemsize] + damaged(content[HEADER.itemsize : self.head], case // 4)
            content += self.content[self.head :]
        elif part == 2:  # the table
            table = damaged(content[self.table :], case // 4)
            content = content[: self.table] + table[: len(table) // ALLOCATION.itemsize * ALLOCATION.itemsize]
        else:
            content = damaged(content, case // 4)
        try:
            self.path.write_bytes(content)
            return self.reader()
        finally:
            self.path.write_bytes(self.content)


@pytest.mark.parametrize("beside", [True, False], ids=["with FILE.json", "without"])
@pytest.mark.parametrize(("kind", "count"), [("jpegs", 100), ("vectors", 40), ("raw", 40), ("videos", 30)])
def test_damaged_betons_are_refused_or_harmless(kind, count, beside, packed, tmp_path):
    path = tmp_path / "x.beton"
    path.write_bytes(packed[kind].read_bytes())
    if beside:
        (tmp_path / "x.beton.json").write_bytes(Path(f"{packed[kind]}.json").read_bytes())
    elif kind in ("vectors", "videos"):
        count //= 2

    def read() -> object:
        dataset = open_dataset("beton", path, verify=False)
        return sound(dataset), samples_of(dataset)

    damage = Heads(path, read if beside or kind != "vectors" else lambda: _plain(path))
    outcomes = watch(damage, range(count), size=damage.size, names=("x.beton",))
    print(kind, beside, told(outcomes))
    assert not faults(outcomes) and any(o.kind == "refused" for o in outcomes)


def _plain(path: Path) -> object:
    """The records, and the bytes of all images."""
    file = read_beton(path)
    read = Packed(file)
    return file.targets_N, [digest(read.encoded(i)) for i in range(len(file))]


def test_with_checksums_damage_before_the_pages_is_always_refused(packed, tmp_path):
    path = tmp_path / "x.beton"
    path.write_bytes(packed["jpegs"].read_bytes())
    (tmp_path / "x.beton.json").write_bytes(Path(f"{packed['jpegs']}.json").read_bytes())
    damage = Heads(path, lambda: sound(open_dataset("beton", path)))
    cases = [case for case in range(100) if case % 4 < 2]
    outcomes = watch(damage, cases, size=damage.size, names=("x.beton",))
    print("checksums", told(outcomes))
    assert not faults(outcomes) and {o.kind for o in outcomes} <= {"refused", "same"}


@pytest.mark.parametrize("kind", ["jpegs", "videos"])
def test_damaged_side_files_are_refused_or_harmless(kind, packed, tmp_path):
    path, beside = tmp_path / "x.beton", tmp_path / "x.beton.json"
    path.write_bytes(packed[kind].read_bytes())
    beside.write_bytes(Path(f"{packed[kind]}.json").read_bytes())
    damage = DamagedFiles([beside], opened("beton", path, pixels=False), size=1 << 16)
    outcomes = damage.watch(60, "x.beton")
    print("side", kind, told(outcomes))
    assert not faults(outcomes) and any(o.kind == "refused" for o in outcomes)


@pytest.mark.parametrize("edit", [
    {"splits": {"train": [[0, 8]], "val": [[7, 10]], "test": []}},
    {"splits": {"train": [[0, 1 << 62]], "val": [], "test": []}},
    {"splits": {"train": [[0.5, 8]], "val": [], "test": []}},
    {"splits": {"train": [["0", "8"]], "val": [], "test": []}},
    {"splits": {"train": "0-8", "val": [], "test": []}},
    {"splits": {"train": [[0, 8, 9]], "val": [], "test": []}},
    {"classes": [1, 2, 3, 4]},
    {"classes": []},
])  # fmt: skip
def test_side_files_that_cannot_be_right_are_refused(edit, packed, tmp_path):
    path, beside = tmp_path / "x.beton", tmp_path / "x.beton.json"
    path.write_bytes(packed["jpegs"].read_bytes())
    beside.write_text(json.dumps(json.loads(Path(f"{packed['jpegs']}.json").read_text()) | edit))
    with pytest.raises(ValueError, match=r"x\.beton"):
        open_dataset("beton", path, verify=False)


def test_damaged_pages_are_refused_or_harmless_to_the_compiled_decoder(packed, tmp_path, need):
    need("ffcv")
    load_libjpeg()
    path = tmp_path / "x.beton"
    content = packed["jpegs"].read_bytes()
    path.write_bytes(content)
    file = read_beton(path)
    first = min(file.ptr_N) - 1000
    end = int((file.ptr_N + file.size_N).max())
    show = clip_shower()

    def read(case: int) -> object:
        """All images in a few views each, straight from memory that was damaged, seek indices and all."""
        data = (
            content[:first] + damaged(content[first:end], case)[: end - first] + content[end:] if case >= 0 else content
        )
        data_N = np.frombuffer(data.ljust(len(content), b"\0"), dtype=np.uint8)
        out = []
        for i in range(len(file)):
            height, width = int(file.height_N[i]), int(file.width_N[i])
            for box in ((0, 0, height, width), (height // 2, width // 3, height // 3, width // 2), (-3, 5, height, 9)):
                row_6 = np.array([*box, 0, 1], dtype=np.int32)
                place = (file.ptr_N[[i]], file.size_N[[i]], np.ones(1, dtype=np.int64), height, width)
                out_TSSC = np.zeros((1, 16, 16, 3), dtype=np.uint8)
                bad = show(data_N.ctypes.data, *place, row_6, out_TSSC, 0, out_TSSC[0, :0, :0])
                out.append(("", out_TSSC) if bad < 0 else "cannot be decoded")
        return out

    outcomes = watch(read, range(120), size=len(content), names=("",))
    print("pages", told(outcomes))
    assert not faults(outcomes)
