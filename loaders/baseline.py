"""Decodes a part of a baseline JPEG: only the blocks that are shown are made into pixels, to the same bytes as libjpeg's.

Most JPEGs are of the baseline kind (ITU-T T.81: sequential DCT, Huffman codes, 8 bits), and a training view shows a part
of them. Of the rest only the codes are read, and with a seek index (``seek.py``) not even most of these. One lookup gives
a coefficient with the zeros before it, eight bytes are taken up at a time, blocks are transformed in vectors. Whatever is
of another kind, or damaged, is left to libjpeg.
"""

import numpy as np
from numba import njit

from .vectors import (
    TOGETHER,
    coloured,
    inverse_2,
    inverse_4,
    inverse_8,
    load_eight,
    load_int32,
    load_uint8,
    store_int16,
)

LOOK = 11  # bits of a lookup: the two tables in use at a time fit into the first-level cache
_END_OF_BLOCK = 128  # in place of a run of zeros
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


_NATURAL = _natural()


@njit(cache=True, nogil=True, error_model="numpy")
def _two(data, at):
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
        :data:`SHOWN` for a JPEG that :func:`decode_part` decodes, :data:`BASELINE` for one whose codes :func:`walk` reads,
        :data:`OTHER`.
    """
    end, at, frame = len(data), 2, 0
    if end < 4 or _two(data, 0) != 0xFFD8:
        return OTHER
    jfif, adobe, has_steps, has_codes = False, np.int64(-1), 0, 0
    head[RESTART] = 0
    while at + 4 <= end:
        if data[at] != 0xFF:
            return OTHER
        marker, body, following = data[at + 1], at + 4, at + 2 + _two(data, at + 2)
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
                    step_4Q[table, _NATURAL[k]] = _two(data, place) if wide else np.int64(data[place])
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
            head[RESTART] = _two(data, body)
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
    head[HEIGHT], head[WIDTH], parts = _two(data, body + 1), _two(data, body + 3), np.int64(data[body + 5])
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
                    skip = 0 if is_dc else 16 if run == 15 else _END_OF_BLOCK
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
        return length | (0 if is_dc else 16 if run == 15 else _END_OF_BLOCK) << 8
    number = np.int64((word << np.uint64(length)) >> np.uint64(64 - size))
    signed = number if number >> (size - 1) else number - (1 << size) + 1
    return (length + size) | (0 if is_dc else run + 1) << 8 | signed << 16


@njit(cache=True, nogil=True, error_model="numpy")
def _fill(at, end, word, have, filled):
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
def _block(at, end, word, have, filled, dc, ac, dc_codes, ac_codes, natural, block):
    """Reads the coefficients of a block.

    Returns:
        (at, word, have, filled) behind it, the difference of its DC coefficient, and the place of its last coefficient:
        :data:`_END_OF_BLOCK` more than that where a code ends the block, :data:`_NO_CODE`, or :data:`_BEYOND` its end.
    """
    shift = np.uint64(64 - LOOK)
    at, word, have, filled = _fill(at, end, word, have, filled)
    entry = load_int32(dc, np.int64(word >> shift))
    if entry & 0xFF == 0:
        entry = _long(word, entry, True, dc_codes)
        if entry == 0:
            return at, word, have, filled, entry, np.int64(_NO_CODE)
    word, have, difference = word << np.uint64(entry & 63), have - (entry & 0xFF), entry >> 16
    at, word, have, filled = _fill(at, end, word, have, filled)
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
            elif k < _END_OF_BLOCK:
                k = np.int64(_BEYOND)
            return at, word, have, filled, difference, k
        store_int16(block, load_uint8(natural, k), entry >> 16)
        since += 1
        if since >= 3:
            at, word, have, filled = _fill(at, end, word, have, filled)
            since = 0


@njit(cache=True, nogil=True, error_model="numpy")
def _behind_marker(at, end):
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
        places: uint8, written, see :func:`decode_part`; empty to note nothing.

    Returns:
        :data:`SOUND`, :data:`DAMAGED`, or :data:`ENDS` where the data ends before the image does.
    """
    wide, tall = 1, 1
    for c in range(head[PARTS]):
        wide, tall = max(wide, head[WIDE + c]), max(tall, head[TALL + c])
    across, down = -(-head[WIDTH] // (8 * wide)), -(-head[HEIGHT] // (8 * tall))
    start, end = data.ctypes.data + head[SCAN], data.ctypes.data + len(data)
    block_64, was_C = np.zeros(64, dtype=np.int16), np.zeros(4, dtype=np.int64)
    block, natural, looks, codes = block_64.ctypes.data, _NATURAL.ctypes.data, look_8L.ctypes.data, code_8C.ctypes.data
    at, word, have, filled, to = start, np.uint64(0), np.int64(0), np.int64(0), 0
    for number in range(across * down):
        if head[RESTART] and number and number % head[RESTART] == 0:
            at, word, have, filled = _behind_marker(at, end), np.uint64(0), np.int64(0), np.int64(0)
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
                at, word, have, filled, difference, last = _block(
                    at, end, word, have, filled, looks + (4 << LOOK) * dc, looks + (4 << LOOK) * ac,
                    codes + 4 * CODES * dc, codes + 4 * CODES * ac, natural, block,
                )  # fmt: skip
                if have < filled + (16 if last == _NO_CODE else 0):
                    return ENDS
                if last < 0:
                    return DAMAGED
                was_C[c] += difference
    return SOUND


@njit(cache=True, nogil=True, error_model="numpy")
def decode_part(data, head, step_4Q, look_8L, code_8C, places, seek_step, scale, top, left, bottom, right, plane_CYX):
    """Decodes the MCUs (minimum coded units) of rows ``top``..``bottom`` and columns ``left``..``right``.

    Args:
        data: uint8 [bytes].
        head, step_4Q, look_8L, code_8C: of :func:`read_head`.
        places: uint8, a seek index: for every ``seek_step``-th MCU of each row the bit where it starts (uint32), and the
            DC coefficients before it (int16 [3]), highest byte first; may be empty.
        scale: 1, 2, 4 or 8: 8 / scale pixels a block and direction.
        plane_CYX: uint8, written: components; chroma may fill only a part.

    Returns:
        Whether all codes were sound.
    """
    parts, across = head[PARTS], -(-head[WIDTH] // (8 * head[WIDE]))
    start, end, seeks = data.ctypes.data + head[SCAN], data.ctypes.data + len(data), len(places) > 0
    block_64, was_C = np.zeros(64, dtype=np.int16), np.zeros(3, dtype=np.int64)
    block, natural, looks, codes = block_64.ctypes.data, _NATURAL.ctypes.data, look_8L.ctypes.data, code_8C.ctypes.data
    pixels, all_steps = plane_CYX.ctypes.data, step_4Q.ctypes.data
    rows, pitch = plane_CYX.shape[1:]
    at, word, have, filled = start, np.uint64(0), np.int64(0), np.int64(0)
    luma = head[WIDE] * head[TALL]
    side_0 = 8 // scale
    side_1 = side_0 * (2 if luma == 4 and scale > 1 else 1)  # small chroma is decoded larger rather than enlarged
    per_row = -(-across // seek_step) if seeks else 0
    for row in range(top if seeks else 0, bottom):
        begin, stop = np.int64(0), right if seeks or row == bottom - 1 else across
        if seeks:
            begin = left // seek_step
            place = 10 * (row * per_row + begin)
            begin *= seek_step
            bit = _two(places, place) << 16 | _two(places, place + 2)
            for c in range(3):
                was_C[c] = np.int16(_two(places, place + 4 + 2 * c))
            at = start + (bit >> 3)
            if at >= end:
                return False
            at, word, have, filled = _fill(at, end, np.uint64(0), np.int64(0), np.int64(0))
            word, have = word << np.uint64(bit & 7), have - (bit & 7)
        for column in range(begin, stop):
            number = row * across + column
            if head[RESTART] and number and number % head[RESTART] == 0 and not (seeks and column == begin):
                if have < filled:
                    return False
                at, word, have, filled = _behind_marker(at, end), np.uint64(0), np.int64(0), np.int64(0)
                was_C[:] = 0
            for b in range(luma + parts - 1):
                c = max(b - luma + 1, 0)
                dc, ac, table = head[DC + c], head[AC + c], head[QUANT + c]
                at, word, have, filled, difference, last = _block(
                    at, end, word, have, filled, looks + (4 << LOOK) * dc, looks + (4 << LOOK) * ac,
                    codes + 4 * CODES * dc, codes + 4 * CODES * ac, natural, block,
                )  # fmt: skip
                if last < 0:
                    return False
                was_C[c] += difference
                if row < top or not left <= column < right:
                    block_64[:] = 0
                    continue
                store_int16(block, 0, was_C[c])
                side = side_1 if c else side_0
                y, x = (row - top) * side, (column - left) * side
                if c == 0:
                    y, x = y * head[TALL] + side * (b // head[WIDE]), x * head[WIDE] + side * (b % head[WIDE])
                if last == _END_OF_BLOCK or side == 1:  # as the transforms round it
                    dc_value = np.int64(np.int16(was_C[c]))
                    value = min(max(((dc_value * step_4Q[table, 0] + 4) >> 3) + 128, 0), 255)
                    plane_CYX[c, y : y + side, x : x + side] = value
                    block_64[:] = 0
                    continue
                out, steps = pixels + (c * rows + y) * pitch + x, all_steps + 4 * 64 * table
                if side == 8:
                    inverse_8(block, steps, out, pitch)
                elif side == 4:
                    inverse_4(block, steps, out, pitch)
                else:
                    inverse_2(block, steps, out, pitch)
    return have >= filled


@njit(cache=True, nogil=True, error_model="numpy")
def _enlarged(near_X, far_X, both, sum_X, out_X):
    """A row of chroma at twice its width, by libjpeg's triangle filter: 3/4 of the nearer sample, 1/4 of the other one.

    Args:
        near_X, far_X: uint8 [X], the row and the one that is next nearest; the same one where only columns are missing.
        both: rows are missing, too (which changes how libjpeg rounds).
        sum_X: int16 [X + 2], written over.
        out_X: uint8 [2 X], written.
    """
    n = len(near_X)
    sums, even, odd = sum_X[1 : n + 1], np.int16(8 if both else 4), np.int16(7 if both else 8)
    for i in range(n):
        sums[i] = np.int16(3) * np.int16(near_X[i]) + np.int16(far_X[i])
    sum_X[0], sum_X[n + 1] = sum_X[1], sum_X[n]
    before, after = sum_X[:n], sum_X[2 : n + 2]
    for i in range(n):
        three = np.int16(np.int16(3) * sums[i])
        out_X[2 * i] = np.int16(three + before[i] + even) >> np.int16(4)
        out_X[2 * i + 1] = np.int16(three + after[i] + odd) >> np.int16(4)


@njit(cache=True, nogil=True, error_model="numpy")
def decode_box(data, height, width, places, seek_step, scale, top, left, bottom, right):
    """The pixels of a box of an image.

    Args:
        data: uint8 [bytes], a JPEG.
        height, width: of the image, in pixels.
        places, seek_step: a seek index, see :func:`decode_part`; may be empty.
        scale: 1, 2, 4 or 8: decode at 1 / scale of the size.
        top, left, bottom, right: of the box in pixels of that size, inside the image.

    Returns:
        uint8 [bottom - top, right - left, 3], empty where this is no sound JPEG of that size and of a kind decoded here.
    """
    nothing = np.empty((0, 0, 3), dtype=np.uint8)
    head, step_4Q = np.empty(HEAD, dtype=np.int64), np.empty((4, 64), dtype=np.int32)
    look_8L, code_8C = np.empty((8, 1 << LOOK), dtype=np.int32), np.empty((8, CODES), dtype=np.int32)
    if read_head(data, head, step_4Q, look_8L, code_8C) != SHOWN or head[HEIGHT] != height or head[WIDTH] != width:
        return nothing
    side = 8 // scale
    wide, tall = head[WIDE], head[TALL]
    across, down = -(-width // (8 * wide)), -(-height // (8 * tall))
    if len(places) and len(places) != 10 * down * (-(-across // seek_step)):
        return nothing
    enlarge_x, enlarge_y = wide == 2 and (tall == 1 or scale == 1), tall == 2 and scale == 1
    mcu_w, mcu_h = side * wide, side * tall
    # chroma between samples takes its neighbours, too
    more_x, more_y = 2 if enlarge_x else 0, 2 if enlarge_y else 0
    first_y, end_y = max(top - more_y, 0) // mcu_h, min((bottom - 1 + more_y) // mcu_h + 1, down)
    first_x, end_x = max(left - more_x, 0) // mcu_w, min((right - 1 + more_x) // mcu_w + 1, across)
    plane = np.empty((head[PARTS], (end_y - first_y) * mcu_h, (end_x - first_x) * mcu_w), dtype=np.uint8)
    if not decode_part(
        data, head, step_4Q, look_8L, code_8C, places, seek_step, scale, first_y, first_x, end_y, end_x, plane
    ):
        return nothing
    rows, columns, start_y, start_x = bottom - top, right - left, first_y * mcu_h, first_x * mcu_w
    out = np.empty((rows, columns, 3), dtype=np.uint8)
    if head[PARTS] == 1:
        for y in range(rows):
            line, to = plane[0, y + top - start_y, left - start_x : right - start_x], out[y]
            for x in range(columns):
                to[x, 0] = to[x, 1] = to[x, 2] = line[x]
        return out
    # of chroma, what there is of the image in the part that was decoded
    half_x, half_y = 2 if enlarge_x else 1, 2 if enlarge_y else 1
    chroma_w = min(-(-width * side // (8 * half_x)) - start_x // half_x, plane.shape[2] // half_x)
    last_y = min(-(-height * side // (8 * half_y)) - start_y // half_y, plane.shape[1] // half_y) - 1
    smooth = side > 1 and -(-width * side // (8 * half_x)) > 2
    line_2X, sum_X = np.empty((2, 2 * chroma_w), dtype=np.uint8), np.empty(chroma_w + 2, dtype=np.int16)
    row_4X = np.empty((4, 3 * TOGETHER), dtype=np.uint8)  # for a box that is narrower than what is done together
    luma, chroma, line, to = plane.ctypes.data, plane[1].ctypes.data, line_2X.ctypes.data, out.ctypes.data
    pitch, begin = plane.shape[2], left - start_x
    for y in range(rows):
        at = y + top - start_y
        blue, red = chroma + at * pitch + begin, chroma + (plane.shape[1] + at) * pitch + begin
        if enlarge_x:
            near = at // half_y
            far = min(max(near + (1 if at % 2 else -1), 0), last_y) if enlarge_y else near
            for c in range(2):
                if smooth:
                    _enlarged(plane[c + 1, near, :chroma_w], plane[c + 1, far, :chroma_w], enlarge_y, sum_X, line_2X[c])
                else:
                    for x in range(chroma_w):
                        line_2X[c, 2 * x] = line_2X[c, 2 * x + 1] = plane[c + 1, near, x]
            blue, red = line + begin, line + 2 * chroma_w + begin
        if columns >= TOGETHER:
            coloured(luma + at * pitch + begin, blue, red, to + 3 * columns * y, columns)
            continue
        for x in range(columns):
            row_4X[0, x], row_4X[1, x] = load_uint8(luma + at * pitch + begin, x), load_uint8(blue, x)
            row_4X[2, x] = load_uint8(red, x)
        row = row_4X.ctypes.data
        coloured(row, row + 3 * TOGETHER, row + 6 * TOGETHER, row + 9 * TOGETHER, TOGETHER)
        for x in range(columns):
            out[y, x, 0], out[y, x, 1], out[y, x, 2] = row_4X[3, 3 * x], row_4X[3, 3 * x + 1], row_4X[3, 3 * x + 2]
    return out
