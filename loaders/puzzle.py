"""Jigsaw puzzles made of the images of a batch, on their device: a view of a view.

Noroozi et al., "Boosting Self-Supervised Learning via Knowledge Transfer", CVPR 2018 (Jigsaw++); with ``replaced: 0`` the
puzzle of Noroozi and Favaro, ECCV 2016. An image is parted into cells, a tile is cut somewhere in each, and the tiles are laid
out in one of a set of orders, which is to be told. Some tiles are those of another image of the batch.

What is drawn is a pure function of (seed, view, index). The other image is the neighbour in the order of the epoch, which is one
of (seed, epoch): a batch is cut into ranks by pairs, and the last of an odd number keeps all of its own tiles.

Shape suffixes: B batch, G the grey ones of it, P places of a puzzle (grid * grid), C channels (3), H W of an image, T side of a
tile, N bytes.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from .batch import Batch
from .permutations import permutations
from .philox import draw, integers, uniform

# purposes of random numbers (views.py and clips.py have those below 32, order.py those above 2**20); each takes four words
_PUZZLE, _PLACES, _TILES, _JITTER, _SHIFT = 32, 36, 40, 48, 64
_LUMA = (77, 150, 29)  # of 256: the weights of Rec. 601


@dataclass(frozen=True)
class Pieces:
    """Where the tiles of a batch's puzzles come from.

    Attributes:
        label_B: int64, the number of the order in which they lie.
        cell_BP: int64, the cell, of the own image or of the other one, whose tile lies at each place.
        other_BP: bool, whether it is the other image's.
        offset_BP2: int64, where in the cell the tile begins: down, right, in pixels.
        shift_BPC2: int64, by how much further each colour does.
        grey_B: bool.
    """

    label_B: np.ndarray
    cell_BP: np.ndarray
    other_BP: np.ndarray
    offset_BP2: np.ndarray
    shift_BPC2: np.ndarray
    grey_B: np.ndarray


@dataclass(frozen=True)
class Puzzle:
    """What is made of an image.

    Attributes:
        grid: cells in each direction.
        permutations: orders to tell apart.
        tile: side of a tile in pixels; 0 for three quarters of what the cell leaves for it.
        channel_shift: each colour is shifted by 0 to this many pixels down and right.
        replaced: 0 to this many tiles are another image's, each number equally often.
        grey: share of the puzzles without colour.
    """

    grid: int = 3
    permutations: int = 701
    tile: int = 0
    channel_shift: int = 2
    replaced: int = 2
    grey: float = 0.7

    @property
    def places(self) -> int:
        """Tiles of a puzzle."""
        return self.grid**2

    @property
    def names(self) -> tuple[str, ...]:
        """Of the orders: the cells, counted from 1 in rows, in the order in which their tiles lie."""
        return tuple(" ".join(str(cell + 1) for cell in row) for row in permutations(self.grid, self.permutations))

    def side(self, size: int) -> int:
        """Side in pixels of the tiles of images of ``size`` pixels.

        Raises:
            ValueError: tiles, with the shift of the colours, do not fit into their cells.
        """
        cell = size // self.grid
        side = self.tile or (3 * cell + 2) // 4
        if not self.tile:
            side = min(side, cell - self.channel_shift)
        if side < 1 or side + self.channel_shift > cell:
            raise ValueError(
                f"pretext.tile: tiles of {side} pixels, whose colours are shifted by up to {self.channel_shift}, do not fit into "
                f"cells of {cell} pixels (data.size {size} / {self.grid})"
            )
        return side

    def labels(self, *, seed: int, number_B, index_B) -> np.ndarray:
        """The numbers of the orders alone: int64 [B], see :meth:`pieces`."""
        return integers(draw(seed, number_B, index_B, _PUZZLE)[0], self.permutations)

    def pieces(self, size: int, *, seed: int, number_B, index_B, alone_B=False) -> Pieces:
        """The puzzles of samples, in views of these numbers.

        Args:
            size: side of the images in pixels.
            seed: of the views.
            number_B: int64, of the samples' views.
            index_B: int64, the samples' indices in their data set.
            alone_B: bool, which of them have no neighbour to take tiles from.
        """
        places, side = self.places, self.side(size)
        word_4B = draw(seed, number_B, index_B, _PUZZLE)
        label_B = integers(word_4B[0], self.permutations)
        count_B = np.where(alone_B, 0, integers(word_4B[1], self.replaced + 1))
        cell_BP = permutations(self.grid, self.permutations)[label_B]

        def words(purpose: int, count: int) -> np.ndarray:
            """uint32 [B, count]."""
            parts = [draw(seed, number_B, index_B, purpose + i) for i in range(-(-count // 4))]
            return np.concatenate(parts)[:count].T

        # the first count_B of the places in a random order get other tiles: those of as many cells, in another random order
        rank_BP = np.argsort(np.argsort(words(_PLACES, places), axis=1, kind="stable"), axis=1, kind="stable")
        other_BP = rank_BP < count_B[:, None]
        their_BP = np.argsort(words(_TILES, places), axis=1, kind="stable")
        cell_BP = np.where(other_BP, np.take_along_axis(their_BP, rank_BP, axis=1), cell_BP)
        room = size // self.grid - side - self.channel_shift + 1
        shape = (len(label_B), places)
        return Pieces(
            label_B,
            cell_BP,
            other_BP,
            integers(words(_JITTER, places * 2), room).reshape(*shape, 2),
            integers(words(_SHIFT, places * 6), self.channel_shift + 1).reshape(*shape, 3, 2),
            uniform(word_4B[2]) < self.grey,
        )

    def __call__(self, batch: Batch, *, seed: int) -> Batch:
        """The puzzles of a batch of images: pixels uint8 [B, 3, P, T, T], as a clip of P frames, channels_last_3d; targets int64
        [B], the orders.

        Raises:
            ValueError: images too small for their tiles, or clips.
        """
        if batch.pixels.dim() != 4:
            raise ValueError("pretext.task: puzzles are made of images, not of clips: set data.frames to 0")
        assert batch.where_B2 is not None
        index_B, number_B = batch.where_B2.T
        size, device = batch.pixels.shape[-1], batch.pixels.device
        row_B = np.arange(len(batch))
        neighbour_B = row_B ^ 1
        pieces = self.pieces(size, seed=seed, number_B=number_B, index_B=index_B, alone_B=neighbour_B == len(batch))
        side, cell = self.side(size), size // self.grid
        image_BP = np.where(pieces.other_BP, neighbour_B[:, None], row_B[:, None])
        top_BP = pieces.cell_BP // self.grid * cell + pieces.offset_BP2[..., 0]
        left_BP = pieces.cell_BP % self.grid * cell + pieces.offset_BP2[..., 1]
        start_BPC = ((image_BP * size + top_BP) * size + left_BP)[..., None]
        start_BPC = (start_BPC + pieces.shift_BPC2[..., 0] * size + pieces.shift_BPC2[..., 1]) * 3 + np.arange(3)
        grey_G = _sent(np.flatnonzero(pieces.grey_B), device)
        pixels = _cut(batch.pixels, _sent(start_BPC, device), side, grey_G)
        return replace(batch, pixels=pixels, targets=_sent(pieces.label_B, device), still=None)


def _cut(pixel_BCHW: torch.Tensor, start_BPC: torch.Tensor, side: int, grey_G: torch.Tensor) -> torch.Tensor:
    """Tiles that begin at these positions of the images' bytes in NHWC, without colour in the puzzles ``grey_G``: uint8
    [B, 3, P, T, T]."""
    flat, size = pixel_BCHW.permute(0, 2, 3, 1).reshape(-1), pixel_BCHW.shape[-1]
    places = max(len(flat) - (side - 1) * (size + 1) * 3, 0)
    window_NTT = flat.as_strided((places, side, side), (1, 3 * size, 3))  # from every byte on: no memory of its own
    tile_BPCTT = window_NTT[start_BPC]
    if len(grey_G):
        red, green, blue = tile_BPCTT[grey_G].int().unbind(2)
        luma = (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 128 >> 8).to(torch.uint8)
        tile_BPCTT[grey_G] = luma[:, :, None].expand(-1, -1, 3, -1, -1)
    return tile_BPCTT.transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)


def _sent(array: np.ndarray, device: torch.device) -> torch.Tensor:
    values = torch.from_numpy(np.ascontiguousarray(array))
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
