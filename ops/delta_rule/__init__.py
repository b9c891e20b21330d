"""The delta rule: a matrix state a head that replaces what it holds under a key instead of adding to it.

DeltaNet (2406.06484) has no decay, Gated DeltaNet (2412.06464) one a head and step, Kimi delta attention (KDA,
2510.26692) one a key channel and step; RWKV-7 (2503.14456) erases along one vector and writes along another.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ops import segments as seg
from ops.dispatch import Implementation, Op, refuse_native, refuse_triton, tensors

Result = tuple[Tensor, Tensor]


def _refuse_triton(arguments: Mapping[str, Any], forced: bool) -> str | None:
    from ops.delta_rule.common import WIDEST_KEY

    if arguments["q"].shape[-1] > WIDEST_KEY:
        return f"holds at most {WIDEST_KEY} key channels on the chip, got {arguments['q'].shape[-1]}; use chunked"
    if arguments["v"].is_cuda and any(each.dtype == torch.float64 for each in tensors(arguments)):
        return "takes float64 under the interpreter alone; use chunked, or float32"
    return refuse_triton(arguments, forced)


def _refuse_native(arguments: Mapping[str, Any], forced: bool) -> str | None:
    if not forced and arguments["q"].shape[1] == 1:
        return "differs from chunked for several tokens alone"
    return refuse_native(arguments, forced)


def _reference(**arguments: Any) -> Result:
    from ops.delta_rule.reference import reference

    return reference(**arguments)


def _chunked(**arguments: Any) -> Result:
    from ops.delta_rule.chunked import chunked

    return chunked(**arguments)


def _native(**arguments: Any) -> Result:
    from ops.delta_rule.native import native

    return native(**arguments)


def _triton(**arguments: Any) -> Result:
    from ops.delta_rule.triton import triton_delta_rule

    return triton_delta_rule(**arguments)


_OP = Op(
    "delta_rule",
    Implementation("triton", _triton, _refuse_triton),
    Implementation("native", _native, _refuse_native),
    Implementation("chunked", _chunked),
    Implementation("reference", _reference),
)


def delta_rule(
    q: Float[Tensor, "batch time groups k_dim"],
    k: Float[Tensor, "batch time groups k_dim"],
    v: Float[Tensor, "batch time heads v_dim"],
    beta: Float[Tensor, "batch time heads"] | None = None,
    *,
    log_decay: Float[Tensor, "..."] | None = None,
    erase: tuple[Float[Tensor, "batch time heads k_dim"], Float[Tensor, "batch time heads k_dim"]] | None = None,
    scale: float = 1.0,
    initial_state: Float[Tensor, "batch heads k_dim v_dim"] | None = None,
    segments: Int[Tensor, "batch time"] | None = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "batch time heads v_dim"], Float[Tensor, "batch heads k_dim v_dim"]]:
    """For each head, with S' = exp(log_decay_t) ⊙ S_{t-1}:

        S_t = S' + β_t k_t (v_t - k_tᵀ S')ᵀ = (I - β_t k_t k_tᵀ) S' + β_t k_t v_tᵀ;  y_t = (scale q_t)ᵀ S_t

    that is, decay first and erase then, as in KDA (a decay a head commutes with the erasing, so Gated DeltaNet's order
    is the same). `erase` = (a, b) is the generalised rule instead, which erases what a reads *before* the decay and
    leaves β out; with a = κ̂, b = -(α ⊙ κ̂), α RWKV-7's in-context learning rate, it is that of RWKV-7:

        S_t = (Diag(exp(log_decay_t)) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ

    `groups` divides heads: head h reads q and k of group h // (heads / groups); a and b are one a head.
    `beta` is the writing strength, None for 1. Between 0 and 2 and with keys of length 1 nothing grows; above 1 the
    state's eigenvalues may be negative. Keys are taken as they are: normalising them is the caller's.
    `log_decay` is the natural logarithm of the decay and must not be positive (-inf forgets everything; values are not
    checked): None (no decay), [heads], [batch, time, heads] or [batch, time, heads, k_dim]; the last decays every row
    of S, one a key channel, by its own factor.
    Decays of any strength, 0 and 1 included, give finite values and gradients: chunks are divided again by halves
    (secondary chunking, down to single tokens: ops/linear_attention/pairs.py), and no factor exceeds 1.
    `segments` (0 padding, equal ids one document): S starts from zero at each document of a row but the first, which
    goes on from `initial_state` (default zero); padding leaves it alone and gets y = 0, whatever its inputs hold.

    Returns y, in v's dtype, and S after each row's last valid token, in the dtype it is summed in: the widest of the
    inputs' dtypes and float32. Every tensor input has a gradient, also through the final state.

    `impl`: "auto", "triton" (CUDA), "native" (CPU; compiled loops between the products), "chunked" (any
    device) or "reference" (a loop over time).
    Cost: about batch·time·heads·(6·k_dim·v_dim + chunk·(4·k_dim + 3·v_dim)) FLOPs forward and twice that backward, in
    chunks of 16 to 64 tokens (4·chunk·k_dim once more times log2(chunk) with a decay a key channel; with `erase` two
    products of k and v more); memory O(time) and one state a chunk. The reference keeps a state a token.

    Raises ValueError for shapes that do not fit together, an unknown `impl`, an empty sequence or `erase` with `beta`;
    TypeError for tensors that are not real floating point; RuntimeError for an `impl` that cannot take these tensors.
    """
    _check(q, k, v, beta, log_decay, erase, initial_state, segments)
    return _OP(
        impl, q=q, k=k, v=v, beta=beta, log_decay=log_decay, erase=erase, scale=scale, initial_state=initial_state,
        segments=segments,
    )  # fmt: skip


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    erase: tuple[Tensor, Tensor] | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
) -> None:
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(
            "delta_rule takes q [batch, time, groups, k_dim] and v [batch, time, heads, v_dim], "
            f"got {tuple(q.shape)} and {tuple(v.shape)}"
        )
    batch, time, groups, k_dim = q.shape
    heads, v_dim = v.shape[2:]
    if time == 0:
        raise ValueError("delta_rule got an empty sequence (time=0); pass at least one token")
    if groups == 0 or heads % groups:
        raise ValueError(
            f"delta_rule: groups={groups} of q and k must divide heads={heads} of v; "
            f"try groups={math.gcd(groups, heads)}"
        )
    if erase is not None and beta is not None:
        raise ValueError("delta_rule got both beta and erase; with erase=(a, b) multiply beta into b and v")
    if erase is not None and len(erase) != 2:
        raise ValueError(f"delta_rule: erase has {len(erase)} parts; pass (a, b), what it reads and where it writes")
    decays = {1: (heads,), 3: (batch, time, heads), 4: (batch, time, heads, k_dim)}
    if log_decay is not None and log_decay.ndim not in decays:
        raise ValueError(
            f"delta_rule: log_decay has shape {tuple(log_decay.shape)}; "
            f"pass [heads]={decays[1]}, [batch, time, heads]={decays[3]} or [batch, time, heads, k_dim]={decays[4]}"
        )
    a, b = (None, None) if erase is None else erase
    for name, value, shape in (
        ("q", q, q.shape),
        ("k", k, q.shape),
        ("v", v, (batch, time, heads, v_dim)),
        ("beta", beta, decays[3]),
        ("log_decay", log_decay, () if log_decay is None else decays[log_decay.ndim]),
        ("a of erase", a, decays[4]),
        ("b of erase", b, decays[4]),
        ("initial_state", initial_state, (batch, heads, k_dim, v_dim)),
    ):
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(f"delta_rule takes floating point (real) tensors, but {name} is {value.dtype}")
        if value.shape != shape:
            raise ValueError(
                f"delta_rule: {name} has shape {tuple(value.shape)}, but q with batch={batch}, time={time}, "
                f"groups={groups}, k_dim={k_dim} and v with heads={heads}, v_dim={v_dim} need {tuple(shape)}"
            )
    if segments is not None:
        seg.check(segments, batch, time)
