"""How the soft-target kernel cuts a problem up.

Which shapes are the fastest only a GPU can tell: ``fasttrain bench tiles`` tries them. What is here by default was chosen by
registers (resources.py).

Shape suffixes: B batch, C all sources' classes side by side.
"""

from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """The rule by which tiles are made.

    Attributes:
        widest: classes in a tile at most. Sources with more are passed over twice,
        looped: so many at a time (with 2048 some variants spill registers).
        elements: of a tile: as many rows as make so many, one at least.
        rows: of a tile, whatever ``elements`` says; 0: by that.
        per_thread: elements of a thread, ``per_thread_looped`` in a loop. They decide the warps of a program,
        least_warps: so many at least.
        wide: whether memory is moved in groups of 16 bytes where it can be (:func:`groups_of`).
    """

    widest: int = 4096
    looped: int = 1024
    elements: int = 256
    rows: int = 0
    per_thread: int = 8
    per_thread_looped: int = 4
    least_warps: int = 4
    wide: bool = False


DEFAULT = Tiling()
_MOST_WARPS = 32  # a block has 1024 threads at most


@dataclass(frozen=True)
class Tiles:
    """How a problem is cut up: rows R and columns N of a tile, for sources of up to ``n_small`` classes smaller ones.

    Attributes:
        k: columns of a top-k target's tile.
        loop: whether the larger tiles' sources are passed over twice.
        wide, edges: see :func:`groups_of`.
    """

    r: int
    n: int
    r_small: int
    n_small: int
    k: int
    loop: int
    warps: int
    wide: int = 1
    edges: int = 0

    @property
    def sizes(self) -> list[int]:
        """All of it as numbers, as operators take them."""
        # not dataclasses.astuple, which Dynamo cannot trace
        small = [self.r_small, self.n_small, self.k]
        return [self.r, self.n, *small, self.loop, self.warps, self.wide, self.edges]


def tiles_of(
    class_counts: tuple[int, ...],
    k_counts: tuple[int, ...] = (),
    tiling: Tiling = DEFAULT,
    groups: tuple[int, bool] = (1, False),
) -> Tiles:
    """Tiles for these sources, whose rows lie in memory as ``groups`` says."""
    wide, edges = groups
    slack = wide - 1 if edges else 0  # columns before a row's first class
    spans = [count + slack for count in class_counts]
    most = tiling.widest if max(spans) <= tiling.widest else min(tiling.widest, tiling.looped)
    n, n_small = (min(most, max(16, _power_of_2(f(spans)))) for f in (max, min))
    k = max(2, _power_of_2(max(k_counts))) if k_counts else 2
    r, r_small = (tiling.rows or max(1, tiling.elements // max(x, k)) for x in (n, n_small))
    loop = int(max(spans) > n)
    each = tiling.per_thread_looped if loop else tiling.per_thread
    warps = max(tiling.least_warps, min(_MOST_WARPS, r * n // (32 * each)))
    return Tiles(r, n, r_small, n_small, k, loop, warps, wide, int(edges))


def groups_of(student_BC: Tensor, dense_BC: Tensor | None, class_counts: tuple[int, ...]) -> tuple[int, bool]:
    """How many elements of these tensors can be moved at once.

    A group of 16 bytes at a row's end may hold elements of the next row, so rows must begin equally far from a multiple of
    16 bytes in both, and no group may reach over the end of a tensor's memory.

    Args:
        student_BC: elements of a row are neighbours, rows may lie anywhere.
        dense_BC: the target, likewise; None if it is not dense.

    Returns:
        Elements of a group (1: no groups), and whether some source begins or ends within one.
    """
    tensors = [student_BC] if dense_BC is None else [student_BC, dense_BC]
    wide = 16 // max(x.element_size() for x in tensors)
    strides = [x.stride(0) for x in tensors]
    if any((stride - strides[0]) % wide for stride in strides) or not all(_room(x, wide) for x in tensors):
        return 1, False
    return wide, any(at % wide for at in (strides[0], *accumulate(class_counts)))


def _room(x_BC: Tensor, wide: int) -> bool:
    """Whether the last row's last group lies within the tensor's memory."""
    rows, classes = x_BC.shape
    end = (rows - 1) * x_BC.stride(0) + classes
    room = x_BC.untyped_storage().nbytes() // x_BC.element_size() - x_BC.storage_offset()
    return bool(-(-end // wide) * wide <= room)


def _power_of_2(x: int) -> int:
    return 1 << (x - 1).bit_length()
