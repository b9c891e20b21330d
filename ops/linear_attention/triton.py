"""Linear attention on a GPU: the kernels of `triton_forward.py` and `triton_backward.py` as torch custom ops.

Chunks are taken in parallel but for the states between them, which one kernel carries along (2405.21060, section 6;
2312.06635, section 4). Operands of products keep the inputs' type (float32 for float16, whose range unnormalised sums
leave), sums are float32.
"""

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from ops.dispatch import interpreting
from ops.linear_attention import triton_backward as backward
from ops.linear_attention import triton_forward as forward
from ops.linear_attention.step import step
from ops.precision import state_dtype
from ops.segments import marks

# (values a block, warps, stages). Every one is checked on a GPU; autotuning picks.
CONFIGS = [(64, 4, 2), (64, 8, 2), (32, 4, 2), (128, 8, 2)]
KEYS, FEW_KEYS = 64, 32  # channels of q and k a block; where a program would hold too many tiles
# Tokens a chunk. A decay a key channel costs log2(chunk) products of chunk · chunk · KEYS: shorter ones.
CHUNK, WIDE_CHUNK, INTERPRETED_CHUNK = 64, 32, 32
# exp() of these is exactly 0, and sums of a chunk of them stay small: a log decay below forgets everything. Not -inf,
# which a product with a mask of zeros would make NaN.
FLOOR = {torch.float32: -110.0, torch.float64: -750.0}
PROGRAMS = 256  # enough to fill a GPU: above that a program takes several heads of a group


def configs() -> list[triton.Config]:
    return [triton.Config({"BV": v}, num_warps=w, num_stages=s) for v, w, s in CONFIGS]


def _fitting(configs: list[triton.Config], arguments: dict, **options: Any) -> list[triton.Config]:
    """Blocks of values no wider than the values, and small ones alone for float32, which would not fit."""
    widest = max(32, triton.next_power_of_2(options["V"]))
    if arguments["X" if "X" in arguments else "W"].dtype == torch.float32:
        widest = min(widest, 64)
    return [each for each in configs if each.kwargs["BV"] <= widest]


# What a kernel's best configuration depends on; not the length, or every new one would tune.
_KEY = ["K", "V", "FORM", "HAS_BONUS", "HAS_MARK", "NORM"]
KERNELS = {
    kernel.__name__: triton.autotune(configs=configs(), key=_KEY, prune_configs_by={"early_config_prune": _fitting})(
        kernel
    )
    for kernel in (
        forward.pairs,
        forward.wide_pairs,
        forward.carry,
        forward.outputs,
        backward.pair_gradients,
        backward.value_gradients,
        backward.key_gradients,
    )
}


class _Sizes(NamedTuple):
    batch: int
    time: int
    heads: int
    repeats: int  # heads a group
    k_dim: int
    v_dim: int
    chunk: int
    chunks: int
    shared: int  # heads that have the same pairs
    parts: int  # of a group's heads, each a program


def _sizes(q: Tensor, v: Tensor, log_decay: Tensor | None, bonus: Tensor | None) -> _Sizes:
    batch, time, groups, k_dim = q.shape
    heads, v_dim = v.shape[2:]
    wide = log_decay is not None and log_decay.ndim == 4
    chunk = INTERPRETED_CHUNK if interpreting() else WIDE_CHUNK if wide else CHUNK
    chunk = max(16, min(chunk, triton.next_power_of_2(time)))
    chunks, repeats = triton.cdiv(time, chunk), heads // groups
    divisors = (each for each in range(1, repeats + 1) if repeats % each == 0)
    parts = next((each for each in divisors if batch * chunks * groups * each >= PROGRAMS), repeats)
    shared = repeats if log_decay is None and bonus is None else 1
    return _Sizes(batch, time, heads, repeats, k_dim, v_dim, chunk, chunks, shared, parts)


