"""Several processes train together, and one of them dies or is stopped: the others end soon, and say which it was."""

import random
import re
import signal
import time
from functools import partial

import pytest

from . import hooks, processes
from .kills import _compare as insist_on_same
from .trainings import CHECKPOINTS, SCRATCH, SLOWLY, ended, has_lines, tidy, until

BEFORE = partial(hooks.all_of, SLOWLY, partial(hooks.impatient, 3.0))
PATIENCE = 10.0  # seconds beside run.timeout: impatience, and what it takes to notice and to end


@pytest.mark.parametrize(("ranks", "deaths"), [(2, 5), (4, 2)])
def test_who_dies_is_named(tmp_path, undisturbed, ranks, deaths):
    """At random moments of one training, which goes on from its checkpoints in between."""
    arguments = (*SCRATCH, "--run.checkpoint_steps", "1", "--run.timeout", "10")
    moments, lines, died = random.Random(ranks), 0, 0
    while died < deaths:
        run = processes.start(tmp_path, "train", *arguments, ranks=ranks, before=BEFORE)
        until(has_lines(tmp_path, lines + 1), run)
        time.sleep(moments.uniform(0, 0.1))
        number = moments.randrange(ranks)
        run.send(signal.SIGKILL, [number])
        began = time.monotonic()
        said = ended(run, [-9 if rank == number else 75 for rank in range(ranks)])
        assert time.monotonic() - began < 10 + PATIENCE
        for rank in set(range(ranks)) - {number}:
            its = run.outputs[rank].read_text()
            assert re.search(rf"fasttrain: .*\brank {number} \(\S+, pid \d+\) has ended", its), (
                number,
                rank,
                said,
            )
        lines = (tmp_path / "runs/smoke/metrics.jsonl").read_bytes().count(b"\n")
        died += 1
    processes.run(tmp_path, "train", *arguments, ranks=ranks)
    tidy(tmp_path)
    insist_on_same(undisturbed(*SCRATCH, ranks=ranks), tmp_path)


def test_who_is_stopped_is_named(tmp_path, undisturbed):
    """By SIGSTOP, for longer than run.timeout; when it may go on, it ends as well."""
    arguments = (*SCRATCH, "--run.checkpoint_steps", "1", "--run.timeout", "3")
    run = processes.start(tmp_path, "train", *arguments, ranks=2, before=BEFORE)
    until(has_lines(tmp_path, 5), run)
    run.send(signal.SIGSTOP, [1])
    began = time.monotonic()
    run.processes[0].join(3 + PATIENCE)
    assert run.processes[0].exitcode == 75, (time.monotonic() - began, run.said())
    first = run.outputs[0].read_text()
    assert re.search(r"fasttrain: .*rank 1 \(\S+, pid \d+\) has not been heard of for \d+ s", first), first
    run.send(signal.SIGCONT, [1])
    ended(run, [75, 75], PATIENCE)
    tidy(tmp_path)
    assert (tmp_path / CHECKPOINTS / "last.pt").is_file()
    processes.run(tmp_path, "train", *arguments, ranks=2)
    insist_on_same(undisturbed(*SCRATCH, ranks=2), tmp_path)
