"""From a packed image's bytes to its view, in compiled code that holds no Python lock: decode what is shown, cut, resize.

Baseline JPEGs are decoded by ``baseline.py``, only the box, beginning at the box where there is a seek index before the
JPEG; other kinds by libjpeg-turbo, whole. Where the box is at least twice, four or eight times the output, both decode at
1/2, 1/4 or 1/8 (a smaller inverse DCT); otherwise the pixels are those of decoding the whole image and
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

from . import baseline, crop, huffman, seek, vectors
from .baseline import decode_box
from .crop import cut_into
from .seek import END, index_before

DONE, BAD = 0, 1
_NAMES = ("libturbojpeg.so.0", "libturbojpeg.so", "libturbojpeg.dylib")
# numba keeps compiled code until the function's own file changes: what comes from others has to be a part of its key
_MADE_OF = zlib.crc32(b"".join(Path(str(m.__file__)).read_bytes() for m in (baseline, crop, huffman, seek, vectors)))

_open = types.ExternalFunction("tjInitDecompress", types.intp())
_close = types.ExternalFunction("tjDestroy", types.int32(types.intp))
_header = types.ExternalFunction(
    "tjDecompressHeader3", types.int32(types.intp, types.intp, types.uint64, *[types.intp] * 4)
)
_decompress = types.ExternalFunction(
    "tjDecompress2",
    types.int32(types.intp, types.intp, types.uint64, types.intp, *[types.int32] * 5),
)


def _pointer(kind):
    @intrinsic
    def cast(_, address):
        def codegen(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.intp), codegen

    return cast


_as_bytes, _as_int32 = _pointer(types.uint8), _pointer(types.int32)


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
def show(data, before, jpeg, height, width, box_4, flip_x, flip_y, out_SSC, still_RRC, _made_of=_MADE_OF):
    """Writes a view of one image, and the same at another size.

    Args:
        data: uint8 [bytes], a JPEG or pixels.
        before: bytes before these in memory that may be read: a seek index may be there.
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
    first_y, first_x = max(np.int64(box_4[0]), 0), max(np.int64(box_4[1]), 0)
    end_y, end_x = min(np.int64(box_4[0] + box_4[2]), height), min(np.int64(box_4[1] + box_4[3]), width)
    if first_y >= end_y or first_x >= end_x:
        out_SSC[:] = 0
        still_RRC[:] = 0
        return DONE
    first_y, first_x, end_y, end_x = first_y // scale, first_x // scale, -(-end_y // scale), -(-end_x // scale)
    address = data.ctypes.data
    count, step = index_before(address, before, len(data))
    places = carray(_as_bytes(address - END - count), count)
    image = decode_box(data, height, width, places, step, scale, first_y, first_x, end_y, end_x)
    if not image.size:
        first_y, first_x = 0, 0
        image = np.empty((-(-height // scale), -(-width // scale), 3), dtype=np.uint8)
        if not _whole(data, height, width, image):
            return BAD
    top, left, box_h, box_w = top / scale, left / scale, box_h / scale, box_w / scale
    cut_into(image, top, left, box_h, box_w, flip_x, flip_y, out_SSC, first_y, first_x)
    if still_RRC.shape[0]:
        cut_into(image, top, left, box_h, box_w, flip_x, flip_y, still_RRC, first_y, first_x)
    return DONE


@njit(cache=True, nogil=True, error_model="numpy")
def _whole(data, height, width, out_HWC):
    """Decodes a JPEG with libjpeg-turbo, to the size of ``out_HWC``; whether it was sound, and of its size."""
    handle, about, address, size = _open(), np.zeros(4, dtype=np.int32), data.ctypes.data, np.uint64(len(data))
    at = about.ctypes.data
    failed = _header(handle, address, size, at, at + 4, at + 8, at + 12) != 0 or about[0] != width or about[1] != height
    if not failed:
        rows, columns, out = np.int32(out_HWC.shape[0]), np.int32(out_HWC.shape[1]), out_HWC.ctypes.data
        status = _decompress(handle, address, size, out, columns, np.int32(0), rows, np.int32(0), np.int32(0))
        failed = status != 0
    _close(handle)
    return not failed


@lru_cache(1)
def show_at():
    """:func:`show` as a C function of addresses, which other compiled code calls without being compiled together with it.

    (data, its length, bytes before it, jpeg, height, width, row of box and flips as int32 [6], S, out, R, still) -> status.
    """
    made_of = _MADE_OF

    @cfunc(types.int64(*[types.intp] * 11), cache=True)
    def call(data, length, before, jpeg, height, width, row, size, out, still_size, still):
        assert made_of  # as a closure's variable it is a part of the key
        row_6 = carray(_as_int32(row), 6)
        pixels = carray(_as_bytes(out), (size, size, 3))
        other = carray(_as_bytes(still), (still_size, still_size, 3))
        content = carray(_as_bytes(data), length)
        return show(content, before, jpeg != 0, height, width, row_6[:4], row_6[4] != 0, row_6[5] != 0, pixels, other)

    return call.ctypes


@lru_cache(1)
def clip_shower():
    """What writes the same view of several images of one size, the frames of a clip, and of frame ``centre`` at another size.

    (address of the file in memory, places, sizes and whether a JPEG, int64 [T] each; height, width; box and flips, int32 [6];
    out, uint8 [T, S, S, 3]; centre; still, uint8 [R, R, 3], R may be 0) -> -1, or the first frame that cannot be decoded.

    Like the ffcv loader's operation it calls :func:`show` as a C function, so that only this loop is compiled here.
    """
    show = show_at()

    @njit(
        "int64(int64, int64[::1], int64[::1], int64[::1], int64, int64, int32[::1], uint8[:,:,:,::1], int64, uint8[:,:,::1])",
        nogil=True,
    )
    def show_clip(file, ptr_T, size_T, jpeg_T, height, width, row_6, out_TSSC, centre, still_RRC):
        size, out, still = out_TSSC.shape[1], out_TSSC.ctypes.data, still_RRC.ctypes.data
        for t in range(len(ptr_T)):
            side = still_RRC.shape[0] if t == centre else 0
            to = out + t * size * size * 3
            at, length = ptr_T[t], size_T[t]
            if show(file + at, length, at, jpeg_T[t], height, width, row_6.ctypes.data, size, to, side, still) != DONE:
                return t
        return -1

    return show_clip
