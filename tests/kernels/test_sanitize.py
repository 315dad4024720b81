"""The script that compute-sanitizer watches, in Triton's interpreter: every case is right, and it would notice a wrong one."""

import pytest
import torch

from .test_soft_target import DEVICE


def test_every_case_is_right(need, capsys):
    need("triton")
    from tests.gpu import sanitize

    assert sanitize.main(["--device", DEVICE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(sanitize.CASES) + len(sanitize.INPUTS) and all(line.startswith("right") for line in lines)


def test_a_wrong_value_is_noticed(need):
    need("triton")
    from tests.gpu import sanitize

    theirs = torch.tensor([1e-4, -2e-4, 0.0])
    for dtype in sanitize.TOLERANCE:
        assert sanitize.error(theirs.to(dtype), theirs, dtype, 1e-7) <= 1
        assert sanitize.error(theirs * 1.05, theirs, dtype, 1e-7) > 1
        assert sanitize.error(theirs * torch.nan, theirs, dtype, 1e-7) > 1


def test_an_error_is_planted_on_a_gpu_only(need, capsys):
    need("triton")
    from tests.gpu import sanitize

    with pytest.raises(SystemExit) as stopped:
        sanitize.main(["--device", "cpu", "--plant", "race"])
    assert stopped.value.code == 2 and "--plant needs a GPU" in capsys.readouterr().err
