"""fasttrain.loaders: image batches in a known order, each view a pure function of (seed, epoch, index).

Imports nothing else of fasttrain. :func:`open_loader` is the way in; a new back end is a new file and a line in
:data:`LOADERS`.
"""

from collections.abc import Callable

import torch

from .base import EpochLoader, LoaderSpec
from .batch import Batch, Loader
from .datasets import DATASETS, Dataset, labelled_part, open_dataset
from .resident import ResidentLoader
from .torch_loader import TorchLoader
from .views import ViewPlan, evaluation

LOADERS: dict[str, Callable[..., EpochLoader]] = {
    "resident": lambda spec, device, workers: ResidentLoader(spec, device),
    "torch": TorchLoader,
}

__all__ = [
    "DATASETS",
    "LOADERS",
    "Batch",
    "Dataset",
    "Loader",
    "LoaderSpec",
    "ResidentLoader",
    "TorchLoader",
    "ViewPlan",
    "choose_loader",
    "evaluation",
    "labelled_part",
    "open_dataset",
    "open_loader",
]


def open_loader(name: str, spec: LoaderSpec, device: torch.device | str = "cpu", workers: int = 0) -> EpochLoader:
    """Opens a loader by name; all names serve the same batches.

    Raises:
        ValueError: unknown name.
    """
    if name not in LOADERS:
        raise ValueError(f"data.loader: no loader is called {name!r}; there are auto, {', '.join(LOADERS)}")
    return LOADERS[name](spec, device, workers)


def choose_loader(spec: LoaderSpec, device: torch.device | str = "cpu") -> tuple[str, str]:
    """What ``auto`` means here: (loader, why). Resident where the decoded split fits into a quarter of the memory."""
    height, width = (spec.stored, spec.stored) if spec.stored else spec.dataset.read(int(spec.index_N[0])).shape[:2]
    need = len(spec.index_N) * 3 * (height * width + (spec.still**2 if spec.stored else 0))
    free = _free_memory(torch.device(device))
    sizes = f"{need / 2**30:.2f} GiB decoded, {free / 2**30:.1f} GiB free on {device}"
    if need * 4 > free:
        return "torch", f"too large to be resident: {sizes}"
    if not spec.stored and spec.dataset.name == "folder":
        return "torch", "files of any size are not resident unless data.stored gives them one"
    return "resident", sizes


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
