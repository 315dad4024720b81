"""Suite ``loaders``: decoding and random-resized crops of JPEGs, ours and others', in images a second.

    fasttrain bench loaders [--data FOLDER|FILE.beton] [--size 128,224] [--batch 128] [--workers N] [--images 1500]
                            [--times K] [--repeats 5] [--budget SECONDS] [--rows NAME,NAME] [--hw 0,0.5,1]
                            [--memory EPOCHS] [--json FILE]

  --data        class folders of images, all of which are used, or a packed file (others' rows then mostly cannot run);
                without it photographs that Debian packages ship are made into files like ImageNet's, once
  --images      how many photographs are made; an epoch should have several batches for each worker, as PyTorch's workers
                make whole batches
  --times       how often an epoch has each image; 1, and 8 with a GPU, where an epoch would be over in no time
  --workers     threads or processes of every row; one for each core if not given
  --budget      seconds for all of it, once the data are there: repeats are fewer, down to 1, and what there is no time left
                to open is not run
  --rows        of these alone; names as in the table
  --hw          shares of JPEGs for the GPU's JPEG engine: a row ``dali gpu`` for each (its own row has our default), and for 0
                and 1 one of ``gpu decode``; with a GPU 0,0.25,0.5,0.8,1 if not given
  --memory      no timing: every row's epochs one after the other, and this process's resident memory after each

Others' rows (benchmarks/peers.py, gpu_loaders.py): ``dataloader (tensor)`` and ``dataloader (pil)``: PyTorch's DataLoader
with torchvision's transforms; ``plain ffcv``: FFCV's own loader, decoder and transforms; ``dali cpu (plain)``, ``dali gpu
(plain)``: DALI's pipeline as it documents it; ``spdl``: SPDL's threads and FFmpeg's filters; ``torchvision gpu``: its
``decode_jpeg`` on whole batches; ``bare decode``: libjpeg-turbo on whole images and nothing else, which no loader that
decodes whole images can beat, and ``gpu decode``: DALI's decoder likewise. Ours: ``torch`` from files, ``ffcv``, ``dali cpu``
and ``dali gpu`` from the same JPEGs packed, ``ffcv (no index)`` from JPEGs packed with ``--no-seek``; ``hybrid``: ``ffcv``
and ``dali gpu`` at once, each with a share of the epoch that is tuned first; ``synthetic`` decodes nothing.

Every row goes through one epoch that does not count; then, ``--repeats`` times, all rows take turns, one epoch each, the
first being another one every time. An epoch's time ends when its last batch is there; figures are medians. Where there is a
GPU, all batches but those of the bare decoders end there, uint8 and channels_last. ``limited_by`` says what of the machine
was fully used in that row's epochs (benchmarks/limits.py), and ``use`` how much of each. ``views and order`` is what our
random numbers cost.
"""

import argparse
import gc
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from fasttrain.loaders import Batch, Dataset, LoaderSpec, ViewPlan, open_dataset, open_loader
from fasttrain.loaders.datasets.beton import Packed
from fasttrain.loaders.ffcv_loader import AT_ONCE
from fasttrain.loaders.order import batches
from fasttrain.loaders.pack import pack
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from . import gpu_loaders, peers, photographs
from .limits import Watch, limit
from .peers import Peer, Task

CACHE = Path("~/.cache/fasttrain/packed")
REFERENCES = ("dataloader (tensor)", "plain ffcv", "bare decode")
VIEWS = "views and order"
HW_SHARES = (0.0, 0.25, 0.5, 0.8, 1.0)
_TO_OPEN = 0.5  # the part of a budget after which no row is opened


@dataclass(frozen=True)
class Data:
    """The same images in three forms, packed with and without a seek index, and which are class folders."""

    folder: Path | None
    files: Dataset
    packed: Dataset
    bare: Dataset


class Ours(Peer):
    """A loader of ours, all of a data set in random-resized crops."""

    def __init__(
        self, name: str, dataset: Dataset, task: Task, device: torch.device | None = None, **options: float
    ) -> None:
        self.device, asked = task.device, spec(dataset, task)
        self.loader = open_loader(name, asked, device or task.device, task.workers, **options)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield replace(batch, pixels=batch.pixels.to(self.device, non_blocking=True))

    def close(self) -> None:
        self.loader.close()


