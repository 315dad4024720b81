"""Seekable JPEGs show the same pixels to every decoder, their index is right, and damage stops or crashes nothing."""

import functools
import io
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from fasttrain.loaders.decode import decode
from fasttrain.loaders.jpeg import DHT, SOS, read_header
from fasttrain.loaders.seekable import TAG, damage, seekable
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

# codes of ITU-T T.81, tables K.3 and K.5, for blocks written by hand
DC_0, END, SIXTEEN_ZEROS = "00", "1010", "11111111001"
AFTER_15, AFTER_14 = "1111111111110101" + "1", "1111111111101011" + "1"  # so many zeros, then a coefficient of 1


@functools.cache
def photographs() -> list[Image.Image]:
    return [Image.fromarray(image) for image in load_sample_images().images]


def photo(width: int, height: int, *, which: int = 0) -> Image.Image:
    """A part of a photograph, shrunk by 2: real edges, real chroma."""
    whole = photographs()[which]
    box = (40, 10, 40 + min(2 * width, 600), 10 + min(2 * height, 417))
    return whole.resize((width, height), box=box)


def jpeg(image: Image.Image, **how) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **how)
    return out.getvalue()


def pillow(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def rows_of(content: bytes) -> tuple[int, list[int]]:
    """Height of a row of MCUs in pixels, and where the rows start and the last ends, in the entropy-coded data."""
    (body,) = [content[s + 4 : e] for m, s, e in read_header(content).segments if m == 0xEF]
    assert body.startswith(TAG)
    mcu_h, rows = struct.unpack_from("<HH", body, len(TAG))
    return mcu_h, list(struct.unpack_from(f"<{rows + 1}I", body, len(TAG) + 4))


def assert_same_picture(before: bytes) -> None:
    """Same pixels of Pillow and of torchvision; markers where the index says, and nowhere else."""
    after = seekable(before)
    assert after is not None and damage(before) == damage(after) == ""
    assert (pillow(after) == pillow(before)).all()
    assert (decode(after, "") == decode(before, "")).all()
    head = read_header(after)
    data, (mcu_h, starts) = after[head.data :], rows_of(after)
    assert mcu_h == head.mcu[1] and len(starts) == -(-head.height // mcu_h) + 1
    assert head.restart == -(-head.width // head.mcu[0])
    markers = [i for i in range(len(data) - 1) if data[i] == 0xFF and data[i + 1] != 0]
    assert [i + 2 for i in markers[:-1]] == starts[1:-1] and markers[-1] == starts[-1] == len(data) - 2
    assert [data[i + 1] for i in markers] == [*(0xD0 + k % 8 for k in range(len(starts) - 2)), 0xD9]
    assert seekable(after) == after


@settings(deadline=None)
@given(
    st.integers(1, 130), st.integers(1, 130), st.integers(5, 100), st.sampled_from([0, 1, 2]), st.booleans(),
    st.booleans(), st.sampled_from([{}, {"restart_marker_blocks": 5}, {"restart_marker_rows": 1}]), st.integers(0, 1),
)  # fmt: skip
def test_same_pixels(width, height, quality, subsampling, optimize, grey, restart, which):
    image = photo(width, height, which=which)
    image = image.convert("L") if grey else image
    assert_same_picture(jpeg(image, quality=quality, subsampling=subsampling, optimize=optimize, **restart))


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (17, 33), (300, 17), (31, 200)])
@pytest.mark.parametrize("sampling", ["411", "440", "420", "422", "444"])
def test_same_pixels_of_every_sampling(need, sampling, size):
    need("ffcv")  # OpenCV comes with it, and writes what Pillow does not
    import cv2

    factor = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{sampling}")
    for quality in (20, 75, 100):
        for more in ((), (cv2.IMWRITE_JPEG_OPTIMIZE, 1), (cv2.IMWRITE_JPEG_RST_INTERVAL, 3)):
            how = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor, *more]
            _, content = cv2.imencode(".jpg", np.asarray(photo(*size))[..., ::-1], how)
            lumas = read_header(content.tobytes()).components[0][1:]
            assert lumas == {"411": (4, 1), "440": (1, 2), "420": (2, 2), "422": (2, 1), "444": (1, 1)}[sampling]
            assert_same_picture(content.tobytes())


def test_same_pixels_of_large_photographs():
    for image in photographs():
        assert_same_picture(jpeg(image, quality=95))


def test_same_pixels_of_other_colours_and_kinds_of_frame():
    image = photo(70, 50)
    for content in (jpeg(image.convert("CMYK"), quality=80), jpeg(image, keep_rgb=True, quality=80)):
        after = seekable(content)
        assert (pillow(after) == pillow(content)).all()
        assert read_header(after).adobe == read_header(content).adobe
    extended = jpeg(image).replace(b"\xff\xc0", b"\xff\xc1", 1)
    assert_same_picture(extended)


