"""Compiled cutting gives the bytes of resample.py; decoding only what is shown, those of decoding everything."""

import functools

import numpy as np
import pytest
import torch
from fasttrain.loaders.crop import cut_into, cut_one
from fasttrain.loaders.decode import decode
from fasttrain.loaders.jpeg import read_header
from fasttrain.loaders.resample import cut
from fasttrain.loaders.seek import seek_index
from fasttrain.loaders.show import BAD, DONE, load_libjpeg, show_at
from fasttrain.loaders.views import View
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from .jpegs import SUBSAMPLING, jpeg, turbo_jpeg, turbo_pixels


@functools.cache
def photo(height: int, width: int) -> np.ndarray:
    box = (0, 0, min(2 * width, 640), min(2 * height, 427))
    return np.asarray(Image.fromarray(load_sample_images().images[0]).resize((width, height), box=box))


def view_of(box, flips=(False, False)) -> View:
    return View(np.array([box]), np.array([flips]), np.zeros(1, dtype=np.int64))


def both(image_HWC: np.ndarray, view: View, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What crop.py makes of it, and what resample.py does."""
    out_SSC = np.full((size, size, 3), 77, dtype=np.uint8)
    cut_one(image_HWC, view, 0, out_SSC)
    return out_SSC, cut(torch.from_numpy(image_HWC.copy())[None], view, size)[0].permute(1, 2, 0).numpy()


@st.composite
def cuts(draw):
    """An image's sides, a box that may reach beyond it or lie outside, flips, and the output's side."""
    height, width, size = draw(st.integers(1, 90)), draw(st.integers(1, 90)), draw(st.integers(1, 48))
    box_h, box_w = (draw(st.integers(1, max(5 * size // 2, 1))) for _ in range(2))
    top, left = draw(st.integers(-box_h - 3, height + 3)), draw(st.integers(-box_w - 3, width + 3))
    return height, width, (top, left, box_h, box_w), (draw(st.booleans()), draw(st.booleans())), size


@given(cuts(), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_compiled_cutting_is_the_exact_one(of, seed):
    height, width, box, flips, size = of
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours, exact = both(image, view_of(box, flips), size)
    assert (ours == exact).all()


@pytest.mark.parametrize(("size", "length"), [(224, 500), (64, 640), (16, 1000), (7, 300), (1, 33)])
def test_compiled_cutting_is_the_exact_one_when_it_shrinks_much(size, length):
    ours, exact = both(photo(length, length // 2), view_of((0, 0, length, length // 2)), size)
    assert (ours == exact).all()


@pytest.mark.xfail(
    strict=True, reason="resample._weights adds eight and more weights in numpy's order, crop.py in theirs"
)
@pytest.mark.parametrize(("size", "length"), [(53, 234), (75, 278)])
def test_weights_that_lie_between_two_whole_numbers(size, length):
    image = np.random.default_rng(0).integers(0, 2, (length, length, 3), dtype=np.uint8) * 255
    ours, exact = both(image, view_of((0, 0, length, length)), size)
    assert (ours == exact).all()


def test_fractions_of_a_pixel_count_as_such():
    """Boxes of an image that was decoded at a fraction of its size: a border of half a pixel is half black."""
    white = np.full((8, 8, 3), 255, dtype=np.uint8)
    out = np.empty((4, 4, 3), dtype=np.uint8)
    for start, black in ((-0.5, 2 * 0.125), (-0.25, 0.125)):  # of the outermost output pixel's weight, roughly
        cut_into(white, 0.0, start, 8.0, 8.0, False, False, out)
        assert 255 * (1 - black) <= out[0, 0, 0] < 250
        assert (out[:, 2:] == 255).all()
    smooth = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 3, 64, axis=0).repeat(3, axis=2)
    a, b = np.empty((16, 16, 3), dtype=np.uint8), np.empty((16, 16, 3), dtype=np.uint8)
    cut_into(smooth, 8.0, 8.0, 32.0, 32.0, False, False, a)
    cut_into(smooth, 8.0, 8.5, 32.0, 32.0, False, False, b)
    assert np.abs(b[:, 1:-1] - a[:, 1:-1].astype(float) - 1.5).max() <= 0.5


def encoded(image: np.ndarray, made: str, *, quality: int = 90) -> bytes:
    if made in SUBSAMPLING:
        return turbo_jpeg(image, made, quality=quality)
    how = {"restarts": {"restart_marker_blocks": 7}, "progressive": {"progressive": True}}[made]
    return jpeg(Image.fromarray(image), quality=quality, subsampling=2, **how)


def shown(content: bytes, sides, box, flips, size: int, *, still: int = 0, index: bytes = b"") -> tuple:
    """Through the C function that FFCV's loop calls: (status, view, still)."""
    data, row = np.frombuffer(index + content, dtype=np.uint8), np.array([*box, *flips], dtype=np.int32)
    out, other = (np.full((s, s, 3), 77, dtype=np.uint8) for s in (size, still))
    images = (size, out.ctypes.data, still, other.ctypes.data)
    at = data.ctypes.data + len(index)
    return show_at()(at, len(content), len(index), 1, *sides, row.ctypes.data, *images), out, other


def whole(content: bytes, box, flips, size: int) -> np.ndarray:
    out = np.empty((size, size, 3), dtype=np.uint8)
    cut_one(decode(content, ""), view_of(box, flips), 0, out)
    return out


@pytest.fixture
def libjpeg(need):
    need("ffcv")
    load_libjpeg()


@pytest.mark.parametrize("made", [*SUBSAMPLING, "restarts", "progressive"])
@pytest.mark.parametrize("indexed", [False, True], ids=["no index", "index"])
def test_decoding_what_is_shown(libjpeg, made, indexed):
    """Byte for byte: boxes anywhere, reaching outside, one row high; and a still of another size."""
    rng = np.random.default_rng(1)
    for height, width in ((130, 90), (67, 101), (16, 8)):
        content = encoded(photo(height, width), made)
        index = seek_index(content) if indexed else b""
        assert (index != b"") == (indexed and made not in ("4:4:0", "4:1:1", "progressive"))
        for _ in range(40):
            box_h, box_w = int(rng.integers(1, height + 9)), int(rng.integers(1, width + 9))
            box = int(rng.integers(-4, height - 1)), int(rng.integers(-4, width - 1)), box_h, box_w
            flips, size = rng.integers(0, 2, 2), min(box_h, box_w) // 2 + int(rng.integers(1, 30))
            status, out, still = shown(content, (height, width), box, flips, size, still=9, index=index)
            assert status == DONE
            assert (out == whole(content, box, flips, size)).all(), (box, size)
            assert (still == whole(content, box, flips, 9)).all()


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("made", ["4:2:0", "4:1:1"])
@pytest.mark.parametrize("indexed", [False, True], ids=["no index", "index"])
def test_decoding_at_a_fraction_is_close(libjpeg, scale, made, indexed):
    """Near to what decoding everything shows, and the bytes of cutting from TurboJPEG's smaller picture."""
    content = encoded(photo(200, 300), made, quality=95)
    small, differences = turbo_pixels(content, scale), []
    index = seek_index(content) if indexed else b""
    for top, left in ((0, 0), (3, 5), (13, 90), (-6, -3)):  # the last one with a black border
        box, size = (top, left, 187, 200), 187 // (2 * scale) * 2
        status, out, _ = shown(content, (200, 300), box, (1, 0), size, index=index)
        assert status == DONE
        expected = np.empty_like(out)
        cut_into(small, *(side / scale for side in box), True, False, expected)
        assert (out == expected).all()
        differences.append(np.abs(out.astype(float) - whole(content, box, (1, 0), size)))
    print(f"at 1/{scale}: mean {np.mean(differences):.2f}, largest {np.max(differences):.0f}")
    assert 0 < np.mean(differences) < 5 and np.max(differences) < 60


def test_only_what_is_shown_is_decoded(libjpeg):
    """Damage below the box is never met, damage above it only where the rows there cannot be left out."""
    content, ends = encoded(photo(160, 120), "4:2:0"), bytes([255, 217])  # "the image ends here"
    at = read_header(content).data + 30
    early = content[:at] + ends + content[at + 2 :]
    rest = len(content) // 8 * 2
    late = content[:-rest] + rest // 2 * ends
    for index, found in ((b"", BAD), (seek_index(content), DONE)):
        for broken, top, status in ((early, 0, BAD), (early, 100, found), (late, 0, DONE), (late, 100, BAD)):
            assert shown(broken, (160, 120), (top, 0, 60, 120), (0, 0), 64, index=index)[0] == status


def test_zeros_in_place_of_an_images_end_are_bad(libjpeg):
    """As a file system leaves them after a crash: many codes are made of zeros, and may make up a whole picture."""
    missed = []
    for quality in (50, 90):
        for part in range(2, 12):
            content = encoded(photo(64, 64), "4:2:0", quality=quality)
            size = len(content) // part
            broken = content[:-size] + bytes(size)
            with pytest.raises(ValueError, match="cannot read the image"):
                decode(broken, "")
            for index in (b"", seek_index(content)):
                if shown(broken, (64, 64), (0, 0, 64, 64), (0, 0), 40, index=index)[0] != BAD:
                    missed.append((quality, part, len(index)))
    assert missed == []


@pytest.mark.parametrize("made", ["4:2:0", "4:1:1", "progressive"])
def test_a_size_that_is_not_the_records_is_bad(libjpeg, made):
    content = encoded(photo(90, 70), made)
    index, box = seek_index(content), (0, 0, 60, 60)
    for sides, status in (((90, 70), DONE), ((90, 71), BAD), ((89, 70), BAD), ((70, 90), BAD), ((900, 700), BAD)):
        assert shown(content, sides, box, (0, 0), 40, index=index)[0] == status


def test_an_index_of_another_picture_is_not_used(libjpeg):
    """In its place, and with the other one's size in it: then its places are not as many as there have to be."""
    content, box = encoded(photo(80, 96), "4:2:0"), (40, 8, 30, 60)
    other = seek_index(encoded(photo(160, 96), "4:2:0"))
    assert len(other) > len(seek_index(content))
    expected = whole(content, box, (0, 0), 40)
    renamed = other[:-12] + len(content).to_bytes(4, "big") + other[-8:]
    for index in (other, renamed, seek_index(content)[:-1] + b"2", bytes(200)):
        status, out, _ = shown(content, (80, 96), box, (0, 0), 40, index=index)
        assert status == DONE and (out == expected).all()


def test_a_box_outside_is_black(libjpeg):
    content = encoded(photo(80, 96), "4:2:0")
    for box in ((80, 0, 30, 30), (0, 96, 30, 30), (-30, 0, 30, 30), (0, -40, 30, 40)):
        status, out, still = shown(content, (80, 96), box, (0, 0), 20, still=9, index=seek_index(content))
        assert status == DONE and not out.any() and not still.any()


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_crashes_nothing(libjpeg, data):
    """Bytes anywhere replaced: BAD, or a picture; never an access outside (which would end the process)."""
    index, content = damaged_samples()
    both = index * data.draw(st.booleans()) + content
    at = data.draw(st.integers(0, len(both) - 1))
    other = data.draw(st.binary(min_size=1, max_size=60))
    broken = (both[:at] + other + both[at + len(other) :])[: len(both)]
    start = len(both) - len(content)
    top, height = data.draw(st.integers(-9, 90)), data.draw(st.integers(1, 100))
    size = data.draw(st.integers(1, 80))
    status, _, _ = shown(broken[start:], (90, 70), (top, 0, height, 70), (0, 0), size, index=broken[:start])
    assert status in (DONE, BAD)


@functools.cache
def damaged_samples() -> tuple[bytes, bytes]:
    content = encoded(photo(90, 70), "4:2:0")
    return seek_index(content), content
