"""Attention to slots that keys and values are projected to along time: what Linformer and FLuRKA share."""

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ops import attention
from zoo.block import Block, Out, State, each_document
from zoo.layers.checks import integer
from zoo.layers.linear import Linear
from zoo.layers.spelling import nearest

PROJECTIONS = ("linear", "conv", "mean", "max")


def choose(name: str, value: str, known: tuple[str, ...]) -> str:
    """`value` if it is one of `known`; a ValueError that lists them for any other."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown{nearest(value, known)}; choose from {', '.join(known)}")
    return value


class TimeProjection(nn.Module):
    """The matrices E (of keys) and F (of values), [slots, length], that make slots of tokens (2006.04768, eq. 7).

    "linear": free matrices; a document of T < length tokens uses their first T columns. The others (the paper's
    "general projections") cut time into windows of length / projected tokens, one a slot: "conv", a filter c of one
    window and its stride, E[j, j·window + i] = c[i]; "mean" and "max", without parameters. They make ceil(T / window)
    slots, and the last window holds what tokens there are: a mean is of those, a filter sees zeros behind them.

    `sharing` says how many matrices there are: "none" two a head, "headwise" E and F, else one that is both.
    """

    def __init__(self, length: int, projected: int, heads: int, sharing: str, kind: str):
        super().__init__()
        self.length, self.kind = integer("length", length), choose("projection", kind, PROJECTIONS)
        if integer("projected", projected) > length:
            raise ValueError(f"projected={projected} must not be above length={length}; try {max(1, length // 4)}")
        self.projected = projected
        if kind != "linear" and length % projected:
            fits = next(each for each in range(projected, 0, -1) if length % each == 0)
            raise ValueError(
                f"projected={projected} must divide length={length} for projection={kind!r}, whose windows are "
                f"length / projected tokens; try projected={fits}"
            )
        self.window = length // projected
        self.parts = 2 if kind in ("linear", "conv") and sharing in ("none", "headwise") else 1
        self.groups = heads if kind in ("linear", "conv") and sharing == "none" else 1
        shape = {"linear": (projected, length), "conv": (self.window,)}.get(kind)
        self.weight = None if shape is None else nn.Parameter(torch.empty(self.parts, self.groups, *shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier's uniform with gain 1/√2, as the authors: slots of `length` tokens are about as large as these."""
        if self.weight is not None:
            outputs, inputs = (self.projected, self.length) if self.kind == "linear" else (1, self.window)
            bound = (3 / (inputs + outputs)) ** 0.5
            nn.init.uniform_(self.weight, -bound, bound)

    @property
    def matrices(self) -> int:
        """How many distinct learned matrices (or filters) there are."""
        return 0 if self.weight is None else self.parts * self.groups

    @property
    def commutes(self) -> bool:
        """Whether E (x W) = (E x) W: every head has one matrix, and it is linear."""
        return self.groups == 1 and self.kind != "max"

    def slots(self, tokens: int) -> int:
        """Slots of a document of so many tokens."""
        return self.projected if self.kind == "linear" else -(-tokens // self.window)

    def filled(self, mask: Bool[Tensor, "rows time"] | None) -> Bool[Tensor, "rows slots"] | None:
        """The slots that hold a token of their row; None: all do, for a linear slot mixes every token."""
        if mask is None or self.kind == "linear":
            return None
        return self._windows(mask).any(-1)

    def _windows(self, each: Tensor) -> Tensor:
        """[rows, time, ...] as [rows, slots, ..., window], with zeros behind the last token."""
        time = each.shape[1]
        padding = [0, 0] * (each.ndim - 2) + [0, self.slots(time) * self.window - time]
        return rearrange(nn.functional.pad(each, padding), "b (k w) ... -> b k ... w", w=self.window)

    def forward(
        self, x: Float[Tensor, "rows time groups c"], part: int, mask: Bool[Tensor, "rows time"] | None
    ) -> Float[Tensor, "rows slots groups c"]:
        """x, zero where the right-padding `mask` is False, by the matrix of keys (part 0) or of values (part 1)."""
        if self.kind == "linear":
            assert self.weight is not None
            weight = self.weight[min(part, self.parts - 1), :, :, : x.shape[1]]
            return einsum(x, weight.to(x.dtype), "b t g c, g k t -> b k g c")
        windows = self._windows(x)
        if self.kind == "conv":
            assert self.weight is not None
            weight = self.weight[min(part, self.parts - 1)]
            return einsum(windows, weight.to(x.dtype), "b k g c w, g w -> b k g c")
        valid = torch.ones_like(x[:, :, 0, 0], dtype=torch.bool) if mask is None else mask
        valid = rearrange(self._windows(valid), "b k w -> b k 1 1 w")
        if self.kind == "mean":
            return windows.sum(-1) / valid.sum(-1).clamp_min(1)
        highest = torch.where(valid, windows, -torch.inf).amax(-1)
        return torch.where(valid.any(-1), highest, 0.0)

    def flops(self, tokens: int, channels: int) -> int:
        """For projecting `channels` numbers a token once."""
        if self.kind == "linear":
            return 2 * self.projected * tokens * channels
        return (2 if self.kind == "conv" else 1) * tokens * channels


class Core(nn.Module):
    """How queries read the slots."""

    def forward(
        self,
        q: Float[Tensor, "rows time heads d"],
        k: Float[Tensor, "rows slots heads d"],
        v: Float[Tensor, "rows slots heads d"],
        filled: Bool[Tensor, "rows slots"] | None,
    ) -> Float[Tensor, "rows time heads d"]:
        """`filled` says which slots hold anything; None: all."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def flops(self, tokens: int, slots: int, heads: int, head_dim: int) -> int:
        raise NotImplementedError(f"{type(self).__name__} defines no flops")


class SoftmaxCore(Core):
    """softmax(q kᵀ / √d) v over the filled slots."""

    def forward(
        self,
        q: Float[Tensor, "rows time heads d"],
        k: Float[Tensor, "rows slots heads d"],
        v: Float[Tensor, "rows slots heads d"],
        filled: Bool[Tensor, "rows slots"] | None,
    ) -> Float[Tensor, "rows time heads d"]:
        return attention(q, k, v, causal=False, k_segments=None if filled is None else filled.long(), clean=True)

    def flops(self, tokens: int, slots: int, heads: int, head_dim: int) -> int:
        return 4 * tokens * slots * heads * head_dim


class ProjectedAttention(nn.Module):
    """W_o · concat_h core(q_h, E k_h, F v_h) for rows of one document each (2006.04768, eq. 7).

    The projection along time comes with each call, since layers may share it. Where all heads share it, x is projected
    before W_k and W_v, which then see `projected` tokens in place of T: the same by associativity, and cheaper.
    """

    def __init__(self, width: int, heads: int, head_dim: int, core: Core):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.q, self.k, self.v = (Linear(width, heads * head_dim, bias=False) for _ in range(3))
        self.out = Linear(heads * head_dim, width, bias=False)
        self.core = core

    def forward(
        self,
        x: Float[Tensor, "rows time width"],
        mask: Bool[Tensor, "rows time"] | None,
        projection: TimeProjection,
    ) -> Float[Tensor, "rows time width"]:
        if mask is not None:  # a slot sums over all columns: nothing may stand at padding
            x = torch.where(mask[..., None], x, 0.0)
        if projection.commutes:
            short = [projection(x[:, :, None], part, mask)[:, :, 0] for part in range(projection.parts)]
            k, v = self._heads(self.k(short[0])), self._heads(self.v(short[-1]))
        else:
            k, v = projection(self._heads(self.k(x)), 0, mask), projection(self._heads(self.v(x)), 1, mask)
        y = self.core(self._heads(self.q(x)), k, v, projection.filled(mask))
        return self.out(rearrange(y, "b t h d -> b t (h d)"))

    def _heads(self, x: Float[Tensor, "rows time inner"]) -> Float[Tensor, "rows time heads d"]:
        return rearrange(x, "b t (h d) -> b t h d", h=self.heads)

    def flops(self, tokens: int, projection: TimeProjection) -> int:
        """For a document of so many tokens."""
        slots, matrix = projection.slots(tokens), self.q.weight.numel()
        total = 4 * matrix * tokens + self.core.flops(tokens, slots, self.heads, self.head_dim)
        if projection.commutes:
            return total + 4 * matrix * slots + projection.parts * projection.flops(tokens, self.q.in_features)
        return total + 4 * matrix * tokens + 2 * projection.flops(tokens, self.heads * self.head_dim)


class Projected(Block):
    """What blocks of this kind share: a length fixed at construction, and a row of its own for every document."""

    causal = False
    length: int

    def run(
        self, x: Float[Tensor, "rows time width"], mask: Bool[Tensor, "rows time"] | None
    ) -> Float[Tensor, "rows time width"]:
        """Outputs of rows of one document each, right-padded as `mask` says (None: full)."""
        raise NotImplementedError(f"{type(self).__name__} defines no run")

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        if segments is None:
            self._fits(x.shape[1])
            return Out(self.run(x, None), None, {})
        return Out(each_document(self._rows, x, segments), None, {})

    def _rows(self, x: Float[Tensor, "rows time width"], mask: Int[Tensor, "rows time"]) -> Tensor:
        self._fits(x.shape[1])
        return self.run(x, mask != 0)

    def _fits(self, tokens: int) -> None:
        if tokens > self.length:
            raise ValueError(
                f"{type(self).__name__} was built for documents of at most length={self.length} tokens and got one of "
                f"{tokens}; build it with length={tokens}, or cut the document"
            )
