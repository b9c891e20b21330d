"""Kernel attention: softmax's exp(qᵀk) replaced by φ(q)ᵀφ(k), so that all keys and values fit into two sums.

What linear_attention, performer and rfa share: projections, positions, the recurrence with its state, and the
bidirectional form. They differ in φ.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, einsum

from ops import linear_attention
from ops import segments as seg
from zoo.attention.features import wide
from zoo.block import Block, Out, enter, leave, tag
from zoo.layers.heads import heads_and_dim
from zoo.layers.linear import Linear
from zoo.layers.places import go_on, locate
from zoo.layers.position import ALiBi
from zoo.layers.position import position as make_position


class KernelState(NamedTuple):
    """Constant size: the two sums over the document's keys, float32 at least."""

    sums: Float[Tensor, "batch heads features d"]  # S = Σ φ(k) vᵀ
    normaliser: Float[Tensor, "batch heads features"]  # z = Σ φ(k)
    position: Int[Tensor, " batch"]  # tokens so far of the document
    segment: Int[Tensor, " batch"]


class Mapped(NamedTuple):
    """Features of a call's queries and keys, the decay of what was there before each token, and, with a state, the
    leaves of the next state that only this kernel has."""

    q: Float[Tensor, "batch time heads features"]
    k: Float[Tensor, "batch time heads features"]
    log_decay: Float[Tensor, "batch time heads"] | None = None
    leaves: Mapping[str, Tensor] = {}


