"""Picks an implementation of an op and explains a refusal.

An op is one public function that checks its arguments and hands them, by name, to its `Op`. The `Op` holds the
implementations in order of preference, each with a function that says why it cannot take a call (None: it can).
`auto` takes the first that does not refuse; a forced implementation that refuses raises with its reason.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

LEAST = 1 << 17  # values: below, the call of one pass over memory takes longer than the pass

# Says why these arguments cannot be taken (None: they can). `forced` tells a call by name from `auto`.
Refusal = Callable[[Mapping[str, Any], bool], str | None]


class Implementation(NamedTuple):
    """One way to compute an op; `run` takes the op's arguments by name."""

    name: str
    run: Callable[..., Any]
    refuse: Refusal = lambda arguments, forced: None


class Explanation(NamedTuple):
    """What `ops.explain` returns: the implementation a call takes and why each other one before it was refused."""

    op: str
    chosen: str | None
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'no implementation'}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


class _Explained(BaseException):
    """Carries an explanation out of an op's public function. BaseException: no handler on the way may swallow it."""

    def __init__(self, explanation: Explanation):
        self.explanation = explanation


_explaining = False
_preferred: str | None = None


class Op:
    """An op's implementations, in order of preference."""

    def __init__(self, name: str, *implementations: Implementation):
        self.name = name
        self.implementations = implementations

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.implementations)

    def plan(self, impl: str, arguments: Mapping[str, Any]) -> Explanation:
        """Which implementation `impl` ("auto" or a name) means for these arguments, and who refused."""
        if impl != "auto" and impl not in self.names:
            raise ValueError(
                f"impl={impl!r} is not an implementation of {self.name}; choose from auto, {', '.join(self.names)}"
            )
        order = self.implementations
        if impl == "auto" and _preferred is not None:
            order = sorted(order, key=lambda each: each.name != _preferred)
        refused: dict[str, str] = {}
        for each in order:
            if impl not in ("auto", each.name):
                continue
            reason = each.refuse(arguments, impl != "auto" or each.name == _preferred)
            if reason is None:
                return Explanation(self.name, each.name, refused)
            refused[each.name] = reason
        return Explanation(self.name, None, refused)

    def __call__(self, impl: str, **arguments: Any) -> Any:
        plan = self.plan(impl, arguments)
        if _explaining:
            raise _Explained(plan)
        for each in self.implementations:
            if each.name == plan.chosen:
                return each.run(**arguments)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in plan.refused.items())
        raise RuntimeError(f"{self.name} cannot run with impl={impl!r}: {reasons}. impl='auto' picks one that can.")


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tell which implementation `op(*args, **kwargs)` takes and why others were refused, without running it.

    >>> print(ops.explain(ops.selective_scan, x, dt, A, B, C))
    """
    global _explaining
    _explaining = True
    try:
        op(*args, **kwargs)
    except _Explained as told:
        return told.explanation
    finally:
        _explaining = False
    raise TypeError(f"{op} is not an op of this library: it ran without asking for an implementation")


@contextlib.contextmanager
def use(implementation: str) -> Iterator[None]:
    """Let every `impl="auto"` inside take this implementation where an op has it and it can run; else auto's choice.

    For tests and debugging: `with ops.use("reference"): model(tokens)`.
    """
    global _preferred
    before, _preferred = _preferred, implementation
    try:
        yield
    finally:
        _preferred = before


def preferred() -> str | None:
    """The implementation that `use` asks for, None outside of it."""
    return _preferred


def tensors(arguments: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among an op's arguments, tuples of tensors included."""
    found: list[Tensor] = []
    for value in arguments.values():
        found += [each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, Tensor)]
    return found


def interpreting() -> bool:
    """Whether Triton runs under its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuse_triton(arguments: Mapping[str, Any], forced: bool) -> str | None:
    """Why Triton cannot take these tensors. Under the interpreter (tests) CPU tensors are taken when forced."""
    devices = {each.device.type for each in tensors(arguments)}
    if devices == {"cuda"}:
        if interpreting():
            return "TRITON_INTERPRET=1 is set, which runs kernels on the CPU"
    elif not (forced and interpreting() and devices == {"cpu"}):
        found = ", ".join(sorted(devices))
        return f"needs CUDA tensors, got {found} (TRITON_INTERPRET=1 runs it on CPU tensors, slowly, for tests)"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed; pip install triton"
    return None


def refuse_opaque(arguments: Mapping[str, Any]) -> str | None:
    """Why work that torch cannot look into, and that is no custom op either, cannot stand in these tensors' graph:
    where something traces, watches or replaces each operation."""
    if torch.compiler.is_compiling():
        return "is not for compiled graphs, which have their own kernels"
    for each in tensors(arguments):
        if type(each) not in (Tensor, torch.nn.Parameter):
            return f"takes plain tensors, got {type(each).__name__}"
    if _get_current_dispatch_mode() is not None:
        return "would be hidden from the dispatch mode that watches or replaces operations here"
    return refuse_transforms()


def refuse_few(arguments: Mapping[str, Any], values: int, forced: bool) -> str | None:
    """Why one compiled pass over so many values is not worth its call, or is none that torch could look into."""
    if values < LEAST and not forced:
        return f"gains nothing below {LEAST} values, got {values}"
    if not values:
        return "has nothing to do"
    return refuse_opaque(arguments)


def refuse_native_pass(arguments: Mapping[str, Any], values: int, forced: bool) -> str | None:
    """Why one pass of numba's over so many values cannot take these tensors: float32 or float64, all alike, on the CPU,
    and enough of them."""
    kinds = {each.dtype for each in tensors(arguments)}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.float64}:
        return f"takes float32 or float64, all alike, got {', '.join(sorted(map(str, kinds)))}"
    return refuse_few(arguments, values, forced) or refuse_native(arguments, forced)


def refuse_transforms() -> str | None:
    """Why a function with a backward of its own cannot be called here: torch.func and forward-mode differentiation want
    more of it."""
    stack = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    if stack is not None or forward_ad._current_level >= 0:
        return "is not for torch.func or forward-mode differentiation"
    return None


def refuse_native(arguments: Mapping[str, Any], forced: bool) -> str | None:
    """Why the numba implementation cannot take these tensors: it is for float32 and float64 on the CPU."""
    for each in tensors(arguments):
        if each.device.type != "cpu":
            return f"runs on the CPU, got {each.device.type} tensors"
        if each.is_floating_point() and each.dtype == torch.float16:
            return "float16 is not supported on the CPU; use bfloat16 or float32"
    try:
        import numba  # noqa: F401
    except ImportError:
        return "numba is not installed; pip install numba"
    return None
