"""One token of DeltaNet and Gated DeltaNet."""

from collections.abc import Callable

import numpy as np
from numba import njit
from torch import Tensor

from ops import native_team
from ops.linear.kernels import OPTIONS, spread
from ops.native_array import array
from ops.step import Around, fresh, rows
from ops.step.norm import finish, normed, scaled, unpack
from ops.step.parts import EXACT, NOTHING, convolve, dot, sigmoid, silu, softplus


def delta(
    weights: tuple[Tensor, Tensor, Tensor],
    key_heads: int,
    strength: float,
    decay: tuple[Tensor, Tensor] | None,
    norm: tuple[Tensor, float, bool],
    around: Around,
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """x [batch, 1, width], conv [batch, taps - 1, channels], S [batch, heads, k_dim, v_dim] -> y and both after it.

    weights: of in_proj (rows of q, k, v, β, then of the decay's steps and of the gate, where there are such), the
    convolution, out_proj; strength: the greatest β; decay: A_log and dt_bias; norm: weight, eps, gated. The caller has
    asked `ops.step.fits`, and for each token `ops.step.takes`.
    """
    outputs, outer = weights[2].shape[0], unpack(around)
    bound = (
        tuple(array(each) for each in weights),
        key_heads,
        np.float32(strength),
        (NOTHING, NOTHING) if decay is None else tuple(array(each) for each in decay),
        (array(norm[0]), np.float32(norm[1]), norm[2]),
    )

    def run(x: Tensor, conv: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, y_rows = fresh(x.shape[0], 1, outputs)
        conv_after, conv_rows = fresh(*conv.shape)
        S_after, S_rows = fresh(*S.shape)
        _run(
            native_team.threads(),
            rows(x)[:, 0],
            outer,
            (rows(conv), rows(S)),
            (conv_rows, S_rows),
            *bound,
            y_rows[:, 0],
        )
        return y, conv_after, S_after

    return run


@njit(**OPTIONS)
def _unit(x):
    factor = np.float32(1) / np.sqrt(dot(x, x) + np.float32(1e-6))
    for i in range(len(x)):
        x[i] *= factor


@njit(**OPTIONS)
def _update(q, k, v, beta, decay, before, after, held, o):
    """S ← α S + β k (v - (α S)ᵀ k)ᵀ and o = Sᵀ q / √k_dim, of one head: S [k_dim, v_dim]."""
    held[:] = np.float32(0)
    for i in range(len(k)):
        row = before[i]
        for j in range(len(v)):
            held[j] += k[i] * row[j]
    for j in range(len(v)):
        held[j] = beta * (v[j] - decay * held[j])
    o[:] = np.float32(0)
    scale = np.float32(1) / np.sqrt(np.float32(len(k)))
    for i in range(len(k)):
        old, new, read = before[i], after[i], scale * q[i]
        for j in range(len(v)):
            new[j] = decay * old[j] + k[i] * held[j]
            o[j] += read * new[j]


@njit(**EXACT)
def _gate(y, z):
    for i in range(len(y)):
        y[i] *= z[i] * sigmoid(z[i])


@njit(**OPTIONS)
def _run(threads, x, around, before, after, weights, key_heads, strength, decay, norm, y):
    _, heads, k_dim, v_dim = before[1].shape
    key_dim, channels = key_heads * k_dim, len(weights[1])
    parts = np.empty((len(x), len(weights[0])), np.float32)
    mixed = np.empty((len(x), channels), np.float32)
    out = np.empty((len(x), heads * v_dim), np.float32)
    held = np.empty(v_dim, np.float32)
    spread(threads, weights[0], normed(x, around), parts)
    for row in range(len(x)):
        convolve(parts[row, :channels], weights[1], NOTHING, before[0][row], after[0][row], mixed[row])
        silu(mixed[row])
        for head in range(2 * key_heads):
            _unit(mixed[row, head * k_dim : (head + 1) * k_dim])
        rest = parts[row, channels:]
        for head in range(heads):
            kept = np.float32(1)
            if len(decay[0]) > 0:
                step = softplus(rest[heads + head] + decay[1][head])
                kept = np.float32(np.exp(-np.exp(decay[0][head]) * step))
            group = head * key_heads // heads * k_dim
            q, k = mixed[row, group : group + k_dim], mixed[row, key_dim + group : key_dim + group + k_dim]
            v = mixed[row, 2 * key_dim + head * v_dim : 2 * key_dim + (head + 1) * v_dim]
            o = out[row, head * v_dim : (head + 1) * v_dim]
            beta = strength * sigmoid(rest[head])
            _update(q, k, v, beta, kept, before[1][row, head], after[1][row, head], held, o)
            scaled(o, norm[0], norm[1], np.float32(0), o)
            if norm[2]:
                start = 2 * heads + head * v_dim
                _gate(o, rest[start : start + v_dim])
    spread(threads, weights[2], out, y)
    finish(x, y, NOTHING, around)
