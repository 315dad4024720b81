"""Recalled sources: what a source says of a (sample, view) is computed when it is first met, and looked up ever after.

Shape suffixes: B batch, M met for the first time, K views, N samples, C classes, R what is kept of a label.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain import interrupts
from fasttrain.kernels import TopK
from fasttrain.loaders import Batch, LoaderSpec
from fasttrain.loaders.base import EpochLoader

from .bank import SourceBank, Take, check_finite
from .cache import CacheError, Form, SoftLabelFile, difference, file_name, read_about
from .network import SourceNetwork
from .soft_targets import SoftTargets

Report = Callable[[str], None]
Opener = Callable[[LoaderSpec], EpochLoader]
FILL_BATCH = 128
_PINNED = 1 << 26  # bytes that are copied to a GPU without the host waiting


@dataclass(frozen=True)
class Fill:
    """How far filling has come, in labels of one source: ``done`` of ``total``; ``computed`` of them now."""

    done: int
    total: int
    computed: int


def label_form(classes: int, dtype: torch.dtype, top: int) -> Form:
    """How a source's labels are kept: float32 logits of float32 arithmetic, else float16, or the ``top`` probabilities."""
    return Form(classes, "float32" if dtype == torch.float32 and not top else "float16", min(top, classes))


def about(network: SourceNetwork, spec: LoaderSpec, dtype: torch.dtype) -> dict[str, Any]:
    """What a source's labels depend on: weights, its input, the data set, the views, the type of the arithmetic."""
    source = {k: v for k, v in asdict(network.spec).items() if k not in ("name", "weights", "sha256")}
    plan = asdict(replace(spec.plan, only=-1))
    clip = {"clip": asdict(spec.clip)} if spec.clip else {}
    # with a still of their own the sources do not see what the target sees
    pixels = {"size": 0 if spec.still else spec.size, "stored": spec.stored, "still": spec.still}
    return {
        "weights": network.sha256,
        "source": source,
        "dataset": {"name": spec.dataset.name, "content": spec.dataset.identity()},
        "view": plan | {"seed": 0 if spec.plan.every else spec.view_seed},
        "pixels": pixels | clip,
        "arithmetic": str(dtype).removeprefix("torch."),
    }


def open_files(
    networks: Sequence[SourceNetwork],
    spec: LoaderSpec,
    *,
    folder: Path,
    dtype: torch.dtype,
    top: int,
    strict: bool,
    report: Report,
) -> list[SoftLabelFile]:
    """The sources' files of soft labels in ``folder``, made where they are not there.

    Args:
        networks: the sources.
        spec: of the loader that shows them the images, with ``plan.count`` above 0.
        folder: where the files are; their names end in a fingerprint of what the labels depend on.
        dtype: of the sources' arithmetic.
        top: how many classes to keep of a label; 0 for all.
        strict: refuse a folder that holds other labels of a source, and none that fit.
        report: takes a line on labels that do not fit where that is not refused.

    Raises:
        CacheError: with the difference named, see :class:`SoftLabelFile`.
    """
    out = []
    for network in networks:
        name, depends = network.spec.name, about(network, spec, dtype)
        form = label_form(network.spec.classes, dtype, top)
        path = folder / file_name(name, depends | {"kept": [form.dtype, form.top]})
        if not path.exists():
            _others(path, name, depends, strict, report)
        samples = len(spec.dataset)
        out.append(SoftLabelFile(path, depends, views=spec.plan.count, samples=samples, form=form))
    return out


def _others(path: Path, name: str, depends: dict[str, Any], strict: bool, report: Report) -> None:
    """Says how labels of the same source that lie in the folder differ."""
    for other in sorted(path.parent.glob(f"{name}-{'?' * 16}.soft")):
        try:
            theirs = read_about(other)
        except CacheError as error:
            report(f"{error}; not used")
            continue
        differs = difference({k: v for k, v in theirs.items() if k != "labels"}, depends)
        text = f"{other} holds other soft labels of {name}: {differs or 'they are kept in another form'}"
        if strict:
            raise CacheError(f"transfer.cache: {text}; choose another folder, or remove it")
        report(f"{text}; not used")


