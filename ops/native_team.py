"""Torch's OpenMP team inside compiled kernels: a kernel of one token shares out the reading of its weights without a
way back through Python, which would take longer than most of those products.

A kernel describes a job in an array of 64-bit numbers (addresses, sizes, and the next piece in the last place), and
every thread of the team takes pieces of it till none is left. What they run is a C callback of numba's; kernels know it
by the name of a symbol, so that they can be kept on disk.
"""

import ctypes
from typing import Any, cast

import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ops import native_threads

_GATE = "zoo_team"


def threads() -> int:
    """How many threads a kernel may ask for: torch's, where there is a team to lend them."""
    if native_threads._forked or native_threads._parallel() is None:
        return 1
    return torch.get_num_threads()


def team(symbol: str, callback: Any) -> Any:
    """A function for kernels: call `callback` (numba's cfunc of one intp) with a job's address on so many threads, this
    one among them, and return when all have. `symbol`: a name of its own in the process. One thread runs the same
    code, with a team or without."""
    binding.add_symbol(symbol, callback.address)
    parallel = native_threads._parallel()
    # Without a team the name has to stand for something, but no kernel comes to use it: see `threads`.
    gate = callback.address if parallel is None else ctypes.cast(cast(Any, parallel), ctypes.c_void_p).value
    binding.add_symbol(_GATE, gate)

    @intrinsic
    def on_all(typing_context: Any, job: Any, count: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word, number = context.get_value_type(types.intp), ir.IntType(32)
            work = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [word]), symbol)
            kind = ir.FunctionType(ir.VoidType(), [word, word, number, number])
            parallel = cgutils.get_or_insert_function(builder.module, kind, _GATE)
            asked = builder.trunc(arguments[1], number)
            alone = builder.icmp_signed("==", asked, ir.Constant(number, 1))
            with builder.if_else(alone) as (here, together):
                with here:
                    builder.call(work, [arguments[0]])
                with together:
                    builder.call(parallel, [builder.ptrtoint(work, word), arguments[0], asked, ir.Constant(number, 0)])
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), codegen

    return on_all


@intrinsic
def _take(typing_context: Any, address: Any) -> Any:

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        place = builder.inttoptr(arguments[0], word.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(word, 1), "monotonic")

    return types.int64(types.intp), codegen


# For kernels: the number at an address, which becomes greater by one, for one thread at a time.
take: Any = _take


def _pointer(kind: Any) -> Any:
    @intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(kind)))

        return types.CPointer(kind)(types.intp), codegen

    return pointer


# Addresses as what they are of, for numba's carray.
floats, halves, words = _pointer(types.float32), _pointer(types.int16), _pointer(types.int64)
