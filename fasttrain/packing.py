"""fasttrain pack: any data set -> one .beton file, which FFCV reads on the CPU and DALI on the GPU.

    fasttrain pack DATASET --root DIR --out FILE [--max-size PX] [--square PX] [--quality Q] [--raw] [--no-seek]
                                                 [--workers N] [--json]
    fasttrain pack --check FILE                  compares a packed file with its checksum

  DATASET       folder (an ImageFolder tree), tar (WebDataset shards), list (CSV or JSONL), voc, cifar10, cifar100,
                stl10, fashion_mnist, elpv, toy, or beton (to pack a packed file anew)
  --max-size    shrink images whose longest side is longer than this, in pixels
  --square      bring all images to centre squares of this side, in pixels
  --quality     of JPEGs that have to be encoded (others keep their bytes), 1 to 100; 90 if not given
  --raw         keep pixels instead of JPEGs: many times the space, no decoding
  --no-seek     leave out the index by which a crop costs its own share of a JPEG, not the whole (a few percent of the size)
  --workers     threads; all cores if not given

Every image is decoded once. What is damaged or no image is left out and listed in FILE.bad.jsonl with the reason; PNG,
CMYK, 16-bit and EXIF-turned images are encoded anew. Class names, splits and checksums lie in FILE.json. After a stop the
same command goes on where it was. Then: fasttrain train RECIPE --data.name beton --data.root FILE
"""

import argparse
import json
from pathlib import Path
from typing import Any

from .loaders import DATASETS, open_dataset
from .loaders.pack import Progress, check, pack


def main(given: list[str]) -> int:
    """Packs, or checks; returns the exit code.

    Raises:
        ValueError: a mistake in the arguments, or what packing raises.
    """
    reader = argparse.ArgumentParser(prog="fasttrain pack", add_help=False, exit_on_error=False, allow_abbrev=False)
    reader.add_argument("dataset", nargs="?")
    for name in ("--root", "--out", "--check"):
        reader.add_argument(name)
    for name, default in (("--max-size", 0), ("--square", 0), ("--quality", 90), ("--workers", 0)):
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
        said = f"{asked.check} is as it was packed: {about['samples']} samples, SHA-256 {about['sha256']}"
        print(json.dumps(about) if asked.json else said)
        return 0
    if asked.dataset is None or asked.out is None:
        raise ValueError(f"pack needs a data set ({', '.join(sorted(DATASETS))}) and --out FILE")
    try:
        dataset = open_dataset(asked.dataset, asked.root)
    except ValueError as error:
        raise ValueError(str(error).replace("data.root", "--root")) from None
    about = _with_progress(dataset, Path(asked.out), asked)
    print(json.dumps(about) if asked.json else _sentence(about, asked.out))
    return 0


def _with_progress(dataset, out: Path, asked) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(dataset), said="")

        def report(now: Progress) -> None:
            said = f"{now.bytes / 2**30:.2f} GiB" + (f", {now.bad} left out" if now.bad else "")
            bar.update(task, completed=now.done, said=said)

        return pack(
            dataset,
            out,
            max_size=asked.max_size,
            square=asked.square,
            quality=asked.quality,
            raw=asked.raw,
            seek=not asked.no_seek,
            workers=asked.workers,
            report=report,
        )


def _sentence(about: dict[str, Any], out: str) -> str:
    parts = ", ".join(f"{name} {sum(b - a for a, b in runs)}" for name, runs in about["splits"].items())
    text = f"{out}: {about['samples']} images ({parts}), {about['bytes'] / 2**20:.0f} MiB; {about['kept']} JPEGs kept"
    return text + (f"; {about['bad']} left out, see {out}.bad.jsonl" if about["bad"] else "")