def _constants(sizes: _Sizes, dtype: torch.dtype, normalise: bool, **given: Tensor | None) -> dict[str, Any]:
    """The constants that every kernel takes; `dtype` of q, k and v, `given`: log_decay, bonus, mark."""
    exact = "ieee" if interpreting() or torch.version.hip is not None else "tf32x3"
    loose = exact == "tf32x3" and torch.backends.cuda.matmul.allow_tf32
    log_decay = given["log_decay"]
    return {
        "K": sizes.k_dim,
        "V": sizes.v_dim,
        "FORM": 0 if log_decay is None else log_decay.ndim,
        "HAS_BONUS": given["bonus"] is not None,
        "HAS_MARK": given["mark"] is not None,
        "NORM": normalise,
        "SUM": tl.float64 if dtype == torch.float64 else tl.float32,
        # Three tf32 products keep float32's accuracy on tensor cores; "ieee" would unroll every product.
        "PRECISION": "tf32" if loose else exact,
        "EXACT": exact,
        # Gradients of decays are as good as bfloat16 operands with one product, exponents are not.
        "SLOPE": "tf32" if loose or (exact == "tf32x3" and dtype == torch.bfloat16) else exact,
        "FLOOR": FLOOR[torch.promote_types(dtype, torch.float32)],
        "C": sizes.chunk,
        "BK": _block(sizes.k_dim, KEYS),
    }


def _block(size: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(size)))


def _launch(name: str, grid: Any, *arguments: Any, **constants: Any) -> None:
    kernel = KERNELS[name]
    if interpreting():
        kernel, constants = kernel.fn, constants | {"BV": _block(constants["V"], 64)}
    kernel[grid](*arguments, **constants)


