"""Suite ``cifar``: small images that lie on the device, a small target, recalled soft labels, in images a second.

    fasttrain bench cifar [--target resnet20] [--batch 128] [--images 12800] [--models NAME,NAME] [--module] [--repeats 3]
                          [--rows NAME;NAME] [--json FILE]

  --target       backbone, at 32 px; auxiliary heads are linear unless --module gives them transfer modules
  --models       of the sources, with random weights, 1000 and 365 classes; two torchvision:resnet18 if not given. They run only
                 until every image's soft label is known, before anything is timed
  --images       an epoch has, made up like CIFAR-10's, of random bytes
  --rows         of these alone, separated by ;

A step of such a training is hundreds of kernels of microseconds, and what decides is how they are launched. Rows: ``plain eager
loop`` is what one writes: images and soft labels as tensors on the device, padded, cropped and mirrored there, the same network
under the same autocast, cross_entropy and kl_div, torch's SGD as it comes, no loss read. ``plain eager loop, compiled``: its
network by torch.compile. Ours, through our trainer with all that it does beside (views by number, soft labels looked up, a
gradient that is not finite left out, times, sums of losses): ``ours, off``, ``ours, true``, ``ours, graphs``, ``ours, step`` by
run.compile, and ``ours, step, not compiled``: one CUDA graph of eager kernels. Floors: ``step alone``: the graph of ``ours,
step`` replayed on one batch again and again; ``all but the step``: ours, step with a graph that is not replayed, so what the
host and the loader take. Rows without a CUDA graph run on a CPU, too.

Every row is a process of its own. They take turns, --repeats times, with as many steps as take about ten seconds; figures are
medians.
"""

import argparse
import json
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fasttrain.loaders.datasets import stored_pixels
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fasttrain import recipe as recipes
from fasttrain.build import Parts, build
from fasttrain.device import choose_device, choose_dtype, set_up
from fasttrain.recipe import Recipe, Run

from .step_options import names
from .step_rows import Ours, Row, measured, work

PLAIN = "plain eager loop"
OURS: dict[str, bool | str] = {"ours, off": False, "ours, true": True, "ours, graphs": "graphs", "ours, step": "step"}
ROWS = (PLAIN, f"{PLAIN}, compiled", *OURS, "ours, step, not compiled", "step alone", "all but the step")
_ON_CUDA = ("ours, graphs", "ours, step", "ours, step, not compiled", "step alone", "all but the step")
_SIDE, _PAD = 32, 4
_CLASSES = (1000, 365)


def run(arguments: list[str]) -> dict[str, Any]:
    """Measures; prints a table, and returns rows and what could not run.

    Raises:
        ValueError: arguments that make no sense.
    """
    given = _parsed(arguments)
    device = choose_device("auto")
    content: dict[str, Any] = {k: v for k, v in vars(given).items() if k not in ("rows", "repeats")}
    content |= {"device": str(device), "dtype": str(choose_dtype("auto", device)[0]).removeprefix("torch.")}
    content |= {"rows": [], "not_run": {}}
    with tempfile.TemporaryDirectory() as folder:
        asked = vars(given) | {"folder": folder}
        write_images(Path(folder), given.images)
        unfit = _ON_CUDA if device.type != "cuda" else ()
        content["not_run"] = {name: "a CUDA graph needs a CUDA device" for name in given.rows if name in unfit}
        rows = [name for name in given.rows if name not in unfit]
        module = "fasttrain.benchmarks.cifar"
        speeds, shares = measured(rows, lambda name: Row(name, asked, module=module), given.repeats, content["not_run"])
    plain = median(speeds[PLAIN]) if PLAIN in speeds else 0.0
    for name, found in speeds.items():
        row: dict[str, Any] = {"name": name, "images_per_s": median(found), "repeats": found, "shares": shares[name]}
        row["step_ms"] = 1e3 * given.batch / row["images_per_s"]
        row["relative_to"] = {PLAIN: row["images_per_s"] / plain} if plain and name != PLAIN else {}
        content["rows"].append(row)
    _print(content)
    return content


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fasttrain bench cifar", exit_on_error=False, add_help=False)
    parser.add_argument("--target", default="resnet20")
    parser.add_argument("--models", type=names, default=["torchvision:resnet18", "torchvision:resnet18"])
    parser.add_argument("--module", action="store_true")
    for name, default in {"batch": 128, "images": 12800, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=lambda text: [part.strip() for part in text.split(";")], default=list(ROWS))
    try:
        given, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"bench cifar: {error}") from None
    unknown = [name for name in given.rows if name not in ROWS]
    if unknown:
        raise ValueError(f"bench cifar: there is no row {unknown[0]!r}; there are {'; '.join(ROWS)}")
    if rest or min(given.batch, given.repeats) < 1 or given.images < given.batch:
        what = " ".join(rest) or "a number below 1, or fewer --images than --batch"
        raise ValueError(f"bench cifar: what is {what}? See `fasttrain bench cifar -h`")
    return given


