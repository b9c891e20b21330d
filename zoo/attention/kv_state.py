"""Keys and values that a causal attention block keeps of the tokens it has seen: all of them, or a ring of the last.

A document is told from the one before it in the same row by its run, 1, 2, ... counted over the row's life, so that a
slot of an earlier document is invisible whatever ids the caller gives. Positions count a document's own tokens.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.layers.places import Tokens


class KVState(NamedTuple):
    """Keys and values of every token fed, padding included: `k.shape[1]` is their number.

    Leaves of tokens are views of buffers with spare room behind them, which appending fills. So an older state stays
    as it is while a later one grows; going back to it, the next append overwrites the abandoned tokens. `runs` and
    `places` have no columns as long as every token fed was a row's one document's, which needs no mask.
    """

    APPEND_ONLY = True  # see zoo.block.snapshot

    k: Float[Tensor, "batch tokens kv_heads d"]
    v: Float[Tensor, "batch tokens kv_heads d"]
    runs: Int[Tensor, "batch slots"]  # 0 padding, else the document's run; slots is tokens or 0
    places: Int[Tensor, "batch slots"]  # position in the document
    position: Int[Tensor, " batch"]  # tokens so far of the document the row is in
    segment: Int[Tensor, " batch"]  # its id, 0 before the first token
    run: Int[Tensor, " batch"]  # its run, 0 before the first token


class RingState(NamedTuple):
    """Keys and values of the last `window` tokens and the `sinks` first ones of a document: a constant size.

    The token at position p has the slot p among the first `sinks`, else sinks + (p − sinks) mod window.
    """

    k: Float[Tensor, "batch slots kv_heads d"]
    v: Float[Tensor, "batch slots kv_heads d"]
    runs: Int[Tensor, "batch slots"]  # 0 unused, else the document's run
    places: Int[Tensor, "batch slots"]  # position in the document
    position: Int[Tensor, " batch"]
    segment: Int[Tensor, " batch"]
    run: Int[Tensor, " batch"]


def new_kv(batch: int, kv_heads: int, head_dim: int, device, dtype) -> KVState:
    """The state before the first token, without room: it grows with what it is fed."""
    k, v = (torch.zeros(batch, 0, kv_heads, head_dim, device=device, dtype=dtype) for _ in range(2))
    runs, places = (torch.zeros(batch, 0, device=device, dtype=torch.int32) for _ in range(2))
    return KVState(k, v, runs, places, *(torch.zeros(batch, device=device, dtype=torch.long) for _ in range(3)))


def new_ring(batch: int, slots: int, kv_heads: int, head_dim: int, device, dtype) -> RingState:
    """The state before the first token: `slots` slots, none used."""
    k, v = (torch.zeros(batch, slots, kv_heads, head_dim, device=device, dtype=dtype) for _ in range(2))
    runs, places = (torch.zeros(batch, slots, device=device, dtype=torch.int32) for _ in range(2))
    return RingState(k, v, runs, places, *(torch.zeros(batch, device=device, dtype=torch.long) for _ in range(3)))


def may_write(*tensors: Tensor) -> bool:
    """Whether a state may be written in place: no gradient will want what is there now.

    Not under torch.compile either: a graph's inputs have no storage behind their ends.
    """
    if torch.compiler.is_compiling() or any(each.requires_grad for each in tensors):
        return False
    return torch.is_inference_mode_enabled() or not any(each.is_inference() for each in tensors)


# All tokens ---------------------------------------------------------------------------------------------------


def _room(leaf: Tensor) -> int:
    """Tokens that the buffer behind a leaf holds, read from strides and storage; 0 if there is no such buffer."""
    batch, _, *rest = leaf.shape
    row = 1
    for size, stride in zip(reversed(rest), reversed(leaf.stride()[2:]), strict=True):
        if stride != row:
            return 0
        row *= size
    if leaf.stride(1) != row or row == 0:
        return 0
    room = leaf.stride(0) // row
    end = leaf.storage_offset() + (batch - 1) * leaf.stride(0) + room * row
    # Copies may keep the strides of a buffer that they did not copy.
    return room if end * leaf.element_size() <= leaf.untyped_storage().nbytes() else 0


def append(leaf: Tensor, new: Tensor, write: bool) -> Tensor:
    """`leaf` [batch, tokens, ...] with `new` [batch, time, ...] behind it: in place, if `write` and there is room;
    else in a buffer of twice the size, or without `write` as a plain concatenation."""
    new = new.to(leaf.dtype)
    if not write:
        return torch.cat([leaf, new], 1)
    old = leaf.shape[1]
    longer = lengthen(leaf, new.shape[1])
    longer[:, old:].copy_(new)
    return longer


def lengthen(leaf: Tensor, time: int) -> Tensor:
    """`leaf` with `time` tokens behind it that are still to be written: in the same buffer where there is room, else
    in one of twice the size."""
    batch, old, *rest = leaf.shape
    if _room(leaf) < old + time:
        room = -(-max(2 * old, old + time) // 64) * 64
        grown = leaf.new_empty(batch, room, *rest)
        grown[:, :old] = leaf
        leaf = grown[:, :old]
    return leaf.as_strided((batch, old + time, *rest), leaf.stride(), leaf.storage_offset())


def spell_out(state: KVState) -> KVState:
    """The same state with `runs` and `places` of every token."""
    tokens = state.k.shape[1]
    if state.runs.shape[1] == tokens:
        return state
    places = torch.arange(tokens, device=state.k.device, dtype=torch.int32).repeat(state.k.shape[0], 1)
    return state._replace(runs=state.run[:, None].repeat(1, tokens).int(), places=places)


# A ring of the last -------------------------------------------------------------------------------------------


def slots(places: Int[Tensor, "batch time"], window: int, sinks: int) -> Int[Tensor, "batch time"]:
    """The ring's slot for each position."""
    places = places.long()
    return torch.where(places < sinks, places, sinks + (places - sinks) % window)


