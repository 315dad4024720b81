"""Suite ``video``: clips a second of decoders on files as they are published, and of packed ones.

    fasttrain bench video [--sets ucf,kinetics] [--data NAME=ROOT] [--videos 16] [--clips 128] [--frames 16] [--size 112]
                          [--batch 32] [--workers N] [--short-side 128] [--quality 90] [--repeats 5] [--rows NAME,NAME]
                          [--device auto|cpu|cuda] [--budget SECONDS] [--json FILE]

  --sets         kinds of made-up files, see benchmarks/clips.py: ucf (xvid 320 x 240, a key frame every 12), kinetics (H.264
                 340 x 256, up to 250); kept in the user's cache, --videos of each
  --data         real videos instead, such as ucf101=/data/UCF101 (a data set and its root)
  --clips        how many a row serves in a turn, at most (slow rows fewer, about ten seconds)
  --rows         of these alone: pyav, decord, torchcodec, dali, bare decord, packed, bare decode, and on a GPU dali nvdec,
                 torchcodec nvdec, pynvvideocodec, pynvvideocodec nv12, packed nvjpeg (see benchmarks/video_gpu.py)
  --device       where batches shall end; auto: on a GPU where there is one (only bare rows stay on the CPU)
  --budget       of all rows in seconds: turns are shorter and fewer, and a row for which no time is left is not run. Making and
                 packing sets, compiling and SSIM come on top

Rows of a decoder and ``packed`` are our video loader: clips of --frames frames at random places, cut by multi-scale corner crops
to --size pixels, mirrored at random, in batches. They serve the same clips of the same videos, over and over. ``packed`` reads
what `fasttrain pack` makes of the files (--short-side, --quality). ``bare decord``: the frames of the same clips in as many
threads, as a script with decord would read them, nothing cut. ``bare decode``: the same as ``packed`` without batches, threads or
order around it but for the threads themselves. Rows take turns, --repeats times; figures are medians. SSIM is between frames of
the packed file and those of the files themselves (PyAV), each as a whole brought to --size x --size pixels: in colour, and of
the luminance alone. ``cores``: those of the CPU that were in use, on average.
"""

import argparse
import copy
import gc
import hashlib
import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from fasttrain.loaders import ClipPlan, Dataset, LoaderSpec, ViewPlan, open_dataset, open_loader
from fasttrain.loaders.pack_video import LUMINANCE, pack_videos, ssim
from fasttrain.loaders.video import Clips, PackedClips
from fasttrain.loaders.video.decoders import why_pyav
from fasttrain.loaders.video.files import VideoFiles
from fasttrain.loaders.video_loader import VideoLoader
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fasttrain.device import choose_device
from fasttrain.gpu_use import Use

from . import clips, video_gpu

_EPOCH = 64  # batches, at least
CACHE = Path("~/.cache/fasttrain/clips-like")
DECODERS = ("pyav", "decord", "torchcodec", "dali")
ROWS = (*DECODERS, "bare decord", "packed", "bare decode")
_GPU_USE = ("gpu_percent", "nvdec_percent", "jpeg_percent")
_TURN = float(os.environ.get("FASTTRAIN_BENCH_TURN", "10"))  # seconds, of a row that is slow


@dataclass
class Set:
    """One set of videos: its name in rows, the files, and what was packed of them."""

    name: str
    files: tuple[str, Path]
    packed: Dataset

    def dataset(self, decoder: str) -> Dataset:
        return open_dataset(*self.files, decoder=decoder)


def run(arguments: list[str]) -> dict[str, Any]:
    """Measures; prints tables, and returns rows and what could not run.

    Raises:
        ValueError: arguments that make no sense, or no data.
    """
    given = _parsed(arguments)
    content: dict[str, Any] = {k: v for k, v in vars(given).items() if k not in ("rows", "data", "sets")}
    content |= {"rows": [], "sets": [], "not_run": {}, "device": str(given.device)}
    left, count = float(given.budget or "inf"), 1 if given.data else len(given.sets)
    for number, one in enumerate(_asked(given)):
        about = _about(one, given)  # first: it has the decoder compiled
        content["sets"].append(about)
        begun = time.monotonic()
        rows = _timed(one, given, content["not_run"], begun + left / (count - number))
        content["rows"] += rows
        _print(one, given, rows, about)
        left = max(left - (time.monotonic() - begun), 0)
    return content


