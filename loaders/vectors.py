"""Inner loops of the JPEG decoder, in vectors that the compiler does not find by itself; and loads and stores.

All arithmetic is libjpeg's, to the last bit: what every decoder built on it shows. The inverse DCT is its "islow" form
(Loeffler, Ligtenberg and Moschytz, ICASSP 1989, in integers of 13 fractional bits; columns first, then rows), whose
reduced forms make 4 x 4 or 2 x 2 pixels of a block; colours are those of JFIF 1.02 in 16 fractional bits.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_BITS, _PASS = 13, 2  # fractional bits of the constants of the DCT, and those kept between its passes
TOGETHER = 16  # pixels whose colours are made at once


def _loader(kind: ir.IntType, extend: str, align: int):
    @intrinsic
    def load(_, address, at):
        """Element ``at`` of an array of integers at an address, as int64."""

        def codegen(context, build, _signature, arguments):
            place = build.gep(build.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
            return getattr(build, extend)(build.load(place, align=align), _I64)

        return types.int64(types.intp, types.intp), codegen

    return load


load_int32, load_uint8 = _loader(_I32, "sext", 4), _loader(_I8, "zext", 1)


@intrinsic
def load_eight(_, address):
    """Eight bytes of memory as one uint64, the first one the highest."""

    def codegen(context, build, _signature, arguments):
        return build.bswap(build.load(build.inttoptr(arguments[0], _I64.as_pointer()), align=1))

    return types.uint64(types.intp), codegen


@intrinsic
def store_int16(_, address, at, value):
    """Writes element ``at`` of an array of int16 at an address."""

    def codegen(context, build, _signature, arguments):
        place = build.gep(build.inttoptr(arguments[0], _I16.as_pointer()), [arguments[1]])
        build.store(build.trunc(arguments[2], _I16), place, align=2)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.int64), codegen


class _Vector:
    """A vector of integers in code that is being built."""

    def __init__(self, build, value) -> None:
        self.build, self.value, self.kind, self.lanes = build, value, value.type.element, value.type.count

    def _of(self, value) -> "_Vector":
        return _Vector(self.build, value)

    def _same(self, number: int):
        return ir.Constant(self.value.type, [number] * self.lanes)

    def __add__(self, other):
        return self._of(self.build.add(self.value, self._same(other) if isinstance(other, int) else other.value))

    def __sub__(self, other):
        return self._of(self.build.sub(self.value, other.value))

    def __mul__(self, number: int):
        return self._of(self.build.mul(self.value, self._same(number)))

    def __lshift__(self, bits: int):
        return self._of(self.build.shl(self.value, self._same(bits)))

    def __rshift__(self, bits: int):
        return self._of(self.build.ashr(self.value, self._same(bits)))

    def rounded(self, bits: int):
        """Without its last bits, rounded to the nearest."""
        return (self + (1 << (bits - 1))) >> bits

    def as_(self, kind: ir.IntType):
        """Sign-extended to wider integers, or the low bits of these."""
        wide = ir.VectorType(kind, self.lanes)
        return self._of((self.build.sext if kind.width > self.kind.width else self.build.trunc)(self.value, wide))

    def chosen(self, other, lanes: list[int]):
        """Lanes of this vector and, counted on, of another one."""
        return self._of(
            self.build.shuffle_vector(self.value, other.value, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))
        )

    def pixels(self):
        """As uint8, held to 0..255."""
        zero, most = self._same(0), self._same(255)
        value = self.build.select(self.build.icmp_signed(">", self.value, zero), self.value, zero)
        value = self.build.select(self.build.icmp_signed("<", value, most), value, most)
        return self._of(value).as_(_I8)


def _at(build, base, kind: ir.IntType, at, lanes: int):
    """Address of a vector: element ``at`` of an array."""
    place = build.gep(base, [at if isinstance(at, ir.Value) else ir.Constant(_I64, at)])
    return build.bitcast(place, ir.VectorType(kind, lanes).as_pointer())


# the inverse DCT


def _fixed(number: float) -> int:
    return round(number * (1 << _BITS))


def _eight(x: list, shift: int) -> list:
    """One-dimensional inverse DCT of eight vectors, then their last ``shift`` bits rounded away."""
    turned = (x[2] + x[6]) * _fixed(0.541196100)
    low, high = turned - x[6] * _fixed(1.847759065), turned + x[2] * _fixed(0.765366865)
    plus, minus = (x[0] + x[4]) << _BITS, (x[0] - x[4]) << _BITS
    even = [plus + high, minus + low, minus - low, plus - high]
    z3, z4 = x[7] + x[3], x[5] + x[1]
    z5 = (z3 + z4) * _fixed(1.175875602)
    z1, z2 = (x[7] + x[1]) * _fixed(0.899976223), (x[5] + x[3]) * _fixed(2.562915447)
    z3, z4 = z5 - z3 * _fixed(1.961570560), z5 - z4 * _fixed(0.390180644)
    odd = [
        x[1] * _fixed(1.501321110) - z1 + z4,
        x[3] * _fixed(3.072711026) - z2 + z3,
        x[5] * _fixed(2.053119869) - z2 + z4,
        x[7] * _fixed(0.298631336) - z1 + z3,
    ]
    return _butterfly(even, odd, shift)


def _four(x: list, shift: int) -> list:
    """To four values, of eight frequencies without the fifth."""
    turned = x[2] * _fixed(1.847759065) - x[6] * _fixed(0.765366865)
    plain = x[0] << (_BITS + 1)
    inner = x[1] * _fixed(1.061594337) - x[3] * _fixed(2.172734803)
    inner = inner + x[5] * _fixed(1.451774981) - x[7] * _fixed(0.211164243)
    outer = x[1] * _fixed(2.562915447) + x[3] * _fixed(0.899976223)
    outer = outer - x[5] * _fixed(0.601344887) - x[7] * _fixed(0.509795579)
    return _butterfly([plain + turned, plain - turned], [outer, inner], shift + 1)


def _two(x: list, shift: int) -> list:
    """To two values, of the first and the odd frequencies."""
    odd = x[1] * _fixed(3.624509785) - x[3] * _fixed(1.272758580)
    odd = odd + x[5] * _fixed(0.850430095) - x[7] * _fixed(0.720959822)
    return _butterfly([x[0] << (_BITS + 2)], [odd], shift + 2)


def _butterfly(even: list, odd: list, shift: int) -> list:
    """Sums, and differences in reverse."""
    pairs = list(zip(even, odd, strict=True))
    return [(e + o).rounded(shift) for e, o in pairs] + [(e - o).rounded(shift) for e, o in pairs[::-1]]


def _transposed(x: list) -> list:
    """Eight vectors of eight."""
    pairs = ([0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15])
    x = [x[i].chosen(x[i + 1], lanes) for i in (0, 2, 4, 6) for lanes in pairs]
    fours = ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15])
    x = [x[i].chosen(x[i + 2], lanes) for i in (0, 1, 4, 5) for lanes in fours]
    halves = ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])
    return [x[i].chosen(x[i + 4], lanes) for lanes in halves for i in range(4)]


_FORMS = {8: (_eight, ()), 4: (_four, (4,)), 2: (_two, (2, 4, 6))}  # and the frequencies that it leaves out


def _inverse(side: int):
    @intrinsic
    def inverse(_, block, steps, out, pitch):
        """Pixels of a block, and zeros in place of its coefficients.

        Addresses of: coefficients int16 [8, 8], quantisation steps int32 [8, 8], pixels uint8; bytes from row to row.
        """

        def codegen(context, build, _signature, arguments):
            form, unused = _FORMS[side]
            block, steps, out, pitch = arguments
            block, steps = build.inttoptr(block, _I16.as_pointer()), build.inttoptr(steps, _I32.as_pointer())
            out, nothing = build.inttoptr(out, _I8.as_pointer()), ir.Constant(ir.VectorType(_I16, 8), [0] * 8)
            x = []
            for v in range(8):
                if v not in unused:
                    wide = _Vector(build, build.load(_at(build, block, _I16, 8 * v, 8), align=2)).as_(_I32)
                    step = build.load(_at(build, steps, _I32, 8 * v, 8), align=4)
                    x.append(_Vector(build, build.mul(wide.value, step)))
                else:
                    x.append(x[0])
            for v in range(8):
                build.store(nothing, _at(build, block, _I16, 8 * v, 8), align=2)
            x = form(x, _BITS - _PASS)
            x = form(_transposed(x + x[:1] * (8 - side)), _BITS + _PASS + 3)
            x = _transposed(x + x[:1] * (8 - side))
            for y in range(side):
                line = (x[y].chosen(x[y], list(range(side))) + 128).pixels()
                at = build.mul(pitch, ir.Constant(_I64, y))
                build.store(line.value, _at(build, out, _I8, at, side), align=1)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), codegen

    return inverse


inverse_8, inverse_4, inverse_2 = _inverse(8), _inverse(4), _inverse(2)


# colours


def _upper(x: _Vector, number: int) -> _Vector:
    """The upper 16 bits of products with a 16-bit number."""
    return ((x.as_(_I32) * number) >> 16).as_(_I16)


@intrinsic
def coloured(_, luma, blue, red, out, count):
    """Red, green and blue of :data:`TOGETHER` pixels at a time.

    Addresses of: Y, Cb, Cr uint8 [X], pixels uint8 [X, 3] to be written; X, at least :data:`TOGETHER`.
    """

    def codegen(context, build, _signature, arguments):
        luma, blue, red, out = (build.inttoptr(a, _I8.as_pointer()) for a in arguments[:4])
        n, last = ir.Constant(_I64, TOGETHER), build.sub(arguments[4], ir.Constant(_I64, TOGETHER))
        steps = build.udiv(build.add(arguments[4], ir.Constant(_I64, TOGETHER - 1)), n)
        with cgutils.for_range(build, steps) as step:
            at = build.mul(step.index, n)
            at = build.select(build.icmp_signed("<", at, last), at, last)  # the last ones once more
            wide = ir.VectorType(_I16, TOGETHER)
            y, b, r = (
                _Vector(build, build.zext(build.load(_at(build, base, _I8, at, TOGETHER), align=1), wide))
                for base in (luma, blue, red)
            )
            b, r = b + -128, r + -128
            # 1.402 = 1 + 0.402 and 1.772 = 2 - 0.228, so that numbers stay within 16 bits; halves are rounded up
            high = y + r + ((_upper(r + r, 26345) + 1) >> 1)
            low = y + b + b + ((_upper(b + b, -14942) + 1) >> 1)
            middle = y - r + (r.as_(_I32) * 18734 + b.as_(_I32) * -22554).rounded(16).as_(_I16)
            high, middle, low = high.pixels(), middle.pixels(), low.pixels()
            for part in range(3):
                first = [(part * TOGETHER + i) // 3 for i in range(TOGETHER)]
                kind = [(part * TOGETHER + i) % 3 for i in range(TOGETHER)]
                two = high.chosen(middle, [f + TOGETHER * (k == 1) for f, k in zip(first, kind, strict=True)])
                lanes = [TOGETHER + f if k == 2 else i for i, (f, k) in enumerate(zip(first, kind, strict=True))]
                to = build.add(build.mul(at, ir.Constant(_I64, 3)), ir.Constant(_I64, part * TOGETHER))
                build.store(two.chosen(low, lanes).value, _at(build, out, _I8, to, TOGETHER), align=1)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen
