"""Inner loops of the JPEG decoder and of the crop, in vectors that the compiler does not find; and loads and stores.

The decoder's arithmetic is libjpeg's, to the last bit: what every decoder built on it shows. The inverse DCT is its "islow" form
(Loeffler, Ligtenberg and Moschytz, ICASSP 1989, in integers of 13 fractional bits; columns first, then rows), whose
reduced forms make 4 x 4 or 2 x 2 pixels of a block; colours are those of JFIF 1.02 in 16 fractional bits.
"""

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
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


# resizing: sums of products of bytes and of weights that are int16, two of them at a time

_MADD, _PACK = "llvm.x86.avx2.pmadd.wd", "llvm.x86.avx2.packssdw"
_HALF, _SHIFT = 512, 10  # weights are in 1/1024
ROW, QUAD = 16, 4  # bytes of a row, and output pixels, that are done together
# how AVX2 interleaves two vectors of 16 numbers, each half for itself: the first and the second four of each half
_FIRST = [i // 2 + 16 * (i % 2) + 4 * (i // 8) for i in range(16)]
_SECOND = [i + 4 for i in _FIRST]


def _avx2() -> bool:
    """Whether code is made for a processor with AVX2."""
    return config.CPU_NAME is None and bool(llvm.get_host_cpu_features().get("avx2"))


def _products(x: _Vector, weights: _Vector) -> _Vector:
    """int32 [8]: x[2 i] weights[2 i] + x[2 i + 1] weights[2 i + 1], of int16 [16]."""
    build, kind = x.build, x.value.type
    if _avx2():
        of = ir.FunctionType(ir.VectorType(_I32, 8), [kind, kind])
        return x._of(build.call(cgutils.get_or_insert_function(build.module, of, _MADD), [x.value, weights.value]))
    even, odd = list(range(0, 16, 2)), list(range(1, 16, 2))
    one, two = (x._of(build.mul(*(v.chosen(v, lanes).as_(_I32).value for v in (x, weights)))) for lanes in (even, odd))
    return one + two


def _narrowed(first: _Vector, second: _Vector) -> _Vector:
    """int16 [16] of two int32 [8]: first four of each, then the others."""
    if _avx2():
        of = ir.FunctionType(ir.VectorType(_I16, 16), [first.value.type] * 2)
        function = cgutils.get_or_insert_function(first.build.module, of, _PACK)
        return first._of(first.build.call(function, [first.value, second.value]))
    return first.chosen(second, [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]).as_(_I16)


def _pair(build, weights, at) -> _Vector:
    """int16 [16]: two weights, again and again."""
    both = build.load(build.gep(weights, [at]), align=2)
    one = build.insert_element(ir.Constant(ir.VectorType(_I32, 8), ir.Undefined), both, ir.Constant(_I32, 0))
    eight = build.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, 8), [0] * 8))
    return _Vector(build, build.bitcast(eight, ir.VectorType(_I16, 16)))


def _half(build) -> _Vector:
    """What sums begin with, so that they are rounded when the last bits are cut off."""
    return _Vector(build, ir.Constant(ir.VectorType(_I32, 8), [_HALF] * 8))


def _by_count(build, count, most: int, make) -> None:
    """``make(n)`` where count is n = 1, 2, ... most, without a loop over them; ``make(None)`` for more.

    Loops that end after two or three rounds cost more than what they do.
    """
    if most == 0:
        return make(None)
    one = build.icmp_signed("==", count, ir.Constant(_I64, most))
    with build.if_else(one) as (then, otherwise):
        with then:
            make(most)
        with otherwise:
            _by_count(build, count, most - 1, make)
    return None


def _added(build, count, n: int | None, start: list[_Vector], term) -> list[_Vector]:
    """``start`` and ``term(0)``, ``term(1)``, ... added: ``n`` terms, or ``count`` where that is None."""
    if n is not None:
        for k in range(n):
            start = [a + b for a, b in zip(start, term(ir.Constant(_I64, k)), strict=True)]
        return start
    held = [cgutils.alloca_once(build, v.value.type) for v in start]
    for place, vector in zip(held, start, strict=True):
        build.store(vector.value, place)
    with cgutils.for_range(build, count) as loop:
        for place, vector in zip(held, term(loop.index), strict=True):
            build.store((_Vector(build, build.load(place)) + vector).value, place)
    return [_Vector(build, build.load(place)) for place in held]


