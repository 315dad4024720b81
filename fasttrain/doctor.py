"""What this machine has, which back end each part uses, and why."""

import os
from typing import Any

import torch
import torch.distributed as dist

from . import kernels
from .device import choose_compile, choose_device, choose_dtype, choose_source_dtype, cpu_name
from .environment import versions
from .loaders.choose import chosen_here
from .loaders.parts import import_part, missing_part

OPTIONAL = {
    "ffcv": ("ffcv", "loader of packed images on the CPU; make test builds it, or pip install 'fasttrain[ffcv]'"),
    "dali": ("nvidia.dali", "image loader on the GPU (and on the CPU)"),
    "decord": ("decord", "video decoder; package decord2"),
    "torchcodec": ("torchcodec.decoders", "video decoder; pip install 'fasttrain[video]', and apt-get install ffmpeg"),
    "pynvvideocodec": ("PyNvVideoCodec", "NVDEC, for rows of bench video; needs NVIDIA's driver to be imported"),
    "av": ("av", "video decoder that reads what the others do not, and looks through files"),
    "triton": ("triton", "fused kernels"),
    "apex": ("apex.optimizers", "FusedSGD; from NVIDIA's source only, PyPI's apex is something else"),
    "elpv": ("elpv_dataset", "the demo's photographs; make demo installs them"),
}


def available(part: str) -> tuple[bool, str]:
    """Whether an optional part can be imported here, and if not, why."""
    module, purpose = OPTIONAL[part]
    try:
        import_part(module)
    except Exception as error:  # a broken installation can raise anything
        return False, f"{type(error).__name__}: {' '.join(str(error).split())[:160]} ({purpose})"
    return True, purpose


def examine() -> dict[str, Any]:
    """Machine, versions, choices and optional parts."""
    device = choose_device("auto")
    dtype, why = choose_dtype("auto", device)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kernel, kernel_why = kernels.implementation(device.type)
    return {
        "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "gpu": gpus},
        "versions": versions(),
        "uses": {
            "device": f"{device} ({', '.join(gpus) if gpus else 'no CUDA device here'})",
            "precision": f"{str(dtype).removeprefix('torch.')} ({why})",
            "loader": _loaders(device.type),
            "videos": _videos(),
            "soft-target losses": f"{kernel} ({kernel_why})",
            "live sources": _sources(device, dtype),
            "compiled step": "{} ({})".format(*choose_compile("auto", device)),
            "optimiser": "torch.optim.SGD(fused=True)",
            "several processes": _processes(device.type),
        },
        "optional": {part: dict(zip(("works", "note"), available(part), strict=True)) for part in OPTIONAL},
    }


def _sources(device: torch.device, dtype: torch.dtype) -> str:
    """How ``transfer.bank`` and ``transfer.precision: auto`` run them."""
    precision = str(choose_source_dtype("auto", dtype, device)).removeprefix("torch.")
    how = "compiled, or a CUDA graph, in a stream of their own" if device.type == "cuda" else "batch norms folded"
    return f"{precision}, {how}"


def _processes(device: str) -> str:
    """Over what they add up gradients, and agree."""
    if not dist.is_available() or not dist.is_gloo_available():
        return "none: this PyTorch has no Gloo"
    if device == "cuda":
        return (
            "gradients over NCCL, the rest over Gloo" if dist.is_nccl_available() else "none: this PyTorch has no NCCL"
        )
    return "Gloo"


def _loaders(device: str) -> str:
    """What ``data.loader: auto`` takes here for each kind of data set."""
    here = "resident where the decoded images fit into a quarter of the memory"
    return f"{here}; {chosen_here(device)}"


def _videos() -> str:
    """What ``data.decoder: auto`` takes here."""
    if missing_part("av"):
        return "packed files only (no av)"
    from .loaders.video.decoders import choose_decoder

    return (
        f"packed files: our own decoder; other files: {choose_decoder('auto')[1]}, and pyav where that would be wrong"
    )


def to_text(content: dict[str, Any]) -> str:
    """For people."""
    machine = content["machine"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['gpu']) or 'no GPU'}"]
    lines.append(", ".join(f"{k} {v}" for k, v in content["versions"].items()))
    lines += [f"{part}: {text}" for part, text in content["uses"].items()]
    lines += [f"{part}: {'here' if d['works'] else 'NOT HERE'}; {d['note']}" for part, d in content["optional"].items()]
    return "\n".join(lines)
