"""Suite ``tiles``: the shapes in which the fused soft-target kernel can cut its work up, compiled, then timed on a GPU.

    fasttrain bench tiles [--batch 512,8192] [--classes 365,1365] [--dtype bf16] [--rounds 5] [--jobs N] [--tries N] [--json FILE]

  --classes  1365 are two sources' (1000 and 365); other counts are one source's
  --jobs     processes that compile; as many as there are cores if not given
  --tries    only the first N rules; all if not given

A rule (kernels/tiles.py) gives each problem its tiles: rows x columns, warps, and whether memory is moved in groups of 16 bytes
(``wide``). All sensible rules are tried, for rows as they lie side by side and for rows padded to a multiple of 16 bytes.
(Stages are not: Triton's software pipelining leaves this kernel as it is.) First every variant is compiled for the GPU that is
there, sm_90 where there is none; what spills registers is left out. Without a GPU that is all, and nothing is timed.

On a GPU a step (forward and backward) is recorded as a CUDA graph on several data sets, so that no host is timed; graphs take
turns, medians. ``of copy`` is the least that must be moved (student and target read, gradient written) at the copy bandwidth
measured in the same run. The best rule over all has the smallest mean (geometric) of its times over the best ones.

Shape suffixes: B batch, C all sources' classes side by side.
"""

import argparse
import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median
from typing import Any

import torch
from fasttrain.kernels.tiles import DEFAULT, Tiles, Tiling, tiles_of
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import tiles_ahead
from .kernels import DTYPES, SOURCES, T, numbers
from .timing import cache_bytes, copy_bandwidth, recorded, side_by_side

SHOWN = 5  # of a problem's variants, besides the default


@dataclass(frozen=True)
class Variant:
    """One way to cut one problem up.

    Attributes:
        tiling: a rule that gives these tiles.
        pad: elements between two rows of student and target.
    """

    classes: int
    pad: int
    tiles: Tiles
    tiling: Tiling

    @property
    def name(self) -> str:
        t = self.tiles
        small = f" and {t.r_small}x{t.n_small}" if t.n_small < t.n else ""
        parts = [f"{t.r}x{t.n}{small}{' looped' if t.loop else ''}", f"{t.warps} warps"]
        return ", ".join([*parts, *["wide"] * (t.wide > 1), *["padded rows"] * (self.pad > 0)])


def rules() -> list[Tiling]:
    """What is tried, the default first."""
    out = [DEFAULT, Tiling(wide=True)]
    cut = ((4096, 1024), (4096, 2048), (1024, 1024))
    for wide, each, elements, (widest, looped) in product((False, True), (8, 4, 16, 32), (256, 2048, 4096), cut):
        out.append(Tiling(widest, looped, elements, 0, each, each, 1, wide))
    return out


def run(arguments: list[str]) -> dict[str, Any]:
    """Compiles, on a GPU times; prints tables, and returns rows and what could not run.

    Raises:
        ValueError: arguments that make no sense.
    """
    given = _parsed(arguments)
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), DTYPES[given.dtype]
    architecture = 90
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        architecture = 10 * major + minor
    tried = rules()[: given.tries or None]
    variants = _variants(given.classes, tried, dtype)
    resources = _compiled(variants, dtype, architecture, given.jobs)
    content: dict[str, Any] = {"architecture": architecture, "dtype": str(dtype).removeprefix("torch.")}
    content |= {"compiled": [_described(v, r) for v, r in resources.items()], "rows": [], "not_run": {}}
    _print_compiled(resources, architecture)
    fit = {v for v, launches in resources.items() if not any(r["spilled"] for r in launches)}
    if device.type != "cuda":
        content["not_run"]["timing"] = "there is no GPU: variants are compiled, nothing is timed"
        return content
    content["copy_bytes_per_s"] = copy_bandwidth(device)
    times: dict[tuple[int, Variant], float] = {}
    for batch, classes in product(given.batch, given.classes):
        here = [v for v in variants if v in fit and v.classes == classes]
        rows = _timed(batch, here, dtype, device, content["copy_bytes_per_s"], given.rounds, content["not_run"])
        times |= {(batch, v): row["ms"] for v, row in rows.items()}
        content["rows"] += rows.values()
    content["best"] = best_rules(times, tried, dtype)
    _print_best(content["best"])
    return content


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fasttrain bench tiles", exit_on_error=False, add_help=False)
    parser.add_argument("--batch", type=numbers, default=(512, 8192))
    parser.add_argument("--classes", type=numbers, default=(1365, 365, 4096, 21841))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tries", type=int, default=0)
    try:
        given, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"bench tiles: {error}") from None
    if rest or min(*given.batch, *given.classes, given.rounds, given.jobs) < 1 or given.tries < 0:
        raise ValueError(f"bench tiles: {' '.join(rest) or 'numbers must be above 0'}; see `fasttrain bench tiles -h`")
    return given


