"""The ``.beton`` format, version 2 (FFCV's): read and written without FFCV, which reads and writes the same files.

    header            version, number of fields, page size, number of samples, where the table of allocations is
    field descriptors an image field and a label field: type, name, arguments
    records           one a sample: mode (JPEG or raw), width, height, place of the image; label
    pages             images' bytes; no sample crosses a page's end
    allocations       (sample, place, size) of everything in the pages

Numbers are little-endian. Beside ``FILE`` lies ``FILE.json``: class names, splits, checksums (``loaders/pack.py``).
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .decode import MOST_PIXELS, PIXELS_A_BYTE

JPEG, RAW = 0, 1
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
FIELD = np.dtype([("type", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8")])
_VECTOR = np.dtype([("shape", "<u8", 32), ("length", "<u8")])  # arguments of a field of arrays, before its type as JSON
_INT_FIELD, _IMAGE_FIELD, _ARRAY_FIELD = 1, 2, 4
_KNOWN = {0: "<f8", _INT_FIELD: "<i8", _IMAGE_FIELD: _IMAGE, 3: [("ptr", "<u8"), ("size", "<u8")], _ARRAY_FIELD: "<u8"}
_KNOWN |= {5: _KNOWN[3], 6: "<u8"}
_MIN_PAGE = 1 << 21
MAX_SIDE = 65535


@dataclass(frozen=True)
class Beton:
    """What a file holds, without its pixels.

    Attributes:
        path: the file.
        mode_N: uint8, :data:`JPEG` or :data:`RAW`.
        height_N, width_N: int64, in pixels.
        ptr_N, size_N: int64, where each image's bytes are in the file, and how many.
        targets_N: int64 [N] or float32 [N, C].
        head_sha256: of everything before the pages.
        fields: names of the file's fields.
        image_field: which of them is the image.
    """

    path: Path
    mode_N: np.ndarray
    height_N: np.ndarray
    width_N: np.ndarray
    ptr_N: np.ndarray
    size_N: np.ndarray
    targets_N: np.ndarray
    head_sha256: str
    fields: tuple[str, ...] = ("image", "label")
    image_field: str = "image"

    def __len__(self) -> int:
        return len(self.mode_N)


def records(label_type: int) -> np.dtype:
    """A sample's record: fields ``f0`` (image) and ``f1`` (label), aligned as C does."""
    return np.dtype([("", _IMAGE), ("", _KNOWN[label_type])], align=True)


