"""JPEGs of every kind for the tests: from Pillow, from TurboJPEG (which makes kinds that Pillow does not), and by hand."""

import ctypes
import functools
import io
import struct

import numpy as np
from fasttrain.loaders.jpeg import DHT, read_header
from fasttrain.loaders.show import load_libjpeg
from PIL import Image
from sklearn.datasets import load_sample_images

SUBSAMPLING = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2, "grey": 3, "4:4:0": 4, "4:1:1": 5}  # TurboJPEG's numbers


@functools.cache
def photographs() -> list[Image.Image]:
    return [Image.fromarray(image) for image in load_sample_images().images]


def photo(width: int, height: int, *, which: int = 0) -> Image.Image:
    """A part of a photograph, shrunk by 2: real edges, real chroma."""
    whole = photographs()[which]
    box = (40, 10, 40 + min(2 * width, 600), 10 + min(2 * height, 417))
    return whole.resize((width, height), box=box)


def noise(width: int, height: int) -> Image.Image:
    """Large coefficients everywhere: long codes, and 0xFF in the data."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def squares(width: int, height: int) -> Image.Image:
    """The largest differences from block to block, and blocks of one colour."""
    y, x = np.mgrid[:height, :width] // 8
    return Image.fromarray(np.stack([(x + y) % 2, x // 2 % 2, y // 2 % 2], axis=2).astype(np.uint8) * 255)


def jpeg(image: Image.Image, **how) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **how)
    return out.getvalue()


def pillow(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def by_hand(bits: str, *, width: int = 8, height: int = 8, ac: bytes = b"", dc: bytes = b"") -> bytes:
    """A grey JPEG with the given entropy-coded data, and perhaps tables of its own."""
    content = jpeg(Image.new("L", (width, height), 128), quality=50)
    parts = [b"\xff\xd8"]
    for marker, start, end in read_header(content).segments:
        if marker == DHT and (ac if content[start + 4] >> 4 else dc):
            parts.append(segment(DHT, content[start + 4 : start + 5] + (ac if content[start + 4] >> 4 else dc)))
        elif marker != DHT or content[start + 4] & 15 == 0:
            parts.append(content[start:end])
    bits += "1" * (-len(bits) % 8)
    data = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    return b"".join(parts) + data.replace(b"\xff", b"\xff\0") + b"\xff\xd9"


def without(content: bytes, *markers: int) -> bytes:
    """Without the segments of these kinds."""
    head = read_header(content)
    parts = [content[start:end] for marker, start, end in head.segments if marker not in markers]
    return b"".join([content[:2], *parts, content[head.data :]])


# TurboJPEG, which is here where ffcv is: need("ffcv") first


@functools.cache
def turbo() -> ctypes.CDLL:
    library = ctypes.CDLL(load_libjpeg())
    library.tjInitCompress.restype = library.tjInitDecompress.restype = ctypes.c_void_p
    return library


def turbo_jpeg(image: np.ndarray, subsampling: str, *, quality: int = 90) -> bytes:
    pointer, size = ctypes.c_void_p(), ctypes.c_ulong()
    handle, image = ctypes.c_void_p(turbo().tjInitCompress()), np.ascontiguousarray(image)
    height, width, _ = image.shape
    into = (ctypes.byref(pointer), ctypes.byref(size), SUBSAMPLING[subsampling], quality, 0)
    assert not turbo().tjCompress2(handle, image.ctypes.data_as(ctypes.c_void_p), width, 0, height, 0, *into)
    content = ctypes.string_at(pointer, size.value)
    turbo().tjFree(pointer)
    turbo().tjDestroy(handle)
    return content


def turbo_pixels(content: bytes, scale: int) -> np.ndarray:
    """Decoded at 1 / scale of the size, by a smaller inverse DCT."""
    head = read_header(content)
    assert only_scale(head.height, head.width, scale)
    height, width = -(-head.height // scale), -(-head.width // scale)
    out = np.full((height, width, 3), 77, dtype=np.uint8)
    handle, pointer = ctypes.c_void_p(turbo().tjInitDecompress()), out.ctypes.data_as(ctypes.c_void_p)
    assert not turbo().tjDecompress2(handle, content, ctypes.c_ulong(len(content)), pointer, width, 0, height, 0, 0)
    turbo().tjDestroy(handle)
    return out


def only_scale(height: int, width: int, scale: int) -> bool:
    """TurboJPEG takes the largest number of eighths at which the picture is not too large: is that the one that is meant?"""
    eighths = 8 // scale + 1
    return scale == 1 or any(-(-side * eighths // 8) > -(-side // scale) for side in (height, width))
