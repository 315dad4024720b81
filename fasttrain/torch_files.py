"""Reads files made by ``torch.save``, checkpoints and weights alike, without running or trusting what is in them.

Such a file is a pickle, which says how values are put together, and the bytes of tensors. Here the pickle is read by an
unpickler that knows plain values, and tensors as plans: nothing else can be named, called or changed. Plans become tensors
when all sizes have been compared with the file's, so that a file cannot ask for more memory than it has bytes. torch's own
reader (``weights_only``) allocates what a file asks for, resizes storages to fit, and does not compare CRCs.

Read are the zip format (since torch 1.6) and the one before it; tensors come without gradients, on the CPU.
"""

import io
import math
import pickle
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

_READS = 2 << 20  # of an unpickler, two or three for a value: it is slow, and a value takes more memory than its bytes
_VALUES = 4 << 20  # in a file at most, those counted again that are shared
_SHARED = 4  # tensors may have so many times the file's bytes together, where they share theirs

_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before zip, with its version
_VERSION = 1001

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


class HoldsCode(ValueError):
    """A file that wants something called which is no part of plain tensors.

    Attributes:
        name: of what it wants.
    """

    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"cannot read {what}: it holds code ({name}), and was not loaded")
        self.name = name


def read_torch(file: Path | bytes, what: str) -> Any:
    """What a file made by ``torch.save`` holds: tensors on the CPU and plain values; nothing in it is run.

    Args:
        file: its path, or its bytes.
        what: names it in messages, as in ``the weights a.pth``.

    Raises:
        HoldsCode: it wants something called.
        ValueError: it is missing, damaged, no such file, or asks for more memory than it has bytes.
    """
    name = ""
    try:
        with open(file, "rb") if isinstance(file, Path) else io.BytesIO(file) as opened:
            size = opened.seek(0, io.SEEK_END)
            opened.seek(0)
            kind = opened.read(4)
            opened.seek(0)
            content, buffers = (_read_zip if kind == b"PK\x03\x04" else _read_legacy)(opened, size)
            return _Maker(buffers, size).made(content)[0]
    except _Wanted as wanted:
        name = wanted.name
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"cannot read {what}: {reason}") from None
    raise HoldsCode(what, name)


class _Wanted(Exception):
    def __init__(self, name: str) -> None:
        self.name = name


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """Bytes in the file; ``begin`` is where a view of them begins."""

    key: Any
    dtype: torch.dtype
    numel: int
    begin: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """A tensor that is not made yet."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """Something that a pickle may call: its name, and ours for it."""

    name: str
    run: Callable[..., Any]


class _Reader:
    """A file from which pickles are read: no more at once than there is, and not without end.

    Args:
        file: at its beginning.
        size: of it.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size, self._left, self._reads = file, size, size, 0

    def read(self, count: int) -> bytes:
        self._left -= count
        self._reads += 1
        if self._reads > _READS:
            raise ValueError("it has more plain values than any checkpoint")
        got = self._file.read(count) if self._left >= 0 else b""
        if len(got) < count:
            raise ValueError("it ends too early")
        return got

    def readline(self) -> bytes:
        line = self._file.readline(1024)
        self._left -= len(line)
        return line


