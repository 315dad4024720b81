"""Suite ``end-to-end``: images a second from files on the disk to updated weights, each beside its two floors.

    fasttrain bench end-to-end [--sets images,progressive,clips] [--data FOLDER|FILE.beton] [--images 20000] [--video FILE.beton]
                               [--loader auto] [--target resnet18] [--models NAME,NAME] [--source-size 224] [--no-module]
                               [--size 224] [--grow 160,192] [--batch 256] [--compile auto] [--clip-target resnet3d18]
                               [--clip-size 112] [--frames 16] [--clip-batch 64] [--repeats 3] [--turn 5] [--budget SECONDS]
                               [--json FILE]

  --sets      of rows: images at --size pixels; progressive: a recipe whose images grow between the two sides of --grow, measured
              at both ends (``160 px``: an epoch before they grow, ``192 px``: one after); clips for a 3D network. Without it
              images and progressive, and clips if --video is named
  --data      images; without it photographs that Debian packages ship
  --images    an epoch has; where the file has fewer, its JPEGs are packed several times into one that has as many
  --video     packed videos; without it those that `fasttrain bench video` makes of its Kinetics-like files
  --loader    loaders of the images, one after the other, such as ffcv,dali,auto; auto: what a recipe would take. Clips are served
              by the loader ``video``
  --models    of the sources, with random weights, 1000 and 365 classes; two ResNet-50 if not given
  --turn      seconds that a row works when it is its turn, --repeats times; before them it works for 0.15 as long, untimed, so
              that what its loader has ready from its rest is used up
  --budget    seconds that all may take; what there is no time for is named

Rows: ``train, live`` and ``train, recalled`` (all labels known) are the trainer's own steps, log lines among them. Their floors:
``synthetic data, live`` and ``synthetic data, recalled`` are the same step on one batch that lies on the device, whose sources
run, or whose labels are looked up in the same files; ``loader alone`` are the batches until they are on the device. Every row
is a process; they take turns, so that each is measured beside its floors, while the others sleep. Figures are medians. The
files are read once before, so that they are in the page cache.

``share`` is that of the slower floor which a training reaches. The limiter is the slower floor (``loader``, or ``step``), and for
a step the part that takes most of its time; where the floors are within 5 % of each other, both. It is called unclear where the
training's own time says otherwise: where it waits for data for over 5 % of it, the loader should be the limiter.

In ``progressive`` recalled labels are those of stills at --source-size, as a recipe must have it; live sources see the target's
images, enlarged.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from fasttrain.loaders import Dataset, choose_loader, open_dataset
from fasttrain.loaders.datasets.base import Encoded
from fasttrain.loaders.pack import pack
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fasttrain.build import loader_specs, open_data
from fasttrain.device import choose_device, choose_dtype

from . import step_options
from .end_to_end_rows import KINDS, LOADER, Process, recipe_of

SETS = ("images", "progressive", "clips")
GOALS = {"images": 0.97, "progressive": 0.97, "clips": 0.95}  # share of the slower floor
GOAL_IMAGES_PER_S = 10_000.0  # of the best loader at 224 pixels
_CLOSE = 0.05  # floors that differ by less limit together; a training that waits less for data does not wait
_START = 30.0  # seconds without which no processes are started


@dataclass(frozen=True)
class Set:
    """Rows that are measured beside each other: what is asked of them, and their epochs by what to call them."""

    name: str
    asked: dict[str, Any]
    epochs: dict[str, int | None] = field(default_factory=lambda: {"": None})

    @property
    def unit(self) -> str:
        return "clips_per_s" if self.asked["frames"] else "images_per_s"


def run(arguments: list[str]) -> dict[str, Any]:
    """Measures; prints a table, and returns rows, goals, and what could not run.

    Raises:
        ValueError: arguments that make no sense, or no data.
    """
    given, begin = _parsed(arguments), time.monotonic()
    device = choose_device("auto")
    content: dict[str, Any] = {"device": str(device), "rows": [], "not_run": {}}
    content |= {k: v for k, v in vars(given).items() if k not in ("data", "video")}
    content["budget"] = given.budget if given.budget < float("inf") else None
    content["dtype"] = str(choose_dtype("auto", device)[0]).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        for its in _sets(given, Path(folder), content["not_run"]):
            _warm(Path(its.asked["file"]))
            for loader, serves in _loaders(its, given, content).items():
                asked = its.asked | {"serves": serves}
                _group(Set(its.name, asked, its.epochs), loader, given, begin + given.budget, content)
    content["goals"] = goals(content["rows"], device.type, given.size)
    content["seconds"] = time.monotonic() - begin
    _print(content)
    return content


def _parsed(arguments: list[str]) -> argparse.Namespace:
    shared = ("target", "models", "data", "compile", "module", "size", "source-size", "batch", "images", "repeats")
    parser = step_options.parser("end-to-end", shared)
    parser.set_defaults(target="resnet18", size=224, batch=256, images=20_000)
    parser.add_argument("--sets", type=step_options.names)
    parser.add_argument("--video", type=Path)
    parser.add_argument("--loader", type=step_options.names, default=["auto"])
    parser.add_argument("--grow", type=lambda text: [int(part) for part in text.split(",")], default=[160, 192])
    parser.add_argument("--clip-target", default="resnet3d18")
    for name, default in {"clip-size": 112, "frames": 16, "clip-batch": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--turn", type=float, default=5.0)
    parser.add_argument("--budget", type=float, default=float("inf"))
    given = step_options.parsed(parser, arguments)
    if given.sets is None:
        given.sets = ["images", "progressive"] + (["clips"] if given.video else [])
    unknown = [name for name in given.sets if name not in SETS]
    if unknown:
        raise ValueError(f"bench end-to-end: there is no set {unknown[0]!r}; there are {', '.join(SETS)}")
    if len(given.grow) != 2 or not 0 < given.grow[0] < given.grow[1]:
        raise ValueError(f"bench end-to-end: --grow {given.grow} are not two sides, the smaller one first")
    if min(given.turn, given.budget) <= 0 or min(given.frames, given.clip_size, given.clip_batch) < 1:
        raise ValueError("bench end-to-end: --turn, --budget and numbers of clips must be above 0")
    return given


def _sets(given: argparse.Namespace, folder: Path, not_run: dict[str, str]) -> Iterator[Set]:
    """What is to be measured; files are made here where they have to be."""
    common = {"models": given.models, "module": given.module, "source_size": given.source_size}
    common |= {"compile": given.compile, "folder": str(folder), "loader": "ffcv"}  # which cuts random-resized crops
    images = None
    for name in given.sets:
        if name == "clips":
            videos = step_options.packed(given.video, clips=True)
            if len(videos.splits["train"]) < given.clip_batch:
                not_run[name] = f"{len(videos.splits['train'])} training videos are no batch of {given.clip_batch}"
                continue
            asked = {"target": given.clip_target, "size": given.clip_size, "batch": given.clip_batch}
            yield Set(name, common | asked | {"frames": given.frames, "file": str(videos.source), "epochs": [None]})
            continue
        images = images or _images(given, folder)
        asked = {"target": given.target, "batch": given.batch, "frames": 0, "file": images}
        if name == "images":
            yield Set(name, common | asked | {"size": given.size, "epochs": [None]})
            continue
        first, last = given.grow
        changes = {"data__grow_from": str(first), "data__grow_epochs": "[0, 1]"}
        asked |= {"size": last, "changes": changes, "epochs": [0, 1]}
        yield Set(name, common | asked, {f"{first} px": 0, f"{last} px": 1})


def _images(given: argparse.Namespace, folder: Path) -> str:
    """The packed file to train on: as many images an epoch as asked for, or those that there are if they are more."""
    if given.data is not None and given.data.is_file():
        packed = open_dataset("beton", given.data)
    else:
        packed = step_options.packed(given.data, clips=False)
    if len(packed.splits["train"]) >= given.images:
        return str(packed.source)
    out = folder / "images.beton"
    pack(several_times(packed, given.images), out)
    return str(out)


class _Again(Encoded):
    """Files of a data set, some of them several times."""

    def __init__(self, read: Encoded, index_N: np.ndarray) -> None:
        self._read, self._index_N = read, index_N

    def encoded(self, index: int) -> np.ndarray:
        return self._read.encoded(int(self._index_N[index]))

    def name(self, index: int) -> str:
        return f"{self._read.name(int(self._index_N[index]))}, {index}"

    def __call__(self, index: int) -> np.ndarray:
        return self._read(int(self._index_N[index]))


def several_times(dataset: Dataset, images: int) -> Dataset:
    """A data set whose training split has so many images: those of another, one after the other, as often as it takes.

    Raises:
        ValueError: it is none of image files.
    """
    if not isinstance(dataset.read, Encoded):
        raise ValueError(f"bench end-to-end: {dataset.source} holds no image files; name another --data")
    train_N = np.resize(dataset.splits["train"], images)
    rest = [dataset.splits[split] for split in ("val", "test")]
    index_N, edges = np.concatenate([train_N, *rest]), np.cumsum([images, *map(len, rest)])
    parts = np.split(np.arange(len(index_N)), edges[:-1])
    splits = dict(zip(("train", "val", "test"), parts, strict=True))
    read = _Again(dataset.read, index_N)
    return Dataset(dataset.name, dataset.classes, dataset.targets_N[index_N], read, splits, dataset.source)


def _warm(path: Path) -> None:
    """Reads a file, so that it is in the page cache."""
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def _loaders(its: Set, given: argparse.Namespace, content: dict[str, Any]) -> dict[str, str]:
    """Loaders to measure, and the name of each in a recipe; what auto stands for is noted."""
    if its.name == "clips":
        return {"video": "video"}
    out: dict[str, str] = {}
    for loader in given.loader:
        serves = loader
        if loader == "auto":
            recipe = recipe_of("train, live", its.asked | {"serves": "auto"})
            spec, _ = loader_specs(recipe, open_data(recipe))
            serves, why = choose_loader(spec, choose_device("auto"))
            content.setdefault("auto", {})[its.name] = f"{serves} ({why})"
        if serves not in out.values():
            out[loader] = serves
    return out


def _group(its: Set, loader: str, given: argparse.Namespace, deadline: float, content: dict[str, Any]) -> None:
    """Measures a set's rows with one loader, and adds them to the content."""
    label, not_run = f"{its.name}, {loader}", content["not_run"]
    late = f"the {given.budget:.0f} s of --budget were over"
    workers: dict[str, Process] = {}
    found: dict[tuple[str, str], list[float]] = {}
    shares: dict[tuple[str, str], dict[str, float]] = {}

    def left() -> float:
        return deadline - time.monotonic()

    try:
        # labels are computed by the first of them, and known to its floor
        for names in ((LOADER, "train, recalled", "train, live"), ("synthetic data, recalled", "synthetic data, live")):
            if left() < _START:
                not_run.update({f"{label}: {name}": late for name in names})
                continue
            workers |= {name: Process(name, its.asked) for name in names}
            for name in names:
                why = workers[name].started(max(left(), 1.0) if given.budget < float("inf") else None)
                if why:
                    not_run[f"{label}: {name}"] = why
                    workers.pop(name).end()
        each = given.turn * 1.5 * len(its.epochs)
        order = [name for name in KINDS if name in workers]
        for repeat in range(given.repeats if order else 0):
            if left() < each * len(order):
                not_run[f"{label}: rounds"] = f"{late} after {repeat} of {given.repeats}"
                break
            first = repeat % len(order) if order else 0
            for name in [*order[first:], *order[:first]]:
                for end, epoch in its.epochs.items():
                    try:
                        speed = workers[name].work(
                            given.turn, epoch, within=max(min(left(), 60 + 20 * given.turn), 1.0)
                        )
                    except ValueError as error:
                        not_run[f"{label}: {name}"] = str(error)
                        order = [other for other in order if other != name]
                        break
                    found.setdefault((name, end), []).append(speed)
                    shares[name, end] = workers[name].shares
    finally:
        for worker in workers.values():
            worker.end()
    for end in its.epochs:
        speeds = {name: found[name, end] for name in KINDS if (name, end) in found}
        where = {"set": its.name, "at": end or f"{its.asked['size']} px", "loader": its.asked["serves"]}
        content["rows"] += rows(speeds, {name: shares[name, end] for name in speeds}, where, its.unit)