def write_images(folder: Path, count: int) -> None:
    """Files like CIFAR-10's, of random bytes and random classes: ``count`` images to train on once a tenth is held out, which
    is then as many to validate on; and some for the test."""
    place, rng = folder / "cifar-10-batches-py", np.random.default_rng(0)
    place.mkdir(parents=True)
    whole = count + -(-count // 9) + 10
    sizes = [len(part) for part in np.array_split(np.arange(whole), 5)]
    for file, size in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], [*sizes, 100], strict=True):
        pixel_MP = rng.integers(0, 256, (size, 3 * _SIDE * _SIDE), dtype=np.uint8)
        content = {"data": pixel_MP, "labels": rng.integers(0, 10, size).tolist()}
        (place / file).write_bytes(pickle.dumps(content, protocol=2))
    meta = {"label_names": [f"class {i}" for i in range(10)]}
    (place / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))


def recipe(asked: dict[str, Any], compile_: bool | str) -> Recipe:
    """What every row of ours trains."""
    sources = [
        {"name": f"source{i}", "model": model, "weights": "random", "classes": _CLASSES[i % 2], "size": _SIDE}
        for i, model in enumerate(asked["models"])
    ]
    data = {"name": "cifar10", "root": asked["folder"], "verify": False, "size": _SIDE, "stored": _SIDE, "views": 1}
    data |= {"batch": asked["batch"], "loader": "resident", "val_share": 0.1, "drop_last": True, "crop": "pad"}
    content = {
        "name": "bench",
        "data": data | {"pad": _PAD},
        "target": {"model": asked["target"]},
        "sources": sources,
        "transfer": {"module": asked["module"], "loss": "kd"},
        "optim": {"schedule": "constant", "lr": 0.01, "weight_decay": 5e-4},
        "run": {"dir": asked["folder"], "compile": compile_},
    }
    return recipes.from_dict(content)


