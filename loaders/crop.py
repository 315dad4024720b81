"""One view of one image, cut out on the CPU: the arithmetic of ``resample.py``, compiled by numba.

Same bytes as :func:`fasttrain.loaders.resample.cut`, at a fraction of its time: rows are weighted and added first, eight
pixels' bytes at a time, then columns, three channels at a time. Every loader that cuts on the CPU cuts here.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .views import View

_ONE = 1024  # a weight of 1, as an integer; see resample.py
_TOGETHER = 4  # rows whose columns are added at once: their weights are loaded once


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


@intrinsic
def _columns(_, rows, pitch, first, weight, taps, out, out_pitch, size):
    """Weights and adds the columns of :data:`_TOGETHER` rows, 4 floats (3 channels and one that is dropped) at a time.

    Addresses of: rows float32 [rows, pitch], first int64 [S], weight float32 [S, taps] (taps even), out uint8
    [rows, out_pitch]; a byte behind the last pixel of each row is written, too.
    """

    def codegen(context, build, _signature, arguments):
        rows, pitch, first, weight, taps, out, out_pitch, size = arguments
        f32, i8, i32, i64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
        vector, bytes4, int4 = ir.VectorType(f32, 4), ir.VectorType(i8, 4), ir.VectorType(i32, 4)
        undefined = ir.Constant(vector, ir.Undefined)

        def number(value):
            return ir.Constant(i64, value)

        def pointer(address, step, kind):
            return build.inttoptr(build.add(address, step), kind.as_pointer())

        def spread(scalar):
            one = build.insert_element(undefined, scalar, ir.Constant(i32, 0))
            return build.shuffle_vector(one, undefined, ir.Constant(int4, [0] * 4))

        row_R = [pointer(rows, build.mul(pitch, number(4 * r)), f32) for r in range(_TOGETHER)]
        out_R = [pointer(out, build.mul(out_pitch, number(r)), i8) for r in range(_TOGETHER)]
        weight, first = pointer(weight, number(0), f32), pointer(first, number(0), i64)
        with cgutils.for_range(build, size) as column:
            x = column.index
            at, table = build.mul(build.load(build.gep(first, [x])), number(3)), build.mul(x, taps)
            held_R = [cgutils.alloca_once_value(build, ir.Constant(vector, [0.0] * 4)) for _ in range(_TOGETHER)]
            for held in held_R:
                build.store(ir.Constant(vector, [0.0] * 4), held)
            with cgutils.for_range(build, build.udiv(taps, number(2))) as pair:
                total_R = [build.load(held) for held in held_R]
                for step in range(2):
                    k = build.add(build.mul(pair.index, number(2)), number(step))
                    w = spread(build.load(build.gep(weight, [build.add(table, k)])))
                    place = build.add(at, build.mul(k, number(3)))
                    for r in range(_TOGETHER):
                        pixel = build.load(build.bitcast(build.gep(row_R[r], [place]), vector.as_pointer()), align=4)
                        product = build.fmul(pixel, w, flags=("contract",))
                        total_R[r] = build.fadd(product, total_R[r], flags=("contract",))
                for held, total in zip(held_R, total_R, strict=True):
                    build.store(total, held)
            for held, to in zip(held_R, out_R, strict=True):
                scaled = build.fmul(build.load(held), ir.Constant(vector, [1.0 / _ONE] * 4))
                whole = build.fptosi(build.fadd(scaled, ir.Constant(vector, [0.5] * 4)), int4)
                place = build.bitcast(build.gep(to, [build.mul(x, number(3))]), bytes4.as_pointer())
                build.store(build.trunc(whole, bytes4), place, align=1)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8), codegen


@njit(cache=True, nogil=True, error_model="numpy")
def _row(source, first, count, weight_T, low, high, total):
    """Weights and adds rows of bytes: float32 [high - low], whole numbers."""
    n, half, unit = high - low, np.float32(0.5), np.float32(1.0 / _ONE)
    if count <= 2:
        a, b = source[first][low:high], source[first + count - 1][low:high]
        v, w = np.float32(weight_T[0]), np.float32(weight_T[1] if count == 2 else 0)
        for j in range(n):
            total[j] = np.float32(np.int32((np.float32(a[j]) * v + np.float32(b[j]) * w) * unit + half))
        return
    a, b, c = source[first][low:high], source[first + 1][low:high], source[first + 2][low:high]
    u, v, w = np.float32(weight_T[0]), np.float32(weight_T[1]), np.float32(weight_T[2])
    if count == 3:
        for j in range(n):
            whole = np.float32(a[j]) * u + np.float32(b[j]) * v + np.float32(c[j]) * w
            total[j] = np.float32(np.int32(whole * unit + half))
        return
    for j in range(n):
        total[j] = np.float32(a[j]) * u + np.float32(b[j]) * v + np.float32(c[j]) * w
    for k in range(3, count):
        w, a = np.float32(weight_T[k]), source[first + k][low:high]
        for j in range(n):
            total[j] += np.float32(a[j]) * w
    for j in range(n):
        total[j] = np.float32(np.int32(total[j] * unit + half))


@njit(cache=True, nogil=True, error_model="numpy")
def cut_into(image_HWC, top, left, height, width, flip_x, flip_y, out_SSC, first_y=0, first_x=0):
    """Cuts a box out of an image and brings it to the output's size; see :func:`cut_one`.

    ``top``, ``left``, ``height``, ``width`` may be fractions of a pixel; ``first_y``, ``first_x`` are where ``image_HWC``
    lies, if it is a part of the image that has all of the box.
    """
    size = out_SSC.shape[0]
    rows, columns = image_HWC.shape[0], image_HWC.shape[1]
    taps_y = np.int64(np.ceil(2 * max(height / size, 1.0))) + 2
    taps_x = np.int64(np.ceil(2 * max(width / size, 1.0))) + 2
    y_S, x_S = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    rows_S, columns_S = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    weight_y, wide_x = np.empty((size, taps_y)), np.empty((size, taps_x))
    weights(float(top), float(height), first_y, first_y + rows, size, flip_y, y_S, rows_S, weight_y)
    most = weights(float(left), float(width), first_x, first_x + columns, size, flip_x, x_S, columns_S, wide_x)
    most += most % 2
    weight_x = np.zeros((size, most), dtype=np.float32)
    low, high = columns, 0
    for s in range(size):
        if columns_S[s]:
            low, high = min(low, x_S[s]), max(high, x_S[s] + columns_S[s])
        for k in range(columns_S[s]):
            weight_x[s, k] = wide_x[s, k]
    if low >= high:  # wholly outside
        out_SSC[:] = 0
        return
    for s in range(size):
        x_S[s] = min(max(x_S[s] - low, 0), high - low)
    count, line = (high - low) * 3, size * 3
    pitch, out_pitch = count + 3 * most + 4, line + 4
    block = np.zeros((_TOGETHER, pitch), dtype=np.float32)
    lines = np.empty((_TOGETHER, out_pitch), dtype=np.uint8)
    source, out = image_HWC.reshape(rows, columns * 3), out_SSC.reshape(size, line)
    for s in range(0, size, _TOGETHER):
        for r in range(min(_TOGETHER, size - s)):
            if rows_S[s + r]:
                _row(source, y_S[s + r], rows_S[s + r], weight_y[s + r], low * 3, high * 3, block[r][:count])
            else:
                block[r][:count] = 0
        _columns(
            block.ctypes.data, pitch, x_S.ctypes.data, weight_x.ctypes.data, most, lines.ctypes.data, out_pitch, size
        )
        for r in range(min(_TOGETHER, size - s)):
            out[s + r] = lines[r][:line]
