"""A driver that stands in for a GPU's: kernels are compiled for sm_90, and launches are written down instead of done.

For processes of their own, without Triton's interpreter; ``install()`` first, then use the losses with tensors on the CPU. What
they return is whatever was in memory.
"""

from types import SimpleNamespace

import triton
from fasttrain.kernels import fused
from triton.backends.compiler import GPUTarget

LAUNCHES: list[tuple] = []  # kernel, grid, arguments


class _Launcher:
    def __init__(self, src, metadata) -> None:
        pass

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments) -> None:
        LAUNCHES.append((function, (x, y, z), arguments))


def _load(name, binary, shared, device):
    return binary, binary, 0, 0, 1024  # a kernel is known by its machine code


class _Driver:
    launcher_cls = _Launcher
    utils = SimpleNamespace(
        load_binary=_load,
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device) -> int:
        return 0


def install() -> None:
    """Makes it the driver, and lets the losses take tensors on the CPU for a GPU's."""
    assert not fused.INTERPRETED
    triton.runtime.driver.set_active(_Driver())
    fused._check_device = lambda student_BC: None