def meeting_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which features meet values: that of the activations, but float32 for float16, whose range of 12
    orders of magnitude features leave."""
    return torch.float32 if dtype == torch.float16 else dtype


def both_ways(
    q: Float[Tensor, "batch time heads features"],
    k: Float[Tensor, "batch time heads features"],
    v: Float[Tensor, "batch time heads d"],
    eps: float,
    segments: Int[Tensor, "batch time"] | None,
) -> Float[Tensor, "batch time heads d"]:
    """y_t = Σ_s (q_tᵀk_s) v_s / max(Σ_s q_tᵀk_s, eps) over all s of t's document, before and after it; 0 at padding.

    Costs 4 · features · d FLOPs a token and head; with segments the recurrence twice, whose cost does not depend on
    how many documents there are (and which needs no host synchronisation to know).
    """
    given, q, k, v = v.dtype, wide(q), wide(k), wide(v)
    if segments is None:
        above = einsum("bthf,bhfd->bthd", q, einsum("bthf,bthd->bhfd", k, v))
        below = einsum("bthf,bhf->bth", q, k.sum(1))
        return (above / below.clamp_min(eps)[..., None]).to(given)
    run = seg.runs(segments).run
    before = linear_attention(q, k, v, segments=segments)[0]
    after = linear_attention(q.flip(1), k.flip(1), v.flip(1), segments=segments.flip(1))[0].flip(1)
    above = before + after - (q * k).sum(-1, keepdim=True) * v  # both hold the token itself
    index = run[..., None, None].expand_as(k)
    totals = k.new_zeros(k.shape[0], k.shape[1] + 1, *k.shape[2:]).scatter_add(1, index, k).gather(1, index)
    y = above / (q * totals).sum(-1, keepdim=True).clamp_min(eps)
    return torch.where((run != 0)[..., None, None], y, 0).to(given)


class KernelAttention(Block):
    """Base of the blocks that normalise a recurrent sum; a subclass sets `features` and defines `map`."""

    State: ClassVar[Any] = KernelState
    eps: ClassVar[float] = 1e-6  # what the sum of weights is at least
    features: int  # of φ

    def __init__(
        self,
        width: int,
        heads: int | None,
        head_dim: int | None,
        position: Mapping[str, Any] | None,
        bias: bool,
        causal: bool,
    ):
        super().__init__(width)
        self.heads, self.head_dim = heads_and_dim(width, heads, head_dim)
        self.causal = causal  # pyright: ignore[reportAttributeAccessIssue]  # this class has both forms
        made = make_position(position, self.heads, self.head_dim)
        if isinstance(made, ALiBi):
            raise ValueError(
                "position kind 'alibi' adds a bias to each pair's logit, and kernel attention forms no pairs; "
                "use rotary, or None with positions in the embedding"
            )
        self.position = made
        self.qkv = Linear(width, 3 * self.heads * self.head_dim, bias=bias)
        self.out = Linear(self.heads * self.head_dim, width, bias=bias)
        for linear in (self.qkv, self.out) if bias else ():
            tag(linear, "bias", weight_decay=False)

    def map(
        self,
        q: Float[Tensor, "batch time heads d"],
        k: Float[Tensor, "batch time heads d"],
        x: Float[Tensor, "batch time width"],
        state: Any,
        segments: Int[Tensor, "batch time"] | None,
    ) -> Mapped:
        """φ(q) and φ(k). `state` is the one that the document goes on from; None also in the bidirectional form."""
        raise NotImplementedError(f"{type(self).__name__} defines no map")

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> Any:
        if not self.causal:
            raise ValueError(f"{type(self).__name__} with causal=False is bidirectional and has no state")
        device = self.qkv.weight.device if device is None else device
        dtype = torch.promote_types(dtype or self.qkv.weight.dtype, torch.float32)
        integers = {name: torch.zeros(batch, device=device, dtype=torch.long) for name in ("position", "segment")}
        sums = {name: torch.zeros(batch, *s, device=device, dtype=dtype) for name, s in self.leaf_shapes().items()}
        return self.State(**sums, **integers)

    def leaf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes a row of the state's sums."""
        return {"sums": (self.heads, self.features, self.head_dim), "normaliser": (self.heads, self.features)}

    def flops_per_token(self, context: int) -> int:
        """The projections, and 4 a number of S and z: added to and read."""
        matrices = 2 * (self.qkv.weight.numel() + self.out.weight.numel())
        return matrices + 4 * self.heads * self.features * (self.head_dim + 1)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: Any = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        valid = None if segments is None else (segments != 0)[..., None]
        if valid is not None:
            x = torch.where(valid, x, 0.0)
        carried = None
        if state is not None:
            start = self.init_state(1, device=x.device, dtype=state.sums.dtype)
            carried = enter(state, start, segments)
        q, k, v = self.qkv(x).unflatten(-1, (3 * self.heads, self.head_dim)).chunk(3, 2)
        q, k, position = self._turn(q, k, carried, segments)
        mapped = self.map(q, k, x, carried, segments)
        met = meeting_dtype(x.dtype)
        if self.causal:
            y, sums, normaliser = linear_attention(
                mapped.q.to(met),
                mapped.k.to(met),
                v.to(met),
                mapped.log_decay,
                normalise=True,
                eps=self.eps,
                initial_state=None if carried is None else carried.sums,
                initial_normaliser=None if carried is None else carried.normaliser,
                segments=segments,
            )
        else:
            y, sums, normaliser = both_ways(mapped.q, mapped.k, v, self.eps, segments), None, None
        y = self.out(y.to(x.dtype).flatten(2))
        if valid is not None and self.out.bias is not None:
            y = torch.where(valid, y, 0.0)
        if state is None:
            return Out(y, None, {})
        now = {"sums": sums, "normaliser": normaliser, **mapped.leaves}
        return Out(y, self.State(**now, position=position, segment=leave(state.segment, segments)), {})

    def _turn(
        self, q: Tensor, k: Tensor, state: Any, segments: Tensor | None
    ) -> tuple[Tensor, Tensor, Int[Tensor, " batch"] | None]:
        """Queries and keys turned by their positions in the document, and with a state the position after the call."""
        if state is None and self.position is None:
            return q, k, None
        if state is None:
            before, segment = (torch.zeros(len(q), device=q.device, dtype=torch.long) for _ in range(2))
        else:
            before, segment = state.position, state.segment
        run = (segment != 0).long()
        where = (before, segment, run)
        tokens = go_on(q.shape[1], *where) if segments is None else locate(segments, *where)
        if self.position is not None:
            cos, sin = self.position.angles(tokens.places, q.dtype)
            q, k = self.position.turn(q, cos, sin), self.position.turn(k, cos, sin)
        return q, k, tokens.position
