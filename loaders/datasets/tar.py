"""Tar shards in WebDataset's layout: consecutive members of one name are a sample."""

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from .base import Dataset, Encoded
from .labels import Label, complete_splits, is_label, name_labels

_IMAGES = {"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "gif"}
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAGIC = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # WebDataset's: key, and what the member is
_SPLIT = re.compile(r"(?:^|[-_.])(train|val|test)")
_BLOCK = 512
_REGULAR, _EMPTY = (b"0", b"\0", b"7"), tuple(b"%d" % i for i in range(1, 7))  # kinds of members
_MAX_TEXT = 1 << 20  # bytes of a label or a long name
_MAX_NAME = 4096  # bytes, as of a path
_MAX_MAPS = 256  # each holds a file descriptor open


class _Sample(NamedTuple):
    """An image's member, where its bytes are, and its label or labels."""

    member: str
    offset: int
    size: int
    label: Label | list[Label]


class Shards(Encoded):
    """Images in uncompressed tar files, through memory maps that are opened when they are first needed.

    Args:
        paths: of the shards.
        shard_N: int64 [N], which of them holds the image.
        offset_N, size_N: int64 [N], where it is in there, in bytes.
        members: its name in there.
    """

    def __init__(
        self, paths: list[Path], shard_N: np.ndarray, offset_N: np.ndarray, size_N: np.ndarray, members: list[str]
    ) -> None:
        self.paths = paths
        self.shard_N, self.offset_N, self.size_N = shard_N, offset_N, size_N
        self.members = members
        self._maps: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}

    def encoded(self, index: int) -> np.ndarray:
        shard, offset, size = int(self.shard_N[index]), int(self.offset_N[index]), int(self.size_N[index])
        content = self._map(shard)[offset : offset + size]
        if len(content) != size:
            raise ValueError(f"cannot read the image {self.name(index)}: the shard was cut off since it was opened")
        return content

    def name(self, index: int) -> str:
        return f"{self.paths[self.shard_N[index]]}/{self.members[index]}"

    def fingerprint(self, samples: int) -> str:
        about = [(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in self.paths]
        return hashlib.sha256(repr((about, self.members[:samples])).encode()).hexdigest()

    def total_bytes(self, samples: int) -> int:
        return int(self.size_N[:samples].sum())

    def _map(self, shard: int) -> np.ndarray:
        held = self._maps.get(shard)
        if held is None:
            if len(self._maps) >= _MAX_MAPS:
                self._maps = {}
            try:
                held = np.memmap(self.paths[shard], dtype=np.uint8, mode="r").view(np.ndarray)
            except (OSError, ValueError) as error:  # ValueError: it is empty now
                raise ValueError(f"cannot read {self.paths[shard]}: {error}") from error
            self._maps[shard] = held
        return held


def tar_shards(root: Path, *, val_share: float, verify: bool = True) -> Dataset:
    """``ROOT/*.tar``, uncompressed, as WebDataset writes them.

    A sample is the consecutive members that share folder and name up to the first dot: an image (``.jpg``, ``.png``, ..)
    and a label, ``.cls`` (an integer or a class name) or ``.json`` (``label`` or ``cls``, or ``labels``: a list, which
    makes the data set multi-label). Other members are not looked at. Classes are named as ``listed`` does it.

    Splits go by the shards' names: ``train*``, ``val*``, ``test*``, perhaps after a prefix (``birds-train-0000.tar``).
    What is not there is parted off as ``folder`` does it, from all samples where no shard's name says a split.

    Opening reads headers and labels only.

    Raises:
        ValueError: a shard that is compressed, damaged or cut off, a sample without image or label, or with two of the same
            member or name, a label that is no class; names shard and member.
    """
    packed = sorted(p for p in root.iterdir() if p.name.endswith(_PACKED))
    if packed:
        raise ValueError(f"data.root: {packed[0]} is compressed, and images are read from within: unpack it to a .tar")
    paths = sorted(p for p in root.glob("*.tar") if p.is_file())
    if not paths:
        raise ValueError(f"data.root: {root} holds no .tar")
    with ThreadPoolExecutor() as pool:
        samples_by_shard = list(pool.map(_samples, paths))
    shard_N = np.repeat(np.arange(len(paths)), [len(s) for s in samples_by_shard])
    samples = [s for shard in samples_by_shard for s in shard]
    if not samples:
        raise ValueError(f"data.root: the shards in {root} hold no samples")
    members, offsets, sizes, labels = map(list, zip(*samples, strict=True))
    read = Shards(paths, shard_N, np.array(offsets, dtype=np.int64), np.array(sizes, dtype=np.int64), members)
    multi = isinstance(labels[0], list)
    for i, label in enumerate(labels):
        if isinstance(label, list) != multi:
            raise ValueError(f"{read.name(i)}: one label here and a list of them in {read.name(0)}, or the reverse")
    given = _splits(root, paths, shard_N)
    classes, targets_N = name_labels(labels, given["train"], root, read.name)
    stratum_N = np.zeros(len(labels), dtype=np.int64) if multi else targets_N
    return Dataset("tar", classes, targets_N, read, complete_splits(stratum_N, given, val_share), str(root))


def _splits(root: Path, paths: list[Path], shard_N: np.ndarray) -> dict[str, np.ndarray]:
    found = [_SPLIT.search(p.name) for p in paths]
    if not any(found):
        return {"train": np.arange(len(shard_N))}
    for path, match in zip(paths, found, strict=True):
        if match is None:
            raise ValueError(f"{path}: other shards are named train*, val* or test*, and this one is not")
    split = np.array([m[1] for m in found if m])[shard_N]
    given = {s: np.flatnonzero(split == s) for s in ("train", "val", "test") if (split == s).any()}
    if "train" not in given:
        raise ValueError(f"data.root: {root} has no samples in shards named train*.tar")
    return given


def _samples(path: Path) -> list[_Sample]:
    """All samples of a shard, in its order."""
    out: list[_Sample] = []
    seen: set[str] = set()
    key = ""
    held: dict[str, tuple[str, int, int]] = {}
    try:
        with path.open("rb") as file:
            for member, offset, size in _members(path, file):
                match = _NAME.fullmatch(member) if "." in member else None
                if match is None:  # a hidden file, or one without a suffix: WebDataset passes over them too
                    continue
                if match[1] != key:
                    if held:
                        out.append(_sample(path, file, key, held))
                    key, held = match[1], {}
                    if key in seen:
                        raise ValueError(f"{path}/{member}: there is a sample {key} already, further up in this shard")
                    seen.add(key)
                suffix = match[2].lower()
                if suffix in held:
                    raise ValueError(f"{path}/{member}: the sample {key} has a {held[suffix][0]} already")
                held[suffix] = (member, offset, size)
            if held:
                out.append(_sample(path, file, key, held))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    return out


def _sample(path: Path, file: BinaryIO, key: str, held: dict[str, tuple[str, int, int]]) -> _Sample:
    images = [held[s] for s in held if s in _IMAGES]
    if len(images) != 1:
        has = f"{len(images)} images" if images else "no image (.jpg, .png, ..)"
        raise ValueError(f"{path}/{next(iter(held.values()))[0]}: the sample {key} has {has}: .{', .'.join(held)}")
    if "cls" not in held and "json" not in held:
        raise ValueError(f"{path}/{images[0][0]}: the sample {key} has no label (.cls or .json): .{', .'.join(held)}")
    member, offset, size = held["cls"] if "cls" in held else held["json"]
    at = f"{path}/{member}"
    if size > _MAX_TEXT:
        raise ValueError(f"{at}: a label has at most {_MAX_TEXT} bytes, not {size}")
    file.seek(offset)
    try:
        text = file.read(size).decode("utf-8-sig").strip()
        about = {"cls": text} if "cls" in held else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read the label {at}: {error}") from error
    keys = [k for k in ("label", "cls", "labels") if isinstance(about, dict) and k in about]
    if not keys:
        raise ValueError(f"{at}: an object with label, cls or labels is expected")
    label = about[keys[0]]
    if keys[0] == "labels" and not (isinstance(label, list) and all(map(is_label, label))):
        raise ValueError(f"{at}: labels is to be a list of integers or class names, not {label!r}")
    if keys[0] != "labels" and not is_label(label):
        raise ValueError(f"{at}: {keys[0]} is to be an integer or a class name, not {label!r}")
    return _Sample(*images[0], label)


def _members(path: Path, file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size in bytes of each regular file; the caller may move ``file`` meanwhile.

    Headers are blocks of 512 bytes (v7, ustar, GNU or pax); a block of zeros ends the archive.
    """
    end = file.seek(0, 2)
    at, name, length = 0, "", -1  # name and length where an extended header gives them
    while True:
        file.seek(at)
        head = file.read(_BLOCK)
        if at == 0 and head[:2] in _MAGIC:
            raise ValueError(f"{path} is compressed ({_MAGIC[head[:2]]}): unpack it")
        if len(head) < _BLOCK:
            raise ValueError(f"{path} is cut off: it ends at byte {end}, without the block of zeros that ends a tar")
        if not any(head):
            return
        try:
            if _number(head[148:156]) != sum(head) - sum(head[148:156]) + 8 * 32:
                raise ValueError("its checksum differs")
            size = _number(head[124:136])
        except ValueError as error:
            raise ValueError(f"{path} is damaged, or no tar: no header at byte {at} ({error})") from error
        kind, start = head[156:157], at + _BLOCK
        if kind in _REGULAR and length >= 0:
            size = length
        if kind in _EMPTY:  # links, devices, folders
            size = 0
        if not name:
            prefix = head[345:500].split(b"\0", 1)[0] if head[257:263] == b"ustar\0" else b""
            own = _text(b"/".join(p for p in (prefix, head[:100].split(b"\0", 1)[0]) if p))
        else:
            own = name
        if len(own) > _MAX_NAME:
            raise ValueError(f"{path} is damaged: at byte {at} is a name of {len(own)} characters")
        if start + size > end:
            raise ValueError(f"{path} is cut off in its member {own}: it ends at byte {end} of {start + size}")
        at = start + -(-size // _BLOCK) * _BLOCK
        if kind in (b"L", b"x") and size > _MAX_TEXT:
            raise ValueError(f"{path} is damaged: a header of {size} bytes at byte {start - _BLOCK}")
        if kind == b"L":
            file.seek(start)
            name = _text(file.read(size).split(b"\0", 1)[0])
        elif kind == b"x":
            file.seek(start)
            records = _pax(path, file.read(size))
            name, length = _text(records.get(b"path", b"")) or name, int(records.get(b"size", -1))
        elif kind not in (b"g", b"K"):
            if kind in _REGULAR:
                yield own, start, size
            name, length = "", -1


def _number(field: bytes) -> int:
    """A header's number: octal, or base 256 where its first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits and not digits.isdigit():
        raise ValueError(f"{digits!r} is no octal number")
    return int(digits or b"0", 8)


def _pax(path: Path, content: bytes) -> dict[bytes, bytes]:
    """Records ``LENGTH KEY=VALUE\\n``."""
    out, at = {}, 0
    while at < len(content):
        length, _, _ = content[at : at + 20].partition(b" ")
        record = content[at : at + int(length)] if length.isdigit() else b""
        key, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if not equals or record[-1:] != b"\n" or (key == b"size" and not (value.isdigit() and len(value) < 20)):
            raise ValueError(f"{path} is damaged: a pax header has the record {content[at : at + 40]!r}")
        out[key] = value
        at += len(record)
    return out


def _text(name: bytes) -> str:
    """A member's name in one line."""
    text = name.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else text.encode("unicode_escape").decode()