def _print(content: dict[str, Any]) -> None:
    heads = "transfer modules" if content["module"] else "linear heads"
    sources = ", ".join(content["models"])
    title = (
        f"{content['target']} with {heads} at {_SIDE} px, soft labels of {sources} recalled; batch {content['batch']}, "
        f"{content['dtype']}, {content['device']}"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("row", no_wrap=True)
    for heading in ("images/s", "least", "most", "ms a step", f"x {PLAIN}"):
        table.add_column(heading, justify="right")
    for row in content["rows"]:
        figures = [f"{f:.0f}" for f in (row["images_per_s"], min(row["repeats"]), max(row["repeats"]))]
        ratio = f"{row['relative_to'][PLAIN]:.2f}" if row["relative_to"] else ""
        table.add_row(row["name"], *figures, f"{row['step_ms']:.3f}", ratio)
    console = Console()
    console.print(table)
    for name, why in content["not_run"].items():
        console.print(f"not run: {name}: {why}", highlight=False)


# --- in a row's process


class Plain:
    """The loop that one writes for images which lie on the device.

    Shape suffixes: B batch, N images, C the sources' classes side by side.
    """

    def __init__(self, parts: Parts, *, compiled: bool) -> None:
        index_N, self.device, self.dtype = parts.train_spec.index_N, parts.device, parts.dtype
        pixels_NHWC = stored_pixels(parts.dataset, index_N, _SIDE)
        self.pixels_NCHW = pixels_NHWC.permute(0, 3, 1, 2).contiguous().to(self.device)
        self.labels_N = torch.from_numpy(parts.dataset.targets_N[index_N]).to(self.device)
        self.counts = [n.spec.classes for n in parts.networks]
        kept = torch.float16 if self.device.type == "cuda" else torch.float32
        self.soft_NC = torch.randn(len(index_N), sum(self.counts), device=self.device, dtype=kept)
        self.mean, self.std = (
            torch.tensor(v, device=self.device).view(1, 3, 1, 1)
            for v in (parts.recipe.data.mean, parts.recipe.data.std)
        )
        self.network = parts.target.to(memory_format=torch.channels_last).train()
        self.ask = torch.compile(self.network) if compiled else self.network
        spec = parts.recipe.optim
        self.optimiser = torch.optim.SGD(
            self.network.parameters(), lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay
        )
        self.batch, self.place, self.order_N = parts.recipe.data.batch, len(index_N), torch.empty(0)

    def steps(self, count: int) -> int:
        """Takes them; returns how many images they were."""
        for _ in range(count):
            self._step()
        return count * self.batch

    def _step(self) -> None:
        if self.place + self.batch > len(self.labels_N):
            self.order_N, self.place = torch.randperm(len(self.labels_N), device=self.device), 0
        index_B = self.order_N[self.place : self.place + self.batch]
        self.place += self.batch
        x_BCHW = (augmented(self.pixels_NCHW[index_B]).float() - self.mean) / self.std
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        self.optimiser.zero_grad()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.ask(x_BCHW, aux=True)
        loss = F.cross_entropy(out.logits_BK.float(), self.labels_N[index_B])
        soft_BC = self.soft_NC[index_B].float()
        for student, teacher in zip(
            out.aux_logits_BC.float().split(self.counts, 1), soft_BC.split(self.counts, 1), strict=True
        ):
            loss = loss + F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
        loss.backward()
        self.optimiser.step()


def augmented(pixel_BCHW: Tensor, pad: int = _PAD) -> Tensor:
    """A window of the images' size, shifted by up to ``pad`` pixels over a black border, mirrored half of the time."""
    batch, _, height, width = pixel_BCHW.shape
    device = pixel_BCHW.device
    padded = F.pad(pixel_BCHW, (pad, pad, pad, pad))
    top_B, left_B = torch.randint(0, 2 * pad + 1, (2, batch, 1), device=device)
    y_BH = top_B + torch.arange(height, device=device)
    x_BW = left_B + torch.arange(width, device=device)
    x_BW = torch.where(torch.rand(batch, 1, device=device) < 0.5, x_BW.flip(1), x_BW)
    b_B = torch.arange(batch, device=device)[:, None, None]
    return padded[b_B, :, y_BH[:, :, None], x_BW[:, None, :]].permute(0, 3, 1, 2)


class _Alone:
    """The graph of our step, on the batch that it was given last."""

    def __init__(self, ours: Ours) -> None:
        graph = ours.trainer.stepper.graph
        assert graph is not None and graph.replays, "no step was recorded"
        self._replay, self._batch, self._ours = graph.recorder.replay, ours.trainer.recipe.data.batch, ours

    def steps(self, count: int) -> int:
        for _ in range(count):
            self._replay()
        return count * self._batch

    def close(self) -> None:
        self._ours.close()


class _Still:
    """A recorder that has recorded, and repeats nothing."""

    def warm(self, work: Callable[[], Any]) -> Any:
        raise AssertionError("batches of another shape")

    record = warm

    def replay(self) -> None:
        pass

    def close(self) -> None:
        pass


def opened(name: str, asked: dict[str, Any]) -> Any:
    """A row, ready to take steps."""
    device = choose_device("auto")
    set_up(Run(), device)
    if name.startswith(PLAIN):
        return Plain(build(recipe(asked, False)), compiled=name != PLAIN)
    parts = build(recipe(asked, OURS.get(name, "step")))
    ours = Ours(parts, Path(asked["folder"]) / "rows" / name)
    stepper = ours.trainer.stepper
    if name == "ours, step, not compiled":
        stepper.losses = stepper._losses
    if name in ("step alone", "all but the step"):
        ours.steps(ours.first + 8)
        if name == "step alone":
            return _Alone(ours)
        assert stepper.graph is not None
        stepper.graph.recorder = _Still()
    ours.first += 8  # a step is recorded after some
    return ours


if __name__ == "__main__":
    work(sys.argv[1], json.loads(sys.argv[2]), opened)
