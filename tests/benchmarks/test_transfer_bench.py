"""The transfer modules' benchmark: every row runs, and says what autograd keeps."""

import pytest
import torch
from fasttrain.benchmarks.transfer import ROWS, run

TINY = ["--size", "16", "--batch", "4", "--classes", "5,3", "--rounds", "3"]


def test_rows(capsys):
    content = run([*TINY, "--no-compile"])
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == list(ROWS)
    assert content["taps"] == [[16, 16, 16], [32, 8, 8], [64, 4, 4]] and content["width"] == 64
    assert content["not_run"] == {} and content["classes"] == [5, 3]
    for name, row in rows.items():
        assert len(row["repeats"]) >= 3 and min(row["repeats"]) > 0
        expected = {} if name == "plain" else {"plain": pytest.approx(rows["plain"]["ms"] / row["ms"])}
        assert row["relative_to"] == expected
    kept = {name: row["saved_bytes"] for name, row in rows.items()}
    # of a source: a convolution's output and a ReLU's, each float32
    activations = 2 * 4 * 4 * sum(32 * s * s + (32 + 64) * s * s // 4 for s in (16, 8, 4))
    assert kept["plain"] > 2 * activations
    assert kept["grouped padded"] > 1.2 * kept["grouped"] > kept["plain"]
    assert kept["grouped recomputed"] < 0.1 * kept["plain"]
    shown = capsys.readouterr().out
    assert all(name in shown for name in ROWS)


def test_compiled_rows_beside_the_others(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: f)  # its own tests are in tests/fasttrain/test_transfer.py
    rows = [row["name"] for row in run(TINY)["rows"]]
    assert rows == [*ROWS, *(f"{name}, compiled" for name in ROWS)]


def test_what_cannot_be_compiled_is_said(monkeypatch):
    def broken(f, dynamic):
        def fail(taps):
            raise RuntimeError("no C++ compiler")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    content = run(TINY)
    assert [row["name"] for row in content["rows"]] == list(ROWS)
    assert content["not_run"]["shared, compiled"] == "RuntimeError: no C++ compiler"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "1"], "the batch above 1"),
        (["--classes", "10,0"], "numbers must be above 0"),
        (["--classes", "10,x"], "--classes"),
        (["--fast"], "--fast; see"),
        (["--target", "resnet99"], "no backbone is called 'resnet99'"),
    ],
)
def test_mistakes(arguments, said):
    with pytest.raises(ValueError, match=said):
        run([*TINY, *arguments])