class RecalledSources:
    """Looks up what is known of a batch, and asks the live sources for the rest.

    Args:
        bank: makes the live sources; called when the first label is missing.
        files: one for each source.
        names: of the sources.
        index_N: int64, the samples that will come.
        device: of the batches.
        still: whether the labels are of the batches' ``still`` views.
        in_memory: keep the labels of ``index_N`` on the device; else they are read from the files at every step.
        report: takes a line on what goes wrong without stopping the run.
    """

    def __init__(
        self,
        bank: Callable[[], SourceBank],
        files: list[SoftLabelFile],
        *,
        names: Sequence[str],
        index_N: np.ndarray,
        device: torch.device,
        still: bool,
        in_memory: bool,
        report: Report = lambda text: None,
    ) -> None:
        self.files, self.names, self.device, self._report = files, tuple(names), device, report
        self.still, self._every = still, bool(files[0].about["view"]["every"])
        self.class_counts = tuple(f.form.classes for f in files)
        self.views, self.index_N = files[0].shape[0], index_N
        self._open_bank = bank
        self._bank: SourceBank | None = None
        self.computed = 0  # labels of one source that were missing
        self._full = False
        self.tables = [_Table(f, index_N, device) for f in files] if in_memory else None

    @property
    def bank(self) -> SourceBank:
        """The live sources."""
        if self._bank is None:
            self._bank = self._open_bank()
        return self._bank

    def __call__(self, batch: Batch) -> SoftTargets:
        """Soft targets of a batch."""
        return self.start(batch)()

    def start(self, batch: Batch) -> Take:
        """Looks a batch up; the host waits for the device only where a label is missing."""
        assert batch.where_B2 is not None
        index_B, view_B = batch.where_B2.T
        known_B = self._known(view_B, index_B)
        if not known_B.all():
            if not self._full:
                self._learn(batch, view_B, index_B, ~known_B)
            if self._full:
                return self._unkept(batch)
        if self.tables is not None:
            row_B = self.tables[0].rows(batch)  # all are of the same samples
            parts = [table(batch.view, row_B) for table in self.tables]
        else:
            parts = [_sent(f.read(view_B, index_B), self.device) for f in self.files]
        return lambda: self._soft(parts)

    def lacks(self, view: int) -> bool:
        """Whether any label of a view is missing."""
        return any(len(f.missing(view, self.index_N)) for f in self.files)

    def needs_still(self, epoch: int) -> bool:
        """Whether the loader has to serve stills in an epoch."""
        return self.still and any(self.lacks(view) for view in self._views_of(epoch))

    def fill(self, open_loader: Opener, spec: LoaderSpec, progress: Callable[[Fill], None] = lambda fill: None) -> None:
        """Computes all labels that are missing, view after view. It can be stopped at any moment, and goes on there.

        Args:
            open_loader: opens a loader like the training one for another spec.
            spec: of the loader that shows the images.
            progress: hears of every batch.

        Raises:
            OSError: the disk is full.
        """
        plain = replace(spec, shuffle=False, balance=False, growth=None, drop_last=False, batch=FILL_BATCH, parts=0)
        if spec.clip is not None:
            plain = replace(plain, clip=replace(spec.clip, only_centre=True))
        total, done = self.views * len(self.index_N), 0
        with interrupts.held():
            for view in range(self.views):
                if not self.lacks(view):
                    done += len(self.index_N)
                    progress(Fill(done, total, self.computed))
                    continue
                shown = replace(plain, plan=replace(plain.plan, only=view)) if plain.plan.every else plain
                with closing(open_loader(shown)) as loader:
                    loader.set_epoch(view)
                    for batch in loader:
                        self.start(batch)
                        if self._full:
                            raise OSError(next(f.full for f in self.files if f.full))
                        done += len(batch) * spec.ranks
                        progress(Fill(done, total, self.computed))
                        interrupts.check()
        self.save()

    def describe(self) -> str:
        """One line for the run's log."""
        views, samples = self.views, len(self.index_N)
        size = sum(views * samples * f.form.record_bytes for f in self.files)
        there = min(int(np.count_nonzero(f._seal_KN[:, self.index_N])) for f in self.files)
        where = f"on {self.device}" if self.tables is not None else "read from the file at every step"
        known = "all known" if there == views * samples else f"{there} known, the others when they are first met"
        return f"recalled: {views} views of {samples} samples, {size / 2**20:.0f} MiB {where}; {known}"

    def save(self) -> None:
        """Waits until the labels are on the disk."""
        for file in self.files:
            file.save()

    def close(self) -> None:
        """Closes the files."""
        for file in self.files:
            file.close()

    def _views_of(self, epoch: int) -> range:
        at = epoch % self.views
        return range(self.views) if self._every else range(at, at + 1)

    def _known(self, view_B: np.ndarray, index_B: np.ndarray) -> np.ndarray:
        if self.tables is not None:
            return np.logical_and.reduce([t.known(view_B, index_B) for t in self.tables])
        return np.logical_and.reduce([f.known(view_B, index_B) for f in self.files])

    def _learn(self, batch: Batch, view_B: np.ndarray, index_B: np.ndarray, unknown_B: np.ndarray) -> None:
        """Asks the live sources for these labels, and keeps them."""
        met_M = np.flatnonzero(unknown_B)
        shown, at_M = self._shown(batch), None
        if len(met_M) < len(batch):
            at_M = torch.from_numpy(met_M).to(shown.device)
        if (
            at_M is None or self.bank.one_shape
        ):  # what is compiled or recorded anew costs more than images shown in vain
            logits_MC = self.bank.logits(shown)
            logits_MC = logits_MC if at_M is None else logits_MC[at_M]
        else:
            logits_MC = self.bank.logits(shown[at_M])
        parts = logits_MC.split(list(self.class_counts), dim=1)
        for m, (file, logits) in enumerate(zip(self.files, parts, strict=True)):
            check_finite(self.names[m], logits)
            record_M = file.form.records(logits)
            self._keep(file, view_B[met_M], index_B[met_M], record_M)
            if self.tables is not None:
                self.tables[m].put(view_B[met_M], index_B[met_M], record_M)
        self.computed += len(met_M)

    def _keep(self, file: SoftLabelFile, view_M: np.ndarray, index_M: np.ndarray, record_M: np.ndarray) -> None:
        if file.full:
            return
        try:
            file.write(view_M, index_M, record_M)
        except OSError as error:
            file.full = f"soft labels cannot be kept in {file.path} ({error.strerror}); those already there stay usable"
            self._full = self.tables is None
            self._report(file.full + ("" if self._full else "; this run keeps them in memory"))

    def _unkept(self, batch: Batch) -> Take:
        """Where the disk is full: the labels as they would be kept, computed at every step."""
        parts = self.bank.logits(self._shown(batch)).split(list(self.class_counts), dim=1)
        kept = [_sent(f.form.records(logits), self.device) for f, logits in zip(self.files, parts, strict=True)]
        return lambda: self._soft(kept)

    def _shown(self, batch: Batch) -> Tensor:
        if not self.still:
            return batch.images
        assert batch.still is not None, "a label is missing, and the loader serves no still"
        return batch.still

    def _soft(self, parts: list[dict[str, Tensor]]) -> SoftTargets:
        if "logits" in parts[0]:
            return SoftTargets(torch.cat([p["logits"] for p in parts], dim=1), self.class_counts, self.names)
        value_BK, index_BK = (torch.cat([p[name] for p in parts], dim=1) for name in ("value", "index"))
        counts = tuple(p["value"].shape[1] for p in parts)
        return SoftTargets(TopK(value_BK, index_BK, counts), self.class_counts, self.names)


