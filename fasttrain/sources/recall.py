"""Recalled sources: every (sample, view) is shown to a source once, and its logits are looked up ever after."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from fasttrain import interrupts
from fasttrain.files import remove_unfinished, write_whole
from fasttrain.loaders import Batch, LoaderSpec
from fasttrain.loaders.base import EpochLoader

from .live import LiveSources
from .network import SourceNetwork
from .soft_targets import SoftTargets

_FILL_BATCH = 64  # fixed, so that a table does not depend on the batch size of the run that fills it


class RecalledSources:
    """Looks up ``table[view, row of the sample]`` of each source.

    Args:
        tables: float16 or float32 [K, N, C] of each source, N the samples ``index_N``.
        names: of the sources.
        index_N: int64, the samples that the tables hold, in the order of their rows.
        device: where to keep the tables.
    """

    def __init__(self, tables: list[np.ndarray], names: list[str], index_N: np.ndarray, device: torch.device) -> None:
        self.tables = [torch.from_numpy(t).to(device) for t in tables]
        self.names, self.class_counts = tuple(names), tuple(t.shape[2] for t in tables)
        row_of = torch.full((int(index_N.max()) + 1,), -1, dtype=torch.int64)
        row_of[torch.from_numpy(index_N)] = torch.arange(len(index_N))
        self.row_of = row_of.to(device)

    def __call__(self, batch: Batch) -> SoftTargets:
        """Soft targets of a batch, by its samples' indices and view numbers."""
        row_B = self.row_of[batch.index]
        logits = [t[batch.view, row_B] for t in self.tables]
        return SoftTargets(torch.cat(logits, dim=1), self.class_counts, self.names)

    def describe(self) -> str:
        views, samples, _ = self.tables[0].shape
        size = sum(t.numel() * t.element_size() for t in self.tables)
        return f"recalled: {views} views of {samples} samples, {size / 2**20:.0f} MiB"


def fingerprint(network: SourceNetwork, spec: LoaderSpec, dtype: torch.dtype) -> str:
    """What a table depends on: weights, the source's input, the samples, their views, the type of the arithmetic."""
    source = {k: v for k, v in asdict(network.spec).items() if k not in ("name", "weights", "sha256")}
    content = {
        "weights": network.sha256,
        "source": source,
        "dataset": spec.dataset.identity(),
        "samples": hashlib.sha256(spec.index_N.tobytes()).hexdigest(),
        "views": asdict(spec.plan) | {"seed": spec.view_seed},
        "pixels": [spec.size, spec.stored, spec.still],
        "dtype": str(dtype),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def recalled(
    networks: list[SourceNetwork],
    spec: LoaderSpec,
    open_loader: Callable[[LoaderSpec], EpochLoader],
    *,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    report: Callable[[str], None] = print,
) -> RecalledSources:
    """Reads each source's table from ``folder``, after filling it if it is not there.

    Tables are filled in the order of the samples, in batches of a fixed size, so that runs with other batch sizes or
    seeds, and resumed ones, recall the same bits. A table appears under its final name only when it is complete.

    Args:
        networks: the sources, on ``device``.
        spec: of the training loader, with ``plan.views`` above 0.
        open_loader: opens a loader like the training one for another spec.
        folder: where tables are kept; their names tell what they depend on.
        dtype: of the sources' arithmetic.
        device: where they run, and where the tables are then kept.
        report: takes a line on what is being done.
    """
    remove_unfinished(folder)
    paths = [folder / f"{n.spec.name}-{fingerprint(n, spec, dtype)}.npy" for n in networks]
    missing = [(n, p) for n, p in zip(networks, paths, strict=True) if not p.is_file()]
    if missing:
        views, samples = spec.plan.views, len(spec.index_N)
        names = " and ".join(n.spec.name for n, _ in missing)
        report(f"soft targets: showing {views} views of {samples} images to {names}, once")
        start = time.perf_counter()
        plain = replace(spec, shuffle=False, balance=False, growth=None, drop_last=False, batch=_FILL_BATCH)
        _fill(missing, plain, open_loader, dtype)
        took = time.perf_counter() - start
        count = views * samples * len(missing)
        report(f"soft targets: {count} in {took:.1f} s ({count / took:.0f} a second)")
    tables = [np.load(p, mmap_mode="c") for p in paths]
    return RecalledSources(tables, [n.spec.name for n in networks], spec.index_N, device)


def _fill(missing: list[tuple[SourceNetwork, Path]], spec: LoaderSpec, open_loader, dtype: torch.dtype) -> None:
    kept = np.float32 if dtype == torch.float32 else np.float16
    tables = [np.empty((spec.plan.views, len(spec.index_N), n.spec.classes), dtype=kept) for n, _ in missing]
    sources = LiveSources([n for n, _ in missing], dtype)
    with interrupts.held(), closing(open_loader(spec)) as loader:
        for view in range(spec.plan.views):
            loader.set_epoch(view)
            row = 0
            for batch in loader:
                parts = sources(batch).logits_BC.split(list(sources.class_counts), dim=1)
                for table, logits_BC in zip(tables, parts, strict=True):
                    table[view, row : row + len(batch)] = logits_BC.float().cpu().numpy()
                row += len(batch)
                interrupts.check()
    for (_, path), table in zip(missing, tables, strict=True):
        write_whole(path, partial(_save, table))


def _save(table: np.ndarray, file: BinaryIO) -> None:
    np.save(file, table)
