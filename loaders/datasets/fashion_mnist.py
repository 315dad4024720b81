"""Fashion-MNIST, from its idx files, packed or not (torchvision's layout, or the folder of Debian's package)."""

import gzip
import hashlib
import math
from pathlib import Path

import numpy as np

from .base import Dataset, Pixels, train_val_test

_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
# of the unpacked files, so that it does not matter who packed them
_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


_MOST_PACKED = 1032  # bytes that a byte of deflate can become


def fashion_mnist(root: Path, *, val_share: float, verify: bool = True) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 grey images of 28 x 28, in ``ROOT/FashionMNIST/raw`` or ``ROOT`` itself."""
    folder = root / "FashionMNIST" / "raw"
    folder = folder if folder.is_dir() else root
    train_x, train_y, test_x, test_y = (_idx(folder, name, md5 if verify else None) for name, md5 in _MD5.items())
    if len(train_x) != len(train_y) or len(test_x) != len(test_y) or not len(train_y) or not len(test_y):
        raise ValueError(f"{folder}: the files do not hold equally many images and labels")
    if max(train_y.max(), test_y.max()) >= len(_CLASSES):
        raise ValueError(
            f"{folder}: labels go to {max(train_y.max(), test_y.max())}, and there are {len(_CLASSES)} classes"
        )
    targets_N = np.concatenate([train_y, test_y]).astype(np.int64)
    index_N = np.arange(len(targets_N))
    splits = train_val_test(targets_N, index_N[: len(train_y)], index_N[len(train_y) :], val_share)
    return Dataset("fashion_mnist", _CLASSES, targets_N, Pixels(np.concatenate([train_x, test_x])), splits, str(folder))


def _idx(folder: Path, name: str, md5: str | None) -> np.ndarray:
    """One idx file of bytes: a magic number (0, 0, 8, dimensions), the sizes as big-endian int32, the values.

    No more is unpacked than the sizes say, and these have to be what the file can hold.
    """
    path, of_one = folder / name, (28, 28) if "images" in name else ()
    packed = not path.is_file()
    path = folder / f"{name}.gz" if packed else path
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        most = path.stat().st_size * (_MOST_PACKED if packed else 1)
        with (gzip.open if packed else open)(path, "rb") as file:
            head = file.read(8 + 4 * len(of_one))
            if len(head) < 8 + 4 * len(of_one) or head[:4] != bytes((0, 0, 8, 1 + len(of_one))):
                raise ValueError(f"it is no idx file of bytes in {1 + len(of_one)} dimensions")
            sizes = tuple(np.frombuffer(head, dtype=">i4", offset=4).tolist())
            count = math.prod(sizes)
            if sizes[1:] != of_one or not 0 <= count <= most:
                raise ValueError(f"it says that it holds {' x '.join(map(str, sizes))} values")
            content = file.read(count)
            if len(content) < count or file.read(1):
                raise ValueError(f"it does not hold the {count} values that it says")
    except Exception as error:  # gzip raises EOFError, OSError, zlib.error
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if md5 is not None:
        found = hashlib.md5(head, usedforsecurity=False)
        found.update(content)
        if found.hexdigest() != md5:
            raise ValueError(
                f"{path} is not the published file (MD5 differs): set data.verify to false if it is meant to"
            )
    return np.frombuffer(content, dtype=np.uint8).reshape(sizes)
