"""What a figure was made on, and by which command: the machine, the versions, the commit."""

import os
import platform
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .device import cpu_name

_PACKAGES = (
    *("fasttrain", "torch", "torchvision", "timm", "numpy", "triton", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13"),
    *("decord2", "torchcodec", "pynvvideocodec", "ffcv", "liger-kernel"),
)


def environment() -> dict[str, Any]:
    """Machine, versions of the packages that are installed, and the commit of the source tree (None outside one)."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine = {"cpu": cpu_name(), "cores": torch.get_num_threads(), "gpu": gpus, "system": platform.platform()}
    if gpus:
        machine |= {"processors": len(os.sched_getaffinity(0)), "driver": driver()}
    return {"machine": machine, "versions": versions(), "commit": commit()}


def driver() -> str:
    """Version of NVIDIA's driver, as its own tool says it."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__})"
    lines = out.stdout.split()
    return lines[0] if out.returncode == 0 and lines else "unknown"


def command(arguments: list[str]) -> str:
    """What was typed, without the folders of this machine."""
    words = []
    for word in arguments:
        option, sign, value = word.rpartition("=")
        words.append(option + sign + (Path(value).name if value.startswith(("/", "~")) else value))
    return shlex.join(["fasttrain", *words])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter to a figure, those that are installed."""
    out = {"python": platform.python_version()}
    if torch.cuda.is_available():
        out |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    for name in _PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def commit() -> str | None:
    """The commit of the source tree that runs, with ``+`` if files in it have changed; what FASTTRAIN_COMMIT says where only the
    files were copied."""
    if said := os.environ.get("FASTTRAIN_COMMIT"):
        return said
    folder = Path(__file__).resolve().parent
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