def rows(
    speeds: dict[str, list[float]], shares: dict[str, dict[str, float]], where: dict[str, str], unit: str
) -> list[dict[str, Any]]:
    """The rows of one group, each training with its floors.

    Args:
        speeds: of each row, one for each of its turns.
        shares: of the parts of the time, in percent.
        where: the set, which of its ends, and the loader.
        unit: ``images_per_s`` or ``clips_per_s``.
    """
    medians = {name: median(found) for name, found in speeds.items()}
    out = []
    for name, found in speeds.items():
        row: dict[str, Any] = {"name": name, **where, unit: medians[name], "repeats": found, "shares": shares[name]}
        synthetic = name.replace("train", "synthetic data")
        floors = {floor: medians[floor] for floor in (synthetic, LOADER) if floor in medians and floor != name}
        row["relative_to"] = {floor: medians[name] / speed for floor, speed in floors.items() if "train" in name}
        if "train" in name and len(floors) == 2:
            row["share"] = medians[name] / min(floors.values())
            row["limiter"] = limiter(floors[synthetic], floors[LOADER], shares[name])
        out.append(row)
    return out


def limiter(synthetic: float, loader: float, shares: dict[str, float]) -> str:
    """What holds a training up.

    Args:
        synthetic: images a second of its step on data that are there.
        loader: of its loader alone.
        shares: of its time, in percent: ``data``, ``sources``, ``target``, ..
    """
    waits = shares.get("data", 0.0) / 100
    most = max((name for name in shares if name != "data"), key=lambda name: shares[name], default="target")
    step = f"step ({most})"
    if abs(synthetic - loader) <= _CLOSE * max(synthetic, loader):
        return f"loader and {step}"
    if loader < synthetic:
        return (
            "loader"
            if waits > _CLOSE
            else f"unclear: the loader by its floor, but only {100 * waits:.1f} % of the time waits for data"
        )
    return (
        step
        if waits <= _CLOSE
        else f"unclear: the step by its floor, but {100 * waits:.1f} % of the time waits for data"
    )


