"""Grouped-query attention on one more token at once, for decoding on a CPU (`ops.step`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ops import step
from ops.step import Around
from zoo.attention.kv_state import KVState, RingState, append, lengthen, may_write
from zoo.block import Out, leave
from zoo.layers.linear import plain
from zoo.layers.norm import RMSNorm, ZeroCenteredRMSNorm
from zoo.layers.position import Rotary

if TYPE_CHECKING:
    from zoo.attention.gqa import GQA


def one_token(block: GQA, x: Tensor, state: KVState | RingState | None, around: Around) -> Out | None:
    """`Block.one_token` of GQA."""
    if type(state) is not (KVState if block.window is None else RingState):
        return None
    if not plain(block.qkv, block.out) or block.softcap is not None:
        return None
    if block.position is not None and not isinstance(block.position, Rotary):
        return None
    q_norm, k_norm = block.q_norm, block.k_norm
    if q_norm is not None and type(q_norm) not in (RMSNorm, ZeroCenteredRMSNorm):
        return None
    norms: tuple[Any, ...] = () if q_norm is None or k_norm is None else (q_norm.weight, k_norm.weight)
    weights = (block.qkv.weight, block.qkv.bias, block.out.weight, block.out.bias, *norms)
    if not step.takes(x, (*weights, around.weight, around.bias)) or not _fits(block, x, state):
        return None
    from ops.step.attention import HeadNorm, Turning, attention

    state, slots, places, seen = _grow(state) if isinstance(state, KVState) else _turn(state, block.window, block.sinks)
    turning = norm = None
    if block.position is not None:
        theta = block.position._theta(x.device, torch.float32)
        turning = Turning(theta, block.position.length, block.position.layout == "interleaved")
    if norms:
        centre = 1.0 if isinstance(q_norm, ZeroCenteredRMSNorm) else 0.0
        norm = HeadNorm(norms[0], norms[1], q_norm.eps if isinstance(q_norm, RMSNorm) else 0.0, centre)
    y = attention(
        x,
        (block.qkv.weight, block.qkv.bias),
        (block.out.weight, block.out.bias),
        (block.heads, block.kv_heads, block.head_dim),
        state.k,
        state.v,
        slots,
        places,
        seen=seen,
        scale=block.head_dim**-0.5 if block.scale is None else block.scale,
        turning=turning,
        norm=norm,
        gate=block.gate,
        around=around,
    )
    return Out(y, state, {})


def _fits(block: GQA, x: Tensor, state: KVState | RingState) -> bool:
    """Whether the state is this block's, and its keys are few, float32, and may be written to."""
    from ops.step.attention import LONGEST

    k, v, row = state.k, state.v, (block.kv_heads, block.head_dim)
    if k.shape != v.shape or k.shape[0] != x.shape[0] or k.shape[2:] != row or x.shape[2] != block.width:
        return False
    if block.window is not None and k.shape[1] != block.window + block.sinks:
        return False
    return k.dtype == torch.float32 and k.numel() < LONGEST and k.is_cpu and may_write(k, v) and _rows(k) and _rows(v)


def _rows(leaf: Tensor) -> bool:
    """Whether a row's tokens follow one another in memory."""
    heads, d = leaf.shape[2:]
    return leaf.stride()[1:] == (heads * d, d, 1)


def _grow(state: KVState) -> tuple[KVState, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """The state with a place for one more token, that place, its position, and what may be seen."""
    batch, old = state.k.shape[:2]
    keys, values = lengthen(state.k, 1), lengthen(state.v, 1)
    segment, run = (leave(state.segment, None), state.run.clamp_min(1)) if old == 0 else (state.segment, state.run)
    slots = torch.full((batch,), old)
    if state.runs.shape[1] == 0:
        position = state.position + 1
        return KVState(keys, values, state.runs, state.places, position, segment, run), slots, slots, None
    segment, run = leave(segment, None), run.clamp_min(1)
    runs = append(state.runs, run[:, None], True)
    places = append(state.places, state.position[:, None], True)
    grown = KVState(keys, values, runs, places, state.position + 1, segment, run)
    return grown, slots, state.position, (runs.contiguous(), run)


def _turn(state: RingState, window: int | None, sinks: int) -> tuple[RingState, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The same of a ring: the slot of the token's position."""
    assert window is not None
    places, run = state.position, state.run.clamp_min(1)
    slots = torch.where(places < sinks, places, sinks + (places - sinks) % window)
    index = slots[:, None]
    runs = state.runs.scatter_(1, index, run[:, None].int())
    kept = state.places.scatter_(1, index, places[:, None].int())
    state = RingState(state.k, state.v, runs, kept, places + 1, leave(state.segment, None), run)
    return state, slots, places, (runs, run)
