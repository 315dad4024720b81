"""Sweeps: what is chosen, how a budget is kept, and a real one of tiny networks through the command line."""

import json
import os

import pytest
import torch
from fasttrain.benchmarks import step_options, step_rows, tuning
from fasttrain.benchmarks.step_rows import Row, in_turns
from fasttrain.benchmarks.tuning_table import SWEEPS, Sweep, Variant

from fasttrain import device

from .test_step_bench import few_photographs

TINY = ("--target", "resnet20", "--size", "24", "--models", "test_resnet,test_resnet", "--source-size", "32",
        "--batch", "16", "--images", "32")  # fmt: skip


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda s: s.name)
def test_every_change_makes_a_recipe_of_its_own(sweep):
    """None is a base by another name, and all fields exist."""

    def made(options, fields):
        asked = {**sweep.base, **options, "file": None, "folder": "runs", "changes": {**sweep.fields, **fields}}
        return step_options.recipe(asked)

    base = made({}, {})
    for variant in sweep.variants:
        assert made(variant.options, variant.fields) != base or variant.environment
        assert 0.1 < variant.predicted < 10 and variant.why.endswith(".")
    assert len({v.name for v in sweep.variants} | {tuning.BASE}) == len(sweep.variants) + 1


def test_the_largest_predicted_gain_comes_first(capsys):
    content = tuning.run(["--list", "--sweep", "bank,layout,compile-small,together"])
    order = list(dict.fromkeys(row["sweep"] for row in content["rows"]))
    assert order == ["compile-small", "together", "bank", "layout"]
    assert "compile-small: step: 3.00 of the base." in capsys.readouterr().out
    json.dumps(content, allow_nan=False)


class _Rows:
    """Stands in for the processes: how fast each is, how long it takes to start, and what ends in its turns."""

    def __init__(self, monkeypatch, clock, *, starts: float, speeds: dict[str, list[float]]) -> None:
        self.clock, self.starts, self.speeds, self.ended = clock, starts, speeds, 0
        monkeypatch.setattr(tuning, "Row", self.row)
        monkeypatch.setattr(tuning.step_options, "packed", lambda data, clips: None)
        monkeypatch.setattr(tuning.time, "monotonic", lambda: clock[0])

    def row(self, name, asked, environment):
        rows, found = self, list(self.speeds[asked["changes"].get("data.workers", "base")])

        class Row:
            def started(self, seconds=None):
                rows.clock[0] += min(rows.starts, seconds or rows.starts)
                return "it was late" if seconds is not None and seconds < rows.starts else ""

            def turn(self, seconds=None):
                rows.clock[0] += float(environment["FASTTRAIN_BENCH_TURN"])
                if not found:
                    raise ValueError("its process ended with -9")
                return found.pop(0)

            def end(self):
                rows.ended += 1

        return Row()


@pytest.fixture
def sweeps(monkeypatch):
    """Two sweeps of one base, with made-up speeds."""
    from contextlib import nullcontext

    base = {"target": "resnet20"}
    a, b, c = (
        Variant(name, predicted, "So.", fields={"data.workers": count})
        for name, predicted, count in (("a", 1.5, 1), ("b", 0.5, 2), ("c", 1.0, 3))
    )
    one, two = Sweep("one", "live", base, (a, b)), Sweep("two", "live", base, (c,))
    monkeypatch.setattr(tuning, "SWEEPS", (two, one))
    monkeypatch.setattr(tuning.step_options, "prepared", lambda options, data, suite: nullcontext(dict(options)))
    return {"base": [10, 10, 10] * 2, "1": [16, 16, 30], "2": [7, 7, 7], "3": [10, 10, 10]}


def test_predicted_and_measured_side_by_side(sweeps, monkeypatch):
    rows = _Rows(monkeypatch, [0.0], starts=10, speeds=sweeps)
    monkeypatch.setattr(tuning, "choose_device", lambda name: torch.device("cuda"))
    content = tuning.run(["--budget", "1000", "--seconds", "1"])
    found = {row["name"]: row for row in content["rows"]}
    assert list(found) == ["one: base", "one: a", "one: b", "two: base", "two: c"]
    assert [found[f"one: {n}"]["relative_to"]["base"] for n in "ab"] == [1.6, 0.7]
    assert [found[n].get("as_predicted") for n in found] == [None, True, False, None, True]
    assert content["not_run"] == {} and rows.ended == 4  # the base's process is shared by both sweeps


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_predictions_say_nothing_of_another_base(sweeps, monkeypatch, device):
    _Rows(monkeypatch, [0.0], starts=1, speeds=sweeps)
    monkeypatch.setattr(tuning, "choose_device", lambda name: torch.device(device))
    content = tuning.run(["--size", "24"] if device == "cuda" else [])
    assert {row.get("as_predicted") for row in content["rows"]} == {None}
    assert content["replaced"] == ({"size": 24} if device == "cuda" else {}) and content["budget_s"] is None


