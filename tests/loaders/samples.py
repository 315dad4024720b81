"""Small data sets in the formats that the real ones have, written by the tests."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(n: int, side: int, seed: int = 0) -> np.ndarray:
    """uint8 [N, side, side, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def image_tree(root: Path, counts: dict[str, int], *, sizes=((40, 30), (33, 52)), suffix: str = ".png") -> Path:
    """``ROOT/CLASS/N.png`` of several sizes."""
    rng = np.random.default_rng(0)
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            width, height = sizes[i % len(sizes)]
            image = rng.integers(0, 120, (height, width, 3), dtype=np.uint8) + np.uint8(60 * (label % 3))
            Image.fromarray(image).save(root / name / f"{i:03}{suffix}", quality=92)
    return root


def cifar10(root: Path, per_batch: int = 20) -> np.ndarray:
    """Python 2 style batches as in the original archive; returns all images in order [N, 32, 32, 3]."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    everything = []
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        image = pixels(per_batch, 32, seed=k)
        everything.append(image)
        rows = image.transpose(0, 3, 1, 2).reshape(per_batch, -1)
        entry = {"data": rows, "labels": [(i + k) % 10 for i in range(per_batch)], "batch_label": name}
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}, protocol=2))
    return np.concatenate(everything)


def cifar100(root: Path, train: int = 300, test: int = 100) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", train), ("test", test)):
        rows = pixels(count, 32, seed=count).transpose(0, 3, 1, 2).reshape(count, -1)
        entry = {"data": rows, "fine_labels": [i % 100 for i in range(count)], "coarse_labels": [0] * count}
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"fine{i}" for i in range(100)]}, protocol=2))


def stl10(root: Path, train: int = 40, test: int = 20) -> np.ndarray:
    """Column-major planes and labels from 1, as the binary files have them."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    everything = []
    for name, count in (("train", train), ("test", test)):
        image = pixels(count, 96, seed=count)
        everything.append(image)
        (folder / f"{name}_X.bin").write_bytes(image.transpose(0, 3, 2, 1).tobytes())
        (folder / f"{name}_y.bin").write_bytes(bytes(i % 10 + 1 for i in range(count)))
    (folder / "class_names.txt").write_text("\n".join(f"thing{i}" for i in range(10)) + "\n")
    return np.concatenate(everything)


def fashion_mnist(root: Path, *, packed: bool, train: int = 50, test: int = 20) -> np.ndarray:
    """idx files of bytes; returns all images in order [N, 28, 28]."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    everything = []
    for name, count in (("train", train), ("t10k", test)):
        image = pixels(count, 28, seed=count)[..., 0]
        everything.append(image)
        files = {
            f"{name}-images-idx3-ubyte": struct.pack(">4B3i", 0, 0, 8, 3, count, 28, 28) + image.tobytes(),
            f"{name}-labels-idx1-ubyte": struct.pack(">4Bi", 0, 0, 8, 1, count) + bytes(i % 10 for i in range(count)),
        }
        for file, content in files.items():
            path = folder / (file + ".gz" if packed else file)
            path.write_bytes(gzip.compress(content) if packed else content)
    return np.concatenate(everything)