def _counts(classes: int) -> tuple[int, ...]:
    return SOURCES.get(classes, (classes,))


def tiles_for(classes: int, pad: int, tiling: Tiling, dtype: torch.dtype) -> Tiles:
    """The tiles of a rule for contiguous rows, or for rows with ``pad`` elements between them, in large batches."""
    group = 16 // dtype.itemsize
    counts = _counts(classes)
    edges = any(at % group for at in (classes + pad, classes, counts[0]))
    return tiles_of(counts, (), tiling, (group, edges) if tiling.wide else (1, False))


def _variants(classes: tuple[int, ...], tried: list[Tiling], dtype: torch.dtype) -> list[Variant]:
    """Without those that are the same tiles by another rule."""
    out: dict[tuple, Variant] = {}
    for c, tiling in product(classes, tried):
        for pad in sorted({0, -c % (16 // dtype.itemsize)}):
            tiles = tiles_for(c, pad, tiling, dtype)
            out.setdefault((c, pad, tiles), Variant(c, pad, tiles, tiling))
    return list(out.values())


def _compiled(
    variants: list[Variant], dtype: torch.dtype, architecture: int, jobs: int
) -> dict[Variant, list[dict[str, Any]]]:
    """What each variant's launches need; compiled by many processes, from which Triton keeps the machine code."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(variants)), fresh, tiles_ahead.prepare) as pool:
        made = [
            pool.submit(tiles_ahead.resources_of, _counts(v.classes), v.pad, dtype, asdict(v.tiling), architecture)
            for v in variants
        ]
        return {v: job.result() for v, job in zip(variants, made, strict=True)}


def _described(variant: Variant, launches: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": f"{variant.name}, C={variant.classes}", "tiles": asdict(variant.tiles), "launches": launches}


def _timed(
    batch: int,
    variants: list[Variant],
    dtype: torch.dtype,
    device: torch.device,
    bandwidth: float,
    rounds: int,
    not_run: dict[str, str],
) -> dict[Variant, dict[str, Any]]:
    """Times the variants of one problem."""
    c = variants[0].classes
    sets = max(2, min(16, -(-2 * cache_bytes(device) // (2 * batch * c * dtype.itemsize))))
    data = {pad: _data(batch, c, pad, sets, dtype, device) for pad in {v.pad for v in variants}}
    where, graphs = f"B={batch} C={c}", {}
    for variant in variants:
        try:
            graphs[variant.name] = recorded(step_of(variant, data[variant.pad]), sets)
        except RuntimeError as error:
            not_run[f"{variant.name}, {where}"] = " ".join(str(error).split())[:200]
    if not graphs:
        return {}
    cases = side_by_side(graphs, device, sets=1, rounds=rounds)
    floor = 3 * batch * c * dtype.itemsize / bandwidth * 1e3
    rows = {}
    for variant in variants:
        if variant.name not in cases:
            continue
        repeats = [ms / sets for ms in cases[variant.name].repeats]
        row: dict[str, Any] = {"name": f"{variant.name}, {where}", "ms": median(repeats), "repeats": repeats}
        row |= {"batch": batch, "classes": c, "tiles": asdict(variant.tiles), "tiling": asdict(variant.tiling)}
        rows[variant] = row | {"floor_ms": floor, "over_floor": row["ms"] / floor, "default": variant.tiling == DEFAULT}
    default = next(row for row in rows.values() if row["default"])
    for row in rows.values():
        row["relative_to"] = {default["name"]: default["ms"] / row["ms"]} if row is not default else {}
    _print_timed(where, list(rows.values()))
    return rows


def _data(b: int, c: int, pad: int, sets: int, dtype: torch.dtype, device: torch.device) -> list[list[Tensor]]:
    """Pairs of student and target."""
    pairs = [
        [torch.randn(b, c + pad, device=device).mul_(3).to(dtype)[:, :c] for _ in ("student", "target")]
        for _ in range(sets)
    ]
    for student, _ in pairs:
        student.requires_grad_()
    return pairs


def step_of(variant: Variant, data: list[list[Tensor]]) -> Callable[[int], Tensor]:
    """Forward and backward on the data set of a number; returns the gradient."""
    from fasttrain.kernels import fused  # imports triton
    from fasttrain.kernels.problem import problem_of

    problem, state = problem_of(_counts(variant.classes), "kd", T, "batchmean"), fused.State()

    def step(i: int) -> Tensor:
        student, target = data[i]
        loss_M = fused.fused(problem, student, target, None, state, variant.tiling)
        return torch.autograd.grad(loss_M.sum(), student)[0]

    return step


def best_rules(
    times: dict[tuple[int, Variant], float], tried: list[Tiling], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """The rules that could be timed on every problem, best first.

    Returns:
        ``tiling``, and ``over_best``: the geometric mean over problems of its time over the best rule's, for contiguous rows.
    """
    problems = {(batch, v.classes) for batch, v in times if not v.pad}
    ms = {(batch, v.classes, v.tiles): time for (batch, v), time in times.items() if not v.pad}
    least = {p: min(time for (*problem, _), time in ms.items() if tuple(problem) == p) for p in problems}
    out = []
    for tiling in tried:
        mine = {p: ms.get((*p, tiles_for(p[1], 0, tiling, dtype))) for p in problems}
        ratios = [time / least[p] for p, time in mine.items() if time is not None]
        if ratios and len(ratios) == len(problems):
            over = math.exp(sum(map(math.log, ratios)) / len(ratios))
            out.append({"tiling": asdict(tiling), "over_best": over, "default": tiling == DEFAULT})
    return sorted(out, key=lambda row: row["over_best"])


def _print_compiled(resources: dict[Variant, list[dict[str, Any]]], architecture: int) -> None:
    table = Table(title=f"compiled for sm_{architecture}", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("classes", "tiles", "registers", "bytes spilled", "bytes shared", "bytes a load"):
        table.add_column(heading, justify="left" if heading == "tiles" else "right")
    for v, launches in resources.items():
        needs = [str(max(r[key] for r in launches)) for key in ("registers", "spilled", "shared", "load_bytes")]
        table.add_row(str(v.classes), v.name, *needs)
    Console().print(table)


def _print_timed(where: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=where, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("tiles", "us", "of copy", "x default"):
        table.add_column(heading, justify="left" if heading == "tiles" else "right")
    rows = sorted(rows, key=lambda row: row["ms"])
    for row in rows[:SHOWN] + [row for row in rows[SHOWN:] if row["default"]]:
        speed = ["" if row["default"] else f"{x:.2f}" for x in row["relative_to"].values()] or ["default"]
        table.add_row(row["name"].removesuffix(f", {where}"), f"{1e3 * row['ms']:.1f}", _percent(row), *speed)
    Console().print(table)


def _percent(row: dict[str, Any]) -> str:
    return f"{100 / row['over_floor']:.0f} %"


def _print_best(best: list[dict[str, Any]]) -> None:
    for row in best[:1] + [row for row in best[1:] if row["default"]]:
        what = "default" if row["default"] else "best over all problems"
        print(f"{what}: {row['over_best']:.2f} x the best of each: {row['tiling']}")