def _parsed(arguments: list[str]) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [part.strip() for part in text.split(",")]

    parser = argparse.ArgumentParser(prog="fasttrain bench video", exit_on_error=False, add_help=False)
    parser.add_argument("--sets", type=names, default=list(clips.KINDS))
    parser.add_argument("--data")
    parser.add_argument("--rows", type=names)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget", type=int, default=0)
    numbers = {"videos": 16, "clips": 128, "frames": 16, "size": 112, "batch": 32, "short-side": 128, "quality": 90}
    for name, default in (numbers | {"repeats": 5, "workers": len(os.sched_getaffinity(0))}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    try:
        given, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"bench video: {error}") from None
    least = min(getattr(given, name.replace("-", "_")) for name in (*numbers, "repeats", "workers"))
    if rest or least < 1 or given.clips < given.batch or given.budget < 0:
        what = " ".join(rest) or "a number below 1, or fewer --clips than --batch"
        raise ValueError(f"bench video: what is {what}? See `fasttrain bench video -h`")
    given.device = choose_device(given.device)
    on_gpu = given.device.type == "cuda"
    given.rows = given.rows or [*ROWS, *(video_gpu.ROWS if on_gpu else ())]
    every = (*ROWS, *video_gpu.ROWS)
    for asked, known, option in ((given.sets, clips.KINDS, "--sets"), (given.rows, every, "--rows")):
        for name in asked:
            if name not in known:
                raise ValueError(f"bench video: {option}: there is no {name!r}; there are {', '.join(known)}")
    return given


def _asked(given: argparse.Namespace) -> Iterator[Set]:
    if not given.data:
        return sets(given.sets, videos=given.videos, short_side=given.short_side, quality=given.quality)
    name, _, root = given.data.partition("=")
    files = {name: (name, Path(root).expanduser().resolve())}
    return _packed(files, short_side=given.short_side, quality=given.quality)


def sets(kinds: list[str], *, videos: int, short_side: int, quality: int) -> Iterator[Set]:
    """The made-up sets, made and packed where they are not there yet.

    Args:
        kinds: keys of :data:`benchmarks.clips.KINDS`.
        videos: of each.
        short_side, quality: of packed frames.
    """
    cache = CACHE.expanduser()
    folders = {kind: clips.make(cache / f"{kind}-{videos}", kind, videos) for kind in kinds}
    files = {f"{kind}-like": ("videos", folder) for kind, folder in folders.items()}
    return _packed(files, short_side=short_side, quality=quality)


def _packed(files: dict[str, tuple[str, Path]], *, short_side: int, quality: int) -> Iterator[Set]:
    for name, (kind, root) in files.items():
        made_of = f"{kind} {root} {short_side} {quality}"
        out = CACHE.expanduser() / f"{name}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}.beton"
        print(f"packed: {out}", flush=True)
        pack_videos(open_dataset(kind, root), out, short_side=short_side, quality=quality)
        yield Set(name, (kind, root), open_dataset("beton", out))


def _spec(dataset: Dataset, given: argparse.Namespace, **changes: Any) -> LoaderSpec:
    """What every row loads."""
    made: dict[str, Any] = {"plan": ViewPlan("corner"), "size": given.size, "stored": 0, "batch": given.batch}
    made |= {"index_N": np.arange(len(dataset)), "clip": ClipPlan(given.frames)}
    return LoaderSpec(dataset, **made | changes)


