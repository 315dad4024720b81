"""The decoder of baseline JPEGs gives libjpeg-turbo's bytes, of any part and at any scale, or leaves the file to it."""

import numpy as np
import pytest
from fasttrain.loaders.baseline import decode_box
from fasttrain.loaders.decode import decode
from fasttrain.loaders.huffman import (
    BASELINE,
    CODES,
    HEAD,
    LOOK,
    OTHER,
    SHOWN,
    SOUND,
    TALL,
    WIDE,
    read_head,
    walk,
)
from fasttrain.loaders.jpeg import DHT, SOS, read_header
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from .jpegs import (
    SUBSAMPLING,
    by_hand,
    jpeg,
    noise,
    only_scale,
    photo,
    pillow,
    segment,
    squares,
    turbo_jpeg,
    turbo_pixels,
    without,
)

# codes of ITU-T T.81, tables K.3 and K.5, for blocks written by hand
DC_0, END, SIXTEEN_ZEROS = "00", "1010", "11111111001"
AFTER_15, AFTER_14 = "1111111111110101" + "1", "1111111111101011" + "1"  # so many zeros, then a coefficient of 1

SMALL = st.integers(1, 70)
RESTARTS = st.sampled_from(
    [{}, {}, {"restart_marker_blocks": 1}, {"restart_marker_blocks": 5}, {"restart_marker_rows": 1}]
)
PICTURES = st.sampled_from([photo, lambda *size: photo(*size, which=1), noise, squares])


@st.composite
def jpegs(draw) -> bytes:
    """All that Pillow writes of the kinds that are decoded here."""
    image = draw(PICTURES)(draw(SMALL), draw(SMALL))
    image = image.convert("L") if draw(st.sampled_from([False, False, False, True])) else image
    how = draw(RESTARTS) | {"optimize": draw(st.booleans()), "subsampling": draw(st.integers(0, 2))}
    steps = draw(st.sampled_from([0, 0, 0, 1, 2000]))
    if steps:  # more than 255 have 16 bits
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        return jpeg(image, qtables=[rng.integers(1, steps + 1, 64).tolist() for _ in range(2)], **how)
    return jpeg(image, quality=draw(st.integers(1, 100)), **how)


def memory(content: bytes) -> np.ndarray:
    return np.frombuffer(bytearray(content), np.uint8)


def kind_of(content: bytes) -> tuple[int, tuple]:
    """What it is, and what its header says."""
    head, looks = np.zeros(HEAD, np.int64), np.zeros((8, 1 << LOOK), np.int32)
    codes, steps = np.zeros((8, CODES), np.int32), np.zeros((4, 64), np.int32)
    return read_head(memory(content), head, steps, looks, codes), (head, looks, codes)


