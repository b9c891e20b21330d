"""AFT-local and AFT-conv (2105.14103, eq. 3 and section 3.4): biases within a window, none beyond, all keys summed.

The paper adds Σ_near (e^w - 1) e^k v to a sum over all keys. Where w is very negative that is a difference of nearly
equal numbers, so here the sum is taken apart: keys near by with their biases, and the sum of all others. A running
form keeps that sum and the keys and values that the next tokens still have near by.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from zoo.block import enter, leave
from zoo.recurrent.aft_bias import Band, Offsets
from zoo.recurrent.aft_sums import CHUNK, Sums, average, constant, empty, locate, merge, near, total, where


class AFTWindowState(NamedTuple):
    """Constant size: the sums of the document's tokens but the last window - 1, these, and how many it has."""

    numerator: Float[Tensor, "batch width"]  # float32 at least, as the next two
    denominator: Float[Tensor, "batch width"]
    maximum: Float[Tensor, "batch width"]
    k: Float[Tensor, "batch window_1 width"]  # oldest first; a short document's at the end
    v: Float[Tensor, "batch window_1 width"]
    tokens: Int[Tensor, " batch"]
    segment: Int[Tensor, " batch"]


class _Walk(NamedTuple):
    """What goes from block to block of queries; `rows` is the batch, or 1 where all rows have the same documents."""

    far: Sums  # [batch width], of document `of`
    of: Int[Tensor, " rows"]
    k: Float[Tensor, "batch window_1 width"]
    v: Float[Tensor, "batch window_1 width"]
    place: Int[Tensor, "rows window_1"]
    run: Int[Tensor, "rows window_1"]  # 0: an empty slot


