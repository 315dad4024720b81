"""A training whose data or checkpoints are bad: a loader that hangs, damaged checkpoints, damaged soft labels."""

import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fasttrain.loaders.order import order

from ..loaders.samples import image_tree
from . import hooks, processes
from .kills import _compare as insist_on_same
from .trainings import CHECKPOINTS, SCRATCH, SMALL, ended, kept_all, sentence, tidy

IMAGES = 48
FILES = (*SCRATCH, "--data.name", "folder", "--data.labelled", "0", "--data.loader", "torch", "--optim.epochs", "2")


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """48 images to train with, 6 to select with, 6 to test with."""
    root = tmp_path_factory.mktemp("tree")
    for split, count in (("train", IMAGES // 3), ("val", 2), ("test", 2)):
        image_tree(root / split, dict.fromkeys("abc", count), sizes=((14, 12), (12, 13)))
    return root


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 1), (2, 1)])
def test_an_image_that_is_never_read(tmp_path, tree, undisturbed, ranks, workers):
    """The last of the first epoch, in a pipe to which nobody writes; of two processes the second one's."""
    arguments = (*FILES, "--data.root", str(tree))
    more = ("--data.workers", str(workers), "--run.timeout", "2", "--run.checkpoint_steps", "1")
    os.mkfifo(tmp_path / "pipe")
    image = sorted((tree / "train").rglob("*.png"))[order(0, 0, IMAGES)[-1]]
    hang = partial(hooks.hanging_image, image, tmp_path / "pipe", rank=ranks - 1)
    run = processes.start(tmp_path, "train", *arguments, *more, ranks=ranks, before=hang)
    said = ended(run, [75] * ranks)
    if ranks == 1:
        assert "error: the loader has given no batch for 2 s (step 2)" in sentence(said), said
    else:
        first = run.outputs[0].read_text()
        assert "error: rank 1 " in first and " waits for data, for " in first and "rank 0 waits for it" in first, first
    assert kept_all(tmp_path) == 2
    tidy(tmp_path)
    processes.run(tmp_path, "train", *arguments, *more, ranks=ranks)
    insist_on_same(undisturbed(*arguments, "--data.workers", "0", ranks=ranks), tmp_path)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda content: (
        content[:500_000] + bytes(b ^ 0x10 for b in content[500_000:500_100]) + content[500_100:]
    ),
    "cut": lambda content: content[:-1000],
    "emptied": lambda content: b"",
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoints_that_are_damaged(tmp_path, undisturbed, ranks):
    """The last one: the one before it is used, loudly. All of them: nothing is used, and what to do is said."""
    whole = undisturbed(*SCRATCH, ranks=ranks)
    for kind, change in DAMAGE.items():
        place = tmp_path / kind
        shutil.copytree(whole, place)
        (place / "runs/smoke/summary.json").unlink()
        _damage(place / CHECKPOINTS / "last.pt", change)
        said = processes.run(place, "train", *SCRATCH, ranks=ranks).said()
        assert re.search(r"WARNING: .*checkpoints/last.pt\b.*; trying the checkpoint before it", said), said
        assert re.search(r"WARNING: going on from \S+step-0+28.pt instead: the steps after it are done again", said), (
            said
        )
        insist_on_same(whole, place)
    place = tmp_path / "all"
    shutil.copytree(whole, place)
    (place / "runs/smoke/summary.json").unlink()
    for path in (place / CHECKPOINTS).iterdir():
        _damage(path, DAMAGE["cut"])
    said = ended(processes.start(place, "train", *SCRATCH, ranks=ranks), [2] * ranks)
    assert "no checkpoint in runs/smoke/checkpoints can be read" in sentence(said), said
    assert "restore one from a copy, or remove the run's folder to begin again" in sentence(said), said
    tidy(place)


def test_soft_labels_that_are_damaged_under_two_processes(tmp_path, undisturbed):
    """Those that a run before has kept: what does not fit is computed anew; a file that is no such file is an error."""
    arguments = (*SMALL, "--optim.epochs", "3")
    whole = undisturbed(*arguments, ranks=2)
    (kept,) = whole.rglob("*.soft")
    content = kept.read_bytes()
    rng = np.random.default_rng(0)
    array = np.frombuffer(content, np.uint8).copy()
    array[rng.integers(len(array) // 8, len(array), 300)] ^= 1
    wrong = {
        "cut": (content[: len(content) // 2], f"{kept.name} is cut short: {len(content) // 2} bytes of {len(content)};")
    }
    wrong["header"] = bytes(64) + content[64:], f"{kept.name} is no file of soft labels, or is damaged;"
    for kind, (changed, text) in {"flipped": (array.tobytes(), ""), **wrong}.items():
        place = tmp_path / kind
        path = place / kept.relative_to(whole)
        path.parent.mkdir(parents=True)
        path.write_bytes(changed)
        if text:
            said = ended(processes.start(place, "train", *arguments, ranks=2), [2, 2])
            assert f"{text} remove it, and" in said, said
            continue
        processes.run(place, "train", *arguments, ranks=2)
        insist_on_same(whole, place)


def _damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))
