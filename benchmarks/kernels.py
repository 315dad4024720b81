"""Suite ``kernels``: the soft-target losses (forward and backward) and a network's input, ours and others'.

    fasttrain bench kernels [--batch 256,8192] [--classes 365,1365] [--dtype bf16] [--json FILE]

Rows of a loss: ``eager`` is what one writes in plain PyTorch (``kl_div`` of two softmaxes, source after source), ``compiled``
the same under torch.compile, ``liger`` the same with Liger's KL kernel; ``reference`` and ``fasttrain`` are ours, the latter
the fused Triton kernel. 1365 classes are two sources' (1000 and 365); other counts are one source's. Data are random and
new, logits in ``--dtype``; the loss is kd at T = 2. ``floor`` is the least that must be moved (student and target read, gradient
written) at the copy bandwidth measured in the same run.

Shape suffixes: B batch, C all sources' classes side by side, M sources.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fasttrain.kernels import Probabilities, SoftTargetLoss, TopK, implementation, network_input, soft_target_loss
from torch import Tensor

from .timing import cache_bytes, copy_bandwidth, side_by_side

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SOURCES = {1365: (1000, 365)}
T = 2.0
Loss = Callable[[Tensor, Tensor], Tensor]


def eager(counts: tuple[int, ...]) -> Loss:
    """The losses [M] as plain PyTorch has them."""

    def loss(student_BC: Tensor, target_BC: Tensor) -> Tensor:
        pairs = zip(student_BC.split(counts, 1), target_BC.split(counts, 1), strict=True)
        return torch.stack(
            [
                F.kl_div((s.float() / T).log_softmax(1), (t.float() / T).softmax(1), reduction="batchmean") * T * T
                for s, t in pairs
            ]
        )

    return loss


def liger(counts: tuple[int, ...]) -> Loss:
    """The same with the KL kernel of Liger, which wants two log-softmaxes."""
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    def loss(student_BC: Tensor, target_BC: Tensor) -> Tensor:
        pairs = zip(student_BC.split(counts, 1), target_BC.split(counts, 1), strict=True)
        return torch.stack(
            [
                LigerKLDivLossFunction.apply(
                    (s.float() / T).log_softmax(1), (t.float() / T).log_softmax(1), "batchmean", True
                )
                * T
                * T
                for s, t in pairs
            ]
        )

    return loss


def ours(counts: tuple[int, ...], name: str, device: torch.device) -> Loss:
    """Our losses by one implementation, as a training loop has them."""
    return SoftTargetLoss(counts, kind="kd", temperature=T, implementation=name, device=device.type)


def run(arguments: list[str]) -> dict[str, Any]:
    """Measures; prints a table, and returns rows and what could not run.

    Raises:
        ValueError: arguments that make no sense.
    """
    given, device = _parsed(arguments), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[given.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    default = (256, 512, 2048, 8192) if device.type == "cuda" else (256,)
    batches, classes = given.batch or default, given.classes
    bandwidth = copy_bandwidth(device)
    print(f"copy: {bandwidth / 1e9:.0f} GB/s read and written; logits {dtype}, forward and backward", flush=True)
    not_run = _not_run(device)
    rows: list[dict[str, Any]] = []
    for c in classes:
        for b in batches:
            rows += _losses(b, c, dtype, device, bandwidth, not_run, given.rounds)
    for b in batches[:1]:
        for size, side in ((224, 224), (96, 224)):
            rows += _inputs(b, size, side, dtype, device, bandwidth, not_run, given.rounds)
    return {"copy_bytes_per_s": bandwidth, "dtype": str(dtype), "rows": rows, "not_run": not_run}


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fasttrain bench kernels", exit_on_error=False, add_help=False)

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    parser.add_argument("--batch", type=numbers)
    parser.add_argument("--classes", type=numbers, default=(365, 1365, 4096, 21841))
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=7)
    try:
        given, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"bench kernels: {error}") from None
    if rest or min((*given.classes, *(given.batch or (1,)), given.rounds)) < 1:
        raise ValueError(
            f"bench kernels: {' '.join(rest) or 'numbers must be above 0'}; see `fasttrain bench kernels -h`"
        )
    return given


def _not_run(device: torch.device) -> dict[str, str]:
    out = {}
    name, why = implementation(device.type)
    if name != "triton":
        out["fasttrain"] = why
    try:
        import liger_kernel.ops.kl_div  # noqa: F401

        if device.type != "cuda":
            out["liger"] = "its kernels need a GPU"
    except Exception as error:  # a broken installation can raise anything
        out["liger"] = f"{type(error).__name__}: {error}"
    return out


def _losses(
    b: int, c: int, dtype: torch.dtype, device: torch.device, bandwidth: float, not_run: dict[str, str], rounds: int
) -> list[dict[str, Any]]:
    counts = SOURCES.get(c, (c,))
    size = 2 * b * c * dtype.itemsize
    sets = max(2, min(16, -(-2 * cache_bytes(device) // size)))
    data = [[torch.randn(b, c, device=device).mul_(3).to(dtype) for _ in range(2)] for _ in range(sets)]
    for student, _ in data:
        student.requires_grad_()
    losses: dict[str, Loss] = {
        "eager": eager(counts),
        "compiled": torch.compile(eager(counts), dynamic=False),
        "reference": ours(counts, "reference", device),
    }
    if device.type == "cpu":
        losses["reference compiled"] = ours(counts, "compiled", device)
    if "liger" not in not_run:
        losses["liger"] = liger(counts)
    steps = {name: _step(loss, data) for name, loss in losses.items()}
    if "fasttrain" not in not_run:
        fused = ours(counts, "triton", device)
        steps["fasttrain"] = _step(fused, data)
        steps["fasttrain in torch.compile"] = _step(torch.compile(fused, dynamic=False), data)
        # the function, unlike the module, always expects an upstream gradient of 1
        forgetful = partial(soft_target_loss, class_counts=counts, kind="kd", temperature=T, implementation="triton")
        steps["fasttrain, unexpected upstream gradient"] = _step(forgetful, data, 0.5)
        recalled = _recalled([t for _, t in data], counts)
        for name, targets in recalled.items():
            loss = ours(counts, "triton", device)
            steps[f"fasttrain, {name}"] = _step(loss, [[s, t] for (s, _), t in zip(data, targets, strict=True)])
    cases = side_by_side(steps, device, sets=sets, rounds=rounds)
    floor = 3 * b * c * dtype.itemsize / bandwidth * 1e3
    return _rows(cases, f"B={b} C={c}", {"batch": b, "classes": c, "sources": list(counts)}, floor)


def _recalled(targets: list[Tensor], counts: tuple[int, ...]) -> dict[str, list[Any]]:
    """The targets as they are recalled: probabilities and the 16 largest of each source, in float16."""
    probabilities, top_k = [], []
    for target in targets:
        parts = [part.float().softmax(1) for part in target.split(counts, 1)]
        tops = [part.topk(min(16, part.shape[1]), dim=1) for part in parts]
        probabilities.append(Probabilities(torch.cat(parts, 1).half()))
        values, indices = (torch.cat([t[i] for t in tops], 1) for i in (0, 1))
        top_k.append(TopK(values.half(), indices.to(torch.int16), tuple(min(16, c) for c in counts)))
    return {"probabilities": probabilities, "top-16": top_k}


def _step(loss: Loss, data: list[list[Any]], factor: float = 1.0) -> Callable[[int], None]:
    def step(i: int) -> None:
        student, target = data[i]
        student.grad = None
        total = loss(student, target).sum()
        (total if factor == 1.0 else total * factor).backward()

    return step


def _on(step: Callable[[Tensor], Tensor], data: list[Tensor], i: int) -> Tensor:
    return step(data[i])


def _inputs(
    b: int, size: int, side: int, dtype: torch.dtype, device: torch.device, bandwidth: float, not_run, rounds: int
) -> list[dict[str, Any]]:
    mean, std = torch.tensor([123.7, 116.3, 103.5], device=device), torch.tensor([58.4, 57.1, 57.4], device=device)
    moved = b * 3 * (size * size + side * side * dtype.itemsize)
    sets = max(2, min(16, -(-2 * cache_bytes(device) // moved)))
    data = [
        torch.randint(0, 256, (b, 3, size, size), dtype=torch.uint8, device=device).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(sets)
    ]

    def plain(pixels: Tensor) -> Tensor:
        return network_input(pixels, mean, std, size=side, dtype=dtype)

    def bilinear(pixels: Tensor) -> Tensor:  # without the antialiasing that the compiler cannot see through
        x = F.interpolate(pixels.float(), size=(side, side), mode="bilinear") if side != size else pixels.float()
        x = ((x - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)).to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    steps = {"plain": plain, "plain, not antialiased": bilinear, "compiled": torch.compile(bilinear, dynamic=False)}
    if "fasttrain" not in not_run:
        steps["fasttrain"] = lambda pixels: network_input(
            pixels, mean, std, size=side, dtype=dtype, implementation="triton"
        )
    numbered = {name: partial(_on, step, data) for name, step in steps.items()}
    cases = side_by_side(numbered, device, sets=sets, rounds=rounds)
    floor = moved / bandwidth * 1e3
    return _rows(cases, f"input B={b} {size} to {side} px", {"batch": b, "size": size, "side": side}, floor)


def _rows(cases, where: str, settings: dict[str, Any], floor: float) -> list[dict[str, Any]]:
    rows = []
    for name, case in cases.items():
        row = {"name": f"{name}, {where}", "ms": case.ms, "floor_ms": floor, "repeats": case.repeats} | settings
        row |= {"copy_share": floor / case.ms, "launches": case.launches, "peak_bytes": case.peak_bytes}
        row["relative_to"] = {f"{n}, {where}": c.ms / case.ms for n, c in cases.items() if n != name}
        rows.append(row)
        extra = "" if case.launches is None else f" {case.launches:3} launches {case.peak_bytes / 2**20:7.0f} MiB"
        first = next(iter(cases.values())).ms / case.ms
        print(
            f"{row['name']:62} {case.ms:9.4f} ms {100 * floor / case.ms:5.0f} % of copy {first:6.2f} x{extra}",
            flush=True,
        )
    return rows