class Windowed(nn.Module):
    """The weighted averages of keys and values with the biases of `bias` (zoo.recurrent.aft_bias)."""

    def __init__(self, width: int, bias: Band | Offsets):
        super().__init__()
        self.width, self.bias = width, bias

    def init_state(self, batch: int, *, device: Any, dtype: torch.dtype) -> AFTWindowState:
        sums = empty(batch, self.width, device=device, dtype=torch.promote_types(dtype, torch.float32))
        ring = torch.zeros(batch, self.bias.window - 1, self.width, device=device, dtype=dtype)
        counts = torch.zeros(batch, device=device, dtype=torch.long)
        return AFTWindowState(*sums, ring, ring.clone(), counts, counts.clone())

    def forward(
        self,
        k: Float[Tensor, "batch time width"],
        v: Float[Tensor, "batch time width"],
        state: AFTWindowState | None,
        segments: Int[Tensor, "batch time"] | None,
    ) -> tuple[Float[Tensor, "batch time width"], AFTWindowState | None]:
        """Causal averages, float32 at least, and the state after the call where one is given."""
        batch, time, _ = k.shape
        wide = torch.promote_types(k.dtype, torch.float32)
        held = self.init_state(batch, device=k.device, dtype=k.dtype if state is None else state.k.dtype)
        if state is not None:
            held = enter(state, held, segments)
        before = held.tokens[:1] if state is None and segments is None else held.tokens
        place, run = locate(time, before, segments if segments is None else segments.long())
        self.bias.check(place, time if state is None else None)
        walk, k, v = self._begin(held, before, wide), k.to(wide), v.to(wide)
        y = []
        for start in range(0, time, CHUNK):
            part = slice(start, start + CHUNK)
            last = state is None and start + CHUNK >= time  # nobody asks for what follows
            out, walk = self._block(k[:, part], v[:, part], place[:, part], run[:, part], walk, segments is None, last)
            y.append(out)
        if state is None:
            return torch.cat(y, 1), None
        far = Sums(*(each.to(state.numerator.dtype) for each in walk.far))
        ring_k, ring_v = (torch.where(walk.run[..., None] != 0, each, 0).to(state.k.dtype) for each in (walk.k, walk.v))
        tokens = (run == walk.of[:, None]).sum(1) + torch.where(walk.of == 1, before, 0)
        return torch.cat(y, 1), AFTWindowState(*far, ring_k, ring_v, tokens, leave(state.segment, segments))

    def _begin(self, held: AFTWindowState, before: Int[Tensor, " rows"], wide: torch.dtype) -> _Walk:
        """The first block goes on from a state, whose document is the row's number 1."""
        far = constant(Sums(*(each.to(wide) for each in held[:3])))
        slots = self.bias.window - 1
        place = before[:, None] + torch.arange(-slots, 0, device=before.device)
        return _Walk(far, torch.ones_like(before), held.k.to(wide), held.v.to(wide), place, (place >= 0).long())

    def _block(
        self,
        k: Float[Tensor, "batch queries width"],
        v: Float[Tensor, "batch queries width"],
        place: Int[Tensor, "rows queries"],
        run: Int[Tensor, "rows queries"],
        walk: _Walk,
        plain: bool,
        last: bool,
    ) -> tuple[Float[Tensor, "batch queries width"], _Walk]:
        """The averages of a block of queries, and what the next block needs. `plain`: no segments."""
        keys, values = torch.cat([walk.k, k], 1), torch.cat([walk.v, v], 1)
        places, runs = torch.cat([walk.place, place], 1), torch.cat([walk.run, run], 1)
        seen = (run[:, :, None] == runs[:, None]) & (run != 0)[:, :, None] & (places[:, None] <= place[:, :, None])
        close = near(keys, values, self.bias(place, places, k.dtype), seen)
        far = where((run == walk.of[:, None])[..., None], Sums(*(each[:, None] for each in walk.far)))
        y = average(merge(close, far))
        if last:
            return y, walk
        of = torch.maximum(walk.of, runs.amax(1))
        mine = runs == of[:, None]
        keep = mine & (mine.flip(1).long().cumsum(1).flip(1) < self.bias.window)
        beyond = total(keys, values, mine & ~keep)
        far = merge(where((of == walk.of)[:, None], walk.far), beyond)
        runs = torch.where(keep, runs, 0)
        ring = _latest((keys, values, places, runs), self.bias.window - 1, None if plain else keep)
        return y, _Walk(far, of, *ring)

    def both_sides(
        self,
        k: Float[Tensor, "batch time width"],
        v: Float[Tensor, "batch time width"],
        valid: Bool[Tensor, "batch time"] | None,
    ) -> Float[Tensor, "batch time width"]:
        """Averages over each row's whole document, which begins at 0; `valid` is false behind its end."""
        time, reach = k.shape[1], self.bias.window - 1
        wide = torch.promote_types(k.dtype, torch.float32)
        k, v = k.to(wide), v.to(wide)
        place = torch.arange(time, device=k.device)[None]
        self.bias.check(place, time)
        mask = torch.ones_like(place, dtype=torch.bool) if valid is None else valid

        def piece(begin: int, end: int) -> Sums:
            return total(k[:, begin:end], v[:, begin:end], mask[:, begin:end])

        starts = list(range(0, time, CHUNK))
        low = [max(0, start - reach) for start in starts]
        high = [min(time, start + CHUNK + reach) for start in starts]
        after = [piece(high[-1], time)]  # sums behind each block's reach, the last block first
        for i in range(len(starts) - 2, -1, -1):
            after.append(merge(after[-1], piece(high[i], high[i + 1])))
        before, y = piece(0, 0), []
        for i, start in enumerate(starts):
            if i:
                before = merge(before, piece(low[i - 1], low[i]))
            queries, keys = place[:, start : start + CHUNK], slice(low[i], high[i])
            seen = mask[:, None, keys].expand(-1, queries.shape[1], -1)
            close = near(k[:, keys], v[:, keys], self.bias(queries, place[:, keys], wide), seen)
            far = merge(before, after[-1 - i])
            y.append(average(merge(close, Sums(*(each[:, None] for each in far)))))
        return torch.cat(y, 1)


def _latest(tensors: tuple[Tensor, ...], slots: int, keep: Bool[Tensor, "rows time"] | None) -> tuple[Tensor, ...]:
    """The last `slots` entries along time of those to keep, in order, right-aligned; None: the last of all."""
    if keep is None:
        return tuple(each[:, each.shape[1] - slots :] for each in tensors)
    index = torch.argsort(keep.long(), dim=1, stable=True)[:, keep.shape[1] - slots :]
    return tuple(
        each.gather(1, index.reshape(*index.shape, *[1] * (each.ndim - 2)).expand(-1, -1, *each.shape[2:]))
        for each in tensors
    )
