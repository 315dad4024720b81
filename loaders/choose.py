"""What ``data.loader: auto`` means here, and why."""

import os

import torch

from .base import LoaderSpec
from .datasets.base import Encoded
from .datasets.beton import Packed
from .parts import missing_part
from .show import load_libjpeg
from .video import Clips


def choose_loader(spec: LoaderSpec, device: torch.device | str = "cpu") -> tuple[str, str]:
    """(loader, why): video for clips; resident where the decoded split fits into a quarter of the memory; else ffcv for a
    packed file on the CPU's decoder, dali where a GPU shall decode and FFCV is not here; else torch."""
    device = torch.device(device)
    if spec.clip is not None:
        slow = isinstance(spec.dataset.read, Clips) and spec.dataset.read.in_files
        return "video", "clips" + ("; `fasttrain pack` makes a file that loads faster" if slow else "")
    fits, sizes = _fits(spec, device)
    if fits:
        return "resident", sizes
    read = spec.dataset.read
    if isinstance(read, Packed) and not spec.stored:
        missing = missing_part("ffcv") or _missing_libjpeg()
        if not missing:
            return "ffcv", f"a packed file; {sizes}"
        if device.type == "cuda" and not missing_part("nvidia.dali"):
            return "dali", f"a packed file, and FFCV is not here ({missing}); {sizes}"
        return "torch", f"SLOW: a packed file, and FFCV is not here ({missing}); {sizes}"
    if device.type == "cuda" and isinstance(read, Encoded) and not spec.stored and not missing_part("nvidia.dali"):
        return "dali", f"files that a GPU can decode; {sizes}"
    hint = "; `fasttrain pack` makes a file that loads faster" if isinstance(read, Encoded) and not spec.stored else ""
    return "torch", f"{sizes}{hint}"


def _missing_libjpeg() -> str:
    try:
        load_libjpeg()
    except ValueError as error:
        return str(error)
    return ""


def _fits(spec: LoaderSpec, device: torch.device) -> tuple[bool, str]:
    """Whether the decoded split fits into a quarter of the device's memory, and the sizes in words."""
    read = spec.dataset.read
    if not spec.stored and isinstance(read, Packed):
        sides = {(h, w) for h, w in zip(read.file.height_N[spec.index_N], read.file.width_N[spec.index_N], strict=True)}
        if len(sides) > 1:
            return False, "images of several sizes"
        ((height, width),) = sides
    elif spec.stored:
        height = width = spec.stored
    elif isinstance(read, Clips):
        sides = set(map(tuple, read.shape_N3[spec.index_N, 1:].tolist()))
        if len(sides) > 1:
            return False, "videos of several sizes, or some that cannot be read"
        ((height, width),) = sides
    elif spec.dataset.name in ("folder", "imagenet", "list", "places365", "tar", "voc"):
        return False, "files of any size are not resident unless data.stored gives them one"
    else:
        height, width = read(int(spec.index_N[0])).shape[:2]
    need = len(spec.index_N) * 3 * (int(height) * int(width) + (spec.still**2 if spec.stored else 0))
    free = _free_memory(device)
    sizes = f"{need / 2**30:.2f} GiB decoded, {free / 2**30:.1f} GiB free on {device}"
    return need * 4 <= free, sizes if need * 4 <= free else f"too large to be resident: {sizes}"


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not os.path.exists("/proc/meminfo"):
        return 0
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