def index_of(content: bytes, step: int) -> np.ndarray:
    """Places of every ``step``-th MCU of each row; none for 0."""
    kind, (head, looks, codes) = kind_of(content)
    assert kind == SHOWN
    width, height = read_header(content).width, read_header(content).height
    across, down = -(-width // (8 * head[WIDE])), -(-height // (8 * head[TALL]))
    places = np.zeros(10 * down * -(-across // step) if step else 0, np.uint8)
    assert walk(memory(content), head, looks, codes, step or 1, places) == SOUND
    return places


def ours(content: bytes, *, box=None, step: int = 0, scale: int = 1, size=None) -> np.ndarray:
    """A box (top, left, bottom, right) of the picture, or all of it; by an index with that step, or without one."""
    height, width = size or (read_header(content).height, read_header(content).width)
    box = box or (0, 0, -(-height // scale), -(-width // scale))
    places = index_of(content, step) if step else np.zeros(0, np.uint8)
    return decode_box(memory(content), height, width, places, max(step, 1), scale, *box)


def a_box(data, height: int, width: int) -> tuple[int, int, int, int]:
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    return top, left, data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))


# the same bytes


@settings(deadline=None, max_examples=250)
@given(jpegs(), st.data())
def test_any_box_has_libjpegs_bytes(content, data):
    """With indices of any step and without."""
    whole = decode(content, "")
    assert (pillow(content) == whole).all() and (ours(content) == whole).all()
    top, left, bottom, right = box = a_box(data, *whole.shape[:2])
    for step in (0, 1, data.draw(st.integers(2, 12))):
        found = ours(content, box=box, step=step)
        assert found.shape == (bottom - top, right - left, 3)
        assert (found == whole[top:bottom, left:right]).all(), (box, step)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_every_row_column_and_corner(subsampling, step):
    """Where a box begins or ends inside a block, chroma takes its neighbours' samples, too."""
    content = jpeg(photo(37, 35), subsampling=subsampling, quality=95)
    whole, places = decode(content, ""), index_of(content, step)
    boxes = [(y, 0, y + 1, 37) for y in range(35)] + [(0, x, 35, x + 1) for x in range(37)]
    boxes += [(y, x, y + 1, x + 1) for y in (0, 1, 7, 8, 15, 16, 17, 33, 34) for x in (0, 1, 2, 15, 16, 31, 32, 35, 36)]
    boxes += [(0, 0, y, x) for y in range(1, 36, 5) for x in range(1, 38)]
    boxes += [(y, x, 35, 37) for y in range(0, 35, 5) for x in range(37)]
    for box in boxes:
        found = decode_box(memory(content), 35, 37, places, max(step, 1), 1, *box)
        assert found.size and (found == whole[box[0] : box[2], box[1] : box[3]]).all(), box


@pytest.mark.parametrize("subsampling", [0, 1, 2, "grey"])
def test_narrow_and_flat_images(subsampling):
    """libjpeg does not smooth chroma of 1 or 2 columns; one that is narrower than what is done in a vector."""
    for width in range(1, 20):
        for height in (1, 2, 3, 8, 9, 17):
            image, how = noise(width, height), {} if subsampling == "grey" else {"subsampling": subsampling}
            content = jpeg(image if how else image.convert("L"), quality=97, **how)
            whole = decode(content, "")
            assert (ours(content) == whole).all(), (width, height)
            box = (height - 1, width // 2, height, width)
            assert (ours(content, box=box, step=1) == whole[-1:, width // 2 :]).all(), (width, height)


def test_large_images():
    for which, how in ((0, {"quality": 95}), (1, {"quality": 60, "subsampling": 1, "optimize": True})):
        content = jpeg(photo(300, 208, which=which), **how)
        assert (ours(content) == decode(content, "")).all()
        assert (ours(content, box=(77, 131, 160, 290), step=4) == decode(content, "")[77:160, 131:290]).all()


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(jpegs(), st.sampled_from([2, 4, 8]), st.data())
def test_a_smaller_picture_has_libjpegs_bytes(need, content, scale, data):
    need("ffcv")  # TurboJPEG is here for its sake
    assume(only_scale(read_header(content).height, read_header(content).width, scale))
    whole = turbo_pixels(content, scale)
    assert (ours(content, scale=scale) == whole).all()
    top, left, bottom, right = box = a_box(data, *whole.shape[:2])
    found = ours(content, box=box, step=data.draw(st.integers(0, 5)), scale=scale)
    assert found.shape == (bottom - top, right - left, 3) and (found == whole[top:bottom, left:right]).all(), box


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "grey"])
def test_smaller_pictures_of_narrow_and_flat_images(need, subsampling, scale):
    need("ffcv")
    for width, height in [(n, 33) for n in range(1, 42)] + [(33, n) for n in range(1, 42)]:
        content = turbo_jpeg(np.asarray(noise(width, height)), subsampling)
        expected = turbo_pixels(content, scale)
        assert (ours(content, scale=scale) == expected).all(), (width, height)
        x = expected.shape[1] // 2
        assert (ours(content, scale=scale, box=(0, x, 1, x + 1)) == expected[:1, x : x + 1]).all(), (width, height)


def test_codes_longer_than_a_lookup():
    """16 codes of 16 bits, of every size of coefficient; and of 12 bits, before numbers that do not fit in beside them."""
    rng = np.random.default_rng(0)
    for length in (10, 11, 12, 16):
        counts, values = [0] * 16, [0x00, *range(0x01, 0x0B), 0xF0, 0x13, 0x2A, 0x51]
        counts[length - 1] = len(values)
        ac = bytes([*counts, *values])
        bits = ""
        for _ in range(9 * 9):
            bits, k = bits + DC_0, 0
            while k < 63:
                place = int(rng.integers(1, len(values)))
                run, size = values[place] >> 4, values[place] & 15
                if k + run + 1 > 63 or (size == 0 and k + 16 >= 63):
                    bits += f"{0:0{length}b}"
                    break
                number = int(rng.integers(1 << min(size, 3))) | (1 << size - 1 if size and rng.random() < 0.5 else 0)
                bits += f"{place:0{length}b}" + (f"{number % (1 << size):0{size}b}" if size else "")
                k += run + 1
        content = by_hand(bits, width=72, height=72, ac=ac)
        kind, (head, looks, codes) = kind_of(content)
        assert kind == SHOWN
        assert walk(memory(content), head, looks, codes, 1, np.zeros(0, np.uint8)) == SOUND
        assert ours(content).size and (ours(content, box=(40, 33, 72, 70), step=2) == ours(content)[40:, 33:70]).all()


# headers


def test_other_kinds_of_headers_and_tables():
    """All at once: no JFIF segment, the frame of an extended JPEG, tables in one segment or twice, fill bytes, comments."""
    content = jpeg(photo(50, 33), quality=80)
    expected = decode(content, "")
    assert expected.std() > 20
    plain = without(content, 0xE0)
    assert read_header(plain).components == ((1, 2, 2), (2, 1, 1), (3, 1, 1))
    tables = b"".join(content[s + 4 : e] for m, s, e in read_header(content).segments if m == DHT)
    for changed in (
        plain,
        content.replace(b"\xff\xc0", b"\xff\xc1", 1),
        content[:2] + segment(DHT, tables) + without(content, DHT)[2:],
        content[:2] + segment(DHT, bytes([0, *[1] + [0] * 15, 3])) + content[2:],  # replaced later on
        content[:2] + b"\xff\xff\xff" + content[2:],
        content[:2] + segment(0xFE, b"\xff\xd8\xff\xda\xff\xd9" * 9) + content[2:],
        content[:2] + segment(0xE1, b"Exif\0\0 a thumbnail" + jpeg(photo(16, 12))) + content[2:],
        plain[:2] + segment(0xEE, b"Adobe\0\x64\0\0\0\0\1") + plain[2:],
    ):
        assert (decode(changed, "") == expected).all()
        for step in (0, 1):
            assert (ours(changed, step=step) == expected).all()


def renamed(content: bytes, names: bytes) -> bytes:
    """With other identifiers of components."""
    out = bytearray(content)
    for marker, start, _ in read_header(content).segments:
        for i, name in enumerate(names):
            if marker == 0xC0:
                out[start + 10 + 3 * i] = name
            elif marker == SOS:
                out[start + 5 + 2 * i] = name
    return bytes(out)


def left_to_libjpeg() -> dict[str, bytes]:
    image = photo(50, 34)
    content = jpeg(image, subsampling=0)
    plain, scan = without(content, 0xE0), next(s for m, s, _ in read_header(content).segments if m == SOS)
    return {
        "progressive": jpeg(image, progressive=True),
        "cmyk": jpeg(image.convert("CMYK")),
        "rgb": jpeg(image, keep_rgb=True),
        "adobe 0": plain[:2] + segment(0xEE, b"Adobe\0\x64\0\0\0\0\0") + plain[2:],
        "adobe 2": plain[:2] + segment(0xEE, b"Adobe\0\x64\0\0\0\0\2") + plain[2:],
        "names": renamed(plain, b"RGB"),
        "other names": renamed(plain, bytes([0, 1, 2])),
        "extended, 12 bits": content.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c", 1),
        **{f"frame {k:x}": content.replace(b"\xff\xc0", bytes([0xFF, k]), 1) for k in (0xC3, 0xC5, 0xC9, 0xCA, 0xCF)},
        "one component": content[:scan] + segment(SOS, b"\1\1\0\0\x3f\0") + content[scan + 14 :],
        "other order": content[:scan] + segment(SOS, b"\3\2\x11\1\0\3\x11\0\x3f\0") + content[scan + 14 :],
        "no quantisation": without(content, 0xDB),
        "no codes": without(content, DHT),
        "no frame": without(content, 0xC0),
        "two frames": content[:scan] + content[content.index(b"\xff\xc0") :][:19] + content[scan:],
        "empty": b"",
        "two bytes": b"\xff\xd8",
        "only an end": b"\xff\xd8\xff\xd9" * 9,
        "png": b"\x89PNG\r\n\x1a\n" * 9,
    }


@pytest.mark.parametrize("kind", left_to_libjpeg())
def test_what_is_left_to_libjpeg(kind):
    content = left_to_libjpeg()[kind]
    for scale in (1, 8):
        assert ours(content, size=(34, 50), scale=scale).size == 0
    assert ours(jpeg(photo(50, 34), subsampling=0), size=(34, 50)).size
    # codes can still be read where the file is of the baseline kind, and are only of no colours that are made here
    baseline = kind in ("cmyk", "rgb", "adobe 0", "adobe 2", "names", "other names")
    assert kind_of(content)[0] == (BASELINE if baseline else OTHER)


@pytest.mark.parametrize("sampling", ["4:4:0", "4:1:1"])
def test_other_samplings_are_left_to_libjpeg(need, sampling):
    need("ffcv")
    content = turbo_jpeg(np.asarray(photo(50, 34)), sampling)
    assert read_header(content).components[0][1:] == {"4:4:0": (1, 2), "4:1:1": (4, 1)}[sampling]
    assert kind_of(content)[0] == BASELINE and ours(content).size == 0
    assert set(SUBSAMPLING) == {"4:4:0", "4:1:1", "4:4:4", "4:2:2", "4:2:0", "grey"}


def test_a_size_that_is_not_the_records():
    content = jpeg(photo(50, 34))
    for size in ((34, 49), (35, 50), (50, 34), (1, 1)):
        assert ours(content, size=size).size == 0
    assert ours(content, size=(34, 50)).shape == (34, 50, 3)


def test_an_index_of_another_length():
    content = jpeg(photo(50, 34), subsampling=0)
    for step in (1, 2, 7):
        places, box = index_of(content, step), (9, 9, 34, 50)
        assert decode_box(memory(content), 34, 50, places, step, 1, *box).size
        for wrong in (places[:-10], places[:-1], np.concatenate([places, places]), places[:10]):
            assert len(wrong) != len(places) and decode_box(memory(content), 34, 50, wrong, step, 1, *box).size == 0
        assert decode_box(memory(content), 34, 50, places, step + 7, 1, *box).size == 0 or step == 7


# damage


def test_wrong_codes():
    assert (ours(by_hand(DC_0 + END)) == 128).all()
    last = by_hand(DC_0 + 3 * SIXTEEN_ZEROS + AFTER_14)  # coefficient 63
    assert (ours(last) == decode(last, "")).all() and ours(last).std() > 0
    for bits in (
        DC_0 + 3 * SIXTEEN_ZEROS + AFTER_15, DC_0 + 4 * SIXTEEN_ZEROS + END, DC_0 + "1" * 100, "1" * 9 + "0" * 40, DC_0,
    ):  # fmt: skip
        for scale in (1, 8):
            assert ours(by_hand(bits), scale=scale).size == 0
    assert ours(by_hand((DC_0 + END) * 3, width=32)).size == 0
    assert ours(by_hand((DC_0 + END) * 3, width=32), box=(0, 0, 8, 24)).size


@pytest.mark.parametrize(
    "how", [{}, {"restart_marker_blocks": 4}, {"optimize": True, "subsampling": 0}, {"grey": True}]
)
def test_cut_off_anywhere(how):
    """Nothing, or of a box that lies before the cut its pixels."""
    image = photo(70, 50).convert("L") if "grey" in how else photo(70, 50)
    content = jpeg(image, **{k: v for k, v in how.items() if k != "grey"})
    whole, above = decode(content, ""), 0
    for end in [*range(0, read_header(content).data, 9), *range(read_header(content).data, len(content) - 2, 5)]:
        assert ours(content[:end], size=(50, 70)).size == 0, end
        found = ours(content[:end] + b"\xff\xd9", size=(50, 70), box=(0, 5, 9, 50))
        above += found.size > 0
        assert not found.size or (found == whole[:9, 5:50]).all()
    assert above > 30
    for changed in (content[:-2], content + b"more" * 9):  # may be left to libjpeg
        assert not ours(changed).size or (ours(changed) == whole).all()


def test_restart_markers_that_are_missing():
    content = jpeg(photo(70, 50), restart_marker_rows=1)
    place = [content.index(bytes([0xFF, 0xD0 + k])) for k in (1, 2)]
    less = content[: place[0]] + content[place[1] :]
    assert ours(less).size == 0 and ours(content).size
    assert (ours(less, box=(0, 0, 25, 70)) == decode(content, "")[:25]).all()


def test_flipped_bytes():
    """Pictures that libjpeg makes of it, too, or nothing where its codes are wrong."""
    rng, found = np.random.default_rng(0), {"nothing": 0, "same": 0, "other": 0}
    for content in (jpeg(photo(100, 75), quality=90), jpeg(photo(100, 75), quality=75, restart_marker_rows=1)):
        start = read_header(content).data
        for at in rng.integers(start, len(content) - 2, 200):
            flipped = bytearray(content)
            flipped[at] ^= int(rng.integers(1, 256))
            image = ours(bytes(flipped))
            same = image.size and (image == decode(bytes(flipped), "")).all()
            found["same" if same else "other" if image.size else "nothing"] += 1
    # coefficients beyond any picture's, where libjpeg's own forms of the DCT differ
    assert found["other"] < 4 and found["same"] > 150 and found["nothing"] > 50, found
