"""Every kernel launched a few times on small problems, for NVIDIA's compute-sanitizer to watch.

    python -m tests.gpu.sanitize                       # first: compiles, checks values
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python -m tests.gpu.sanitize
    ..                               --tool racecheck, initcheck, synccheck
    ..                               --tool memcheck ..  --plant out-of-bounds     # must end with 9
    ..                               --tool racecheck .. --plant race              # must end with 9

Without PyTorch's cache of memory every tensor is an allocation of its own, so that a kernel's reach over its end is seen.
racecheck looks at shared memory only. ``--plant`` runs one kernel that is wrong, and nothing else: it shows that the tool sees
what it should. Its reach stays within the 512 bytes that the driver reserves, so it does no harm. ``--device cpu`` runs the
cases in Triton's interpreter (TRITON_INTERPRET=1).

Exit code: 1 where a value differs from the reference's by more than rounding.

Shape suffixes: B batch, C all sources' classes side by side.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from fasttrain.kernels import Probabilities, TopK, fused, network_input, soft_target_loss
from fasttrain.kernels.problem import problem_of
from fasttrain.kernels.tiles import Tiling
from torch import Tensor

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # two units in the last place


@dataclass(frozen=True)
class Case:
    """A problem for the losses.

    Attributes:
        layout: ``contiguous``, ``late`` (begins one element after a multiple of 16 bytes), ``padded`` (room between rows).
        weights: of the rows: ``none``, ``some`` or ``zero``.
    """

    rows: int
    counts: tuple[int, ...]
    form: str = "logits"
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    weights: str = "none"
    wide: bool = False
    kind: str = "kd"


CASES = (
    Case(1, (1,)),
    Case(7, (1000, 365), dtype=torch.bfloat16),
    Case(8, (1000, 365), dtype=torch.bfloat16, wide=True),
    Case(8, (1000, 365), dtype=torch.bfloat16, wide=True, layout="late"),
    Case(7, (1000, 365), dtype=torch.bfloat16, wide=True, layout="padded", weights="some"),
    Case(5, (16, 17), kind="ce", layout="late"),
    Case(5, (4097,), dtype=torch.float16),
    Case(8, (4097,), dtype=torch.float16, wide=True),
    Case(3, (4096,), wide=True),
    Case(3, (10, 5001), weights="zero"),
    Case(3, (30, 70), "probabilities", torch.bfloat16, weights="some"),
    Case(8, (30, 70), "probabilities", torch.bfloat16, wide=True),
    Case(3, (30, 70), "uniform"),
    Case(8, (30, 70), "uniform", wide=True, weights="some"),
    Case(3, (10, 5001), "drop", torch.bfloat16),
)
INPUTS = ((0, torch.bfloat16), (23, torch.float32), (40, torch.float16))  # side (0: as it is), type


def problems(device: str) -> Iterator[tuple[str, float, float]]:
    """Runs every case: forward and backward, the upstream gradient as expected, then another, then without a gradient.

    Yields:
        What it was, the largest error relative to what is allowed, and 1.
    """
    for case in CASES:
        yield str(case), _losses(case, device), 1.0
    for size, dtype in INPUTS:
        yield f"input to {size or 'its own size'}, {dtype}", _input(size, dtype, device), 1.0


def _losses(case: Case, device: str) -> float:
    torch.manual_seed(0)
    student, target = _laid_out(case, device), _target(case, device)
    weight = None
    if case.weights != "none":
        weight = torch.zeros(case.rows, device=device)
        if case.weights == "some":
            weight[::2] = 1.5
    options: dict[str, Any] = {"kind": case.kind, "temperature": 2.0}
    problem = problem_of(case.counts, case.kind, 2.0, "batchmean")
    state, worst = fused.State(), 0.0
    for factor in (1.0, 0.5, 0.5):
        loss_M = fused.fused(problem, student, target, weight, state, Tiling(wide=case.wide))
        (grad_BC,) = torch.autograd.grad((loss_M * factor).sum(), student)
        leaf = student.detach().contiguous().requires_grad_()
        expected_M = soft_target_loss(leaf, target, case.counts, valid_B=weight, implementation="reference", **options)
        (expected_BC,) = torch.autograd.grad((expected_M * factor).sum(), leaf)
        # a gradient is a difference of probabilities, and has their rounding, not its own
        small = 2e-6 * 2.0 * factor / case.rows
        worst = max(worst, error(loss_M, expected_M, torch.float32, 1e-5))
        worst = max(worst, error(grad_BC, expected_BC, case.dtype, small))
    with torch.no_grad():
        alone_M = fused.fused(problem, student, target, weight, None, Tiling(wide=case.wide))
    return max(worst, error(alone_M, expected_M, torch.float32, 1e-5))


def _laid_out(case: Case, device: str) -> Tensor:
    classes = sum(case.counts)
    values = (torch.randn(case.rows, classes, device=device) * 3).to(case.dtype)
    if case.layout == "late":
        memory = torch.full((case.rows * classes + 1,), torch.nan, dtype=case.dtype, device=device)
        values = memory[1:].view(case.rows, classes).copy_(values)
    elif case.layout == "padded":
        memory = torch.full((case.rows, -(-classes // 8) * 8), torch.nan, dtype=case.dtype, device=device)
        values = memory[:, :classes].copy_(values)
    return values.requires_grad_()


def _target(case: Case, device: str):
    logits = _laid_out(case, device).detach()
    if case.form == "logits":
        return logits
    parts = [part.float().softmax(1) for part in logits.split(case.counts, 1)]
    if case.form == "probabilities":
        return Probabilities(torch.cat(parts, 1).half())
    tops = [part.topk(min(5, part.shape[1]), dim=1) for part in parts]
    values, indices = torch.cat([t.values for t in tops], 1).half(), torch.cat([t.indices for t in tops], 1)
    remainder = "drop" if case.form == "drop" else "uniform"
    return TopK(values, indices.to(torch.int16), tuple(t.values.shape[1] for t in tops), remainder)


def _input(size: int, dtype: torch.dtype, device: str) -> float:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, 13, 17), dtype=torch.uint8, device=device)
    mean, std = torch.tensor([120.0, 110, 100], device=device), torch.tensor([60.0, 61, 62], device=device)
    worst = 0.0
    for layout in (torch.channels_last, torch.contiguous_format):
        given = pixels.contiguous(memory_format=layout)
        plain, ours = (
            network_input(given, mean, std, size=size, dtype=dtype, implementation=i) for i in ("plain", "triton")
        )
        worst = max(worst, error(ours, plain, dtype, 1e-5))
    return worst


def error(ours: Tensor, theirs: Tensor, dtype: torch.dtype, small: float) -> float:
    """The largest error over what is allowed: rounding to a type, and ``small`` everywhere."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    worst = float(((ours - theirs).abs() / (TOLERANCE[dtype] * theirs.abs() + small)).max())
    return worst if worst == worst else float("inf")


