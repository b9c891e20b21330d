"""Grouped-query attention on one more token at once, for decoding on a CPU (`ops.step`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ops import step
from ops.step import Around
from zoo.attention.kv_state import KVState, RingState, append, lengthen, may_write
from zoo.block import Out, Step, leave, stay
from zoo.layers.linear import plain
from zoo.layers.norm import RMSNorm, ZeroCenteredRMSNorm
from zoo.layers.position import Rotary

if TYPE_CHECKING:
    from zoo.attention.gqa import GQA

Seen = tuple[np.ndarray, np.ndarray] | None


def bind_step(block: GQA, around: Around) -> Step | None:
    """`Block.bind_step` of GQA."""
    if not plain(block.qkv, block.out) or block.softcap is not None:
        return None
    if block.position is not None and not isinstance(block.position, Rotary):
        return None
    q_norm, k_norm = block.q_norm, block.k_norm
    if q_norm is not None and type(q_norm) not in (RMSNorm, ZeroCenteredRMSNorm):
        return None
    norms: tuple[Any, ...] = () if q_norm is None or k_norm is None else (q_norm.weight, k_norm.weight)
    qkv, out = (block.qkv.weight, block.qkv.bias), (block.out.weight, block.out.bias)
    if not step.fits(*qkv, *out, *norms, around.weight, around.bias):
        return None
    from ops.step.attention import LONGEST, HeadNorm, Turning, attention

    turning = norm = None
    if block.position is not None:
        theta = block.position._theta(qkv[0].device, torch.float32)
        turning = Turning(theta, block.position.length, block.position.layout == "interleaved")
    if norms:
        centre = 1.0 if isinstance(q_norm, ZeroCenteredRMSNorm) else 0.0
        norm = HeadNorm(norms[0], norms[1], q_norm.eps if isinstance(q_norm, RMSNorm) else 0.0, centre)
    heads, kv_heads, head_dim = block.heads, block.kv_heads, block.head_dim
    scale = head_dim**-0.5 if block.scale is None else block.scale
    run = attention(
        qkv, out, (heads, kv_heads, head_dim), scale=scale, turning=turning, norm=norm, gate=block.gate, around=around
    )
    width, window, sinks = block.width, block.window, block.sinks
    kind = KVState if window is None else RingState
    row = (kv_heads, head_dim)

    def one(x: Tensor, state: Any) -> Out | None:
        if type(state) is not kind or not step.takes(x, width):
            return None
        k, v = state.k, state.v
        shape = k.shape
        if v.shape != shape or shape[0] != len(x) or shape[2:] != row or k.numel() >= LONGEST:
            return None
        if not (_fits(k, head_dim) and _fits(v, head_dim) and may_write(k, v)):
            return None
        if isinstance(state, KVState):
            state, at, places, seen = _grow(state)
        elif window is not None and shape[1] == window + sinks:
            state, at, places, seen = _turn(state, window, sinks)
        else:
            return None
        return Out(run(x, state.k, state.v, at, places, seen), state, {})

    return one


def _fits(leaf: Tensor, head_dim: int) -> bool:
    """Whether keys or values are float32 here, and a row's tokens follow one another in memory."""
    _, step, head, one = leaf.stride()
    return (
        leaf.dtype == torch.float32 and leaf.is_cpu and one == 1 and head == head_dim and step == leaf.shape[2] * head
    )


def _grow(state: KVState) -> tuple[KVState, np.ndarray, np.ndarray, Seen]:
    """The state with a place for one more token, that place, its position, and what may be seen."""
    batch, old = state.k.shape[:2]
    keys, values = _one_more(state.k), _one_more(state.v)
    at = np.full(batch, old)
    if state.runs.shape[1] == 0:
        segment, run = (leave(state.segment, None), state.run.clamp_min(1)) if old == 0 else (state.segment, state.run)
        position = torch.from_numpy(state.position.numpy() + 1)  # a third of what torch takes for a few numbers
        return KVState(keys, values, state.runs, state.places, position, segment, run), at, at, None
    run, places = _begun(state.run), state.position.numpy()
    runs = append(state.runs, run[:, None], True)
    kept = append(state.places, state.position[:, None], True)
    grown = KVState(keys, values, runs, kept, state.position + 1, stay(state.segment), run)
    return grown, at, places, (runs.contiguous().numpy(), run.numpy())


def _turn(state: RingState, window: int, sinks: int) -> tuple[RingState, np.ndarray, np.ndarray, Seen]:
    """The same of a ring: the slot of the token's position."""
    # In NumPy, whose calls on a few numbers cost a third of torch's.
    places, run = state.position.numpy(), _begun(state.run)
    at = np.where(places < sinks, places, sinks + (places - sinks) % window)
    row, runs = np.arange(len(at)), state.runs.numpy()
    runs[row, at] = run.numpy()
    state.places.numpy()[row, at] = places
    position = torch.from_numpy(places + 1)
    state = RingState(state.k, state.v, state.runs, state.places, position, stay(state.segment), run)
    return state, at, places, (np.ascontiguousarray(runs), run.numpy())


def _one_more(leaf: Tensor) -> Tensor:
    """lengthen(leaf, 1), whose buffer `_fits` has looked at."""
    batch, old, heads, d = leaf.shape
    strides, offset = leaf.stride(), leaf.storage_offset()
    if strides[0] < (old + 1) * strides[1] or 4 * (offset + batch * strides[0]) > leaf.untyped_storage().nbytes():
        return lengthen(leaf, 1)
    return leaf.as_strided((batch, old + 1, heads, d), strides, offset)


def _begun(run: Tensor) -> Tensor:
    """A row's first token begins its first run."""
    return run.clamp_min(1) if 0 in run.tolist() else run
