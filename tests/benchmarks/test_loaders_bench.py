"""The loader benchmark: every row that can run here does, and ratios are of medians of one run."""

import json
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from fasttrain.benchmarks import loaders, peers
from fasttrain.benchmarks.loaders import REFERENCES, ROWS, prepare, run
from fasttrain.benchmarks.photographs import make
from PIL import Image

from fasttrain.cli import main

FILES = 24
TINY = ["--size", "32", "--batch", "8", "--repeats", "1", "--workers", "2"]
PARTS = {
    "plain ffcv": "ffcv",
    "ffcv": "ffcv",
    "ffcv (no index)": "ffcv",
    "dali cpu": "dali",
    "dali cpu (plain)": "dali",
}

# numba says so when code that FFCV had compiled is collected
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """24 files of two photographs."""
    folder = tmp_path_factory.mktemp("bench")
    sources = []
    for name in ("one", "two"):
        grain = np.random.default_rng(len(sources)).normal(128, 40, (90, 120, 3))
        sources.append(folder / f"{name}.png")
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(sources[-1])
    return make(folder / "tree", FILES, side=(60, 44), workers=1, photographs=sources)


@pytest.fixture(autouse=True)
def _home(tmp_path_factory, monkeypatch):
    """Packed files go to one cache for all tests, not to the user's."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))


def spdl_works() -> bool:
    try:
        import spdl.io.utils

        return bool(spdl.io.utils.get_ffmpeg_versions())
    except Exception:
        return False


def test_every_row_that_can_run_does(tree, tmp_path, need, capsys):
    for part in ("ffcv", "dali"):
        need(part)
    file = tmp_path / "out.json"
    assert main(["bench", "loaders", "--data", str(tree), *TINY, "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    missing = {"dali gpu"} if not torch.cuda.is_available() else set()
    missing |= set() if spdl_works() else {"spdl"}
    assert set(content["not_run"]) == missing
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == [name for name in ROWS if name not in missing]
    for name, row in rows.items():
        assert set(row) == {"name", "size", "images_per_s", "relative_to", "repeats"}
        assert row["size"] == 32 and len(row["repeats"]) == 1 and row["images_per_s"] > 0
        assert set(row["relative_to"]) == set(REFERENCES) - {name}
    (views,) = content["views_and_order"]
    assert views["name"] == "views and order" and views["ms_per_epoch"] > 0 and views["share"] > 0
    assert content["suite"] == "loaders" and content["images"] == FILES and "machine" in content
    shown = capsys.readouterr().out
    assert all(name in shown for name in rows) and "not run: dali gpu" in shown


def test_ratios_are_of_medians(tree):
    content = run(["--data", str(tree), *TINY, "--repeats", "3", "--rows", "bare decode,dataloader (tensor),synthetic"])
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == ["dataloader (tensor)", "bare decode", "synthetic"]
    for row in rows.values():
        assert len(row["repeats"]) == 3 and row["images_per_s"] == median(row["repeats"])
        for name, ratio in row["relative_to"].items():
            assert ratio == row["images_per_s"] / rows[name]["images_per_s"]
    assert "share" not in content["views_and_order"][0]


def test_rows_take_turns_and_the_first_epoch_does_not_count(tree, monkeypatch):
    calls = []

    class Noted(peers.Peer):
        def __init__(self, name):
            self.name = name

        def __iter__(self):
            calls.append(self.name)
            yield range(5)

        def close(self):
            calls.append(f"close {self.name}")

    monkeypatch.setattr(loaders, "ROWS", {n: lambda data, task, n=n: Noted(n) for n in "abc"})
    content = run(["--data", str(tree), *TINY, "--repeats", "2", "--rows", "a,b,c"])
    assert calls == [*"abc", *"abc", *"bca", "close a", "close b", "close c"]
    assert [len(row["repeats"]) for row in content["rows"]] == [2, 2, 2]


@pytest.mark.parametrize("name", [n for n in ROWS if n not in ("dali gpu", "synthetic")])
def test_an_epoch_has_every_image_once(tree, name, need):
    if name in PARTS:
        need(PARTS[name])
    if name == "spdl" and not spdl_works():
        pytest.skip("SPDL or FFmpeg's libraries are not here")
    data = prepare(tree, 1)
    task = peers.Task(data.folder, loaders._packed(data.packed), 32, 7, 2, torch.device("cpu"))
    peer = ROWS[name](data, task)
    try:
        epochs = [list(peer) for _ in range(2)]
    finally:
        peer.close()
    for batches in epochs:
        # DALI's own pipeline fills its last batch up
        assert sum(map(len, batches)) == (28 if name == "dali cpu (plain)" else FILES)
        if name != "bare decode":
            pixels = [getattr(batch, "pixels", batch) for batch in batches]
            assert {(p.shape[1:], p.dtype) for p in pixels} == {((3, 32, 32), torch.uint8)}
            assert len({p[0].numpy().tobytes() for p in pixels}) == len(pixels)


def test_a_missing_package_leaves_its_rows_out(tree, monkeypatch):
    for module in ("ffcv", "ffcv.loader", "ffcv.fields.decoders", "spdl", "spdl.io", "spdl.io.utils"):
        monkeypatch.setitem(sys.modules, module, None)
    content = run(["--data", str(tree), *TINY, "--rows", "plain ffcv,ffcv,spdl,bare decode"])
    assert set(content["not_run"]) == {"plain ffcv", "ffcv", "spdl"}
    assert "ffcv" in content["not_run"]["plain ffcv"] and "Error" in content["not_run"]["spdl"]
    assert [(row["name"], row["relative_to"]) for row in content["rows"]] == [("bare decode", {})]


def test_a_packed_file_is_enough_for_ours(tree):
    kept = loaders._packed(prepare(tree, 1).packed).file.path
    content = run(["--data", str(kept), *TINY, "--rows", "torch,dataloader (pil),bare decode"])
    assert [row["name"] for row in content["rows"]] == ["torch", "bare decode"]
    assert "a folder of image files" in content["not_run"]["dataloader (pil)"]


def test_memory_is_told_after_each_epoch(tree, capsys):
    content = run(["--data", str(tree), *TINY, "--rows", "synthetic,bare decode", "--memory", "3"])
    assert [(row["name"], len(row["resident_mib"])) for row in content["rows"]] == [
        ("bare decode", 3),
        ("synthetic", 3),
    ]
    assert all(mib > 10 for row in content["rows"] for mib in row["resident_mib"])
    assert "resident MiB after each epoch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "torch,nothing"], "no row 'nothing'; there are dataloader \\(tensor\\), .*, synthetic"),
        (["--batch", "0"], "numbers must be above 0"),
        (["--size", "big"], "--size"),
        (["--what", "1"], "--what 1"),
    ],
)
def test_mistakes(arguments, said):
    with pytest.raises(ValueError, match=said):
        run(arguments)
