"""What reads a weight for one token, as vector instructions that ask for memory ahead of them.

Where one token's products go as fast as memory is read, asking for what lies a page further on reads by a quarter to
three quarters more (2 threads of an Emerald Rapids; rows of 512 to 1408), and compilers have no way to say so in a
loop that they turn into vector instructions themselves. So these loops are written in LLVM's language, for kernels.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # numbers a vector: two instructions where the machine has shorter ones
VECTORS = 2  # at once, as one addition takes as long as several instructions
AHEAD = 4096  # bytes
_LINE = 64  # bytes that memory hands over at once
_FUSED = ["contract"]

_FLOAT, _WORD, _SHORT, _BYTES = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
_VECTOR = ir.VectorType(_FLOAT, LANES)


class _Writer:
    """Writes into a kernel under compilation."""

    def __init__(self, builder: Any):
        self.builder = builder

    def at(self, address: Any, offset: int) -> Any:
        return self.builder.add(address, ir.Constant(_WORD, offset)) if offset else address

    def element(self, address: Any, index: Any) -> Any:
        return self.builder.add(address, self.builder.mul(index, ir.Constant(_WORD, 4)))

    def read(self, address: Any, kind: Any) -> Any:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=4)

    def write(self, value: Any, address: Any, kind: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, kind.as_pointer()), align=4)

    def fused(self, a: Any, b: Any, c: Any) -> Any:
        """a · b + c."""
        return self.builder.fadd(self.builder.fmul(a, b, flags=_FUSED), c, flags=_FUSED)

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, arguments), name)

    def ask(self, address: Any) -> None:
        """For what the next numbers' place holds AHEAD of it."""
        prefetch = self.function("llvm.prefetch.p0i8", ir.VoidType(), _BYTES, _SHORT, _SHORT, _SHORT)
        for line in range(0, 4 * LANES * VECTORS, _LINE):
            place = self.builder.inttoptr(self.at(address, AHEAD + line), _BYTES)
            # To be read, and kept in all caches; of data.
            self.builder.call(prefetch, [place, *(ir.Constant(_SHORT, each) for each in (0, 3, 1))])

    def sum(self, vector: Any) -> Any:
        add = self.function(f"llvm.vector.reduce.fadd.v{LANES}f32", _FLOAT, _FLOAT, _VECTOR)
        return self.builder.call(add, [ir.Constant(_FLOAT, 0.0), vector], fastmath=["reassoc"])

    def everywhere(self, number: Any) -> Any:
        """A vector of one number."""
        nothing = ir.Constant(_VECTOR, ir.Undefined)
        first = self.builder.insert_element(nothing, number, ir.Constant(_SHORT, 0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_SHORT, LANES), [0] * LANES))

    def whole(self, count: Any) -> tuple[Any, Any]:
        """How many times all vectors are full, and how many numbers that takes."""
        step = ir.Constant(_WORD, LANES * VECTORS)
        times = self.builder.udiv(count, step)
        return times, self.builder.mul(times, step)


def dots(streams: int, rows: int) -> Any:
    """A function for kernels: (weight, apart, x, x_apart, count) -> the dot products of `streams` rows of a weight
    with `rows` of x, each of `count` float32: those of the first row of the weight, then of the next.

    weight, x: addresses of the first rows; apart, x_apart: bytes from one to the next. A product is summed in the same
    order whatever is computed beside it.
    """

    @intrinsic
    def compute(typing_context: Any, weight: Any, apart: Any, x: Any, x_apart: Any, count: Any) -> Any:
        result = types.UniTuple(types.float32, streams * rows)

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weight, apart, x, x_apart, count = arguments
            out = _Writer(builder)
            firsts = [builder.add(weight, builder.mul(apart, ir.Constant(_WORD, each))) for each in range(streams)]
            others = [builder.add(x, builder.mul(x_apart, ir.Constant(_WORD, each))) for each in range(rows)]
            pairs = [(first, other) for first in range(streams) for other in range(rows)]
            zero = ir.Constant(_VECTOR, [0.0] * LANES)
            sums = {
                (*pair, vector): cgutils.alloca_once_value(builder, zero) for pair in pairs for vector in range(VECTORS)
            }
            times, done = out.whole(count)
            with cgutils.for_range(builder, times) as loop:
                start = builder.mul(loop.index, ir.Constant(_WORD, 4 * LANES * VECTORS))
                read = [
                    [out.read(out.at(builder.add(each, start), 4 * LANES * v), _VECTOR) for v in range(VECTORS)]
                    for each in others
                ]
                for first, row in enumerate(firsts):
                    place = builder.add(row, start)
                    out.ask(place)
                    for v in range(VECTORS):
                        numbers = out.read(out.at(place, 4 * LANES * v), _VECTOR)
                        for other in range(rows):
                            total = sums[first, other, v]
                            builder.store(out.fused(numbers, read[other][v], builder.load(total)), total)
            products = []
            for first, other in pairs:
                total = builder.load(sums[first, other, 0])
                for v in range(1, VECTORS):
                    total = builder.fadd(total, builder.load(sums[first, other, v]))
                product = cgutils.alloca_once_value(builder, out.sum(total))
                with cgutils.for_range(builder, builder.sub(count, done)) as loop:
                    index = builder.add(done, loop.index)
                    a = out.read(out.element(firsts[first], index), _FLOAT)
                    b = out.read(out.element(others[other], index), _FLOAT)
                    builder.store(out.fused(a, b, builder.load(product)), product)
                products.append(builder.load(product))
            return context.make_tuple(builder, signature.return_type, products)

        return result(types.intp, types.intp, types.intp, types.intp, types.intp), codegen

    return compute


def add_rows(streams: int) -> Any:
    """A function for kernels: (y, rows, apart, factors, count) adds Σ factor · row of `streams` rows, each of `count`
    float32, to y. y, rows: addresses; apart: bytes from one row to the next; factors: a tuple of `streams`."""

    @intrinsic
    def compute(typing_context: Any, y: Any, rows: Any, apart: Any, factors: Any, count: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            y, rows, apart, factors, count = arguments
            out = _Writer(builder)
            places = [builder.add(rows, builder.mul(apart, ir.Constant(_WORD, each))) for each in range(streams)]
            single = cgutils.unpack_tuple(builder, factors, streams)
            spread = [out.everywhere(each) for each in single]
            times, done = out.whole(count)
            with cgutils.for_range(builder, times) as loop:
                start = builder.mul(loop.index, ir.Constant(_WORD, 4 * LANES * VECTORS))
                target = builder.add(y, start)
                now = [builder.add(each, start) for each in places]
                for each in now:
                    out.ask(each)
                for v in range(VECTORS):
                    here = out.at(target, 4 * LANES * v)
                    total = out.read(here, _VECTOR)
                    for factor, place in zip(spread, now, strict=True):
                        total = out.fused(factor, out.read(out.at(place, 4 * LANES * v), _VECTOR), total)
                    out.write(total, here, _VECTOR)
            with cgutils.for_range(builder, builder.sub(count, done)) as loop:
                index = builder.add(done, loop.index)
                here = out.element(y, index)
                total = out.read(here, _FLOAT)
                for factor, place in zip(single, places, strict=True):
                    total = out.fused(factor, out.read(out.element(place, index), _FLOAT), total)
                out.write(total, here, _FLOAT)
            return context.get_dummy_value()

        tuples = types.UniTuple(types.float32, streams)
        return types.void(types.intp, types.intp, types.intp, tuples, types.intp), codegen

    return compute
