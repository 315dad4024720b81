"""Suite ``long-run``: real trainings for minutes, with live and with recalled sources: losses, memory, and use of the GPU.

    fasttrain bench long-run --data FILE.beton|NAME [--root FOLDER] [--minutes 8] [--json FILE] [--picture FILE.svg]
                             [--target resnet18] [--models NAME,NAME] [--source-size 224] [--size 224] [--batch 256] [--views 2]
                             [--loader best] [--field value ...]

  --data      a packed file, or a data set's name with its --root
  --minutes   that all trainings take together; it ends within a minute more
  --models    of the sources, with random weights, 1000 and 365 classes; two ResNet-50 if not given
  --views     of each image, whose soft labels are recalled
  --loader    best: what a recipe would take, but from a packed file also where all of it would fit on the device
  --picture   of losses, memory and use over time
  --field     any field of a recipe, such as --optim.lr 0.1

The same recipe is trained with live sources for 45 % of the time, then with recalled ones for as many steps, from the same seed;
then, for the time that is left, recalled and live in turn from other seeds. Each is a process of its own, which trains as
``fasttrain train`` does, with evaluations and checkpoints, at a constant rate, until it has taken its steps or the time is over.
None is begun again.

Losses are compared line by line, smoothed over a twentieth of the lines, after the first tenth: ``distance`` is the root of the
mean squared difference of live and recalled from one seed, ``noise`` that of two seeds of recalled; where there was no time for a
second seed, what the lines' own spread would leave in smoothed curves. They are the same within noise where the ratio is no
more than 2. Memory is flat where its slope over the last 80 % of a training adds up to no more than 1 % and 16 MiB; the
process's is counted without pages of mapped files. The JSON is written every 30 seconds, ``finished`` only at the end.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from fasttrain.loaders import choose_loader
from fasttrain.loaders.datasets import DATASETS
from fasttrain.loaders.datasets.beton import Packed
from fasttrain.loaders.parts import missing_part
from rich.console import Console

from fasttrain import recipe as recipes
from fasttrain.build import build, loader_specs, open_data
from fasttrain.device import choose_device, choose_dtype, set_up
from fasttrain.files import write_text
from fasttrain.recipe import Recipe
from fasttrain.trainer import Trainer

from . import curves, step_options

Save = Callable[[dict[str, Any]], None]
_FIRST = 0.45  # share of the time that the first training has
_LEAST = 0.1  # of the time: no training is begun for less
_EVERY = 30.0  # seconds between two writings
_LATE = 30.0  # seconds that a process may take to end when the time is over
_LOG, _STEPS = 10, 500  # steps between lines, and about so many between evaluations, and between checkpoints
_MEMORY = ("own_gib", "gpu_gib", "torch_gib")
_USE = (
    "own_gib",
    "rss_gib",
    "gpu_gib",
    "torch_gib",
    "gpu_percent",
    "gpu_watts",
    "gpu_mhz",
    "images_per_s",
    "data_share",
)


def run(arguments: list[str], save: Save = lambda content: None) -> dict[str, Any]:
    """Trains; prints a table, and returns rows, runs, and what could not run.

    Args:
        arguments: from the command line.
        save: takes the content as it is, every 30 seconds.

    Raises:
        ValueError: arguments or a recipe that make no sense, or no data.
    """
    given, overrides = _parsed(arguments)
    device, begin = choose_device("auto"), time.time()
    end = begin + 60 * given.minutes
    asked = {k: v for k, v in vars(given).items() if k not in ("data", "root", "picture")} | {"overrides": overrides}
    content: dict[str, Any] = asked | {
        "device": str(device),
        "finished": False,
        "restarts": 0,
        "runs": [],
        "not_run": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        first = recipe(given, overrides, folder)
        loader, why = _loader(first, given.loader)
        overrides = [*overrides, "--data.loader", loader]
        content |= {
            "loader": f"{loader} ({why})",
            "dtype": str(choose_dtype(first.run.precision, device)[0]).removeprefix("torch."),
        }
        content["training_images"] = len(loader_specs(first, open_data(first))[0].index_N)
        made: list[_Run] = []
        last = time.monotonic()

        def so_far() -> None:
            nonlocal last
            if time.monotonic() - last >= _EVERY:
                last = time.monotonic()
                save(content | _told(made))

        for name, seed in _in_order():
            if end - time.time() < _LEAST * 60 * given.minutes:
                break
            steps = made[0].step if made else 0
            until = end if made else begin + _FIRST * 60 * given.minutes
            made.append(_Run(f"{name}, seed {seed}", _asked(given, overrides, folder, name, seed), steps, until))
            made[-1].watch(so_far)
            if not made[0].step:  # nothing to compare with
                break
    for its in made:
        if its.wrong:
            content["not_run"][its.name] = its.wrong
    content |= _told(made) | {"finished": True, "seconds": time.time() - begin}
    if given.picture and content["runs"]:
        write_text(given.picture, curves.picture(content["runs"]))
    _print(content)
    return content


def _in_order() -> Iterator[tuple[str, int]]:
    """Trainings, as long as there is time."""
    yield from (("live", 0), ("recalled", 0))
    for seed in itertools.count(1):
        yield from (("recalled", seed), ("live", seed))


def _parsed(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and a recipe's fields."""
    shared = ("target", "models", "size", "source-size", "batch", "loader")
    parser = step_options.parser("long-run", shared)
    parser.set_defaults(target="resnet18", size=224, batch=256, loader="best")
    parser.add_argument("--data", required=True)
    parser.add_argument("--root")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--picture", type=Path)
    fields: list[str] = []
    own, rest = [], list(arguments)
    while rest:  # --group.field value and --group.field=value
        word = rest.pop(0)
        if word.startswith("--") and "." in word.partition("=")[0]:
            fields += [word] if "=" in word else [word, rest.pop(0) if rest else ""]
        else:
            own.append(word)
    given = step_options.parsed(parser, own)
    if given.minutes <= 0 or given.views < 1:
        raise ValueError(f"bench long-run: --minutes {given.minutes:g} and --views {given.views} must be above 0")
    if given.data not in DATASETS and not Path(given.data).is_file():
        raise ValueError(f"bench long-run: --data {given.data} is neither a file nor one of {', '.join(DATASETS)}")
    return given, fields


