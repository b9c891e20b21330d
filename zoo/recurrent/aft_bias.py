"""Position biases w_ts of an Attention Free Transformer (2105.14103): a learned table in factors, or one of offsets."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.block import tag


class Factored(nn.Module):
    """w_ts = u_t · v_s with learned u and v, [length rank] each: 2 · length · rank parameters for length² biases.

    Starts at biases of about 0.1: near AFT-simple, with a gradient for both factors.
    """

    def __init__(self, length: int, rank: int):
        super().__init__()
        self.length, self.rank = length, rank
        self.u = nn.Parameter(torch.empty(length, rank))
        self.v = nn.Parameter(torch.empty(length, rank))
        for name in ("u", "v"):
            nn.init.normal_(getattr(self, name), 0.0, (0.1**2 / rank) ** 0.25)
            tag(self, name, weight_decay=False)

    def check(self, places: Int[Tensor, "rows time"], most: int | None = None) -> None:
        """Refuse a document longer than `length`. `most`: an upper bound of its tokens, where one is known without
        asking the device. A compiled graph cannot ask: there the look-up itself fails."""
        if (most is not None and most <= self.length) or torch.compiler.is_compiling():
            return
        tokens = int(places.max()) + 1
        if tokens > self.length:
            raise ValueError(
                f"a document has {tokens} tokens, and the position biases were built for length={self.length}; "
                f"give length={tokens} or more, split the document, or use variant='conv' or 'simple'"
            )

    def left(self, places: Int[Tensor, "rows time"], dtype: torch.dtype) -> Float[Tensor, "rows time rank"]:
        """u of the queries."""
        return self.u[places].to(dtype)

    def right(self, places: Int[Tensor, "rows time"], dtype: torch.dtype) -> Float[Tensor, "rows time rank"]:
        """v of the keys."""
        return self.v[places].to(dtype)

    def extra_repr(self) -> str:
        return f"length={self.length}, rank={self.rank}"


class Band(Factored):
    """AFT-local: u_t · v_s where |t - s| < window, else 0."""

    def __init__(self, window: int, length: int, rank: int):
        super().__init__(length, rank)
        self.window = window

    def forward(
        self, queries: Int[Tensor, "rows time"], keys: Int[Tensor, "rows keys"], dtype: torch.dtype
    ) -> Float[Tensor, "rows time keys 1"]:
        """Biases of queries and keys at these places (a negative one: nothing stands there)."""
        w = self.left(queries, dtype) @ self.right(keys.clamp_min(0), dtype).mT
        close = (queries[:, :, None] - keys[:, None]).abs() < self.window
        return torch.where(close, w, 0)[..., None]

    def extra_repr(self) -> str:
        return f"window={self.window}, {super().extra_repr()}"


class Offsets(nn.Module):
    """AFT-conv: w_ts = w^h_(t-s) for a head of channels where |t - s| < window, else 0.

    w^h = γ_h (a_h - mean a_h) / std a_h + β_h with learned a, and γ and β that start at 0 (section 3.4): the block
    starts as AFT-simple. `causal`: offsets 0 ... window - 1; else also the negative ones.
    """

    def __init__(self, window: int, heads: int, causal: bool):
        super().__init__()
        self.window, self.heads, self.center = window, heads, 0 if causal else window - 1
        self.weight = nn.Parameter(torch.randn(heads, window + self.center))
        self.gain = nn.Parameter(torch.zeros(heads))
        self.shift = nn.Parameter(torch.zeros(heads))
        for name in ("weight", "gain", "shift"):
            tag(self, name, weight_decay=False)

    def check(self, places: Int[Tensor, "rows time"], most: int | None = None) -> None:
        """Any length will do."""

    def table(self, dtype: torch.dtype) -> Float[Tensor, "heads offsets"]:
        """The biases by offset t - s, rising: the last is of the key furthest before the query."""
        weight = F.layer_norm(self.weight.to(dtype), self.weight.shape[1:])
        return self.gain.to(dtype)[:, None] * weight + self.shift.to(dtype)[:, None]

    def forward(
        self, queries: Int[Tensor, "rows time"], keys: Int[Tensor, "rows keys"], dtype: torch.dtype
    ) -> Float[Tensor, "rows time keys heads"]:
        """Biases of queries and keys at these places."""
        offset = queries[:, :, None] - keys[:, None]
        index = (offset + self.center).clamp(0, self.weight.shape[1] - 1)
        w = F.embedding(index, self.table(dtype).mT)
        return torch.where((offset.abs() < self.window)[..., None], w, 0)

    def extra_repr(self) -> str:
        return f"window={self.window}, heads={self.heads}"
