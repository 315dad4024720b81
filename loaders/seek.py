"""Where a JPEG's codes may be entered: an index that lets a decoder begin at a crop instead of at the image's start.

The entropy-coded data of a baseline JPEG is one stream of codes without a mark (ITU-T T.81, annex F): to see the lower
right one must read all before. :func:`seek_index` notes, for every few MCUs (minimum coded units: blocks of 8 or 16
pixels), the bit where they start and the DC coefficients that their differences refer to. The JPEG itself stays as it is.
``fasttrain pack`` puts the index right before each JPEG of a ``.beton``, where no other reader looks.
"""

import struct

import numpy as np
from numba import njit

from .huffman import CODES, DAMAGED, HEAD, HEIGHT, LOOK, OTHER, SHOWN, SOUND, TALL, WIDE, WIDTH, read_head, walk
from .vectors import load_uint8

STEP = 32  # pixels from one place to the next
TAG = b"ft-seek1"
_END = struct.Struct(">III8s")  # behind the places: how many bytes they are, MCUs from one to the next, the JPEG's size
_TAG_8 = np.frombuffer(TAG, dtype=np.uint8)
END = _END.size


def seek_index(jpeg: bytes) -> bytes:
    """The index of a JPEG, to be kept right before it.

    Empty for other kinds than :mod:`fasttrain.loaders.baseline` decodes, and for damaged data.
    """
    data = np.frombuffer(jpeg, dtype=np.uint8)
    kind, head, looks, codes = _head(data)
    if kind != SHOWN:
        return b""
    step = max(STEP // (8 * int(head[WIDE])), 1)
    rows, across = -(-int(head[HEIGHT]) // (8 * int(head[TALL]))), -(-int(head[WIDTH]) // (8 * int(head[WIDE])))
    places = np.zeros(10 * rows * -(-across // step), dtype=np.uint8)
    if walk(data, head, looks, codes, step, places) != SOUND:
        return b""
    return places.tobytes() + _END.pack(len(places), step, len(jpeg), TAG)


def damage(jpeg: bytes) -> str:
    """What is wrong with a JPEG's entropy-coded data; empty where nothing is, or where it is of a kind not looked into."""
    data = np.frombuffer(jpeg, dtype=np.uint8)
    kind, head, looks, codes = _head(data)
    if kind == OTHER:
        return ""
    status = walk(data, head, looks, codes, 1, np.zeros(0, dtype=np.uint8))
    if status == SOUND:
        return ""
    return "its entropy-coded data is damaged" if status == DAMAGED else "its data ends before the image does"


def _head(data: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    head, looks = np.zeros(HEAD, dtype=np.int64), np.zeros((8, 1 << LOOK), dtype=np.int32)
    codes, steps = np.zeros((8, CODES), dtype=np.int32), np.zeros((4, 64), dtype=np.int32)
    return read_head(data, head, steps, looks, codes), head, looks, codes


@njit(cache=True, nogil=True, error_model="numpy")
def index_before(jpeg, before, size):
    """The index that lies before a JPEG in memory.

    Args:
        jpeg: its address.
        before: bytes before it that may be read.
        size: of the JPEG, in bytes.

    Returns:
        (bytes of places, which end 20 bytes before the JPEG; MCUs from one place to the next); (0, 1) where there is none.
    """
    if before < END:
        return 0, 1
    for k in range(8):
        if load_uint8(jpeg, k - 8) != _TAG_8[k]:
            return 0, 1
    count, step, of = _number(jpeg - END), _number(jpeg - END + 4), _number(jpeg - END + 8)
    if count + END > before or count % 10 or not 0 < step < 1 << 16 or of != size:
        return 0, 1
    return count, step


@njit(cache=True, nogil=True, error_model="numpy")
def _number(at):
    return load_uint8(at, 0) << 24 | load_uint8(at, 1) << 16 | load_uint8(at, 2) << 8 | load_uint8(at, 3)
