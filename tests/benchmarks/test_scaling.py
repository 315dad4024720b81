"""The scaling suite: every row runs at tiny sizes, and the plan's sums are those of its docstring."""

import json
import multiprocessing
import os
import socket
import sys

import pytest
from fasttrain.benchmarks import loaders, scaling, scaling_plan, scaling_work
from fasttrain.benchmarks.scaling import run
from fasttrain.benchmarks.scaling_plan import Cluster, Figure, Work, plan
from fasttrain.loaders import open_dataset
from fasttrain.loaders.pack import pack

from fasttrain import cli
from tests.loaders import samples


def _forked(command: list[str], processes: int, threads: int, folder: str) -> None:
    """Stands in for starting processes anew, which would import everything again; one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_one, args=(command, rank, processes, port)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise RuntimeError(f"{[process.exitcode for process in started]}")


def _one(command: list[str], rank: int, processes: int, port: str) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in place.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    if command[0] == "-c":
        scaling_work.main(json.dumps(json.loads(command[2]) | {"threads": 1}))
    else:
        sys.exit(cli.main([*command[2:], "--run.threads=1"]))


def test_what_two_processes_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loaders, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(scaling, "_together", _forked)
    samples.image_tree(tmp_path / "data", {"a": 10, "b": 10}, suffix=".jpg")
    pack(open_dataset("folder", tmp_path / "data"), tmp_path / "x.beton")
    tiny = ["--rounds", "1", "--epochs", "2", "--size", "32", "--cores", "2", "--loader", "torch"]
    content = run([*tiny, "--data", str(tmp_path / "x.beton"), "--rows", "training,loader,sources"])
    assert content["not_run"] == {}
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == [
        "training, 1 x 1", "training, 1 x 2", "training, 2 x 1", "loader torch, 1 x 2", "loader torch, 2 x 1",
        "2 sources, replicated", "2 sources, split",
    ]  # fmt: skip
    assert all(len(row["repeats"]) == 1 and row["repeats"][0] > 0 for row in rows.values())
    speeds = {name: row["images_per_s"] for name, row in rows.items() if "images_per_s" in row}
    assert rows["training, 2 x 1"]["relative_to"] == {
        "training, 1 x 2": speeds["training, 2 x 1"] / speeds["training, 1 x 2"],
        "2 times training, 1 x 1": speeds["training, 2 x 1"] / speeds["training, 1 x 1"] / 2,
    }
    ratio = speeds["loader torch, 2 x 1"] / speeds["loader torch, 1 x 2"]
    assert rows["loader torch, 2 x 1"]["relative_to"] == {"loader torch, 1 x 2": ratio}
    times = [rows[f"2 sources, {form}"]["ms"] for form in ("replicated", "split")]
    assert rows["2 sources, split"]["relative_to"] == {"2 sources, replicated": times[0] / times[1]}
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("training", "2 x 1", "split"))


def test_processes_are_started_as_torchrun_does():
    content = run(["--rounds", "1", "--cores", "2", "--rows", "all-reduce"])
    assert content["not_run"] == {}
    assert [row["name"] for row in content["rows"]] == ["all-reduce, ResNet-18, 44.6 MiB", "all-reduce, smoke, 1.3 MiB"]
    assert all(len(row["repeats"]) == 10 and row["ms"] > 0 for row in content["rows"])


def test_what_cannot_run_is_said():
    content = run(["--rows", "training", "--recipe", "no such recipe"])
    assert content["rows"] == [] and "no such recipe" in content["not_run"]["training"]


def _figure(value: float) -> Figure:
    return Figure(value, "given")


def _cluster(gpus: int, nodes: int, *, storage: float = 1e12, cores: float = 1e6, network: float = 10e9) -> Cluster:
    rates = (_figure(cores), _figure(100e9), _figure(network), _figure(storage))
    return Cluster(gpus, nodes, *rates, (_figure(1e-6), _figure(1e-5)))


WORK = Work("x", "images", *map(_figure, (1000.0, 100.0, 2.5e6 * 4, 4000.0, 1e5, 500.0, 1e11)))


def test_the_sums_of_a_plan():
    found = plan(WORK, _cluster(8, 2))
    within, between = 2 * 3 / 4 * 1e7 / 100e9, 2 * 1 / 2 * 1e7 / 10e9
    assert found["ms"] == pytest.approx(100)
    assert found["gradient_ms"] == pytest.approx(1e3 * (within + between + 6e-6 + 2e-5))
    assert found["statistics_ms"] == pytest.approx(1e3 * (2 * 3 / 4 * 4e3 / 100e9 + 4e3 / 10e9 + 6e-6 + 2e-5))
    both = (found["gradient_ms"] + found["statistics_ms"]) / 100
    assert found["efficiency"]["overlap none"] == pytest.approx(1 / (1 + both))
    assert found["efficiency"]["overlap full"] == pytest.approx(1 / (1 + found["statistics_ms"] / 100))
    need = 8000 * found["efficiency"]["overlap full"]
    assert found["images_per_s"] == pytest.approx(need)
    assert found["storage_bytes_per_s"] == {"node": pytest.approx(need / 2 * 1e5), "all": pytest.approx(need * 1e5)}
    assert found["decode_cores_per_node"] == pytest.approx(need / 2 / 500)
    assert found["fill_s"] == pytest.approx(10)  # the nodes' network is the slower one


def test_one_gpu_waits_for_nobody():
    found = plan(WORK, _cluster(1, 1))
    assert found["gradient_ms"] == found["statistics_ms"] == 0 and found["images_per_s"] == 1000


@pytest.mark.parametrize(
    ("cluster", "limits", "speeds"),
    [
        (_cluster(8, 2), ("GPUs", "GPUs"), None),
        (_cluster(8, 2, network=1e8), ("all-reduce", "all-reduce"), None),
        (_cluster(8, 2, storage=1e8), ("GPUs", "storage"), (None, 1e3)),
        (_cluster(8, 2, cores=4), ("decoding", "decoding"), (4000, 4000)),
        (_cluster(8, 2, cores=4, storage=1e8), ("decoding", "storage"), (4000, 1000)),
    ],
)
def test_what_limits_first(cluster, limits, speeds):
    found = plan(WORK, cluster)
    assert (found["limit"], found["limit_without_cache"]) == limits
    for key, speed in zip(("images_per_s", "images_per_s_without_cache"), speeds or (None, None), strict=True):
        assert speed is None or found[key] == pytest.approx(speed)


def test_the_plan_for_64_gpus_and_where_each_figure_comes_from(tmp_path, capsys):
    content = run(["--plan"])
    assert len(content["rows"]) == 5 and content["not_run"] == {}
    origins = {figure["origin"].split(":")[0] for row in content["rows"] for figure in row["inputs"].values()}
    assert origins >= {"published", "measured", "counted", "assumed"}
    first = content["rows"][0]
    assert first["inputs"]["gradients"]["value"] == 4 * 25_557_032  # ResNet-50
    shown = capsys.readouterr().out
    assert "64 GPUs on 8 nodes, computed, not measured" in shown and "25,557,032 parameters" in shown
    newest = json.loads(max(scaling_plan.RESULTS.glob("*-loaders-*.json")).read_text())
    assert first["inputs"]["bytes"]["value"] == newest["mean_bytes"]


@pytest.mark.parametrize("arguments", [["--plan"], ["--plan", "--short", "--batch", "32"]])
def test_the_page_shows_what_the_commands_print(arguments, repository, capsys):
    run(arguments)
    page = (repository / "docs/scaling.md").read_text()
    assert f"fasttrain bench scaling {' '.join(arguments)}`" in page
    for part in capsys.readouterr().out.split("64 GPUs on 8 nodes, computed, not measured:"):
        assert part.strip() in page


def test_figures_given_stand_in_for_those_known(tmp_path, monkeypatch):
    samples.image_tree(tmp_path / "data", {"a": 3, "b": 3}, suffix=".jpg")
    pack(open_dataset("folder", tmp_path / "data"), tmp_path / "x.beton")
    given = ["--speed", "100", "--batch", "8", "--decode", "50", "--gpus", "4", "--nodes", "2"]
    monkeypatch.setattr(scaling_plan, "_ROWS", dict(list(scaling_plan._ROWS.items())[:1]))
    (row,) = run(["--plan", *given, "--packed", str(tmp_path / "x.beton")])["rows"]
    inputs = {name: figure["value"] for name, figure in row["inputs"].items()}
    assert (inputs["speed"], inputs["batch"], inputs["decode"]) == (100, 8, 50)
    sizes = [path.stat().st_size for path in (tmp_path / "data").rglob("*.jpg")]
    assert min(sizes) < inputs["bytes"] < 1.5 * max(sizes) and row["inputs"]["bytes"]["origin"] == "measured: x.beton"
    monkeypatch.setattr(scaling_plan, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="no results of loaders are here: give --decode and --bytes"):
        run(["--plan"])
    (row,) = run(["--plan", *given, "--bytes", "1000"])["rows"]
    assert row["inputs"]["bytes"] == {"value": 1000, "origin": "given"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "training,nothing"], "no row 'nothing'; there are training, "),
        (["--ranks", "1"], "--ranks 1 is not above 1"),
        (["--batch", "7"], "--ranks 2 is not above 1 and a divisor of --sources and --batch"),
        (["--rounds", "0"], "numbers must be above 0; see"),
        (["--plan", "--gpus", "10", "--nodes", "4"], "10 GPUs are not the same number on each of 4 nodes"),
        (["--plan", "--network", "0"], "numbers must be above 0"),
        (["--what"], "--what; see"),
    ],
)
def test_mistakes(arguments, said):
    with pytest.raises(ValueError, match=said):
        run(arguments)
