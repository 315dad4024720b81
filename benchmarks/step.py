"""Suite ``step``: training with two frozen sources, ours and others' way, in images a second.

    fasttrain bench step [--target resnet20] [--size 96] [--batch 128] [--models NAME,NAME] [--source-size 224] [--no-module]
                         [--data FOLDER|FILE.beton] [--images 256] [--loader auto] [--compile true|false|graphs]
                         [--frames N] [--repeats 3] [--rows NAME,NAME] [--json FILE]

  --target       backbone; auxiliary heads have transfer modules unless --no-module
  --models       of the sources, with random weights, 1000 and 365 classes; two ResNet-50 if not given
  --data         images; without it photographs that Debian packages ship. They are brought to centre squares of --size pixels,
                 unless --loader decodes them at every step (ffcv, dali, torch: then random-resized crops)
  --images       how many of them an epoch has
  --frames       clips of so many frames, for a 3D target such as resnet3d18; --data is then a packed file of videos, without it
                 the one that `fasttrain bench video` makes of its Kinetics-like files. Figures are clips a second, and the
                 sources see centre frames. Others' rows know no clips
  --compile      our rows' run.compile; not given: auto
  --rows         of these alone

Others' rows: ``paper-style`` is what the paper's authors published, written anew (benchmarks/baselines.py): float32, NCHW,
eager, sources one after the other in training mode, a DataLoader of PIL images, a loss read at every step. ``timm-style``:
mixed precision where the device has it, channels_last, everything compiled, sources one after the other. ``paper-style, memory
kept`` (CPU): the first with one setting of ours, fasttrain.device.keep_memory. Ours: ``live`` sources, ``recalled`` ones (all
labels known), ``heads alone``: the same with constant targets instead of sources, ``scratch``: without auxiliary heads. Floors:
``synthetic``: heads alone on one batch again and again; ``loader``: only the batches.

Every row is a process of its own, so that none inherits another's settings. They take turns, --repeats times, one step that
does not count and then as many as take about ten seconds, while the others sleep; figures are medians. ``peak`` is a large
matrix product in the same type in the same run, and ``of peak`` the share of it that a row's arithmetic comes to; ``copy`` is a
large copy. ``x floor`` is a row's time beside the least that its convolutions and matrix products take at these two rates, one
after the other (`fasttrain bench floors -h` says what is counted).
"""

import argparse
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fasttrain.describe import describe
from fasttrain.device import choose_device, choose_dtype

from . import floors, step_options
from .step_options import names, recipe
from .step_rows import Row, measured
from .timing import copy_bandwidth, product_rate

ROWS = (
    "paper-style",
    "paper-style, memory kept",
    "timm-style",
    "live",
    "recalled",
    "heads alone",
    "scratch",
    "synthetic",
    "loader",
)
REFERENCES = ("paper-style", "heads alone")
_FLOORS = {"recalled": "recalled", "heads alone": "recalled", "synthetic": "recalled", "scratch": "scratch"}


def run(arguments: list[str]) -> dict[str, Any]:
    """Measures; prints a table, and returns rows and what could not run.

    Raises:
        ValueError: arguments that make no sense, or no data.
    """
    given = _parsed(arguments)
    device = choose_device("auto")
    packed = step_options.packed(given.data, clips=given.frames > 0)
    dtype = choose_dtype("auto", device)[0]
    options: dict[str, Any] = {k: v for k, v in vars(given).items() if k not in ("rows", "repeats", "data")}
    content: dict[str, Any] = options | {"device": str(device), "rows": [], "not_run": {}}
    with step_options.prepared(options, packed, "bench step") as asked:
        made = recipe(asked)
        flops = describe(made)["flops_per_image"]
        flops["scratch"] = describe(recipe(asked, method__name="scratch"))["flops_per_image"]["target_training"]
        content["flops_per_image"] = flops
        operations = floors.rows(made, len(packed.classes), dtype)
        content["not_run"] = {name: why for name in given.rows if (why := _unfit(name, given.frames, device.type))}
        rows = [name for name in given.rows if name not in content["not_run"]]
        speeds, shares = measured(rows, lambda name: Row(name, asked), given.repeats, content["not_run"])
    content["dtype"] = str(dtype).removeprefix("torch.")
    content["peak_gflops"] = product_rate(device, dtype) / 1e9
    content["copy_bytes_per_s"] = copy_bandwidth(device, 512 if device.type == "cuda" else 64)
    medians = {name: median(found) for name, found in speeds.items()}
    for name, found in speeds.items():
        unit = "clips_per_s" if given.frames else "images_per_s"
        row: dict[str, Any] = {"name": name, unit: medians[name], "repeats": found, "shares": shares[name]}
        row["relative_to"] = {r: medians[name] / medians[r] for r in REFERENCES if r in medians and r != name}
        row["gflops"] = medians[name] * _flops(name, flops) / 1e9
        its = operations.get(_FLOORS.get(name, "live")) if name != "loader" else None
        if its is not None:
            rates = {"flops_per_s": content["peak_gflops"] * 1e9, "bytes_per_s": content["copy_bytes_per_s"]}
            row["floor"] = _milliseconds(floors.floor(its, **rates))
            row["over_floor"] = 1e3 * given.batch / medians[name] / row["floor"]["by_operation_ms"]
        content["rows"].append(row)
    _print(content)
    return content


