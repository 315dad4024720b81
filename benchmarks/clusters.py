"""Suite ``clusters``: k-means, milliseconds of one pass over the features, ours beside scikit-learn's.

    fasttrain bench clusters [--images 20000] [--size 64,512] [--clusters 50,200,1000] [--passes 5] [--rounds 5] [--threads N]
                             [--json FILE]

  --images    how many features
  --size      values of a feature
  --clusters  how many centroids
  --passes    of each run over the features, at most
  --threads   of the CPU

``ours`` is fasttrain/pretext/kmeans.py, on a GPU if there is one; ``scikit-learn`` is KMeans (Lloyd's algorithm, no tolerance)
from the same start, on the CPU; ``scikit-learn mini-batch`` is MiniBatchKMeans of as many passes, in batches of 1024. Features
are float32, in as many clusters as are looked for, which overlap; the start is random features. What is timed is a whole run,
with what it does before and after its passes, divided by the passes it made; runs take turns, medians. ``inertia`` is the sum
of squared distances that a run ended with. ``floor`` (a GPU) is the time in which its memory reads the features once.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fasttrain.device import set_up
from fasttrain.pretext.kmeans import kmeans
from fasttrain.recipe import Run

from .timing import copy_bandwidth

Once = Callable[[], tuple[int, float]]  # passes made and inertia


def run(arguments: list[str]) -> dict[str, Any]:
    """Measures; prints a table, and returns rows and what could not run.

    Raises:
        ValueError: arguments that make no sense.
    """
    given, device = _parsed(arguments), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_up(Run(), device)
    threads = torch.get_num_threads()
    torch.set_num_threads(given.threads or threads)
    try:
        bandwidth = copy_bandwidth(device) if device.type == "cuda" else None
        rows: list[dict[str, Any]] = []
        not_run: dict[str, str] = {}
        for size in given.size:
            for count in given.clusters:
                runs, not_run = _runs(given, size, count, device)
                floor = given.images * size * 4 / bandwidth * 1e3 if bandwidth else None
                rows += _rows(runs, f"D={size} K={count}", given.rounds, floor)
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)
    _print(f"k-means of {given.images} features, {given.passes} passes, {device}, {used} threads", rows)
    content: dict[str, Any] = {"images": given.images, "passes": given.passes, "threads": used, "device": str(device)}
    return content | {"rows": rows, "not_run": not_run}


def _parsed(arguments: list[str]) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(prog="fasttrain bench clusters", exit_on_error=False, add_help=False)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--size", type=numbers, default=[64, 512])
    parser.add_argument("--clusters", type=numbers, default=[50, 200, 1000])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    try:
        given, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"bench clusters: {error}") from None
    if rest or min(given.images, *given.size, *given.clusters, given.passes, given.rounds, given.threads + 1) < 1:
        raise ValueError(
            f"bench clusters: {' '.join(rest) or 'numbers must be above 0'}; see `fasttrain bench clusters -h`"
        )
    if max(given.clusters) > given.images:
        raise ValueError(f"bench clusters: {max(given.clusters)} clusters are more than the {given.images} features")
    return given


def _features(n: int, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Features [N, D] around as many centres as there are clusters to find, and a start [K, D]."""
    generator = torch.Generator().manual_seed(0)
    centre_KD = torch.randn(count, size, generator=generator)
    feature_ND = torch.randn(n, size, generator=generator) + centre_KD[torch.randint(count, (n,), generator=generator)]
    return feature_ND, feature_ND[torch.randperm(n, generator=generator)[:count]].clone()


def _runs(
    given: argparse.Namespace, size: int, count: int, device: torch.device
) -> tuple[dict[str, Once], dict[str, str]]:
    """What is to be timed, by name, and what cannot run."""
    feature_ND, start_KD = _features(given.images, size, count)
    there_ND = feature_ND.to(device)

    def ours() -> tuple[int, float]:
        found = kmeans(there_ND, count, seed=0, iterations=given.passes, start_KD=start_KD)
        return found.iterations, found.inertia

    try:
        from sklearn.cluster import KMeans, MiniBatchKMeans
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        why = f"scikit-learn is not here ({error})"
        return {"ours": ours}, {"scikit-learn": why, "scikit-learn mini-batch": why}
    how = {"init": start_KD.numpy(), "n_init": 1, "max_iter": given.passes, "tol": 0.0, "random_state": 0}

    def theirs() -> tuple[int, float]:
        with threadpool_limits(torch.get_num_threads()):
            found = KMeans(count, algorithm="lloyd", **how).fit(feature_ND.numpy())
        return found.n_iter_, float(found.inertia_)

    def in_batches() -> tuple[int, float]:
        with threadpool_limits(torch.get_num_threads()):
            found = MiniBatchKMeans(count, batch_size=1024, max_no_improvement=None, **how).fit(feature_ND.numpy())
        return found.n_steps_ * 1024 / given.images, float(found.inertia_)

    return {"ours": ours, "scikit-learn": theirs, "scikit-learn mini-batch": in_batches}, {}


def _rows(runs: dict[str, Once], where: str, rounds: int, floor: float | None) -> list[dict[str, Any]]:
    """Times the runs in turn, after one of each that does not count."""
    inertia = {name: once()[1] for name, once in runs.items()}
    repeats: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, once in runs.items():
            begin = time.perf_counter()
            passes, _ = once()
            repeats[name].append((time.perf_counter() - begin) * 1e3 / passes)
    ours = median(repeats["ours"])
    rows = []
    for name, times in repeats.items():
        row: dict[str, Any] = {"name": f"{name}, {where}", "ms": median(times), "repeats": times}
        row["relative_to"] = {} if name == "ours" else {f"ours, {where}": ours / median(times)}
        rows.append(row | {"inertia": inertia[name], "floor_ms": floor if name == "ours" else None})
    return rows


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("row")
    for head in ("ms a pass", "x ours", "inertia", "floor ms"):
        table.add_column(head, justify="right")
    for row in rows:
        floor, ratio = row["floor_ms"], next(iter(row["relative_to"].values()), 1.0)
        table.add_row(
            row["name"],
            f"{row['ms']:.2f}",
            f"{ratio:.2f}",
            f"{row['inertia']:.6g}",
            "" if floor is None else f"{floor:.3f}",
        )
    Console().print(table)