def test_other_segments_go_and_a_thumbnail_does_not_confuse():
    image, exif = photo(60, 40), Image.Exif()
    exif[0x010E] = "a \xff\xda photograph \xff\xd8"
    content = jpeg(image, exif=exif, icc_profile=bytes(range(256)) * 300, comment=b"\xff\xd9 " * 1000)
    content = content[:2] + segment(0xE1, b"thumbnail\0" + jpeg(image.resize((16, 12)))) + content[2:]
    assert_same_picture(content)
    assert len(seekable(content)) < len(content) - 80_000


def test_a_row_stands_alone():
    """What the index is for: the data between two of its places, with a header of that height, are those rows."""
    whole = jpeg(photo(90, 100), subsampling=0, quality=90)
    content = seekable(whole)
    head, (mcu_h, starts) = read_header(content), rows_of(content)
    frame = next(s for m, s, _ in head.segments if m == 0xC0)
    for row in range(len(starts) - 1):
        height = min(mcu_h, head.height - row * mcu_h)
        part = bytearray(content[: head.data] + content[head.data + starts[row] : head.data + starts[row + 1]])
        part[frame + 5 : frame + 7] = height.to_bytes(2, "big")
        assert (pillow(bytes(part) + b"\xff\xd9") == pillow(whole)[row * mcu_h : row * mcu_h + height]).all()


def test_what_cannot_be_made_seekable():
    image = photo(60, 40)
    assert seekable(jpeg(image, progressive=True)) is None and damage(jpeg(image, progressive=True)) == ""
    for kind in (0xC9, 0xC3):  # arithmetic, lossless
        assert seekable(jpeg(image).replace(b"\xff\xc0", bytes([0xFF, kind]), 1)) is None
    one_component = jpeg(image, subsampling=0)
    scan = next(s for m, s, _ in read_header(one_component).segments if m == SOS)
    one_component = one_component[:scan] + segment(SOS, b"\1\1\0\0\x3f\0") + one_component[scan + 14 :]
    assert seekable(one_component) is None
    with pytest.raises(ValueError, match="does not start as a JPEG"):
        seekable(b"\x89PNG")


# written by hand


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


def test_wrong_codes_are_found():
    assert damage(by_hand(DC_0 + END)) == ""
    assert damage(by_hand(DC_0 + 3 * SIXTEEN_ZEROS + AFTER_14)) == ""  # coefficient 63: the last one
    assert "damaged" in damage(by_hand(DC_0 + 3 * SIXTEEN_ZEROS + AFTER_15))
    assert "damaged" in damage(by_hand(DC_0 + 4 * SIXTEEN_ZEROS + END))
    assert "damaged" in damage(by_hand(DC_0 + "1" * 100))  # all ones is no code
    assert "damaged" in damage(by_hand("1" * 9 + "0" * 40))  # of DC neither
    assert "ends before" in damage(by_hand(DC_0))
    assert "ends before" in damage(by_hand((DC_0 + END) * 3, width=32))
    assert damage(by_hand((DC_0 + END) * 4, width=32)) == ""


def test_data_that_grows_by_stuffing_fits():
    """7F FE, repeated, has no byte to stuff; shifted by some bits every second byte is FF."""
    values = [*range(0x11, 0x1B), *range(0x21, 0x2B), *range(0x31, 0x3B), 0x41, 0x0A]
    ac = bytes([0] * 5 + [32] + [0] * 10 + values)  # 32 codes of 6 bits; the last is 011111
    dc = bytes([0] * 15 + [1]) + bytes([0])
    content = by_hand(("0" * 16 + ("011111" + "1111111110") * 63) * 400, width=160, height=160, ac=ac, dc=dc)
    after = seekable(content)
    assert len(after) > len(content) + 12_000
    assert (pillow(after) == pillow(content)).all()


def test_a_jpeg_that_is_cut_off_is_found():
    for how in ({}, {"restart_marker_blocks": 4}, {"optimize": True, "subsampling": 0}):
        content = jpeg(photo(70, 50), **how)
        for end in range(read_header(content).data, len(content) - 2, 7):
            assert "ends before" in damage(content[:end]) and seekable(content[:end]) is None


def test_a_restart_interval_that_is_missing_is_found():
    content = jpeg(photo(70, 50), restart_marker_rows=1)
    place = [content.index(bytes([0xFF, 0xD0 + k])) for k in (1, 2)]
    assert "ends before" in damage(content[: place[0]] + content[place[1] :])


