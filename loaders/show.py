"""From a packed image's bytes to its view, in compiled code that holds no Python lock: decode what is shown, cut, resize.

Only the rows of the box are decoded: all rows from the box's first on where the JPEG is seekable (``seekable.py``), those
down to the box's last otherwise. Where the box is at least twice, four or eight times the output, libjpeg-turbo decodes
at 1/2, 1/4 or 1/8 (a smaller inverse DCT); otherwise the pixels are those of decoding the whole image and
:func:`fasttrain.loaders.resample.cut`, byte for byte.
"""

import ctypes
import ctypes.util
import zlib
from functools import lru_cache
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from . import crop, seekable
from .crop import cut_into
from .seekable import TAG

DONE, BAD = 0, 1
_NAMES = ("libturbojpeg.so.0", "libturbojpeg.so", "libturbojpeg.dylib")
_WARNING = 0  # tjGetErrorCode: the picture is whole, but something in the file was odd
_TAG = np.frombuffer(TAG, dtype=np.uint8)
# numba keeps compiled code until the function's own file changes: what comes from others has to be a part of its key
_MADE_OF = zlib.crc32(b"".join(Path(str(m.__file__)).read_bytes() for m in (crop, seekable)))
_EXTRANEOUS = np.frombuffer(b" extraneous bytes", dtype=np.uint8)

_open = types.ExternalFunction("tjInitDecompress", types.intp())
_close = types.ExternalFunction("tjDestroy", types.int32(types.intp))
_decompress = types.ExternalFunction(
    "tjDecompress2",
    types.int32(types.intp, types.intp, types.uint64, types.intp, *[types.int32] * 5),
)
_error_code = types.ExternalFunction("tjGetErrorCode", types.int32(types.intp))
_error_text = types.ExternalFunction("tjGetErrorStr2", types.intp(types.intp))
_copy_text = types.ExternalFunction("strncpy", types.intp(types.intp, types.intp, types.uint64))


def load_libjpeg() -> str:
    """Loads libjpeg-turbo for :func:`show`; returns its name.

    Raises:
        ValueError: it is not here.
    """
    for name in (*_NAMES, ctypes.util.find_library("turbojpeg")):
        try:
            ctypes.CDLL(name or "")
            llvm.load_library_permanently(name)
            return str(name)
        except (OSError, RuntimeError, TypeError):
            continue
    raise ValueError("data.loader: ffcv needs the library libturbojpeg (apt-get install libturbojpeg0)")


@njit(cache=True, nogil=True, error_model="numpy")
def show(data, jpeg, height, width, box_4, flip_x, flip_y, out_SSC, still_RRC, _made_of=_MADE_OF):
    """Writes a view of one image, and the same at another size.

    Args:
        data: uint8 [bytes], a JPEG or pixels.
        jpeg: which of these.
        height, width: of the image, in pixels.
        box_4: (top, left, height, width) in its pixels; what lies outside is black.
        flip_x, flip_y: mirror left-right, top-bottom.
        out_SSC: uint8 [S, S, 3], written.
        still_RRC: uint8 [R, R, 3], written; R may be 0.

    Returns:
        :data:`DONE`, or :data:`BAD` where the image cannot be decoded.
    """
    top, left, box_h, box_w = float(box_4[0]), float(box_4[1]), float(box_4[2]), float(box_4[3])
    if not jpeg:
        image = data[: height * width * 3].reshape(height, width, 3)
        cut_into(image, top, left, box_h, box_w, flip_x, flip_y, out_SSC)
        if still_RRC.shape[0]:
            cut_into(image, top, left, box_h, box_w, flip_x, flip_y, still_RRC)
        return DONE
    size = max(out_SSC.shape[0], still_RRC.shape[0])
    scale = 1
    while scale < 8 and min(box_h, box_w) >= 2 * scale * size:
        scale *= 2
    # chroma is interpolated from its neighbours: rows next to the box are decoded, too
    first, last = np.int64(top) - 2 * scale, np.int64(top + box_h) + 2 * scale
    buffer, length, start, rows = _only_rows(data, height, width, first, last)
    if length <= 0:
        return BAD
    rows_out, columns_out = (rows + scale - 1) // scale, (width + scale - 1) // scale
    pixels = np.empty(rows_out * columns_out * 3, dtype=np.uint8)
    handle = _open()
    failed = _decompress(
        handle, buffer.ctypes.data, np.uint64(length), pixels.ctypes.data,
        np.int32(columns_out), np.int32(0), np.int32(rows_out), np.int32(0), np.int32(0),
    )  # fmt: skip
    if failed != 0:
        follows = rows < height and length == len(data)  # of the image more is there than is wanted
        failed = not (follows and _error_code(handle) == _WARNING and _says_extraneous(_error_text(handle)))
    _close(handle)
    if failed:
        return BAD
    image = pixels.reshape(rows_out, columns_out, 3)
    top, left, box_h, box_w = (top - start) / scale, left / scale, box_h / scale, box_w / scale
    cut_into(image, top, left, box_h, box_w, flip_x, flip_y, out_SSC)
    if still_RRC.shape[0]:
        cut_into(image, top, left, box_h, box_w, flip_x, flip_y, still_RRC)
    return DONE