def write_ring(
    state: RingState, k: Tensor, v: Tensor, runs: Tensor, places: Tensor, window: int, sinks: int
) -> RingState:
    """The ring after any number of tokens; padding (run 0) never enters it. Differentiable, new tensors."""
    time, ring = k.shape[1], state.k.shape[1]
    # One slot behind the ring takes what is padding. Of tokens with one slot the last stays.
    slot = torch.where(runs != 0, slots(places, window, sinks), ring)
    index = torch.arange(time, device=k.device).expand_as(slot)
    writer = torch.full((k.shape[0], ring + 1), -1, device=k.device).scatter_reduce(1, slot, index, "amax")[:, :ring]
    written, at = writer >= 0, writer.clamp_min(0)

    def put(old: Tensor, new: Tensor) -> Tensor:
        shape = (*at.shape, *[1] * (old.ndim - 2))
        taken = new.gather(1, at.reshape(shape).expand(-1, -1, *old.shape[2:]))
        return torch.where(written.reshape(shape), taken, old)

    # Built, not _replace'd: torch.compile of torch 2.11 gives back a broken tuple for the latter.
    leaves = (put(state.k, k), put(state.v, v), put(state.runs, runs), put(state.places, places))
    return RingState(*leaves, state.position, state.segment, state.run)


def write_one(
    state: RingState,
    k: Tensor,
    v: Tensor,
    tokens: Tokens,
    window: int,
    sinks: int,
    valid: Bool[Tensor, "batch 1"] | None,
) -> RingState:
    """The ring after one token a row (`valid` None: none is padding), in place where no gradient forbids it."""
    slot = slots(tokens.places, window, sinks)
    write = may_write(state.k, state.v, k, v)

    def put(old: Tensor, new: Tensor) -> Tensor:
        shape = (*slot.shape, *[1] * (old.ndim - 2))
        index = slot.reshape(shape).expand(-1, -1, *old.shape[2:])
        if valid is not None:
            new = torch.where(valid.reshape(shape), new, old.gather(1, index))
        return old.scatter_(1, index, new) if write else old.scatter(1, index, new)

    leaves = (put(state.k, k), put(state.v, v), put(state.runs, tokens.runs), put(state.places, tokens.places))
    return RingState(*leaves, tokens.position, tokens.segment, tokens.run)
