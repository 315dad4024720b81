"""Orders of a puzzle's tiles, any two of which differ in many places.

Of 9 tiles they are the elements of groups of permutations of 9 points that are as far apart as any set of their size known:
a sharply k-transitive group of degree n has n! / (n - k)! elements, and two of them agree in fewer than k places. So
n! / (n - k)! is also the most that any set with this distance can have (Frankl and Deza 1977, J. Combin. Theory A 22).

    orders    smallest Hamming distance    group
    .. 9      9                            the cyclic group
    .. 72     8                            AGL(1, 9): x -> a x + b over the field of 9 elements
    .. 504    7                            PSL(2, 8): x -> (a x + b) / (c x + d) over the field of 8 elements and infinity
    .. 1512   6                            the same with the field's automorphisms x -> x, x^2, x^4

(The 701 orders that came with Jigsaw++ have distance 3, by the notes of those who ported it.) Of 4 tiles there are only 24
orders: all of them, or the 12 even ones (distance 3), or the 4 of the Klein group (distance 4).
"""

from functools import cache

import numpy as np

Permutation = tuple[int, ...]


@cache
def permutations(grid: int, count: int) -> np.ndarray:
    """``count`` orders of ``grid * grid`` tiles: int64 [count, grid^2], each row a permutation, read-only.

    The first is the identity. Every tile comes to every place equally often, to within one: once in each ``grid^2`` orders that
    follow one another, from the first on.

    Raises:
        ValueError: more than there are, fewer than two, or another grid.
    """
    if grid not in (2, 3):
        raise ValueError(f"pretext.grid: {grid} is not 2 or 3")
    sets = _OF_GRID[grid]
    most = sets[-1][0]
    if not 2 <= count <= most:
        raise ValueError(f"pretext.permutations: {count} is not between 2 and {most}, for a grid of {grid} x {grid}")
    make = next(make for size, make in sets if count <= size)
    elements = make()
    row = _by_rounds(elements, _round_of(elements))
    out = np.array(row[:count], dtype=np.int64)
    out.setflags(write=False)
    return out


def least_distance(order_KT: np.ndarray) -> int:
    """The smallest number of places in which two of the orders differ."""
    least = order_KT.shape[1]
    for i in range(1, len(order_KT)):
        least = min(least, int((order_KT[:i] != order_KT[i]).sum(axis=1).min()))
    return least


def _by_rounds(elements: set[Permutation], regular: list[Permutation]) -> list[Permutation]:
    """The elements coset by coset of a regular subgroup: in each, every tile comes to every place once."""
    left, out = set(elements), []
    for element in sorted(elements):
        if element in left:
            coset = [_after(step, element) for step in regular]
            out += coset
            left -= set(coset)
    return out


def _round_of(elements: set[Permutation]) -> list[Permutation]:
    """A subgroup that takes every point to every other once: the powers of an element that is one cycle, or, of AGL(1, 9) and
    of the even orders of 4 tiles, which have none, the kernel of a Frobenius group: all that fix no point, and the identity."""
    points = len(next(iter(elements)))
    identity = tuple(range(points))
    for element in sorted(elements):
        powers, power = [identity], element
        while power != identity:
            powers.append(power)
            power = _after(element, power)
        if len(powers) == points and {p[0] for p in powers} == set(range(points)):
            return powers
    return sorted(e for e in elements if e == identity or all(a != b for a, b in enumerate(e)))


def _after(second: Permutation, first: Permutation) -> Permutation:
    return tuple(second[i] for i in first)


def _generated(*generators: Permutation) -> set[Permutation]:
    """The group that permutations generate."""
    identity = tuple(range(len(generators[0])))
    found, new = {identity}, [identity]
    while new:
        new = [p for p in {_after(g, e) for g in generators for e in new} if p not in found]
        found |= set(new)
    return found


def _affine_9() -> set[Permutation]:
    """AGL(1, 9). The elements of the field are a + b i with i^2 = -1 over the numbers modulo 3, numbered 3 a + b; 1 + i
    generates its multiplicative group."""

    def times(x: int) -> int:
        a, b = divmod(x, 3)
        return 3 * ((a - b) % 3) + (a + b) % 3

    plus_1, plus_i = (tuple(3 * ((x // 3 + a) % 3) + (x % 3 + b) % 3 for x in range(9)) for a, b in ((1, 0), (0, 1)))
    return _generated(plus_1, plus_i, tuple(times(x) for x in range(9)))


def _fractional_8(*more: Permutation) -> set[Permutation]:
    """PSL(2, 8), and what ``more`` generate with it. The points are the field's elements as polynomials over two modulo
    x^3 + x + 1, and 8 for infinity."""
    plus_1 = (*(x ^ 1 for x in range(8)), 8)
    times_x = (*(_product_8(2, x) for x in range(8)), 8)
    inverse = (8, *(next(y for y in range(1, 8) if _product_8(x, y) == 1) for x in range(1, 8)), 0)
    return _generated(plus_1, times_x, inverse, *more)


def _product_8(x: int, y: int) -> int:
    out = 0
    for bit in range(3):
        out ^= (x << bit) * (y >> bit & 1)
    for bit in (4, 3):
        out ^= (0b1011 << (bit - 3)) * (out >> bit & 1)
    return out


def _squares() -> Permutation:
    return (*(_product_8(x, x) for x in range(8)), 8)


_OF_GRID = {
    2: [
        (4, lambda: _generated((1, 0, 3, 2), (2, 3, 0, 1))),
        (12, lambda: _generated((1, 2, 0, 3), (1, 0, 3, 2))),
        (24, lambda: _generated((1, 0, 2, 3), (1, 2, 3, 0))),
    ],
    3: [
        (9, lambda: _generated((1, 2, 3, 4, 5, 6, 7, 8, 0))),
        (72, _affine_9),
        (504, _fractional_8),
        (1512, lambda: _fractional_8(_squares())),
    ],
}
