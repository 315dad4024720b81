"""The header and the Huffman codes of baseline JPEGs (ITU-T T.81, annexes B, C and F), read fast.

One lookup gives a coefficient with the zeros before it; eight bytes are taken up at a time. ``baseline.py`` makes pixels of
what is read here, ``seek.py`` notes where reading may begin.
"""

import numpy as np
from numba import njit

from .vectors import load_eight, load_int32, load_uint8, store_int16

LOOK = 11  # bits of a lookup: the two tables in use at a time fit into the first-level cache
END_OF_BLOCK = 128  # in place of a run of zeros
_NO_CODE, _BEYOND = -1, -2
_VALUES = 34  # in a row of codes: behind 17 limits and 17 offsets
CODES = _VALUES + 256
# what of a header is kept: int64 [HEAD]; blocks of an MCU across and down, and tables, for each of four components
HEIGHT, WIDTH, PARTS, RESTART, SCAN, WIDE, TALL, QUANT, DC, AC, HEAD = 0, 1, 2, 3, 4, 5, 9, 13, 17, 21, 25
SOUND, DAMAGED, ENDS = 0, 1, 2
OTHER, BASELINE, SHOWN = 0, 1, 2  # kinds of files: not looked into, of the baseline kind, decoded here
_JFIF, _ADOBE = np.frombuffer(b"JFIF\0", dtype=np.uint8), np.frombuffer(b"Adobe", dtype=np.uint8)


def _natural() -> np.ndarray:
    """Places of the zigzag order's coefficients in a block [v, u]; T.81, figure 5."""
    order = sorted(((v, u) for v in range(8) for u in range(8)), key=lambda p: (sum(p), p[1 - sum(p) % 2]))
    return np.array([8 * v + u for v, u in order], dtype=np.uint8)


NATURAL = _natural()


@njit(cache=True, nogil=True, error_model="numpy")
def two(data, at):
    return np.int64(data[at]) << 8 | np.int64(data[at + 1])


@njit(cache=True, nogil=True, error_model="numpy")
def _starts(data, at, text):
    for k in range(len(text)):  # noqa: SIM110
        if data[at + k] != text[k]:
            return False
    return True


