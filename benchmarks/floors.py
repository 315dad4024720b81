"""Suite ``floors``: the least time that a training step can take, by its arithmetic and by its bytes. Nothing is computed.

    fasttrain bench floors [--target resnet20] [--size 96] [--batch 128] [--models NAME,NAME] [--source-size 224] [--no-module]
                           [--frames N] [--classes 10] [--dtype bf16|fp16|fp32] [--flops 790e12 --bytes 4.2e12 | --measure]
                           [--json FILE]

  --target     and the options after it: as `fasttrain bench step` has them
  --classes    of the task
  --dtype      of activations and weights, the sources' too; bf16 if not given
  --flops      a second, --bytes a second, read and written: what the machine is assumed to give
  --measure    what this machine gives: a large matrix product in --dtype and a large copy

Counted are convolutions and matrix products, forward and backward. Each reads its inputs and weights once and writes its output
once, in --dtype; a gradient with respect to an input and one with respect to weights are an operation each. All that lies
between them (batch norm, activations, sums, pooling, resizing, losses) counts as fused with them and free. The optimiser
reads weights, gradients and momentum once and writes weights and momentum once, in float32. Attention counts as its two products,
so that its scores are written and read, which a fused kernel spares.

``by FLOPs`` is the arithmetic at the one rate, ``by bytes`` the bytes at the other, ``by operation`` the sum over operations of
the larger of both: the floor of operations that run one after the other. Where target and sources run in two streams, a step may
come below the last, but not below the first two. A cache that holds a whole activation from one operation to the next can bring
a step below ``by bytes`` and ``by operation``: small images and batches on a GPU with a large cache.

Rows: ``scratch`` (no auxiliary heads), ``recalled`` (heads, no source runs), ``live`` (heads and sources), ``sources alone``.

Shape suffixes: B batch, K classes of the task, C all sources' classes side by side.
"""

import argparse
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fasttrain.build import build_target, method_of
from fasttrain.describe import input_shape
from fasttrain.device import choose_device
from fasttrain.pretext.source import CLUSTERS
from fasttrain.recipe import Recipe
from fasttrain.sources.network import build_network
from fasttrain.trained import TRAINED

from . import step_options
from .timing import copy_bandwidth, product_rate

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_aten = torch.ops.aten


@dataclass(frozen=True)
class Operation:
    """What has to be done and moved at least.

    Attributes:
        part: of the step, such as ``target forward`` or a source's name.
        name: of the operation and its shapes.
        flops: 2 for a multiply-add.
        bytes: read and written.
    """

    part: str
    name: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Floor:
    """Of some operations.

    Attributes:
        flops: of all.
        bytes: of all.
        by_flops_s: seconds of the arithmetic alone.
        by_bytes_s: seconds of the bytes alone.
        by_operation_s: seconds, the larger of both for each operation, summed (the roofline of Williams et al. 2009, operation by
            operation).
    """

    flops: int
    bytes: int
    by_flops_s: float
    by_bytes_s: float
    by_operation_s: float


def floor(operations: Iterable[Operation], *, flops_per_s: float, bytes_per_s: float) -> Floor:
    """The least time of operations on a machine with these two rates."""
    every = list(operations)
    flops, moved = sum(o.flops for o in every), sum(o.bytes for o in every)
    each = sum(max(o.flops / flops_per_s, o.bytes / bytes_per_s) for o in every)
    return Floor(flops, moved, flops / flops_per_s, moved / bytes_per_s, each)


def forward(network: nn.Module, shape: tuple[int, ...], batch: int, *, part: str, itemsize: int) -> list[Operation]:
    """Of a frozen network's forward pass.

    Args:
        network: on the meta device.
        shape: of one sample.
        batch: B.
        part: what to call it.
        itemsize: bytes of a number.
    """
    with _Counter(itemsize) as counter, counter.named(part), torch.no_grad():
        network(torch.empty(batch, *shape, device="meta"))
    return counter.operations


