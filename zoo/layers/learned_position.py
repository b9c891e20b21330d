"""A learned vector for each position, added to the stream."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.block import Block, Out
from zoo.layers.checks import integer
from zoo.layers.places import go_on, locate


class PositionState(NamedTuple):
    """How far each row is in its document."""

    position: Int[Tensor, " batch"]  # tokens so far of the document the row is in
    segment: Int[Tensor, " batch"]  # its id, 0 before the first token


class LearnedPosition(Block):
    """Adds a learned vector for a token's position in its document: absolute positions (GPT-2, StarCoder).

    y = x + table[position] (Gehring et al., 1705.03122, sec. 3.1; as in GPT-2), for the front of a stack, where
    `embedding_scale` and `embedding_norm` have been applied. It owns its residual, so a model places it bare.

    Positions count a document's own tokens from 0: padding counts nothing, and the next document starts again.
    A document of more than `context` tokens is a ValueError that names both numbers. On a GPU only a call longer than
    `context` can say so; where a state adds up to more, the lookup itself stops the program, since to ask the GPU would
    stop it at every token.

    Args:
        width: features of x.
        context: rows of the table, the longest document.

    State: `PositionState`.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D)
        train memory: O(T D), and the table's context D
        prefill: O(T D)
        decode: O(D) a token
        state bytes: 16
    """

    residual = False

    def __init__(self, width: int, context: int = 2048):
        super().__init__(width)
        self.context = integer("context", context)
        # An nn.Embedding, as optimizers treat those: no weight decay, and no Muon.
        self.table = nn.Embedding(context, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> PositionState:
        device = self.table.weight.device if device is None else device
        return PositionState(*(torch.zeros(batch, device=device, dtype=torch.long) for _ in range(2)))

    def flops_per_token(self, context: int) -> int:
        """One addition a feature."""
        return self.width

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: PositionState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        time = x.shape[1]
        if segments is None and time > self.context:
            raise ValueError(self._too_long(time))
        if segments is None and state is None:
            return Out(x + self.table.weight[:time].to(x.dtype), None, {})
        position, segment = self.init_state(len(x), device=x.device) if state is None else state
        before = (position, segment, segment)
        tokens = go_on(time, *before) if segments is None else locate(segments, *before)
        if segments is None:
            y = x + self._rows(tokens.places).to(x.dtype)
        else:
            valid = segments != 0
            # Behind a full document padding would stand at a place that the table lacks.
            rows = self._rows(torch.where(valid, tokens.places, 0))
            y = torch.where(valid[..., None], x + rows.to(x.dtype), 0.0)
        return Out(y, None if state is None else PositionState(tokens.position, tokens.segment), {})

    def _rows(self, places: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        if torch.compiler.is_compiling():
            return self.table(places)
        try:
            return self.table(places)
        except IndexError:
            raise ValueError(self._too_long(int(places.max()) + 1)) from None

    def _too_long(self, tokens: int) -> str:
        return (
            f"a document of {tokens} tokens is longer than context={self.context}, the positions this block has; cut "
            "it, or build the block with a larger context and train its new rows"
        )
