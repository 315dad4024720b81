"""Suite ``kernels``: the soft-target losses (forward and backward) and a network's input, ours and others'.

    fasttrain bench kernels [--batch 256,8192] [--classes 365,1365] [--dtype bf16] [--json FILE]

Rows of a loss: ``eager`` is what one writes in plain PyTorch (``kl_div`` of two softmaxes, source after source), ``compiled``
the same under torch.compile, ``liger`` the same with Liger's KL kernel; ``reference`` and ``fasttrain`` are ours, the latter
the fused Triton kernel: ``in groups`` moves memory 16 bytes at a time (kernels/tiles.py), ``padded rows`` does so where rows
begin at multiples of 16 bytes, ``CUDA graph`` leaves out the host. 1365 classes are two sources' (1000 and 365); other counts
are one source's. Data are random and new, logits in ``--dtype``; the loss is kd at T = 2. ``floor`` is the least that must be
moved (student and target read, gradient written) at the copy bandwidth measured in the same run. ``ms`` is a step as it is
called, host included; on a GPU ``busy_ms`` is what its kernels and copies take, added up. Beside a network's own work the host
is ahead, and only that counts.

On a GPU ``goals`` says of each goal that was measured whether it is held.

Shape suffixes: B batch, C all sources' classes side by side, M sources.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from fasttrain.kernels import Probabilities, SoftTargetLoss, TopK, implementation, network_input, soft_target_loss
from torch import Tensor

from .timing import Case, cache_bytes, copy_bandwidth, recorded, side_by_side

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SOURCES = {1365: (1000, 365)}
T = 2.0
SUMMED = 2  # launches that every row has alike: of the sources' losses the sum, and a gradient of 1 for it
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
    goals = goals_of(rows) if device.type == "cuda" and dtype == torch.bfloat16 else []
    for goal in goals:
        print(f"goal: {'held' if goal['held'] else 'missed'}: {goal['name']}: {goal['measured']:.2f}", flush=True)
    return {"copy_bytes_per_s": bandwidth, "dtype": str(dtype), "rows": rows, "goals": goals, "not_run": not_run}


def goals_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the losses are to reach in bf16 at 1365 classes, as far as the rows have it.

    Returns:
        ``name``, ``measured``, ``limit``, and ``held``. Of both times of a step: as called, and what the GPU is busy.
    """
    named = {row["name"]: row for row in rows}
    out: list[dict[str, Any]] = []

    def goal(name: str, value: float, limit: float, at_most: bool = False) -> None:
        held = value <= limit if at_most else value >= limit
        out.append(
            {"name": f"{name} {limit:g} {'at most' if at_most else 'at least'}", "measured": value, "limit": limit}
        )
        out[-1]["held"] = held

    def others(b: int, limits: dict[str, float]) -> None:
        mine = named[f"fasttrain, B={b} C=1365"]
        for (other, limit), key in product(limits.items(), ("ms", "busy_ms")):
            theirs = named.get(f"{other}, B={b} C=1365")
            if theirs and mine[key] and theirs[key]:
                goal(f"B={b}: {key} of {other} over fasttrain's,", theirs[key] / mine[key], limit)

    if "fasttrain, B=8192 C=1365" in named:
        mine = named["fasttrain, B=8192 C=1365"]
        for key in ("ms", "busy_ms"):
            if mine[key]:
                goal(f"B=8192: share of the copy bandwidth by {key},", mine["floor_ms"] / mine[key], 0.8)
        others(8192, {"eager": 4.0, "compiled": 1.3, "liger": 1.3})
    if "fasttrain, B=512 C=1365" in named:
        launches = named["fasttrain, B=512 C=1365"]["launches"]
        goal("B=512: launches of the losses alone,", launches - SUMMED, 3, at_most=True)
        others(512, {"compiled": 1.0})
    return out


def numbers(text: str) -> tuple[int, ...]:
    """An option's numbers, with commas between them."""
    return tuple(int(part) for part in text.split(","))


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fasttrain bench kernels", exit_on_error=False, add_help=False)
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
        steps |= _in_groups(counts, data)
        recalled = _recalled([t for _, t in data], counts)
        for name, targets in recalled.items():
            loss = ours(counts, "triton", device)
            steps[f"fasttrain, {name}"] = _step(loss, [[s, t] for (s, _), t in zip(data, targets, strict=True)])
    cases = side_by_side(steps, device, sets=sets, rounds=rounds)
    if "fasttrain" in steps and device.type == "cuda":
        cases |= _graphs({n: steps[n] for n in ("fasttrain", "fasttrain, in groups")}, device, sets, rounds, not_run)
    floor = 3 * b * c * dtype.itemsize / bandwidth * 1e3
    return _rows(cases, f"B={b} C={c}", {"batch": b, "classes": c, "sources": list(counts)}, floor)


def _in_groups(counts: tuple[int, ...], data: list[list[Tensor]]) -> dict[str, Any]:
    """Steps whose memory is moved 16 bytes at a time, of rows side by side and of padded ones."""
    from fasttrain.kernels import fused  # imports triton
    from fasttrain.kernels.problem import problem_of
    from fasttrain.kernels.tiles import Tiling

    problem = problem_of(counts, "kd", T, "batchmean")

    def loss() -> Loss:
        state = fused.State()
        return lambda student, target: fused.fused(problem, student, target, None, state, Tiling(wide=True))

    c = sum(counts)
    pad = -c % (16 // data[0][0].element_size())
    padded = [[F.pad(x.detach(), (0, pad))[:, :c] for x in pair] for pair in data]
    for student, _ in padded:
        student.requires_grad_()
    steps = {"fasttrain, in groups": _step(loss(), data)}
    return steps | ({"fasttrain, in groups, padded rows": _step(loss(), padded)} if pad else {})


def _graphs(
    steps: dict[str, Callable[[int], None]], device: torch.device, sets: int, rounds: int, not_run: dict[str, str]
) -> dict[str, Case]:
    """Steps as CUDA graphs, timed in turn; one graph has a step on each data set."""
    graphs = {}
    for name, step in steps.items():
        try:
            graphs[f"{name}, CUDA graph"] = recorded(step, sets)
        except RuntimeError as error:
            not_run[f"{name}, CUDA graph"] = " ".join(str(error).split())[:200]
    cases = side_by_side(graphs, device, sets=1, rounds=rounds) if graphs else {}
    for case in cases.values():
        case.repeats = [ms / sets for ms in case.repeats]
        assert case.launches is not None and case.busy_ms is not None
        case.launches, case.busy_ms = case.launches // sets, case.busy_ms / sets
    return cases


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
        total = loss(student, target).sum()
        # not backward(), which would copy a gradient whose rows are padded, as no layer before the losses does
        torch.autograd.grad(total if factor == 1.0 else total * factor, student)

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
        row |= {"over_floor": case.ms / floor, "copy_share": floor / case.ms, "busy_ms": case.busy_ms}
        row |= {"launches": case.launches, "peak_bytes": case.peak_bytes}
        row["relative_to"] = {f"{n}, {where}": c.ms / case.ms for n, c in cases.items() if n != name}
        rows.append(row)
        extra = ""
        if case.launches is not None:
            extra = f" busy {case.busy_ms:8.4f} ms {case.launches:3} launches {case.peak_bytes / 2**20:7.0f} MiB"
        first = next(iter(cases.values())).ms / case.ms
        print(
            f"{row['name']:62} {case.ms:9.4f} ms {100 * floor / case.ms:5.0f} % of copy {first:6.2f} x{extra}",
            flush=True,
        )
    return rows