def training(target: nn.Module, shape: tuple[int, ...], batch: int, *, aux: bool, itemsize: int) -> list[Operation]:
    """Of a target's forward and backward pass, and of the optimiser.

    Args:
        target: a :class:`fasttrain.models.Target` on the meta device.
        shape: of one sample.
        batch: B.
        aux: whether the auxiliary heads run.
        itemsize: bytes of a number, but for the optimiser's.
    """
    with _Counter(itemsize) as counter:
        with counter.named("target forward"):
            output = target(torch.empty(batch, *shape, device="meta"), aux=aux)
        said = [output.logits_BK] + ([output.aux_logits_BC] if output.aux_logits_BC is not None else [])
        with counter.named("target backward"):
            torch.autograd.backward(said, [torch.empty_like(logits) for logits in said])
    trained = [p.numel() for p in target.parameters() if p.requires_grad and p.grad is not None]
    numbers = 5  # weight, gradient and momentum read, weight and momentum written
    return [*counter.operations, Operation("optimiser", f"{sum(trained)} weights", 0, numbers * 4 * sum(trained))]


def rows(recipe: Recipe, classes: int, dtype: torch.dtype) -> dict[str, list[Operation]]:
    """The operations of one step of each row; ``live`` and ``sources alone`` are missing where no source can be counted.

    Args:
        recipe: target, sources, sizes and batch.
        classes: K.
        dtype: of activations and weights.

    Raises:
        ValueError: a mistake in the recipe.
    """
    batch, itemsize = recipe.data.batch, dtype.itemsize
    chosen = recipe.chosen_sources()
    with torch.device("meta"):
        heads = method_of(recipe).heads(recipe, classes)
        target = build_target(recipe, classes, heads, weights=False)
        bare = build_target(recipe, classes, {}, weights=False)
    target.together = None  # run as one they are the same arithmetic, some of it by zeros
    shape = input_shape(recipe, target.backbone.dims)
    out = {
        "scratch": training(bare, shape, batch, aux=False, itemsize=itemsize),
        "recalled": training(target, shape, batch, aux=True, itemsize=itemsize),
    }
    if chosen and not any(s.model in (TRAINED, CLUSTERS) for s in chosen):
        sources = []
        for source in chosen:
            with torch.device("meta"):
                network = build_network(source).eval()
            seen = (3, source.size, source.size)
            sources += forward(network, seen, batch, part=source.name, itemsize=itemsize)
        out |= {"live": out["recalled"] + sources, "sources alone": sources}
    return out


def run(arguments: list[str]) -> dict[str, Any]:
    """Counts; prints tables, and returns rows.

    Raises:
        ValueError: arguments that make no sense.
    """
    given = _parsed(arguments)
    dtype = DTYPES[given.dtype]
    asked = {k: v for k, v in vars(given).items() if k not in ("flops", "bytes", "measure")}
    counted = rows(step_options.recipe(asked | {"file": None, "folder": "runs"}), given.classes, dtype)
    flops_per_s, bytes_per_s, device = given.flops, given.bytes, "assumed"
    if given.measure:
        its = choose_device("auto")
        flops_per_s, bytes_per_s, device = product_rate(its, dtype), copy_bandwidth(its), str(its)
    rates = {"flops_per_s": flops_per_s, "bytes_per_s": bytes_per_s}
    content: dict[str, Any] = asked | {"rates": rates | {"of": device}, "rows": [], "parts": [], "not_run": {}}
    for name, operations in counted.items():
        found = floor(operations, **rates)
        unit = "clips_per_s" if given.frames else "images_per_s"
        content["rows"].append({"name": name, unit: given.batch / found.by_operation_s} | vars(found))
    every = [*counted["recalled"], *counted.get("sources alone", [])]
    for part in dict.fromkeys(o.part for o in every):
        its_own = [o for o in every if o.part == part]
        content["parts"].append({"name": part, "operations": len(its_own)} | vars(floor(its_own, **rates)))
    _print(content)
    return content


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = step_options.parser("floors", ("target", "models", "module", "size", "source-size", "batch", "frames"))
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--flops", type=float, default=0.0)
    parser.add_argument("--bytes", type=float, default=0.0)
    parser.add_argument("--measure", action="store_true")
    given = step_options.parsed(parser, arguments)
    if given.classes < 1:
        raise ValueError(f"bench floors: --classes is {given.classes}; it is 1 at least")
    if given.measure == (given.flops > 0 and given.bytes > 0):
        raise ValueError("bench floors: give --flops and --bytes, both above 0, or --measure, but not all of them")
    return given


