"""One view of one image, cut out on the CPU: the arithmetic of ``resample.py``, compiled by numba.

Same bytes as :func:`fasttrain.loaders.resample.cut`, at a fraction of its time: rows are weighted and added first, then
columns, both in integers. Every loader that cuts on the CPU cuts here.
"""

import numpy as np
from numba import njit

from .vectors import QUAD, ROW, mixed_columns, mixed_rows
from .views import View

_ONE = 1024  # a weight of 1, as an integer; see resample.py


def cut_one(image_HWC: np.ndarray, view: View, b: int, out_SSC: np.ndarray) -> None:
    """Cuts view ``b`` of a batch of views out of an image.

    Args:
        image_HWC: uint8, contiguous, 3 channels.
        view: boxes and flips; what lies outside the image is black.
        b: which of them.
        out_SSC: uint8 [S, S, 3], contiguous, to be written.
    """
    top, left, height, width = view.box_B4[b]
    image_HWC = np.ascontiguousarray(image_HWC)
    cut_into(image_HWC, top, left, height, width, view.flip_B2[b, 0], view.flip_B2[b, 1], out_SSC)


def centre_square(image_HWC: np.ndarray, side: int) -> np.ndarray:
    """The centre square of one image, resized to ``side`` pixels: uint8 [side, side, 3].

    Not by :func:`fasttrain.loaders.resample.cut`: loaders' processes call this, and MKL's matrix product, called in a
    process that was forked from one with threads, may never return.
    """
    height, width = image_HWC.shape[:2]
    short, out_SSC = min(height, width), np.empty((side, side, 3), dtype=np.uint8)
    top, left = (height - short) // 2, (width - short) // 2
    cut_into(np.ascontiguousarray(image_HWC), top, left, short, short, False, False, out_SSC)
    return out_SSC


@njit(cache=True, nogil=True, error_model="numpy")
def weights(start, length, begin_there, end_there, size, flip, first_S, count_S, weight_ST):
    """Triangle-filter weights in 1/1024, as ``resample._weights`` has them.

    Output pixel s takes ``count_S[s]`` input pixels from ``first_S[s]`` on, counted from ``begin_there``: pixels before
    that and from ``end_there`` on are black. ``start`` and ``length`` may be fractions of a pixel (of an image that was
    decoded at a fraction of its size).

    Returns:
        The largest count.
    """
    scale = length / size
    support = max(scale, 1.0)
    end = start + length
    low, high = np.int64(np.floor(start)), np.int64(np.ceil(end))
    most = 0
    for s in range(size):
        centre = start + (s + 0.5) * scale
        a = np.int64(np.floor(centre - support))
        b = min(a + np.int64(np.ceil(2 * support)) + 2, high)
        a = max(a, low)
        total, n, begin = 0.0, 0, a
        to = size - 1 - s if flip else s
        for p in range(a, b):
            left, right = max(float(p), start), min(p + 1.0, end)  # of the pixel, what lies in the box
            w = (1 - abs((left + right) / 2 - centre) / support) * (right - left)
            if w <= 0:
                if n:
                    break
                begin = p + 1
                continue
            weight_ST[to, n] = w
            total += w
            n += 1
        factor, rest, best = _ONE / total, float(_ONE), 0
        for k in range(n):
            whole = np.rint(weight_ST[to, k] * factor)
            weight_ST[to, k] = whole
            rest -= whole
            if whole > weight_ST[to, best]:
                best = k
        weight_ST[to, best] += rest
        outside = min(max(begin_there - begin, 0), n)  # black: left out
        n = min(n, max(end_there - begin, 0)) - outside
        if n <= 0:
            n, begin, outside = 0, begin_there, 0
        for k in range(n):
            weight_ST[to, k] = weight_ST[to, k + outside]
        first_S[to], count_S[to] = begin + outside - begin_there, n
        most = max(most, n)
    return most


