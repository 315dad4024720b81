"""Data sets by name. A new one is a new file here and a line in :data:`DATASETS`."""

from collections.abc import Callable
from pathlib import Path

from .base import Dataset, labelled_part, split_off, stored_pixels
from .beton import beton
from .cifar import cifar10, cifar100
from .elpv import elpv
from .fashion_mnist import fashion_mnist
from .folder import image_folder
from .hmdb51 import hmdb51
from .imagenet import imagenet
from .kinetics import kinetics400
from .listed import listed
from .motion import motion
from .places365 import places365
from .stl10 import stl10
from .tar import tar_shards
from .toy import toy
from .ucf101 import ucf101
from .videos import videos
from .voc import voc

DATASETS: dict[str, Callable[..., Dataset]] = {
    "beton": beton,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "elpv": elpv,
    "fashion_mnist": fashion_mnist,
    "folder": image_folder,
    "hmdb51": hmdb51,
    "imagenet": imagenet,
    "kinetics400": kinetics400,
    "list": listed,
    "motion": motion,
    "places365": places365,
    "stl10": stl10,
    "tar": tar_shards,
    "toy": toy,
    "ucf101": ucf101,
    "videos": videos,
    "voc": voc,
}
_NO_ROOT = ("elpv", "motion", "toy")  # have a place of their own, or are made up
_FILE_ROOTS = ("beton", "list", "videos")  # whose root may be a file
_OFFICIAL_SPLITS = ("hmdb51", "ucf101")  # come with three
_VIDEO_FILES = ("hmdb51", "kinetics400", "ucf101", "videos")

__all__ = ["DATASETS", "Dataset", "labelled_part", "open_dataset", "split_off", "stored_pixels"]


def open_dataset(
    name: str,
    root: str | Path | None = None,
    *,
    val_share: float = 0.1,
    verify: bool = True,
    split: int = 1,
    decoder: str = "auto",
) -> Dataset:
    """Opens a data set as it lies on disk.

    Args:
        name: a key of :data:`DATASETS`.
        root: the folder that holds it, or the file itself (``beton``, ``list``, ``videos``); None where the data set has a
            place of its own or is made up (``elpv``, ``motion``, ``toy``).
        val_share: share of the training images held out for validation, where the data set has no such split.
        verify: compare the files with the published checksums, where there are some.
        split: the official split, 1, 2 or 3, of ``hmdb51`` and ``ucf101``; others have no use for it.
        decoder: what decodes video files; a name that :class:`~fasttrain.loaders.video.files.VideoFiles` knows.

    Raises:
        ValueError: unknown name, missing folder, files that are not what they should be.
    """
    if name not in DATASETS:
        raise ValueError(f"data.name: no data set is called {name!r}; there are {', '.join(DATASETS)}")
    if not 0 <= val_share < 1:
        raise ValueError(f"data.val_share: {val_share} is not a share in [0, 1)")
    if name in _NO_ROOT:
        return DATASETS[name](val_share=val_share)
    if root is None:
        raise ValueError(f"data.root: {name} needs the folder that holds it")
    root = Path(root).expanduser()
    if not root.is_dir() and not (name in _FILE_ROOTS and root.is_file()):
        raise ValueError(f"data.root: there is no folder {'or file ' if name in _FILE_ROOTS else ''}{root}")
    options: dict[str, int | str] = {"split": split} if name in _OFFICIAL_SPLITS else {}
    if name in _VIDEO_FILES:
        options["decoder"] = decoder
    return DATASETS[name](root, val_share=val_share, verify=verify, **options)
