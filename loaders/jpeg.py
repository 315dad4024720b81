"""What stands before a JPEG's entropy-coded data: size, components, Huffman tables, orientation (ITU-T T.81, annex B)."""

import struct
from dataclasses import dataclass

SOS, DHT, DRI = 0xDA, 0xC4, 0xDD
_MOST_SEGMENTS = 10_000


@dataclass(frozen=True)
class Header:
    """What stands before a JPEG's entropy-coded data.

    Attributes:
        width, height: in pixels.
        sof: the frame's kind: 0xC0 baseline, 0xC2 progressive, ...
        precision: bits a sample.
        components: (identifier, horizontal sampling, vertical sampling) each.
        huffman: (class 0 DC | 1 AC, number) -> code counts and values, as in the file.
        tables: (DC, AC) table numbers of each component, in the scan's order; empty before a scan.
        restart: MCUs between restart markers; 0 for none.
        orientation: EXIF's, 1..8; 1 where there is none.
        adobe: Adobe's colour transform, or -1.
        segments: (marker, start, end) of every segment, its marker's bytes included.
        data: where the entropy-coded data starts.
    """

    width: int
    height: int
    sof: int
    precision: int
    components: tuple[tuple[int, int, int], ...]
    huffman: dict[tuple[int, int], tuple[bytes, bytes]]
    tables: tuple[tuple[int, int], ...]
    restart: int
    orientation: int
    adobe: int
    segments: tuple[tuple[int, int, int], ...]
    data: int

    @property
    def mcu(self) -> tuple[int, int]:
        """Width and height in pixels of a minimum coded unit."""
        if len(self.components) == 1:
            return 8, 8
        return 8 * max(c[1] for c in self.components), 8 * max(c[2] for c in self.components)


def read_header(jpeg: bytes) -> Header:
    """Reads a JPEG up to its first scan.

    Raises:
        ValueError: no JPEG, or damaged before its data.
    """
    if jpeg[:2] != b"\xff\xd8":
        raise ValueError("it does not start as a JPEG does")
    width = height = sof = precision = restart = 0
    components: tuple = ()
    huffman: dict = {}
    orientation, adobe, segments, at = 1, -1, [], 2
    while True:
        while jpeg[at : at + 2] == b"\xff\xff":
            at += 1
        if at + 4 > len(jpeg) or jpeg[at] != 0xFF:
            raise ValueError("its headers are damaged")
        marker, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4], "big")
        body, end = jpeg[at + 4 : at + 2 + length], at + 2 + length
        if length < 2 or end > len(jpeg):
            raise ValueError("its headers are cut off")
        segments.append((marker, at, end))
        if len(segments) > _MOST_SEGMENTS:
            raise ValueError(f"it has more than {_MOST_SEGMENTS} segments before its data")
        try:
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                sof, (precision, height, width, count) = marker, struct.unpack(">BHHB", body[:6])
                parts = [body[6 + 3 * i : 9 + 3 * i] for i in range(count)]
                components = tuple((p[0], p[1] >> 4, p[1] & 15) for p in parts)
            elif marker == DHT:
                while body:
                    counts = body[1:17]
                    values = body[17 : 17 + sum(counts)]
                    huffman[body[0] >> 4, body[0] & 15] = counts, values
                    body = body[17 + sum(counts) :]
            elif marker == DRI:
                restart = int.from_bytes(body[:2], "big")
            elif marker == 0xE1 and body[:6] == b"Exif\0\0":
                orientation = _orientation(body[6:])
            elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
                adobe = body[11]
            elif marker == SOS:
                pairs = [(body[1 + 2 * i], body[2 + 2 * i]) for i in range(body[0])]
                order = [c[0] for c in components]
                if not width or not height or not components:
                    raise ValueError("it has no frame, or one of size 0")
                tables = tuple((t >> 4, t & 15) for c, t in pairs) if [c for c, _ in pairs] == order else ()
                return Header(
                    width, height, sof, precision, components, huffman, tables, restart, orientation, adobe,
                    tuple(segments), end,
                )  # fmt: skip
        except (struct.error, IndexError):
            raise ValueError("its headers are damaged") from None
        at = end


def _orientation(tiff: bytes) -> int:
    """EXIF tag 0x0112 of the first directory; 1 where it cannot be read."""
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        (start,) = struct.unpack(order + "I", tiff[4:8])
        (count,) = struct.unpack(order + "H", tiff[start : start + 2])
        for i in range(count):
            tag, _, _, value = struct.unpack(order + "HHIH", tiff[start + 2 + 12 * i : start + 12 + 12 * i])
            if tag == 0x0112:
                return value if 1 <= value <= 8 else 1
    except (KeyError, struct.error):
        pass
    return 1
