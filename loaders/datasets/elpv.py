"""ELPV: photographs of solar cells under electroluminescence, working or defective.

From the package ``elpv-dataset`` (Deitsch et al., "Automatic classification of defective photovoltaic module cells in
electroluminescence images", Solar Energy 2019; CC BY-NC-SA 4.0, so it is installed, never redistributed). 2,624 grey
images of 300 x 300, each with the probability of a defect that experts gave: 0, 1/3, 2/3 or 1.
"""

import importlib.util
from pathlib import Path

import numpy as np

from .base import Dataset, Files, split_off


def elpv(*, val_share: float) -> Dataset:
    """Two classes: ``working`` (probability below 1/2) and ``defective``.

    Splits, fixed, in proportion of probability and cell type: 40 % test, ``val_share`` of the whole for validation,
    the rest for training. The cells come from 44 modules, and which from which is not published: neighbours may be on
    both sides of a split, for every method alike.
    """
    package = importlib.util.find_spec("elpv_dataset")
    if package is None or package.origin is None:
        raise ValueError("data.name: elpv needs its package: pip install elpv-dataset (or `make demo`)")
    folder = Path(package.origin).parent / "data"
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines() if line.strip()]
    probability_N = np.array([float(r[1]) for r in rows])
    stratum_N = np.round(probability_N * 3).astype(np.int64) * 2 + np.array([r[2] == "mono" for r in rows])
    index_N = np.arange(len(rows))
    rest, test = split_off(stratum_N, index_N, 0.4, purpose=3)
    train, val = split_off(stratum_N[rest], rest, val_share / 0.6, purpose=2)
    return Dataset(
        name="elpv",
        classes=("working", "defective"),
        targets_N=(probability_N > 0.5).astype(np.int64),
        read=Files([folder / r[0] for r in rows]),
        splits={"train": train, "val": val, "test": test},
        source=str(folder),
    )
