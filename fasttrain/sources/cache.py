"""Soft labels on disk: one file per source, a record of fixed size for every (view, sample).

    header    JSON, padded to 4096 bytes: what the labels depend on
    seals     uint32 [K views, N samples]: checksum of the record and its place; 0 where there is none yet
    records   uint8 [K, N, R]

Records are written before their seals, and a record whose seal does not fit counts as missing. So the file can be used
whenever its writers were killed, and any number of processes may read and fill it together, without locks: of two that write
the same record, both write the same label. The file is read through a memory map and written by ``pwrite``, which reports a
full disk where a write into a map would be a signal. Records that were never written take no space, and are never read.

Shape suffixes: B batch, K views (or, of a label, its top k classes), N samples of the data set, R bytes, C classes.
"""

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

_MAGIC = b"fasttrain soft labels 1\n"
_HEADER = 4096


@dataclass(frozen=True)
class Form:
    """How a label is kept.

    Attributes:
        classes: C.
        dtype: ``float16`` or ``float32`` logits; of top-k, float16.
        top: k: only the k largest probabilities (at temperature 1) and their classes are kept; 0 keeps all logits.
    """

    classes: int
    dtype: str = "float16"
    top: int = 0

    @property
    def fields(self) -> np.dtype:
        """Of one record."""
        if not self.top:
            return np.dtype([("logits", self.dtype, (self.classes,))])
        # float16 would round class numbers above 2048
        kind = np.int16 if self.classes <= 2**15 else np.int32
        return np.dtype([("index", kind, (self.top,)), ("value", np.float16, (self.top,))])

    @property
    def record_bytes(self) -> int:
        return self.fields.itemsize

    @property
    def kept(self) -> str:
        """In words."""
        return f"top {self.top}" if self.top else f"{self.dtype} logits"

    def holds(self, record: np.void) -> bool:
        """Whether the record names no class that there is not."""
        return not self.top or bool((record["index"] >= 0).all() and (record["index"] < self.classes).all())

    def records(self, logits_BC: Tensor) -> np.ndarray:
        """Logits [B, C] of any float type and device -> what is kept of them: structured [B]."""
        out_B = np.empty(len(logits_BC), dtype=self.fields)
        logits_BC = logits_BC.float()
        if self.top:
            value_BK, index_BK = logits_BC.softmax(1).topk(self.top, dim=1)
            out_B["value"], out_B["index"] = value_BK.cpu().numpy(), index_BK.cpu().numpy()
        else:
            if self.dtype == "float16":
                largest = torch.finfo(torch.float16).max
                logits_BC = logits_BC.clamp(-largest, largest)
            out_B["logits"] = logits_BC.cpu().numpy()
        return out_B


class CacheError(ValueError):
    """A file of soft labels that cannot be used."""


class Record(Protocol):
    """How something is kept of a sample; :class:`Form` is that of soft labels."""

    @property
    def fields(self) -> np.dtype:
        """Of one record."""
        ...

    @property
    def record_bytes(self) -> int: ...

    @property
    def kept(self) -> str:
        """In words."""
        ...

    def holds(self, record: np.void) -> bool:
        """Whether a record can be one: its checksum only says that it is as it was written."""
        ...


R = TypeVar("R", bound=Record)


