"""Decodes a part of a baseline JPEG: only the blocks that are shown are made into pixels, to the same bytes as libjpeg's.

Most JPEGs are of the baseline kind (ITU-T T.81: sequential DCT, Huffman codes, 8 bits), and a training view shows a part
of them. Of the rest only the codes are read (``huffman.py``), and with a seek index (``seek.py``) not even most of these.
Whatever is of another kind, or damaged, is left to libjpeg. (Coefficients beyond what an encoder can make, which only
damaged data have, may look different: libjpeg's vectors overflow at 16 bits.)
"""

import numpy as np
from numba import njit

from .huffman import (
    AC,
    CODES,
    DC,
    END_OF_BLOCK,
    HEAD,
    HEIGHT,
    LOOK,
    NATURAL,
    PARTS,
    QUANT,
    RESTART,
    SCAN,
    SHOWN,
    TALL,
    WIDE,
    WIDTH,
    behind_marker,
    fill,
    read_block,
    read_head,
    two,
)  # fmt: skip
from .vectors import TOGETHER, coloured, inverse_2, inverse_4, inverse_8, load_uint8, store_int16


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
    block, natural, looks, codes = block_64.ctypes.data, NATURAL.ctypes.data, look_8L.ctypes.data, code_8C.ctypes.data
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
            bit = two(places, place) << 16 | two(places, place + 2)
            for c in range(3):
                was_C[c] = np.int16(two(places, place + 4 + 2 * c))
            at = start + (bit >> 3)
            if at >= end:
                return False
            at, word, have, filled = fill(at, end, np.uint64(0), np.int64(0), np.int64(0))
            word, have = word << np.uint64(bit & 7), have - (bit & 7)
        for column in range(begin, stop):
            number = row * across + column
            if head[RESTART] and number and number % head[RESTART] == 0 and not (seeks and column == begin):
                if have < filled:
                    return False
                at, word, have, filled = behind_marker(at, end), np.uint64(0), np.int64(0), np.int64(0)
                was_C[:] = 0
            for b in range(luma + parts - 1):
                c = max(b - luma + 1, 0)
                dc, ac, table = head[DC + c], head[AC + c], head[QUANT + c]
                at, word, have, filled, difference, last = read_block(
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
                if last == END_OF_BLOCK or side == 1:  # as the transforms round it
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
        if seeks and have < filled:  # the row ran into a marker, or into the end
            return False
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
    if len(data) < 4 or two(data, len(data) - 2) != 0xFFD9:  # cut off, as likely as not
        return nothing
    if read_head(data, head, step_4Q, look_8L, code_8C) != SHOWN or head[HEIGHT] != height or head[WIDTH] != width:
        return nothing
    side = 8 // scale
    wide, tall = head[WIDE], head[TALL]
    across, down = -(-width // (8 * wide)), -(-height // (8 * tall))
    if 2 * across * down * (wide * tall + head[PARTS] - 1) > 8 * (len(data) - head[SCAN]):  # two codes a block, or more
        return nothing
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
    luma, line, to = plane.ctypes.data, line_2X.ctypes.data, out.ctypes.data
    chroma = luma + plane.shape[1] * plane.shape[2]
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
