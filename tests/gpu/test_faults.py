"""On a CUDA device: too little memory, damaged JPEGs where the GPU decodes, and trainings with DALI that are stopped or killed.

Of a damaged JPEG has to hold: what libjpeg refuses is an error that names file and sample, or has the stand-in of the torch
loader, whatever nvJPEG would make of it, wherever that can be told from the file's ends and headers. What libjpeg decodes
with a warning is served, with the same index, label and view; its pixels are nvJPEG's, or ours if nvJPEG refuses it. The rest
of the batch is as if it had not been there, and nothing hangs.

What is tested takes the device as an argument, and so can be tried on a CPU.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fasttrain.loaders import Dataset, evaluation, open_dataset, open_loader
from fasttrain.loaders.jpeg import read_header
from fasttrain.loaders.pack import pack

from fasttrain import checkpoint
from fasttrain.build import Parts
from fasttrain.recipe import load
from fasttrain.shortage import explained
from fasttrain.step import Stepper

from .test_loaders import allowed, apart, nearly_same, opened, photograph, same_but_pixels, spec_of

__all__ = ["opened"]  # a fixture
pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DAMAGED = 5  # which sample
SECONDS = 120  # for a process, at most


@pytest.fixture
def device() -> str:
    return DEVICE


# memory


@contextmanager
def no_more_memory(device: str) -> Iterator[None]:
    """PyTorch's allocator gets nothing more from the device. (On a CPU whoever asks is told so.)"""
    if device == "cpu":
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of .."
        )
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def is_one_sentence(done: subprocess.CompletedProcess, device: str) -> None:
    """Exit code 2, and what was asked for, what there is, and fields that take less."""
    assert done.returncode == 2, done
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("fasttrain: ")]
    assert line.startswith(f"fasttrain: error: out of memory{' on cuda' if device == 'cuda' else ''}: "), line
    assert " were asked for; " in line and "Try, best first: " in line and "data.batch 16 (is 32;" in line
    assert "Traceback" not in done.stderr + done.stdout


LARGE = (
    "train",
    "smoke",
    "--data.size",
    "160",
    "--data.stored",
    "160",
    "--run.compile",
    "false",
    "--run.tensorboard",
    "false",
)


def too_little_for_a_step(fasttrain, monkeypatch, device: str) -> None:
    """The batch does not fit beside the networks; after that the process can go on with a smaller one."""
    take = Stepper.take

    def starved(*given: Any, **named: Any) -> Any:
        with no_more_memory(device):
            return take(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "take", starved)
        is_one_sentence(fasttrain(*LARGE, "--run.device", device, "--method.name", "scratch"), device)
    done = fasttrain(*LARGE, "--run.device", device, "--method.name", "scratch", "--data.batch", "4", "--optim.epochs", "1",
                     "--name", "after", "--data.labelled", "40")  # fmt: skip
    assert done.returncode == 0, done.stderr


def too_little_for_the_sources(fasttrain, monkeypatch, device: str) -> None:
    """Their bank copies the weights before the first step, which are larger than what is kept of freed memory."""
    open_sources = Parts.open_sources

    def starved(*given: Any, **named: Any) -> Any:
        with no_more_memory(device):
            return open_sources(*given, **named)

    monkeypatch.setattr(Parts, "open_sources", starved)
    sources = "[{name: large, model: 'timm:resnet50', weights: random, size: 64}]"
    done = fasttrain(*LARGE, "--run.device", device, "--sources", sources, "--transfer.recall", "false",
                     "--transfer.bank", "folded")  # fmt: skip
    is_one_sentence(done, device)