class _Unpickler(pickle._Unpickler):
    """Python's own, with the opcodes that ``torch.save`` writes, and our names only."""

    _KNOWN = (
        "PROTO STOP GLOBAL REDUCE BUILD MARK TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS "
        "EMPTY_DICT SETITEM SETITEMS NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
        "SHORT_BINSTRING BINSTRING BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT"
    )
    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _KNOWN.split())
    }

    def __init__(self, file: _Reader) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[Any, _Storage] = {}
        self._room = file.size  # for values in what calls make anew: a short pickle could call them often

    def find_class(self, module: str, name: str) -> Any:
        if name in _STORAGES and (module == "torch" or (module, name) == ("torch.storage", "UntypedStorage")):
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        run = getattr(self, _NAMES.get((module, name), ""), None)
        if run is None:
            raise _Wanted(f"{module}.{name}".replace("__builtin__.", "").replace("builtins.", ""))
        return _Call(name, run)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel, *view = pid  # where it was, on what device, is of no interest
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not _is_count(numel):
            raise ValueError("it names a storage that is none")
        storage = _Storage(key, dtype, numel)
        first = self.storages.setdefault(key, storage)
        if first.numel * first.dtype.itemsize != numel * dtype.itemsize:
            raise ValueError(f"its storage {key} has two sizes")
        if view and view[0] is not None:
            _, begin, numel = view[0]
            if not _is_count(begin) or not _is_count(numel) or begin + numel > storage.numel:
                raise ValueError(f"its storage {key} has a view beyond its end")
            return _Storage(key, dtype, numel, begin)
        return storage

    def load_reduce(self) -> None:
        given = self.stack.pop()
        call = self.stack[-1]
        if not isinstance(call, _Call) or not isinstance(given, tuple):
            raise ValueError("it calls what cannot be called")
        self.stack[-1] = call.run(*given)

    def load_build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict or not isinstance(state, dict) or set(state) - {"_metadata"}:
            raise ValueError("it sets attributes of what has none")
        self.stack[-1].__dict__.update(state)  # a state dict's: its layers' versions

    dispatch |= {pickle.REDUCE[0]: load_reduce, pickle.BUILD[0]: load_build}

    def _tensor(self, storage: _Storage, offset: int, shape: Any, stride: Any, *_: Any) -> _Plan:
        return self._plan(storage, storage.dtype, offset, shape, stride)

    def _tensor_of_dtype(
        self, storage: _Storage, offset: int, shape: Any, stride: Any, _gradient: Any, _hooks: Any, dtype: Any, *_: Any
    ) -> _Plan:
        return self._plan(storage, dtype, offset, shape, stride)

    def _plan(self, storage: _Storage, dtype: torch.dtype, offset: int, shape: Any, stride: Any) -> _Plan:
        if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
            raise ValueError("it has a tensor without a storage")
        shape, stride = tuple(shape), tuple(stride)
        if len(shape) != len(stride) or len(shape) > 64 or not all(_is_count(n) for n in (offset, *shape, *stride)):
            raise ValueError("it has a tensor without a shape")
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else -1
        there = storage.numel * storage.dtype.itemsize
        if max((last + 1), math.prod(shape)) * dtype.itemsize > there:
            raise ValueError(f"its tensor of shape {list(shape)} needs more than the {there} bytes of its storage")
        return _Plan(storage, dtype, offset, shape, stride)

    def _parameter(self, data: Any, *_: Any) -> Any:
        return data

    def _with_attributes(self, call: Any, _kind: Any, given: Any, _state: Any) -> Any:
        if not isinstance(call, _Call) or call.name not in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            raise ValueError("it calls what cannot be called")
        return call.run(*given)

    def _ordered(self, pairs: Any = ()) -> OrderedDict[Any, Any]:
        return OrderedDict(self._anew(pairs))

    def _counter(self, counts: Any = ()) -> Counter[Any]:
        return Counter(dict(self._anew(counts)))

    def _set(self, values: Any = ()) -> set[Any]:
        return set(self._anew(values))

    def _size(self, shape: Any = ()) -> torch.Size:
        return torch.Size(self._anew(shape))

    def _bytes(self, text: str, coding: str) -> bytes:
        if coding != "latin1":
            raise ValueError(f"it has bytes as {coding[:20]}")
        return self._anew(text).encode("latin-1")

    def _device(self, kind: str, index: int | None = None) -> torch.device:
        return torch.device(kind) if index is None else torch.device(kind, index)

    def _name(self, *_: Any) -> None:
        raise ValueError("it calls what cannot be called")

    def _anew(self, given: Any) -> Any:
        self._room -= len(given)
        if self._room < 0:
            raise ValueError("its plain values take too much memory")
        return given


# what a pickle may name -> our method for it
_NAMES = {
    ("torch._utils", "_rebuild_tensor"): "_tensor",
    ("torch._utils", "_rebuild_tensor_v2"): "_tensor",
    ("torch._utils", "_rebuild_tensor_v3"): "_tensor_of_dtype",
    ("torch._utils", "_rebuild_parameter"): "_parameter",
    ("torch._utils", "_rebuild_parameter_with_state"): "_parameter",
    ("torch._tensor", "_rebuild_from_type_v2"): "_with_attributes",
    ("torch.nn.parameter", "Parameter"): "_name",
    ("torch", "Tensor"): "_name",
    ("torch", "Size"): "_size",
    ("torch", "device"): "_device",
    ("collections", "OrderedDict"): "_ordered",
    ("collections", "Counter"): "_counter",
    ("builtins", "set"): "_set",
    ("__builtin__", "set"): "_set",
    ("_codecs", "encode"): "_bytes",
}