@njit(cache=True, nogil=True, error_model="numpy")
def read_head(data, head, step_4Q, look_8L, code_8C):
    """Reads a JPEG's segments up to its scan, and makes tables of its codes.

    Args:
        data: uint8 [bytes].
        head: int64 [HEAD], written.
        step_4Q: int32 [4, 64], written: quantisation steps in natural order.
        look_8L: int32 [8, 2**LOOK], written: 0..3 DC, 4..7 AC; see :func:`_make_table`.
        code_8C: int32 [8, 290], written; see there.

    Returns:
        :data:`SHOWN` for a JPEG that ``baseline.py`` decodes, :data:`BASELINE` for one whose codes :func:`walk` reads,
        :data:`OTHER`.
    """
    end, at, frame = len(data), 2, 0
    if end < 4 or two(data, 0) != 0xFFD8:
        return OTHER
    jfif, adobe, has_steps, has_codes = False, np.int64(-1), 0, 0
    head[RESTART] = 0
    while at + 4 <= end:
        if data[at] != 0xFF:
            return OTHER
        marker, body, following = data[at + 1], at + 4, at + 2 + two(data, at + 2)
        if marker == 0xFF:
            at += 1
            continue
        if following < body or following > end:
            return OTHER
        size = following - body
        if marker == 0xC0 or marker == 0xC1:
            if frame or size < 6 or size < 6 + 3 * np.int64(data[body + 5]) or not _read_frame(data, body, head):
                return OTHER
            frame = body + 6
        elif 0xC2 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            return OTHER
        elif marker == 0xE0:
            jfif = jfif or (size >= 14 and _starts(data, body, _JFIF))
        elif marker == 0xEE:
            if size >= 12 and _starts(data, body, _ADOBE):
                adobe = np.int64(data[body + 11])
        elif marker == 0xDB:
            while body < following:
                wide, table = np.int64(data[body] >> 4), np.int64(data[body] & 15)
                if wide > 1 or table > 3 or body + 65 + 64 * wide > following:
                    return OTHER
                for k in range(64):
                    place = body + 1 + k * (1 + wide)
                    step_4Q[table, NATURAL[k]] = two(data, place) if wide else np.int64(data[place])
                has_steps |= 1 << table
                body += 65 + 64 * wide
        elif marker == 0xC4:
            while body < following:
                which = 4 * np.int64(data[body] >> 4) + np.int64(data[body] & 15)
                if data[body] >> 4 > 1 or data[body] & 15 > 3 or body + 17 > following:
                    return OTHER
                count = np.int64(0)
                for k in range(16):
                    count += np.int64(data[body + 1 + k])
                if count > 256 or body + 17 + count > following:
                    return OTHER
                if not _make_table(data[body + 1 : body + 17 + count], which < 4, look_8L[which], code_8C[which]):
                    return OTHER
                has_codes |= 1 << which
                body += 17 + count
        elif marker == 0xDD:
            if size != 2:
                return OTHER
            head[RESTART] = two(data, body)
        elif marker == 0xDA:
            parts = head[PARTS]
            if not frame or size != 4 + 2 * parts or data[body] != parts:
                return OTHER
            named = True  # as libjpeg guesses what its colours are
            for c in range(parts):
                name, tables = data[body + 1 + 2 * c], np.int64(data[body + 2 + 2 * c])
                if name != data[frame + 3 * c] or tables >> 4 > 3 or tables & 15 > 3:
                    return OTHER
                named = named and name == c + 1
                head[DC + c], head[AC + c] = tables >> 4, 4 + (tables & 15)
                if not (has_codes >> head[DC + c] & has_codes >> head[AC + c] & has_steps >> head[QUANT + c] & 1):
                    return OTHER
            head[SCAN] = following
            known = parts == 1 or (parts == 3 and (jfif or adobe == 1 or (adobe < 0 and named)))
            halved = head[WIDE] <= 2 and head[TALL] <= head[WIDE]  # neither, columns, or both of chroma
            for c in range(1, parts):
                halved = halved and head[WIDE + c] == 1 and head[TALL + c] == 1
            return SHOWN if known and halved else BASELINE
        at = following
    return OTHER


@njit(cache=True, nogil=True, error_model="numpy")
def _read_frame(data, body, head):
    """Size and components; whether they can be."""
    head[HEIGHT], head[WIDTH], parts = two(data, body + 1), two(data, body + 3), np.int64(data[body + 5])
    if data[body] != 8 or not head[HEIGHT] or not head[WIDTH] or not 1 <= parts <= 4:
        return False
    head[PARTS] = parts
    for c in range(parts):
        sampling, table = data[body + 7 + 3 * c], data[body + 8 + 3 * c]
        wide, tall = sampling >> 4, sampling & 15
        if table > 3 or not 1 <= wide <= 4 or not 1 <= tall <= 4:
            return False
        head[QUANT + c] = table
        head[WIDE + c], head[TALL + c] = (wide, tall) if parts > 1 else (1, 1)
    return True