def _repeated(dataset: Dataset, given: argparse.Namespace) -> Dataset:
    """Its videos again and again, each time under another number, so that a clip of it begins elsewhere: an epoch of few batches
    would be over before threads are busy, and files that are open already would be met too often."""
    read, times = dataset.read, -(-_EPOCH * given.batch // len(dataset))
    if isinstance(read, PackedClips):
        made: Clips = copy.copy(read)
        made.first_V, made.names = np.tile(read.first_V[:-1], times), [*read.names] * times  # type: ignore[attr-defined]
        made.shape_N3 = np.tile(read.shape_N3, (times, 1))
    else:
        assert isinstance(read, VideoFiles)
        made = VideoFiles(read.paths * times, read.decoder)
    return replace(dataset, read=made, targets_N=np.tile(dataset.targets_N, times))


class _Loaded:
    """Our loader, batch after batch, through as many epochs as it takes."""

    def __init__(self, dataset: Dataset, given: argparse.Namespace) -> None:
        self.loader = open_loader("video", _spec(dataset, given), given.device, workers=given.workers)
        self._walk = self._batches()

    def _batches(self) -> Iterator[int]:
        while True:
            yield from map(len, self.loader)

    def serve(self, clips_wanted: int) -> int:
        served = 0
        while served < clips_wanted:
            served += next(self._walk)
        return served

    def close(self) -> None:
        self.loader.close()


class _Bare:
    """The same clips, without a loader: threads that take one after the other."""

    def __init__(self, dataset: Dataset, given: argparse.Namespace) -> None:
        self.spec = _spec(dataset, given)
        self.given, self._pool, self._at = given, ThreadPoolExecutor(given.workers), 0
        self._loader = VideoLoader(self.spec, workers=1)

    def serve(self, clips_wanted: int) -> int:
        def one(epoch_and_index: tuple[int, int]) -> None:
            self.show(*epoch_and_index)

        todo = list(itertools.islice(self._samples(), clips_wanted))
        self._at += clips_wanted
        list(self._pool.map(one, todo))
        return clips_wanted

    def _samples(self) -> Iterator[tuple[int, int]]:
        """(epoch, index) in the order of the epochs, from where the last turn ended."""
        count = len(self.spec.index_N)
        for epoch in itertools.count(self._at // count):
            skip = self._at % count if epoch == self._at // count else 0
            yield from ((epoch, int(i)) for i in self.spec.epoch_order(epoch)[skip:])

    def show(self, epoch: int, index: int) -> None:
        size = self.given.size
        clip_TSSC = np.empty((self.given.frames, size, size, 3), dtype=np.uint8)
        self._loader._show(index, epoch, clip_TSSC, np.empty((0, 0, 3), dtype=np.uint8))

    def close(self) -> None:
        self._pool.shutdown()


class _BareDecord(_Bare):
    def show(self, epoch: int, index: int) -> None:
        import decord

        read, clip = self.spec.dataset.read, self.spec.clip
        assert clip is not None
        reader = decord.VideoReader(read.name(index), num_threads=1)  # type: ignore[attr-defined]
        one = np.array([index])
        frame_1T = clip(seed=0, number_B=np.array([epoch]), index_B=one, count_B=np.array([len(reader)]))
        reader.get_batch(frame_1T[0].tolist()).asnumpy()


def _opened(name: str, one: Set, given: argparse.Namespace) -> Any:
    packed = _repeated(one.packed, given)
    if name == "packed":
        return _Loaded(packed, given)
    if name == "bare decode":
        return _Bare(packed, given)
    if name == "bare decord":
        import decord  # noqa: F401

        return _BareDecord(_repeated(one.dataset("decord"), given), given)
    if name in video_gpu.ROWS:
        if given.device.type != "cuda":
            raise ValueError("it needs a CUDA device")
        given_set = packed if name.startswith("packed") else _repeated(one.dataset("pyav"), given)
        return video_gpu.open_row(name, _spec(given_set, given), given.device, given.workers)
    dataset = one.dataset(name)
    read = dataset.read
    left = [why_pyav(name, scan) for scan in read.scans] if isinstance(read, VideoFiles) else []
    if left and all(left):
        raise ValueError(f"{name} would leave all of them to PyAV: {left[0]}")
    return _Loaded(_repeated(dataset, given), given)


def _timed(
    one: Set, given: argparse.Namespace, not_run: dict[str, str], end: float = float("inf")
) -> list[dict[str, Any]]:
    """``end``: by ``time.monotonic``, when the last turn is to be over; half of the time until then is for opening rows."""
    opened: dict[str, Any] = {}
    counts: dict[str, int] = {}
    once: dict[str, float] = {}
    begun = time.monotonic()
    for name in given.rows:
        try:
            if time.monotonic() > (begun + end) / 2:
                raise ValueError("--budget leaves no time for it")
            row = _opened(name, one, given)
            _seconds(row, given.batch, given)  # compiles, opens, warms the page cache
            once[name] = _seconds(row, 2 * given.batch, given) / 2  # at once, while no batch is ready
        except Exception as error:  # missing parts: the other rows can run
            not_run[f"{one.name} {name}"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            continue
        opened[name] = row
    repeats, turn = _turns(list(once.values()), end - time.monotonic(), given)
    for name, took in once.items():
        counts[name] = max(2 * given.batch, min(given.clips, int(turn / took * given.batch)))
    found: dict[str, list[_Turn]] = {name: [] for name in opened}
    with closing(Use(given.device, print, gauge=video_gpu.decoder_gauge(given.device), every=0.2)) as use:
        for repeat in range(repeats):
            first = repeat % max(len(opened), 1)
            for name in [*list(opened)[first:], *list(opened)[:first]]:
                found[name].append(_take_turn(opened[name], counts[name], found[name], turn, given, use))
            if time.monotonic() > end:
                break
    for row in opened.values():
        row.close()
    return _rows(one, found)


def _ahead(given: argparse.Namespace) -> int:
    """Batches that a row may have ready when its turn begins, at most."""
    return max(3, -(-4 * given.workers // given.batch))


def _turns(once: list[float], left: float, given: argparse.Namespace) -> tuple[int, float]:
    """How many turns each row may have, and of how many seconds.

    Args:
        once: seconds of a batch, of each row.
        left: seconds for all turns; each begins with batches that were made ahead.
    """
    for repeats in range(given.repeats, 0, -1):
        turn = (left / repeats - (_ahead(given) + 2) * sum(once)) / max(len(once), 1)
        if turn >= min(1.0, _TURN):
            return repeats, min(turn, _TURN)
    return 1, min(1.0, _TURN)


@dataclass
class _Turn:
    """Clips a second, seconds of CPU a second, and what the GPU did, as ``fasttrain.gpu_use`` names it."""

    speed: float
    cores: float
    gpu: dict[str, float]


def _take_turn(row: Any, count: int, before: list[_Turn], turn: float, given: argparse.Namespace, use: Use) -> _Turn:
    # fast rows serve more in a turn, so that it can be timed well
    rounds = max(1, min(50, round(turn / 10 / _last([t.speed for t in before], count, turn))))
    gc.collect()
    if not isinstance(row, _Bare):  # what was made ahead while another row was timed
        row.serve(_ahead(given) * given.batch)
    use.lately()
    wall, cpu = time.perf_counter(), time.process_time()
    took = sum(_seconds(row, count, given) for _ in range(rounds))
    cores = (time.process_time() - cpu) / (time.perf_counter() - wall)
    gpu = {name: value for name, value in use.lately().items() if name in _GPU_USE}
    return _Turn(count * rounds / took, cores, gpu)


def _rows(one: Set, found: dict[str, list[_Turn]]) -> list[dict[str, Any]]:
    medians = {name: median(t.speed for t in turns) for name, turns in found.items()}
    plain = [name for name in DECODERS if name in medians]
    rows = []
    for name, turns in found.items():
        references = {"best plain": max(medians[p] for p in plain)} if plain else {}
        references |= {r: medians[r] for r in ("bare decode", "bare decord") if r in medians and r != name}
        row: dict[str, Any] = {"name": f"{one.name} {name}", "clips_per_s": medians[name]}
        row |= {"relative_to": {r: medians[name] / speed for r, speed in references.items()}}
        row |= {"repeats": [t.speed for t in turns], "cores": median(t.cores for t in turns)}
        told = set.intersection(*(set(t.gpu) for t in turns))
        rows.append(row | {name: median(t.gpu[name] for t in turns) for name in sorted(told)})
    return rows


def _last(speeds: list[float], count: int, turn: float) -> float:
    """Seconds that ``count`` clips took in the last turn; a tenth of a turn where there was none."""
    return count / speeds[-1] if speeds else turn / 10


def _seconds(row: Any, count: int, given: argparse.Namespace) -> float:
    start = time.perf_counter()
    served = row.serve(count)
    if given.device.type == "cuda":
        torch.cuda.synchronize(given.device)
    return (time.perf_counter() - start) * count / served


def _about(one: Set, given: argparse.Namespace) -> dict[str, Any]:
    """Sizes of the files and of what was packed, and how alike their pictures are."""
    read = one.dataset("pyav").read
    frames = int(read.shape_N3[:, 0].sum())  # type: ignore[attr-defined]
    count = len(one.packed)
    out: dict[str, Any] = {"name": one.name, "videos": count, "frames": frames}
    out["bytes_per_frame"] = read.total_bytes(count) / frames  # type: ignore[attr-defined]
    out["packed_bytes_per_frame"] = Path(one.packed.source).stat().st_size / frames
    colour, luminance = _ssim(one, given)
    for name, value_F in (("ssim_colour", colour), ("ssim_luminance", luminance)):
        out[name] = {"mean": float(value_F.mean()), "least": float(value_F.min())}
    return out


def _ssim(one: Set, given: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Of eight frames of each of 16 videos, in colour and in luminance: [frames] each."""
    whole = {"plan": ViewPlan("pad", pad=0, flip="none"), "clip": ClipPlan(8, 5, 1), "shuffle": False, "batch": 1}
    colour, luminance = [], []
    specs = [
        _spec(d, given, **whole | {"index_N": np.arange(min(16, len(d)))}) for d in (one.dataset("pyav"), one.packed)
    ]
    loaders = [open_loader("video", s, workers=given.workers) for s in specs]
    for batches in zip(*loaders, strict=True):
        theirs, ours = (batch.pixels[0].transpose(0, 1).float() for batch in batches)
        colour.append(ssim(theirs, ours))
        luminance.append(ssim(*((p * LUMINANCE).sum(1, keepdim=True) for p in (theirs, ours))))
    for loader in loaders:
        loader.close()
    return torch.cat(colour), torch.cat(luminance)


def _print(one: Set, given: argparse.Namespace, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    title = f"{about['videos']} videos, {given.frames} frames at {given.size} px, batch {given.batch}, "
    title += f"{given.workers} threads, to {given.device}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("row", no_wrap=True)
    references = ("best plain", "bare decord", "bare decode")
    for heading in ("clips/s", "least", "most", *(f"x {r}" for r in references)):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        figures = [f"{f:.1f}" for f in (row["clips_per_s"], min(row["repeats"]), max(row["repeats"]))]
        ratios = [f"{row['relative_to'][r]:.2f}" if r in row["relative_to"] else "" for r in references]
        table.add_row(row["name"], *figures, *ratios)
    console = Console()
    console.print(table)
    said = [f"{about['bytes_per_frame']:.0f} bytes a frame, packed {about['packed_bytes_per_frame']:.0f}"]
    for of in ("colour", "luminance"):
        found = about[f"ssim_{of}"]
        said.append(f"SSIM in {of} {found['mean']:.4f} (least {found['least']:.4f})")
    console.print("; ".join(said), highlight=False, soft_wrap=True)
