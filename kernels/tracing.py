"""Operators made of Triton kernels: what PyTorch's tracers see of them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton


@triton.jit
def _probe():
    """Only shows whether Triton's interpreter is on."""


INTERPRETED = not isinstance(_probe, triton.JITFunction)


def launcher(kernel: Any) -> Any:
    """The kernel as an operator launches it: traceable, except in the interpreter."""
    return kernel if INTERPRETED else wrap_triton(kernel)


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device; this makes it the tensor's where it is another."""
    if type(tensor) is Tensor and tensor.is_cuda and torch.cuda.current_device() != tensor.device.index:
        return torch.cuda.device(tensor.device)
    return nullcontext()


def operator(name: str, function: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Any:
    """Registers a functional operator whose body launches kernels.

    The compiler sees the kernels themselves. The interpreter's Python cannot be traced: there operators are opaque, and
    ``fake`` gives their output's shape.
    """
    if not INTERPRETED:
        return torch.library.triton_op(name, function, mutates_args=())
    opaque = torch.library.custom_op(name, function, mutates_args=())
    opaque.register_fake(fake)
    return opaque
