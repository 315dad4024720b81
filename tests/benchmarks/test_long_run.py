"""Suite ``long-run``: what it says of made-up curves, and two short trainings."""

import json
import time

import numpy as np
import pytest
from fasttrain.benchmarks import curves, long_run

T = 400
STEP_T = np.arange(T)
DESCENT_T = 1 + 3 * np.exp(-STEP_T / 60)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, T)


@pytest.mark.parametrize("measure", ["two seeds", "own lines"])
def test_noise_is_no_difference_and_a_drift_is(measure):
    a_T, b_T = DESCENT_T + noise(1), DESCENT_T + noise(2)
    seeds = (DESCENT_T + noise(3), DESCENT_T + noise(4)) if measure == "two seeds" else None
    found = curves.compare(a_T, b_T, seeds)
    assert found.within and 0.3 < found.distance / found.noise < 1.7
    drifting = curves.compare(a_T, b_T + 0.3 * STEP_T / T, seeds)
    assert not drifting.within and drifting.distance == pytest.approx(0.3 / 3**0.5, rel=0.15)
    offset = curves.compare(a_T, b_T + 0.15, seeds)
    assert not offset.within and offset.about()["ratio"] > 2


def test_the_first_descent_and_lines_that_one_curve_lacks_are_not_compared():
    a_T, b_T = DESCENT_T + noise(1), DESCENT_T + noise(1)
    b_T[:10] += 50
    assert curves.distance(a_T, b_T[: T // 2]) == 0
    with pytest.raises(ValueError, match="19 lines are too few"):
        curves.distance(a_T[:19], b_T)


def test_spread_does_not_take_a_trend_for_noise():
    assert curves.spread(DESCENT_T) < 0.1 * curves.spread(noise(1))
    assert curves.spread(DESCENT_T + noise(1)) == pytest.approx(0.1 * (2 / 18) ** 0.5, rel=0.15)


SECOND_T = np.linspace(3, 483, T)


@pytest.mark.parametrize(("gib", "flat"), [(6.0, True), (0.6, True), (80.0, True)])
def test_memory_that_comes_and_goes_is_flat(gib, flat):
    """The start's rise, noise, and every tenth line a checkpoint's copy."""
    gib_T = gib + 0.004 * noise(5) + 0.3 * (STEP_T % 10 == 3) - gib * 0.4 * np.exp(-STEP_T / 15)
    found = curves.growth(SECOND_T, gib_T)
    assert found["flat"] is flat and abs(found["grown_gib"]) < 0.005 and found["gib"] == pytest.approx(gib, rel=0.05)


@pytest.mark.parametrize("per_hour", [0.6, 3.0])
def test_a_leak_is_found(per_hour):
    found = curves.growth(SECOND_T, 1.0 + per_hour * SECOND_T / 3600 + 0.004 * noise(5))
    assert not found["flat"] and found["gib_per_hour"] == pytest.approx(per_hour, rel=0.05)


def test_figures_over_time_are_means_and_gaps_are_filled_with_what_was_before():
    lines = [
        {"seconds": 0.1 + k, "own_gib": float(k), **({"gpu_percent": k + 50.0} if k % 3 == 0 else {})}
        for k in range(600)
    ]
    found = long_run.in_time(lines)
    assert found.keys() == {"seconds", "own_gib", "gpu_percent"}
    assert 190 <= len(found["seconds"]) <= 200 and len(found["gpu_percent"]) == len(found["own_gib"]) == len(
        found["seconds"]
    )
    assert found["own_gib"][0] == 1.0 and found["gpu_percent"][0] == 50 and found["seconds"] == sorted(found["seconds"])
    few = long_run.in_time(lines[:5])
    assert few["own_gib"] == [0, 1, 2, 3, 4] and few["gpu_percent"] == [50, 50, 50, 53, 53]


def test_the_picture_is_the_same_for_the_same_runs():
    line = {"seconds": [1.0, 2.0], "own_gib": [1.0, 1.1]}
    runs = [{"name": "live, seed 0", "loss": {"step": [10, 20], "smoothed": [2.0, 1.0]}, "use": line}]
    assert curves.picture(runs) == curves.picture(runs) and "GPU busy" not in curves.picture(runs)
    gpu = [{**runs[0], "use": {**line, "gpu_percent": [90.0, 95.0]}}]
    assert "GPU busy, %" in curves.picture(gpu) and "live, seed 0" in curves.picture(gpu)


TINY = [
    "--data",
    "toy",
    "--target",
    "resnet20",
    "--models",
    "test_resnet",
    "--source-size",
    "32",
    "--size",
    "16",
    "--batch",
    "16",
]
TINY += ["--data.crop", "pad", "--run.compile", "false", "--data.labelled=128"]


class Here(long_run._Run):
    """In the place of a training's process: the training in this one, cut after so many lines."""

    def __init__(self, name: str, asked: dict, steps: int, until: float) -> None:
        self.name, self.until, self.wrong = name, until, ""
        self.lines, self.evaluated, self.notes, self.over = [], [], [], False
        self.asked = asked | {"steps": steps or 60, "until": until}

    def watch(self, so_far) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("builtins.print", lambda text, flush: self.take(text))
            long_run._train(self.asked)
        so_far()


def test_live_and_recalled_are_the_same_within_noise(monkeypatch, tmp_path, capsys):
    """The same losses, line by line, of one seed; others of another; written while it is at work."""
    monkeypatch.setattr(long_run, "_Run", Here)
    monkeypatch.setattr(long_run, "_EVERY", 0.0)
    monkeypatch.setattr(long_run, "_LOG", 2)
    monkeypatch.setattr(long_run, "_in_order", lambda: iter([("live", 0), ("recalled", 0), ("recalled", 1)]))
    saved: list[dict] = []
    picture = tmp_path / "long.svg"
    content = long_run.run(
        [*TINY, "--minutes", "5", "--picture", str(picture)], lambda its: saved.append(json.loads(json.dumps(its)))
    )
    assert [its["finished"] for its in saved] == [False] * 3 and content["finished"]
    assert [len(its["runs"]) for its in saved] == [1, 2, 3] and content["not_run"] == {}
    assert [its["name"] for its in content["runs"]] == ["live, seed 0", "recalled, seed 0", "recalled, seed 1"]
    assert all(its["steps"] == 60 for its in content["runs"])
    losses = content["losses"]
    assert (
        losses["within"] and losses["noise_is"] == "two seeds' distance" and losses["distance"] < 0.1 * losses["noise"]
    )
    assert content["task_losses"]["within"] and 0 < content["task_losses"]["noise"] != losses["noise"]
    live, recalled, _ = content["runs"]
    assert live["evaluated"][-1]["accuracy"] == recalled["evaluated"][-1]["accuracy"]
    assert live["memory"]["own_gib"].keys() == {"gib", "gib_per_hour", "grown_gib", "flat"}
    assert len(live["loss"]["step"]) == len(live["loss"]["smoothed"]) and live["use"]["own_gib"][0] > 0
    assert content["rows"][1]["relative_to"].keys() == {"live, seed 0"} and content["restarts"] == 0
    assert "recalled, seed 1" in picture.read_text() and "the same within noise" in capsys.readouterr().out


def test_a_process_trains_until_its_time_is_over_or_says_what_is_wrong(tmp_path):
    given, fields = long_run._parsed(TINY)
    asked = long_run._asked(given, [*fields, "--data.loader", "resident"], str(tmp_path), "live", 0)
    its = long_run._Run("live", asked, 0, time.time())
    wrong = long_run._Run(
        "wrong", asked | {"name": "w", "overrides": ["--data.crop", "centre", "--target.model", "x"]}, 0, time.time()
    )
    for run in (its, wrong):
        run.until += 200  # it may take its time to begin
        run.watch(lambda: None)
    assert its.over and its.wrong == "" and its.step == long_run._LOG and len(its.evaluated) == 1
    assert wrong.step == 0 and "its process ended with 1" in wrong.wrong and "target.model" in wrong.wrong


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--data", "nowhere.beton"], "neither a file nor one of"),
        (["--data", "toy", "--minutes", "0"], "must be above 0"),
        (["--data", "toy", "--hours", "3"], "what is --hours 3"),
    ],
)
def test_mistakes(given, said):
    with pytest.raises(ValueError, match=f"bench long-run: .*{said}"):
        long_run.run(given)