def read_beton(path: Path) -> Beton:
    """Reads a file's records.

    Raises:
        ValueError: not a ``.beton``, cut off, or with fields other than one image and one label.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER.itemsize)
            if len(head) < HEADER.itemsize:
                raise ValueError("it is cut off in its header")
            header = np.frombuffer(head, HEADER)[0]
            count, n = int(header["fields"]), int(header["samples"])
            if header["version"] != 2 or not 1 <= count <= 64:
                raise ValueError("it is no .beton of version 2")
            if not n:
                raise ValueError("it holds no samples")
            more = file.read(FIELD.itemsize * count)
            if len(more) < FIELD.itemsize * count:
                raise ValueError("it is cut off in its header")
            fields = np.frombuffer(more, FIELD)
            kind = np.dtype([("", _KNOWN.get(int(f["type"]), "<u8")) for f in fields], align=True)
            table_at, records_end = int(header["table"]), len(head) + len(more) + n * kind.itemsize
            if not records_end <= table_at < size or (size - table_at) % ALLOCATION.itemsize:
                raise ValueError(f"it is cut off: {size} bytes, and its table should be at {table_at}")
            body = file.read(n * kind.itemsize)
            file.seek(table_at)
            table = np.frombuffer(file.read(), ALLOCATION)
        images = [i for i, f in enumerate(fields) if f["type"] == _IMAGE_FIELD]
        labels = [i for i, f in enumerate(fields) if f["type"] in (_INT_FIELD, _ARRAY_FIELD)]
        if len(images) != 1 or len(labels) != 1:
            raise ValueError("it needs one image field and one label field (integers, or float32 arrays)")
        record_N = np.frombuffer(body, kind)
        image_N, label_N = record_N[f"f{images[0]}"], record_N[f"f{labels[0]}"]
        ptr_N = image_N["ptr"].astype(np.int64)
        size_N = _sizes(ptr_N, table, table_at)
        targets_N = label_N.astype(np.int64)
        if fields[labels[0]]["type"] == _ARRAY_FIELD:
            targets_N = _vectors(path, targets_N, fields[labels[0]]["arguments"], table, table_at)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {path}: {reason}") from error
    raw_N = image_N["mode"] == RAW
    height_N, width_N = (image_N[k].astype(np.int64) for k in ("height", "width"))
    pixels_N = height_N * width_N
    wrong = np.flatnonzero(
        np.where(raw_N, size_N != 3 * pixels_N, pixels_N > np.minimum(PIXELS_A_BYTE * size_N, MOST_PIXELS))
        | (image_N["mode"] > RAW)
        | (pixels_N == 0)
    )
    if len(wrong):
        raise ValueError(f"cannot read {path}: sample {wrong[0]} is neither a JPEG nor raw pixels of its size")
    sha256 = hashlib.sha256(head + more + body).hexdigest()
    names = tuple(f["name"].tobytes().partition(b"\0")[0].decode("ascii", "replace") for f in fields)
    mode_N = image_N["mode"].copy()
    return Beton(path, mode_N, height_N, width_N, ptr_N, size_N, targets_N, sha256, names, names[images[0]])


def _sizes(ptr_N: np.ndarray, table: np.ndarray, end: int) -> np.ndarray:
    """Sizes of what lies at places, from the table of allocations: int64 [N]."""
    by_place = np.argsort(table["ptr"], kind="stable")
    places, sizes = table["ptr"][by_place], table["size"][by_place]  # uint64
    # all of it: other readers look sizes up in it, too; a sum might overflow
    wrong = (places < HEADER.itemsize) | (places > end) | (sizes > end - places)
    if not len(places) or (wrong & (sizes > 0)).any():
        raise ValueError("it is cut off, or its table of allocations is damaged")
    at = np.searchsorted(places, ptr_N.astype(np.uint64)).clip(0, len(places) - 1)
    last = np.searchsorted(places, ptr_N.astype(np.uint64), side="right") - 1
    if (places[at] != ptr_N.astype(np.uint64)).any() or (sizes[at] != sizes[last]).any():
        raise ValueError("its table of allocations does not fit its records")
    return sizes[at].astype(np.int64)


def _vectors(path: Path, ptr_N: np.ndarray, arguments: np.ndarray, table: np.ndarray, end: int) -> np.ndarray:
    """Labels that are arrays: float32 [N, C]."""
    about = arguments[: _VECTOR.itemsize].view(_VECTOR)[0]
    shape = [int(s) for s in about["shape"] if s]
    described = arguments[_VECTOR.itemsize :][: int(about["length"])].tobytes()
    if len(shape) != 1 or described.replace(b" ", b"") != b'[["","<f4"]]':
        raise ValueError(
            f"its labels are arrays {described.decode(errors='replace')} of shape {shape}, not float32 [C]"
        )
    if (_sizes(ptr_N, table, end) != 4 * shape[0]).any() or 4 * shape[0] * len(ptr_N) > end:
        raise ValueError("its labels' sizes do not fit their shape")
    out_NC = np.empty((len(ptr_N), shape[0]), dtype="<f4")
    with path.open("rb", buffering=0) as file:  # not through a map: reading one whose file was cut off is a signal
        for row, ptr in zip(out_NC, ptr_N.tolist(), strict=True):
            file.seek(ptr)
            if file.readinto(row.data) != row.nbytes:
                raise ValueError("it was cut off meanwhile")
    return out_NC.astype(np.float32, copy=False)


class BetonWriter:
    """Writes a file sample after sample; after a stop it goes on behind the last one that is safely on disk.

    Args:
        path: the file to write; made, or continued from ``at``.
        samples: how many there will be at most.
        vector: classes of a multi-label data set; 0 where labels are class indices.
        page: bytes a page, a power of 2 of at least 2 MiB; doubled when a sample does not fit into one.
        at: end of what is there already, in bytes; 0 to begin.
    """

    def __init__(self, path: Path, *, samples: int, vector: int = 0, page: int = 1 << 23, at: int = 0) -> None:
        if page < _MIN_PAGE or page & (page - 1) or page >= 1 << 32:
            raise ValueError(f"a page of {page} bytes is not a power of 2 between 2 MiB and 2 GiB")
        self.path, self.page, self.vector = path, page, vector
        self._kind = records(_ARRAY_FIELD if vector else _INT_FIELD)
        self._head = HEADER.itemsize + 2 * FIELD.itemsize
        first = -(-(self._head + samples * self._kind.itemsize) // page) * page
        self._file = open(path, "r+b" if at else "wb")
        self.at = at or first
        self._file.truncate(self.at)
        self._file.seek(self.at)

    def add(self, *parts: bytes) -> list[int]:
        """Appends what belongs to one sample; returns its parts' places.

        Raises:
            ValueError: it is larger than the largest page.
        """
        size = sum(map(len, parts))
        self.page = page_for(size, self.page)  # what is there does not cross the larger pages' ends either
        left = self.page - self.at % self.page
        if size > left:
            self._file.write(bytes(left))
            self.at += left
        places = []
        for part in parts:
            self._file.write(part)
            places.append(self.at)
            self.at += len(part)
        return places

    def flush(self) -> None:
        """Everything added so far is on disk afterwards."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, image_N: np.ndarray, size_N: np.ndarray, label_N: np.ndarray) -> None:
        """Writes the head and the table.

        Args:
            image_N: records of images (mode, width, height, ptr).
            size_N: int64, their sizes in bytes.
            label_N: class indices, or the places of label vectors.
        """
        record_N = np.zeros(len(image_N), dtype=self._kind)
        for name in ("mode", "width", "height", "ptr"):
            record_N["f0"][name] = image_N[name]
        record_N["f1"] = label_N
        parts = [(image_N["ptr"], size_N)] + (
            [(label_N, np.full(len(label_N), 4 * self.vector))] if self.vector else []
        )
        table = np.zeros((len(image_N), len(parts)), dtype=ALLOCATION)
        for column, (ptr_N, bytes_N) in enumerate(parts):
            table["sample"][:, column] = np.arange(len(image_N))
            table["ptr"][:, column], table["size"][:, column] = ptr_N, bytes_N
        self._file.write(bytes(-self.at % self.page))
        self.at += -self.at % self.page
        self._file.write(table.tobytes())
        self._file.seek(0)
        header = np.zeros(1, dtype=HEADER)
        header["version"], header["fields"], header["page"] = 2, 2, self.page
        header["samples"], header["table"] = len(image_N), self.at
        self._file.write(header.tobytes() + self._fields().tobytes() + record_N.tobytes())
        self.flush()

    def close(self) -> None:
        self._file.close()

    def _fields(self) -> np.ndarray:
        fields = np.zeros(2, dtype=FIELD)
        kinds = (_IMAGE_FIELD, _ARRAY_FIELD if self.vector else _INT_FIELD)
        for field, name, kind in zip(fields, (b"image", b"label"), kinds, strict=True):
            field["type"] = kind
            field["name"][: len(name)] = np.frombuffer(name, np.uint8)
        if self.vector:
            about = np.zeros(1, dtype=_VECTOR)
            described = json.dumps(np.dtype("<f4").descr).encode()
            about["shape"][0, 0], about["length"] = self.vector, len(described)
            arguments = about.tobytes() + described
            fields[1]["arguments"][: len(arguments)] = np.frombuffer(arguments, np.uint8)
        return fields


def page_for(size: int, page: int) -> int:
    """Bytes of a page into which a sample of ``size`` bytes fits: ``page``, or that doubled as often as needed."""
    while page < size:
        page *= 2
    if page >= 1 << 32:
        raise ValueError(f"{size} bytes do not fit into a page of 2 GiB")
    return page


def new_images(n: int) -> np.ndarray:
    """Zeroed records (mode, width, height, ptr) [n]."""
    return np.zeros(n, dtype=_IMAGE)
