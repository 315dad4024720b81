"""JPEG files like ImageNet's, made of photographs that Debian packages ship, for the loader benchmark.

    python -m fasttrain.benchmarks.photographs --out FOLDER [--count N] [--cache FOLDER] [--workers N]

500 x 375 pixels, a quarter of them upright, baseline, 4:2:0, 70 to 110 KB of 1000 bytes (ImageNet's mean is about 110):
each a random crop of a photograph, of the file's proportions and no smaller than it, at the quality that gives the size
drawn for it. Photographs in packages are soft, so qualities are higher than ImageNet's, and a few files stay smaller. The
crops are a pure function of the file's number and the photographs; the bytes also depend on Pillow's JPEG library.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache as remembered
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from fasttrain.loaders.philox import draw, uniform
from PIL import Image
from rich.progress import track

PACKAGES = (
    "gcompris-qt-data",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
)
# of GCompris and of Plasma these; of the others all but what is drawn, abstract or too even for files of this size
ACTIVITIES = (
    *("clickgame", "erase", "explore_farm_animals", "explore_monuments"),
    *("explore_world_animals", "explore_world_music"),
)
WALLPAPERS = (
    *("BytheWater", "ColdRipple", "ColorfulCups", "EveningGlow", "FallenLeaf"),
    *("Grey", "OneStandsOut", "Path"),
)
LEFT_OUT = {
    *("Fossa_by_Jasper_Roks", "Infinite-Sea_by_Aury88", "Painting-Colors_by__herobrine7gamer"),
    *("analogpattern_by_Peter_Nerlich", "umang_by_Abhishek_Mudgal", "Bridge_by_Sander_Klootwijk"),
    *("free_by_Peter_Nerlich", "greentock_by_Peter_Nerlich", "Aqua", "FreshFlower", "Storm", "YellowFlower"),
    *("clickgame-sea1", "clickgame-sea5", "erase-bee", "erase-dolphin", "explore_farm_animals-duck"),
    *("explore_monuments-redPyramid", "explore_world_music-middleeast"),
}
CACHE = Path("~/.cache/fasttrain/photographs")
BYTES = (70_000, 110_000)
QUALITIES = range(75, 99)
UPRIGHT = 0.25
TRIES = 12
FILE, CROP = 0, 1  # what random numbers are for


def make(
    folder: Path,
    count: int = 2000,
    *,
    side: tuple[int, int] = (500, 375),
    workers: int | None = None,
    photographs: list[Path] | None = None,
    cache: Path | None = None,
) -> Path:
    """Writes ``folder/PHOTOGRAPH/NUMBER.jpg``, unless it holds that very set already.

    Args:
        folder: new, empty, or of an earlier call.
        count: how many files; the photographs take turns.
        side: longer and shorter side in pixels.
        workers: processes; all cores without it.
        photographs: files to crop, of different names; without it what ``fetch(cache)`` gives.
        cache: where the packages' photographs are kept; without it a folder in the user's cache.

    Returns:
        ``folder``.

    Raises:
        ValueError: a count below 1, the folder holds something else, or there are no photographs to be had.
    """
    if count < 1:
        raise ValueError(f"count: {count} files; at least 1 is needed")
    settings = {
        "version": 1,
        "count": count,
        "side": list(side),
        "photographs": None if photographs is None else [p.name for p in photographs],
    }
    manifest = folder / "photographs.json"
    if manifest.exists() and json.loads(manifest.read_text()) == settings:
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else than {count} files of {side}: name a new folder, or remove it")
    if photographs is None:
        photographs = fetch(cache or CACHE.expanduser())
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    n = len(photographs)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_crops, p, range(i, count, n), side, part) for i, p in enumerate(photographs)]
        for job in track(as_completed(jobs), "photographs", total=n, disable=not sys.stdout.isatty()):
            job.result()
    (part / manifest.name).write_text(json.dumps(settings))
    os.replace(part, folder)
    return folder


def fetch(folder: Path) -> list[Path]:
    """The photographs of :data:`PACKAGES`, downloaded through apt and unpacked without installing; no root needed.

    Raises:
        ValueError: apt or dpkg is missing, or fails.
    """
    photographs = folder / "photographs"
    if not photographs.exists():
        missing = [name for name in ("apt-get", "dpkg-deb") if not shutil.which(name)]
        if missing:
            raise ValueError(f"photographs come out of Debian packages, and {' and '.join(missing)} is not here")
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as scratch:
            here = Path(scratch)
            for package in PACKAGES:
                _run(here, "apt-get", "download", package)
            for package_file in sorted(here.glob("*.deb")):
                _run(here, "dpkg-deb", "-x", package_file.name, "tree")
            unpack(here / "tree", here / "photographs")
            os.replace(here / "photographs", photographs)
    return sorted(photographs.iterdir())


def unpack(root: Path, folder: Path) -> None:
    """Copies the photographs of packages that lie under ``root`` to ``folder``, each under a name of its own."""
    folder.mkdir(parents=True)
    share = root / "usr/share"
    for path in [*share.glob("backgrounds/*_by_*.jpg"), *share.glob("backgrounds/mate/nature/*.jpg")]:
        if path.stem not in LEFT_OUT:
            shutil.copyfile(path, folder / path.name)
    for name in WALLPAPERS:
        sizes = sorted((share / "wallpapers" / name / "contents/images").glob("*.jpg"))
        if sizes:
            shutil.copyfile(max(sizes, key=lambda p: p.stat().st_size), folder / f"{name}.jpg")
    for activity in ACTIVITIES:
        for path in share.glob(f"gcompris-qt/rcc/{activity}.rcc"):
            for name, data in entries(path.read_bytes()):
                name = f"{activity}-{name.rpartition('/')[2]}"
                if data[8:12] == b"WEBP" and name.removesuffix(".webp") not in LEFT_OUT:
                    size = Image.open(BytesIO(data)).size
                    if min(size) >= 500:  # the others are figures, and two photographs too small for upright crops
                        (folder / name).write_bytes(data)


def entries(rcc: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents in a binary resource file of Qt; those packed with Zstandard are left out.

    The format: ``qresource.cpp`` of Qt. Numbers are big-endian; a header with the places of tree, data and names; the tree
    has one row per file or folder, the root first. Content has its length before it, and if packed its full length too.

    Raises:
        ValueError: not such a file.
    """
    magic, version, tree, contents, names = struct.unpack_from(">4s4I", rcc)
    if magic != b"qres" or version not in (1, 2, 3):
        raise ValueError(f"not a Qt resource file of version 1, 2 or 3: {rcc[:8]!r}")
    row = 14 if version == 1 else 22  # from version 2 with a time

    def below(i: int, folder: str) -> Iterator[tuple[str, bytes]]:
        name, flags, first, second = struct.unpack_from(">IHII", rcc, tree + i * row)
        if flags & 2:
            own = f"{folder}{_name(rcc, names + name)}/" if i else ""
            for child in range(second, second + first):
                yield from below(child, own)
        elif not flags & 4:
            start = contents + second + 4
            data = rcc[start : start + struct.unpack_from(">I", rcc, start - 4)[0]]
            yield folder + _name(rcc, names + name), zlib.decompress(data[4:]) if flags & 1 else data

    return below(0, "")


