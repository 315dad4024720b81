"""The suite ``checkpoints``."""

import json

import pytest
from fasttrain.benchmarks import checkpoints

SMALL = ["--target", "resnet20", "--size", "8", "--batch", "2", "--steps", "4", "--every", "2"]
SMALL += ["--rounds", "1", "--seconds", "1,10", "--threads", "1"]


def test_rows_say_what_a_checkpoint_costs(fasttrain, tmp_path):
    out, place = tmp_path / "out.json", tmp_path / "place"
    place.mkdir()
    assert fasttrain("bench", "checkpoints", *SMALL, "--folder", str(place), "--json", str(out)).returncode == 0
    content = json.loads(out.read_text())
    none, background, foreground = content["rows"]
    assert [row["name"] for row in content["rows"]] == ["none", "background", "foreground"]
    assert background["relative_to"] == {"none": none["ms"] / background["ms"]}
    assert 0 < background["snapshot_ms"] < background["written_ms"]
    assert foreground["snapshot_ms"] == foreground["written_ms"]
    assert foreground["share_percent"].keys() == {"1", "10"}
    assert content["bytes"] > 2 * 4 * 270_000  # weights and momentum of ResNet-20
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--steps", "0"], "above 0"),
        (["--every", "100"], "--every 100 is more than the 40 steps"),
        (["--folder", "/not/there"], "no folder"),
        (["--nothing"], "--nothing"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=f"bench checkpoints: .*{message}"):
        checkpoints.run(wrong)
