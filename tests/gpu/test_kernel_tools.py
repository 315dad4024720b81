"""The kernels' cases and benchmarks on a GPU: right values however memory is moved, and suites that come to their end."""

import pytest
from fasttrain.benchmarks import kernels, tiles

from . import sanitize

pytestmark = pytest.mark.gpu


def test_every_case_is_right(capsys):
    assert sanitize.main(["--device", "cuda"]) == 0, capsys.readouterr().out


def test_the_suites_come_to_their_end():
    """A row for each variant, timed as a CUDA graph, and the goals that were measured."""
    content = tiles.run(["--classes", "365", "--batch", "64", "--tries", "3", "--jobs", "2", "--rounds", "3"])
    assert content["not_run"] == {} and len(content["rows"]) == len(content["compiled"]) > 3
    assert [row["default"] for row in content["best"]].count(True) == 1
    content = kernels.run(["--classes", "1365", "--batch", "512", "--rounds", "3"])
    names = [row["name"] for row in content["rows"]]
    assert "fasttrain, in groups, CUDA graph, B=512 C=1365" in names
    assert all(row["launches"] >= 1 and row["busy_ms"] > 0 for row in content["rows"])
    assert any("launches" in goal["name"] for goal in content["goals"])