def _name(rcc: bytes, start: int) -> str:
    (length,) = struct.unpack_from(">H", rcc, start)  # then a hash of 4 bytes
    return rcc[start + 6 : start + 6 + 2 * length].decode("utf-16-be")


def _run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or "nothing said").splitlines()[-1]
        raise ValueError(f"`{' '.join(command)}` failed ({why}); on a fresh system run `apt-get update` first")


def _crops(path: Path, numbers: range, side: tuple[int, int], folder: Path) -> None:
    if not numbers:
        return
    (folder / path.stem).mkdir(exist_ok=True)
    with Image.open(path) as image:
        photograph = image.convert("RGB")
    for number in numbers:
        (folder / path.stem / f"{number:05}.jpg").write_bytes(_crop(photograph, number, side))


def _crop(photograph: Image.Image, number: int, side: tuple[int, int]) -> bytes:
    """The first crop that has detail enough for the least size, or the one of the most."""
    upright, wish = uniform(draw(0, 0, [number], FILE))[:2, 0]
    width, height = side[::-1] if upright < UPRIGHT else side
    size = BYTES[0] + wish * (BYTES[1] - BYTES[0])
    best = b""
    for attempt in range(TRIES):
        scale, x, y = uniform(draw(0, attempt, [number], CROP))[:3, 0]
        most = min(photograph.width / width, photograph.height / height)
        factor = most**scale if most > 1 else most
        left, top = x * (photograph.width - factor * width), y * (photograph.height - factor * height)
        right, bottom = min(left + factor * width, photograph.width), min(top + factor * height, photograph.height)
        crop = photograph.resize((width, height), Image.Resampling.LANCZOS, (left, top, right, bottom))
        best = max(best, _encoded(crop, size), key=len)
        if len(best) >= BYTES[0]:
            break
    return best


def _encoded(image: Image.Image, size: float) -> bytes:
    """At the highest quality that keeps within the size, if one does."""

    @remembered
    def encoded(quality: int) -> bytes:
        out = BytesIO()
        image.save(out, "JPEG", quality=quality, subsampling="4:2:0")
        return out.getvalue()

    above = bisect_right(QUALITIES, size, key=lambda quality: len(encoded(quality)))
    return encoded(QUALITIES[max(above - 1, 0)])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fasttrain.benchmarks.photographs", description="JPEG files like ImageNet's"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help=f"for the photographs; {CACHE} without it")
    parser.add_argument("--workers", type=int, help="processes; all cores without it")
    given = parser.parse_args()
    try:
        make(given.out, given.count, workers=given.workers, cache=given.cache)
    except ValueError as error:
        parser.error(str(error))
    files = sorted(given.out.glob("*/*.jpg"))
    kb = np.array([path.stat().st_size for path in files]) / 1000
    print(
        f"{len(files)} files of {len({path.parent for path in files})} photographs: mean {kb.mean():.1f}, median "
        f"{np.median(kb):.1f}, p90 {np.quantile(kb, 0.9):.1f}, least {kb.min():.1f}, most {kb.max():.1f} KB"
    )


if __name__ == "__main__":
    main()
