"""Suite ``sources``: how fast frozen networks give their soft labels, in each way that they can run.

    fasttrain bench sources [--models NAME,NAME] [--weights W,W] [--classes 1000,365] [--size 224] [--pixels 96] [--batch 64]
                            [--precision auto|fp32|bf16|fp16] [--repeats 5] [--rows NAME,NAME] [--photographs N] [--emulate]
                            [--json FILE]

  --models       networks of timm or torchvision; two ResNet-50 if not given
  --weights      of each: random, package:MODULE, ..; random if not given
  --size         side of the sources' input, --pixels of the images that are resized to it
  --precision    of the arithmetic; auto: float16 on a GPU, float32 on a CPU
  --photographs  no timing: what every row says of so many photographs, beside the plain networks in float32
  --emulate      with --photographs: rows for fp8 and int8, emulated in float32 (quantised.py), and beside bf16, too

Rows: ``plain`` runs one network after the other under autocast, as they were built (the reference); ``folded`` with batch
norms in the convolutions and weights in the precision asked for; ``compiled`` the same under torch.compile; ``stacked``
networks of one architecture as one; ``graphed`` (CUDA) replays them as a CUDA graph. Figures are images a second through all
networks together; rows take turns, medians. ``error`` is the largest difference from the plain networks in float32, relative to
their largest logit.
"""

import argparse
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from fasttrain.kernels import network_input
from fasttrain.loaders import open_dataset
from fasttrain.loaders.datasets import stored_pixels
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fasttrain.device import choose_device, choose_dtype, choose_source_dtype, set_up
from fasttrain.recipe import Run, Source
from fasttrain.sources import STRATEGIES, SourceBank, SourceNetwork, open_source
from fasttrain.sources.fold import folded

from . import photographs, quantised
from .timing import side_by_side

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
CALIBRATION = 16  # photographs that set static scales; none of those that are compared


def run(arguments: list[str]) -> dict[str, Any]:
    """Measures; prints a table, and returns rows and what could not run.

    Raises:
        ValueError: arguments that make no sense.
    """
    given = _parsed(arguments)
    device = choose_device("auto")
    set_up(Run(), device)
    dtype = choose_source_dtype(given.precision, choose_dtype("auto", device)[0], device)
    sources = [
        open_source(_source(f"source{i}", m, w, c, given.size)).to(device)
        for i, (m, w, c) in enumerate(zip(given.models, given.weights, given.classes, strict=True))
    ]
    content: dict[str, Any] = {k: getattr(given, k) for k in ("models", "classes", "size", "batch")}
    content |= {"dtype": str(dtype).removeprefix("torch."), "device": str(device), "rows": [], "not_run": {}}
    banks: dict[str, SourceBank] = {}
    for name in given.rows:
        try:
            banks[name] = SourceBank(sources, dtype, strategy=name, report=print)
        except ValueError as error:
            content["not_run"][name] = str(error)
    if given.photographs:
        content["rows"] = _agreement(banks, sources, given.photographs, given.size, given.emulate, device)
    else:
        content["rows"] = _speeds(banks, sources, given, device)
    _print(content)
    return content


def _source(name: str, model: str, weights: str, classes: int, size: int) -> Source:
    source = Source(name, model, weights=weights, classes=classes, size=size)
    return replace(source, mean=[127.0] * 3, std=[128.0] * 3) if "efficientnet_lite" in model else source


