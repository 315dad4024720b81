"""Which implementation of the losses runs, and why. It is chosen once, by the kind of device, and never by the data."""

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from .reference import differentiable, loss_and_gradient

IMPLEMENTATIONS = ("auto", "triton", "compiled", "reference")


def implementation(device: str, wanted: str = "auto") -> tuple[str, str]:
    """Which implementation the losses use on a device, and why.

    Args:
        device: its type, ``cuda`` or ``cpu``.
        wanted: one of ``IMPLEMENTATIONS``.

    Returns:
        ``triton``, ``compiled`` (the reference under torch.compile) or ``reference``, and a sentence.

    Raises:
        ValueError: an unknown one, or ``triton`` where it cannot run.
    """
    if wanted not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is one of {', '.join(IMPLEMENTATIONS)}, not {wanted!r}")
    obstacle, interpreted = _obstacle(device), device == "cpu" and _interpreted()
    if wanted == "triton" and obstacle and not interpreted:
        raise ValueError(f"the triton kernels (run.kernels: triton) cannot run here: {obstacle}")
    if wanted != "auto":
        return wanted, "as asked"
    if not obstacle:
        return "triton", "one fused launch for all sources"
    return "reference", f"plain PyTorch in float32; no fused kernel: {obstacle}"


def function(name: str) -> Callable[..., Any]:
    """The implementation of that name: ``(problem, student_BC, target, valid_B, state) -> [M]``."""
    if name == "triton":
        from .fused import fused  # imports triton

        return fused
    return partial(_stateless, _compiled() if name == "compiled" else loss_and_gradient)


def _stateless(core, problem, student_BC, target, valid_B, state) -> torch.Tensor:
    return differentiable(core, problem, student_BC, target, valid_B)


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(loss_and_gradient)


@cache
def _obstacle(device: str) -> str:
    """Why Triton cannot run on such a device; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        from . import fused
    except Exception as error:  # a broken installation can raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    if device == "cuda":
        if fused.INTERPRETED:
            return "TRITON_INTERPRET is set"
        return "" if torch.version.cuda else "this PyTorch is not built for CUDA"
    return f"triton does not run on {device}"


def _interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU (TRITON_INTERPRET=1): for tests, far too slow to train."""
    try:
        from . import fused
    except Exception:
        return False
    return fused.INTERPRETED
