"""Linear attention: a matrix state a head, summed over outer products of keys and values, with any of four decays.

Linear Transformer (2006.16236), Performer, RFA and PolySketch have none, RetNet (2307.08621) one a head, Mamba-2
(2405.21060) one a head and step, GLA (2312.06635), RWKV-6 (2404.05892) and HGRN2 one a key channel and step.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ops import segments as seg
from ops.dispatch import Implementation, Op, refuse_native, refuse_triton, tensors

Result = tuple[Tensor, Tensor, Tensor | None]


def _refuse_triton(arguments: Mapping[str, Any], forced: bool) -> str | None:
    if arguments["v"].is_cuda and any(each.dtype == torch.float64 for each in tensors(arguments)):
        return "takes float64 under the interpreter alone; use chunked, or float32"
    return refuse_triton(arguments, forced)


def _refuse_native(arguments: Mapping[str, Any], forced: bool) -> str | None:
    if not forced and (arguments["log_decay"] is None or arguments["q"].shape[1] == 1):
        return "differs from chunked for several tokens with a decay alone"
    return refuse_native(arguments, forced)


def _reference(**arguments: Any) -> Result:
    from ops.linear_attention.reference import reference

    return reference(**arguments)


def _chunked(**arguments: Any) -> Result:
    from ops.linear_attention.chunked import chunked

    return chunked(**arguments)


def _native(**arguments: Any) -> Result:
    from ops.linear_attention.native import native

    return native(**arguments)


def _triton(**arguments: Any) -> Result:
    from ops.linear_attention.triton import triton_linear_attention

    return triton_linear_attention(**arguments)


_OP = Op(
    "linear_attention",
    Implementation("triton", _triton, _refuse_triton),
    Implementation("native", _native, _refuse_native),
    Implementation("chunked", _chunked),
    Implementation("reference", _reference),
)


def linear_attention(
    q: Float[Tensor, "batch time groups k_dim"],
    k: Float[Tensor, "batch time groups k_dim"],
    v: Float[Tensor, "batch time heads v_dim"],
    log_decay: Float[Tensor, "..."] | None = None,
    *,
    scale: float = 1.0,
    bonus: Float[Tensor, "heads k_dim"] | None = None,
    normalise: bool = False,
    eps: float = 1e-6,
    initial_state: Float[Tensor, "batch heads k_dim v_dim"] | None = None,
    initial_normaliser: Float[Tensor, "batch heads k_dim"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    impl: str = "auto",
) -> tuple[
    Float[Tensor, "batch time heads v_dim"],
    Float[Tensor, "batch heads k_dim v_dim"],
    Float[Tensor, "batch heads k_dim"] | None,
]:
    """S_t = exp(log_decay_t) ⊙ S_{t-1} + k_t v_tᵀ;  y_t = (scale q_t)ᵀ S_t, for each head.

    `groups` divides heads: head h reads q and k of group h // (heads / groups) (Mamba-2's shared B and C).
    `log_decay` is the natural logarithm of the decay and must not be positive (-inf forgets everything; values are not
    checked): None (no decay), [heads], [batch, time, heads] or [batch, time, heads, k_dim]; the last decays every row
    of S, one a key channel, by its own factor.
    Decays of any strength, 0 and 1 included, give finite values and gradients: chunks are divided again by halves
    (secondary chunking, down to single tokens: ops/linear_attention/pairs.py), and no factor exceeds 1.
    `bonus` is RWKV-6's u: the read-out comes before the decay and weighs the token itself by u,
    y_t = (scale q_t)ᵀ (S_{t-1} + (u ⊙ k_t) v_tᵀ).
    `normalise` divides y_t by max((scale q_t)ᵀ z_t, eps), where z_t = exp(log_decay_t) ⊙ z_{t-1} + k_t is the state of
    a value that is always 1 (with `bonus`, (scale q_t)ᵀ (z_{t-1} + u ⊙ k_t)).
    `segments` (0 padding, equal ids one document): S and z start from zero at each document of a row but the first,
    which goes on from the initial state (default zero); padding leaves both alone and gets y = 0, whatever its q, k, v
    and log_decay hold.

    Returns y, in v's dtype, and S and (with `normalise`, else None) z after each row's last valid token, in the dtype
    they are summed in: the widest of the inputs' dtypes and float32. Every tensor input has a gradient, also through
    the final states.

    `impl`: "auto", "triton" (CUDA), "native" (CPU; compiled loops between the products), "chunked" (any
    device) or "reference" (a loop over time).
    Cost: about 4·batch·time·heads·(k_dim·v_dim + chunk·(k_dim + v_dim) / 2) FLOPs forward and twice that backward, in
    chunks of 16 to 64 tokens (once more times log2(chunk) within the chunk with a decay a key channel); memory O(time)
    and one state a chunk. The reference keeps a state a token.

    Raises ValueError for shapes that do not fit together, an unknown `impl`, an empty sequence or a state without its
    normaliser; TypeError for tensors that are not real floating point; RuntimeError for an `impl` that cannot take
    these tensors.
    """
    _check(q, k, v, log_decay, bonus, normalise, initial_state, initial_normaliser, segments)
    return _OP(
        impl, q=q, k=k, v=v, log_decay=log_decay, scale=scale, bonus=bonus, normalise=normalise, eps=eps,
        initial_state=initial_state, initial_normaliser=initial_normaliser, segments=segments,
    )  # fmt: skip


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    normalise: bool,
    initial_state: Tensor | None,
    initial_normaliser: Tensor | None,
    segments: Tensor | None,
) -> None:
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(
            "linear_attention takes q [batch, time, groups, k_dim] and v [batch, time, heads, v_dim], "
            f"got {tuple(q.shape)} and {tuple(v.shape)}"
        )
    batch, time, groups, k_dim = q.shape
    heads, v_dim = v.shape[2:]
    if time == 0:
        raise ValueError("linear_attention got an empty sequence (time=0); pass at least one token")
    if groups == 0 or heads % groups:
        raise ValueError(
            f"linear_attention: groups={groups} of q and k must divide heads={heads} of v; "
            f"try groups={math.gcd(groups, heads)}"
        )
    decays = {1: (heads,), 3: (batch, time, heads), 4: (batch, time, heads, k_dim)}
    if log_decay is not None and log_decay.ndim not in decays:
        raise ValueError(
            f"linear_attention: log_decay has shape {tuple(log_decay.shape)}; "
            f"pass [heads]={decays[1]}, [batch, time, heads]={decays[3]} or [batch, time, heads, k_dim]={decays[4]}"
        )
    for name, value, shape in (
        ("q", q, q.shape),
        ("k", k, q.shape),
        ("v", v, (batch, time, heads, v_dim)),
        ("log_decay", log_decay, () if log_decay is None else decays[log_decay.ndim]),
        ("bonus", bonus, (heads, k_dim)),
        ("initial_state", initial_state, (batch, heads, k_dim, v_dim)),
        ("initial_normaliser", initial_normaliser, (batch, heads, k_dim)),
    ):
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(f"linear_attention takes floating point (real) tensors, but {name} is {value.dtype}")
        if value.shape != shape:
            raise ValueError(
                f"linear_attention: {name} has shape {tuple(value.shape)}, but q with batch={batch}, time={time}, "
                f"groups={groups}, k_dim={k_dim} and v with heads={heads}, v_dim={v_dim} need {tuple(shape)}"
            )
    if initial_normaliser is not None and not normalise:
        raise ValueError("linear_attention got an initial_normaliser but normalise=False; leave it out or normalise")
    if normalise and (initial_state is None) != (initial_normaliser is None):
        missing = "initial_state" if initial_state is None else "initial_normaliser"
        raise ValueError(f"linear_attention: normalise=True needs both initial states or none, but {missing} is None")
    if segments is not None:
        seg.check(segments, batch, time)