@njit(cache=True, nogil=True, error_model="numpy")
def cut_into(image_HWC, top, left, height, width, flip_x, flip_y, out_SSC, first_y=0, first_x=0):
    """Cuts a box out of an image and brings it to the output's size; see :func:`cut_one`.

    ``top``, ``left``, ``height``, ``width`` may be fractions of a pixel; ``first_y``, ``first_x`` are where ``image_HWC``
    lies, if it is a part of the image that has all of the box.
    """
    size = out_SSC.shape[0]
    rows, columns = image_HWC.shape[0], image_HWC.shape[1]
    quads = -(-size // QUAD)
    y_S, rows_S, weight_y, _ = _table(float(top), float(height), first_y, first_y + rows, size, flip_y, size)
    x_S, columns_S, weight_x, most = _table(
        float(left), float(width), first_x, first_x + columns, size, flip_x, QUAD * quads
    )
    low, high = columns, 0
    for s in range(size):
        if columns_S[s]:
            low, high = min(low, x_S[s]), max(high, x_S[s] + columns_S[s])
    if low >= high:  # wholly outside
        out_SSC[:] = 0
        return
    for s in range(size):
        x_S[s] = min(max(x_S[s] - low, 0), high - low)
    count, line, taps_y = (high - low) * 3, size * 3, weight_y.shape[1]
    pitch, out_pitch = count + 3 * most + 16, QUAD * 3 * quads + 4  # behind a row's end more is read and written
    block, lines = np.zeros((2, pitch), dtype=np.uint8), np.empty((2, out_pitch), dtype=np.uint8)
    source, out = image_HWC.reshape(rows, columns * 3), out_SSC.reshape(size, line)
    # addresses are taken where they are used: numba frees an array after its own last use, whoever still has its address
    for s in range(0, size, 2):
        for r in range(min(2, size - s)):
            n, first = rows_S[s + r], y_S[s + r]
            if n == 0:
                block[r, :count] = 0
            elif count >= ROW:
                start, by = (
                    source.ctypes.data + 3 * (first * columns + low),
                    weight_y.ctypes.data + 2 * taps_y * (s + r),
                )
                mixed_rows(start, columns * 3, n, by, block.ctypes.data + r * pitch, count)
            else:
                for j in range(count):
                    total = _ONE // 2
                    for k in range(n):
                        total += np.int64(weight_y[s + r, k]) * np.int64(source[first + k, 3 * low + j])
                    block[r, j] = total // _ONE
        mixed_columns(
            block.ctypes.data, pitch, x_S.ctypes.data, weight_x.ctypes.data, most // 2, lines.ctypes.data, out_pitch, quads
        )  # fmt: skip
        for r in range(min(2, size - s)):
            out[s + r] = lines[r, :line]


@njit(cache=True, nogil=True, error_model="numpy")
def cut_clip(frame_THWC, box_4, flip_x, flip_y, out_TSSC, centre, still_RRC):
    """Cuts the same box out of every frame of a clip; and out of frame ``centre`` at another size, R may be 0."""
    top, left, height, width = box_4
    for t in range(len(frame_THWC)):
        cut_into(frame_THWC[t], top, left, height, width, flip_x, flip_y, out_TSSC[t])
    if still_RRC.shape[0]:
        cut_into(frame_THWC[centre], top, left, height, width, flip_x, flip_y, still_RRC)


@njit(cache=True, nogil=True, error_model="numpy")
def _table(start, length, begin_there, end_there, size, flip, room):
    """:func:`weights` as int16 [room, taps], taps being even, with zeros where there is none: (first, count, weights, most)."""
    scale = length / size
    wide_ST = np.empty((size, np.int64(np.ceil(2 * max(scale, 1.0))) + 2))
    first_S, count_S = np.zeros(room, dtype=np.int64), np.zeros(room, dtype=np.int64)
    most = weights(start, length, begin_there, end_there, size, flip, first_S, count_S, wide_ST)
    most += most % 2
    weight_ST = np.zeros((room, most), dtype=np.int16)
    for s in range(size):
        for k in range(count_S[s]):
            weight_ST[s, k] = wide_ST[s, k]
    return first_S, count_S, weight_ST, most
