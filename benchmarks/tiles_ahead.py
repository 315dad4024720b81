"""The soft-target kernel compiled as a step would have it compiled, without a GPU: for the suite ``tiles``, by many processes.

Triton keeps what it compiled, so the same step finds it ready afterwards. ``prepare`` first, before Triton is imported; a process
that did so cannot launch anything any more.
"""

import os
from types import SimpleNamespace
from typing import Any

import torch


def prepare() -> None:
    """Makes this process one that only compiles: no interpreter, no GPU."""
    os.environ.pop("TRITON_INTERPRET", None)


def resources_of(
    class_counts: tuple[int, ...], pad: int, dtype: torch.dtype, settings: dict[str, Any], architecture: int
) -> list[dict[str, Any]]:
    """Compiles what one step (kd, logits, forward and backward) launches.

    Args:
        pad: elements between two rows of student and target.
        settings: of a :class:`fasttrain.kernels.tiles.Tiling`.

    Returns:
        Of each launch what the machine code needs: :class:`fasttrain.kernels.resources.Resources`.
    """
    from dataclasses import asdict

    import triton
    from fasttrain.kernels import fused
    from fasttrain.kernels.problem import problem_of
    from fasttrain.kernels.resources import measured
    from fasttrain.kernels.tiles import Tiling
    from triton.backends.compiler import GPUTarget

    found: list[dict[str, Any]] = []
    target = GPUTarget("cuda", architecture, 32)
    stub = {"get_current_target": lambda: target, "get_current_device": lambda: 0, "get_current_stream": lambda d: 0}
    triton.runtime.driver.set_active(SimpleNamespace(**stub))

    def compiled(kernel: Any, key: object, grid: tuple, arguments: tuple, warps: int) -> None:
        binary = kernel.warmup(*arguments, grid=grid, num_warps=warps)
        found.append(asdict(measured(kernel.__name__, binary, architecture)))

    fused.launch, fused._check_device = compiled, lambda student_BC: None
    rows, classes = 16, sum(class_counts)  # as large batches: a multiple of 16
    student, teacher = (torch.zeros(rows, classes + pad, dtype=dtype)[:, :classes] for _ in range(2))
    student.requires_grad_()
    problem = problem_of(class_counts, "kd", 2.0, "batchmean")
    loss_M = fused.fused(problem, student, teacher, None, fused.State(), Tiling(**settings))
    torch.autograd.grad(loss_M.sum(), student)
    return found