@njit(cache=True, nogil=True, error_model="numpy")
def _make_table(counts, is_dc, look_L, code_C):
    """What the next bits of data mean.

    Args:
        counts: uint8 [16 + values]: how many codes of each length; values in the order of their codes.
        is_dc: values are sizes of differences; otherwise runs of zeros and sizes of coefficients.
        look_L: int32 [2**LOOK], written: length of code and number (8 bits), run (8 bits: by how much the place in the
            block moves on), number (16 bits); or, where the number does not fit in, 0, length of the code, value; or 0.
        code_C: int32 [290], written: for each length, the 16-bit number that its codes stay under; for each length, what
            leads from a code to its value's place; values.

    Returns:
        Whether these can be codes.
    """
    look_L[:] = 0
    code, at = np.int64(0), np.int64(0)
    for length in range(1, 17):
        count = np.int64(counts[length - 1])
        code_C[17 + length] = at - code
        if code + count > 1 << length:
            return False
        for _ in range(count):
            value = np.int64(counts[16 + at])
            code_C[_VALUES + at] = value
            size, run = value & 15, value >> 4
            if is_dc and value > 11:
                return False
            if length <= LOOK:
                first, rest = code << (LOOK - length), LOOK - length
                if size == 0:
                    skip = 0 if is_dc else 16 if run == 15 else END_OF_BLOCK
                    look_L[first : first + (1 << rest)] = length | skip << 8
                elif size <= rest:
                    skip = 0 if is_dc else run + 1
                    entry, below = (length + size) | skip << 8, rest - size
                    for number in range(1 << size):
                        signed = number if number >> (size - 1) else number - (1 << size) + 1
                        start = first + (number << below)
                        look_L[start : start + (1 << below)] = entry | signed << 16
                else:
                    look_L[first : first + (1 << rest)] = length << 8 | value << 16
            code, at = code + 1, at + 1
        code_C[length] = code << (16 - length)
        code <<= 1
    return True


# From here to the end of a block everything is an address or a number: arrays would be counted, block by block.


@njit(cache=True, nogil=True, error_model="numpy")
def _long(word, entry, is_dc, codes):
    """What :data:`LOOK` bits do not tell: an entry as in the lookup, or 0 where the bits are no code."""
    length, value = entry >> 8 & 0xFF, entry >> 16
    if entry == 0:
        look = np.int64(word >> np.uint64(48))
        length = LOOK + 1
        while length <= 16 and look >= load_int32(codes, length):
            length += 1
        if length > 16:
            return np.int64(0)
        place = (look >> (16 - length)) + load_int32(codes, 17 + length)
        if not 0 <= place < 256:
            return np.int64(0)
        value = load_int32(codes, _VALUES + place)
    size, run = value & 15, value >> 4
    if size == 0:
        return length | (0 if is_dc else 16 if run == 15 else END_OF_BLOCK) << 8
    number = np.int64((word << np.uint64(length)) >> np.uint64(64 - size))
    signed = number if number >> (size - 1) else number - (1 << size) + 1
    return (length + size) | (0 if is_dc else run + 1) << 8 | signed << 16


@njit(cache=True, nogil=True, error_model="numpy")
def fill(at, end, word, have, filled):
    """Takes up bytes until at least 56 bits are there; zeros, which are counted, where a marker or the end is."""
    if at + 8 <= end:
        taken = load_eight(at)
        # is none of them FF, so that all are data? Then its complement has no zero byte
        if (~taken - np.uint64(0x0101010101010101)) & taken & np.uint64(0x8080808080808080) == 0:
            more = (63 - have) >> 3
            return at + more, word | (taken >> np.uint64(have)), have + 8 * more, filled
    while have < 56:
        byte = np.int64(0)
        if at < end and (load_uint8(at, 0) != 0xFF or (at + 1 < end and load_uint8(at, 1) == 0)):
            byte = load_uint8(at, 0)
            at += 2 if byte == 0xFF else 1
        else:
            filled += 8
        word |= np.uint64(byte) << np.uint64(56 - have)
        have += 8
    return at, word, have, filled


