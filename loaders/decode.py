"""Encoded images to pixels: one way for every format, so that a file and its packed copy give the same bytes.

JPEGs of one or three components go through torchvision's libjpeg-turbo, everything else through Pillow.
"""

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .jpeg import Header, read_header

_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_SOI = b"\xff\xd8"
PIXELS_A_BYTE = 512  # of a JPEG: a block of 64 takes a bit or more (T.81, annexes F and G)
# deflate makes 1032 bytes of one, and a pixel takes a bit; LZW's codes of 12 bits stand for 1 to 4096 pixels
_A_BYTE = {"PNG": 8 * 1032, "GIF": 1366, "JPEG": PIXELS_A_BYTE}
MOST_PIXELS = 2 * (1 << 30) // 4 // 3  # where Pillow, too, refuses an image


def decode(content: np.ndarray | bytes, name: str) -> np.ndarray:
    """Decodes an image file's content to uint8 [H, W, 3], turned as its EXIF says; 16-bit grey keeps its upper 8 bits.

    What an image says of its size is not believed where its bytes cannot hold as much: nothing is allocated for it then.

    Raises:
        ValueError: damaged, no image, or of more than :data:`MOST_PIXELS`; names it by ``name``.
    """
    try:
        whole = bytes(content)
        if whole[:2] == _SOI:
            head = read_header(whole)
            _check_size(head.height, head.width, PIXELS_A_BYTE * len(whole))
            image_HWC = _jpeg(content) if is_plain(head) else None
            if image_HWC is not None:
                return image_HWC
        with Image.open(io.BytesIO(whole)) as file:
            _check_size(file.height, file.width, _A_BYTE.get(file.format or "", MOST_PIXELS) * len(whole))
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        raise ValueError(f"cannot read the image {name}: {_why(error)}") from error


def image_size(content: np.ndarray | bytes, name: str) -> tuple[int, int]:
    """(height, width) in pixels as :func:`decode` gives them, from the image's header alone.

    Raises:
        ValueError: no image; names it by ``name``.
    """
    try:
        if bytes(content[:2]) == _SOI and is_plain(head := read_header(bytes(content))):
            return head.height, head.width  # Pillow's own would look for an orientation in XMP, too
        with Image.open(io.BytesIO(bytes(content))) as file:
            width, height = file.size
            turned = file.getexif().get(0x0112, 1) in _TURNED
            return (width, height) if turned else (height, width)
    except Exception as error:
        raise ValueError(f"cannot read the image {name}: {_why(error)}") from error


def is_plain(head: Header) -> bool:
    """Whether a JPEG is decoded as it is: 8 bits, grey or of three components, upright."""
    return head.orientation == 1 and head.precision == 8 and len(head.components) in (1, 3)


def read_image(path: Path) -> np.ndarray:
    """Decodes one file; see :func:`decode`.

    Raises:
        ValueError: the file is missing, damaged or no image.
    """
    return decode(read_bytes(path), str(path))


def read_bytes(path: Path) -> np.ndarray:
    """A file's content: uint8 [bytes].

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise ValueError(f"cannot read the image {path}: {error.strerror or error}") from error


def _why(error: Exception) -> str:
    """What a decoder said, in one line."""
    if isinstance(error, UnidentifiedImageError):  # names an object in memory
        return "it is no image of a known kind"
    return " ".join(str(error).split()) or type(error).__name__


def _check_size(height: int, width: int, most: int) -> None:
    """Refuses an image of more than ``most`` pixels, what its bytes can hold."""
    if height * width > min(most, MOST_PIXELS):
        raise ValueError(f"it says that it has {width} x {height} pixels, which is more than it can have")


def _jpeg(content: np.ndarray | bytes) -> np.ndarray | None:
    """None where torchvision is built without its decoder (it is to move to torchcodec); Pillow then decodes."""
    decoder = _torchvision()
    if decoder is None:
        return None
    array = np.frombuffer(content, dtype=np.uint8)
    array = array if array.flags.writeable else array.copy()
    return decoder(torch.from_numpy(array), 3, False).permute(1, 2, 0).contiguous().numpy()


@cache
def _torchvision() -> Callable | None:
    try:
        import torchvision.io  # noqa: F401 - slow to import; it registers the operator

        return torch.ops.image.decode_jpeg
    except (ImportError, AttributeError, RuntimeError):
        return None
