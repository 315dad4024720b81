"""Runs that nobody disturbs, for tests to compare with."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from . import processes


@pytest.fixture(autouse=True)
def every_number():
    """Denormal ones, too: a training in this process may have switched them off, and hypothesis insists on them."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Callable[..., Path]:
    """``undisturbed(*arguments, ranks=1)``: where ``fasttrain train`` with these arguments has its ``runs``, made once."""
    made: dict[tuple[object, ...], Path] = {}

    def get(*arguments: str, ranks: int = 1) -> Path:
        key = (*arguments, ranks)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("undisturbed")
            processes.run(made[key], "train", *arguments, ranks=ranks)
        return made[key]

    return get
