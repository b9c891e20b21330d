"""Where the tokens of a call stand: in which document of their row, and at which position in it.

A document is told from the one before it in the same row by its run, 1, 2, ... counted over the row's life. Positions
count a document's own tokens.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ops import segments as seg
from zoo.block import leave


class Tokens(NamedTuple):
    """Where the tokens of a call stand, and the row's position, segment and run after them."""

    runs: Int[Tensor, "batch time"]
    places: Int[Tensor, "batch time"]
    position: Int[Tensor, " batch"]
    segment: Int[Tensor, " batch"]
    run: Int[Tensor, " batch"]


def locate(
    segments: Int[Tensor, "batch time"],
    position: Int[Tensor, " batch"],
    segment: Int[Tensor, " batch"],
    run: Int[Tensor, " batch"],
) -> Tokens:
    """Runs and positions of a call's tokens after a state's `position`, `segment` and `run`. O(time), no host sync."""
    if segments.shape[1] == 1:
        return _locate_one(segments[:, 0].long(), position, segment, run)
    found = seg.runs(segments)
    goes_on = (segment != 0) & (seg.first(segments) == segment)
    runs = torch.where(found.valid, found.run + torch.where(goes_on, run - 1, run)[:, None], 0)
    rank = found.valid.long().cumsum(1) - 1  # among the row's valid tokens
    begin = torch.where(found.start, rank, 0).cummax(1).values  # the rank of the document's first token
    carried = torch.where(goes_on[:, None] & (found.run == 1), position[:, None], 0)
    places = torch.where(found.valid, rank - begin + carried, 0)
    index = torch.arange(segments.shape[1], device=segments.device)
    last = torch.where(found.valid, index, -1).amax(1)
    at = last.clamp_min(0)[:, None]
    return Tokens(
        runs.int(),
        places.int(),
        torch.where(last >= 0, places.gather(1, at)[:, 0] + 1, position),
        leave(segment, segments),
        torch.where(last >= 0, runs.gather(1, at)[:, 0], run),
    )


def _locate_one(
    now: Int[Tensor, " batch"],
    position: Int[Tensor, " batch"],
    segment: Int[Tensor, " batch"],
    run: Int[Tensor, " batch"],
) -> Tokens:
    """`locate` for one token a row, as decoding asks for it at every step."""
    valid = now != 0
    fresh = valid & (now != segment)  # an unused state's segment is 0, so its first token counts as fresh
    run = run + fresh
    place = torch.where(fresh, 0, position)
    return Tokens(
        torch.where(valid, run, 0)[:, None].int(),
        place[:, None].int(),
        place + valid,
        torch.where(valid, now, segment),
        run,
    )


def go_on(
    time: int, position: Int[Tensor, " batch"], segment: Int[Tensor, " batch"], run: Int[Tensor, " batch"]
) -> Tokens:
    """`locate` for `time` tokens of the document that the state is in (a first one, if it is in none)."""
    run = run.clamp_min(1)
    places = position[:, None] + torch.arange(time, device=position.device)
    return Tokens(run[:, None].expand(-1, time).int(), places.int(), position + time, leave(segment, None), run)
