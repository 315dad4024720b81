"""Triton kernels launched with little work on the host.

Triton's own way (``kernel[grid](..)``) looks at every argument at every launch to find the machine code that was compiled for
arguments of this kind. Here the caller says by a key what that depends on; it is looked at once for each key.
"""

from collections.abc import Hashable
from typing import Any

import triton

_COMPILED: dict[Hashable, Any] = {}


def launch(kernel: Any, key: Hashable, grid: tuple[int, int, int], arguments: tuple, warps: int) -> None:
    """Launches a kernel on the current device and stream.

    Args:
        kernel: a ``triton.jit`` function; in the interpreter, or wrapped for tracing, it is called as Triton has it.
        key: all that the machine code depends on: the device, constants, types, which pointers are multiples of 16
            bytes, which numbers are 1, multiples of 16 or beyond int32.
        arguments: of the kernel, the constant ones last.
    """
    if not isinstance(kernel, triton.JITFunction):
        kernel[grid](*arguments, num_warps=warps)
        return
    compiled = _COMPILED.get(key)
    if compiled is None:
        _COMPILED[key] = kernel[grid](*arguments, num_warps=warps)
    else:
        compiled[grid](*arguments)