def decode_large(root: Path, device: str, leave: int) -> str:
    """In a process of its own: DALI decodes 64 images of 12 megapixels with so many bytes of the device's memory left.

    Returns what the training would say."""
    spec = spec_of(open_dataset("folder", root), index_N=np.zeros(64, dtype=np.int64), batch=64, size=224)
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        kept = torch.empty(free - leave, dtype=torch.uint8, device=device)
    loader = open_loader("dali", spec, device, 2)
    if device == "cpu":
        loader._new_pipe = failing_pipe  # type: ignore[attr-defined]
    try:
        with explained(load("smoke", ["--data.loader", "dali", "--data.batch", "32"]), torch.device(device)):
            for batch in loader:
                batch.pixels.sum()
        return "nothing"
    except ValueError as error:
        return str(error)
    finally:
        loader.close()
        if device == "cuda":
            del kept


def failing_pipe(batch: int) -> Any:
    raise RuntimeError("Error in mixed operator `decoders.image`: Can't allocate 2304000000 bytes on device 0.")


def _decode_large(root: Path, device: str, leave: int, answer: Any) -> None:
    answer.put(decode_large(root, device, leave))


def too_little_for_dali(tmp_path: Path, device: str) -> None:
    (tmp_path / "set/a").mkdir(parents=True)
    large = photograph(np.random.default_rng(0), 0).resize((4000, 3000))
    large.save(tmp_path / "set/a/large.jpg", quality=80)
    context = multiprocessing.get_context("spawn")  # it may hang, or leave the device's memory in any state
    answer = context.Queue()
    process = context.Process(target=_decode_large, args=(tmp_path / "set", device, 1 << 30, answer))
    process.start()
    try:
        said = answer.get(timeout=SECONDS)
    finally:
        process.kill()
        process.join()
    assert said.startswith("out of memory") and "Try, best first: " in said and "data.batch 16 (is 32" in said, said


# damaged JPEGs