def test_flipped_bytes_are_found_where_they_make_wrong_codes():
    rng, content = np.random.default_rng(0), jpeg(photo(200, 150), quality=90)
    start, found = read_header(content).data, 0
    for at in rng.integers(start, len(content) - 2, 300):
        flipped = bytearray(content)
        flipped[at] ^= int(rng.integers(1, 256))
        found += damage(bytes(flipped)) != ""
    assert found > 15  # most flips make other pictures, not wrong codes


@functools.cache
def to_damage() -> list[bytes]:
    image = photo(65, 49)
    plain = [jpeg(image, quality=q, **how) for q in (30, 100) for how in ({}, {"optimize": True}, {"subsampling": 0})]
    return [*plain, jpeg(image.convert("L")), jpeg(image, restart_marker_blocks=3), jpeg(image, progressive=True)]


def damaged(rng: np.random.Generator, content: bytes) -> bytes:
    out, head = bytearray(content), read_header(content).data
    for _ in range(rng.integers(1, 6)):
        out[rng.integers(2, head if rng.random() < 0.7 else len(out))] = rng.choice([0, 1, 255, rng.integers(256)])
    return bytes(out[: rng.integers(len(out))] if rng.random() < 0.1 else out)


def test_damaged_jpegs_are_made_seekable_or_refused():
    rng, ends = np.random.default_rng(0), {"bytes": 0, "None": 0, "refused": 0}
    for i in range(1500):
        content = damaged(rng, to_damage()[i % len(to_damage())])
        try:
            after, why = seekable(content), damage(content)
        except ValueError:
            ends["refused"] += 1
            continue
        ends["None" if after is None else "bytes"] += 1
        assert isinstance(why, str) and not (why and after)
        if after is None:
            continue
        try:
            before = decode(content, "")
        except ValueError:
            continue
        assert (decode(after, "") == before).all()
    assert min(ends.values()) > 100, ends


def show_damaged() -> dict[str, int]:
    """Shows damaged seekable JPEGs; a crash ends the process. Returns how often each status came."""
    from fasttrain.loaders.show import BAD, DONE, _only_rows, load_libjpeg, show

    load_libjpeg()
    rng, count = np.random.default_rng(0), {DONE: 0, BAD: 0}
    whole = [seekable(c) or c for c in to_damage()]
    out, still = np.empty((16, 16, 3), np.uint8), np.empty((0, 0, 3), np.uint8)
    for i in range(3000):
        content = whole[i % len(whole)]
        head, changed = read_header(content), bytearray(content)
        kind, place = (rng.integers(5) if TAG in content else 3), content.find(TAG) + len(TAG)
        if kind == 0:  # one place in the index
            at = place + 4 + 4 * int(rng.integers(len(rows_of(content)[1])))
            changed[at : at + 4] = struct.pack("<I", int(rng.choice([0, 1, 2, 60, len(content), 2**31, 2**32 - 1])))
        elif kind == 1:  # all places
            size = 4 * len(rows_of(content)[1])
            changed[place + 4 : place + 4 + size] = rng.bytes(size)
        elif kind == 2:  # the size in the frame
            frame = next(s for m, s, _ in head.segments if 0xC0 <= m <= 0xC2)
            changed[frame + 5 : frame + 9] = struct.pack(">HH", *rng.choice([0, 1, 48, 49, 50, 65, 70, 65535], 2))
        else:
            changed = bytearray(damaged(rng, content))
        sizes = [(head.height, head.width)] * 3 + [(1, 1), (50, 65), (49, 64)]
        height, width = sizes[rng.integers(len(sizes))]
        if kind == 2 and i % 2:
            height, width = struct.unpack(">HH", changed[frame + 5 : frame + 9])
        if not 0 < height * width < 10_000_000:
            continue
        box = np.array([rng.integers(height), rng.integers(width), *rng.integers(1, 60, 2)], np.int32)
        data = np.frombuffer(bytes(changed), np.uint8)
        buffer, length, start, rows = _only_rows(data, height, width, int(box[0]), int(box[0] + box[2]))
        assert 0 <= length <= len(buffer) and (length == 0 or (start >= 0 and start + rows <= height))
        count[show(data, True, height, width, box, False, False, out, still)] += 1
    return {"done": count[DONE], "bad": count[BAD]}


def test_showing_damaged_seekable_jpegs_never_crashes(need, repository):
    need("ffcv")  # libturbojpeg is there for its sake
    ran = subprocess.run(
        [sys.executable, "-c", "from tests.loaders import test_seekable as t; print(t.json.dumps(t.show_damaged()))"],
        cwd=repository, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    count = json.loads(ran.stdout)
    assert count["done"] > 300 and count["bad"] > 300
