"""``fasttrain pack``, the real command line: what it says, what users do wrong, and a kill in the middle."""

import json
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


@pytest.fixture
def data(tmp_path) -> Path:
    """18 JPEGs and 2 files that are none, in two classes."""
    samples.image_tree(tmp_path / "data", {"a": 10, "b": 10}, suffix=".jpg")
    for name in ("a/003.jpg", "b/009.jpg"):
        (tmp_path / "data" / name).write_text("no image")
    return tmp_path / "data"


def test_packs_and_is_done(fasttrain, data, tmp_path, monkeypatch, capsys):
    ran = fasttrain("pack", "folder", "--root", "data", "--out", "made/x.beton")
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


def test_a_mistake_ends_the_process_with_2(fasttrain, tmp_path):
    ran = fasttrain("pack", "folder", "--root", "/no/such", "--out", "x.beton")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "fasttrain: error: --root: there is no folder /no/such\n"


def test_help(capsys):
    assert main(["pack", "-h"]) == 0
    assert "--max-size" in capsys.readouterr().out


def test_a_packing_that_is_killed_goes_on(tmp_path, monkeypatch):
    """``kill -9`` at a moment when something is safely on disk; the same command then makes the same file."""
    content = jpeg(photo(300, 200), quality=95)
    for i in range(300):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if i % 30 else b"text")
    command = ("pack", "folder", "--root", "data", "--out", "x.beton")
    often = "import sys, fasttrain.loaders.pack as p, fasttrain.cli as c; p._SYNC_BYTES = 200_000; sys.exit(c.main())"
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
