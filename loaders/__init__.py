"""fasttrain.loaders: batches of images or clips in a known order, each view a pure function of (seed, epoch, index).

Imports nothing else of fasttrain. :func:`open_loader` is the way in; a new back end is a new file and a line in
:data:`LOADERS`.
"""

from collections.abc import Callable

import torch

from .base import EpochLoader, Growth, LoaderSpec
from .batch import Batch, Loader
from .choose import choose_loader
from .clips import ClipPlan
from .datasets import DATASETS, Dataset, labelled_part, open_dataset
from .ffcv_loader import FfcvLoader
from .puzzle import Puzzle
from .resident import ResidentLoader
from .synthetic import SyntheticLoader
from .torch_loader import TorchLoader
from .video_loader import VideoLoader
from .views import ViewPlan, evaluation


def _dali(spec: LoaderSpec, device: torch.device | str, workers: int, **options) -> EpochLoader:
    from .dali_loader import DaliLoader  # when it is asked for: DALI is slow to import

    return DaliLoader(spec, device, workers, **options)


LOADERS: dict[str, Callable[..., EpochLoader]] = {
    "resident": lambda spec, device, workers, **options: ResidentLoader(spec, device),
    "ffcv": lambda spec, device, workers, **options: FfcvLoader(spec, device, workers),
    "dali": _dali,
    "torch": lambda spec, device, workers, **options: TorchLoader(spec, device, workers),
    "video": lambda spec, device, workers, **options: VideoLoader(spec, device, workers),
    "synthetic": lambda spec, device, workers, **options: SyntheticLoader(spec, device),
}

__all__ = [
    "DATASETS",
    "LOADERS",
    "Batch",
    "ClipPlan",
    "Dataset",
    "FfcvLoader",
    "Growth",
    "Loader",
    "LoaderSpec",
    "Puzzle",
    "ResidentLoader",
    "SyntheticLoader",
    "TorchLoader",
    "VideoLoader",
    "ViewPlan",
    "choose_loader",
    "evaluation",
    "labelled_part",
    "open_dataset",
    "open_loader",
]


def open_loader(
    name: str, spec: LoaderSpec, device: torch.device | str = "cpu", workers: int = 0, **options
) -> EpochLoader:
    """Opens a loader by name; all names but ``synthetic`` serve the same batches.

    Args:
        name: a key of :data:`LOADERS`.
        spec: what to load.
        device: where the batches shall be.
        workers: threads (``ffcv``, ``dali``, ``video``; 0: one for each core) or processes (``torch``; 0: none).
        options: of that loader alone: ``hw_decoder_load``, ``crops`` and ``fancy`` of ``dali``.

    Raises:
        ValueError: unknown name, or the loader cannot serve this here.
    """
    if name not in LOADERS:
        raise ValueError(f"data.loader: no loader is called {name!r}; there are auto, {', '.join(LOADERS)}")
    if spec.clip is not None and name not in ("video", "synthetic"):
        raise ValueError(f"data.loader: {name} serves images; clips (data.frames) come from video, or auto")
    return LOADERS[name](spec, device, workers, **options)
