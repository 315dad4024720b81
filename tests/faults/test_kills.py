"""A run that is killed again and again ends where one that nobody disturbed does (``python -m tests.faults.kills`` for hours)."""

import pytest

from .kills import torment

SMALL = [
    *("smoke", "--run.tensorboard", "false", "--run.log_every", "1", "--run.threads", "1", "--data.labelled", "60"),
    *(
        "--data.size",
        "12",
        "--data.stored",
        "12",
        "--data.batch",
        "16",
        "--optim.epochs",
        "6",
        "--run.checkpoint_steps",
        "1",
    ),
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments(tmp_path, ranks):
    found = torment(tmp_path, SMALL, ranks=ranks, kills=6, seed=ranks)
    assert found["killed"] + found["asked"] == 6 and found["runs"] >= 1