def recipe(given: argparse.Namespace, overrides: list[str], folder: str) -> Recipe:
    """What is trained.

    Args:
        given: our options.
        overrides: fields of a recipe, as on the command line.
        folder: of the runs.
    """
    packed = given.data not in DATASETS
    classes = [1000, 365, *([1000] * len(given.models))]
    data = {"name": "beton" if packed else given.data, "root": given.data if packed else given.root}
    data |= {
        "size": given.size,
        "batch": given.batch,
        "views": given.views,
        "drop_last": True,
        "crop": "random_resized",
    }
    sources = [
        {"name": f"source{i}", "model": model, "weights": "random", "classes": classes[i], "size": given.source_size}
        for i, model in enumerate(given.models)
    ]
    content = {
        "name": "long",
        "data": data,
        "target": {"model": given.target},
        "sources": sources,
        "optim": {"schedule": "constant", "lr": 0.05, "warmup_epochs": 1.0, "epochs": 1_000_000},
        "run": {"dir": folder, "log_every": _LOG, "tensorboard": False},
    }
    return recipes.from_dict(content, overrides)


def _loader(first: Recipe, wanted: str) -> tuple[str, str]:
    """The loader to train with, and why."""
    if wanted != "best":
        return wanted, "as asked"
    dataset = open_data(first)
    loader, why = choose_loader(loader_specs(first, dataset)[0], choose_device("auto"))
    if loader == "resident" and isinstance(dataset.read, Packed):
        others = {"ffcv": "ffcv", "dali": "nvidia.dali"}
        here = [name for name, part in others.items() if not missing_part(part)]
        return (here or ["torch"])[0], "from the file, although all of it would fit on the device"
    return loader, why


def _asked(given: argparse.Namespace, overrides: list[str], folder: str, name: str, seed: int) -> dict[str, Any]:
    """What a training's process is told."""
    its = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}
    changes = ["--transfer.recall", str(name == "recalled").lower(), "--run.seed", str(seed)]
    return {"given": its, "overrides": [*overrides, *changes], "folder": folder, "name": f"{name}{seed}"}


