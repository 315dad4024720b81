"""fasttrain pack: any data set -> one .beton file, which FFCV reads on the CPU and DALI on the GPU.

    fasttrain pack DATASET --root DIR --out FILE [--max-size PX] [--square PX] [--quality Q] [--raw] [--no-seek]
                                                 [--workers N] [--json]
    fasttrain pack VIDEOS --root DIR --out FILE [--short-side PX] [--quality Q] [--no-seek] [--split N] [--workers N]
                                                [--json]
    fasttrain pack --check FILE                  compares a packed file with its checksum

  DATASET       folder (an ImageFolder tree), tar (WebDataset shards), list (CSV or JSONL), voc, cifar10, cifar100,
                stl10, fashion_mnist, elpv, toy, or beton (to pack a packed file anew)
  VIDEOS        ucf101, hmdb51, kinetics400, videos (CSV or JSONL), motion, or beton
  --max-size    shrink images whose longest side is longer than this, in pixels
  --square      bring all images to centre squares of this side, in pixels
  --short-side  shrink videos whose shorter side is longer than this, in pixels; 128 if not given, 0 for none
  --quality     of JPEGs that have to be encoded (images' own keep their bytes), 1 to 100; 90 if not given
  --raw         keep pixels instead of JPEGs: many times the space, no decoding
  --no-seek     leave out the index by which a crop costs its own share of a JPEG, not the whole (a few percent of the size)
  --split       of ucf101 and hmdb51: which of the three official splits the file is to have; 1 if not given
  --workers     threads; all cores if not given

Every image is decoded once. What is damaged or no image is left out and listed in FILE.bad.jsonl with the reason; PNG,
CMYK, 16-bit and EXIF-turned images are encoded anew. Class names, splits and checksums lie in FILE.json. After a stop the
same command goes on where it was. Then: fasttrain train RECIPE --data.name beton --data.root FILE

Of videos all frames are kept, as JPEGs, one video's after the other: a clip then costs decoding its own frames only. PyAV
decodes them here, whatever data.decoder is elsewhere. A video that breaks anywhere is left out. The last line says how
much space that takes, and how alike (SSIM of the luminance, 1: equal) 16 packed frames and the originals are at a
shorter side of 112 pixels. Memory: each thread keeps the JPEGs of two videos.
"""

import argparse
import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .files import in_words
from .loaders import DATASETS, Dataset, open_dataset
from .loaders.datasets.base import Encoded
from .loaders.growing import Progress
from .loaders.pack import check, pack
from .loaders.pack_video import pack_videos


def main(given: list[str]) -> int:
    """Packs, or checks; returns the exit code.

    Raises:
        ValueError: a mistake in the arguments, or what packing raises.
    """
    reader = argparse.ArgumentParser(prog="fasttrain pack", add_help=False, exit_on_error=False, allow_abbrev=False)
    reader.add_argument("dataset", nargs="?")
    for name in ("--root", "--out", "--check"):
        reader.add_argument(name)
    for name in ("--max-size", "--square", "--short-side"):
        reader.add_argument(name, type=int)
    for name, default in (("--quality", 90), ("--split", 1), ("--workers", 0)):
        reader.add_argument(name, type=int, default=default)
    for name in ("--raw", "--no-seek", "--json"):
        reader.add_argument(name, action="store_true")
    try:
        asked, unknown = reader.parse_known_args(given)
    except argparse.ArgumentError as error:
        raise ValueError(f"pack: {error}") from None
    if unknown:
        raise ValueError(f"pack: what is {unknown[0]!r}? See `fasttrain pack -h`")
    if asked.check:
        about = check(Path(asked.check))
        print(json.dumps(about) if asked.json else _checked(about, asked.check))
        return 0
    if asked.dataset is None or asked.out is None:
        raise ValueError(f"pack needs a data set ({', '.join(sorted(DATASETS))}) and --out FILE")
    try:
        dataset = open_dataset(asked.dataset, asked.root, split=asked.split)
    except ValueError as error:
        raise ValueError(re.sub(r"\bdata\.(root|split)\b", r"--\1", str(error))) from None
    _insist_on_room(dataset, Path(asked.out), asked)
    about = _with_progress(dataset, Path(asked.out), asked)
    print(json.dumps(about) if asked.json else _sentence(about, asked.out))
    return 0


