"""What a cluster needs to train at full speed: computed, not measured, from figures that say where they come from.

Sums of one step of n GPUs on m nodes, g = n / m of them each, which share a batch of n * b images:

- gradients of P parameters in float32 are added up by rings, within the nodes first, then between them (bandwidth-optimal:
  Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002): 2 (g-1)/g * 4P / NVLink + 2 (m-1)/m * 4P / (a node's network), and
  2 (g-1) + 2 (m-1) latencies for each bucket;
- batch norms' statistics likewise, after the backward pass, hidden by nothing;
- overlap none: the step waits for all of it; full: gradients travel during the backward pass, two thirds of the step.
"""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fasttrain.loaders import open_dataset
from fasttrain.loaders.datasets.beton import Packed

from fasttrain.build import build_target
from fasttrain.describe import describe
from fasttrain.recipe import Recipe, load
from fasttrain.reduce import GradientSum

_BUCKET = inspect.signature(GradientSum).parameters["bucket_bytes"].default
RESULTS = Path(__file__).parent / "results"
_IMAGENET, _KINETICS, _FRAMES = 1_281_167, 240_000, 300
_PUBLISHED = {  # images per second and who says so, images a step and who says so
    "resnet50 A100": (
        (2470, "NVIDIA DeepLearningExamples 21.03, one A100, PyTorch, AMP"),
        (256, "assumed"),
    ),
    "resnet50 H100": (
        (7150, "MLPerf Training v4.0, an eighth of 57.2k of 8 H100, MXNet"),
        (400, "published: that entry's with H200"),
    ),
    "resnet18 A100": (
        (9900, "ffcv-imagenet, 9.8k to 10.0k at 160 to 192 px"),
        (1024, "published: its batch"),
    ),
    "r3d_18 H100": (
        (426, "SPDL, an eighth of 3,405 of 8 H100, without data"),
        (16, "derived from the same"),
    ),
}
_SEEN = 176  # px, about the mean of ffcv-imagenet's 160 to 192


@dataclass(frozen=True)
class Figure:
    """A number and where it comes from: measured, published, counted, assumed or given."""

    value: float
    origin: str


@dataclass(frozen=True)
class Cluster:
    """What is there; bandwidths in bytes per second and direction, latencies in seconds."""

    gpus: int
    nodes: int
    cores: Figure
    nvlink: Figure
    network: Figure
    storage: Figure
    latency: tuple[Figure, Figure]

    @property
    def each(self) -> int:
        """GPUs of a node."""
        return self.gpus // self.nodes

    def all_reduce(self, size: float, messages: int = 1) -> float:
        """Seconds to add up ``size`` bytes of every GPU, in so many messages."""
        g, m = self.each, self.nodes
        within, between = 2 * (g - 1) / g * size / self.nvlink.value, 2 * (m - 1) / m * size / self.network.value
        waits = 2 * (g - 1) * self.latency[0].value + 2 * (m - 1) * self.latency[1].value
        return within + between + messages * waits


@dataclass(frozen=True)
class Work:
    """What one GPU does, and what it eats: images, or clips of video.

    Attributes:
        samples: ``images`` or ``clips``, which stand for images below.
        speed: images per second of one GPU with nothing to wait for.
        batch: images a step of one GPU.
        gradients, statistics: bytes to be added up at every step.
        bytes: of an image, packed.
        decode: images per second of one CPU core.
        whole: bytes of the training split.
    """

    name: str
    samples: str
    speed: Figure
    batch: Figure
    gradients: Figure
    statistics: Figure
    bytes: Figure
    decode: Figure
    whole: Figure