def goals(found: list[dict[str, Any]], device: str, size: int) -> list[dict[str, Any]]:
    """What was to be reached, and whether it was: judged only where a GPU ran.

    Args:
        found: all rows.
        device: ``cuda`` or ``cpu``.
        size: side in pixels of the set ``images``.
    """
    out: list[dict[str, Any]] = []
    for row in found:
        if "share" in row:
            name = f"{row['set']} at {row['at']}, {row['loader']}, {row['name']}: share of the slower floor"
            out.append({"name": name, "goal": GOALS[row["set"]], "found": row["share"]})
    alone = [row for row in found if row["set"] == "images" and row["name"] == LOADER]
    if alone and size == 224:
        best = max(alone, key=lambda row: row["images_per_s"])
        name = f"images at 224 px: images/s of the best loader ({best['loader']})"
        out.append({"name": name, "goal": GOAL_IMAGES_PER_S, "found": best["images_per_s"]})
    for goal in out:
        goal["met"] = goal["found"] >= goal["goal"] if device == "cuda" else None
    return out


def _print(content: dict[str, Any]) -> None:
    console = Console()
    title = f"from files to weights; batch {content['batch']}, {content['dtype']}, {content['device']}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("set", "loader", "row"):
        table.add_column(heading, no_wrap=True)
    for heading in ("/s", "least", "most", "of synthetic", "of loader", "share"):
        table.add_column(heading, justify="right")
    table.add_column("limiter")
    for row in content["rows"]:
        speed = row.get("images_per_s", row.get("clips_per_s"))
        figures = [f"{f:.1f}" if f < 1000 else f"{f:.0f}" for f in (speed, min(row["repeats"]), max(row["repeats"]))]
        to = row["relative_to"]
        synthetic = next((v for floor, v in to.items() if floor != LOADER), None)
        ratios = [f"{100 * v:.1f} %" if v is not None else "" for v in (synthetic, to.get(LOADER), row.get("share"))]
        table.add_row(
            f"{row['set']}, {row['at']}", row["loader"], row["name"], *figures, *ratios, row.get("limiter", "")
        )
    console.print(table)
    for row in content["rows"]:
        if row["name"] != LOADER:
            said = ", ".join(f"{part} {share:.1f} %" for part, share in row["shares"].items())
            console.print(f"{row['set']}, {row['at']}, {row['loader']}, {row['name']}: {said}", highlight=False)
    for goal in content["goals"]:
        met = {True: "met", False: "NOT met", None: "not judged: no GPU"}[goal["met"]]
        console.print(f"{goal['name']}: {goal['found']:.4g}, goal {goal['goal']:g}: {met}", highlight=False)
