"""Damaged files of our own: soft labels, pseudo-labels, centroids, logs of a packing, scans of videos; and recipes."""

import gzip
import json
import os
import zlib

import numpy as np
import pytest
import torch
from fasttrain.loaders import growing, open_dataset
from fasttrain.loaders.pack import pack
from fasttrain.loaders.video import decoder_cache
from fasttrain.loaders.video.scan import Scan

from fasttrain.pretext.files import Centroids, Nearest, read_centroids
from fasttrain.recipe import load, recipe_path
from fasttrain.sources.cache import _HEADER, _MAGIC, CacheError, Form, SoftLabelFile

from .damaged import DamagedFiles, damaged, faults, told, watch
from .sets import samples_of, sound, tiny

_ABOUT = {"source": {"name": "resnet", "weights": "abc"}, "data": {"name": "toy", "content": "123"}}
_ALL = np.arange(12)


def label_file(path, form=None) -> SoftLabelFile:
    return SoftLabelFile(path, _ABOUT, views=2, samples=12, form=form or Form(10))


@pytest.mark.parametrize(
    ("form", "count"), [(Form(10), 100), (Form(10, top=3), 60), (Form(5, "float32"), 40), (Nearest(4), 40)], ids=str
)
def test_damaged_soft_labels_are_refused_or_count_as_missing(form, count, tmp_path):
    path = tmp_path / "a.soft"
    file = label_file(path, form)
    record_B = np.zeros(12, dtype=form.fields)
    for name in record_B.dtype.names:
        record_B[name] = np.random.default_rng(0).integers(0, 3, record_B[name].shape)
    for view in (0, 1):
        file.write(np.full(12, view), _ALL, record_B)
    file.close()
    content = path.read_bytes()
    # where the bytes are that matter: header, seals, records
    parts = [(0, 400), (_HEADER, _HEADER + 96), (2 * _HEADER, len(content)), (0, len(content))]

    def read(case: int) -> object:
        start, end = parts[case % 4]
        changed = content if case < 0 else content[:start] + damaged(content[start:end], case // 4) + content[end:]
        path.write_bytes(changed)
        file = label_file(path, form)
        try:
            found = []
            for view in (0, 1):
                known_B = file.known(np.full(12, view), _ALL)
                read_B = file.read(np.full(12, view), _ALL)
                assert (read_B[known_B] == record_B[known_B]).all(), "a damaged label is served"
                found.append(known_B)
            return found
        finally:
            file.close()

    outcomes = watch(read, range(count), size=len(content), names=(path.name,))
    print("soft", form, told(outcomes))
    assert not faults(outcomes) and {o.kind for o in outcomes} >= {"refused", "other"}


def sealed(header: bytes) -> bytes:
    """A header that its checksum fits."""
    about = len(header).to_bytes(4, "little") + zlib.crc32(header).to_bytes(4, "little")
    return (_MAGIC + about + header).ljust(_HEADER, b"\0")


@pytest.mark.parametrize(
    "header", [b"[]", b"7", b"null", b"[" * 3000, b'{"a":' * 600 + b"1" + b"}" * 600, b"\xff\xfe", b"9" * 4000]
)
def test_headers_that_are_made_to_harm_are_refused(header, tmp_path):
    path = tmp_path / "a.soft"
    path.write_bytes(sealed(header))
    with pytest.raises(CacheError, match=r"a\.soft"):
        label_file(path)


def test_labels_of_classes_that_there_are_not_count_as_missing(tmp_path):
    for number, form in enumerate((Form(10, top=2), Nearest(10))):
        file = label_file(tmp_path / f"{number}.soft", form)
        record_B = np.zeros(3, dtype=form.fields)
        record_B[form.fields.names[0]][:, 0] = (9, 10, -1)
        file.write(np.zeros(3, dtype=np.int64), np.arange(3), record_B)
        assert file.known(np.zeros(3, dtype=np.int64), np.arange(3)).tolist() == [True, False, False]
        file.close()


def test_soft_labels_that_are_cut_off_while_they_are_used_are_an_error_and_no_signal(tmp_path):
    path, size = tmp_path / "a.soft", []

    def read(case: int) -> object:
        file = label_file(path)
        size.append(path.stat().st_size)
        if case >= 0:
            os.truncate(path, (0, 4096, size[0] - 1)[case])
        try:
            return file.known(np.zeros(12, dtype=np.int64), _ALL)
        finally:
            file.close()
            path.unlink()

    outcomes = watch(read, range(3), size=1 << 16, names=(path.name,))
    assert [o.kind for o in outcomes] == ["refused"] * 3, outcomes


def test_damaged_centroids_are_refused_or_finite(tmp_path):
    path = tmp_path / "c.safetensors"
    Centroids(torch.rand(6, 16), 0.5, 100).write(path)

    def read() -> object:
        found = read_centroids(path)
        assert found.centroid_KD.isfinite().all() and found.centroid_KD.ndim == 2 and found.images > 0
        return found

    outcomes = DamagedFiles([path], read).watch(60)
    print("centroids", told(outcomes))
    assert not faults(outcomes) and any(o.kind == "refused" for o in outcomes)


def test_a_damaged_log_of_a_packing_makes_no_other_file(tmp_path, monkeypatch):
    """The packing begins anew, goes on, or is refused; what comes out has every label and readable pixels."""
    root = tiny("places365", tmp_path / "set", classes=4, samples=2, side=16)
    dataset, out = open_dataset("places365", root, verify=False), tmp_path / "x.beton"
    monkeypatch.setattr(growing, "SYNC_BYTES", 1)

    class Stop(Exception):
        pass

    def stop(progress) -> None:
        if progress.done == 8:
            raise Stop

    with pytest.raises(Stop):
        pack(dataset, out, workers=1, report=stop)
    kept = {p: p.read_bytes() for p in tmp_path.glob("x.beton*")}
    log = next(p for p in kept if p.name.endswith(".log"))
    start = kept[log].index(b"\n") + 1

    def read(case: int) -> object:
        for path in tmp_path.glob("x.beton*"):
            path.unlink()
        for path, content in kept.items():
            path.write_bytes(content)
        if case >= 0:
            head, body = kept[log][:start], kept[log][start:]
            log.write_bytes(head + damaged(body, case // 2) if case % 2 else damaged(kept[log], case // 2))
        about = pack(dataset, out, workers=1)
        packed = open_dataset("beton", out)
        assert packed.targets_N.tolist() == dataset.targets_N.tolist() and not about["bad"], "labels"
        return sound(packed)

    outcomes = watch(read, range(24), size=1 << 22, names=("x.beton",))
    print("log", told(outcomes))
    assert not faults(outcomes) and {o.kind for o in outcomes} <= {"same", "refused"}


def test_damaged_scans_of_videos_are_done_without(tmp_path):
    place = tmp_path / "videos.json.gz"
    known = {
        (f"/v{i}.avi", 100 + i, i): Scan(
            frames=9, height=8, width=8, codec="h264", pts=range(0, 9), starts=np.array([0, 4])
        )
        for i in range(5)
    }
    decoder_cache._save(place, known)
    content = place.read_bytes()
    text = gzip.decompress(content)

    def read(case: int) -> object:
        if case < 0:
            return len(decoder_cache._load(place))
        place.write_bytes(
            damaged(content, case // 4) if case % 4 == 0 else gzip.compress(damaged(text, case // 4 + case % 4))
        )
        for scan in decoder_cache._load(place).values():
            assert scan.frames >= 0 and scan.starts[0] == 0 and (scan.pts is None or len(scan.pts) == scan.frames)
            assert not scan.frames or 0 < scan.height * scan.width < 1 << 32
        return "sound"

    outcomes = watch(read, range(100), size=len(content), names=(place.name,))
    print("scans", told(outcomes))
    assert not faults(outcomes)
    row = {
        "frames": 1 << 40,
        "height": 8,
        "width": 8,
        "starts": {"range": [0, 1 << 40, 1]},
        "pts": {"range": [0, 1 << 62, 1]},
    }
    for bad in (row, {**row, "pts": {"range": [0, 1 << 70, 1]}}, {"frames": -1}, {"starts": [[0]]}, {"starts": [1]}):
        place.write_bytes(gzip.compress(json.dumps(["fasttrain videos 1", ["/v", 1, 1, bad]]).encode()))
        with pytest.warns(UserWarning, match="looked through again"):
            assert decoder_cache._load(place) == {}


def test_damaged_videos_are_refused_or_give_frames(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tiny("ucf101", tmp_path / "set", classes=2, samples=2, side=32)
    for decoder in ("pyav", "auto"):
        files = sorted(root.rglob("*.avi"))[:3]

        def read(decoder=decoder) -> object:
            dataset = open_dataset("ucf101", root, decoder=decoder)
            return sound(dataset), samples_of(dataset)

        outcomes = DamagedFiles(files, read).watch(24)
        print("videos", decoder, told(outcomes))
        assert not faults(outcomes)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {other}\n",
        "ffconcat version 1.0\nfile {name}\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 33\n",
    ],
    ids=["playlist", "network", "concatenation", "beside", "session"],
)
@pytest.mark.parametrize("suffix", [".avi", ".m3u8", ".ffconcat", ".sdp"])
def test_a_video_that_is_a_list_of_others_is_refused(text, suffix, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tiny("ucf101", tmp_path / "set", classes=2, samples=2, side=32)
    other = min(root.rglob("*.avi"))
    path = other.with_name(f"made{suffix}")
    path.write_text(text.format(other=other, name=other.name))
    (path.parent / "list.csv").write_text(f"path,label\n{path.name},0\n")
    dataset = open_dataset("videos", path.parent)
    outcomes = watch(
        lambda case: "" if case < 0 else dataset.read.frames(0, np.array([0])), [0], size=1 << 20, names=(path.name,)
    )
    assert [o.kind for o in outcomes] == ["refused"], outcomes


# recipes


def test_damaged_recipes_are_refused_or_valid(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(recipe_path("smoke").read_bytes())
    outcomes = DamagedFiles([path], lambda: load(str(path))).watch(48, "x.yaml", "field", ":")
    print("recipes", told(outcomes))
    assert not faults(outcomes) and any(o.kind == "refused" for o in outcomes)


_LAUGHS = "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12))


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [ha]\n" + _LAUGHS,
        "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}]}}\n" for i in range(9)),
        "rows: &r {a: *r}\n",
        "rows: " + "[" * 100_000,
        "rows: " + "{a: " * 500 + "1" + "}" * 500,
        "name: !!python/object/apply:os.system ['true']\n",
        "name: !!python/name:os.system\n",
        "name: " + "9" * 5000,
        "name: 2001-99-99\n",
        "name: &x a\n" * 2 + "? [1, 2]\n: 3\n",
        "name: \udcff".encode("utf-8", "surrogateescape"),
        "name: " + "a" * (1 << 19),
        "rows: {" + ", ".join(f"r{i}: {{}}" for i in range(15_000)) + "}",
        "- 1\n- 2\n",
        "\t: [",
        "name: !!binary '*'\n",
        "data: {crop: .nan, root: .inf}\n",
    ],
)
def test_recipes_that_are_made_to_harm_are_refused_in_time(text, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    outcomes = watch(
        lambda case: "" if case < 0 else load(str(path)),
        [0],
        size=path.stat().st_size,
        names=("x.yaml", "field", "data.", "name:"),
    )
    assert [o.kind for o in outcomes] == ["refused"], outcomes


def test_a_file_of_fields_on_the_command_line_is_weighed_as_a_recipe_is(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("rows:\n  a0: &a0 {x: 1}\n" + "".join(f"  {line}\n" for line in _LAUGHS.splitlines()))
    for given in (["--config", str(path)], [f"--config={path}"]):
        with pytest.raises(ValueError, match=r"x\.yaml: with its aliases it has more than"):
            load(None, given)
    path.write_text("optim: {lr: 0.125}\n")
    assert load(None, ["--config", str(path)]).optim.lr == 0.125
