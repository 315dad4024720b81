"""Suite ``scaling``: several processes on one machine, measured; and a plan for many GPUs, computed.

    fasttrain bench scaling [--ranks 2] [--cores N] [--recipe smoke] [--batch 32] [--epochs 40] [--rounds 3] [--loader ffcv]
                            [--data FOLDER|FILE] [--images 1500] [--size 128] [--sources 2] [--rows NAME,..] [--json FILE]
    fasttrain bench scaling --plan [--gpus 64] [--nodes 8] [--cores 96] [--nvlink 300] [--network 50] [--storage 10]
                            [--packed FILE] [--speed N] [--batch N] [--decode N] [--bytes N] [--short] [--json FILE]

Measured on the CPU, over Gloo (processes with GPUs meet in the same code), with N cores (all if not given), in turn, medians:

  training    images/s of `fasttrain train RECIPE` with method scratch, from its own summary.json: 1 process of N / R threads,
              1 of N, and R of N / R; R processes beside one with as many threads, and beside R times one with N / R
  all-reduce  milliseconds to add up the gradient of ResNet-18, and of what the recipe trains
  loader      images/s of the loader alone, random-resized crops of --data (photographs if not given): 1 process of N
              threads, R of N / R, all of them together
  sources     milliseconds for the soft labels of a batch, --sources networks (ResNet-18, random weights, --size px): replicated
              (every process runs all networks on its part of the batch), and split (the parts' pixels are gathered, every
              process runs its share of the networks on the whole batch, and logits go to where their images are)

Prediction for sources, written before anything was measured: split never wins. Both do the same work; split waits twice more
for the others and moves the pixels. What it saves is the memory of the other processes' networks. That is why the trainer has
no such form.

The plan (sums: benchmarks/scaling_plan.py) prints what a cluster needs to train at full speed, each figure with its origin.
Units: --nvlink, --network (a node's) and --storage (of all nodes together) GB/s in one direction; --speed images/s of a GPU;
--decode images/s of a core; --bytes of a packed image, or --packed FILE, which `fasttrain pack` has made. --short leaves out
what goes in.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from fasttrain.loaders.datasets.beton import Packed
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .scaling_plan import Cluster, Figure, plan, works

ROWS = ("training", "all-reduce", "loader", "sources")
_WORKER = "import sys; from fasttrain.benchmarks.scaling_work import main; main(sys.argv[1])"


def run(arguments: list[str]) -> dict[str, Any]:
    """Measures, or plans; prints tables, and returns rows and what could not run.

    Raises:
        ValueError: arguments that make no sense.
    """
    given = _parsed(arguments)
    if given.plan:
        return _planned(given)
    content: dict[str, Any] = {
        "ranks": given.ranks,
        "cores": given.cores,
        "batch": given.batch,
        "rows": [],
        "not_run": {},
    }
    suites: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
        "training": _training,
        "all-reduce": _all_reduce,
        "loader": _loader,
        "sources": _sources,
    }
    for name in given.rows:
        try:
            rows = suites[name](given)
        except (RuntimeError, ValueError) as error:  # a missing part, too little memory: the other rows can run
            content["not_run"][name] = " ".join(str(error).split())[-300:]
            continue
        content["rows"] += rows
        _print(f"{name}, {given.cores} cores", rows)
    return content


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fasttrain bench scaling", exit_on_error=False, add_help=False)
    for name in ("plan", "short"):
        parser.add_argument(f"--{name}", action="store_true")
    for name, number in (("ranks", 2), ("epochs", 40), ("rounds", 3), ("images", 1500), ("size", 128), ("sources", 2)):
        parser.add_argument(f"--{name}", type=int, default=number)
    for name, number in (("gpus", 64), ("nodes", 8), ("batch", 0), ("cores", 0)):
        parser.add_argument(f"--{name}", type=int, default=number)
    for name, rate in (("nvlink", 300.0), ("network", 50.0), ("storage", 10.0)):
        parser.add_argument(f"--{name}", type=float, default=rate)
    for name in ("speed", "decode", "bytes"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    parser.add_argument("--recipe", default="smoke")
    parser.add_argument("--loader", default="ffcv")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--packed", type=Path)
    parser.add_argument("--rows", type=lambda text: [part.strip() for part in text.split(",")], default=list(ROWS))
    try:
        given, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"bench scaling: {error}") from None
    least = (given.epochs, given.rounds, given.images, given.size, given.sources, given.nodes)
    zero = (given.batch, given.cores, given.speed, given.decode, given.bytes)
    rates = (given.nvlink, given.network, given.storage)
    if rest or min(least) < 1 or min(zero) < 0 or min(rates) <= 0:
        why = " ".join(rest) or "numbers must be above 0"
        raise ValueError(f"bench scaling: {why}; see `fasttrain bench scaling -h`")
    unknown = [name for name in given.rows if name not in ROWS]
    if unknown:
        raise ValueError(f"bench scaling: there is no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    if given.plan:
        if given.gpus < given.nodes or given.gpus % given.nodes:
            raise ValueError(f"bench scaling: {given.gpus} GPUs are not the same number on each of {given.nodes} nodes")
        return given
    given.batch, given.cores = given.batch or 32, given.cores or len(os.sched_getaffinity(0))
    if given.ranks < 2 or given.sources % given.ranks or given.batch % given.ranks:
        raise ValueError(f"bench scaling: --ranks {given.ranks} is not above 1 and a divisor of --sources and --batch")
    return given


# Measured


def _training(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The command itself, in turn."""
    share = max(given.cores // given.ranks, 1)
    forms = {(1, share), (1, share * given.ranks), (given.ranks, share)}
    speeds: dict[tuple[int, int], list[float]] = {form: [] for form in sorted(forms)}
    for _ in range(given.rounds):
        for processes, threads in speeds:
            with tempfile.TemporaryDirectory() as folder:
                fields: dict[str, Any] = {
                    "run.dir": folder,
                    "name": "run",
                    "method.name": "scratch",
                    "run.device": "cpu",
                }
                fields |= {"data.batch": given.batch, "data.drop_last": "true", "optim.epochs": given.epochs}
                fields |= {"run.eval_every": given.epochs, "run.threads": threads, "run.tensorboard": "false"}
                options = [f"--{name}={value}" for name, value in fields.items()]
                command = ["-m", "fasttrain", "train", given.recipe, *options]
                _together(command, processes, threads, folder)
                summary = json.loads(next(Path(folder).rglob("summary.json")).read_text())
                speeds[processes, threads].append(summary["images_per_s"])
    small, large = f"1 x {share}", f"1 x {share * given.ranks}"
    rows = _rates("training", "images_per_s", {f"{p} x {t}": found for (p, t), found in speeds.items()})
    by_name = {row["name"].removeprefix("training, "): row for row in rows}
    both = by_name[f"{given.ranks} x {share}"]
    one, all_ = by_name[small]["images_per_s"], by_name[large]["images_per_s"]
    both["relative_to"] = {f"training, {large}": both["images_per_s"] / all_}
    both["relative_to"] |= {f"{given.ranks} times training, {small}": both["images_per_s"] / one / given.ranks}
    return rows


def _all_reduce(given: argparse.Namespace) -> list[dict[str, Any]]:
    found = _work(given, given.ranks, "all_reduce", {"recipe": given.recipe, "rounds": 10 * given.rounds})
    rows = []
    for name, (mib, times) in found.items():
        rows.append({"name": f"all-reduce, {name}, {mib:.1f} MiB", "ms": median(times), "repeats": times, "mib": mib})
    return rows


def _loader(given: argparse.Namespace) -> list[dict[str, Any]]:
    from .loaders import prepare

    data = prepare(given.data, given.images)
    assert isinstance(data.packed.read, Packed)
    asked = {"path": str(data.packed.read.file.path), "loader": given.loader, "size": given.size, "batch": given.batch}
    speeds: dict[str, list[float]] = {}
    share = max(given.cores // given.ranks, 1)
    for _ in range(given.rounds):
        for processes, threads in ((1, share * given.ranks), (given.ranks, share)):
            found = _work(given, processes, "loader", asked | {"threads": threads}, threads)
            speeds.setdefault(f"{processes} x {threads}", []).append(found["images_per_s"])
    rows = _rates(f"loader {given.loader}", "images_per_s", speeds)
    rows[1]["relative_to"] = {rows[0]["name"]: rows[1]["images_per_s"] / rows[0]["images_per_s"]}
    return rows


def _sources(given: argparse.Namespace) -> list[dict[str, Any]]:
    asked = {"sources": given.sources, "size": given.size, "batch": given.batch, "rounds": given.rounds}
    times = _work(given, given.ranks, "sources", asked)
    rows = _rates(f"{given.sources} sources", "ms", times)
    rows[1]["relative_to"] = {rows[0]["name"]: rows[0]["ms"] / rows[1]["ms"]}
    return rows


def _rates(what: str, unit: str, repeats: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"name": f"{what}, {name}", unit: median(found), "relative_to": {}, "repeats": found}
        for name, found in repeats.items()
    ]


def _work(
    given: argparse.Namespace, processes: int, name: str, asked: dict[str, Any], threads: int = 0
) -> dict[str, Any]:
    """What the first of several processes says of a piece of work in ``scaling_work.py``."""
    threads = threads or max(given.cores // processes, 1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        told = json.dumps({"name": name, "out": str(out), "threads": threads} | asked)
        _together(["-c", _WORKER, told], processes, threads, folder)
        return json.loads(out.read_text())


def _together(command: list[str], processes: int, threads: int, folder: str) -> None:
    """Starts the processes as torchrun does, and waits for them.

    Raises:
        RuntimeError: one of them failed; it says with what.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    try:
        for rank in range(processes):
            place: dict[str, Any] = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": processes,
                "LOCAL_WORLD_SIZE": processes,
            }
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
            with open(Path(folder) / f"said{rank}", "wb") as said:
                environment = os.environ | {name: str(value) for name, value in place.items()}
                started.append(
                    subprocess.Popen(
                        [sys.executable, *command], cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT
                    )
                )
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            time.sleep(0.02)
        failed = next((rank for rank, process in enumerate(started) if process.poll()), None)
        if failed is not None:
            raise RuntimeError((Path(folder) / f"said{failed}").read_text(errors="replace").strip()[-2000:])
    finally:
        for process in started:
            process.kill()
            process.wait()


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("row")
    for head in ("median", "least", "most", ""):
        table.add_column(head, justify="right")
    for row in rows:
        unit = "ms" if "ms" in row else "images_per_s"
        ratios = "; ".join(f"{ratio:.2f} of {name}" for name, ratio in row.get("relative_to", {}).items())
        figures = [f"{value:.1f}" for value in (row[unit], min(row["repeats"]), max(row["repeats"]))]
        table.add_row(row["name"], figures[0] + (" ms" if unit == "ms" else " images/s"), *figures[1:], ratios)
    Console().print(table)


# Planned


def _planned(given: argparse.Namespace) -> dict[str, Any]:
    def gigabytes(value: float, usual: float, why: str) -> Figure:
        return Figure(value * 1e9, f"assumed: {why}" if value == usual else "given")

    cluster = Cluster(
        given.gpus,
        given.nodes,
        Figure(
            given.cores or 96,
            "given" if given.cores else "assumed: a node with 8 A100 (96 threads of 48 cores)",
        ),
        gigabytes(given.nvlink, 300.0, "NVLink of an A100, 600 GB/s in both directions, all of it"),
        gigabytes(given.network, 50.0, "400 Gb/s a node, all of it"),
        gigabytes(given.storage, 10.0, "a shared file system, for all nodes together"),
        (Figure(5e-6, "assumed: a hop within a node"), Figure(15e-6, "assumed: a hop between nodes")),
    )
    rows = [
        plan(work, cluster)
        for work in works(
            speed=given.speed, batch=given.batch, decode=given.decode, bytes_=given.bytes, packed=given.packed
        )
    ]
    if not given.short:
        _print_inputs(cluster, rows)
    _print_plan(cluster, rows)
    its = {"gpus": given.gpus, "nodes": given.nodes}
    its |= {name: vars(getattr(cluster, name)) for name in ("cores", "nvlink", "network", "storage")}
    return {"cluster": its | {"latency": [vars(figure) for figure in cluster.latency]}, "rows": rows, "not_run": {}}


def _print_inputs(cluster: Cluster, rows: list[dict[str, Any]]) -> None:
    """Plain lines, which can be pasted into a page: what goes in, and where it comes from."""
    print("A node has and gets:")
    units = {"cores": ("CPU cores", 1.0), "nvlink": ("GB/s a GPU", 1e9), "network": ("GB/s a node", 1e9)}
    units["storage"] = ("GB/s for all nodes", 1e9)
    for name, (unit, scale) in units.items():
        figure: Figure = getattr(cluster, name)
        print(f"  {name:8} {figure.value / scale:6.0f} {unit:18} {figure.origin}")
    for figure, what in zip(cluster.latency, ("latency", ""), strict=True):
        print(f"  {what:8} {figure.value * 1e6:6.0f} {'us':18} {figure.origin}")
    for row in rows:
        its, what = row["inputs"], row["samples"]
        print(f"\n{row['name']}:")
        for name, key, scale, form, unit in (
            ("speed of a GPU", "speed", 1.0, ",.0f", f"{what}/s"),
            ("batch of a GPU", "batch", 1.0, ",.0f", what),
            ("gradient", "gradients", 1e6, ".1f", "MB"),
            ("statistics", "statistics", 1e6, ".2f", "MB"),
            (f"packed {what}", "bytes", 1e3, ".1f", "KB each"),
            ("decoding, a core", "decode", 1.0, ",.0f", f"{what}/s"),
            ("the whole set", "whole", 1e9, ",.0f", "GB"),
        ):
            value = format(its[key]["value"] / scale, form)
            print(f"  {name:16} {value:>8} {unit:9} {its[key]['origin']}")
    print()


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "step ms": lambda row: f"{row['ms']:.1f}",
    "gradient ms": lambda row: f"{row['gradient_ms']:.2f}",
    "statistics ms": lambda row: f"{row['statistics_ms']:.2f}",
    "efficiency %": lambda row: (
        f"{100 * row['efficiency']['overlap none']:.1f} to {100 * row['efficiency']['overlap full']:.1f}"
    ),
    "storage GB/s, node, all": lambda row: ", ".join(
        f"{value / 1e9:.2f}" for value in row["storage_bytes_per_s"].values()
    ),
    "decode cores, node": lambda row: f"{row['decode_cores_per_node']:.1f}",
    "fill min": lambda row: f"{row['fill_s'] / 60:.1f}",
    "per s": lambda row: f"{row['images_per_s']:,.0f}, {row['limit']}",
    "per s without data.cache": lambda row: f"{row['images_per_s_without_cache']:,.0f}, {row['limit_without_cache']}",
}


def _print_plan(cluster: Cluster, rows: list[dict[str, Any]]) -> None:
    """What comes out, as a table of Markdown."""
    print(f"{cluster.gpus} GPUs on {cluster.nodes} nodes, computed, not measured:\n")
    lines = [["work", *_COLUMNS], *([row["name"], *(show(row) for show in _COLUMNS.values())] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    for line in lines:
        print(f"| {' | '.join(line)} |")
