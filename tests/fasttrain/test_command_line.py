"""The command line: what users do wrong, and, in processes of its own, what it leaves and kills at any moment."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch

from tests.loaders import samples


def refused(result: subprocess.CompletedProcess, *parts: str) -> None:
    """One clear sentence on stderr, exit code 2, no traceback."""
    lines = [line for line in result.stderr.splitlines() if "Warning" not in line]
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    said = [line for line in lines if line.startswith("fasttrain: error: ")]
    assert len(said) == 1 and lines[-1] == said[0], result.stderr
    for part in parts:
        assert part in said[0]


def nothing_written(folder: Path) -> None:
    """No run, no table, not even a folder of one: only the lock that guarded the place."""
    assert [p for p in (folder / "runs").rglob("*") if not p.name.startswith(".")] == []


SMOKE = ("train", "smoke", "--run.tensorboard", "false")
TINY = "{name: t, model: test_resnet, size: 32, "


def test_wrong_field(fasttrain, tmp_path):
    refused(fasttrain(*SMOKE, "--optim.lrr", "1"), "there is no field optim.lrr; did you mean optim.lr?")
    nothing_written(tmp_path)


def test_wrong_type(fasttrain, tmp_path):
    refused(fasttrain(*SMOKE, "--optim.lr", "fast"), "optim.lr: expected float, got fast")
    nothing_written(tmp_path)


def test_missing_folder(fasttrain, tmp_path):
    refused(
        fasttrain(*SMOKE, "--data.name", "folder", "--data.root", "/no/such", process=True),
        "data.root: there is no folder /no/such",
    )
    nothing_written(tmp_path)


def test_unreadable_image(fasttrain, tmp_path):
    root = samples.image_tree(tmp_path / "data", {"a": 12, "b": 12})
    (root / "b/004.png").write_bytes(b"\x89PNG but not really")
    data = ("--data.name", "folder", "--data.root", str(root), "--data.stored", "24", "--method.name", "scratch")
    refused(fasttrain(*SMOKE, *data), "cannot read the image", "b/004.png")
    nothing_written(tmp_path)


def test_unreadable_image_met_while_training_from_files(fasttrain, tmp_path):
    root = samples.image_tree(tmp_path / "data", {"a": 12, "b": 12})
    for i in range(12):
        (root / f"b/{i:03}.png").write_bytes(b"\x89PNG but not really")
    data = ("--data.name", "folder", "--data.root", str(root), "--data.loader", "torch", "--data.workers", "1")
    refused(fasttrain(*SMOKE, *data, "--method.name", "scratch"), "cannot read the image", "b/0")
    assert list((tmp_path / "runs").rglob("*.pt")) == []


def test_empty_class_folder(fasttrain, tmp_path):
    root = samples.image_tree(tmp_path / "data", {"a": 4})
    (root / "b").mkdir()
    refused(fasttrain(*SMOKE, "--data.name", "folder", "--data.root", str(root)), "the class folder", "holds no images")
    nothing_written(tmp_path)


def test_unknown_source(fasttrain, tmp_path):
    refused(
        fasttrain(*SMOKE, "--sources", "[{name: t, model: resnet5000}]"), "network called 'resnet5000'; did you mean"
    )
    refused(fasttrain(*SMOKE, "--transfer.sources", "[other]"), "no source is called 'other'; the recipe has ['tiny']")
    nothing_written(tmp_path)


def test_weights_that_do_not_fit(fasttrain, tmp_path):
    torch.save(timm.create_model("test_resnet", num_classes=9).state_dict(), tmp_path / "nine.pth")
    sources = f"[{TINY} weights: {tmp_path}/nine.pth}}]"
    refused(fasttrain(*SMOKE, "--sources", sources), "do not fit test_resnet", "set the source's classes to 9?")
    nothing_written(tmp_path)


class _Trap:
    def __reduce__(self):
        return (os.system, ("touch code-ran",))


def test_a_pickle_with_code_in_it(fasttrain, tmp_path):
    torch.save({"state_dict": _Trap()}, tmp_path / "trap.pth")
    refused(fasttrain(*SMOKE, "--sources", f"[{TINY} weights: {tmp_path}/trap.pth}}]"), "hold code", "were not loaded")
    refused(fasttrain("eval", str(tmp_path / "trap.pth")), "holds code and was not loaded")
    assert not (tmp_path / "code-ran").exists()
    nothing_written(tmp_path)


def test_class_count_mismatch_with_a_checkpoint(fasttrain, tmp_path):
    root = samples.image_tree(tmp_path / "data", {"a": 30, "b": 30})
    data = ("--data.name", "folder", "--data.root", str(root), "--data.stored", "24", "--method.name", "scratch")
    done = fasttrain(*SMOKE, *data, "--optim.epochs", "1")
    assert done.returncode == 0, done.stderr
    before = (tmp_path / "runs/smoke/checkpoints/last.pt").read_bytes()
    samples.image_tree(tmp_path / "more", {"c": 30})
    (tmp_path / "more/c").rename(root / "c")
    message = ("is of 2 classes (a, b), and the data has 3 (a, b, c)",)
    refused(fasttrain(*SMOKE, *data, "--optim.epochs", "1"), *message)
    refused(fasttrain("eval", "runs/smoke"), *message)
    assert (tmp_path / "runs/smoke/checkpoints/last.pt").read_bytes() == before


def test_damaged_checkpoint(fasttrain, tmp_path):
    assert fasttrain(*SMOKE, "--optim.epochs", "1").returncode == 0
    path = tmp_path / "runs/smoke/checkpoints/last.pt"
    path.write_bytes(path.read_bytes()[:5000])
    refused(fasttrain(*SMOKE, "--optim.epochs", "1"), "cannot read the checkpoint", "last.pt")


def test_other_mistakes(fasttrain, tmp_path):
    refused(
        fasttrain("trian"),
        "there is no command 'trian'; there are train, describe, eval, probe, export, pack, shard, cache, table, pretext, bench, "
        "doctor",
    )
    refused(fasttrain("train"), "train needs a recipe")
    refused(fasttrain("train", "nothing"), "no packaged recipe is called 'nothing'")
    refused(fasttrain("eval", str(tmp_path)), "is no run's folder")
    refused(fasttrain(*SMOKE, "--run.device", "cuda:9"), "run.device: cuda:9 is not here")
    (tmp_path / "file").write_text("")
    refused(fasttrain(*SMOKE, "--run.dir", "file/runs"), "run.dir: cannot write to")


def test_a_mistake_in_runs_side_by_side(fasttrain):
    wild = ("--optim.lr", "1e15", "--optim.schedule", "constant", "--optim.epochs", "2")
    refused(
        fasttrain(*SMOKE, "--seeds", "2", "--run.parallel", "2", *wild, process=True), "optim.lr 1e+15 may be too high"
    )


def test_help_and_version(fasttrain):
    assert "usage: fasttrain COMMAND" in fasttrain("--help").stdout
    out = fasttrain("train", "--help")
    assert out.returncode == 0 and "Peak learning rate." in out.stdout
    assert fasttrain("--version").stdout.strip()[0].isdigit()


def test_train_eval_export_describe(fasttrain, tmp_path):
    """What a user does in a row."""
    done = fasttrain(*SMOKE, "--optim.epochs", "3", process=True)
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout and "runs/smoke/report.html" in done.stdout
    summary = json.loads((tmp_path / "runs/smoke/summary.json").read_text())
    said = json.loads(fasttrain("eval", "runs/smoke", "--json").stdout)
    assert said["figures"] == summary["test"] and said["images"] == 80
    assert json.loads(fasttrain("eval", "runs/smoke", "--split", "val", "--json").stdout)["figures"] == summary["val"]
    out = fasttrain("export", "runs/smoke", "--out", "target.pt2")
    assert out.returncode == 0 and "3 classes" in out.stdout, out.stderr


def test_describe_without_any_weights(fasttrain):
    assert "parameters: 269,267 of the target alone" in fasttrain("describe", "smoke").stdout
    arguments = ("--target.model", "resnet20", "--target.classes", "10", "--source-classes", "1000,365", "--json")
    plain = json.loads(fasttrain("describe", *arguments).stdout)
    assert plain["parameters"] == {"target": 269_722, "training": 358_447}
    module = json.loads(fasttrain("describe", *arguments, "--transfer.module", "true", "--data.size", "96").stdout)
    assert module["parameters"] == {"target": 269_722, "training": 435_503}
    assert module["flops_per_image"]["target_training"] == pytest.approx(2.69e9, rel=0.01)  # as published code's


def test_bench_kernels(fasttrain, tmp_path):
    """Every row that this machine can run, side by side; what it cannot, with the reason."""
    arguments = ("--classes", "20", "--batch", "8", "--rounds", "1", "--json", "out/kernels.json")
    out = fasttrain("bench", "kernels", *arguments, TRITON_INTERPRET="0")
    assert out.returncode == 0, out.stderr
    content = json.loads((tmp_path / "out/kernels.json").read_text())
    assert content["suite"] == "kernels" and content["copy_bytes_per_s"] > 1e8
    assert content["machine"]["cpu"] and content["versions"]["torch"]
    rows = {row["name"]: row for row in content["rows"]}
    losses = {name.partition(",")[0] for name in rows if name.endswith("B=8 C=20")}
    if "fasttrain" in content["not_run"]:
        assert losses == {"eager", "compiled", "reference", "reference compiled"}
        assert "does not run on cpu" in content["not_run"]["fasttrain"]
    else:
        assert {"eager", "compiled", "fasttrain"} <= losses
    eager, ours = rows["eager, B=8 C=20"], rows["reference, B=8 C=20"]
    assert ours["relative_to"]["eager, B=8 C=20"] == pytest.approx(eager["ms"] / ours["ms"])
    assert ours["copy_share"] == pytest.approx(ours["floor_ms"] / ours["ms"]) and len(ours["repeats"]) >= 3
    for wrong, message in (
        (("kernel",), "bench needs a suite, not 'kernel'; there are checkpoints, cifar, clusters"),
        (("kernels", "--batch", "0"), "numbers must be above 0"),
        (("kernels", "--dtype", "int8"), "invalid choice"),
        (("kernels", "--fast"), "--fast"),
    ):
        refused(fasttrain("bench", *wrong), message)


def test_doctor(fasttrain):
    content = json.loads(fasttrain("doctor", "--json").stdout)
    assert content["uses"]["soft-target losses"].startswith("triton" if torch.cuda.is_available() else "reference")
    assert content["optional"]["triton"]["works"] is True
    parts = {
        "device",
        "precision",
        "loader",
        "videos",
        "soft-target losses",
        "several processes",
        "live sources",
        "compiled step",
        "optimiser",
    }
    assert set(content["uses"]) == parts
    assert "apex: " in fasttrain("doctor").stdout


def test_two_processes_in_one_folder(fasttrain, tmp_path):
    first = start(tmp_path, "--optim.epochs", "400")
    try:
        wait_for(tmp_path / "runs/smoke/checkpoints/last.pt", first)
        refused(fasttrain(*SMOKE, "--optim.epochs", "400"), "another process is training in runs/smoke")
    finally:
        first.kill()
        first.wait()


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "fasttrain", *SMOKE, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.slow
def test_killed_while_runs_train_side_by_side(tmp_path):
    """The processes that train go with the one that started them."""
    process = start(tmp_path, "--seeds", "2", "--run.parallel", "2", "--run.threads", "1", "--optim.epochs", "500")
    for seed in (0, 1):
        wait_for(tmp_path / f"runs/smoke/seed{seed}/checkpoints/last.pt", process)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    for _ in range(100):
        if not any(
            Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
            for pid in children
        ):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("a child outlived its parent")


def test_cache(fasttrain, tmp_path):
    """Filled ahead, filled once, found by a training; what does not fit is refused with the difference."""
    first = fasttrain("cache", "smoke", process=True)
    assert first.returncode == 0, first.stderr
    assert "2 views of 127 images from tiny; 1.0 MiB of 1.0 MiB to be computed" in first.stdout
    assert "254 labels" in first.stdout
    again = fasttrain("cache", "smoke", "--json")
    (file,) = json.loads(again.stdout)["files"]
    assert file["labels"] == 254 and "to be computed" not in again.stderr
    assert Path(tmp_path, file["path"]).parent == tmp_path / "runs/smoke/recall"
    trained = fasttrain("train", "smoke", "--optim.epochs", "1")
    assert trained.returncode == 0 and "all known" in trained.stdout
    named = ("--transfer.cache", "labels")
    for part in ("1/2", "2/2"):
        assert fasttrain("cache", "smoke", *named, "--part", part).returncode == 0
    refused(
        fasttrain("train", "smoke", *named, "--data.pad", "1", "--name", "other"),
        "transfer.cache: labels/tiny-",
        "view.pad is 2 there, 1 here; choose another folder, or remove it",
    )
    (path,) = (tmp_path / "labels").iterdir()
    os.truncate(path, 5000)
    refused(fasttrain("train", "smoke", *named, "--name", "other"), "is cut short: 5000 bytes of", "remove it")


def test_cache_mistakes(fasttrain):
    refused(fasttrain("cache", "smoke", "--part", "3/2"), "--part: '3/2' is not a part such as 1/4")
    refused(fasttrain("cache"), "cache needs a recipe")
    refused(fasttrain("cache", "smoke", "--method.name", "scratch"), "nothing of this recipe is recalled")
    refused(
        fasttrain("cache", "smoke", "--transfer.every_view", "true"), "transfer.every_view: only crop pad or centre"
    )
    refused(fasttrain("train", "smoke", "--run.compile", "graphs"), "run.compile: graphs needs a CUDA device")
    refused(fasttrain("train", "smoke", "--optim.impl", "apex"), "optim.impl: apex cannot be used")
    refused(fasttrain("cache", "smoke", "--transfer.bank", "graphed"), "transfer.bank: graphed needs a CUDA device")
