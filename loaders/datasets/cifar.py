"""CIFAR-10 and CIFAR-100, from their Python batches as torchvision lays them out."""

import io
import pickle
from pathlib import Path

import numpy as np

from .base import Dataset, Pixels, checked, train_val_test


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays, dicts, lists, strings and numbers: all that the published batches hold, and no code."""

    _ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and only arrays are expected")
        return super().find_class(module, name)


def cifar10(root: Path, *, val_share: float, verify: bool = True) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 images of 32 x 32, in ``ROOT/cifar-10-batches-py``."""
    return _cifar("CIFAR10", root, val_share, verify)


def cifar100(root: Path, *, val_share: float, verify: bool = True) -> Dataset:
    """CIFAR-100, the 100 fine classes, in ``ROOT/cifar-100-python``."""
    return _cifar("CIFAR100", root, val_share, verify)


def _cifar(name: str, root: Path, val_share: float, verify: bool) -> Dataset:
    from torchvision import datasets  # slow to import; it has the files' names and checksums

    published = getattr(datasets, name)
    folder = root / published.base_folder
    if not folder.is_dir():
        raise ValueError(f"data.root: {root} has no folder {published.base_folder}")

    def load(file: str, md5: str) -> dict:
        content = checked(folder / file, md5 if verify else None)
        try:
            return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise ValueError(f"cannot read {folder / file}: {error}") from error

    pixels, targets, counts = [], [], []
    for files in (published.train_list, published.test_list):
        entries = [load(*file) for file in files]
        pixels += [e["data"] for e in entries]
        targets += [e["labels"] if "labels" in e else e["fine_labels"] for e in entries]
        counts.append(sum(len(e["data"]) for e in entries))
    classes = load(published.meta["filename"], published.meta["md5"])[published.meta["key"]]
    image_NHWC = np.ascontiguousarray(np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    targets_N = np.concatenate(targets).astype(np.int64)
    index_N = np.arange(len(targets_N))
    splits = train_val_test(targets_N, index_N[: counts[0]], index_N[counts[0] :], val_share)
    return Dataset(name.lower(), tuple(classes), targets_N, Pixels(image_NHWC), splits, str(folder))