class SoftLabelFile(Generic[R]):
    """One source's soft labels of one data set in K views.

    Args:
        path: of the file; it is made if it is not there.
        about: what the labels depend on, as nested fields of plain values.
        views: K.
        samples: N, all of the data set: runs on parts of it share the file.
        form: how a label is kept.

    Raises:
        CacheError: a file of something else (the difference is named), one that is cut short, or no soft labels at all; or it
            cannot be made.
    """

    def __init__(self, path: Path, about: dict[str, Any], *, views: int, samples: int, form: R) -> None:
        self.path, self.form, self.shape = path, form, (views, samples)
        self.about = _plain(about | {"labels": {"views": views, "samples": samples, "kept": form.kept}})
        seals = 4 * views * samples
        self._records_at = _HEADER + -(-seals // _HEADER) * _HEADER
        self._size = self._records_at + views * samples * form.record_bytes
        if not path.exists():
            self._make()
        theirs = read_about(path)
        if theirs != self.about:
            raise CacheError(f"{path} holds other soft labels: {difference(theirs, self.about)}")
        try:
            self._file = os.open(path, os.O_RDWR)
        except OSError as error:
            raise CacheError(f"{path} cannot be written to ({error.strerror})") from None
        found = os.fstat(self._file).st_size
        if found != self._size:
            os.close(self._file)
            raise CacheError(
                f"{path} is cut short: {found} bytes of {self._size}; remove it, and its labels are computed anew"
            )
        self._map = mmap.mmap(self._file, self._size, prot=mmap.PROT_READ)
        self._seal_KN = np.frombuffer(self._map, np.uint32, views * samples, _HEADER).reshape(self.shape)
        flat = np.frombuffer(self._map, form.fields, views * samples, self._records_at)
        self._record_KN = flat.reshape(self.shape)
        self._good_KN = np.zeros(self.shape, dtype=bool)  # records that this process has compared with their seals
        self.full = ""  # why nothing more can be written

    def known(self, view_B: np.ndarray, index_B: np.ndarray) -> np.ndarray:
        """Which labels are there, and undamaged: bool [B].

        Raises:
            CacheError: the file was cut off since it was opened: to read beyond its end through the map would be a signal.
        """
        if os.fstat(self._file).st_size < self._size:
            raise CacheError(
                f"{self.path} was cut off since it was opened; remove it, and its labels are computed anew"
            )
        good_B = self._good_KN[view_B, index_B]
        for b in np.flatnonzero(~good_B & (self._seal_KN[view_B, index_B] != 0)):
            view, index = int(view_B[b]), int(index_B[b])
            record = self._record_KN[view, index]
            right = self._seal_KN[view, index] == _seal(view, index, record.tobytes())
            good_B[b] = right and self.form.holds(record)
        self._good_KN[view_B, index_B] = good_B
        return good_B

    def read(self, view_B: np.ndarray, index_B: np.ndarray) -> np.ndarray:
        """Labels that are known: structured [B], a copy."""
        return self._record_KN[view_B, index_B]

    def write(self, view_B: np.ndarray, index_B: np.ndarray, record_B: np.ndarray) -> None:
        """Adds labels.

        Raises:
            OSError: the disk is full, or gone. What was there before can be used.
        """
        seal_B = np.empty(len(view_B), dtype=np.uint32)
        for b, (view, index, record) in enumerate(zip(view_B.tolist(), index_B.tolist(), record_B, strict=True)):
            content = record.tobytes()
            seal_B[b] = _seal(view, index, content)
            self._put(self._records_at + (view * self.shape[1] + index) * len(content), content)
        for view, index, seal in zip(view_B.tolist(), index_B.tolist(), seal_B, strict=True):
            self._put(_HEADER + 4 * (view * self.shape[1] + index), seal.tobytes())

    def missing(self, view: int, index_N: np.ndarray) -> np.ndarray:
        """Those of the samples that have no label in a view: int64."""
        return index_N[~self.known(np.full(len(index_N), view), index_N)]

    def count(self) -> int:
        """Labels in it, by their seals."""
        return int(np.count_nonzero(self._seal_KN))

    def save(self) -> None:
        """Waits until all that was written is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Closes the file. Arrays that were read from it stay valid."""
        if self._file < 0:
            return
        del self._seal_KN, self._record_KN
        self._map.close()
        os.close(self._file)
        self._file = -1

    def _put(self, at: int, content: bytes) -> None:
        while content:
            written = os.pwrite(self._file, content, at)
            at, content = at + written, content[written:]

    def _make(self) -> None:
        """Under its name it appears at once and whole; if another process was faster, that one's counts."""
        header = json.dumps(self.about, sort_keys=True).encode()
        content = _MAGIC + len(header).to_bytes(4, "little") + zlib.crc32(header).to_bytes(4, "little") + header
        assert len(content) <= _HEADER
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    file.write(content.ljust(_HEADER, b"\0"))
                    file.flush()
                    os.posix_fallocate(
                        file.fileno(), 0, self._records_at
                    )  # to read a hole on a full tmpfs is a signal, too
                    file.truncate(self._size)
                    os.fsync(file.fileno())
                with suppress(FileExistsError):
                    os.link(temporary, self.path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise CacheError(f"soft labels cannot be kept in {self.path.parent} ({error.strerror})") from None


def file_name(source: str, about: dict[str, Any]) -> str:
    """Of a source's labels that depend on this."""
    content = json.dumps(_plain(about), sort_keys=True)
    return f"{source}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.soft"


def read_about(path: Path) -> dict[str, Any]:
    """What a file's labels depend on.

    Raises:
        CacheError: it is no file of soft labels, or its header is damaged.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_HEADER)
    except OSError as error:
        raise CacheError(f"{path} cannot be read ({error.strerror})") from None
    start = len(_MAGIC) + 8
    length, checksum = (int.from_bytes(content[start - 8 + i : start - 4 + i], "little") for i in (0, 4))
    header = content[start : start + length]
    damaged = f"{path} is no file of soft labels, or is damaged; remove it, and they are computed anew"
    if not content.startswith(_MAGIC) or len(header) != length or zlib.crc32(header) != checksum:
        raise CacheError(damaged)
    try:
        about = json.loads(header)
        dict(_flat(about))
    except (ValueError, RecursionError, AttributeError):  # a checksum does not say who wrote it
        raise CacheError(damaged) from None
    return about


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The fields that differ, in words."""
    a, b = dict(_flat(theirs)), dict(_flat(ours))
    names = [name for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)]
    said = "; ".join(f"{name} is {a.get(name, 'not named')} there, {b.get(name, 'not named')} here" for name in names)
    return " ".join(said.split())  # a damaged file's names may break lines


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    return json.loads(json.dumps(fields))


def _seal(view: int, index: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(f"{view} {index}".encode())) or 1