@intrinsic
def mixed_rows(_, rows, pitch, count, weights, out, length):
    """Rows of bytes, weighted and added.

    Addresses of: rows uint8, ``pitch`` bytes from one to the next; weights int16 [count, and a 0 where that is odd]; out
    uint8 [length]. ``length`` is at least :data:`ROW`.
    """

    def codegen(context, build, _signature, arguments):
        rows, pitch, count, weights, out, length = arguments
        rows, out, weights = (build.inttoptr(a, k.as_pointer()) for a, k in ((rows, _I8), (out, _I8), (weights, _I32)))
        one, two, n = (ir.Constant(_I64, i) for i in (1, 2, ROW))
        last, wide = build.sub(length, n), ir.VectorType(_I16, ROW)
        pairs, last_row = build.udiv(build.add(count, one), two), build.sub(count, one)

        def make(known):
            with cgutils.for_range(build, build.udiv(build.add(length, ir.Constant(_I64, ROW - 1)), n)) as step:
                at = build.mul(step.index, n)
                at = build.select(build.icmp_signed("<", at, last), at, last)  # the last ones once more

                def term(pair):
                    row = build.mul(pair, two)
                    after = build.add(row, one)
                    after = build.select(build.icmp_signed("<", after, last_row), after, last_row)
                    a, b = (
                        _Vector(build, build.zext(build.load(_at(build, rows, _I8, place, ROW), align=1), wide))
                        for place in (build.add(build.mul(r, pitch), at) for r in (row, after))
                    )
                    w = _pair(build, weights, pair)
                    return [_products(a.chosen(b, lanes), w) for lanes in (_FIRST, _SECOND)]

                first, second = (v >> _SHIFT for v in _added(build, pairs, known, [_half(build)] * 2, term))
                build.store(_narrowed(first, second).as_(_I8).value, _at(build, out, _I8, at, ROW), align=1)

        _by_count(build, pairs, 3, make)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), codegen


@intrinsic
def mixed_columns(_, rows, pitch, first, weights, pairs, out, out_pitch, quads):
    """Pixels of two rows, weighted and added: :data:`QUAD` pixels of output at a time.

    Addresses of: rows uint8 [2, pitch], pixels of three bytes, 16 more may be read; first int64 [4 quads], the pixel from
    which on each output pixel takes some; weights int16 [4 quads, 2 pairs]; out uint8 [2, out_pitch], 4 more are written.
    """

    def codegen(context, build, _signature, arguments):
        rows, pitch, first, weights, pairs, out, out_pitch, quads = arguments
        rows, out, weights, first = (
            build.inttoptr(a, k.as_pointer()) for a, k in ((rows, _I8), (out, _I8), (weights, _I32), (first, _I64))
        )
        nothing = _Vector(build, ir.Constant(ir.VectorType(_I8, 32), [0] * 32))
        # of each row's 16 bytes the first two pixels', channel beside channel, as 16-bit numbers
        places = [(r, c, k) for r in range(2) for c in range(4) for k in range(2)]
        lanes = [lane for r, c, k in places for lane in (16 * r + c + 3 * k if c < 3 else 32, 32)]

        def pixel(quad, i, known):
            x = build.add(build.mul(quad, ir.Constant(_I64, QUAD)), ir.Constant(_I64, i))
            begin = build.mul(build.load(build.gep(first, [x])), ir.Constant(_I64, 3))
            table = build.mul(x, pairs if known is None else ir.Constant(_I64, known))

            def term(pair):
                at = build.add(begin, build.mul(pair, ir.Constant(_I64, 6)))
                a, b = (
                    _Vector(build, build.load(_at(build, rows, _I8, place, 16), align=1))
                    for place in (at, build.add(at, pitch))
                )
                spread = a.chosen(b, list(range(32))).chosen(nothing, lanes)
                x16 = _Vector(build, build.bitcast(spread.value, ir.VectorType(_I16, 16)))
                return [_products(x16, _pair(build, weights, build.add(table, pair)))]

            return _added(build, pairs, known, [_half(build)], term)[0] >> _SHIFT

        def make(known):
            with cgutils.for_range(build, quads) as quad:
                narrow = [pixel(quad.index, i, known) for i in range(QUAD)]
                # row by row, pixel by pixel, without every fourth byte
                left, right = _narrowed(*narrow[:2]), _narrowed(*narrow[2:])
                both = left.as_(_I8).chosen(right.as_(_I8), list(range(32)))
                to = build.mul(quad.index, ir.Constant(_I64, 3 * QUAD))
                for row in range(2):
                    line = [16 * (i // 6) + 8 * row + i % 6 // 3 * 4 + i % 3 if i < 12 else 3 for i in range(16)]
                    place = build.add(to, out_pitch) if row else to
                    build.store(both.chosen(both, line).value, _at(build, out, _I8, place, 16), align=1)

        _by_count(build, pairs, 3, make)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8), codegen
