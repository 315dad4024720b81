"""A seek index names the places where MCUs begin, is believed only where it belongs, and damage crashes nothing."""

import ctypes
import functools
import json
import mmap
import struct
import subprocess
import sys

import numpy as np
import pytest
from fasttrain.loaders.jpeg import SOS, read_header
from fasttrain.loaders.seek import END, STEP, damage, index_before, seek_index
from hypothesis import given, settings
from hypothesis import strategies as st

from . import test_baseline as b
from .jpegs import by_hand, jpeg, noise, photo, segment, turbo_jpeg, without

TAIL = struct.Struct(">III8s")


# an independent reader, bit by bit


def bits_of(data: bytes) -> list[list[tuple[int, int]]]:
    """(where in the data, bit) of everything between restart markers; stuffed bytes are no data."""
    runs, at = [[]], 0
    while at < len(data):
        if data[at] == 0xFF and data[at + 1]:
            if not 0xD0 <= data[at + 1] <= 0xD7:
                break
            runs.append([])
            at += 2
            continue
        runs[-1] += [(8 * at + k, data[at] >> (7 - k) & 1) for k in range(8)]
        at += 2 if data[at] == 0xFF else 1
    return runs


def codes_of(counts: bytes, values: bytes) -> dict[tuple[int, int], int]:
    """T.81, annex C: (length, code) -> value."""
    table, code, at = {}, 0, 0
    for length in range(1, 17):
        for _ in range(counts[length - 1]):
            table[length, code] = values[at]
            code, at = code + 1, at + 1
        code *= 2
    return table


class Reader:
    def __init__(self, bits: list[tuple[int, int]]) -> None:
        self.bits, self.at = bits, 0

    def number(self, size: int) -> int:
        value = sum(self.bits[self.at + k][1] << (size - 1 - k) for k in range(size))
        self.at += size
        return value

    def value(self, codes: dict[tuple[int, int], int]) -> int:
        length, code = 1, self.number(1)
        while (length, code) not in codes:
            length, code = length + 1, 2 * code + self.number(1)
        return codes[length, code]

    def signed(self, size: int) -> int:
        number = self.number(size)
        return number if not size or number >> (size - 1) else number - (1 << size) + 1


