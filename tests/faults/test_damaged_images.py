"""Damaged images: JPEGs of several kinds, PNG and others, through the decoder of files and the compiled one of boxes."""

import io
import struct
import zlib

import numpy as np
import pytest
from fasttrain.loaders.baseline import decode_box
from fasttrain.loaders.decode import decode, image_size
from fasttrain.loaders.jpeg import read_header
from fasttrain.loaders.seek import damage, seek_index
from PIL import Image

from .damaged import damaged, faults, told, watch

_RNG = np.random.default_rng(0)
_PIXELS_HWC = (_RNG.integers(0, 60, (48, 72, 3)) + np.arange(72)[:, None] * 2).astype(np.uint8)
_KINDS = {
    "baseline": ("JPEG", {"quality": 90}),
    "grey": ("JPEG", {"quality": 60}),
    "restart": ("JPEG", {"quality": 80, "restart_marker_blocks": 3}),
    "progressive": ("JPEG", {"quality": 90, "progressive": True}),
    "cmyk": ("JPEG", {"quality": 80}),
    "turned": ("JPEG", {"quality": 80}),
    "png": ("PNG", {}),
    "palette": ("PNG", {}),
    "png16": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "ppm": ("PPM", {}),
}


def encoded(kind: str, pixels_HWC: np.ndarray = _PIXELS_HWC) -> bytes:
    image = Image.fromarray(pixels_HWC)
    image = image.convert({"grey": "L", "cmyk": "CMYK", "palette": "P"}.get(kind, "RGB"))
    if kind == "png16":
        image = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
    out, (form, options) = io.BytesIO(), _KINDS[kind]
    if kind == "turned":
        options = options | {"exif": bytes.fromhex("45786966000049492a0008000000010012010300010000000600000000000000")}
    image.save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", _KINDS)
def test_damaged_images_are_refused_or_give_pixels(kind):
    content = encoded(kind)

    def read(case: int) -> object:
        data = content if case < 0 else damaged(content, case)
        try:
            height, width = image_size(data, "x.img")
        except ValueError:
            height = width = -1
        image_HWC = decode(data, "x.img")
        assert image_HWC.dtype == np.uint8 and image_HWC.shape[2:] == (3,), "no image"
        return height, width, image_HWC

    size = 4 * 1366 * len(content) if kind == "gif" else len(content)  # a canvas takes no bytes in the file
    outcomes = watch(read, range(60 if kind in ("baseline", "png") else 24), size=size, names=("x.img",))
    print(kind, told(outcomes))
    assert not faults(outcomes) and any(o.kind == "refused" for o in outcomes)


@pytest.mark.parametrize("kind", ["baseline", "grey", "restart"])
def test_the_compiled_decoder_of_boxes_gives_pixels_or_nothing(kind):
    content = encoded(kind)

    def read(case: int) -> object:
        data, out = content if case < 0 else damaged(content, case), []
        try:
            head = read_header(data)
        except ValueError as error:
            raise ValueError(f"x.img: {error}") from None
        index = seek_index(data)
        out.append((damage(data), index))
        data_N, places = np.frombuffer(data, dtype=np.uint8), np.frombuffer(index[:-20], dtype=np.uint8)
        step = int.from_bytes(index[-16:-12], "big") if index else 1
        for scale in (1, 2, 8):
            h, w = -(-min(head.height, 48) // scale), -(-min(head.width, 72) // scale)
            for places_ in (places, places[:0]):
                out.append(decode_box(data_N, head.height, head.width, places_, step, scale, h // 3, w // 3, h, w))
        return out

    outcomes = watch(read, range(60), size=len(content), names=("x.img",))
    print("box", kind, told(outcomes))
    assert not faults(outcomes) and any(o.kind == "other" for o in outcomes)


def _claiming(kind: str, width: int, height: int) -> bytes:
    """A small file that says it has very many pixels."""
    content = bytearray(encoded(kind))
    if kind == "png":
        content[16:24] = struct.pack(">II", width, height)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    else:
        start = next(s for m, s, _ in read_header(bytes(content)).segments if 0xC0 <= m <= 0xC2)
        content[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(content)


@pytest.mark.parametrize("kind", ["baseline", "grey", "restart", "progressive", "cmyk", "turned", "png"])
def test_what_an_image_says_of_its_size_is_not_believed(kind):
    sides = [(65535, 65535), (65535, 100), (13000, 13000), (30000, 400), (16000, 16000), (3000, 2000)]
    contents = [encoded(kind), *(_claiming(kind, *side) for side in sides)]

    def read(case: int) -> object:
        return decode(contents[case + 1], "x.img")

    most = len(contents[0]) * (1032 if kind == "png" else 1)  # what so many bytes can hold, deflated
    outcomes = watch(read, range(len(sides)), size=most, names=("x.img",))
    print("claims", kind, told(outcomes))
    assert not faults(outcomes) and {o.kind for o in outcomes[:2]} == {"refused"}


def test_the_box_of_a_file_that_claims_too_much_is_given_up_at_once():
    contents = [encoded("baseline"), _claiming("baseline", 65535, 65535), _claiming("baseline", 65535, 64)]

    def read(case: int) -> object:
        data_N, none = np.frombuffer(contents[case + 1], dtype=np.uint8), np.zeros(0, dtype=np.uint8)
        head = read_header(contents[case + 1])
        out = decode_box(data_N, head.height, head.width, none, 1, 1, 0, 0, head.height, head.width)
        return out if case < 0 else out.size

    outcomes = watch(read, range(2), size=len(contents[0]), names=("x.img",), seconds=2)
    assert not faults(outcomes) and [o.about for o in outcomes] == ["", ""]


def test_flat_images_are_not_taken_for_claims():
    flat_HWC = np.full((1500, 2000, 3), 128, dtype=np.uint8)
    for kind in ("baseline", "grey", "progressive", "png", "palette", "webp", "gif"):
        content = encoded(kind, flat_HWC)
        assert decode(content, kind).shape == (1500, 2000, 3), kind
    out = io.BytesIO()
    Image.fromarray(flat_HWC).convert("L").save(out, "JPEG", optimize=True, quality=10)
    assert decode(out.getvalue(), "optimised").shape == (1500, 2000, 3)
    out = io.BytesIO()
    Image.fromarray(flat_HWC).convert("1").save(out, "PNG", optimize=True)
    assert decode(out.getvalue(), "bits").shape == (1500, 2000, 3)


def test_a_header_of_very_many_segments_is_refused():
    content = b"\xff\xd8" + b"\xff\xe0\x00\x02" * 1_000_000
    outcomes = watch(
        lambda case: decode(content if case >= 0 else encoded("baseline"), "x.img"),
        [0],
        size=len(content),
        names=("x.img",),
    )
    assert [o.kind for o in outcomes] == ["refused"]
