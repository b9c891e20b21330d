"""The delta rule on a GPU: the kernels of `triton_kernels.py` as torch custom ops, and the products around them.

As `chunked.py`, from which it differs in what is a kernel: the pairs within a chunk, the inverse of its triangular
system, and the states carried from chunk to chunk, forward and backward. All other products are torch's, batched.
Operands of products keep the inputs' type (float32 for float16, whose range unnormalised sums leave); sums, exponents
and the systems are float32.
"""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ops.delta_rule import triton_kernels as kernels
from ops.delta_rule.chunked import split
from ops.delta_rule.common import Rule, make_rule
from ops.delta_rule.step import step
from ops.dispatch import interpreting
from ops.precision import full_precision, state_dtype

# Every one is checked on a GPU; autotuning picks.
CHUNK_CONFIGS = [(4, 2), (8, 2), (4, 1)]  # (warps, stages)
CARRY_CONFIGS = [(32, 4, 2), (64, 4, 2), (64, 8, 1), (32, 8, 1), (16, 4, 1)]  # (values a block, warps, stages)
KEYS, FEW_KEYS = 64, 32  # channels of readers and writers a block; where a program holds too many tiles
# Tokens a chunk. A decay a key channel costs log2(chunk) products a pair of readers and writers; float32 is large.
CHUNK, SMALL_CHUNK = 64, 32
# exp() of these is exactly 0, and sums of a chunk of them stay small: a log decay below forgets everything. Not -inf,
# which a product with a mask of zeros would make NaN.
FLOOR = {torch.float32: -110.0, torch.float64: -750.0}

_KEY = ["K", "V", "FORM", "EXTRA"]  # what a best configuration depends on; not the length, or every new one would tune


def _chunk_configs() -> list[triton.Config]:
    return [triton.Config({}, num_warps=w, num_stages=s) for w, s in CHUNK_CONFIGS]


def _carry_configs() -> list[triton.Config]:
    return [triton.Config({"BV": v}, num_warps=w, num_stages=s) for v, w, s in CARRY_CONFIGS]


def _fitting(configs: list[triton.Config], arguments: dict, **options: Any) -> list[triton.Config]:
    """Blocks of values no wider than the values, and such as the state of float32, or of many keys, fits a program."""
    wide = options["BK"] > 128 or (arguments["READ"].dtype == torch.float32 and options["BK"] > 64)
    widest = min(16 if wide and arguments["READ"].dtype == torch.float32 else 32 if wide else 64,
                 max(16, triton.next_power_of_2(options["V"])))  # fmt: skip
    return [each for each in configs if each.kwargs["BV"] <= widest]


KERNELS = {
    "pairs": triton.autotune(configs=_chunk_configs(), key=_KEY[:1] + _KEY[2:])(kernels.pairs),
    "pair_gradients": triton.autotune(configs=_chunk_configs(), key=_KEY[:1] + _KEY[2:])(kernels.pair_gradients),
    "invert": triton.autotune(configs=_chunk_configs(), key=["C"])(kernels.invert),
    "carry": triton.autotune(
        configs=_carry_configs(), key=[*_KEY, "BACK"], prune_configs_by={"early_config_prune": _fitting}
    )(kernels.carry),
}


def _launch(name: str, grid: Any, *arguments: Any, **constants: Any) -> None:
    kernel = KERNELS[name]
    if interpreting():
        kernel, constants = kernel.fn, constants | ({"BV": _block(constants["V"], 64)} if name == "carry" else {})
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **constants)


def _block(size: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(size)))


