"""Suite ``codec``: in which ways DALI's JPEG decoder works here, and how far its pixels are from libjpeg's.

    fasttrain bench codec [--data FOLDER|FILE.beton] [--images 256] [--size 224] [--batch 64] [--hw 0,0.5,1] [--seconds 60]
                          [--library FOLDER] [--json FILE]

  --hw       shares of the JPEGs for a GPU's JPEG engine
  --seconds  after which a way that does not end has failed
  --library  a folder with another libnvimgcodec.so.0 than the one that is installed

A way is: the whole image decoded or only the crop; on a GPU by which share of the JPEG engine, and with chroma repeated or
interpolated (``fancy``). Each is our own dali loader over the same images, for two epochs, in a process that may crash: then that
way has failed, and another process goes on with those that are left. ``mean_difference`` and ``worst_crop`` are mean absolute
differences to the torch loader's crops, of 255; ``repeats``: whether a second loader gives the same bytes. ``images_per_s`` is
of one short epoch and only tells orders of magnitude: the suite ``loaders`` measures. ``crops_are_used``: whether the loader
lets a GPU decode crops with the version that is here.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fasttrain.loaders import Dataset, EpochLoader, LoaderSpec, ViewPlan, open_dataset, open_loader
from fasttrain.loaders.dali_loader import gpu_decodes_crops
from fasttrain.loaders.datasets.beton import Packed

from fasttrain.environment import versions

from .loaders import prepare


def run(arguments: list[str]) -> dict[str, Any]:
    """Tries all ways; prints a line for each.

    Raises:
        ValueError: arguments that make no sense, or no data.
    """
    given = _parsed(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    read = prepare(given.data, given.images).packed.read
    assert isinstance(read, Packed)
    environment = dict(os.environ)
    if given.library is not None:
        if not (given.library / "libnvimgcodec.so.0").exists():
            raise ValueError(f"bench codec: --library {given.library} has no libnvimgcodec.so.0")
        known = os.environ.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = f"{given.library.resolve()}{f':{known}' if known else ''}"
    task = {"data": str(read.file.path), "device": device, "size": given.size, "batch": given.batch}
    task |= {"images": given.images}
    command = [sys.executable, "-m", "fasttrain.benchmarks.codec", json.dumps(task)]
    rows = tried(ways(device, given.hw), command, environment, given.seconds)
    for row in rows:
        print(_line(row), flush=True)
    crops = [row["works"] for row in rows if row["crops"]]
    return {
        "device": device,
        "nvimgcodec": versions().get("nvidia-nvimgcodec-cu13", ""),
        "library": str(given.library or ""),
        "crops_work": bool(crops) and all(crops),
        "crops_are_used": gpu_decodes_crops() or device == "cpu",
        "rows": rows,
        "not_run": {},
    }


def ways(device: str, shares: list[float]) -> list[dict[str, Any]]:
    """What is tried; the crops last, because they are known to crash."""
    if device == "cpu":
        return [{"crops": crops, "share": None, "fancy": False} for crops in (False, True)]
    whole = [{"crops": False, "share": share, "fancy": fancy} for fancy in (False, True) for share in shares]
    return whole + [{"crops": True, "share": share, "fancy": False} for share in shares]


def tried(
    todo: list[dict[str, Any]], command: list[str], environment: dict[str, str], seconds: float
) -> list[dict[str, Any]]:
    """Results of all ways, in their order.

    Args:
        todo: the ways.
        command: what tries the ways that are given to it as JSON, one after the other, and prints a line of JSON for each.
        environment: of the command.
        seconds: for each way; a process that takes longer is killed.
    """
    out: list[dict[str, Any]] = []
    while len(out) < len(todo):
        left = todo[len(out) :]
        with subprocess.Popen(
            [*command, json.dumps(left)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            try:
                said, errors = process.communicate(timeout=seconds * len(left))
                why = _end(process.returncode, errors)
            except subprocess.TimeoutExpired:
                process.kill()
                said, _ = process.communicate()
                why = f"not done after {seconds * len(left):.0f} s"
        found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        out += [way | result for way, result in zip(left, found, strict=False)]
        if len(found) < len(left):
            out.append(left[len(found)] | {"works": False, "why": why})
    return out


def _end(code: int, errors: str) -> str:
    if code < 0:
        return f"the process ended with {signal.Signals(-code).name}"
    return f"exit code {code}: {(errors.strip().splitlines() or ['nothing said'])[-1][:200]}"


def _line(row: dict[str, Any]) -> str:
    name = "crop only" if row["crops"] else "whole image"
    name += (
        ""
        if row["share"] is None
        else f", engine {row['share']:g}, chroma {'interpolated' if row['fancy'] else 'repeated'}"
    )
    if not row["works"]:
        return f"{name}: FAILS ({row['why']})"
    return (
        f"{name}: works, {row['images_per_s']:.0f} images/s, differs by {row['mean_difference']:.2f} of 255 (worst crop "
        f"{row['worst_crop']:.2f}){'' if row['repeats'] else ', NOT THE SAME in a second run'}"
    )


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fasttrain bench codec", exit_on_error=False, add_help=False)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hw", type=lambda text: [float(part) for part in text.split(",")], default=[0.0, 0.5, 1.0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--library", type=Path)
    try:
        given, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"bench codec: {error}") from None
    wrong = min(given.images, given.size, given.batch, given.seconds) <= 0 or not all(0 <= s <= 1 for s in given.hw)
    if rest or wrong:
        why = " ".join(rest) or "numbers must be above 0, shares within 0 and 1"
        raise ValueError(f"bench codec: {why}; see `fasttrain bench codec -h`")
    return given


# in the process that may crash


def _try_all(task: dict[str, Any], todo: list[dict[str, Any]]) -> None:
    dataset = open_dataset("beton", task["data"])
    spec = spec_of(dataset, task["images"], task["size"], task["batch"])
    wanted = _pixels(open_loader("torch", spec))
    for way in todo:
        try:
            result = tried_here(spec, task["device"], way, wanted)
        except Exception as error:
            result = {"works": False, "why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        print(json.dumps(result), flush=True)


def spec_of(dataset: Dataset, images: int, size: int, batch: int) -> LoaderSpec:
    """The first images of a packed set, in random-resized crops."""
    index_N = np.arange(min(images, len(dataset)))
    return LoaderSpec(dataset, index_N, ViewPlan(crop="random_resized", flip="both"), size=size, stored=0, batch=batch)


def tried_here(spec: LoaderSpec, device: str, way: dict[str, Any], wanted: torch.Tensor) -> dict[str, Any]:
    """One way, in this process; ``wanted``: the torch loader's pixels, uint8 [N, 3, S, S]."""
    options = {"crops": way["crops"], "fancy": way["fancy"]}
    options |= {} if way["share"] is None else {"hw_decoder_load": way["share"]}
    loader, again = (open_loader("dali", spec, device, **options) for _ in range(2))
    try:
        found = _pixels(loader)
        loader.set_epoch(0)
        start = time.perf_counter()
        same = torch.equal(_pixels(loader), found)
        seconds = time.perf_counter() - start
        same &= torch.equal(_pixels(again), found)
    finally:
        loader.close()
        again.close()
    apart = (found.float() - wanted.float()).abs().flatten(1).mean(1)
    return {
        "works": True,
        "images_per_s": len(found) / seconds,
        "mean_difference": float(apart.mean()),
        "worst_crop": float(apart.max()),
        "repeats": same,
    }


def _pixels(loader: EpochLoader) -> torch.Tensor:
    return torch.cat([batch.pixels.cpu() for batch in loader])


if __name__ == "__main__":
    _try_all(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