def _given(dataset: Dataset, asked: argparse.Namespace) -> dict[str, Any]:
    """The options that are of images or of videos alone, as far as they are given.

    Raises:
        ValueError: one of them is of the other kind.
    """
    of_images = {"max_size": asked.max_size, "square": asked.square, "raw": asked.raw or None}
    of_videos = {"short_side": asked.short_side}
    right, wrong = (of_videos, of_images) if dataset.video else (of_images, of_videos)
    kind, holds, instead = ("images", "videos", "--short-side") if dataset.video else ("videos", "images", "--max-size")
    for name in (k for k, v in wrong.items() if v is not None):
        option = f"--{name.replace('_', '-')}"
        raise ValueError(f"{option} is for {kind}, and {dataset.name} holds {holds}, for which there is {instead}")
    return {k: v for k, v in right.items() if v is not None}


def _insist_on_room(dataset: Dataset, out: Path, asked: argparse.Namespace) -> None:
    """Refuses to begin to keep pixels where the disk cannot hold them; whether files' own bytes fit, ``pack`` knows.

    Raises:
        ValueError: with both figures.
    """
    begun = out.exists() or out.with_name(f"{out.name}.partial").exists()
    if begun or dataset.video or not (asked.raw or not isinstance(dataset.read, Encoded)):
        return
    need = _pixel_bytes(dataset, asked.max_size or 0, asked.square or 0)
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if need > free:
        raise ValueError(
            f"--out: {place} has {in_words(free)} free, and the pixels of {dataset.name} take about {in_words(need)}; "
            "--square and --max-size make them smaller"
        )


def _pixel_bytes(dataset: Dataset, max_size: int, square: int) -> int:
    """Bytes of all images as pixels, from the sizes of some of them; 0 if none can be read."""
    sizes = []
    for index in np.linspace(0, len(dataset) - 1, min(len(dataset), 64)).astype(int).tolist():
        with suppress(ValueError):  # packing will leave it out
            read = dataset.read
            height, width = read.size(index) if isinstance(read, Encoded) else read(index).shape[:2]
            factor = min(1.0, max_size / max(height, width)) if max_size else 1.0
            sizes.append(3 * (square**2 if square else round(height * factor) * round(width * factor)))
    return len(dataset) * sum(sizes) // max(len(sizes), 1)


def _with_progress(dataset: Dataset, out: Path, asked: argparse.Namespace) -> dict[str, Any]:
    options = {"quality": asked.quality, "seek": not asked.no_seek, "workers": asked.workers} | _given(dataset, asked)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(dataset), said="looking through the files" if dataset.video else "")

        def report(now: Progress) -> None:
            said = f"{now.bytes / 2**30:.2f} GiB" + (f", {now.bad} left out" if now.bad else "")
            bar.update(task, completed=now.done, said=said)

        return (pack_videos if dataset.video else pack)(dataset, out, **options, report=report)


def _sentence(about: dict[str, Any], out: str) -> str:
    parts = ", ".join(f"{name} {sum(b - a for a, b in runs)}" for name, runs in about["splits"].items())
    size, left_out = f"{about['bytes'] / 2**20:.0f} MiB", f"; {about['bad']} left out, see {out}.bad.jsonl"
    if "videos" in about:
        text = f"{out}: {len(about['videos']['names'])} videos ({parts}), {about['samples']} frames, {size}, "
        text += f"{about['bytes'] / about['samples']:.0f} bytes a frame{_alike(about['ssim_112'])}"
    else:
        text = f"{out}: {about['samples']} images ({parts}), {size}; {about['kept']} JPEGs kept"
    return text + (left_out if about["bad"] else "")


def _alike(ssim: dict[str, Any]) -> str:
    if not ssim["frames"]:
        return ""
    said = f"; SSIM {ssim['mean']:.3f}, lowest {ssim['lowest']:.3f} (in colour {ssim['colour']:.3f})"
    return f"{said}, at 112 px of {ssim['frames']} frames"


def _checked(about: dict[str, Any], path: str) -> str:
    videos = f"{len(about['videos']['names'])} videos, " if "videos" in about else ""
    counts = f"{videos}{about['samples']} {'frames' if videos else 'samples'}"
    return f"{path} is as it was packed: {counts}, SHA-256 {about['sha256']}"
