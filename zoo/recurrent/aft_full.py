"""AFT-full (2105.14103, eq. 2): a learned bias for every pair of positions, w_ts = u_t · v_s.

Queries go in blocks: with the keys before a block they meet in two matrix products, with those of their own block one
by one. So a block's own keys, where a later one may be far larger than all that a query sees, are summed with each
query's own maximum.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ops import segments as seg
from zoo.block import leave
from zoo.recurrent.aft_bias import Factored
from zoo.recurrent.aft_sums import CHUNK, average, locate, merge, near, pairs

QUERIES = 256  # of the bidirectional form that meet all keys at a time


class AFTFullState(NamedTuple):
    """Grows: keys and values of the tokens fed. `place` tells a token's place in the document that the state is in, -1
    for padding and other documents; it stays empty while there are none."""

    k: Float[Tensor, "batch tokens width"]
    v: Float[Tensor, "batch tokens width"]
    place: Int[Tensor, "batch places"]
    segment: Int[Tensor, " batch"]


class Full(nn.Module):
    """The weighted averages of keys and values with a bias for every pair of places below `length`."""

    def __init__(self, width: int, length: int, rank: int):
        super().__init__()
        self.width, self.bias = width, Factored(length, rank)

    def init_state(self, batch: int, *, device: Any, dtype: torch.dtype) -> AFTFullState:
        k = torch.zeros(batch, 0, self.width, device=device, dtype=dtype)
        place = torch.zeros(batch, 0, device=device, dtype=torch.long)
        return AFTFullState(k, k.clone(), place, torch.zeros(batch, device=device, dtype=torch.long))

    def forward(
        self,
        k: Float[Tensor, "batch time width"],
        v: Float[Tensor, "batch time width"],
        state: AFTFullState | None,
        segments: Int[Tensor, "batch time"] | None,
    ) -> tuple[Float[Tensor, "batch time width"], AFTFullState | None]:
        """Causal averages, float32 at least, and the state after the call where one is given."""
        batch, time, _ = k.shape
        wide = torch.promote_types(k.dtype, torch.float32)
        old = torch.zeros(1 if segments is None else batch, 0, device=k.device, dtype=torch.long)
        if state is not None:
            state, old = self._enter(state, segments)
        before = (old >= 0).sum(1)
        place, run = locate(time, before, segments)
        places, runs = torch.cat([old, place], 1), torch.cat([(old >= 0).long(), run], 1)
        self.bias.check(place, places.shape[1])
        keys, values = (k, v) if state is None else (torch.cat([state.k, k], 1), torch.cat([state.v, v], 1))
        y = self._blocks(keys.to(wide), values.to(wide), places, runs, time)
        if state is None:
            return y, None
        if segments is None and state.place.shape[1] == 0:
            place = state.place
        else:
            place = torch.where(runs == runs.amax(1, keepdim=True).clamp_min(1), places, -1)
        kept = (keys.to(state.k.dtype), values.to(state.v.dtype), place)
        return y, AFTFullState(*kept, leave(state.segment, segments))

    def _enter(
        self, state: AFTFullState, segments: Int[Tensor, "batch time"] | None
    ) -> tuple[AFTFullState, Int[Tensor, "rows tokens"]]:
        """The state and its tokens' places, -1 where another document begins; one row for all where all are alike."""
        batch, tokens, _ = state.k.shape
        place = state.place
        if place.shape[1] == 0:
            place = torch.arange(tokens, device=state.k.device).expand(1 if segments is None else batch, -1)
        if segments is None:
            return state, place
        now = seg.first(segments)
        fresh = (state.segment != 0) & (now != 0) & (now != state.segment)
        place = torch.where(fresh[:, None], -1, place)
        if tokens > self.bias.length and not torch.compiler.is_compiling():
            # Documents that have ended would be kept for ever.
            dead = int((place < 0).all(0).long().cumprod(0).sum())
            state, place = state._replace(k=state.k[:, dead:], v=state.v[:, dead:]), place[:, dead:]
        return state, place

    def _blocks(
        self,
        k: Float[Tensor, "batch keys width"],
        v: Float[Tensor, "batch keys width"],
        place: Int[Tensor, "rows keys"],
        run: Int[Tensor, "rows keys"],
        time: int,
    ) -> Float[Tensor, "batch time width"]:
        """Averages at the last `time` places, in blocks of queries."""
        left, right = self.bias.left(place[:, -time:], k.dtype), self.bias.right(place.clamp_min(0), k.dtype)
        first, y = k.shape[1] - time, []
        for start in range(first, k.shape[1], CHUNK):
            own = slice(start, start + CHUNK)
            u, mine = left[:, start - first : start - first + CHUNK], run[:, own]
            seen = (mine[:, :, None] == mine[:, None]) & (mine != 0)[:, :, None]
            seen = seen & torch.ones_like(seen[0]).tril()
            sums = near(k[:, own], v[:, own], (u @ right[:, own].mT)[..., None], seen)
            if start:
                # Only the block's first document has tokens before the block.
                of = torch.where(mine != 0, mine, run.shape[1] + 2).amin(1, keepdim=True)
                past = slice(0, start)
                far = pairs(k[:, past], v[:, past], u, right[:, past], mine == of, run[:, past] == of)
                sums = merge(sums, far)
            y.append(average(sums))
        return torch.cat(y, 1)

    def both_sides(
        self,
        k: Float[Tensor, "batch time width"],
        v: Float[Tensor, "batch time width"],
        valid: Bool[Tensor, "batch time"] | None,
    ) -> Float[Tensor, "batch time width"]:
        """Averages over each row's whole document, which begins at 0; `valid` is false behind its end."""
        wide = torch.promote_types(k.dtype, torch.float32)
        k, v = k.to(wide), v.to(wide)
        place = torch.arange(k.shape[1], device=k.device)[None]
        self.bias.check(place, k.shape[1])
        mask = torch.ones_like(place, dtype=torch.bool) if valid is None else valid
        left, right = self.bias.left(place, wide), self.bias.right(place, wide)
        if mask.shape[0] > 1:
            right = right.expand(mask.shape[0], -1, -1)
        y = [
            average(pairs(k, v, u.expand(right.shape[0], -1, -1), right, seen, mask))
            for u, seen in zip(left.split(QUERIES, 1), mask.split(QUERIES, 1), strict=True)
        ]
        return torch.cat(y, 1)