def _device(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _rowwise(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The kernels read channels one after another; other strides are free."""
    return tuple(each if each.stride(-1) == 1 else each.contiguous() for each in tensors)


def triton_linear_attention(
    q: Float[Tensor, "batch time groups k_dim"],
    k: Float[Tensor, "batch time groups k_dim"],
    v: Float[Tensor, "batch time heads v_dim"],
    log_decay: Float[Tensor, "..."] | None = None,
    scale: float = 1.0,
    bonus: Float[Tensor, "heads k_dim"] | None = None,
    normalise: bool = False,
    eps: float = 1e-6,
    initial_state: Float[Tensor, "batch heads k_dim v_dim"] | None = None,
    initial_normaliser: Float[Tensor, "batch heads k_dim"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `ops.linear_attention`. Keeps the state before each chunk and the pairs within for the backward pass."""
    if q.shape[1] == 1:
        return step(
            q, k, v, log_decay, scale, bonus, normalise, eps, initial_state, initial_normaliser, segments
        )  # fmt: skip
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if state_dtype(q, k, v, log_decay, bonus, initial_state, initial_normaliser) == torch.float64:
        dtype = torch.float64
    elif dtype == torch.float16 or interpreting():
        dtype = torch.float32  # the interpreter holds bfloat16 as integers and would multiply those
    mark = None if segments is None else marks(segments)
    y, final, normaliser, *_ = _forward_op(
        q.to(dtype), k.to(dtype), v.to(dtype), log_decay, bonus, initial_state, initial_normaliser, mark,
        scale, eps, normalise,
    )  # fmt: skip
    return y.to(v.dtype), final, normaliser if normalise else None


@torch.library.custom_op("zoo::linear_attention_triton", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    initial: Tensor | None,
    initial_z: Tensor | None,
    mark: Tensor | None,
    scale: float,
    eps: float,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = _outputs(q, k, v, log_decay, bonus, initial, initial_z, mark, scale, eps, normalise)
    y, final, final_z, weight, seen, states, states_z = made
    sizes = _sizes(q, v, log_decay, bonus)
    constants = _constants(sizes, q.dtype, normalise, log_decay=log_decay, bonus=bonus, mark=mark)
    q, k, v = _rowwise(q, k, v)
    log_decay, bonus, initial, initial_z = (
        None if each is None else each.contiguous() for each in (log_decay, bonus, initial, initial_z)
    )
    log, u, marked = (q if each is None else each for each in (log_decay, bonus, mark))  # never read where absent
    b, t, h, r, n = sizes.batch, sizes.time, sizes.heads, sizes.repeats, sizes.chunks
    strides = (*q.stride()[:3], *k.stride()[:3])
    wide, ra = constants["FORM"] == 4, sizes.shared
    tiles = triton.cdiv(sizes.k_dim, constants["BK"])
    with _device(q):
        _launch("wide_pairs" if wide else "pairs", (n, b * h if wide else b * h // r * sizes.parts),
                q, k, log, u, marked, seen, *strides, t, n, h, r, ra, sizes.parts, scale, **constants)  # fmt: skip
        _launch("carry", lambda chosen: (tiles, triton.cdiv(sizes.v_dim, chosen["BV"]), b * h),
                k, v, log, marked, q, q if initial is None else initial, q if initial_z is None else initial_z,
                states, states_z, final, final_z, *k.stride()[:3], *v.stride()[:3], t, n, h, r, 1.0,
                HAS_FIRST=initial is not None, HAS_FIRSTZ=initial_z is not None, BACK=False, **constants)  # fmt: skip
        _launch("outputs", lambda chosen: (triton.cdiv(sizes.v_dim, chosen["BV"]), n, b * h),
                q, v, log, marked, seen, states, states_z, y, weight, *q.stride()[:3], *v.stride()[:3],
                t, n, h, r, ra, scale, eps, **constants)  # fmt: skip
    return made


@_forward_op.register_fake
def _outputs(q, k, v, log_decay, bonus, initial, initial_z, mark, scale, eps, normalise):
    sizes = _sizes(q, v, log_decay, bonus)
    b, t, h, k_dim, v_dim, n = sizes.batch, sizes.time, sizes.heads, sizes.k_dim, sizes.v_dim, sizes.chunks
    sums = torch.promote_types(q.dtype, torch.float32)
    z = 1 if normalise else 0  # buffers of the normaliser are empty without it
    return (
        v.new_empty(v.shape),
        v.new_empty(b, h, k_dim, v_dim, dtype=sums),
        v.new_empty(z * b, h, k_dim, dtype=sums),
        v.new_empty(z * b, t, h, dtype=sums),
        v.new_empty(b, n, h // sizes.shared, sizes.chunk, sizes.chunk),
        v.new_empty(b, n, h, k_dim, v_dim),
        v.new_empty(z * b, n, h, k_dim, dtype=sums),
    )


@torch.library.custom_op("zoo::linear_attention_triton_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    dfinal_z: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    mark: Tensor | None,
    y: Tensor | None,
    weight: Tensor,
    seen: Tensor,
    states: Tensor,
    states_z: Tensor,
    scale: float,
    eps: float,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sizes = _sizes(q, v, log_decay, bonus)
    b, t, h, r, n = sizes.batch, sizes.time, sizes.heads, sizes.repeats, sizes.chunks
    constants = _constants(sizes, q.dtype, normalise, log_decay=log_decay, bonus=bonus, mark=mark)
    ra, parts, tiles = sizes.shared, sizes.parts, triton.cdiv(sizes.k_dim, constants["BK"])
    few = _block(sizes.k_dim, FEW_KEYS if constants["FORM"] == 4 or q.dtype == torch.float32 else KEYS)
    few_tiles = triton.cdiv(sizes.k_dim, few)
    made = _buffers(sizes, few_tiles, q, log_decay, bonus, states, states_z)
    one = dy
    if normalise and y is not None:
        dy, one = _divided(dy, y, weight, eps)
    dy = dy.contiguous()
    q, k, v = _rowwise(q, k, v)
    log, u, marked = (q if each is None else each.contiguous() for each in (log_decay, bonus, mark))
    firsts = [dy if each is None else each.contiguous() for each in (dfinal, dfinal_z)]
    qs, ks, vs = (each.stride()[:3] for each in (q, k, v))
    with _device(q):
        _launch("carry", lambda chosen: (tiles, triton.cdiv(sizes.v_dim, chosen["BV"]), b * h),
                q, dy, log, marked, one, *firsts, made.states, made.states_z, made.initial, made.initial_z,
                *qs, *dy.stride()[:3], t, n, h, r, scale,
                HAS_FIRST=dfinal is not None, HAS_FIRSTZ=dfinal_z is not None, BACK=True, **constants)  # fmt: skip
        _launch("pair_gradients", (n, b * h),
                v, dy, log, marked, one, seen, made.seen, made.pairs, *vs, t, n, h, ra, scale, **constants)  # fmt: skip
        _launch("value_gradients", lambda chosen: (triton.cdiv(sizes.v_dim, chosen["BV"]), n, b * h),
                k, dy, log, marked, seen, made.states, made.v, *ks, t, n, h, r, ra, **constants)  # fmt: skip
        _launch("key_gradients", (few_tiles, n, b * h // r * parts),
                q, k, v, dy, log, u, marked, one, made.seen, states, states_z, made.states, made.states_z,
                made.q, made.k, made.log_decay, made.bonus, *qs, *ks, *vs, t, n, h, r, parts, scale, b,
                **constants | {"BK": few})  # fmt: skip
    dlog = q.new_empty(0) if log_decay is None else made.log_decay
    if log_decay is not None and log_decay.ndim < 4:
        dlog = _scalar_gradient(dlog.sum(0) + made.pairs, log_decay, mark)
    dbonus = q.new_empty(0) if bonus is None else made.bonus.sum((0, 1)).to(bonus.dtype)
    return made.q.sum(0).to(q.dtype), made.k.sum(0).to(k.dtype), made.v, dlog, dbonus, made.initial, made.initial_z


class _Gradients(NamedTuple):
    """What the backward kernels write."""

    states: Tensor
    states_z: Tensor
    seen: Tensor
    initial: Tensor
    initial_z: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    pairs: Tensor  # of one log decay a token: what comes of pairs within the chunks
    log_decay: Tensor
    bonus: Tensor


def _buffers(
    sizes: _Sizes,
    tiles: int,
    q: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    states: Tensor,
    states_z: Tensor,
) -> _Gradients:
    b, t, h, n, parts = sizes.batch, sizes.time, sizes.heads, sizes.chunks, sizes.parts
    sums = states_z.dtype
    scalar = log_decay is not None and log_decay.ndim < 4

    def new(*shape: int, dtype: torch.dtype = sums) -> Tensor:
        return q.new_empty(shape, dtype=dtype)

    dlog = new(tiles if scalar else 0, b, t, h)
    if log_decay is not None and not scalar:
        dlog = log_decay.new_empty(log_decay.shape)
    return _Gradients(
        states=torch.empty_like(states),
        states_z=torch.empty_like(states_z),
        seen=new(b, n, h, sizes.chunk, sizes.chunk),
        initial=new(b, h, sizes.k_dim, sizes.v_dim),
        initial_z=new(states_z.shape[0], h, sizes.k_dim),
        q=new(parts, *q.shape, dtype=q.dtype if parts == 1 else sums),
        k=new(parts, *q.shape, dtype=q.dtype if parts == 1 else sums),
        v=new(b, t, h, sizes.v_dim, dtype=q.dtype),
        pairs=new(b if scalar else 0, t, h),
        log_decay=dlog,
        bonus=new(b if bonus is not None else 0, n, h, sizes.k_dim),
    )


def _divided(dy: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of the sums that normalising divides, and of the one it divides by, from that of their quotient y."""
    safe = weight.clamp_min(eps)
    dy = dy.to(weight.dtype) / safe[..., None]
    return dy.to(y.dtype), torch.where(weight >= eps, -(dy * y).sum(-1), 0)


def _scalar_gradient(dlog: Tensor, log_decay: Tensor, mark: Tensor | None) -> Tensor:
    """0 where the decay is not the given number: at padding, starts and below the floor."""
    if mark is not None:
        dlog = torch.where((mark == 1)[..., None], dlog, 0)
    dlog = dlog.sum((0, 1)) if log_decay.ndim == 1 else dlog
    return torch.where(log_decay > FLOOR[dlog.dtype], dlog, 0).to(log_decay.dtype)


@_backward_op.register_fake
def _(dy, dfinal, dfinal_z, q, k, v, log_decay, bonus, mark, y, weight, seen, states, states_z, scale, eps, normalise):
    sums = weight.dtype
    dlog, dbonus = (q.new_empty(0) if each is None else each.new_empty(each.shape) for each in (log_decay, bonus))
    dinitial = states.new_empty(states.shape[0], *states.shape[2:], dtype=sums)
    dinitial_z = states_z.new_empty(states_z.shape[0], *states_z.shape[2:])
    return *(each.new_empty(each.shape) for each in (q, k, v)), dlog, dbonus, dinitial, dinitial_z


def _setup(ctx, inputs, output):
    q, k, v, log_decay, bonus, initial, initial_z, mark, *ctx.options = inputs
    y, _, _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if each is None else each.dtype for each in (initial, initial_z)]
    ctx.save_for_backward(q, k, v, log_decay, bonus, mark, y if ctx.options[2] else None, *kept)


def _backward(ctx, dy, dfinal, dfinal_z, *_):
    q, k, v, log_decay, bonus, *rest = ctx.saved_tensors
    dy = torch.zeros_like(v) if dy is None else dy
    dq, dk, dv, dlog, dbonus, dinitial, dinitial_z = _backward_op(
        dy, dfinal, dfinal_z if ctx.options[2] else None, q, k, v, log_decay, bonus, *rest, *ctx.options
    )
    dinitial, dinitial_z = (
        None if dtype is None else each.to(dtype)
        for dtype, each in zip(ctx.dtypes, (dinitial, dinitial_z), strict=True)
    )
    dlog, dbonus = None if log_decay is None else dlog, None if bonus is None else dbonus
    return dq, dk, dv, dlog, dbonus, dinitial, dinitial_z, None, None, None, None


torch.library.register_autograd(_forward_op, _backward, setup_context=_setup)
