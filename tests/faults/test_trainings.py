"""A training on a machine in bad luck: it ends with a sentence, leaves nothing behind, and goes on to the bits of one in luck."""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from fasttrain import checkpoint

from . import disks, hooks, processes
from .kills import _compare as insist_on_same
from .trainings import CHECKPOINTS, SCRATCH, SLOWLY, ask_group, ended, has_lines, kept_all, sentence, stop, tidy, until

MOUNTS = disks.may_mount()


@pytest.fixture(params=["tmpfs", "limit"] if MOUNTS else ["limit"])
def disk(tmp_path, request) -> Iterator[disks.Disk]:
    """A disk for ``runs`` with room for six checkpoints."""
    if request.param == "limit":
        yield disks.Limit()
        return
    with disks.tmpfs(tmp_path / "runs", 16):
        yield disks.Tmpfs(tmp_path / "runs")


def test_a_disk_that_is_full_for_a_while(tmp_path, disk, undisturbed):
    run = processes.start(tmp_path, "train", *SCRATCH, "--run.checkpoint_steps", "1", before=SLOWLY)
    until(has_lines(tmp_path, 5), run)

    def told() -> bool:
        disk.fill(run)
        return "WARNING: cannot write" in run.said()

    until(told, run)
    disk.empty(run)
    said = ended(run, [0])
    assert re.search(
        rf"WARNING: cannot write \S+last.pt \({disk.full}; .* free in \S+checkpoints\): the training goes on", said
    )
    insist_on_same(undisturbed(*SCRATCH), tmp_path)


def test_a_disk_that_is_full_to_the_end(tmp_path, disk, undisturbed):
    run = processes.start(tmp_path, "train", *SCRATCH, "--run.checkpoint_steps", "1")
    until(has_lines(tmp_path, 5), run)
    while run.processes[0].is_alive():
        disk.fill(run)
    said = ended(run, [2])
    assert disk.full in sentence(said) and str(CHECKPOINTS) in sentence(said), said
    tidy(tmp_path)
    disk.empty(run)
    found = checkpoint.newest(tmp_path / CHECKPOINTS, pytest.fail)
    assert found is not None and found[1]["position"]["step"] >= 3
    processes.run(tmp_path, "train", *SCRATCH, "--run.checkpoint_steps", "1")
    insist_on_same(undisturbed(*SCRATCH), tmp_path)


def test_too_little_room_is_said_before_the_first_step(tmp_path):
    run = processes.start(tmp_path, "train", *SCRATCH, "--run.keep", str(10**9))
    said = sentence(ended(run, [2]))
    assert re.search(
        r"run.dir: [\d.]+ [GM]iB free in runs/smoke/checkpoints, and its checkpoints takes? [\d.]+ GiB", said
    )
    assert not (tmp_path / "runs/smoke/metrics.jsonl").exists()
    tidy(tmp_path)


def test_a_slow_disk_holds_up_no_step(tmp_path, undisturbed):
    """Each checkpoint takes half a second or more; asked to end, the training waits for the one of its last step."""
    arguments = (*SCRATCH, "--run.checkpoint_steps", "1")
    run = processes.start(tmp_path, "train", *arguments, before=partial(hooks.slow_disk, 0.25))
    metrics, folder = tmp_path / "runs/smoke/metrics.jsonl", tmp_path / CHECKPOINTS
    during: dict[int, list[int]] = {}  # lines of the log while a file was on its way

    def looked() -> bool:
        for path in folder.glob(".last.pt.*.tmp"):
            try:
                during.setdefault(path.stat().st_ino, []).append(metrics.read_bytes().count(b"\n"))
            except FileNotFoundError:
                continue
        return any(max(lines) - min(lines) >= 3 for lines in during.values())

    until(looked, run)
    run.send(15)
    ended(run, [75])
    assert kept_all(tmp_path) >= 4
    tidy(tmp_path)
    processes.run(tmp_path, "train", *arguments)
    insist_on_same(undisturbed(*SCRATCH), tmp_path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_folder_that_can_only_be_read(tmp_path, undisturbed, ranks):
    """Before anything is there, and when there are checkpoints; by its permissions, and by how it is mounted."""
    runs = tmp_path / "runs"
    runs.mkdir()
    start = partial(processes.start, tmp_path, "train", *SCRATCH, ranks=ranks)
    for mounted in (False, True) if MOUNTS else (False,):
        for folder in (runs, runs / "smoke"):
            if folder.is_dir():
                with disks.read_only(folder) if mounted else _forbidden(folder):
                    run = start(before=None if mounted else hooks.obeyed_permissions)
                    said = sentence(ended(run, [2] * ranks))
                assert "runs" in said and ("Read-only file system" if mounted else "Permission denied") in said, said
                tidy(tmp_path)
        if not mounted:
            stop(start(), tmp_path, 5)
    assert start().wait() == [0] * ranks
    insist_on_same(undisturbed(*SCRATCH, ranks=ranks), tmp_path)


def test_a_clock_that_jumps(tmp_path, undisturbed):
    """By up to 30 days at every look, with 10 s for whatever takes long."""
    arguments = (*SCRATCH, "--run.timeout", "10", "--run.checkpoint_steps", "3", "--run.keep", "3")
    jumps = partial(hooks.jumping_clock, 0)
    stop(processes.start(tmp_path, "train", *arguments, before=jumps), tmp_path, 5)
    said = ended(processes.start(tmp_path, "train", *arguments, before=jumps), [0])
    assert "WARNING" not in said and len(list((tmp_path / CHECKPOINTS).glob("step-*.pt"))) == 2
    insist_on_same(undisturbed(*SCRATCH), tmp_path)


def test_all_processes_are_asked_at_once(tmp_path, undisturbed):
    """As a scheduler does: a loader's workers too, of which the step that is under way may still want a batch."""
    arguments = (*SCRATCH, "--data.loader", "torch", "--data.workers", "2")
    run = processes.start(tmp_path, "train", *arguments, before=SLOWLY)
    until(has_lines(tmp_path, 6), run)
    ask_group(run)
    ended(run, [75])
    assert 5 <= kept_all(tmp_path) < 32
    tidy(tmp_path)
    processes.run(tmp_path, "train", *arguments)
    insist_on_same(undisturbed(*SCRATCH), tmp_path)


def _forbidden(folder: Path):
    class Forbidden(nullcontext):
        def __enter__(self) -> None:
            folder.chmod(0o555)

        def __exit__(self, *_: object) -> None:
            folder.chmod(0o755)

    return Forbidden()