def mcus(content: bytes) -> list[tuple[int, ...]]:
    """(bit where it begins, DC coefficients before it) of every MCU; three coefficients also of a grey image."""
    head = read_header(content)
    codes = {which: codes_of(*table) for which, table in head.huffman.items()}
    blocks = [1] if len(head.components) == 1 else [c[1] * c[2] for c in head.components]
    across, down = -(-head.width // head.mcu[0]), -(-head.height // head.mcu[1])
    runs, found = bits_of(content[head.data :]), []
    for number in range(across * down):
        if number % (head.restart or 1 << 30) == 0:
            reader, was = Reader(runs.pop(0)), [0, 0, 0]
        found.append((reader.bits[reader.at][0], *was))
        for c, count in enumerate(blocks):
            dc, ac = head.tables[c]
            for _ in range(count):
                was[c] += reader.signed(reader.value(codes[0, dc]))
                k = 1
                while k < 64:
                    value = reader.value(codes[1, ac])
                    if value == 0:
                        break
                    reader.signed(value & 15)
                    k += (value >> 4) + 1
    return found


def expected_places(content: bytes, step: int) -> list[tuple[int, ...]]:
    head = read_header(content)
    across = -(-head.width // head.mcu[0])
    return [place for i, place in enumerate(mcus(content)) if i % across % step == 0]


def unpacked(places: bytes) -> list[tuple[int, ...]]:
    return list(struct.iter_unpack(">I3h", places))


@settings(deadline=None, max_examples=40)
@given(b.jpegs(), st.integers(1, 9))
def test_places_are_where_mcus_begin(content, step):
    assert unpacked(b.index_of(content, step).tobytes()) == expected_places(content, step)
    index = seek_index(content)
    step = STEP // read_header(content).mcu[0]
    assert unpacked(index[:-END]) == expected_places(content, step)
    assert TAIL.unpack(index[-END:]) == (len(index) - END, step, len(content), b"ft-seek1")


def test_places_of_a_large_image():
    """Bytes 0xFF before a place, and of every number of its bits taken up; DC coefficients of both signs."""
    content = jpeg(noise(400, 60), quality=100)
    places = unpacked(seek_index(content)[:-END])
    assert places == expected_places(content, STEP // 16) and len(places) == 4 * -(-25 * 16 // STEP)
    assert {p[0] % 8 for p in places} == set(range(8)) and min(p[1] for p in places) < 0 < max(p[1] for p in places)
    content = jpeg(photo(300, 200, which=1), quality=30, subsampling=1)
    assert unpacked(seek_index(content)[:-END]) == expected_places(content, STEP // 16)


def test_what_has_no_index(need):
    need("ffcv")  # TurboJPEG is here for its sake
    image = photo(60, 40)
    scan = next(s for m, s, _ in read_header(jpeg(image)).segments if m == SOS)
    for content in (
        jpeg(image, progressive=True), jpeg(image, keep_rgb=True), jpeg(image.convert("CMYK")), b"", b"\x89PNG", b"\xff\xd8",
        turbo_jpeg(np.asarray(image), "4:1:1"), turbo_jpeg(np.asarray(image), "4:4:0"), jpeg(image)[:-60],
        jpeg(image)[:scan] + segment(SOS, b"\1\1\0\0\x3f\0") + jpeg(image)[scan + 14 :],
    ):  # fmt: skip
        assert seek_index(content) == b""
    assert seek_index(jpeg(image))


# damage


def test_wrong_codes_are_found():
    assert damage(by_hand(b.DC_0 + b.END)) == ""
    assert damage(by_hand(b.DC_0 + 3 * b.SIXTEEN_ZEROS + b.AFTER_14)) == ""  # coefficient 63: the last one
    assert "damaged" in damage(by_hand(b.DC_0 + 3 * b.SIXTEEN_ZEROS + b.AFTER_15))
    assert "damaged" in damage(by_hand(b.DC_0 + 4 * b.SIXTEEN_ZEROS + b.END))
    assert "damaged" in damage(by_hand(b.DC_0 + "1" * 100))  # all ones is no code
    assert "damaged" in damage(by_hand("1" * 9 + "0" * 40))  # of DC neither
    assert "ends before" in damage(by_hand(b.DC_0))
    assert "ends before" in damage(by_hand((b.DC_0 + b.END) * 3, width=32))
    assert damage(by_hand((b.DC_0 + b.END) * 4, width=32)) == ""


def kinds() -> dict[str, bytes]:
    image = photo(70, 50)
    return {
        "plain": jpeg(image), "restarts": jpeg(image, restart_marker_blocks=4), "cmyk": jpeg(image.convert("CMYK")),
        "optimised": jpeg(image, optimize=True, subsampling=0), "rgb": jpeg(image, keep_rgb=True),
        "grey": jpeg(image.convert("L")), "extended": jpeg(image).replace(b"\xff\xc0", b"\xff\xc1", 1),
    }  # fmt: skip


@pytest.mark.parametrize("kind", kinds())
def test_a_jpeg_that_is_cut_off_is_found(kind):
    """Also of kinds that libjpeg decodes."""
    content = kinds()[kind]
    assert damage(content) == damage(content[:-2]) == ""
    for end in range(read_header(content).data, len(content) - 2, 7):
        assert "ends before" in damage(content[:end]) and seek_index(content[:end]) == b""


@pytest.mark.parametrize("sampling", ["4:4:0", "4:1:1"])
def test_other_samplings_are_looked_into(need, sampling):
    need("ffcv")
    content = turbo_jpeg(np.asarray(photo(70, 50)), sampling)
    assert damage(content) == ""
    for end in range(read_header(content).data, len(content) - 2, 7):
        assert "ends before" in damage(content[:end])


def test_what_is_not_looked_into():
    for content in (
        jpeg(photo(70, 50), progressive=True)[:-300],
        b"",
        b"\xff\xd8",
        b"no image",
        without(kinds()["plain"], 0xC4),
    ):
        assert damage(content) == ""


def test_a_restart_interval_that_is_missing_is_found():
    content = jpeg(photo(70, 50), restart_marker_rows=1)
    place = [content.index(bytes([0xFF, 0xD0 + k])) for k in (1, 2)]
    less = content[: place[0]] + content[place[1] :]
    assert "ends before" in damage(less) and seek_index(less) == b""


def test_flipped_bytes_are_found_where_they_make_wrong_codes():
    rng, content = np.random.default_rng(0), jpeg(photo(200, 150), quality=90)
    start, found = read_header(content).data, 0
    for at in rng.integers(start, len(content) - 2, 300):
        flipped = bytearray(content)
        flipped[at] ^= int(rng.integers(1, 256))
        why, index = damage(bytes(flipped)), seek_index(bytes(flipped))
        assert (why == "") == (index != b"")
        found += why != ""
    assert found > 15  # most flips make other pictures, not wrong codes


def test_damage_is_seen_behind_a_place_and_not_before_it():
    """A marker in the middle of the first row: it ends there, though the index leads on to the next one."""
    content = jpeg(photo(160, 120))
    places, whole, at = b.index_of(content, 4), b.ours(content), read_header(content).data + 30
    broken = b.memory(content[:at] + b"\xff\xd9" + content[at + 2 :])
    assert b.decode_box(broken, 120, 160, places, 4, 1, 0, 0, 120, 160).size == 0
    assert b.decode_box(broken, 120, 160, places[:0], 1, 1, 80, 30, 120, 160).size == 0
    assert (b.decode_box(broken, 120, 160, places, 4, 1, 80, 30, 120, 160) == whole[80:, 30:]).all()


# in memory


def found_before(before: bytes, content: bytes, *, readable: int | None = None) -> tuple[int, int]:
    data = b.memory(before + content)
    readable = len(before) if readable is None else readable
    return index_before(data.ctypes.data + len(before), readable, len(content))


def test_an_index_is_found_right_before_its_jpeg():
    content = jpeg(photo(70, 50))
    index = seek_index(content)
    count = len(index) - END
    assert found_before(index, content) == found_before(b"more" * 99 + index, content) == (count, STEP // 16)
    for readable in (0, 1, END - 1, END, count + END - 1):
        assert found_before(index, content, readable=readable) == (0, 1)
    for other in (
        b"", bytes(len(index)), index[:-1], index + b"\0", index[:-8] + b"ft-seek2", index[:-8] + bytes(8),
        index[:-END] + TAIL.pack(count, 4, len(content) + 1, b"ft-seek1"),
        index[:-END] + TAIL.pack(count + 10, 4, len(content), b"ft-seek1"),
        index[:-END] + TAIL.pack(count - 1, 4, len(content), b"ft-seek1"),
        index[:-END] + TAIL.pack(2**32 - 6, 4, len(content), b"ft-seek1"),
        index[:-END] + TAIL.pack(count, 0, len(content), b"ft-seek1"),
        index[:-END] + TAIL.pack(count, 1 << 16, len(content), b"ft-seek1"),
        index[:-END] + TAIL.pack(count, 2**32 - 1, len(content), b"ft-seek1"),
        seek_index(jpeg(photo(70, 50, which=1))), seek_index(jpeg(photo(71, 90))),
    ):  # fmt: skip
        assert found_before(other, content) == (0, 1)
    assert found_before(index, content + b"\0") == (0, 1)


@functools.cache
def to_damage() -> list[bytes]:
    image = photo(65, 49)
    plain = [jpeg(image, quality=q, **how) for q in (30, 100) for how in ({}, {"optimize": True}, {"subsampling": 0})]
    plain += [jpeg(image, subsampling=1), jpeg(image.convert("L")), jpeg(image, restart_marker_blocks=3)]
    return [*plain, jpeg(image, progressive=True), jpeg(image, keep_rgb=True)]


def damaged(rng: np.random.Generator, content: bytes) -> bytes:
    out, head = bytearray(content), read_header(content).data
    for _ in range(rng.integers(1, 6)):
        out[rng.integers(2, head if rng.random() < 0.7 else len(out))] = rng.choice([0, 1, 255, rng.integers(256)])
    return bytes(out[: rng.integers(len(out))] if rng.random() < 0.1 else out)


def test_damaged_jpegs_are_indexed_or_not():
    rng, count = np.random.default_rng(0), {"index": 0, "wrong": 0, "nothing": 0}
    for i in range(2000):
        content = damaged(rng, to_damage()[i % len(to_damage())])
        index, why = seek_index(content), damage(content)
        assert isinstance(why, str) and not (why and index)
        count["index" if index else "wrong" if why else "nothing"] += 1
    assert min(count.values()) > 100, count


class Fenced:
    """Memory before and behind which nothing may be touched: that ends the process."""

    def __init__(self, pages: int = 16) -> None:
        self.size, fence = pages * mmap.PAGESIZE, mmap.PAGESIZE
        self.memory = mmap.mmap(-1, self.size + 2 * fence)
        self.bytes = np.frombuffer(self.memory, np.uint8)[fence:-fence]
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for start in (self.bytes.ctypes.data - fence, self.bytes.ctypes.data + self.size):
            assert protect(ctypes.c_void_p(start), ctypes.c_size_t(fence), 0) == 0

    def holding(self, content: bytes, *, at_end: bool) -> int:
        """Puts it right behind the first fence, or right before the second one; returns where it is."""
        start = self.size - len(content) if at_end else 0
        self.bytes[start : start + len(content)] = np.frombuffer(content, np.uint8)
        return self.bytes.ctypes.data + start


def show_damaged() -> dict[str, int]:
    """Shows damaged JPEGs with damaged indices; a crash ends the process. Returns how often each status came."""
    from fasttrain.loaders.show import BAD, DONE, load_libjpeg, show_at

    load_libjpeg()
    rng, count, fenced = np.random.default_rng(0), {DONE: 0, BAD: 0}, Fenced()
    out = np.empty((16, 16, 3), np.uint8)
    for i in range(4000):
        content = to_damage()[i % len(to_damage())]
        head, index, changed = read_header(content), bytearray(seek_index(content)), bytearray(content)
        kind, places = rng.integers(5) if index else 4, len(index) - END
        wild = [0, 1, 2, 60, len(content), 8 * len(content), 2**31, 2**32 - 1]
        if kind == 0:  # one place
            at = 10 * int(rng.integers(places // 10))
            index[at : at + 4] = struct.pack(">I", int(rng.choice(wild)))
        elif kind == 1:  # all of them
            index[:places] = rng.bytes(places)
        elif kind == 2:  # what is behind them, but for the tag
            at = places + 4 * int(rng.integers(3))
            index[at : at + 4] = struct.pack(">I", int(rng.choice([*wild, places + 10, places - 10, 8, 10, 2**32 - 6])))
        elif kind == 3:  # the size in the frame
            frame = next(s for m, s, _ in head.segments if 0xC0 <= m <= 0xC2)
            changed[frame + 5 : frame + 9] = struct.pack(">HH", *rng.choice([0, 1, 48, 49, 50, 65, 70, 65535], 2))
        else:
            changed = bytearray(damaged(rng, content))
        if len(changed) != len(content) and len(index):
            index[places + 8 : places + 12] = struct.pack(">I", len(changed))
        sizes = [(head.height, head.width)] * 3 + [(1, 1), (50, 65), (49, 64)]
        height, width = sizes[rng.integers(len(sizes))]
        if kind == 3 and i % 2:
            height, width = struct.unpack(">HH", changed[frame + 5 : frame + 9])
        if not 0 < height * width < 10_000_000:
            continue
        row = np.array([rng.integers(height), rng.integers(width), *rng.integers(1, 140, 2), 0, 0], np.int32)
        at = fenced.holding(bytes(index + changed), at_end=i % 3 > 0) + len(index)
        given = (at, len(changed), len(index), 1, height, width, row.ctypes.data, 16, out.ctypes.data, 0, 0)
        count[show_at()(*given)] += 1
    return {"done": count[DONE], "bad": count[BAD]}


def test_showing_damaged_jpegs_never_crashes(need, repository):
    need("ffcv")  # libturbojpeg is there for its sake
    ran = subprocess.run(
        [sys.executable, "-c", "from tests.loaders import test_seek as t; print(t.json.dumps(t.show_damaged()))"],
        cwd=repository, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    count = json.loads(ran.stdout)
    assert count["done"] > 500 and count["bad"] > 500, count
