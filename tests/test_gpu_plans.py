"""The plans of `make gpu`: every command is one that its suite understands, they fit into their time, and a step that fails,
hangs or cannot be taken is told and stops nothing."""

import importlib
import inspect
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from fasttrain.cli import SUITES

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu(monkeypatch):
    """scripts/gpu.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("gpu")


def plans():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module("gpu_plans").PLANS
    finally:
        sys.path.remove(str(ROOT / "scripts"))


BENCHES = [
    pytest.param(words, id=f"{step.name}-{how}")
    for steps in plans().values()
    for step in steps
    for how, words in (("there", step.words), ("rehearsed", step.small))
    if " bench " in words
]


def understood(suite: str, arguments: list[str]) -> None:
    """Goes through a suite's parser."""
    module = importlib.import_module(f"fasttrain.benchmarks.{suite.replace('-', '_')}")
    more = [torch.device("cuda")] if len(inspect.signature(module._parsed).parameters) > 1 else []
    module._parsed(arguments, *more)


@pytest.mark.parametrize("words", BENCHES)
def test_a_suite_understands_what_it_is_given(words, gpu, tmp_path):
    file = tmp_path / "x.beton"
    file.touch()
    paths = {"python": "python3", "out": str(tmp_path), "data": str(file), "video": str(file)}
    given = [word.format(**paths) for word in shlex.split(words)]
    suite, *arguments = given[given.index("bench") + 1 :]
    assert suite in SUITES
    at = arguments.index("--json")
    assert arguments[at + 1].endswith(".json")
    understood(suite, arguments[:at] + arguments[at + 2 :])


@pytest.mark.parametrize("plan", plans())
def test_a_plan_fits_into_nine_minutes(plan):
    assert sum(step.seconds for step in plans()[plan]) <= 540
    names = [step.name for steps in plans().values() for step in steps]
    assert len(names) == len(set(names))


def test_tests_that_are_named_are_there():
    for steps in plans().values():
        for step in steps:
            for word in shlex.split(step.words + " " + step.small):
                path = word.removeprefix("--ignore=")
                if path.startswith("tests/"):
                    assert (ROOT / path).exists(), path


@pytest.fixture
def run(gpu, tmp_path, monkeypatch, capsys):
    """Runs a made-up plan; returns the exit code, what plan.json says by step, and the lines printed."""

    def call(steps, *arguments: str) -> tuple[int, dict[str, dict], str]:
        monkeypatch.setattr(gpu, "PLANS", {"small": steps})
        monkeypatch.setattr(gpu, "RUN", tmp_path)
        code = gpu.main(["small", "--out", str(tmp_path / "out"), *arguments])
        content = json.loads((tmp_path / "out/plan.json").read_text())
        return code, {one["name"]: one for one in content["steps"]}, capsys.readouterr().out

    return call


def test_a_step_that_fails_or_hangs_stops_nothing(gpu, run, tmp_path):
    steps = (
        gpu.Step("breaks", "{python} -c 'exit(3)'", 5),
        gpu.Step("hangs", "sh -c 'sleep 60 & sleep 60'", 1),
        gpu.Step("planted", "{python} -c 'print(9); exit(9)'", 5, expects=9),
        gpu.Step("writes", "sh -c 'echo $FASTTRAIN_REQUIRE_GPU > {out}/said'", 5),
    )
    code, found, out = run(steps)
    assert code == 1
    assert {name: one["well"] for name, one in found.items()} == {
        "breaks": False,
        "hangs": False,
        "planted": True,
        "writes": True,
    }
    assert found["hangs"]["exit_code"] == 124 and found["hangs"]["seconds"] < 30
    assert "FAILED (3)" in out and "OVER ITS LIMIT" in out
    assert (tmp_path / "out/said").read_text() == "1\n" and (tmp_path / "out/planted.log").read_text() == "9\n"


def test_what_is_not_given_or_has_no_time_is_told(gpu, run):
    steps = (
        gpu.Step("data", "true {data}", 5),
        gpu.Step("long", "true", 100),
        gpu.Step("short", "true", 5),
    )
    code, found, out = run(steps, "--seconds", "50")
    assert code == 1 and found["short"]["well"]
    assert found["data"]["not_run"] == "--data is not given" and "it should take 100" in found["long"]["not_run"]
    assert out.count("not run") == 2


def test_a_rehearsal_takes_the_small_forms(gpu, run):
    steps = (
        gpu.Step("data", "false {data}", 900, "true"),
        gpu.Step("planted", "false", 5, "true", expects=9),
        gpu.Step("none", "false", 5),
    )
    code, found, _ = run(steps, "--rehearse")
    assert code == 0 and found["data"]["well"] and found["planted"]["well"]
    assert found["none"]["not_run"] == "there is nothing to rehearse"


def test_a_plan_is_taken_in_part(gpu, run, capsys):
    steps = (gpu.Step("a", "false", 5), gpu.Step("b", "true", 5))
    code, found, _ = run(steps, "--only", "b")
    assert code == 0 and list(found) == ["b"]
    with pytest.raises(SystemExit):
        gpu.main(["small", "--only", "c"])
    assert "has no step 'c'" in capsys.readouterr().err
