"""CIFAR-10 and CIFAR-100, from their Python batches as torchvision lays them out."""

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from .base import Dataset, Pixels, checked, train_val_test

_DTYPE = re.compile(r"[|<>=]?[uif][1248]")
# what writes no batch: extensions, objects of classes, and buffers that are made before their bytes are there
_REFUSED = (
    *(pickle.PERSID, pickle.BINPERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ),
    *(pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)


class _ArraysOnly(pickle._Unpickler):
    """Unpickles numpy arrays, dicts, lists, strings and numbers: all that the published batches hold, and no code.

    It is Python's own written in Python: the one written in C makes room for as many objects as a file says there are.
    """

    dispatch = {k: v for k, v in pickle._Unpickler.dispatch.items() if bytes([k]) not in _REFUSED}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and only arrays are expected") from None

    stack: list[Any]

    def load_build(self) -> None:
        """Gives an array its shape, type and bytes, and a type its order of bytes; numpy would believe much else."""
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, np.dtype):
            right = len(state) == 8 and state[1] in "|<>=" and state[2:] == (None, None, None, -1, -1, 0)
        elif isinstance(made, np.ndarray):
            _, shape, kind, _, content = state
            right = isinstance(kind, np.dtype) and isinstance(content, bytes | str)
            right = right and all(type(side) is int and side >= 0 for side in shape)
            right = right and math.prod(shape) * kind.itemsize == len(content)
        else:
            right = False
        if not right:
            raise pickle.UnpicklingError(f"a {type(made).__name__} has a state that it cannot have")
        made.__setstate__(state)

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]


def _latin1(text: str, encoding: str) -> bytes:
    """Of ``_codecs.encode``, what Python 3 writes bytes by; other encodings make much of little."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes by {encoding!r}")
    return text.encode("latin1")


def _array(kind: object, shape: tuple, code: object) -> np.ndarray:
    """An empty array, as pickles begin one; its state, which follows, has to fit its bytes."""
    if shape != (0,):
        raise pickle.UnpicklingError(f"an array begins in the shape {shape}")
    return np.ndarray((0,), dtype=np.int8)


def _dtype(code: str, *_: object) -> np.dtype:
    """A type of numbers; others have a state of their own, which can be anything."""
    if not _DTYPE.fullmatch(code):
        raise pickle.UnpicklingError(f"an array is of the type {code!r}")
    return np.dtype(code, copy=True)


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy", "ndarray"): "ndarray",  # named, never called
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _latin1,
}


def cifar10(root: Path, *, val_share: float, verify: bool = True) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 images of 32 x 32, in ``ROOT/cifar-10-batches-py``."""
    return _cifar("CIFAR10", "labels", root, val_share, verify)


def cifar100(root: Path, *, val_share: float, verify: bool = True) -> Dataset:
    """CIFAR-100, the 100 fine classes, in ``ROOT/cifar-100-python``."""
    return _cifar("CIFAR100", "fine_labels", root, val_share, verify)


def _cifar(name: str, key: str, root: Path, val_share: float, verify: bool) -> Dataset:
    from torchvision import datasets  # slow to import; it has the files' names and checksums

    published = getattr(datasets, name)
    folder = root / published.base_folder
    if not folder.is_dir():
        raise ValueError(f"data.root: {root} has no folder {published.base_folder}")

    def load(file: str, md5: str) -> dict:
        content = checked(folder / file, md5 if verify else None)
        try:
            out = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise ValueError(f"cannot read {folder / file}: {' '.join(str(error).split())[:200]}") from error
        if not isinstance(out, dict):
            raise ValueError(f"cannot read {folder / file}: it holds no dict")
        return out

    meta = published.meta
    classes = load(meta["filename"], meta["md5"]).get(meta["key"])
    count = 100 if name == "CIFAR100" else 10
    if not isinstance(classes, list) or len(classes) != count or not all(isinstance(c, str) for c in classes):
        raise ValueError(f"cannot read {folder / meta['filename']}: {meta['key']} is to be a list of {count} names")
    parts, counts = [], []
    for files in (published.train_list, published.test_list):
        part = [_checked(folder / file, load(file, md5), key, count) for file, md5 in files]
        parts += part
        counts.append(sum(len(label_M) for _, label_M in part))
    image_NHWC = np.empty((sum(counts), 32, 32, 3), dtype=np.uint8)
    np.concatenate([pixel_MP.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for pixel_MP, _ in parts], out=image_NHWC)
    targets_N = np.concatenate([label_M for _, label_M in parts])
    index_N = np.arange(len(targets_N))
    splits = train_val_test(targets_N, index_N[: counts[0]], index_N[counts[0] :], val_share)
    return Dataset(name.lower(), tuple(classes), targets_N, Pixels(image_NHWC), splits, str(folder))


def _checked(path: Path, entry: dict, key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [M, 3072] and labels [M] of a batch."""
    pixel_MP, labels = entry.get("data"), entry.get(key)
    if not isinstance(pixel_MP, np.ndarray) or pixel_MP.dtype != np.uint8 or pixel_MP.shape[1:] != (3 * 32 * 32,):
        raise ValueError(f"cannot read {path}: data is no array of bytes [N, {3 * 32 * 32}]")
    if not isinstance(labels, list) or not all(type(x) is int and 0 <= x < classes for x in labels):
        raise ValueError(f"cannot read {path}: {key} is no list of classes, 0 to {classes - 1}")
    if len(labels) != len(pixel_MP):
        raise ValueError(f"cannot read {path}: it has {len(pixel_MP)} images and {len(labels)} labels")
    return pixel_MP, np.array(labels, dtype=np.int64)