@triton.jit
def _beyond(x, out, N: tl.constexpr):
    """Reads N numbers, whatever the length of ``x``."""
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i))


# a warp reads what another one writes, and nothing makes it wait
_RACE = """
extern "C" __global__ void race(float* out) {
    __shared__ float kept[64];
    kept[threadIdx.x] = out[threadIdx.x] + 1.0f;
    out[threadIdx.x] = kept[63 - threadIdx.x];
}
"""


def plant(what: str) -> None:
    """Launches one wrong kernel: ``out-of-bounds`` or ``race``. Harmless, but for the tool that watches."""
    if what == "out-of-bounds":
        _beyond[(1,)](torch.zeros(100, device="cuda"), torch.empty(128, device="cuda"), N=128)
    else:
        kernel = torch.cuda._compile_kernel(_RACE, "race")
        kernel((1, 1, 1), (64, 1, 1), (torch.zeros(64, device="cuda"),))
    torch.cuda.synchronize()


def main(arguments: list[str]) -> int:
    """Prints each case; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.sanitize")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--plant", choices=("out-of-bounds", "race"))
    given = parser.parse_args(arguments)
    if given.plant:
        if given.device != "cuda":
            parser.error("--plant needs a GPU")
        plant(given.plant)
        print(f"planted: {given.plant}")
        return 0
    wrong = 0
    for name, error, limit in problems(given.device):
        wrong += error > limit
        print(f"{'wrong' if error > limit else 'right'} {error:8.3f} {name}", flush=True)
    if given.device == "cuda":
        torch.cuda.synchronize()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