def plan(work: Work, cluster: Cluster) -> dict[str, Any]:
    """What the cluster would do with this work, and what it takes."""
    step = work.batch.value / work.speed.value
    messages = -(-int(work.gradients.value) // _BUCKET)
    gradients, statistics = (
        cluster.all_reduce(work.gradients.value, messages),
        cluster.all_reduce(work.statistics.value),
    )
    none = step / (step + gradients + statistics)
    full = step / (max(step, step / 3 + gradients) + statistics)
    need = cluster.gpus * work.speed.value * full
    able = {
        "GPUs" if gradients <= step * 2 / 3 else "all-reduce": need,
        "decoding": cluster.nodes * cluster.cores.value * work.decode.value,
        "storage": cluster.storage.value / work.bytes.value,
    }
    cached = {name: value for name, value in able.items() if name != "storage"}
    fill = max(
        cluster.nodes * work.whole.value / cluster.storage.value, work.whole.value / cluster.network.value
    )  # every node reads all of it
    return {
        "name": work.name,
        "samples": work.samples,
        "images_per_s": min(cached.values()),
        "limit": min(cached, key=lambda name: cached[name]),
        "limit_without_cache": min(able, key=lambda name: able[name]),
        "images_per_s_without_cache": min(able.values()),
        "ms": 1e3 * step,
        "gradient_ms": 1e3 * gradients,
        "statistics_ms": 1e3 * statistics,
        "efficiency": {"overlap none": none, "overlap full": full},
        "storage_bytes_per_s": {"node": need / cluster.nodes * work.bytes.value, "all": need * work.bytes.value},
        "decode_cores_per_node": need / cluster.nodes / work.decode.value,
        "fill_s": fill,
        "inputs": {
            name: {"value": figure.value, "origin": figure.origin}
            for name, figure in vars(work).items()
            if isinstance(figure, Figure)
        },
    }


def works(*, speed: float, batch: int, decode: float, bytes_: float, packed: Path | None) -> list[Work]:
    """The rows; figures that are not 0 stand in for those known here.

    Raises:
        ValueError: a figure is not known here.
    """
    per_core = Figure(decode, "given") if decode else _measured("loaders", "ffcv", 224)
    clips_per_core = Figure(decode, "given") if decode else _measured("video", "kinetics-like packed", None)
    image, clip = (Figure(bytes_, "given"),) * 2 if bytes_ else (_image(packed), _clip())
    images = Figure(_IMAGENET * image.value, f"ImageNet's {_IMAGENET:,} training images, each of these bytes")
    videos = Figure(_KINETICS * _FRAMES * clip.value / 16, f"{_KINETICS:,} videos of {_FRAMES} frames (assumed)")
    out = []
    for name, (known, sources, live) in _ROWS.items():
        recipe = _recipe(known)
        (speed_, origin), (batch_, its) = _PUBLISHED[known]
        figure = Figure(speed_, f"published: {origin}")
        if sources:
            share = _flops(_recipe(known, _SEEN), []) / (
                _flops(recipe, sources) + (_source_flops(sources) if live else 0)
            )
            figure = Figure(speed_ * share, f"assumed: as the FLOPs, from {speed_:,} of plain ResNet-18 ({origin})")
        parameters, statistics = _counted(recipe, sources)
        out.append(
            Work(
                name,
                "clips" if known.startswith("r3d") else "images",
                Figure(speed, "given") if speed else figure,
                Figure(batch, "given") if batch else Figure(batch_, its),
                Figure(4 * parameters, f"counted: {parameters:,} parameters"),
                Figure(4 * statistics, f"counted: {statistics:,} means and variances"),
                clip if known.startswith("r3d") else image,
                clips_per_core if known.startswith("r3d") else per_core,
                videos if known.startswith("r3d") else images,
            )
        )
    return out


_ROWS: dict[
    str, tuple[str, list[int], bool]
] = {  # name: (published figure, classes of the sources, whether they run live)
    "ResNet-50, A100": ("resnet50 A100", [], False),
    "ResNet-50, H100 at best": ("resnet50 H100", [], False),
    "ResNet-18 + 2 transfer modules, recalled, A100": ("resnet18 A100", [1000, 365], False),
    "ResNet-18 + 2 transfer modules, live, A100": ("resnet18 A100", [1000, 365], True),
    "3D ResNet-18, 16 x 112 px, H100": ("r3d_18 H100", [], False),
}


def _recipe(known: str, size: int = 0) -> Recipe:
    model = known.split()[0]
    frames, side = (16, 112) if model.startswith("r3d") else (0, 224)
    return load(
        "smoke",
        [f"--target.model={model}", "--target.classes=1000", f"--data.size={size or side}", f"--data.frames={frames}",
         "--transfer.module=true", "--data.stored=0"],
    )  # fmt: skip


def _flops(recipe: Recipe, sources: list[int]) -> float:
    return describe(recipe, sources)["flops_per_image"]["target_training"]


def _source_flops(sources: list[int]) -> float:
    """Of one forward pass of a ResNet-50 for each: a third of its training's."""
    return len(sources) * _flops(_recipe("resnet50 A100"), []) / 3


def _counted(recipe: Recipe, sources: list[int]) -> tuple[int, int]:
    """Trained parameters, and running means and variances."""
    with torch.device("meta"):
        heads = {f"source{i}": classes for i, classes in enumerate(sources)}
        target = build_target(recipe, recipe.target.classes, heads, weights=False)
    statistics = sum(b.numel() for name, b in target.named_buffers() if name.endswith(("running_mean", "running_var")))
    return sum(p.numel() for p in target.parameters()), statistics


def _newest(suite: str) -> tuple[dict[str, Any], str]:
    paths = sorted(RESULTS.glob(f"*-{suite}-*.json"))
    if not paths:
        raise ValueError(f"bench scaling: no results of {suite} are here: give --decode and --bytes")
    content = json.loads(paths[-1].read_text())
    return content, f"measured: {paths[-1].name}, {content['machine']['cpu']}"


def _measured(suite: str, row: str, size: int | None) -> Figure:
    """Samples per second of one core in the newest result of a suite."""
    content, origin = _newest(suite)
    found = next(r for r in content["rows"] if r["name"] == row and (size is None or r["size"] == size))
    value = found["images_per_s"] if "images_per_s" in found else found["clips_per_s"]
    return Figure(value / content["workers"], f"{origin}, row {row}")


def _image(packed: Path | None) -> Figure:
    """Bytes of a packed image."""
    if packed is not None:
        read = open_dataset("beton", packed).read
        assert isinstance(read, Packed)
        return Figure(float(read.file.size_N.mean()), f"measured: {packed.name}")
    content, origin = _newest("loaders")
    return Figure(content["mean_bytes"], f"{origin}, photographs and their index")


def _clip() -> Figure:
    """Bytes of the frames of a packed clip."""
    content, origin = _newest("video")
    found = next(s for s in content["sets"] if s["name"] == "kinetics-like")["packed_bytes_per_frame"]
    return Figure(content["frames"] * found, f"{origin}, {content['frames']} frames of {found:.0f} bytes")
