"""Several processes: the same training as one, from any number of them to any other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fasttrain.loaders import open_dataset

from fasttrain.log import read_lines

from ..faults import processes

SMALL = (
    *("smoke", "--run.tensorboard", "false", "--run.log_every", "1", "--data.labelled", "60", "--data.size", "12"),
    *("--data.stored", "12", "--data.batch", "16", "--run.threads", "1", "--optim.epochs", "3"),
)


def train(folder: Path, name: str, *options: str, ranks: int = 1) -> Path:
    processes.run(folder, "train", *SMALL, "--name", name, *options, ranks=ranks)
    return folder / "runs" / name


def curve(folder: Path) -> list[list[float]]:
    """Losses of all steps and figures of all evaluations."""
    steps = [[s["loss"], s["primary"]] for s in read_lines(folder, "step")]
    return steps + [[e["loss"], e["accuracy"]] for e in read_lines(folder, "eval")]


def weights(folder: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / name, weights_only=True)["target"]


def assert_alike(folder: Path, other: Path, *, bits: bool = False, steps: float = 1e-4) -> None:
    """Two runs with the same curve and weights, to rounding or to the last bit."""
    first, second = curve(folder), curve(other)
    if bits:
        assert first == second
    else:
        np.testing.assert_allclose(first, second, rtol=steps)
    mine, theirs = weights(folder), weights(other)
    for name, value in mine.items():
        if bits:
            assert torch.equal(value, theirs[name]), name
        else:
            torch.testing.assert_close(value.float(), theirs[name].float(), rtol=10 * steps, atol=steps)


VARIANTS = {
    "recalled": (),
    "live, with a module": ("--transfer.module", "true", "--transfer.recall", "false", "--transfer.width", "16"),
    "average, clip, workers": (
        "--optim.ema",
        "0.9",
        "--optim.clip_norm",
        "1",
        "--data.loader",
        "torch",
        "--data.workers",
        "1",
    ),
    "peers": ("--method.name", "dml"),
    "puzzles": (
        *(
            "--pretext.task",
            "jigsaw",
            "--method.name",
            "scratch",
            "--pretext.permutations",
            "20",
            "--pretext.width",
            "32",
        ),
        *("--pretext.hidden", "64", "--data.size", "36", "--data.stored", "36"),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_two_processes_are_one_with_two_parts(tmp_path, variant):
    """60 images in batches of 16: the last one of 12. Steps are small: large ones make much of rounding, as units that are
    exactly 0 are pushed to one side."""
    options = (*variant, "--optim.lr", "0.0005", "--optim.epochs", "2")
    one = train(tmp_path, "one", *options, "--run.accumulate", "2")
    assert_alike(one, train(tmp_path, "two", *options, ranks=2))


def test_more_processes_than_samples_of_the_last_batch(tmp_path):
    """61 images: the last batch has 13 for 4 processes; of 50, two, of which three processes have nothing (and whose batch norm
    is over two samples)."""
    for labelled, epochs in (("61", "2"), ("50", "1")):
        options = ("--data.labelled", labelled, "--optim.lr", "0.0005", "--optim.epochs", epochs)
        one = train(tmp_path, f"one{labelled}", *options, "--run.accumulate", "4")
        assert_alike(one, train(tmp_path, f"four{labelled}", *options, ranks=4), steps=1e-3)
        two = train(tmp_path, f"two{labelled}", *options, "--run.accumulate", "4", ranks=2)
        assert_alike(one, two, steps=1e-3)


def test_synchronised_batch_norm_is_that_of_the_whole_batch(tmp_path):
    options = ("--optim.lr", "0.0005", "--method.name", "scratch")
    one = train(tmp_path, "one", *options)
    two = train(tmp_path, "two", *options, "--run.sync_batch_norm", "true", ranks=2)
    assert_alike(one, two)
    apart = train(tmp_path, "apart", *options, ranks=2)
    assert curve(apart)[0] != pytest.approx(curve(one)[0], rel=1e-4)


def stop_somewhere(folder: Path, name: str, options: tuple[str, ...], ranks: int, seed: int) -> int:
    """Asks a run to end at some moment of its training; returns the step that its checkpoint is of."""
    random = np.random.default_rng(seed)
    run = processes.start(folder, "train", *SMALL, "--name", name, *options, ranks=ranks)
    metrics = folder / "runs" / name / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.is_file() else 0
    latest = time.monotonic() + 60
    while time.monotonic() < latest and not (metrics.is_file() and metrics.stat().st_size > size):
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.15))
    number = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1][seed % 3]
    run.send(number, [int(random.integers(ranks))])  # one of them is enough
    assert run.wait() in ([75] * ranks, [0] * ranks), run.said()
    assert run.left() == []
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    step = max(json.loads(line)["step"] for line in lines)
    state = torch.load(folder / "runs" / name / "checkpoints/last.pt", weights_only=True)
    assert state["position"]["step"] == step  # nothing of what was done is lost
    return step


LONG = ("--optim.epochs", "8", "--optim.lr", "0.0005", "--run.accumulate", "4")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Runs of one, two and four processes, from beginning to end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for ranks in (1, 2, 4):
        train(folder, f"ranks{ranks}", *LONG, ranks=ranks)
    return folder / "runs"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_stopped_and_gone_on_to_the_same_bits(tmp_path, undisturbed, ranks):
    for seed in range(2):
        stop_somewhere(tmp_path, "stopped", LONG, ranks, 10 * ranks + seed)
    assert_alike(train(tmp_path, "stopped", *LONG, ranks=ranks), undisturbed / f"ranks{ranks}", bits=True)


def test_goes_on_with_other_numbers_of_processes(tmp_path, undisturbed):
    """4, then 1, then 2: the curve of any of them, to rounding."""
    stop_somewhere(tmp_path, "elastic", LONG, 4, 1)
    stop_somewhere(tmp_path, "elastic", LONG, 1, 2)
    folder = train(tmp_path, "elastic", *LONG, ranks=2)
    for ranks in (1, 2, 4):
        assert_alike(folder, undisturbed / f"ranks{ranks}", steps=1e-2)


def test_what_changes_with_the_number_is_said(tmp_path):
    options = ("--optim.epochs", "1", "--run.checkpoint_steps", "1")
    train(tmp_path, "run", *options)
    for path in (tmp_path / "runs/run").glob("summary.json"):
        path.unlink()
    state = torch.load(tmp_path / "runs/run/checkpoints/last.pt", weights_only=True)
    assert state["processes"] == 1
    said = processes.run(tmp_path, "train", *SMALL, "--name", "run", *options, ranks=2).said()
    assert "2 processes instead of 1" in said and "run.accumulate" in said


def test_torchrun(tmp_path):
    """The real one, as docs/cluster.md says; an agent that is asked to end asks its processes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fasttrain",
    ]
    command += ["train", *SMALL, "--optim.epochs", "300"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        last = tmp_path / "runs/smoke/checkpoints/last.pt"
        latest = time.monotonic() + 120
        while not last.is_file() and process.poll() is None and time.monotonic() < latest:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "asked to end, after step" in said, said
    step = torch.load(last, weights_only=True)["position"]["step"]
    assert f"after step {step}" in said


def test_gradients_are_those_of_distributed_data_parallel(tmp_path):
    """torch's own, on the same parts, for one step."""
    script = Path(__file__).with_name("ddp_script.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("alike") == 2


def test_mistakes(tmp_path):
    cases = {
        "run.parallel: 2 runs side by side, but 2 processes train each": ("--run.parallel", "2", "--seeds", "2"),
        "run.accumulate: 3 parts of a batch cannot be shared out to 2 processes": ("--run.accumulate", "3"),
        "data.batch: 2 parts of a batch of 3 leave one with fewer than 2 samples": ("--data.batch", "3"),
        "method.name: maxl trains in one process, and here are 2": ("--method.name", "maxl"),
        "the last batch of 2 samples leaves some of 2 parts empty": (
            "--run.sync_batch_norm",
            "true",
            "--data.labelled",
            "50",
        ),
    }
    for text, options in cases.items():
        run = processes.start(tmp_path, "train", *SMALL, *options, ranks=2)
        assert run.wait() == [2, 2] and text in run.said(), run.said()
    half = processes.start(tmp_path, "train", *SMALL, WORLD_SIZE="2")
    assert half.wait() == [2] and "is not set to what goes with it: start the processes with torchrun" in half.said()
    other = processes.start(tmp_path, "eval", "runs/smoke", ranks=2)
    assert other.wait() == [2, 2] and "eval runs in one process, not in 2 (WORLD_SIZE)" in other.said()


def test_a_mistake_of_one_process_ends_all(tmp_path):
    """A list of images that only the first machine has."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    tiny = open_dataset("toy", val_share=0.2).splits["train"][:40]
    (tmp_path / "some.txt").write_text("\n".join(map(str, tiny)))
    options = ("--data.labelled", "0", "--data.indices", "some.txt")
    run = processes.start(tmp_path, "train", *SMALL, *options, ranks=2, elsewhere=elsewhere)
    assert run.wait() == [2, 2], run.said()
    first, second = (path.read_text() for path in run.outputs)
    assert "error: process 1 of 2: data.indices: cannot read some.txt" in first
    assert "error: process 1: data.indices: cannot read some.txt" in second
    assert not (tmp_path / "runs/smoke/metrics.jsonl").exists()


def test_a_process_that_dies_is_named(tmp_path):
    run = processes.start(tmp_path, "train", *SMALL, "--optim.epochs", "500", ranks=2)
    last = tmp_path / "runs/smoke/checkpoints/last.pt"
    while not last.is_file():
        time.sleep(0.02)
    run.send(signal.SIGKILL, [1])
    assert run.wait(30) == [75, -9]
    assert "process 1" in run.said() or "rank 1" in run.said()
    assert run.left() == []
