"""Fashion-MNIST, from its idx files, packed or not (torchvision's layout, or the folder of Debian's package)."""

import gzip
import hashlib
from pathlib import Path

import numpy as np

from .base import Dataset, Pixels, checked, train_val_test

_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
# of the unpacked files, so that it does not matter who packed them
_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


def fashion_mnist(root: Path, *, val_share: float, verify: bool = True) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 grey images of 28 x 28, in ``ROOT/FashionMNIST/raw`` or ``ROOT`` itself."""
    folder = root / "FashionMNIST" / "raw"
    folder = folder if folder.is_dir() else root
    train_x, train_y, test_x, test_y = (_idx(folder, name, md5 if verify else None) for name, md5 in _MD5.items())
    if len(train_x) != len(train_y) or len(test_x) != len(test_y):
        raise ValueError(f"{folder}: the files do not hold equally many images and labels")
    targets_N = np.concatenate([train_y, test_y]).astype(np.int64)
    index_N = np.arange(len(targets_N))
    splits = train_val_test(targets_N, index_N[: len(train_y)], index_N[len(train_y) :], val_share)
    return Dataset("fashion_mnist", _CLASSES, targets_N, Pixels(np.concatenate([train_x, test_x])), splits, str(folder))


def _idx(folder: Path, name: str, md5: str | None) -> np.ndarray:
    """One idx file of bytes: a magic number (0, 0, 8, dimensions), the sizes as big-endian int32, the values."""
    path = folder / name
    packed = not path.is_file()
    content = checked(folder / f"{name}.gz", None) if packed else path.read_bytes()
    try:
        content = gzip.decompress(content) if packed else content
        if content[:3] != b"\0\0\x08":
            raise ValueError("it is no idx file of bytes")
        sizes = np.frombuffer(content, dtype=">i4", count=content[3], offset=4)
        values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * content[3]).reshape(sizes)
    except Exception as error:  # gzip and numpy raise EOFError, OSError, ValueError, zlib.error
        raise ValueError(f"cannot read {path}: {error}") from error
    if md5 is not None and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise ValueError(f"{path} is not the published file (MD5 differs): set data.verify to false if it is meant to")
    return values
