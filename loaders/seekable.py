"""Seekable JPEG: the same picture, re-coded without loss so that decoding may begin at any row of blocks.

The entropy-coded data of a baseline JPEG is one stream: to see the lower half one must read the upper. Restart markers
(ITU-T T.81, B.2.1) cut it into parts that stand alone. :func:`seekable` puts one at the start of every row of MCUs (8 or
16 pixels) and notes their places in an APP15 segment, which other readers skip. Coefficients are not touched: every
decoder makes the same pixels of it as before. Only the differences of DC coefficients across a marker change, so the DC
codes are those of T.81's annex K, which know every difference.

:func:`rows` cuts out rows of MCUs: a small JPEG of its own, which any decoder takes. A random-resized crop then costs
its own height, not the picture's.
"""

import struct

import numpy as np
from numba import njit

from .jpeg import DHT, DRI, SOS, Header, read_header

TAG = b"fasttrain rows\0"
_APP15 = 0xEF
_DAMAGED, _ENDS = -1, -2
# T.81, tables K.3 and K.4: how many codes of 1..16 bits; their values are 0..11 in order
_DC_COUNTS = ((0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0), (0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0))


def seekable(jpeg: bytes) -> bytes | None:
    """The same coefficients with a restart marker at every row of MCUs, and an index of these rows.

    None where that cannot be: progressive, arithmetic, 12 bits a sample or in several scans; or where the data is
    damaged.
    """
    head = read_header(jpeg)
    recoded = _recoded(jpeg, head)
    if recoded is None or isinstance(recoded, str):
        return None
    data, start_R = recoded
    parts = [b"\xff\xd8"]
    scan = b""
    for marker, start, end in head.segments:
        if marker == SOS:
            scan = jpeg[start:end]
        elif marker in (0xE0, 0xEE, 0xDB) or 0xC0 <= marker < 0xC4:  # JFIF, Adobe, quantisation, frame
            parts.append(jpeg[start:end])
    for number in sorted({d for d, _ in head.tables}):
        parts.append(_table(number, bytes(_DC_COUNTS[min(number, 1)]), bytes(range(12))))
    for number in sorted({a for _, a in head.tables}):
        parts.append(_table(0x10 | number, *head.huffman[1, number]))
    rows = len(start_R) - 1
    parts.append(struct.pack(">BBHH", 0xFF, DRI, 4, -(-head.width // head.mcu[0])))
    index = TAG + struct.pack(f"<HH{rows + 1}I", head.mcu[1], rows, *start_R.tolist())
    parts.append(struct.pack(">BBH", 0xFF, _APP15, len(index) + 2) + index)
    return b"".join([*parts, scan, data, b"\xff\xd9"])


def damage(jpeg: bytes) -> str:
    """What is wrong with a JPEG's entropy-coded data; empty where nothing is, or where it is of a kind not looked into."""
    recoded = _recoded(jpeg, read_header(jpeg))
    return recoded if isinstance(recoded, str) else ""


def _recoded(jpeg: bytes, head: Header) -> tuple[bytes, np.ndarray] | str | None:
    """The entropy-coded data with restart markers and where its rows start; what is wrong with it; None if not baseline."""
    sampled = all(1 <= h <= 4 and 1 <= v <= 4 for _, h, v in head.components)
    if head.sof not in (0xC0, 0xC1) or head.precision != 8 or not head.tables or not sampled:
        return None
    if any((0, d) not in head.huffman or (1, a) not in head.huffman for d, a in head.tables):
        return None
    mcu_w, mcu_h = head.mcu
    across, down = -(-head.width // mcu_w), -(-head.height // mcu_h)
    single = len(head.components) == 1
    block_C = np.array([1 if single else h * v for _, h, v in head.components], dtype=np.int64)
    dc_in = np.stack([_lookup(*head.huffman[0, d]) for d, _ in head.tables])
    ac_in = np.stack([_lookup(*head.huffman[1, a]) for _, a in head.tables])
    dc_out = np.stack([_codes(_DC_COUNTS[min(d, 1)], bytes(range(12))) for d, _ in head.tables])
    data = np.frombuffer(jpeg, dtype=np.uint8)[head.data :]
    # a DC code grows by 21 bits at most, a row by its marker and filling bits; every byte may come to be stuffed
    most = 2 * (len(data) + 3 * int(block_C.sum()) * across * down + 3 * down) + 16
    out = np.empty(most, dtype=np.uint8)
    start_R = np.zeros(down + 1, dtype=np.int64)
    size = _recode(data, out, start_R, block_C, dc_in, ac_in, dc_out, across, down, head.restart)
    if size == _DAMAGED:
        return "its entropy-coded data is damaged"
    if size == _ENDS:
        return "its data ends before the image does"
    return out[:size].tobytes(), start_R


def _table(key: int, counts: bytes, values: bytes) -> bytes:
    return struct.pack(">BBHB", 0xFF, DHT, 19 + len(values), key) + counts + values


def _lookup(counts: bytes, values: bytes) -> np.ndarray:
    """int32 [65536]: length << 8 | value of the code that begins a 16-bit word; 0 where there is none."""
    out, code = np.zeros(65536, dtype=np.int32), 0
    rest = iter(values)
    for length, count in enumerate(counts, 1):
        for _ in range(count):
            first = code << (16 - length)
            out[first : first + (1 << (16 - length))] = length << 8 | next(rest, 0)
            code += 1
        code <<= 1
    return out


def _codes(counts: tuple[int, ...], values: bytes) -> np.ndarray:
    """int64 [256]: length << 16 | code of a value; 0 where there is none."""
    out, code = np.zeros(256, dtype=np.int64), 0
    rest = iter(values)
    for length, count in enumerate(counts, 1):
        for _ in range(count):
            out[next(rest)] = length << 16 | code
            code += 1
        code <<= 1
    return out


@njit(cache=True, nogil=True, inline="always")
def _put(out, at, held, bits, code, length):
    """Appends bits to the output, whole bytes of it with T.81's stuffing: returns (at, held, bits)."""
    held = (held << np.uint64(length)) | np.uint64(code)
    bits += length
    while bits >= 8:
        byte = (held >> np.uint64(bits - 8)) & np.uint64(0xFF)
        out[at] = byte
        at += 1
        if byte == 0xFF:
            out[at] = 0
            at += 1
        bits -= 8
    return at, held & np.uint64((1 << bits) - 1), bits


@njit(cache=True, nogil=True)
def _recode(data, out, start_R, block_C, dc_in, ac_in, dc_out, across, down, restart):
    """Copies the entropy-coded data, a restart marker before every row but the first; returns its size, or what is wrong.

    start_R: where each row's data starts, and where that of the last ends.
    """
    was_C, put_C = np.zeros(len(block_C), dtype=np.int64), np.zeros(len(block_C), dtype=np.int64)
    at, to, end = 0, 0, len(data)
    word, have, filled = np.uint64(0), 0, 0  # bits read and not used; zeros among them that are not in the data
    held, bits = np.uint64(0), 0  # bits to write
    done = 0
    for row in range(down):
        for column in range(across):
            if restart and done and done % restart == 0:
                if have < filled:
                    return _ENDS
                word, have, filled = np.uint64(0), 0, 0
                while at + 1 < end and not (data[at] == 0xFF and 0xD0 <= data[at + 1] <= 0xD7):
                    at += 1
                at += 2
                was_C[:] = 0
            done += 1
            if column == 0:
                if row:
                    if bits:
                        to, held, bits = _put(out, to, held, bits, (1 << (8 - bits)) - 1, 8 - bits)
                    out[to], out[to + 1] = 0xFF, 0xD0 + (row - 1) % 8
                    to += 2
                    put_C[:] = 0
                start_R[row] = to
            for c in range(len(block_C)):
                for _ in range(block_C[c]):
                    k = 0
                    while k < 64:
                        while have <= 48:  # 16 bits for a code and up to 16 for its value
                            if at < end and not (data[at] == 0xFF and (at + 1 >= end or data[at + 1] != 0)):
                                byte = data[at]
                                at += 2 if byte == 0xFF else 1
                            else:
                                byte = np.uint8(0)
                                filled += 8
                            word = (word << np.uint64(8)) | np.uint64(byte)
                            have += 8
                        look = np.int64((word >> np.uint64(have - 16)) & np.uint64(0xFFFF))
                        entry = np.int64(dc_in[c, look] if k == 0 else ac_in[c, look])
                        if entry == 0 or have - (entry >> 8) - (entry & 15) < filled:
                            return _DAMAGED if entry == 0 and have >= filled + 16 else _ENDS
                        length, value = entry >> 8, entry & 255
                        have -= length
                        extra = value & 15
                        number = np.int64((word >> np.uint64(have - extra)) & np.uint64((1 << extra) - 1))
                        have -= extra
                        if k == 0:
                            if value > 11:
                                return _DAMAGED
                            difference = number
                            if extra and number < (1 << (extra - 1)):
                                difference = number - (1 << extra) + 1
                            was_C[c] += difference
                            difference = was_C[c] - put_C[c]
                            put_C[c] = was_C[c]
                            size, left = 0, abs(difference)
                            while left:
                                size += 1
                                left >>= 1
                            if size > 11:
                                return _DAMAGED
                            code = dc_out[c, size]
                            to, held, bits = _put(out, to, held, bits, code & 0xFFFF, code >> 16)
                            if size:
                                if difference < 0:
                                    difference += (1 << size) - 1
                                to, held, bits = _put(out, to, held, bits, difference, size)
                            k = 1
                        else:
                            to, held, bits = _put(out, to, held, bits, look >> (16 - length), length)
                            if extra:
                                to, held, bits = _put(out, to, held, bits, number, extra)
                                k += (value >> 4) + 1
                            elif value == 0xF0:
                                k += 16
                            else:
                                k = 64
                            if k > 64:
                                return _DAMAGED
    if bits:
        to, held, bits = _put(out, to, held, bits, (1 << (8 - bits)) - 1, 8 - bits)
    start_R[down] = to
    return to