def _print(content: dict[str, Any]) -> None:
    rates = content["rates"]
    heads = "transfer modules" if content["module"] else "linear heads"
    title = (
        f"{content['target']} with {heads} at {content['size']} px from {', '.join(content['models'])} at "
        f"{content['source_size']} px; batch {content['batch']}, {content['dtype']}; {rates['of']} "
        f"{rates['flops_per_s'] / 1e12:.4g} TFLOP/s, {rates['bytes_per_s'] / 1e12:.4g} TB/s"
    )
    unit = "clips_per_s" if content["frames"] else "images_per_s"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("a step", no_wrap=True, min_width=len("target backward"))
    for heading in ("GFLOP", "GB", "ms by FLOPs", "ms by bytes", "ms by operation", unit.replace("_per_s", "/s")):
        table.add_column(heading, justify="right", width=max(6, *map(len, heading.split())))
    for row in [*content["rows"], *content["parts"]]:
        seconds = (row["by_flops_s"], row["by_bytes_s"], row["by_operation_s"])
        cells = [f"{row['flops'] / 1e9:.1f}", f"{row['bytes'] / 1e9:.3f}", *(f"{1e3 * s:.3f}" for s in seconds)]
        table.add_row(
            row["name"], *cells, f"{row[unit]:.0f}" if unit in row else "", end_section=row is content["rows"][-1]
        )
    Console().print(table)


class _Counter(TorchDispatchMode):
    """Takes note of convolutions and matrix products that are dispatched while it is on."""

    def __init__(self, itemsize: int) -> None:
        super().__init__()
        self.itemsize, self.part = itemsize, ""
        self.operations: list[Operation] = []

    @contextmanager
    def named(self, part: str):
        """What comes inside belongs to this part."""
        self.part = part
        yield

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is _aten.convolution:
            self._add("convolution", _multiplied(args[0] if args[6] else out, args[1]), [*args[:3], out])
        elif packet is _aten.convolution_backward:
            self._gradients(args, out)
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self._add(packet.__name__, flops, [*args, *(out if isinstance(out, tuple) else (out,))])
        return out

    def _gradients(self, args: tuple, out: tuple[Tensor | None, ...]) -> None:
        """A convolution's, with respect to input and weights."""
        upstream, x, weight = args[:3]
        flops = _multiplied(x if args[7] else upstream, weight)
        if args[10][0]:
            self._add("input gradient", flops, [upstream, weight, out[0]])
        if args[10][1]:
            self._add("weight gradient", flops, [upstream, x, out[1]])

    def _add(self, name: str, flops: int, touched: list[Any]) -> None:
        tensors = [t for t in touched if isinstance(t, Tensor)]
        shapes = " ".join("x".join(map(str, t.shape)) for t in tensors)
        moved = self.itemsize * sum(t.numel() for t in tensors)
        self.operations.append(Operation(self.part, f"{name} {shapes}", flops, moved))


def _multiplied(out: Tensor, weight: Tensor) -> int:
    """FLOPs of a convolution: each number it gives (a transposed one: takes) is multiplied with all weights of its channel."""
    return 2 * out.numel() * prod(weight.shape[1:])