class _Table:
    """The labels of some samples on the device: fields [K, n, ..], and on the host which are there."""

    def __init__(self, file: SoftLabelFile, index_N: np.ndarray, device: torch.device) -> None:
        self.file, self.device = file, device
        self._row_of = np.full(file.shape[1], -1, dtype=np.int64)
        self._row_of[index_N] = np.arange(len(index_N))
        self._row_of_device = torch.from_numpy(self._row_of).to(device)
        views = file.shape[0]
        record_KN = np.zeros((views, len(index_N)), dtype=file.form.fields)
        self._known_KN = np.zeros((views, len(index_N)), dtype=bool)
        for view in range(views):
            known_N = file.known(np.full(len(index_N), view), index_N)
            record_KN[view, known_N] = file.read(np.full(known_N.sum(), view), index_N[known_N])
            self._known_KN[view] = known_N
        self.fields = _sent(record_KN, device)

    def known(self, view_B: np.ndarray, index_B: np.ndarray) -> np.ndarray:
        """Which labels are there; those that another process has added to the file meanwhile are fetched."""
        row_B = self._row_of[index_B]
        known_B = self._known_KN[view_B, row_B]
        if not known_B.all():
            lack = np.flatnonzero(~known_B)
            new = lack[self.file.known(view_B[lack], index_B[lack])]
            if len(new):
                self.put(view_B[new], index_B[new], self.file.read(view_B[new], index_B[new]))
                known_B[new] = True
        return known_B

    def put(self, view_M: np.ndarray, index_M: np.ndarray, record_M: np.ndarray) -> None:
        row_M = self._row_of[index_M]
        at = torch.from_numpy(view_M.copy()).to(self.device), torch.from_numpy(row_M).to(self.device)
        for name, value in _sent(record_M, self.device).items():
            self.fields[name][at] = value
        self._known_KN[view_M, row_M] = True

    def rows(self, batch: Batch) -> Tensor:
        """Where in the table the batch's samples are: int64 [B], on the device."""
        return self._row_of_device[batch.index]

    def __call__(self, view_B: Tensor, row_B: Tensor) -> dict[str, Tensor]:
        """The labels of these views of the samples in these rows."""
        return {name: values[view_B, row_B] for name, values in self.fields.items()}


def _sent(records: np.ndarray, device: torch.device) -> dict[str, Tensor]:
    """Records [..] -> a tensor for each of their fields [.., size], on the device."""
    assert records.dtype.names is not None
    out = {}
    for name in records.dtype.names:
        values = torch.from_numpy(np.ascontiguousarray(records[name]))
        if (
            device.type == "cuda" and values.nbytes <= _PINNED
        ):  # a whole table would stay locked in memory, and twice as large
            values = values.pin_memory()
        out[name] = values.to(device, non_blocking=True)
    return out