def test_a_budget_is_kept(sweeps, monkeypatch):
    """Base, a and b start in 10 s each and have three turns of 1 s, for which 4 are set aside; there is no time for c."""
    clock = [0.0]
    rows = _Rows(monkeypatch, clock, starts=10, speeds=sweeps)
    content = tuning.run(["--budget", "70", "--seconds", "1"])
    assert clock[0] <= 70 and rows.ended == 3
    assert [row["name"] for row in content["rows"]] == ["one: base", "one: a", "one: b"]
    assert content["not_run"] == {"two: c": "the budget of 70 s has no room for it"}


def test_a_row_that_is_late_is_not_waited_for(sweeps, monkeypatch):
    clock = [0.0]
    _Rows(monkeypatch, clock, starts=100, speeds=sweeps)
    content = tuning.run(["--budget", "75", "--seconds", "1"])
    assert clock[0] <= 75 and content["rows"] == []
    assert content["not_run"]["one: a"] == "its base: it was late" and "two: c" in content["not_run"]


def test_a_row_that_ends_in_its_turn_is_told(sweeps, monkeypatch):
    sweeps["2"] = [7]
    _Rows(monkeypatch, [0.0], starts=1, speeds=sweeps)
    content = tuning.run(["--sweep", "one"])
    assert [row["name"] for row in content["rows"]] == ["one: base", "one: a"]
    assert content["not_run"] == {"one: b": "its process ended with -9"}


def test_turns_begin_with_another_row_each_time():
    order = []

    class Row:
        def __init__(self, name):
            self.name = name

        def turn(self, seconds):
            order.append(self.name)
            return 1.0

    in_turns({name: Row(name) for name in "abc"}, 2, {})
    assert "".join(order) == "abcbca"


def test_a_process_that_is_late_is_ended(tmp_path):
    row = Row("scratch", {"folder": str(tmp_path)})
    assert row.started(0.2) == "it was not done within 0 s"
    with pytest.raises(ValueError, match="its process ended with"):
        row.turn()
    row.end()


def test_a_process_has_the_variables_of_its_change(monkeypatch):
    class Process:
        stdout = ("noise\n", '{"images": 30, "seconds": 2, "shares": {}}\n')

        def __init__(self, command, env, **pipes):
            assert env["HOME"] and env["TORCHINDUCTOR_MAX_AUTOTUNE"] == "1" and "step_rows" in command[2]
            self.stdin = open(os.devnull, "w")

    monkeypatch.setattr(step_rows.subprocess, "Popen", Process)
    assert Row("live", {}, {"TORCHINDUCTOR_MAX_AUTOTUNE": "1"}).turn() == 15


class _Here:
    """A row in this process, which has imported everything already; test_step_bench.py has the real ones."""

    def __init__(self, name, asked, environment):
        self.row, self.batch = step_rows.opened(name, asked), asked["batch"]

    def started(self, seconds):
        self.row.steps(self.row.first)
        return ""

    def turn(self, seconds):
        assert self.row.steps(2) == 2 * self.batch
        self.channels_last = self.row.trainer.recipe.run.channels_last
        return 2.0 if self.channels_last else 1.0

    def end(self):
        self.row.close()


def test_suite(tmp_path, monkeypatch, capsys):
    """Real steps of tiny networks."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "Row", _Here)
    monkeypatch.setattr(device, "keep_memory", lambda: True)  # other tests look at this process's memory
    few_photographs(tmp_path / "photographs")
    data = ["--data", str(tmp_path / "photographs")]
    with torch._dynamo.config.patch(disable=True):
        content = tuning.run(["--sweep", "layout", "--repeats", "1", *TINY, *data])
    base, other = content["rows"]
    assert (base["name"], other["name"]) == ("layout: base", "layout: NCHW")
    assert other["relative_to"] == {"base": 0.5} and other["predicted"] == 0.6 and other["as_predicted"] is None
    assert "layout: NCHW" in capsys.readouterr().out
    json.dumps(content, allow_nan=False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--sweep", "tiles"], "there is no sweep 'tiles'; there are compile-small"),
        (["--budget", "0"], "must be above 0"),
        (["--frames", "3"], "what is --frames 3"),
        (["--batch", "0"], "a number below 1"),
    ],
)
def test_mistakes(given, said):
    with pytest.raises(ValueError, match=said):
        tuning.run(given)