def spec(dataset: Dataset, task: Task) -> LoaderSpec:
    """What all rows of ours load."""
    plan, index_N = ViewPlan(crop="random_resized", flip="horizontal"), np.tile(np.arange(len(dataset)), task.times)
    return LoaderSpec(dataset, index_N, plan, size=task.size, stored=0, batch=task.batch)


def _no_index(data: Data, task: Task) -> Peer:
    if task.packed.raw_N.any():
        raise ValueError("the packed file holds pixels, not JPEGs")
    return Ours("ffcv", data.bare, task)


Row = Callable[[Data, Task], Peer]


def _on_gpu(row: Row) -> Row:
    def opened(data: Data, task: Task) -> Peer:
        if task.device.type != "cuda":
            raise ValueError("it needs a GPU")
        return row(data, task)

    return opened


# those that fork first, while there are no threads of others
ROWS: dict[str, Row] = {
    "dataloader (tensor)": lambda data, task: peers.TorchData(task, pil=False),
    "dataloader (pil)": lambda data, task: peers.TorchData(task, pil=True),
    "torch": lambda data, task: Ours("torch", data.files, task),
    "plain ffcv": lambda data, task: peers.PlainFfcv(task),
    "ffcv": lambda data, task: Ours("ffcv", data.packed, task),
    "ffcv (no index)": _no_index,
    "dali cpu (plain)": lambda data, task: peers.PlainDali(task),
    "dali cpu": lambda data, task: Ours("dali", data.packed, task, torch.device("cpu")),
    "dali gpu (plain)": _on_gpu(lambda data, task: peers.PlainDali(task, mixed=True)),
    "dali gpu": _on_gpu(lambda data, task: Ours("dali", data.packed, task)),
    "hybrid": _on_gpu(lambda data, task: gpu_loaders.Hybrid(task, spec(data.packed, task))),
    "torchvision gpu": _on_gpu(lambda data, task: gpu_loaders.TorchvisionGpu(task)),
    "spdl": lambda data, task: peers.Spdl(task),
    "bare decode": lambda data, task: peers.BareDecode(task),
    "synthetic": lambda data, task: Ours("synthetic", data.packed, task),
}


def share_rows(shares: Sequence[float]) -> dict[str, Row]:
    """Rows in which the GPU's JPEG engine gets these shares."""

    def loader(share: float) -> Row:
        return _on_gpu(lambda data, task: Ours("dali", data.packed, task, hw_decoder_load=share))

    def decoder(share: float) -> Row:
        return _on_gpu(lambda data, task: gpu_loaders.DecodeOnly(task, share))

    rows = {f"dali gpu (hw {share:g})": loader(share) for share in shares}
    return rows | {f"gpu decode (hw {share:g})": decoder(share) for share in shares if share in (0, 1)}