def _parsed(arguments: list[str]) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [part.strip() for part in text.split(",")]

    parser = argparse.ArgumentParser(prog="fasttrain bench sources", exit_on_error=False, add_help=False)
    parser.add_argument("--models", type=names, default=["torchvision:resnet50", "torchvision:resnet50"])
    parser.add_argument("--weights", type=names)
    parser.add_argument("--classes", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--rows", type=names, default=list(STRATEGIES))
    for name, default in (("size", 224), ("pixels", 96), ("batch", 64), ("repeats", 5), ("photographs", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    try:
        given, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"bench sources: {error}") from None
    count = len(given.models)
    given.weights = given.weights or ["random"] * count
    given.classes = given.classes or ([1000, 365] if count == 2 else [1000] * count)
    if rest or min(given.size, given.pixels, given.batch, given.repeats) < 1:
        raise ValueError(
            f"bench sources: what is {' '.join(rest) or 'a number below 1'}? See `fasttrain bench sources -h`"
        )
    if given.emulate and not given.photographs:
        raise ValueError("bench sources: --emulate needs --photographs N")
    if len(given.weights) != count or len(given.classes) != count:
        raise ValueError(f"bench sources: {count} --models need as many --weights and --classes")
    unknown = [name for name in given.rows if name not in STRATEGIES]
    if unknown:
        raise ValueError(f"bench sources: there is no row {unknown[0]!r}; there are {', '.join(STRATEGIES)}")
    return given


def _speeds(
    banks: dict[str, SourceBank], sources: list[SourceNetwork], given, device: torch.device
) -> list[dict[str, Any]]:
    shape, sets = (given.batch, 3, given.pixels, given.pixels), 3
    images = [
        torch.randint(0, 256, shape, dtype=torch.uint8, device=device).contiguous(memory_format=torch.channels_last)
        for _ in range(sets)
    ]
    reference_BC = SourceBank(sources, torch.float32, strategy="plain").logits(images[0]).float()
    errors = {
        name: float((bank.logits(images[0]).float() - reference_BC).abs().max() / reference_BC.abs().max())
        for name, bank in banks.items()
    }
    steps = {name: (lambda i, bank=bank: bank.logits(images[i])) for name, bank in banks.items()}
    cases = side_by_side(steps, device, sets=sets, rounds=given.repeats, budget_s=600)
    rows = []
    for name, case in cases.items():
        speeds = [given.batch / ms * 1e3 for ms in case.repeats]
        rows.append({"name": name, "images_per_s": median(speeds), "repeats": speeds, "error": errors[name]})
    for row in rows:
        row["relative_to"] = {
            r["name"]: row["images_per_s"] / r["images_per_s"] for r in rows if r["name"] == "plain" != row["name"]
        }
    return rows


def _agreement(
    banks: dict[str, SourceBank],
    sources: list[SourceNetwork],
    count: int,
    size: int,
    emulate: bool,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Of each row and source: how often the first class is the same, and the mean KL divergence."""
    folder = photographs.CACHE.expanduser().with_name("photographs-2000")
    photographs.make(folder, 2000)
    dataset = open_dataset("folder", folder)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).numpy()
    pixels = stored_pixels(dataset, order[:count], size).permute(0, 3, 1, 2).to(device)
    counts = [s.spec.classes for s in sources]

    def said(bank: SourceBank) -> list[torch.Tensor]:
        logits_NC = torch.cat([bank.logits(part).float() for part in pixels.split(32)])
        return [part.log_softmax(1) for part in logits_NC.split(counts, dim=1)]

    def row(name: str, p: torch.Tensor, q: torch.Tensor, rounded: torch.Tensor | None) -> dict[str, Any]:
        out = {"name": name, "agreement": _agree(p, q), "kl": _divergence(p, q), "images": count}
        return out | (
            {} if rounded is None else {"agreement_bf16": _agree(rounded, q), "kl_bf16": _divergence(rounded, q)}
        )

    plain, rows = said(SourceBank(sources, torch.float32, strategy="plain")), []
    in_bf16: list[Any] = [None] * len(sources)
    if emulate:
        in_bf16 = said(SourceBank(sources, torch.bfloat16, strategy="folded"))
        rows = [row(f"bf16 {s.spec.model}", p, b, b) for s, p, b in zip(sources, plain, in_bf16, strict=True)]
    for name, bank in banks.items():
        answers = zip(sources, plain, said(bank), in_bf16, strict=True)
        rows += [row(f"{name} {s.spec.model}", p, q, b) for s, p, q, b in answers]
    if emulate:
        few = stored_pixels(dataset, order[-CALIBRATION:], size).permute(0, 3, 1, 2).to(device)
        for s, p, b in zip(sources, plain, in_bf16, strict=True):
            for setting in quantised.settings():
                rows.append(row(f"{setting.name} {s.spec.model}", p, _emulated(s, setting, few, pixels), b))
                print(f"{rows[-1]['name']}: KL {rows[-1]['kl']:.1e}", flush=True)
    return rows


def _agree(p_NC: torch.Tensor, q_NC: torch.Tensor) -> float:
    return float((p_NC.argmax(1) == q_NC.argmax(1)).float().mean())


def _divergence(p_NC: torch.Tensor, q_NC: torch.Tensor) -> float:
    return float((p_NC.exp() * (p_NC - q_NC)).sum(1).mean())


def _emulated(
    source: SourceNetwork, setting: quantised.Setting, few: torch.Tensor, pixels: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities of all photographs, with the scales of a few others."""

    def x(pixel_BCHW: torch.Tensor) -> torch.Tensor:
        return network_input(pixel_BCHW, source.mean, source.std, size=source.spec.size)  # type: ignore[arg-type]

    network = quantised.emulated(folded(source.network, x(few))[0], setting, x(few))
    with torch.inference_mode():
        return torch.cat([network(x(part)) for part in pixels.split(32)]).log_softmax(1)


def _print(content: dict[str, Any]) -> None:
    networks = ", ".join(content["models"])
    title = f"{networks} at {content['size']} px, {content['dtype']}, {content['device']}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    timed = content["rows"] and "images_per_s" in content["rows"][0]
    for heading in ("row", *(("images/s", "x plain", "error") if timed else ("same first class", "KL", "photographs"))):
        table.add_column(heading, justify="left" if heading == "row" else "right")
    for row in content["rows"]:
        if timed:
            ratio = row["relative_to"].get("plain")
            cells = [f"{row['images_per_s']:.1f}", f"{ratio:.2f}" if ratio else "", f"{row['error']:.1e}"]
        else:
            cells = [f"{100 * row['agreement']:.2f} %", f"{row['kl']:.1e}", str(row["images"])]
        table.add_row(row["name"], *cells)
    Console().print(table)
