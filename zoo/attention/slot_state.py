"""Keys and values of just those tokens that a static pattern may still see, each in a slot of its own.

The pattern says which slot a position takes; the token that takes a slot over comes when the one before it in there
can be seen no more. Runs and positions tell what a slot holds, as in `kv_state`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from zoo.attention.kv_state import may_write
from zoo.layers.places import Tokens


class SlotState(NamedTuple):
    """Keys and values in slots; their number is constant, or a function of the tokens fed."""

    k: Float[Tensor, "batch slots kv_heads d"]
    v: Float[Tensor, "batch slots kv_heads d"]
    runs: Int[Tensor, "batch slots"]  # 0 unused, else the document's run
    places: Int[Tensor, "batch slots"]  # position in the document
    position: Int[Tensor, " batch"]  # tokens so far of the document the row is in
    segment: Int[Tensor, " batch"]  # its id, 0 before the first token
    run: Int[Tensor, " batch"]  # its run, 0 before the first token
    # Tokens fed, padding included, as a shape that holds nothing: torch.compile must know the slots without a look at
    # values. 0 where the number of slots is constant.
    fed: UInt8[Tensor, "batch fed 0"]


def new_slots(batch: int, slots: int, kv_heads: int, head_dim: int, device, dtype) -> SlotState:
    """The state before the first token: `slots` slots, none used."""
    k, v = (torch.zeros(batch, slots, kv_heads, head_dim, device=device, dtype=dtype) for _ in range(2))
    runs, places = (torch.zeros(batch, slots, device=device, dtype=torch.int32) for _ in range(2))
    position, segment, run = (torch.zeros(batch, device=device, dtype=torch.long) for _ in range(3))
    fed = torch.zeros(batch, 0, 0, device=device, dtype=torch.uint8)
    return SlotState(k, v, runs, places, position, segment, run, fed)


def grow(state: SlotState, time: int, slots: int) -> SlotState:
    """The state with room for `time` more tokens, in `slots` slots."""
    more = slots - state.k.shape[1]

    def longer(leaf: Tensor) -> Tensor:
        return torch.cat([leaf, leaf.new_zeros(leaf.shape[0], more, *leaf.shape[2:])], 1)

    fed = torch.cat([state.fed, state.fed.new_zeros(state.fed.shape[0], time, 0)], 1)
    k, v, runs, places = state[:4] if more == 0 else (longer(leaf) for leaf in state[:4])
    return SlotState(k, v, runs, places, state.position, state.segment, state.run, fed)


def write(state: SlotState, k: Tensor, v: Tensor, tokens: Tokens, slot: Int[Tensor, "batch time"]) -> SlotState:
    """The state after a call's tokens, each in its slot (-1: none); padding never enters it. Differentiable."""
    slot = torch.where(tokens.runs != 0, slot.long(), -1)
    put = _write_one if k.shape[1] == 1 else _write_many
    k, v, runs, places = put(state, (k, v, tokens.runs, tokens.places), slot)
    return SlotState(k, v, runs, places, tokens.position, tokens.segment, tokens.run, state.fed)


def _write_one(state: SlotState, news: tuple[Tensor, ...], slot: Int[Tensor, "batch 1"]) -> list[Tensor]:
    """One token a row: in place where no gradient forbids it."""
    in_place = may_write(state.k, state.v, *news[:2])

    def put(old: Tensor, new: Tensor) -> Tensor:
        shape = (*slot.shape, *[1] * (old.ndim - 2))
        index = slot.clamp_min(0).reshape(shape).expand(-1, -1, *old.shape[2:])
        new = torch.where((slot >= 0).reshape(shape), new, old.gather(1, index))
        return old.scatter_(1, index, new) if in_place else old.scatter(1, index, new)

    return [put(old, new) for old, new in zip(state[:4], news, strict=True)]


def _write_many(state: SlotState, news: tuple[Tensor, ...], slot: Int[Tensor, "batch time"]) -> list[Tensor]:
    """Any number of tokens; of those with one slot the last stays. New tensors."""
    batch, slots = state.k.shape[:2]
    # One slot behind the others takes what is not kept.
    index = torch.arange(slot.shape[1], device=slot.device).expand_as(slot)
    writer = torch.full((batch, slots + 1), -1, device=slot.device)
    writer = writer.scatter_reduce(1, torch.where(slot < 0, slots, slot), index, "amax")[:, :slots]
    written, at = writer >= 0, writer.clamp_min(0)

    def put(old: Tensor, new: Tensor) -> Tensor:
        shape = (*at.shape, *[1] * (old.ndim - 2))
        taken = new.gather(1, at.reshape(shape).expand(-1, -1, *old.shape[2:]))
        return torch.where(written.reshape(shape), taken, old)

    return [put(old, new) for old, new in zip(state[:4], news, strict=True)]
