"""Small data sets for the tests of damage, and what has to hold of a data set that was read from damaged files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from fasttrain.loaders import Dataset, open_dataset
from fasttrain.loaders.tiny import write_tiny

from .damaged import digest


def sound(dataset: Dataset) -> dict[str, object]:
    """What a data set says; asserts that its splits and labels can be."""
    count, classes = len(dataset), len(dataset.classes)
    parts = list(dataset.splits.values())
    together = np.concatenate(parts)
    assert set(dataset.splits) == {"train", "val", "test"}, "splits"
    assert len(np.unique(together)) == len(together), "a sample is in two splits"
    assert not len(together) or 0 <= together.min() <= together.max() < count, (
        "a split names samples that are not there"
    )
    assert all((np.diff(part) > 0).all() for part in parts), "a split does not ascend"
    assert all(isinstance(name, str) for name in dataset.classes), "class names"
    if dataset.multi_label:
        assert dataset.targets_N.shape == (count, classes) and dataset.targets_N.dtype == np.float32, "label vectors"
        assert np.isin(dataset.targets_N, (-1, 0, 1)).all(), "label vectors"
    else:
        assert dataset.targets_N.dtype == np.int64, "labels"
        assert not count or 0 <= dataset.targets_N.min() <= dataset.targets_N.max() < classes, "labels"
    return {"classes": dataset.classes, "targets": dataset.targets_N, "splits": dataset.splits}


def opened(name: str, root: Path, *, pixels: bool = True) -> Callable[[], object]:
    """What opens a data set and reads all of it: a sample that cannot be read counts as its message, which names it."""

    def read() -> object:
        dataset = open_dataset(name, root, verify=False)
        about = sound(dataset)
        return about, samples_of(dataset) if pixels else []

    return read


def samples_of(dataset: Dataset) -> list[str]:
    """Fingerprints of all samples' pixels, or "" where one cannot be read."""
    out = []
    for index in range(len(dataset)):
        try:
            image_HWC = dataset.read(index)
            assert image_HWC.dtype == np.uint8 and image_HWC.ndim == 3 and image_HWC.shape[2] == 3, "no image"
            out.append(digest(image_HWC))
        except ValueError as error:
            message = str(error)
            assert str(dataset.source).split(",")[0] in message and "\n" not in message, f"unclear: {message}"
            out.append("")
    return out


def tiny(name: str, folder: Path, **size: int) -> Path:
    """A tiny data set without what says how it was made."""
    root = write_tiny(name, folder, **size)
    (root / "tiny.json").unlink()
    return root