def cut_off(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def closed(content: bytes) -> bytes:
    """Cut off, with an end marker."""
    return cut_off(content) + b"\xff\xd9"


def garbage(content: bytes) -> bytes:
    """200 other bytes within the coded data."""
    middle = (read_header(content).data + len(content)) // 2
    other = np.random.default_rng(1).bytes(200).replace(b"\xff", b"\x7f")
    return content[:middle] + other + content[middle + len(other) :]


def taller(content: bytes) -> bytes:
    """The header names a height of 64 pixels more."""
    at = content.index(b"\xff\xc0") + 5
    height = int.from_bytes(content[at : at + 2], "big") + 64
    return content[:at] + height.to_bytes(2, "big") + content[at + 2 :]


def no_image(content: bytes) -> bytes:
    return b"\xff\xd8 no image \xff\xd9"


@pytest.fixture
def damaged(tmp_path) -> Callable[[str, Callable[[bytes], bytes]], Dataset]:
    """``damaged(kind, how)``: 12 photographs, as files or packed, one of them damaged since."""
    rng = np.random.default_rng(0)
    (tmp_path / "tree/a").mkdir(parents=True)
    for i in range(12):
        photograph(rng, i).save(tmp_path / f"tree/a/{i:02}.jpg", quality=90)

    def make(kind: str, how: Callable[[bytes], bytes]) -> Dataset:
        tree = open_dataset("folder", tmp_path / "tree")
        if kind == "files":
            path = tmp_path / f"tree/a/{DAMAGED:02}.jpg"
            path.write_bytes(how(path.read_bytes()))
            return tree
        pack(tree, tmp_path / "set.beton", workers=1)
        read: Any = open_dataset("beton", tmp_path / "set.beton").read
        start, size = int(read.file.ptr_N[DAMAGED]), int(read.file.size_N[DAMAGED])
        content = how(bytes(read.encoded(DAMAGED)))[:size]
        with open(tmp_path / "set.beton", "r+b") as file:
            file.seek(start)
            file.write(content + bytes(size - len(content)))
        return open_dataset("beton", tmp_path / "set.beton")

    return make


def is_an_error_or_replaced(opened, device: str, dataset: Dataset) -> None:
    """As in the torch loader: raised where the batch would have been served, naming the sample; or with its stand-in."""
    spec = spec_of(dataset, batch=3, seed=2)
    ours, theirs = [], []
    for served, loader in ((ours, opened("dali", spec, device)), (theirs, opened("torch", spec))):
        with pytest.raises(
            ValueError, match=rf"^cannot read the image .*({DAMAGED:02}\.jpg|sample {DAMAGED}): "
        ) as error:
            for batch in loader:
                served.append((batch.index.tolist(), loader.state_dict()))
        served.append(str(error.value))
    assert ours == theirs and len(ours) > 1
    skipping = replace(spec, on_bad_sample="skip", still=80)
    loader, reference = opened("dali", skipping, device), opened("torch", skipping)
    for epoch in range(2):
        nearly_same(skipping, list(loader), list(reference), epoch=epoch)
    assert loader.bad == reference.bad and list(loader.bad) == [DAMAGED]


def is_served_like_libjpegs(opened, device: str, dataset: Dataset, share: float) -> None:
    """Two epochs; only the damaged sample may look different from what the torch loader shows."""
    spec = spec_of(dataset, batch=5, plan=evaluation(1.0), seed=2)
    loader, reference = opened("dali", spec, device, hw_decoder_load=share), opened("torch", spec)
    for epoch in range(2):
        ours, theirs = list(loader), list(reference)
        same_but_pixels(ours, theirs)
        for a, b in zip(ours, theirs, strict=True):
            sound = b.index != DAMAGED
            assert (apart(a.pixels, b.pixels) <= allowed(spec, epoch, b))[sound].all()
    assert not loader.bad


# trainings that are stopped

TRAIN = (
    *("smoke", "--method.name", "scratch", "--data.name", "beton", "--data.loader", "dali", "--data.stored", "0"),
    *("--data.crop", "random_resized", "--data.size", "16", "--data.batch", "16", "--data.views", "0"),
    *("--data.workers", "2"),
    *("--run.log_every", "1", "--run.checkpoint_steps", "5", "--run.eval_every", "100", "--run.tensorboard", "false"),
    *("--run.compile", "false", "--run.precision", "fp32", "--optim.epochs", "12", "--optim.lr", "0.002"),
)
STEPS = 96


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> Path:
    """160 photographs in four classes that nothing tells apart, of which 128 are trained on: losses stay what they are."""
    root, rng = tmp_path_factory.mktemp("trainings"), np.random.default_rng(0)
    for i in range(160):
        path = root / f"tree/{'abcd'[i // 2 % 4]}/{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = photograph(rng, i)
        image.resize((image.width // 2, image.height // 2)).save(path, quality=90)
    pack(open_dataset("folder", root / "tree"), root / "set.beton", workers=1)
    return root / "set.beton"


def start(place: Path, beton: Path, device: str) -> subprocess.Popen:
    place.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "fasttrain", "train", *TRAIN, "--data.root", str(beton), "--run.device", device]
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}  # one from here means another folder there
    with (place / "said.txt").open("w") as out:
        return subprocess.Popen(
            command, cwd=place, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def losses(place: Path) -> dict[int, float]:
    """By step, of what was logged whole; of a step that was taken twice the last."""
    path = place / "runs/smoke/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return {line["step"]: line["loss"] for line in found if line["kind"] == "step"}


def stopped(place: Path, beton: Path, device: str, number: int) -> int:
    """Sends a signal when 30 steps are logged; returns the exit code."""
    process = start(place, beton, device)
    latest = time.monotonic() + SECONDS
    try:
        while len(losses(place)) < 30:
            assert process.poll() is None and time.monotonic() < latest, (place / "said.txt").read_text()
            time.sleep(0.01)
        os.kill(process.pid, number)
        return process.wait(SECONDS)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def undisturbed(beton, tmp_path_factory) -> dict[int, float]:
    """Losses of a run that nobody stops, on the device."""
    place = tmp_path_factory.mktemp("undisturbed")
    finishes(start(place, beton, DEVICE), place)
    return losses(place)


def finishes(process: subprocess.Popen, place: Path) -> None:
    try:
        assert process.wait(SECONDS) == 0, (place / "said.txt").read_text()
    finally:
        process.kill()


def goes_on(place: Path, beton: Path, device: str, undisturbed: dict[int, float]) -> None:
    """From where the checkpoint is, in mid-epoch, to the curve that it would have had: another order, or other crops, would move
    single losses by some tenths."""
    kept = checkpoint.load(place / "runs/smoke/checkpoints/last.pt")["position"]["step"]
    assert 0 < kept < STEPS
    before = losses(place)
    finishes(start(place, beton, device), place)
    after = losses(place)
    assert list(after) == list(undisturbed) == [*range(1, STEPS + 1)]
    apart = [abs(after[step] - undisturbed[step]) for step in undisturbed]
    spread = float(np.std(list(undisturbed.values())))
    print(f"went on from step {kept} of {max(before)}; losses differ by {max(apart):.5f}, their spread is {spread:.3f}")
    assert max(apart[kept : kept + 10]) < 0.1 * spread and max(apart) < 0.3 * spread
    assert device == "cuda" or max(apart) == 0


def ctrl_c_is_a_checkpoint(place: Path, beton: Path, device: str, undisturbed: dict[int, float]) -> None:
    assert stopped(place, beton, device, signal.SIGINT) == 75
    said = (place / "said.txt").read_text()
    assert "the same command goes on" in said and "Traceback" not in said
    kept = checkpoint.load(place / "runs/smoke/checkpoints/last.pt")["position"]["step"]
    assert kept == max(losses(place))  # no step is lost
    goes_on(place, beton, device, undisturbed)


def a_kill_costs_a_few_steps(place: Path, beton: Path, device: str, undisturbed: dict[int, float]) -> None:
    assert stopped(place, beton, device, signal.SIGKILL) == -signal.SIGKILL
    kept = checkpoint.load(place / "runs/smoke/checkpoints/last.pt")["position"]["step"]
    assert max(losses(place)) - 15 <= kept <= max(losses(place)) + 5 and kept % 5 == 0
    shutil.rmtree(place / "runs/smoke/tensorboard", ignore_errors=True)
    goes_on(place, beton, device, undisturbed)


# the tests


def test_too_little_memory_for_a_step_is_one_sentence(fasttrain, monkeypatch, device):
    too_little_for_a_step(fasttrain, monkeypatch, device)


def test_too_little_memory_for_the_sources_is_one_sentence(fasttrain, monkeypatch, device):
    too_little_for_the_sources(fasttrain, monkeypatch, device)


def test_too_little_memory_for_dali_is_one_sentence(tmp_path, need, device):
    need("dali")
    too_little_for_dali(tmp_path, device)


@pytest.mark.parametrize(
    ("kind", "how"),
    [("files", no_image), ("files", cut_off), ("packed", no_image), ("packed", cut_off), ("packed", taller)],
)
def test_what_libjpeg_refuses_is_named_or_replaced(opened, damaged, device, kind, how):
    is_an_error_or_replaced(opened, device, damaged(kind, how))


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize(
    ("kind", "how"), [("files", closed), ("files", garbage), ("files", taller), ("packed", garbage)]
)
def test_what_libjpeg_decodes_with_a_warning_is_served(opened, damaged, device, kind, how, share):
    is_served_like_libjpegs(opened, device, damaged(kind, how), share)


def test_ctrl_c_in_a_training_with_dali(tmp_path, need, beton, device, undisturbed):
    need("dali")
    ctrl_c_is_a_checkpoint(tmp_path / "run", beton, device, undisturbed)


def test_a_kill_in_a_training_with_dali(tmp_path, need, beton, device, undisturbed):
    need("dali")
    a_kill_costs_a_few_steps(tmp_path / "run", beton, device, undisturbed)