def _milliseconds(floor: floors.Floor) -> dict[str, float]:
    """Of one step."""
    kinds = ("by_flops", "by_bytes", "by_operation")
    return {f"{kind}_ms": 1e3 * getattr(floor, f"{kind}_s") for kind in kinds}


def _unfit(name: str, frames: int, device: str) -> str:
    """Why a row makes no sense here, or nothing."""
    if frames and name.startswith(("paper", "timm")):
        return "it is of images"
    return "it is about memory on a CPU" if name == "paper-style, memory kept" and device == "cuda" else ""


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = step_options.parser("step")
    parser.add_argument("--rows", type=lambda text: text.split(";") if ";" in text else names(text), default=list(ROWS))
    given = step_options.parsed(parser, arguments)
    # a row's name may hold a comma
    joined = ", ".join(given.rows)
    given.rows = [name for name in ROWS if name in given.rows or ("," in name and name in joined)]
    if not given.rows:
        raise ValueError(f"bench step: there is no row {joined!r}; there are {'; '.join(ROWS)}")
    return given


def _flops(name: str, flops: dict[str, int]) -> float:
    sources = sum(v for k, v in flops.items() if k.startswith("source"))
    if name in ("loader", "scratch"):
        return flops.get(name, 0)
    return flops["target_training"] + (sources if name.startswith(("paper", "timm", "live")) else 0)


def _print(content: dict[str, Any]) -> None:
    heads = "transfer modules" if content["module"] else "linear heads"
    title = (
        f"{content['target']} with {heads} at {content['size']} px from {', '.join(content['models'])} at "
        f"{content['source_size']} px; batch {content['batch']}, {content['dtype']}, {content['device']}"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("row", no_wrap=True)
    ratios = [f"x {r}" for r in REFERENCES]
    unit = "clips_per_s" if content["frames"] else "images_per_s"
    for heading in (unit.replace("_per_s", "/s"), "least", "most", *ratios, "GFLOP/s", "of peak", "x floor"):
        table.add_column(heading, justify="right", width=max(map(len, heading.split())))
    for row in content["rows"]:
        figures = [
            f"{f:.1f}" if f < 1000 else f"{f:.0f}" for f in (row[unit], min(row["repeats"]), max(row["repeats"]))
        ]
        ratios = [f"{row['relative_to'][r]:.2f}" if r in row["relative_to"] else "" for r in REFERENCES]
        known = row["gflops"] > 0
        work = [f"{row['gflops']:.0f}", f"{100 * row['gflops'] / content['peak_gflops']:.0f} %"] if known else ["", ""]
        over = f"{row['over_floor']:.2f}" if "over_floor" in row else ""
        table.add_row(row["name"], *figures, *ratios, *work, over)
    console = Console()
    console.print(table)
    copied = content["copy_bytes_per_s"] / 1e9
    console.print(f"peak: {content['peak_gflops']:.0f} GFLOP/s; copy: {copied:.0f} GB/s", highlight=False)
    for row in content["rows"]:
        if row["shares"]:
            said = ", ".join(f"{part} {share:.1f} %" for part, share in row["shares"].items())
            console.print(f"{row['name']}: {said}", highlight=False)