def _constants(like: Tensor, log_decay: Tensor | None) -> dict[str, Any]:
    """The constants of products and sums; `like`: one of their operands."""
    exact = "ieee" if interpreting() or torch.version.hip is not None else "tf32x3"
    loose = exact == "tf32x3" and torch.backends.cuda.matmul.allow_tf32
    sums = torch.promote_types(like.dtype, torch.float32)
    return {
        "FORM": 0 if log_decay is None else 1 if log_decay.shape[-1] == 1 else 2,
        "SUM": tl.float64 if sums == torch.float64 else tl.float32,
        # Three tf32 products keep float32's accuracy on tensor cores; "ieee" would unroll every product.
        "PRECISION": "tf32" if loose else exact,
        "EXACT": exact,
        # Gradients of decays are as good as bfloat16 operands with one product, exponents are not.
        "SLOPE": "tf32" if loose or (exact == "tf32x3" and like.dtype == torch.bfloat16) else exact,
        "FLOOR": FLOOR[sums],
    }


def triton_delta_rule(
    q: Float[Tensor, "batch time groups k_dim"],
    k: Float[Tensor, "batch time groups k_dim"],
    v: Float[Tensor, "batch time heads v_dim"],
    beta: Float[Tensor, "batch time heads"] | None = None,
    log_decay: Float[Tensor, "..."] | None = None,
    erase: tuple[Float[Tensor, "batch time heads k_dim"], Float[Tensor, "batch time heads k_dim"]] | None = None,
    scale: float = 1.0,
    initial_state: Float[Tensor, "batch heads k_dim v_dim"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
) -> tuple[Float[Tensor, "batch time heads v_dim"], Float[Tensor, "batch heads k_dim v_dim"]]:
    """See `ops.delta_rule`. Keeps the state before each chunk and the pairs within for the backward pass."""
    if q.shape[1] == 1:
        return step(q, k, v, beta, log_decay, erase, scale, initial_state, segments)
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    sums = state_dtype(q, k, v, beta, log_decay, initial_state, *(erase or ()))
    if sums == torch.float64:
        dtype = torch.float64
    elif dtype == torch.float16 or interpreting():
        dtype = torch.float32  # the interpreter holds bfloat16 as integers and would multiply those
    with full_precision(v.device):
        rule = make_rule(q, k, v, beta, log_decay, erase, scale, segments, dtype, sums)
        batch, time, heads, _ = v.shape
        if rule.log_decay is not None:
            rule = rule._replace(log_decay=rule.log_decay.expand(batch, time, heads, -1))
        wide = rule.log_decay is not None and rule.log_decay.shape[-1] > 1
        chunk = SMALL_CHUNK if wide or dtype != torch.bfloat16 else CHUNK
        chunk = max(16, min(chunk, triton.next_power_of_2(time)))
        y, state = _chunks(split(rule, chunk), initial_state)
        y = rearrange(y, "n b h c v -> b (n c) h v")[:, :time]
    return y.to(v.dtype), state


def _chunks(rule: Rule, state: Tensor | None) -> tuple[Float[Tensor, "n b h c v"], Float[Tensor, "b h k v"]]:
    """y and the final state; see `chunked.meet`, with the inverse of the system instead of its solution."""
    dtype = rule.q.dtype
    readers = torch.stack([rule.q, rule.a])
    writers = torch.stack([rule.b] if rule.k is None else [rule.b, rule.k])
    log_decay = None if rule.log_decay is None else rule.log_decay.contiguous()
    system, seen = _pairs_op(readers, writers, log_decay)
    inverse = _invert_op(system).to(dtype)
    total = None
    if log_decay is not None:
        read, keep, total = _sums(log_decay)
        readers, writers = (readers * read).to(dtype), (writers * keep).to(dtype)
    w, own, more = rule.w, None, None
    if rule.v is not None and rule.qk is not None:
        w, own, more = seen[2] @ rule.v, rule.qk.to(dtype) * rule.v, writers[1]
        own = own + seen[1] @ rule.v
    assert w is not None
    u, states, final = _carry_op(
        inverse @ readers[1], inverse @ w, writers[0].contiguous(), total, more,
        None if rule.v is None else rule.v.contiguous(), None if state is None else state.to(system.dtype),
    )  # fmt: skip
    y = (seen[0] + torch.diag_embed(rule.qb.squeeze(-1)).to(dtype)) @ u + readers[0] @ states
    return y if own is None else y + own, final


def _sums(log_decay: Float[Tensor, "n b h c d"]) -> tuple[Tensor, Tensor, Float[Tensor, "n b h d 1"]]:
    """Decays of a chunk's start until before each token, from behind each token to the end, and of all. Each sum adds
    up just these numbers, of one sign; none is a difference."""
    nothing = torch.zeros_like(log_decay[..., :1, :])
    read = torch.cat([nothing, log_decay[..., :-1, :]], -2).cumsum(-2)
    keep = torch.cat([nothing, log_decay[..., 1:, :].flip(-2)], -2).cumsum(-2).flip(-2)
    return read.exp(), keep.exp(), log_decay.sum(-2).exp()[..., None]


# Pairs ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("zoo::delta_rule_pairs_triton", mutates_args=())
def _pairs_op(readers: Tensor, writers: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor]:
    system, seen = made = _pairs_fake(readers, writers, log_decay)
    c, k = readers.shape[-2:]
    m = system.numel() // (c * c)
    _launch(
        "pairs", (m, 2 * len(writers)), readers.contiguous(), writers.contiguous(),
        readers if log_decay is None else log_decay.contiguous(), system, seen, m,
        K=k, EXTRA=len(writers) == 2, C=c, BK=_block(k, KEYS), **_constants(readers, log_decay),
    )  # fmt: skip
    return made


@_pairs_op.register_fake
def _pairs_fake(readers, writers, log_decay):
    shape, c = readers.shape[1:-1], readers.shape[-2]
    sums = torch.promote_types(readers.dtype, torch.float32)
    return readers.new_empty(*shape, c, dtype=sums), readers.new_empty(2 * len(writers) - 1, *shape, c)


@torch.library.custom_op("zoo::delta_rule_pairs_triton_backward", mutates_args=())
def _pairs_backward_op(
    dsystem: Tensor, dseen: Tensor, readers: Tensor, writers: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dreaders, dwriters = (torch.empty_like(e, memory_format=torch.contiguous_format) for e in (readers, writers))
    c, k = readers.shape[-2:]
    m, block = readers.numel() // (2 * c * k), _block(k, 16 if readers.dtype == torch.float32 else FEW_KEYS)
    tiles = triton.cdiv(k, block)
    dlog = dsystem.new_empty(0)
    if log_decay is not None:
        dlog = dsystem.new_empty(*([tiles] if log_decay.shape[-1] == 1 else []), *log_decay.shape)
    _launch(
        "pair_gradients", (m, tiles), readers.contiguous(), writers.contiguous(),
        readers if log_decay is None else log_decay.contiguous(), dsystem.contiguous(), dseen.contiguous(),
        dreaders, dwriters, dlog, m,
        K=k, EXTRA=len(writers) == 2, C=c, BK=block, **_constants(readers, log_decay),
    )  # fmt: skip
    if log_decay is not None and log_decay.shape[-1] == 1:
        dlog = dlog.sum(0)
    return dreaders, dwriters, dlog


@_pairs_backward_op.register_fake
def _(dsystem, dseen, readers, writers, log_decay):
    dlog = dsystem.new_empty(0 if log_decay is None else log_decay.shape)
    return readers.new_empty(readers.shape), writers.new_empty(writers.shape), dlog


def _pairs_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _pairs_backward(ctx, dsystem, dseen):
    readers, writers, log_decay = ctx.saved_tensors
    dreaders, dwriters, dlog = _pairs_backward_op(dsystem, dseen, readers, writers, log_decay)
    return dreaders, dwriters, None if log_decay is None else dlog


torch.library.register_autograd(_pairs_op, _pairs_backward, setup_context=_pairs_setup)


# The inverse of a chunk's system -------------------------------------------------------------------------------


@torch.library.custom_op("zoo::delta_rule_invert_triton", mutates_args=())
def _invert_op(system: Tensor) -> Tensor:
    inverse, c = torch.empty_like(system), system.shape[-1]
    constants = {name: each for name, each in _constants(system, None).items() if name in ("SUM", "EXACT")}
    _launch("invert", (system.numel() // (c * c),), system, inverse, C=c, **constants)
    return inverse


@_invert_op.register_fake
def _(system):
    return torch.empty_like(system)


def _invert_setup(ctx, inputs, output):
    ctx.save_for_backward(output)


def _invert_backward(ctx, gradient):
    (inverse,) = ctx.saved_tensors
    return (inverse.mT @ gradient @ inverse.mT).tril(-1)


torch.library.register_autograd(_invert_op, _invert_backward, setup_context=_invert_setup)


# States from chunk to chunk ------------------------------------------------------------------------------------


def _walk(
    read: Tensor,
    new: Tensor,
    write: Tensor,
    total: Tensor | None,
    more: Tensor | None,
    values: Tensor | None,
    first: Tensor | None,
    back: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel `carry`."""
    made = u, states, last = _walk_fake(read, new, write)
    n, batch, heads, c, k = read.shape
    v = new.shape[-1]
    constants = _constants(read, None if total is None else total.mT)
    constants = {name: constants[name] for name in ("FORM", "SUM", "PRECISION")}
    _launch(
        "carry", lambda chosen: (triton.cdiv(v, chosen["BV"]), batch * heads),
        read, new, write, *(read if each is None else each for each in (total, more, values, first)), u, states, last,
        n, batch * heads, K=k, V=v, EXTRA=more is not None, HAS_FIRST=first is not None, BACK=back, C=c,
        BK=max(16, triton.next_power_of_2(k)), **constants,
    )  # fmt: skip
    return made


def _walk_fake(read: Tensor, new: Tensor, write: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.promote_types(read.dtype, torch.float32)
    size = read.shape[-1], new.shape[-1]
    states = new.new_empty(*new.shape[:3], *size)
    return torch.empty_like(new), states, new.new_empty(*new.shape[1:3], *size, dtype=sums)


@torch.library.custom_op("zoo::delta_rule_carry_triton", mutates_args=())
def _carry_op(
    read: Tensor,
    new: Tensor,
    write: Tensor,
    total: Tensor | None,
    more: Tensor | None,
    values: Tensor | None,
    first: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    given = (None if each is None else each.contiguous() for each in (read, new, write, total, more, values, first))
    return _walk(*given, back=False)  # pyright: ignore[reportArgumentType]


@_carry_op.register_fake
def _(read, new, write, total, more, values, first):
    return _walk_fake(read, new, write)


@torch.library.custom_op("zoo::delta_rule_carry_triton_backward", mutates_args=())
def _carry_backward_op(
    du: Tensor, dstates: Tensor, dlast: Tensor, read: Tensor, write: Tensor, total: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    given = (None if each is None else each.contiguous() for each in (write, du, read, total, None, dstates, dlast))
    return _walk(*given, back=True)  # pyright: ignore[reportArgumentType]


@_carry_backward_op.register_fake
def _(du, dstates, dlast, read, write, total):
    return _walk_fake(read, du, write)


def _carry_setup(ctx, inputs, output):
    read, _, write, total, more, values, first = inputs
    u, states, _ = output
    ctx.first = None if first is None else first.dtype
    ctx.save_for_backward(read, write, total, more, values, u, states)


def _carry_backward(ctx, du, dstates, dlast):
    read, write, total, more, values, u, states = ctx.saved_tensors
    du, behind, dfirst = _carry_backward_op(du, dstates, dlast, read, write, total)
    dtotal = dmore = dvalues = None
    if total is not None:
        dtotal = (states.to(dfirst.dtype) * behind).sum(-1, keepdim=True).sum_to_size(total.shape)
    if more is not None and values is not None:
        dmore, dvalues = values @ behind.mT, more @ behind
    return (
        du @ states.mT, du, u @ behind.mT, dtotal, dmore, dvalues, None if ctx.first is None else dfirst.to(ctx.first)
    )  # fmt: skip


torch.library.register_autograd(_carry_op, _carry_backward, setup_context=_carry_setup)
