"""What the processes of ``scaling.py`` do: each is one of several that were started together."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fasttrain.loaders import LoaderSpec, open_dataset, open_loader
from fasttrain.loaders.views import ViewPlan
from torch import Tensor
from torchvision.models import resnet18

from fasttrain.build import build_target
from fasttrain.ranks import Ranks, joined
from fasttrain.recipe import load


def main(told: str) -> None:
    """Does one piece of work; the first process writes what was found."""
    asked: dict[str, Any] = json.loads(told)
    torch.set_num_threads(asked["threads"])
    torch.set_flush_denormal(True)
    with joined(600.0, cuda=False) as its:
        found = {"all_reduce": _all_reduce, "loader": _loader, "sources": _sources}[asked["name"]](its, asked)
        if its.first:
            Path(asked["out"]).write_text(json.dumps(found))
        its.barrier()


def _slowest(its: Ranks, times: list[float]) -> list[float]:
    """Of every round the time of the process that took longest."""
    return [max(each) for each in zip(*its.all(times), strict=True)]


def _all_reduce(its: Ranks, asked: dict[str, Any]) -> dict[str, Any]:
    """MiB and milliseconds of each gradient."""
    found = {}
    for name, model, side in (("ResNet-18", "resnet18", 224), (asked["recipe"], None, 0)):
        changed = [f"--target.model={model}", f"--data.size={side}"] if model else []
        recipe = load(asked["recipe"], ["--target.classes=1000", *changed])
        with torch.device("meta"):
            count = sum(p.numel() for p in build_target(recipe, 1000, {}, weights=False).parameters())
        gradient, times = torch.zeros(count), []
        for _ in range(asked["rounds"] + 1):
            its.barrier()
            begin = time.perf_counter()
            dist.all_reduce(gradient)
            times.append((time.perf_counter() - begin) * 1e3)
        found[name] = [4 * count / 2**20, _slowest(its, times[1:])]
    return found


def _loader(its: Ranks, asked: dict[str, Any]) -> dict[str, Any]:
    """Images per second of all processes together, from the second epoch on."""
    dataset = open_dataset("beton", asked["path"])
    plan = ViewPlan(crop="random_resized", flip="horizontal")
    spec = LoaderSpec(
        dataset,
        np.arange(len(dataset)),
        plan,
        size=asked["size"],
        stored=0,
        batch=asked["batch"],
        rank=its.rank,
        ranks=its.count,
    )
    loader, seconds, images = open_loader(asked["loader"], spec, torch.device("cpu"), asked["threads"]), 0.0, 0
    for epoch in range(2):
        loader.set_epoch(epoch)
        its.barrier()
        begin = time.perf_counter()
        images = sum(len(batch) for batch in loader)
        seconds = time.perf_counter() - begin
    loader.close()
    assert sum(its.all(images)) == len(dataset)
    return {"images_per_s": len(dataset) / max(its.all(seconds))}


@torch.no_grad()
def _sources(its: Ranks, asked: dict[str, Any]) -> dict[str, list[float]]:
    """Milliseconds of a batch's soft labels, replicated and split; both are the same to rounding."""
    torch.manual_seed(0)
    size, each, mine = asked["size"], asked["batch"] // its.count, asked["sources"] // its.count
    networks = [resnet18(weights=None).eval() for _ in range(asked["sources"])]
    pixels_B = torch.randint(0, 256, (its.count, each, 3, size, size), dtype=torch.uint8)[its.rank]

    def replicated() -> Tensor:
        x = pixels_B.float() / 255
        return torch.stack([network(x) for network in networks])

    def split() -> Tensor:
        whole_G = torch.empty(its.count * each, *pixels_B.shape[1:], dtype=torch.uint8)
        dist.all_gather_into_tensor(whole_G, pixels_B)
        x = whole_G.float() / 255
        own_MGC = torch.stack([network(x) for network in networks[its.rank * mine : (its.rank + 1) * mine]])
        sent_RMBC = own_MGC.unflatten(1, (its.count, each)).transpose(0, 1).contiguous()
        got_RMBC = torch.empty_like(sent_RMBC)
        dist.all_to_all_single(got_RMBC, sent_RMBC)
        return got_RMBC.flatten(0, 1)

    torch.testing.assert_close(split(), replicated(), rtol=1e-3, atol=1e-3)
    times: dict[str, list[float]] = {"replicated": [], "split": []}
    for _ in range(asked["rounds"]):
        for name, form in (("replicated", replicated), ("split", split)):
            its.barrier()
            begin = time.perf_counter()
            form()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: _slowest(its, found) for name, found in times.items()}


if __name__ == "__main__":
    main(sys.argv[1])