@lru_cache(1)
def show_at():
    """:func:`show` as a C function of addresses, which other compiled code calls without being compiled together with it.

    (data, its length, jpeg, height, width, row of box and flips as int32 [6], S, out, R, still) -> status.
    """
    made_of = _MADE_OF

    @cfunc(types.int64(*[types.intp] * 10), cache=True)
    def call(data, length, jpeg, height, width, row, size, out, still_size, still):
        assert made_of  # as a closure's variable it is a part of the key
        row_6 = carray(_as_int32(row), 6)
        pixels = carray(_as_bytes(out), (size, size, 3))
        other = carray(_as_bytes(still), (still_size, still_size, 3))
        content = carray(_as_bytes(data), length)
        return show(content, jpeg != 0, height, width, row_6[:4], row_6[4] != 0, row_6[5] != 0, pixels, other)

    return call.ctypes


def _pointer(kind):
    @intrinsic
    def cast(_, address):
        def codegen(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.intp), codegen

    return cast


_as_bytes, _as_int32 = _pointer(types.uint8), _pointer(types.int32)


@njit(cache=True, nogil=True, error_model="numpy")
def _says_extraneous(address):
    """Whether the first warning was that data follows: what is left of the image below the rows that were wanted."""
    text = np.zeros(200, dtype=np.uint8)
    _copy_text(text.ctypes.data, address, np.uint64(199))
    for at in range(200 - len(_EXTRANEOUS)):
        same = True
        for k in range(len(_EXTRANEOUS)):
            if text[at + k] != _EXTRANEOUS[k]:
                same = False
                break
        if same:
            return True
    return False


@njit(cache=True, nogil=True, error_model="numpy")
def _only_rows(data, height, width, first, last):
    """A JPEG of rows ``first`` to ``last`` at least: (buffer, its length, the row it starts with, its rows).

    The length is 0 where the file is no JPEG of that size.
    """
    end = len(data)
    at, frame, table, sos, mcu_h, sequential = 2, 0, 0, 0, 8, False
    nothing = np.empty(1, dtype=np.uint8)
    while at + 4 <= end:
        if data[at] != 0xFF:
            return nothing, 0, 0, 0
        if data[at + 1] == 0xFF:
            at += 1
            continue
        marker, following = data[at + 1], at + 2 + (np.int64(data[at + 2]) << 8 | data[at + 3])
        if following > end:
            return nothing, 0, 0, 0
        if 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            frame, sequential = at, marker <= 0xC1
            if at + 10 > following or at + 10 + 3 * data[at + 9] > following:
                return nothing, 0, 0, 0
            if data[at + 9] > 1:
                for c in range(data[at + 9]):
                    mcu_h = max(mcu_h, 8 * np.int64(data[at + 11 + 3 * c] & 15))
        elif marker == 0xEF and following - at > len(_TAG) + 8:
            table = at + 4 + len(_TAG)
            for k in range(len(_TAG)):
                if data[at + 4 + k] != _TAG[k]:
                    table = 0
                    break
        elif marker == 0xDA:
            sos = following
            break
        at = following
    if not frame or not sos:
        return nothing, 0, 0, 0
    if (np.int64(data[frame + 5]) << 8 | data[frame + 6]) != height:
        return nothing, 0, 0, 0
    if (np.int64(data[frame + 7]) << 8 | data[frame + 8]) != width:
        return nothing, 0, 0, 0
    down = (height + mcu_h - 1) // mcu_h
    if table and (table + 4 + 4 * (down + 1) > sos or (np.int64(data[table + 3]) << 8 | data[table + 2]) != down):
        table = 0  # of another picture: of what this one was cut out of, say
    high = min(max((last + mcu_h - 1) // mcu_h, 1), down)
    buffer = np.empty(end + 2, dtype=np.uint8)
    if not sequential:
        buffer[:end] = data
        return buffer, end, 0, height
    low = min(max(first // mcu_h, 0), high - 1) if table else 0
    rows = min(high * mcu_h, height) - low * mcu_h
    if not table:
        buffer[:end] = data
        length = end
    else:
        buffer[:sos] = data[:sos]
        start, stop = _word(data, table + 4 + 4 * low), _word(data, table + 4 + 4 * high)
        stop -= 2 if high < down else 0  # the next row's marker
        if not 0 <= start <= stop <= end - sos:
            return nothing, 0, 0, 0
        buffer[sos : sos + stop - start] = data[sos + start : sos + stop]
        for row in range(low, high + 1):
            place = sos + _word(data, table + 4 + 4 * row)
            if not sos + start <= place <= end:
                return nothing, 0, 0, 0
            if 0 < row < down and (data[place - 2] != 0xFF or data[place - 1] != 0xD0 + (row - 1) % 8):
                return nothing, 0, 0, 0
            if low < row < high:  # markers count from 0 at the first row that is there
                buffer[place - start - 1] = 0xD0 + (row - low - 1) % 8
        length = sos + stop - start
        buffer[length], buffer[length + 1] = 0xFF, 0xD9
        length += 2
    buffer[frame + 5], buffer[frame + 6] = rows >> 8, rows & 255
    return buffer, length, low * mcu_h, rows


@njit(cache=True, nogil=True, inline="always")
def _word(data, at):
    return (
        np.int64(data[at]) | np.int64(data[at + 1]) << 8 | np.int64(data[at + 2]) << 16 | np.int64(data[at + 3]) << 24
    )