class _Run:
    """A training in a process of its own.

    Args:
        name: for people.
        asked: of :func:`_asked`.
        steps: after which it ends; 0 for when the time is over.
        until: when the time is over, in seconds since 1970.

    Attributes:
        lines: of steps, as far as they have come; ``evaluated``: of evaluations.
        over: it has said the last of them.
        step: that it has come to.
        wrong: why it ended before its steps and its time were over, or nothing.
    """

    def __init__(self, name: str, asked: dict[str, Any], steps: int, until: float) -> None:
        self.name, self.until, self.wrong = name, until, ""
        self.lines: list[dict[str, Any]] = []
        self.evaluated: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.over = False
        told = json.dumps(asked | {"steps": steps, "until": until})
        command = [sys.executable, "-m", "fasttrain.benchmarks.long_run", told]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    @property
    def step(self) -> int:
        return self.lines[-1]["step"] if self.lines else 0

    def watch(self, so_far: Callable[[], None]) -> None:
        """Reads what it says, until it ends or is late."""
        reader = threading.Thread(target=self._read, daemon=True)
        reader.start()
        try:
            while reader.is_alive() and time.time() < self.until + _LATE:
                reader.join(0.5)
                so_far()
        finally:
            late = reader.is_alive()
            self._process.kill()
            code = self._process.wait()
            reader.join()
        if self.over:  # a loaded machine may take long to end a process
            return
        if late:
            self.wrong = f"it had not ended {_LATE:.0f} s after its time"
        elif code:
            self.wrong = f"its process ended with {code}" + (f": {self.notes[-1]}" if self.notes else "")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            if text.startswith("{"):
                self.take(text)

    def take(self, text: str) -> None:
        """Takes a line."""
        line = json.loads(text)
        if line["kind"] == "step":
            self.lines.append(line)
        elif line["kind"] == "eval":
            self.evaluated.append(line)
            self.over = line.get("last", False)
        else:
            self.notes.append(line["text"])

    def losses(self, field: str = "loss") -> np.ndarray:
        """[T], a mean each of ten steps: the whole loss, or ``primary``, the task's."""
        return np.array([line[field] for line in list(self.lines)])

    def about(self) -> dict[str, Any]:
        """For the JSON file; at most 200 points of each curve."""
        lines = list(self.lines)
        loss_T, window = np.array([line["loss"] for line in lines]), max(len(lines) // 20, 1)
        step_T = np.array([line["step"] for line in lines])[window - 1 :]
        loss = {"step": curves.thinned(step_T).tolist(), "smoothed": curves.thinned(curves.smoothed(loss_T)).tolist()}
        out: dict[str, Any] = {
            "name": self.name,
            "steps": lines[-1]["step"],
            "seconds": lines[-1]["seconds"],
            "loss": loss,
        }
        out["images_per_s"] = median(line["images_per_s"] for line in lines)
        out["use"], out["memory"] = in_time(lines), {}
        for field in _MEMORY:
            told = [line for line in lines if field in line]
            try:
                second_T, gib_T = (np.array([line[name] for line in told]) for name in ("seconds", field))
                out["memory"][field] = curves.growth(second_T, gib_T)
            except ValueError:
                continue
        busy = [line["gpu_percent"] for line in lines if "gpu_percent" in line]
        if busy:
            out["gpu_percent"] = {"mean": mean(busy), "median": median(busy), "least": min(busy)}
        return out | {"evaluated": self.evaluated, "notes": self.notes}


def in_time(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Figures over time at 200 moments at most: means of the lines up to each; where they do not tell one, the one before.

    Args:
        lines: with ``seconds``.
    """
    fields = [field for field in _USE if any(field in line for line in lines)]
    out: dict[str, list[float]] = {"seconds": [], **{field: [] for field in fields}}
    width = lines[-1]["seconds"] / curves.POINTS
    at: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        at.setdefault(min(int(line["seconds"] / width), curves.POINTS - 1), []).append(line)
    before = {field: next(line[field] for line in lines if field in line) for field in fields}
    for its in at.values():
        out["seconds"].append(its[-1]["seconds"])
        for field in fields:
            told = [line[field] for line in its if field in line]
            before[field] = mean(told) if told else before[field]
            out[field].append(before[field])
    return out


def _told(made: list[_Run]) -> dict[str, Any]:
    """Runs, rows, and the comparison of losses, as far as they have come."""
    some = [its for its in made if its.lines]
    runs = [its.about() for its in some]
    rows: list[dict[str, Any]] = []
    for its in runs:
        row = {"name": its["name"], "images_per_s": its["images_per_s"], "repeats": its["use"]["images_per_s"]}
        row["relative_to"] = {} if not rows else {runs[0]["name"]: its["images_per_s"] / runs[0]["images_per_s"]}
        rows.append(row)
    out: dict[str, Any] = {"runs": runs, "rows": rows}
    for title, field in (("losses", "loss"), ("task_losses", "primary")):
        by_name = {its.name: its.losses(field) for its in some}
        if not {"live, seed 0", "recalled, seed 0"} <= by_name.keys():
            break
        live_T, recalled_T, second_T = (
            by_name.get(name) for name in ("live, seed 0", "recalled, seed 0", "recalled, seed 1")
        )
        assert live_T is not None and recalled_T is not None
        long_enough = second_T is not None and len(second_T) >= len(recalled_T) // 2
        seeds = (recalled_T, second_T) if second_T is not None and long_enough else None
        try:
            out[title] = curves.compare(live_T, recalled_T, seeds).about()
        except ValueError as error:
            out[title] = {"not_compared": str(error)}
    return out


def _print(content: dict[str, Any]) -> None:
    console = Console()
    plain: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False}
    shape = f"{content['target']} at {content['size']} px, batch {content['batch']}"
    console.print(f"{shape}, {content['dtype']}, {content['device']}, loader {content['loader']}", **plain)
    for its in content["runs"]:
        said = [f"{its['steps']} steps in {its['seconds']:.0f} s", f"{its['images_per_s']:.0f} images/s"]
        said.append(f"loss {its['loss']['smoothed'][-1]:.4f}")
        if its["evaluated"]:
            last = its["evaluated"][-1]
            said.append(f"{last['metric'].replace('_', ' ')} {last[last['metric']]:.2f} % on validation")
        if "gpu_percent" in its:
            said.append(f"GPU busy {its['gpu_percent']['mean']:.0f} %")
        for field, memory in its["memory"].items():
            flat = "flat" if memory["flat"] else "NOT flat"
            said.append(
                f"{field.removesuffix('_gib')} memory {memory['gib']:.2f} GiB, {memory['gib_per_hour']:+.3f} an hour: {flat}"
            )
        console.print(f"{its['name']}: {', '.join(said)}", **plain)
    for title in ("losses", "task_losses"):
        losses, what = content.get(title, {}), f"{title.replace('_', ' ')}, live and recalled"
        if "distance" in losses:
            verdict = "the same within noise" if losses["within"] else "NOT the same within noise"
            noise = f"noise {losses['noise']:.4g} ({losses['noise_is']})"
            console.print(f"{what}: {verdict}: distance {losses['distance']:.4g}, {noise}", **plain)
        elif losses:
            console.print(f"{what}: {losses['not_compared']}", **plain)


# --- in a training's process


class _Over(Exception):
    """The steps are taken, or the time is over."""


def _train(asked: dict[str, Any]) -> None:
    begin, given = time.perf_counter(), argparse.Namespace(**asked["given"])
    its = recipe(given, asked["overrides"], asked["folder"])
    set_up(its.run, choose_device(its.run.device))
    epoch = max(len(loader_specs(its, open_data(its))[0].index_N) // its.data.batch, 1)  # steps
    every = str(max(round(_STEPS / epoch), 1))
    its = recipe(
        given, [*asked["overrides"], "--run.eval_every", every, "--run.checkpoint_every", every], asked["folder"]
    )
    folder = Path(asked["folder"])

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line | {"seconds": time.perf_counter() - begin}), flush=True)

    def watch(line: dict[str, Any]) -> None:
        if line["kind"] not in ("step", "eval", "note"):
            return
        say({k: v for k, v in line.items() if k != "advice"})
        over = asked["steps"] and line.get("step", 0) >= asked["steps"]
        if line["kind"] == "step" and (over or time.time() >= asked["until"]):
            val = trainer.evaluate("val")
            say({"kind": "eval", "step": line["step"], "metric": trainer.metric, "last": True} | val)
            raise _Over

    trainer = Trainer(build(its), folder / asked["name"], folder / "recall", lambda line: watch(line))
    try:
        trainer.fit()
    except _Over:
        return


if __name__ == "__main__":
    try:
        _train(json.loads(sys.argv[1]))
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"kind": "note", "text": " ".join(str(error).split())[:300]}), flush=True)
        sys.exit(1)
