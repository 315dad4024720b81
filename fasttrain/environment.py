"""What a figure was made on: the machine, the versions, the commit."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .device import cpu_name

_PACKAGES = ("fasttrain", "torch", "torchvision", "timm", "numpy", "triton", "nvidia-dali-cuda130", "decord2", "ffcv")


def environment() -> dict[str, Any]:
    """Machine, versions of the packages that are installed, and the commit of the source tree (None outside one)."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine = {"cpu": cpu_name(), "cores": torch.get_num_threads(), "gpu": gpus, "system": platform.platform()}
    return {"machine": machine, "versions": versions(), "commit": commit()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter to a figure, those that are installed."""
    out = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def commit() -> str | None:
    """The commit of the source tree that runs, with ``+`` if files in it have changed."""
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
