"""Suite ``transfer``: the transfer modules of all sources, forward and backward, run one by one and together.

    fasttrain bench transfer [--target resnet20] [--size 96] [--batch N] [--classes 1000,365] [--rounds 7] [--no-compile]
                             [--frames 16] [--json FILE]

  --target      the backbone whose taps are read; it does not run itself
  --size        side in pixels of the images that it would see
  --frames      of the clips that a 3D target would see; 16 if not given
  --batch       images a step; 128 on a GPU and 16 on a CPU if not given
  --classes     of the sources, one transfer module for each
  --no-compile  leave out the rows under torch.compile, which take a while to compile

``plain`` runs module after module; ``shared`` and ``grouped`` are the forms of fasttrain/transfer/together.py, ``padded``
with every source's channels a multiple of 64, ``recomputed`` with activations computed again in the backward pass. Taps are
random, new, and get gradients; bf16 under autocast on a GPU, float32 on a CPU. ``kept`` is what autograd holds between forward
and backward, without taps and parameters; ``peak``, on a GPU, is the most that a step allocates.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fasttrain.models import build_backbone
from fasttrain.transfer import TransferModule, run_together

from .timing import Case, cache_bytes, side_by_side

ROWS: dict[str, dict[str, Any]] = {
    "plain": {"form": "plain", "pad_to": 1, "recompute": False},
    "shared": {"form": "shared", "pad_to": 1, "recompute": False},
    "grouped": {"form": "grouped", "pad_to": 1, "recompute": False},
    "grouped padded": {"form": "grouped", "pad_to": 64, "recompute": False},
    "grouped recomputed": {"form": "grouped", "pad_to": 1, "recompute": True},
}
Run = Callable[[list[Tensor]], Tensor]


def run(arguments: list[str]) -> dict[str, Any]:
    """Measures; prints a table, and returns rows and what could not run.

    Raises:
        ValueError: arguments that make no sense.
    """
    given, device = _parsed(arguments), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        backbone = build_backbone(given.target)
        time = [given.frames] if backbone.dims == 3 else []
        shapes = [t.shape[1:] for t in backbone(torch.empty(2, 3, *time, given.size, given.size))[0]]
    modules = nn.ModuleList(
        [
            TransferModule(backbone.tap_channels, backbone.transfer_width, classes, dims=backbone.dims)
            for classes in given.classes
        ]
    )
    last = torch.channels_last_3d if backbone.dims == 3 else torch.channels_last
    modules.to(device).to(memory_format=last)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = given.batch * sum(shape.numel() for shape in shapes) * dtype.itemsize
    sets = max(2, min(16, -(-2 * cache_bytes(device) // size)))
    data = [[_tap(given.batch, shape, device, dtype) for shape in shapes] for _ in range(sets)]
    upstream_BC = torch.randn(given.batch, sum(given.classes), device=device, dtype=dtype)
    runs: dict[str, Run] = {name: partial(_forward, modules, how, dtype) for name, how in ROWS.items()}
    saved = {name: _kept(heads, data[0], modules) for name, heads in runs.items()}
    not_run: dict[str, str] = {}
    if given.compile:
        for name, heads in list(runs.items()):
            compiled = torch.compile(heads, dynamic=False)
            try:
                saved[f"{name}, compiled"] = _kept(compiled, data[0], modules)
                runs[f"{name}, compiled"] = compiled
            except Exception as error:  # no compiler, or one that fails
                not_run[f"{name}, compiled"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    steps = {name: partial(_step, heads, modules, data, upstream_BC) for name, heads in runs.items()}
    rows = _rows(side_by_side(steps, device, sets=sets, rounds=given.rounds), saved)
    taps = ", ".join("x".join(map(str, shape)) for shape in shapes)
    title = (
        f"transfer modules of width {backbone.transfer_width} on {given.target}'s taps {taps}, batch {given.batch}, "
    )
    title += f"{len(given.classes)} sources, {str(dtype).removeprefix('torch.')}, {device}"
    _print(title, rows)
    settings = {"target": given.target, "size": given.size, "batch": given.batch, "classes": list(given.classes)}
    content: dict[str, Any] = settings | {"taps": [list(s) for s in shapes], "width": backbone.transfer_width}
    return content | {"dtype": str(dtype), "device": str(device), "rows": rows, "not_run": not_run}


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fasttrain bench transfer", exit_on_error=False, add_help=False)
    parser.add_argument("--target", default="resnet20")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=128 if torch.cuda.is_available() else 16)
    parser.add_argument("--classes", type=lambda text: [int(part) for part in text.split(",")], default=[1000, 365])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    try:
        given, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"bench transfer: {error}") from None
    if rest or min(given.size, given.frames, given.batch - 1, *given.classes, given.rounds) < 1:
        raise ValueError(
            f"bench transfer: {' '.join(rest) or 'numbers must be above 0, the batch above 1'}; "
            "see `fasttrain bench transfer -h`"
        )
    return given


def _tap(batch: int, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """As a backbone gives them: after a ReLU, channels_last."""
    last = torch.channels_last if len(shape) == 3 else torch.channels_last_3d
    return torch.randn(batch, *shape, device=device).relu_().to(dtype, memory_format=last).requires_grad_()


def _forward(modules: nn.ModuleList, how: dict[str, Any], dtype: torch.dtype, taps: list[Tensor]) -> Tensor:
    with torch.autocast(taps[0].device.type, dtype, enabled=dtype != torch.float32):
        return run_together([m for m in modules if isinstance(m, TransferModule)], taps, **how)


def _step(heads: Run, modules: nn.ModuleList, data: list[list[Tensor]], upstream_BC: Tensor, i: int) -> None:
    heads(data[i]).backward(upstream_BC)
    modules.zero_grad()
    for tap_BCHW in data[i]:
        tap_BCHW.grad = None


def _kept(heads: Run, taps: list[Tensor], modules: nn.ModuleList) -> int:
    """Bytes that autograd keeps for the backward pass, without parameters and taps."""
    known = {t.untyped_storage().data_ptr() for t in (*taps, *modules.parameters())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out_BC = heads(taps)  # noqa: F841, keeps the graph alive, so that no two tensors share an address
    return sum(kept.values())


def _rows(cases: dict[str, Case], saved: dict[str, int]) -> list[dict[str, Any]]:
    plain = cases["plain"].ms
    return [
        {
            "name": name,
            "ms": case.ms,
            "relative_to": {"plain": plain / case.ms} if name != "plain" else {},
            "repeats": case.repeats,
            "saved_bytes": saved[name],
            "peak_bytes": case.peak_bytes,
            "launches": case.launches,
        }
        for name, case in cases.items()
    ]


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("row")
    for head in ("ms", "x plain", "kept MiB", "peak MiB", "launches"):
        table.add_column(head, justify="right")
    for row in rows:
        peak, launches = row["peak_bytes"], row["launches"]
        table.add_row(
            row["name"],
            f"{row['ms']:.2f}",
            f"{row['relative_to'].get('plain', 1):.2f}",
            f"{row['saved_bytes'] / 2**20:.1f}",
            "" if peak is None else f"{peak / 2**20:.1f}",
            "" if launches is None else str(launches),
        )
    Console().print(table)
