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
matrix product in the same type in the same run, and the last column the share of it that a row's arithmetic comes to.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from fasttrain.loaders import Dataset, open_dataset
from fasttrain.loaders.datasets import stored_pixels
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fasttrain import recipe as recipes
from fasttrain.build import Parts, build
from fasttrain.describe import describe
from fasttrain.device import choose_device, choose_dtype, keep_memory, set_up
from fasttrain.recipe import Recipe, Run
from fasttrain.sources import SoftTargets
from fasttrain.trainer import Trainer

from .baselines import PaperStyle, TimmStyle
from .loaders import prepare

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
_TURN = float(os.environ.get("FASTTRAIN_BENCH_TURN", "10"))  # seconds


def run(arguments: list[str]) -> dict[str, Any]:
    """Measures; prints a table, and returns rows and what could not run.

    Raises:
        ValueError: arguments that make no sense, or no data.
    """
    given = _parsed(arguments)
    device = choose_device("auto")
    packed = _videos(given.data) if given.frames else prepare(given.data, 2000).packed
    asked = {k: v for k, v in vars(given).items() if k not in ("rows", "repeats", "data")}
    asked["file"] = str(packed.source)
    content: dict[str, Any] = {k: v for k, v in asked.items() if k != "file"} | {
        "device": str(device),
        "rows": [],
        "not_run": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        asked["folder"], asked["indices"] = folder, str(Path(folder) / "indices")
        train_N = packed.splits["train"]
        if len(train_N) < given.batch or (len(train_N) < given.images and not given.frames):
            raise ValueError(f"bench step: --images {given.images}, but the training split has {len(train_N)}")
        chosen_N = train_N[np.linspace(0, len(train_N) - 1, min(given.images, len(train_N))).astype(int)]
        Path(asked["indices"]).write_text("\n".join(map(str, chosen_N)))
        made = recipe(asked)
        flops = describe(made)["flops_per_image"]
        flops["scratch"] = describe(recipe(asked, method__name="scratch"))["flops_per_image"]["target_training"]
        content["flops_per_image"] = flops
        workers: dict[str, _Row] = {}
        try:
            for name in given.rows:
                if given.frames and name.startswith(("paper", "timm")):
                    content["not_run"][name] = "it is of images"
                    continue
                if name == "paper-style, memory kept" and device.type == "cuda":
                    content["not_run"][name] = "it is about memory on a CPU"
                    continue
                workers[name] = _Row(name, asked)
                why = workers[name].started()
                if why:
                    content["not_run"][name] = why
                    workers.pop(name).end()
            speeds = _in_turns(workers, given.repeats)
            shares = {name: worker.shares for name, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.end()
    dtype = choose_dtype("auto", device)[0]
    content["dtype"] = str(dtype).removeprefix("torch.")
    content["peak_gflops"] = _peak(device, dtype) / 1e9
    medians = {name: median(found) for name, found in speeds.items()}
    for name, found in speeds.items():
        unit = "clips_per_s" if given.frames else "images_per_s"
        row: dict[str, Any] = {"name": name, unit: medians[name], "repeats": found, "shares": shares[name]}
        row["relative_to"] = {r: medians[name] / medians[r] for r in REFERENCES if r in medians and r != name}
        row["gflops"] = medians[name] * _flops(name, flops) / 1e9
        content["rows"].append(row)
    _print(content)
    return content


def _parsed(arguments: list[str]) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [part.strip() for part in text.split(",")]

    parser = argparse.ArgumentParser(prog="fasttrain bench step", exit_on_error=False, add_help=False)
    parser.add_argument("--target", default="resnet20")
    parser.add_argument("--models", type=names, default=["torchvision:resnet50", "torchvision:resnet50"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--loader", default="auto")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--no-module", dest="module", action="store_false")
    numbers = {"size": 96, "source-size": 224, "batch": 128, "images": 256, "repeats": 3, "frames": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=lambda text: text.split(";") if ";" in text else names(text), default=list(ROWS))
    try:
        given, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"bench step: {error}") from None
    least = min(given.size, given.source_size, given.batch, given.repeats, given.frames + 1)
    if rest or least < 1 or given.images < given.batch:
        what = " ".join(rest) or "a number below 1, or fewer --images than --batch"
        raise ValueError(f"bench step: what is {what}? See `fasttrain bench step -h`")
    # a row's name may hold a comma
    joined = ", ".join(given.rows)
    given.rows = [name for name in ROWS if name in given.rows or ("," in name and name in joined)]
    if not given.rows:
        raise ValueError(f"bench step: there is no row {joined!r}; there are {'; '.join(ROWS)}")
    return given


def _videos(data: Path | None) -> Dataset:
    """The packed videos to train on."""
    if data is not None:
        return open_dataset("beton", data)
    from . import video

    return next(video.sets(["kinetics"], videos=32, short_side=128, quality=90)).packed


def recipe(asked: dict[str, Any], **changes: str) -> Recipe:
    """What all rows of ours train, with some fields changed."""
    whole = asked["loader"] in ("auto", "resident", "synthetic")
    classes = [1000, 365, *([1000] * len(asked["models"]))]
    sources = [
        {"name": f"source{i}", "model": model, "weights": "random", "classes": classes[i], "size": asked["source_size"]}
        for i, model in enumerate(asked["models"])
    ]
    data = {"name": "beton", "root": asked["file"], "size": asked["size"], "batch": asked["batch"]}
    data |= {
        "loader": asked["loader"],
        "views": 1,
        "val_share": 0.1,
        "indices": asked.get("indices"),
        "drop_last": True,
    }
    if asked["frames"]:
        data |= {"frames": asked["frames"], "crop": "corner", "clips": 1}
    else:
        data |= {"stored": asked["size"], "crop": "pad"} if whole else {"crop": "random_resized"}
    content = {
        "name": "bench",
        "data": data,
        "target": {"model": asked["target"]},
        "sources": sources,
        "transfer": {"module": asked["module"]},
        "optim": {"schedule": "constant", "lr": 0.01, "weight_decay": 5e-4},
        "run": {
            "dir": asked["folder"],
            "compile": {"true": True, "false": False}.get(asked["compile"], asked["compile"]),
        },
    }
    return recipes.from_dict(content, [f"--{name.replace('__', '.')}={value}" for name, value in changes.items()])


def _in_turns(workers: dict[str, "_Row"], repeats: int) -> dict[str, list[float]]:
    speeds: dict[str, list[float]] = {name: [] for name in workers}
    for repeat in range(repeats):
        first = repeat % max(len(workers), 1)
        for name in [*list(workers)[first:], *list(workers)[:first]]:
            speeds[name].append(workers[name].turn())
    return speeds


class _Row:
    """A row's process, which works only when it is its turn."""

    def __init__(self, name: str, asked: dict[str, Any]) -> None:
        self.shares: dict[str, float] = {}
        command = [sys.executable, "-m", "fasttrain.benchmarks.step", name, json.dumps(asked)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def started(self) -> str:
        """Waits until it has taken its first step; returns why it cannot, or nothing."""
        return self._answer().get("not_run", "")

    def turn(self) -> float:
        """Images a second."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.shares = answer["shares"]
        return answer["images"] / answer["seconds"]

    def end(self) -> None:
        """Closes its input, at which it leaves."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return {"not_run": f"its process ended with {self._process.wait()}"}


def _peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    from .timing import side_by_side

    case = side_by_side({"product": lambda i: a @ b}, device, sets=1)["product"]
    return 2 * side**3 / (case.ms / 1e3)


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
    for heading in (unit.replace("_per_s", "/s"), "least", "most", *ratios, "GFLOP/s", "of peak"):
        table.add_column(heading, justify="right", width=max(map(len, heading.split())))
    for row in content["rows"]:
        figures = [
            f"{f:.1f}" if f < 1000 else f"{f:.0f}" for f in (row[unit], min(row["repeats"]), max(row["repeats"]))
        ]
        ratios = [f"{row['relative_to'][r]:.2f}" if r in row["relative_to"] else "" for r in REFERENCES]
        known = row["gflops"] > 0
        work = [f"{row['gflops']:.0f}", f"{100 * row['gflops'] / content['peak_gflops']:.0f} %"] if known else ["", ""]
        table.add_row(row["name"], *figures, *ratios, *work)
    console = Console()
    console.print(table)
    console.print(f"peak: {content['peak_gflops']:.0f} GFLOP/s", highlight=False)
    for row in content["rows"]:
        if row["shares"]:
            said = ", ".join(f"{part} {share:.1f} %" for part, share in row["shares"].items())
            console.print(f"{row['name']}: {said}", highlight=False)


# --- in a row's process


class _Ours:
    """Our trainer, step after step, through as many epochs as it takes."""

    def __init__(self, parts: Parts, folder: Path, *, constant: bool = False) -> None:
        self.trainer = Trainer(parts, folder, folder.parent / "recall", lambda line: None)
        if constant:
            self.trainer.sources = _Constant(parts)  # type: ignore[assignment]
        self.trainer.target.train()
        self._walk = self.trainer._ahead()

    def steps(self, count: int) -> int:
        images = 0
        while count:
            ready = next(self._walk, None)
            if ready is None:
                self._walk = self.trainer._ahead()
                continue
            self.trainer._take_step(ready)
            images += len(ready.batch)
            count -= 1
        return images

    def shares(self) -> dict[str, float]:
        from fasttrain.log import shares

        self.trainer.clock.settle()
        return shares(self.trainer.clock.lately)

    def start(self) -> None:
        self.trainer.clock.settle()
        self.trainer.clock.start()


class _Constant:
    """Soft targets that cost nothing: the same for every batch."""

    def __init__(self, parts: Parts) -> None:
        counts = tuple(n.spec.classes for n in parts.networks)
        logits_BC = torch.randn(parts.recipe.data.batch, sum(counts), device=parts.device)
        self.soft = SoftTargets(logits_BC, counts, tuple(n.spec.name for n in parts.networks))

    def start(self, batch) -> Callable[[], SoftTargets]:
        return lambda: self.soft

    def describe(self) -> str:
        return "constant"

    def close(self) -> None:
        pass


class _Loader:
    def __init__(self, parts: Parts) -> None:
        self.loader = parts.loaders["train"]
        self._walk = iter(self.loader)

    def steps(self, count: int) -> int:
        images = 0
        while count:
            batch = next(self._walk, None)
            if batch is None:
                self._walk = iter(self.loader)
                continue
            images += len(batch)
            count -= 1
        return images


def _open(name: str, asked: dict[str, Any]) -> Any:
    """A row, ready to take steps."""
    device = choose_device("auto")
    folder = Path(asked["folder"]) / name
    if not name.startswith(("paper", "timm")):
        set_up(Run(), device)
        changes = {"synthetic": {"data__loader": "synthetic"}, "live": {"transfer__recall": "false"}}.get(name, {})
        changes |= {"method__name": "scratch"} if name == "scratch" else {}
        parts = build(recipe(asked, **changes))
        if name == "loader":
            return _Loader(parts)
        return _Ours(parts, folder / "run", constant=name in ("heads alone", "synthetic"))
    if "memory kept" in name:
        keep_memory()
    parts = build(recipe(asked, run__compile="false"))
    dataset, index_N = parts.dataset, parts.train_spec.index_N
    images_NHWC = stored_pixels(dataset, index_N, asked["size"]).numpy()
    labels_N = np.asarray(dataset.targets_N[index_N])
    networks = [n.network for n in parts.networks]
    given: dict[str, Any] = {"source_size": asked["source_size"], "batch": asked["batch"], "device": device, "lr": 0.01}
    style = PaperStyle if name.startswith("paper") else TimmStyle
    return style(images_NHWC, labels_N, parts.target, networks, dtype=parts.dtype, **given)


def _work(name: str, asked: dict[str, Any]) -> None:
    try:
        row, device = _open(name, asked), choose_device("auto")
        row.steps(3 if device.type == "cuda" else 1)
    except Exception as error:  # missing parts: the other rows can run
        traceback.print_exc()
        print(json.dumps({"not_run": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}), flush=True)
        return

    def timed(count: int) -> tuple[int, float]:
        start = time.perf_counter()
        images = row.steps(count)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return images, time.perf_counter() - start

    _, once = timed(1)
    count = max(1, min(2000, round(_TURN / once)))
    _give_back()
    print("{}", flush=True)
    for _ in sys.stdin:
        timed(1)
        gc.collect()
        if hasattr(row, "start"):
            row.start()
        images, seconds = timed(count)
        found = row.shares() if hasattr(row, "shares") else {}
        print(json.dumps({"images": images, "seconds": seconds, "shares": found}), flush=True)
        _give_back()
    if hasattr(row, "close"):
        row.close()


def _give_back() -> None:
    """While a row sleeps others need the memory."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    _work(sys.argv[1], json.loads(sys.argv[2]))
