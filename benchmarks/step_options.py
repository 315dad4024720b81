"""What suites of training steps share: their options, the images or clips, and the recipe that these ask for."""

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fasttrain.loaders import Dataset, open_dataset

from fasttrain import recipe as recipes
from fasttrain.recipe import Recipe

from .loaders import prepare

PHOTOGRAPHS = 2000  # that are made where no data are named
_NUMBERS = {"size": 96, "source-size": 224, "batch": 128, "images": 256, "repeats": 3, "frames": 0}
_TEXTS = {"target": "resnet20", "loader": "auto", "compile": "auto"}
EVERY = ("target", "models", "data", "loader", "compile", "module", *_NUMBERS)


def names(text: str) -> list[str]:
    """``a, b`` -> [a, b]."""
    return [part.strip() for part in text.split(",")]


def parser(suite: str, options: Iterable[str] = EVERY, *, defaults: bool = True) -> argparse.ArgumentParser:
    """Of a suite that takes some of these options, which `fasttrain bench step -h` explains. Without ``defaults`` those that are
    not given are missing from what is parsed."""
    missing = None if defaults else argparse.SUPPRESS
    made = argparse.ArgumentParser(
        prog=f"fasttrain bench {suite}", exit_on_error=False, add_help=False, argument_default=missing
    )
    its_own: dict[str, Any] = {**_NUMBERS, **_TEXTS, "models": ["torchvision:resnet50", "torchvision:resnet50"]}

    def default(option: str) -> Any:
        return its_own[option] if defaults else argparse.SUPPRESS

    for option in options:
        if option in _NUMBERS:
            made.add_argument(f"--{option}", type=int, default=default(option))
        elif option in _TEXTS:
            made.add_argument(f"--{option}", default=default(option))
        elif option == "models":
            made.add_argument("--models", type=names, default=default("models"))
        elif option == "data":
            made.add_argument("--data", type=Path)
        else:
            assert option == "module"
            made.add_argument(
                "--no-module", dest="module", action="store_false", default=True if defaults else argparse.SUPPRESS
            )
    return made


def parsed(made: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """What was given.

    Raises:
        ValueError: arguments that make no sense.
    """
    suite = made.prog.removeprefix("fasttrain ")
    try:
        given, rest = made.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"{suite}: {error}") from None
    numbers = [getattr(given, name.replace("-", "_"), 1) for name in _NUMBERS if name != "frames"]
    few = getattr(given, "images", float("inf")) < getattr(given, "batch", 0)
    if rest or min(*numbers, getattr(given, "frames", 0) + 1) < 1 or few:
        what = " ".join(rest) or "a number below 1, or fewer --images than --batch"
        raise ValueError(f"{suite}: what is {what}? See `fasttrain {suite} -h`")
    return given


def packed(data: Path | None, *, clips: bool) -> Dataset:
    """The packed file of images or videos to train on; without one, that of the photographs or videos which are made here."""
    if not clips:
        return prepare(data, PHOTOGRAPHS).packed
    if data is not None:
        return open_dataset("beton", data)
    from . import video

    return next(video.sets(["kinetics"], videos=32, short_side=128, quality=90)).packed


@contextmanager
def prepared(given: dict[str, Any], data: Dataset, suite: str) -> Iterator[dict[str, Any]]:
    """What a row's process is asked: the options, the file, which of its samples an epoch has, and a folder to work in.

    Raises:
        ValueError: fewer samples than asked for.
    """
    with tempfile.TemporaryDirectory() as folder:
        indices = Path(folder) / "indices"
        train_N = data.splits["train"]
        if len(train_N) < given["batch"] or (len(train_N) < given["images"] and not given["frames"]):
            raise ValueError(f"{suite}: --images {given['images']}, but the training split has {len(train_N)}")
        chosen_N = train_N[np.linspace(0, len(train_N) - 1, min(given["images"], len(train_N))).astype(int)]
        indices.write_text("\n".join(map(str, chosen_N)))
        yield given | {"file": str(data.source), "folder": folder, "indices": str(indices)}


def recipe(asked: dict[str, Any], **changes: str) -> Recipe:
    """What all rows of ours train, with some fields changed.

    Args:
        asked: target, models, module, size, source_size, batch, frames, file and folder; loader, compile and indices if they
            are to be other than a recipe's own; ``changes``, too, are fields' names and values.
        changes: values by fields' names, ``__`` for the dot.
    """
    loader = asked.get("loader", "auto")
    whole = loader in ("auto", "resident", "synthetic")
    classes = [1000, 365, *([1000] * len(asked["models"]))]
    sources = [
        {"name": f"source{i}", "model": model, "weights": "random", "classes": classes[i], "size": asked["source_size"]}
        for i, model in enumerate(asked["models"])
    ]
    data = {"name": "beton", "root": asked["file"], "size": asked["size"], "batch": asked["batch"]}
    data |= {"loader": loader, "views": 1, "val_share": 0.1, "indices": asked.get("indices"), "drop_last": True}
    if asked["frames"]:
        data |= {"frames": asked["frames"], "crop": "corner", "clips": 1}
    else:
        data |= {"stored": asked["size"], "crop": "pad"} if whole else {"crop": "random_resized"}
    compiled = asked.get("compile", "auto")
    content = {
        "name": "bench",
        "data": data,
        "target": {"model": asked["target"]},
        "sources": sources,
        "transfer": {"module": asked["module"]},
        "optim": {"schedule": "constant", "lr": 0.01, "weight_decay": 5e-4},
        "run": {"dir": asked["folder"], "compile": {"true": True, "false": False}.get(compiled, compiled)},
    }
    every = asked.get("changes", {}) | changes
    return recipes.from_dict(content, [f"--{name.replace('__', '.')}={value}" for name, value in every.items()])