class _Maker:
    """Makes tensors of plans, and counts what is there.

    Args:
        buffers: the storages' bytes, by key.
        size: of the file.
    """

    def __init__(self, buffers: dict[Any, Tensor], size: int) -> None:
        self._buffers, self._size = buffers, size
        self._known: dict[int, tuple[Any, Any, int, int]] = {}  # by id: the value, so that it lives; what it became

    def made(self, value: Any) -> tuple[Any, int, int]:
        """The value with tensors in it, how many values it holds, and how many bytes its tensors."""
        if value is None or isinstance(value, (str, int, float, bytes, torch.dtype, torch.device, torch.Size)):
            return value, 1, 0
        if id(value) not in self._known:
            self._known[id(value)] = value, _UNFINISHED, 0, 0
            self._known[id(value)] = value, *self._new(value)
        _, result, count, size = self._known[id(value)]
        if result is _UNFINISHED:
            raise ValueError("it holds itself")
        if count > _VALUES or size > max(_SHARED * self._size, 1):
            raise ValueError("what it holds is many times larger than the file")
        return result, count, size

    def _new(self, value: Any) -> tuple[Any, int, int]:
        if isinstance(value, _Plan):
            tensor = self._tensor(value)
            return tensor, 1, tensor.numel() * tensor.element_size()
        result: Any
        if isinstance(value, dict):
            for key in value:
                _insist_plain(key)
            parts = {key: self.made(item) for key, item in value.items()}
            extra = self.made(value.__dict__.get("_metadata")) if type(value) is OrderedDict else (None, 0, 0)
            for key, (item, _, _) in parts.items():
                value[key] = item
            found, result = [*parts.values(), extra], value
        elif isinstance(value, list):
            found = [self.made(item) for item in value]
            value[:] = [item for item, _, _ in found]
            result = value
        elif isinstance(value, tuple):
            found = [self.made(item) for item in value]
            result = tuple(item for item, _, _ in found)
        elif isinstance(value, set):
            for item in value:
                _insist_plain(item)
            found, result = [(None, len(value), 0)], value
        else:
            raise ValueError("it holds something that is neither a tensor nor a plain value")
        return result, 1 + sum(count for _, count, _ in found), sum(size for _, _, size in found)

    def _tensor(self, plan: _Plan) -> Tensor:
        storage = plan.storage
        buffer = self._buffers[storage.key]
        begin = storage.begin * storage.dtype.itemsize
        if begin % plan.dtype.itemsize:
            raise ValueError(f"its storage {storage.key} has a view between two values")
        out = torch.empty(0, dtype=plan.dtype)
        return out.set_(
            buffer.untyped_storage(), begin // plan.dtype.itemsize + plan.offset, torch.Size(plan.shape), plan.stride
        )


_UNFINISHED = object()


def _read_zip(file: BinaryIO, size: int) -> tuple[Any, dict[Any, Tensor]]:
    members = {info.filename: info for info in zipfile.ZipFile(file).infolist()}
    if any(name == "constants.pkl" or name.endswith("/constants.pkl") for name in members):
        raise _Wanted("a TorchScript program")
    if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members.values()):
        raise ValueError("it is compressed, and torch.save compresses nothing")
    if sum(m.file_size for m in members.values()) > size:
        raise ValueError("its parts are larger than the file")
    found = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(found) != 1:
        raise ValueError("it is a zip file without data.pkl: not one that torch.save made")
    folder = found[0].removesuffix("data.pkl")
    order = members.get(f"{folder}byteorder")
    if order is not None and bytes(_bytes_of(file, order, size).numpy()) != b"little":
        raise ValueError("its byte order is another one")
    code = bytes(_bytes_of(file, members[found[0]], size).numpy())
    unpickler = _Unpickler(_Reader(io.BytesIO(code), len(code)))
    content = unpickler.load()
    buffers = {}
    for key, storage in unpickler.storages.items():
        member = members.get(f"{folder}data/{key}")
        if member is None or member.file_size != storage.numel * storage.dtype.itemsize:
            raise ValueError(f"its storage {key} is missing or of another size")
        buffers[key] = _bytes_of(file, member, size)
    return content, buffers


def _bytes_of(file: BinaryIO, member: zipfile.ZipInfo, size: int) -> Tensor:
    """A member's bytes, read without a copy."""
    file.seek(member.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError("it is damaged: a part of it is not where it should be")
    begin = member.header_offset + 30 + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    out = _read_bytes(file, begin, member.file_size, size)
    if zlib.crc32(out.numpy().data) != member.CRC:
        raise ValueError("it is damaged: a part of it has another CRC")
    return out


def _read_bytes(file: BinaryIO, begin: int, count: int, size: int) -> Tensor:
    if begin + count > size:
        raise ValueError("it ends too early")
    out = torch.empty(count, dtype=torch.uint8)
    view = out.numpy().data
    file.seek(begin)
    done = 0
    while done < count:
        got = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise ValueError("it ends too early")
        done += got
    return out


def _read_legacy(file: BinaryIO, size: int) -> tuple[Any, dict[Any, Tensor]]:
    """The format before zip: pickles of a magic number, a version, the machine, the content and the storages' keys,
    then for each of these how many values it has, in 8 bytes, and their bytes."""
    if file.read(1) != pickle.PROTO:
        raise ValueError("torch.save did not make it")
    file.seek(0)
    reader = _Reader(file, size)
    unpicklers = [_Unpickler(reader) for _ in range(5)]
    if unpicklers[0].load() != _MAGIC or unpicklers[1].load() != _VERSION:
        raise ValueError("torch.save did not make it")
    machine = unpicklers[2].load()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("its byte order is another one")
    content, keys = unpicklers[3].load(), unpicklers[4].load()
    storages, buffers = unpicklers[3].storages, dict[Any, Tensor]()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(map(str, storages)):
        raise ValueError("its storages are not those of its tensors")
    for key in keys:
        storage = storages[key]
        begin = file.tell() + 8
        if int.from_bytes(file.read(8), "little") != storage.numel:
            raise ValueError(f"its storage {key} is of another size")
        buffers[key] = _read_bytes(file, begin, storage.numel * storage.dtype.itemsize, size)
    return content, buffers


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _insist_plain(value: Any) -> None:
    if isinstance(value, tuple):
        for item in value:
            _insist_plain(item)
    elif not (value is None or isinstance(value, (str, int, float, bytes))):
        raise ValueError("it holds a name that is no plain value")
