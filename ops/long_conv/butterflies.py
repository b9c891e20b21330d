"""The butterflies of a fast Fourier transform over LANES channels side by side, as vector instructions.

Written as LLVM's vectors: a loop over lanes that reads and writes several rows of one array is not vectorised, since
the compiler cannot know that the rows are apart.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
Complex = tuple[Any, Any]


class _Vectors:
    """Arithmetic on complex numbers in vectors of LANES lanes."""

    def __init__(self, builder: Any, kind: Any):
        self.builder, self.kind = builder, ir.VectorType(kind, LANES)
        self.flags = ("contract", "nsz")

    def splat(self, scalar: Any) -> Any:
        first = self.builder.insert_element(
            ir.Constant(self.kind, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
        )
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return self.builder.shuffle_vector(first, ir.Constant(self.kind, ir.Undefined), lanes)

    def number(self, value: float) -> Any:
        return ir.Constant(self.kind, [value] * LANES)

    def plus(self, a: Complex, b: Complex) -> Complex:
        return tuple(self.builder.fadd(x, y, flags=self.flags) for x, y in zip(a, b, strict=True))  # pyright: ignore

    def minus(self, a: Complex, b: Complex) -> Complex:
        return tuple(self.builder.fsub(x, y, flags=self.flags) for x, y in zip(a, b, strict=True))  # pyright: ignore

    def scaled(self, a: Complex, factor: Any) -> Complex:
        return tuple(self.builder.fmul(x, factor, flags=self.flags) for x in a)  # pyright: ignore

    def turned(self, a: Complex, inverse: bool) -> Complex:
        """-i a, or i a."""
        real, imaginary = a
        negative = self.builder.fneg(imaginary if inverse else real)
        return (negative, real) if inverse else (imaginary, negative)

    def times(self, a: Complex, cos: Any, sin: Any, inverse: bool) -> Complex:
        """a e^(-iθ), or a e^(iθ)."""
        build, flags = self.builder, self.flags
        (x, y), one, two = a, build.fmul, build.fadd if not inverse else build.fsub
        three = build.fsub if not inverse else build.fadd
        real = two(one(x, cos, flags=flags), one(y, sin, flags=flags), flags=flags)
        return real, three(one(y, cos, flags=flags), one(x, sin, flags=flags), flags=flags)

    def transform(self, x: list[Complex], inverse: bool) -> list[Complex]:
        """The discrete Fourier transform of 2, 3 or 4 numbers."""
        if len(x) == 2:
            return [self.plus(*x), self.minus(*x)]
        if len(x) == 3:
            both = self.plus(x[1], x[2])
            middle = self.minus(x[0], self.scaled(both, self.number(0.5)))
            apart = self.turned(self.scaled(self.minus(x[1], x[2]), self.number(0.8660254037844386)), inverse)
            return [self.plus(x[0], both), self.plus(middle, apart), self.minus(middle, apart)]
        a, b, c = self.plus(x[0], x[2]), self.minus(x[0], x[2]), self.plus(x[1], x[3])
        d = self.turned(self.minus(x[1], x[3]), inverse)
        return [self.plus(a, c), self.plus(b, d), self.minus(a, c), self.minus(b, d)]


def _butterfly(radix: int, inverse: bool) -> Callable[..., Any]:
    @intrinsic
    def butterfly(typing_context: Any, real: Any, imaginary: Any, rows: Any, factors: Any) -> Any:
        """In place on `rows` (row r is at LANES · r) of the arrays: a transform of them, and behind it (before it,
        where inverse) products with e^(-iθ) (e^(iθ)); factors: cos and sin of θ for all rows but the first."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = context.get_value_type(signature.args[0].dtype)
            vectors = _Vectors(builder, kind)
            bases = [
                context.make_array(each)(context, builder, given).data
                for each, given in zip(signature.args[:2], arguments[:2], strict=True)
            ]
            width = ir.Constant(ir.IntType(64), LANES)
            starts = [builder.mul(row, width) for row in cgutils.unpack_tuple(builder, arguments[2])]
            places = [
                tuple(builder.bitcast(builder.gep(base, [start]), ir.PointerType(vectors.kind)) for base in bases)
                for start in starts
            ]
            size = context.get_abi_sizeof(kind)
            x = [tuple(builder.load(place, align=size, typ=vectors.kind) for place in pair) for pair in places]
            splats = [vectors.splat(each) for each in cgutils.unpack_tuple(builder, arguments[3])]
            turns = list(zip(splats[::2], splats[1::2], strict=True))
            if inverse:
                x = [x[0]] + [vectors.times(a, *turn, True) for a, turn in zip(x[1:], turns, strict=True)]
            y = vectors.transform(x, inverse)
            if not inverse:
                y = [y[0]] + [vectors.times(a, *turn, False) for a, turn in zip(y[1:], turns, strict=True)]
            for pair, values in zip(places, y, strict=True):
                for place, value in zip(pair, values, strict=True):
                    builder.store(value, place, align=size)
            return context.get_dummy_value()

        return types.none(real, imaginary, rows, factors), codegen

    return butterfly


two, three, four = (_butterfly(radix, False) for radix in (2, 3, 4))
two_back, three_back, four_back = (_butterfly(radix, True) for radix in (2, 3, 4))