def run(arguments: list[str]) -> dict[str, Any]:
    """Measures; prints tables, and returns rows and what could not run.

    Raises:
        ValueError: arguments that make no sense, or no data.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = _parsed(arguments, device)
    data = prepare(given.data, given.images)
    read = _packed(data.packed)
    content: dict[str, Any] = {"images": len(data.packed), "mean_bytes": float(read.file.size_N.mean())}
    content |= {"batch": given.batch, "workers": given.workers, "device": str(device), "times": given.times}
    content |= {"rows": [], "not_run": {}}
    about = f"{len(data.packed)} images of {content['mean_bytes'] / 1000:.0f} KB, {given.workers} workers"
    if len(data.packed) * given.times < 4 * given.batch * given.workers:
        print("under 4 batches a worker: rows of PyTorch's DataLoader come out too low; see --images", flush=True)
    seconds = given.budget / len(given.size) if given.budget else math.inf
    for size in given.size:
        task = Task(data.folder, read, size, given.batch, given.workers, device, given.times)
        title = f"{size} px, batch {given.batch}, {about}, {device}"
        if given.memory:
            print(f"resident MiB after each epoch; {title}", flush=True)
            content["rows"] += _memory(data, task, given.rows, given.memory, content["not_run"])
            continue
        rows = _timed(data, task, given.rows, given.repeats, seconds, content["not_run"])
        views = _views(data.packed, task, given.repeats, rows)
        content["rows"] += rows
        content.setdefault("views_and_order", []).append(views)
        _print(title, rows, views)
    return content


def _parsed(arguments: list[str], device: torch.device) -> argparse.Namespace:
    cuda = device.type == "cuda"
    parser = argparse.ArgumentParser(prog="fasttrain bench loaders", exit_on_error=False, add_help=False)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--size", type=lambda text: [int(part) for part in text.split(",")], default=[128, 224])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--times", type=int, default=8 if cuda else 1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.0)
    parser.add_argument("--rows", type=lambda text: [part.strip() for part in text.split(",")])
    parser.add_argument("--hw", type=lambda text: [float(part) for part in text.split(",") if part])
    parser.add_argument("--memory", type=int, default=0)
    try:
        given, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"bench loaders: {error}") from None
    numbers = (*given.size, given.batch, given.workers, given.images, given.times, given.repeats)
    if rest or min(numbers) < 1 or given.memory < 0 or given.budget < 0:
        raise ValueError(
            f"bench loaders: {' '.join(rest) or 'numbers must be above 0'}; see `fasttrain bench loaders -h`"
        )
    outside = [share for share in given.hw or () if not 0 <= share <= 1]
    if outside:
        raise ValueError(f"bench loaders: --hw {outside[0]:g} is no share, 0 to 1")
    shares = share_rows(HW_SHARES if given.hw is None and cuda else given.hw or ())
    rows = ROWS | shares
    unknown = [name for name in given.rows or () if name not in rows]
    if unknown:
        raise ValueError(f"bench loaders: there is no row {unknown[0]!r}; there are {', '.join(rows)}")
    asked = [*(given.rows or ROWS), *(shares if given.hw or not given.rows else ())]
    given.rows = {name: row for name, row in rows.items() if name in asked}
    return given


def prepare(data: Path | None, images: int) -> Data:
    """Makes photographs where no data are named, and packs what is not packed yet, into the user's cache.

    Raises:
        ValueError: there are no data, or they have changed since they were packed.
    """
    if data is None:
        data = photographs.CACHE.expanduser().with_name(f"photographs-{images}")
        print(f"photographs: {data}", flush=True)
        photographs.make(data, images)
    path = data.expanduser().resolve()
    cache = CACHE.expanduser() / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    folder = path if path.is_dir() else None
    files = open_dataset("folder" if folder else "beton", path)
    packed = files if folder is None else _pack(files, cache / "packed.beton", seek=True)
    jpegs = not _packed(packed).raw_N.any()
    bare = _pack(files, cache / "bare.beton", seek=False) if jpegs else packed
    return Data(folder, files, packed, bare)


def _pack(dataset: Dataset, out: Path, *, seek: bool) -> Dataset:
    print(f"packed: {out}", flush=True)
    pack(dataset, out, seek=seek)
    return open_dataset("beton", out)


def _packed(dataset: Dataset) -> Packed:
    assert isinstance(dataset.read, Packed)
    return dataset.read


def _epoch(peer: Peer, device: torch.device) -> tuple[int, float]:
    """Goes through an epoch: (images, seconds until the last batch was there)."""
    images, start = 0, time.perf_counter()
    end = start
    for batch in peer:
        images += len(batch)
        _ready(batch, device)
        end = time.perf_counter()
    if device.type == "cuda":
        waits = time.perf_counter()
        torch.cuda.synchronize()
        end += time.perf_counter() - waits
    return images, end - start


def _ready(batch: Any, device: torch.device) -> None:
    """What a training would be given: nothing is done to pixels that are so already."""
    pixels = getattr(batch, "pixels", batch)
    if isinstance(pixels, torch.Tensor):
        assert pixels.dtype == torch.uint8 and pixels.device.type == device.type
        pixels.contiguous(memory_format=torch.channels_last)


def _opened(data: Data, task: Task, name: str, row: Row, not_run: dict[str, str]) -> tuple[Peer, float] | None:
    """A row after its first epoch, and how long that took; None where it cannot run."""
    peer: Peer | None = None
    try:
        peer = row(data, task)
        return peer, _epoch(peer, task.device)[1]
    except Exception as error:  # missing parts, broken installations: the other rows can run
        not_run[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if peer is not None:
            peer.close()
        return None


def _timed(
    data: Data, task: Task, rows: dict[str, Row], repeats: int, seconds: float, not_run: dict[str, str]
) -> list[dict[str, Any]]:
    began, first_epochs = time.perf_counter(), 0.0
    opened: dict[str, Peer] = {}
    for name, row in rows.items():
        if time.perf_counter() - began > _TO_OPEN * seconds:
            not_run[name] = f"--budget: {seconds:.0f} s for {task.size} px left no time to open it"
        elif found := _opened(data, task, name, row, not_run):
            opened[name], first_epochs = found[0], first_epochs + found[1]
    if seconds < math.inf:
        left = seconds - (time.perf_counter() - began)
        repeats = max(min(repeats, int(left / max(first_epochs, 1e-9))), 1)
    speeds: dict[str, list[float]] = {name: [] for name in opened}
    watches = {name: Watch(task.device) for name in opened}
    for repeat in range(repeats):
        first = repeat % max(len(opened), 1)
        for name in [*list(opened)[first:], *list(opened)[:first]]:
            gc.collect()
            gc.disable()
            with watches[name]:
                images, took = _epoch(opened[name], task.device)
            gc.enable()
            speeds[name].append(images / took)
    out = []
    medians = {name: median(found) for name, found in speeds.items()}
    for name, peer in opened.items():
        use = watches[name].figures()
        about = {"share": peer.share} if isinstance(peer, gpu_loaders.Hybrid) else {}
        out.append(
            {
                "name": name,
                "size": task.size,
                "images_per_s": medians[name],
                "relative_to": {r: medians[name] / medians[r] for r in REFERENCES if r in medians and r != name},
                "repeats": speeds[name],
                "use": use,
                "limited_by": limit(use, os.cpu_count() or 1),
                **about,
            }
        )
        peer.close()
    return out


def _views(packed: Dataset, task: Task, repeats: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What an epoch's order and views take, computed for as many samples at once as the ffcv loader does."""
    asked, file, found = spec(packed, task), task.packed.file, []
    for epoch in range(repeats + 1):
        start = time.perf_counter()
        parts = list(batches(asked.epoch_order(epoch), global_batch=task.batch))
        together = max(AT_ONCE // task.batch, 1)
        for first in range(0, len(parts), together):
            index_N = np.concatenate(parts[first : first + together])
            asked.view(epoch, index_N, file.height_N[index_N], file.width_N[index_N])
        found.append((time.perf_counter() - start) * 1e3)
    row: dict[str, Any] = {"name": VIEWS, "size": task.size, "ms_per_epoch": median(found[1:])}
    for other in rows:
        if other["name"] == "ffcv":
            row["share"] = row["ms_per_epoch"] / (len(asked.index_N) / other["images_per_s"] * 1e3)
    return row


def _memory(
    data: Data, task: Task, asked: dict[str, Row], epochs: int, not_run: dict[str, str]
) -> list[dict[str, Any]]:
    rows = []
    for name, row in asked.items():
        opened = _opened(data, task, name, row, not_run)
        if opened is None:
            continue
        peer, found = opened[0], []
        for _ in range(epochs):
            _epoch(peer, task.device)
            gc.collect()
            found.append(_resident_mib())
        peer.close()
        rows.append({"name": name, "size": task.size, "resident_mib": found})
        print(f"{name:20} {' '.join(f'{mib:.0f}' for mib in found)}", flush=True)
    return rows


def _resident_mib() -> float:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def _print(title: str, rows: list[dict[str, Any]], views: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column("row", no_wrap=True)
    for heading in ("images/s", "least", "most"):
        table.add_column(heading, justify="right", no_wrap=True)
    for reference in REFERENCES:
        table.add_column(reference, justify="right", width=max(map(len, ("0.00 x", *reference.split()))))
    for row in rows:
        ratios = [f"{row['relative_to'][r]:.2f} x" if r in row["relative_to"] else "" for r in REFERENCES]
        figures = [row["images_per_s"], min(row["repeats"]), max(row["repeats"])]
        table.add_row(row["name"], *(f"{figure:.0f}" for figure in figures), *ratios)
    console.print(table)
    for row in rows:
        use = ", ".join(f"{name} {value:.2f}" for name, value in row["use"].items())
        console.print(f"{row['name']}: {row['limited_by']} ({use})", highlight=False, soft_wrap=True)
    share = f", {100 * views['share']:.2f} % of an epoch of ffcv" if "share" in views else ""
    console.print(f"{VIEWS}: {views['ms_per_epoch']:.2f} ms an epoch{share}", highlight=False)
