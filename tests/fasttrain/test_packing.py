"""``fasttrain pack``, the real command line: what it says, what users do wrong, and a kill in the middle."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fasttrain.loaders import open_dataset
from fasttrain.loaders.pack import pack

from fasttrain.cli import main
from tests.loaders import samples
from tests.loaders.jpegs import jpeg, photo
from tests.loaders.videos import write


@pytest.fixture
def data(tmp_path) -> Path:
    """18 JPEGs and 2 files that are none, in two classes."""
    samples.image_tree(tmp_path / "data", {"a": 10, "b": 10}, suffix=".jpg")
    for name in ("a/003.jpg", "b/009.jpg"):
        (tmp_path / "data" / name).write_text("no image")
    return tmp_path / "data"


def test_packs_and_is_done(fasttrain, data, tmp_path, monkeypatch, capsys):
    ran = fasttrain("pack", "folder", "--root", "data", "--out", "made/x.beton", process=True)
    said = "made/x.beton: 18 images (train 12, val 2, test 4), 4 MiB; 18 JPEGs kept; 2 left out, see made/x.beton.bad.jsonl\n"
    assert (ran.returncode, ran.stdout) == (0, said), ran.stderr
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == ["x.beton", "x.beton.bad.jsonl", "x.beton.json"]
    assert len(open_dataset("beton", tmp_path / "made/x.beton")) == 18
    assert json.loads((tmp_path / "made/x.beton.json").read_text())["options"]["seek"]
    monkeypatch.chdir(tmp_path)
    assert main(["pack", "folder", "--root", "data", "--out", "made/x.beton", "--json"]) == 0  # nothing is left to do
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "made/x.beton.json").read_text())


def test_check(data, tmp_path, capsys):
    out = tmp_path / "x.beton"
    assert main(["pack", "folder", "--root", str(data), "--out", str(out), "--no-seek", "--max-size", "30"]) == 0
    assert "18 images" in capsys.readouterr().out
    assert main(["pack", "--check", str(out)]) == 0
    about = json.loads(Path(f"{out}.json").read_text())
    assert capsys.readouterr().out == f"{out} is as it was packed: 18 samples, SHA-256 {about['sha256']}\n"
    assert about["options"] == {"max_size": 30, "square": 0, "quality": 90, "raw": False, "seek": False}
    assert main(["pack", "--check", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == about
    with out.open("r+b") as file:
        file.seek((2 << 20) + 50)
        file.write(b"x")
    assert main(["pack", "--check", str(out)]) == 2
    assert f"{out} is damaged: its SHA-256 is" in capsys.readouterr().err


@pytest.fixture
def clips(tmp_path) -> Path:
    """A list of four videos and a file that is none, in two classes."""
    rows = []
    for i in range(5):
        path = tmp_path / "clips" / "ab"[i % 2] / f"{i}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, "mpeg4", count=6 + i) if i != 3 else path.write_text("no video")
        split = ("train", "train", "val", "train", "test")[i]
        rows.append(json.dumps({"path": f"{'ab'[i % 2]}/{i}.avi", "label": "ab"[i % 2], "split": split}))
    (tmp_path / "clips/list.jsonl").write_text("\n".join(rows))
    return tmp_path / "clips"


def test_videos(clips, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["pack", "videos", "--root", "clips", "--out", "x.beton", "--short-side", "48", "--quality", "80"]
    assert main(command) == 0
    about = json.loads((tmp_path / "x.beton.json").read_text())
    assert about["options"] == {"short_side": 48, "quality": 80, "seek": True}
    assert about["videos"] == {"first": [0, 6, 13, 21, 31], "names": ["a/0.avi", "b/1.avi", "a/2.avi", "a/4.avi"]}
    ssim = about["ssim_112"]
    assert capsys.readouterr().out == (
        "x.beton: 4 videos (train 2, val 1, test 1), 31 frames, 4 MiB, "
        f"{round(about['bytes'] / 31)} bytes a frame; SSIM {ssim['mean']:.3f}, lowest {ssim['lowest']:.3f} "
        f"(in colour {ssim['colour']:.3f}), at 112 px of 4 "
        "frames; 1 left out, see x.beton.bad.jsonl\n"
    )
    assert 0.6 < ssim["lowest"] < ssim["mean"] < 1
    (line,) = (tmp_path / "x.beton.bad.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "clips/b/3.avi"
    packed, files = open_dataset("beton", "x.beton"), open_dataset("videos", "clips")
    assert packed.targets_N.tolist() == [0, 1, 0, 0] and packed.read.shape_N3[:, 1:].tolist() == [[48, 72]] * 4
    for i, was in enumerate((0, 1, 2, 4)):
        for shown, original in zip(packed.read.every(i), files.read.every(was), strict=True):
            assert abs(shown.mean(axis=(0, 1)) - original.mean(axis=(0, 1))).max() < 3
    assert main([*command, "--json"]) == 0  # nothing is left to do
    assert json.loads(capsys.readouterr().out) == about
    assert main(["pack", "--check", "x.beton"]) == 0
    said = f"x.beton is as it was packed: 4 videos, 31 frames, SHA-256 {about['sha256']}\n"
    assert capsys.readouterr().out == said


MISTAKES = {
    "--root": (["folder", "--out", "x.beton"], "--root: folder needs the folder that holds it"),
    "no such root": (["folder", "--root", "/no/such", "--out", "x.beton"], "--root: there is no folder /no/such"),
    "no classes": (["folder", "--root", "data/a", "--out", "x.beton"], "has no class folders"),
    "--out": (["folder", "--root", "data"], "pack needs a data set (beton, cifar10, "),
    "no data set": (["--out", "x.beton"], "pack needs a data set (beton, cifar10, "),
    "data set": (["fodler", "--root", "data", "--out", "x.beton"], "no data set is called 'fodler'; there are beton, "),
    "unknown option": (["folder", "--root", "data", "--out", "x.beton", "--bogus", "1"], "what is '--bogus'?"),
    "shortened option": (["folder", "--root", "data", "--out", "x.beton", "--max", "1"], "what is '--max'?"),
    "second data set": (["folder", "data", "--out", "x.beton"], "what is 'data'?"),
    "no value": (["folder", "--root", "data", "--out"], "argument --out: expected one argument"),
    "no number": (["folder", "--root", "data", "--out", "x.beton", "--max-size", "big"], "--max-size: invalid int value: 'big'"),
    "a flag's value": (["folder", "--root", "data", "--out", "x.beton", "--raw=1"], "--raw: ignored explicit argument '1'"),
    "quality": (["folder", "--root", "data", "--out", "x.beton", "--quality", "101"], "--quality: 101 is not between 1 and 100"),
    "square": (["folder", "--root", "data", "--out", "x.beton", "--square", "-4"], "--square: sides go from 0"),
    "video option": (["folder", "--root", "data", "--out", "x.beton", "--short-side", "0"],
                     "--short-side is for videos, and folder holds images, for which there is --max-size"),
    "image option": (["motion", "--out", "x.beton", "--max-size", "0"],
                     "--max-size is for images, and motion holds videos, for which there is --short-side"),
    "pixels of videos": (["motion", "--out", "x.beton", "--raw"], "--raw is for images, and motion holds videos"),
    "squares of videos": (["motion", "--out", "x.beton", "--square", "9"], "--square is for images, and motion holds videos"),
    "short side": (["motion", "--out", "x.beton", "--short-side", "-1"], "--short-side: -1 is not between 0 (as they are)"),
    "quality of videos": (["motion", "--out", "x.beton", "--quality", "0"], "--quality: 0 is not between 1 and 100"),
    "split": (["ucf101", "--root", "data", "--out", "x.beton", "--split", "4"], "--split: 4 is not 1, 2 or 3"),
    "workers": (["folder", "--root", "data", "--out", "x.beton", "--workers", "-2"], "--workers: -2 is below 0"),
    "an older option": (["folder", "--root", "data", "--out", "x.beton", "--seekable"], "what is '--seekable'?"),
    "out is a folder": (["folder", "--root", "data", "--out", "data"], "data is there already, and no data.json says what"),
    "out below a file": (["folder", "--root", "data", "--out", "data/a/000.jpg/x"], "cannot write data/a/000.jpg/x.partial"),
    "nothing to check": (["--check", "x.beton"], "there is no x.beton.json: only files made by fasttrain pack have a checksum"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(mistake, data, monkeypatch, capsys):
    monkeypatch.chdir(data.parent)
    given, says = MISTAKES[mistake]
    assert main(["pack", *given]) == 2
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert said.out == "" and lines[-1].startswith("fasttrain: error: ") and says in lines[-1]
    assert "data.root" not in said.err and "Traceback" not in said.err
    assert sorted(p.name for p in data.parent.iterdir()) == ["data"]


ROOM = {
    "pixels": (
        ["--raw"],
        20 * 3 * 48 * 64,
        "--out: .* has 180.0 KiB free, and the pixels of folder take about 180.0 KiB; --square",
    ),
    "squares": (["--raw", "--square", "16"], 20 * 3 * 16**2, "the pixels of folder take about"),
    "smaller pixels": (["--raw", "--max-size", "32"], 20 * 3 * 24 * 32, "the pixels of folder take about"),
}


@pytest.mark.parametrize("case", ROOM)
def test_pixels_that_the_disk_cannot_hold_are_not_begun(case, tmp_path, monkeypatch, capsys):
    options, need, says = ROOM[case]
    for i in range(20):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(photo(48, 64)))
    command = ["pack", "folder", "--root", str(tmp_path / "data"), "--out", str(tmp_path / "new/x.beton"), *options]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, need - 1))
    assert main(command) == 2
    assert re.search(says, capsys.readouterr().err) and not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, need))
    assert main(command) == 0


def test_a_mistake_ends_the_process_with_2(fasttrain, tmp_path):
    ran = fasttrain("pack", "folder", "--root", "/no/such", "--out", "x.beton")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "fasttrain: error: --root: there is no folder /no/such\n"


def test_help(capsys):
    assert main(["pack", "-h"]) == 0
    said = capsys.readouterr().out
    assert all(option in said for option in ("--max-size", "--short-side", "--split"))


def test_a_packing_that_is_killed_goes_on(tmp_path, monkeypatch):
    """``kill -9`` at a moment when something is safely on disk; the same command then makes the same file."""
    content = jpeg(photo(300, 200), quality=95)
    for i in range(300):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if i % 30 else b"text")
    command = ("pack", "folder", "--root", "data", "--out", "x.beton")
    often = "import sys, fasttrain.loaders.growing as g, fasttrain.cli as c; g.SYNC_BYTES = 200_000; sys.exit(c.main())"
    process = subprocess.Popen([sys.executable, "-c", often, *command, "--workers", "1"], cwd=tmp_path)
    log, end = tmp_path / "x.beton.partial.log", time.monotonic() + 60
    while not (log.exists() and log.stat().st_size > 2_500) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and log.stat().st_size > 2_500
    assert not (tmp_path / "x.beton").exists()
    monkeypatch.chdir(tmp_path)
    assert main([*command]) == 0
    pack(open_dataset("folder", tmp_path / "data"), tmp_path / "whole.beton")
    for name in ("beton", "beton.bad.jsonl"):
        assert (tmp_path / f"x.{name}").read_bytes() == (tmp_path / f"whole.{name}").read_bytes().replace(
            str(tmp_path).encode() + b"/data", b"data"
        )
