"""The loader benchmark: every row that can run here does, and ratios are of medians of one run."""

import json
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from fasttrain.benchmarks import gpu_loaders, limits, loaders, peers
from fasttrain.benchmarks.limits import Watch, limit
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
ON_GPU = {"dali gpu (plain)", "dali gpu", "hybrid", "torchvision gpu"}

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
    missing = ON_GPU if not torch.cuda.is_available() else set()
    missing |= set() if spdl_works() else {"spdl"}
    assert set(content["not_run"]) == missing
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == [name for name in ROWS if name not in missing]
    for name, row in rows.items():
        assert set(row) == {"name", "size", "images_per_s", "relative_to", "repeats", "use", "limited_by"}
        assert row["use"]["cpu_cores"] >= 0 and row["use"]["busiest_thread"] >= 0 and row["limited_by"]
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


@pytest.mark.parametrize("name", [n for n in ROWS if n not in (*ON_GPU, "synthetic")])
def test_an_epoch_has_every_image_once(tree, name, need):
    if name in PARTS:
        need(PARTS[name])
    if name == "spdl" and not spdl_works():
        pytest.skip("SPDL or FFmpeg's libraries are not here")
    data = prepare(tree, 1)
    task = peers.Task(data.folder, loaders._packed(data.packed), 32, 7, 2, torch.device("cpu"), times=2)
    peer = ROWS[name](data, task)
    try:
        epochs = [list(peer) for _ in range(2)]
    finally:
        peer.close()
    for batches in epochs:
        # DALI's own pipeline fills its last batch up
        assert sum(map(len, batches)) == (49 if name == "dali cpu (plain)" else 2 * FILES)
        if name != "bare decode":
            pixels = [getattr(batch, "pixels", batch) for batch in batches]
            assert {(p.shape[1:], p.dtype) for p in pixels} == {((3, 32, 32), torch.uint8)}
            assert len({p[0].numpy().tobytes() for p in pixels}) > len(pixels) / 2  # ours show a view as often


# rows for a GPU, on the CPU: the same code, but for where DALI decodes
GPU_PEERS = {
    "torchvision gpu": lambda data, task: gpu_loaders.TorchvisionGpu(task),
    "gpu decode": lambda data, task: gpu_loaders.DecodeOnly(task, 0.5),
    "hybrid": lambda data, task: gpu_loaders.Hybrid(task, loaders.spec(data.packed, task)),
}


@pytest.mark.parametrize("name", GPU_PEERS)
def test_an_epoch_of_a_gpus_row_has_every_image_once(tree, name, need):
    for part in ("ffcv", "dali"):
        need(part)
    data = prepare(tree, 1)
    task = peers.Task(data.folder, loaders._packed(data.packed), 32, 7, 2, torch.device("cpu"), times=3)
    peer = GPU_PEERS[name](data, task)
    try:
        for _ in range(2):
            batches = list(peer)
            assert sum(map(len, batches)) == 3 * FILES
            if name == "hybrid":
                index = torch.cat([batch.index for batch in batches]).tolist()
                assert sorted(index) == sorted(3 * [*range(FILES)])
                assert 0.02 <= peer.share <= 0.98 and all(took > 0 for took in peer.took)
    finally:
        peer.close()
    if name == "torchvision gpu":
        assert {(p.shape[1:], p.dtype) for p in batches} == {((3, 32, 32), torch.uint8)}


def test_an_error_in_a_side_of_the_hybrid_is_raised(tree, need, monkeypatch):
    for part in ("ffcv", "dali"):
        need(part)
    data = prepare(tree, 1)
    task = peers.Task(data.folder, loaders._packed(data.packed), 32, 7, 2, torch.device("cpu"))
    peer = gpu_loaders.Hybrid(task, loaders.spec(data.packed, task))
    try:
        monkeypatch.setattr(peer.sides[1], "_work", lambda *given: (_ for _ in ()).throw(ValueError("no bytes")))
        with pytest.raises(ValueError, match="no bytes"):
            list(peer)
    finally:
        peer.close()


def test_shares_of_the_jpeg_engine_are_rows(tree, monkeypatch):
    content = run(["--data", str(tree), *TINY, "--rows", "synthetic", "--hw", "0,0.5,1"])
    assert [row["name"] for row in content["rows"]] == ["synthetic"]
    engines = [f"dali gpu (hw {share})" for share in ("0", "0.5", "1")] + ["gpu decode (hw 0)", "gpu decode (hw 1)"]
    if not torch.cuda.is_available():
        assert content["not_run"] == dict.fromkeys(engines, "ValueError: it needs a GPU")
    given = loaders._parsed(["--rows", "ffcv"], torch.device("cuda"))
    assert list(given.rows) == ["ffcv"] and given.times == 8
    given = loaders._parsed([], torch.device("cuda"))
    assert set(given.rows) == {*ROWS, *loaders.share_rows(loaders.HW_SHARES)}
    assert list(loaders._parsed([], torch.device("cpu")).rows) == list(ROWS)


def test_a_budget_is_kept(tree, monkeypatch):
    """As many repeats as fit, and no row is opened late."""
    now = [0.0]

    class Slow(peers.Peer):
        def __iter__(self):
            now[0] += 3
            yield range(5)

    monkeypatch.setattr(loaders.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loaders, "ROWS", {n: lambda data, task: Slow() for n in "abcdef"})
    monkeypatch.setattr(loaders, "_views", lambda *given: {"name": "views and order", "ms_per_epoch": 1.0})
    content = run(["--data", str(tree), *TINY, "--repeats", "5", "--budget", "22"])
    assert [row["name"] for row in content["rows"]] == [*"abcd"]  # the fourth was opened at 9 s of 22
    assert {*content["not_run"]} == {*"ef"} and "--budget: 22 s for 32 px" in content["not_run"]["e"]
    assert {len(row["repeats"]) for row in content["rows"]} == {1} and now[0] == 24


def test_limits_name_what_is_fully_used():
    assert limit({"cpu_cores": 15.5, "busiest_thread": 0.95, "gpu": 0.3}, 16) == (
        "the CPU (15.5 of 16 cores), one thread of this process"
    )
    assert limit({"cpu_cores": 3.0, "jpeg_engine": 0.97}, 16) == "the GPU's JPEG engine"
    assert limit({"cpu_cores": 3.0, "busiest_thread": 0.4}, 16) == "nothing that is watched is fully used"


def test_a_busy_thread_is_seen(monkeypatch):
    watch, calls = Watch(torch.device("cpu")), []
    monkeypatch.setattr(
        limits, "nvml_gauges", lambda device: {"gpu": lambda: calls.append(0) or 0.5, "bad": {}.popitem}
    )
    told = Watch(torch.device("cuda"), every=0.01)
    for _ in range(2):
        with watch, told:
            end = time.process_time() + 0.15
            while time.process_time() < end:
                pass
    figures = watch.figures()
    assert 0.2 < figures["busiest_thread"] < 1.1 and figures["cpu_cores"] > 0.1
    assert told.figures()["gpu"] == 0.5 and "bad" not in told.figures() and len(calls) > 5


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
        (["--hw", "0,1.5"], "--hw 1.5 is no share, 0 to 1"),
    ],
)
def test_mistakes(arguments, said):
    with pytest.raises(ValueError, match=said):
        run(arguments)