@njit(cache=True, nogil=True, error_model="numpy")
def read_block(at, end, word, have, filled, dc, ac, dc_codes, ac_codes, natural, block):
    """Reads the coefficients of a block.

    Returns:
        (at, word, have, filled) behind it, the difference of its DC coefficient, and the place of its last coefficient:
        :data:`END_OF_BLOCK` more than that where a code ends the block, :data:`_NO_CODE`, or :data:`_BEYOND` its end.
    """
    shift = np.uint64(64 - LOOK)
    at, word, have, filled = fill(at, end, word, have, filled)
    entry = load_int32(dc, np.int64(word >> shift))
    if entry & 0xFF == 0:
        entry = _long(word, entry, True, dc_codes)
        if entry == 0:
            return at, word, have, filled, entry, np.int64(_NO_CODE)
    word, have, difference = word << np.uint64(entry & 63), have - (entry & 0xFF), entry >> 16
    at, word, have, filled = fill(at, end, word, have, filled)
    k, since = (
        np.int64(0),
        0,
    )  # lookups since bytes were taken up: two take 22 bits at most, and 31 are kept for a long one
    while True:
        entry = load_int32(ac, np.int64(word >> shift))
        if entry & 0xFF == 0:
            entry = _long(word, entry, False, ac_codes)
            if entry == 0:
                return at, word, have, filled, difference, np.int64(_NO_CODE)
            since = 2
        word <<= np.uint64(entry & 63)
        have -= entry & 0xFF
        k += entry >> 8 & 0xFF
        if k > 62:
            if k == 63:
                store_int16(block, k, entry >> 16)
            elif k < END_OF_BLOCK:
                k = np.int64(_BEYOND)
            return at, word, have, filled, difference, k
        store_int16(block, load_uint8(natural, k), entry >> 16)
        since += 1
        if since >= 3:
            at, word, have, filled = fill(at, end, word, have, filled)
            since = 0


@njit(cache=True, nogil=True, error_model="numpy")
def behind_marker(at, end):
    """Where data goes on behind the next restart marker; the end where there is none."""
    while at + 1 < end and not (load_uint8(at, 0) == 0xFF and 0xD0 <= load_uint8(at, 1) <= 0xD7):
        at += 1
    return min(at + 2, end)


@njit(cache=True, nogil=True, error_model="numpy")
def walk(data, head, look_8L, code_8C, seek_step, places):
    """Reads all codes of an image, and notes where they may be entered.

    Args:
        data: uint8 [bytes].
        head, look_8L, code_8C: of :func:`read_head`.
        seek_step: MCUs from one place to the next.
        places: uint8, written, see ``baseline.decode_part``; empty to note nothing.

    Returns:
        :data:`SOUND`, :data:`DAMAGED`, or :data:`ENDS` where the data ends before the image does.
    """
    wide, tall = 1, 1
    for c in range(head[PARTS]):
        wide, tall = max(wide, head[WIDE + c]), max(tall, head[TALL + c])
    across, down = -(-head[WIDTH] // (8 * wide)), -(-head[HEIGHT] // (8 * tall))
    start, end = data.ctypes.data + head[SCAN], data.ctypes.data + len(data)
    block_64, was_C = np.zeros(64, dtype=np.int16), np.zeros(4, dtype=np.int64)
    looks, codes = look_8L.ctypes.data, code_8C.ctypes.data
    at, word, have, filled, to = start, np.uint64(0), np.int64(0), np.int64(0), 0
    for number in range(across * down):
        if head[RESTART] and number and number % head[RESTART] == 0:
            at, word, have, filled = behind_marker(at, end), np.uint64(0), np.int64(0), np.int64(0)
            was_C[:] = 0
        if len(places) and number % across % seek_step == 0:
            back = at  # over the bytes that are taken up and not used
            for _ in range((have - filled + 7) // 8):
                back -= 2 if load_uint8(back, -1) == 0 and back - 1 > start and load_uint8(back, -2) == 0xFF else 1
            bit = 8 * (back - start) + -(have - filled) % 8
            for k in range(4):
                places[to + k] = bit >> (24 - 8 * k) & 0xFF
            for k in range(6):
                places[to + 4 + k] = was_C[k // 2] >> (8 - k % 2 * 8) & 0xFF
            to += 10
        for c in range(head[PARTS]):
            dc, ac = head[DC + c], head[AC + c]
            for _ in range(head[WIDE + c] * head[TALL + c]):
                at, word, have, filled, difference, last = read_block(
                    at, end, word, have, filled, looks + (4 << LOOK) * dc, looks + (4 << LOOK) * ac,
                    codes + 4 * CODES * dc, codes + 4 * CODES * ac, NATURAL.ctypes.data, block_64.ctypes.data,
                )  # fmt: skip
                if have < filled + (16 if last == _NO_CODE else 0):
                    return ENDS
                if last < 0:
                    return DAMAGED
                was_C[c] += difference
    return SOUND
