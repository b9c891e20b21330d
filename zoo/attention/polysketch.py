"""PolySketchFormer (Kacham et al., 2310.01655): polynomial attention, exact near by and sketched farther off."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, einsum
from torch.nn.functional import pad

from ops import linear_attention
from zoo.attention.features import self_tensor, wide
from zoo.attention.kernel import meeting_dtype
from zoo.attention.sketch import Sketch, is_learned, make_sketch
from zoo.block import Block, Out, enter, leave
from zoo.layers.checks import integer
from zoo.layers.heads import heads_and_dim
from zoo.layers.linear import Linear
from zoo.layers.norm import LayerNorm
from zoo.layers.places import go_on, locate
from zoo.layers.position import ALiBi
from zoo.layers.position import position as make_position

ROTARY: Mapping[str, Any] = {"kind": "rotary"}


class PolySketchState(NamedTuple):
    """Constant size: the last `block` tokens as they are, and the sum over the document's tokens before those."""

    sums: Float[Tensor, "batch heads features d_1"]  # Σ φ(k) [v, 1]ᵀ, float32 at least
    k: Float[Tensor, "batch block heads d"]  # oldest first; of these the last `position` are the document's
    v: Float[Tensor, "batch block heads d"]
    sketch: Float[Tensor, "batch block heads r"]  # of k
    position: Int[Tensor, " batch"]  # tokens so far of the document
    segment: Int[Tensor, " batch"]


class Tokens(NamedTuple):
    """Keys, with what is needed to tell which query sees them how."""

    k: Float[Tensor, "batch tokens heads d"]
    v: Float[Tensor, "batch tokens heads d"]
    sketch: Float[Tensor, "batch tokens heads r"]
    run: Int[Tensor, "batch tokens"]  # the document, counted over the row; 0 padding
    place: Int[Tensor, "batch tokens"]  # in the document


class PolySketch(Block):
    """PolySketchFormer (2310.01655): weights (qᵀk)^p, exact within a local block, by polynomial sketches beyond it.

    y_t = Σ_s w(q_t, k_s) v_s / (1 + Σ_s w(q_t, k_s)), q and k layer-normed a head
    w = (qᵀk)^p where s is in t's block of `block` tokens, counted from the document's start
    w = (S(q)ᵀS(k))² = φ(q)ᵀφ(k), φ(x) = S(x) ⊗ S(x), elsewhere; S a sketch of degree p/2 (algorithm 1)

    So no weight is negative, and all keys but the last few fit into one sum. Of the symmetric S(x) ⊗ S(x) only the
    r(r + 1)/2 different entries are kept. q and k are divided by √head_dim, and the 1 by head_dim^p to match: the
    same quotient with weights of at most about 1.

    The sum takes in a key only once it is `block` tokens old; what is nearer is weighed pair by pair. So exact and
    sketched weights never have to be subtracted from one another.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D^2 + T heads (features head_dim + block (head_dim + sketch_size)))
        train memory: O(T D + T heads (features + block))
        prefill: O(T D^2 + T heads (features head_dim + block (head_dim + sketch_size)))
        decode: O(D^2 + heads (features head_dim + block (head_dim + sketch_size))) a token
        state bytes: max(4, b)*heads*features*(head_dim + 1) + b*block*heads*(2*head_dim + sketch_size) + 16

    Args:
        width: features of x.
        heads: None: as many as make heads of about 64.
        head_dim: features of a head; None: width / heads.
        degree: p, even. With 2 the sketch is k itself and all weights are exact.
        sketch: "random" (Gaussian projections, a buffer saved with the weights, one for all heads; `redraw` draws
            others) or "learned" (small networks in their place).
        sketch_size: r; None: 32, the smaller of the paper's, but not more than head_dim.
        block: tokens of a local block; 1: only a token itself is exact.
        position: {"kind": "rotary", ...}, as in the paper's models, after the norm; or None.
        causal: False makes the bidirectional form, which takes no state.

    State: `PolySketchState`, of constant size.
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        head_dim: int | None = None,
        degree: int = 4,
        sketch: str = "random",
        sketch_size: int | None = None,
        block: int = 64,
        position: Mapping[str, Any] | None = ROTARY,
        causal: bool = True,
    ):
        super().__init__(width)
        self.heads, self.head_dim = heads_and_dim(width, heads, head_dim)
        self.causal = causal  # pyright: ignore[reportAttributeAccessIssue]  # this class has both forms
        if integer("degree", degree, 2) % 2:
            raise ValueError(f"degree={degree} must be even, or weights are negative; try {degree + 1}")
        self.degree, self.block = degree, integer("block", block)
        rows = min(32, self.head_dim) if sketch_size is None else integer("sketch_size", sketch_size)
        self.sketch_size = self.head_dim if degree == 2 else rows
        self.features = self.sketch_size * (self.sketch_size + 1) // 2
        made = make_position(position, self.heads, self.head_dim)
        if isinstance(made, ALiBi):
            raise ValueError("position kind 'alibi' adds to logits, which a sketch does not form; use rotary or None")
        self.position = made
        self.qkv = Linear(width, 3 * self.heads * self.head_dim, bias=False)
        self.q_norm, self.k_norm = LayerNorm(self.head_dim), LayerNorm(self.head_dim)
        self.sketch = make_sketch(self.head_dim, degree // 2, self.sketch_size, is_learned(sketch))
        self.out = Linear(self.heads * self.head_dim, width, bias=False)
        # The paper's 1, of weights (qᵀk / head_dim)^p; not so small that nothing is left of it.
        self.one = max(float(self.head_dim) ** -degree, 1e-30)

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw another random sketch: between steps of training, never with a state in use."""
        if isinstance(self.sketch, Sketch):
            self.sketch.redraw(generator)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> PolySketchState:
        if not self.causal:
            raise ValueError("PolySketch with causal=False is bidirectional and has no state")
        device = self.qkv.weight.device if device is None else device
        dtype = self.qkv.weight.dtype if dtype is None else dtype
        last = (batch, self.block, self.heads)
        summed = torch.promote_types(dtype, torch.float32)
        return PolySketchState(
            torch.zeros(batch, self.heads, self.features, self.head_dim + 1, device=device, dtype=summed),
            torch.zeros(*last, self.head_dim, device=device, dtype=dtype),
            torch.zeros(*last, self.head_dim, device=device, dtype=dtype),
            torch.zeros(*last, self.sketch_size, device=device, dtype=dtype),
            torch.zeros(batch, device=device, dtype=torch.long),
            torch.zeros(batch, device=device, dtype=torch.long),
        )

    def flops_per_token(self, context: int) -> int:
        """The projections, the sketches of q and k, the pairs near by and the sum beyond them."""
        kernels = [p for p in (*self.sketch.parameters(), *self.sketch.buffers()) if p.ndim >= 2]
        near = min(context + 1, self.block if self.causal else 2 * self.block - 1)
        pairs = 2 * near * (2 * self.head_dim + self.sketch_size)
        beyond = (1 if self.causal else 2) * 4 * self.features * (self.head_dim + 1)
        sketches = 4 * sum(p.numel() for p in kernels)
        return 2 * (self.qkv.weight.numel() + self.out.weight.numel()) + self.heads * (pairs + beyond + sketches)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: PolySketchState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0.0)
        start = state
        if state is not None and segments is not None:
            start = enter(state, self.init_state(1, device=x.device, dtype=state.v.dtype), segments)
        zero = torch.zeros(len(x), device=x.device, dtype=torch.long)
        position, segment = (zero, zero) if start is None else (start.position, start.segment)
        before = (position, segment, (segment != 0).long())
        where = go_on(x.shape[1], *before) if segments is None else locate(segments, *before)
        q, tokens = self._project(x, where.runs, where.places)
        order = None if segments is None or x.shape[1] == 1 else _valid_first(segments)
        if order is not None:
            q, tokens = _take(q, order), Tokens(*(_take(each, order) for each in tokens))
        seen = _after(self._kept(tokens, start), tokens)
        y, sums = self._attend(q, tokens, seen, start, segments is not None)
        if order is not None:
            y = _take(y, order.argsort(1))
        y = y.to(x.dtype).flatten(2)
        y = self.out(y if segments is None else torch.where((segments != 0)[..., None], y, 0.0))
        if state is None or sums is None:
            return Out(y, None, {})
        last = (tokens.run != 0).sum(1, keepdim=True) + torch.arange(self.block, device=x.device)
        k, v, of_k = (_take(each, last).to(state.v.dtype) for each in (seen.k, seen.v, seen.sketch))
        return Out(y, PolySketchState(sums, k, v, of_k, where.position, leave(state.segment, segments)), {})

    def _project(self, x: Tensor, run: Tensor, place: Tensor) -> tuple[Tensor, Tokens]:
        """Queries with their sketches behind them, and keys."""
        q, k, v = self.qkv(x).unflatten(-1, (3 * self.heads, self.head_dim)).chunk(3, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.position is not None:
            cos, sin = self.position.angles(place, x.dtype)
            q, k = self.position.turn(q, cos, sin), self.position.turn(k, cos, sin)
        # Divided so that weights come out head_dim^p smaller, exact and sketched ones alike.
        both = self.sketch(torch.cat([q, k], 2)) * self.head_dim ** (-self.degree / 4)
        q, k = q * self.head_dim**-0.5, k * self.head_dim**-0.5
        # Rounded to what a state keeps of it, so that a token weighs the same before and after a call's end.
        of_q, of_k = both.to(x.dtype).chunk(2, 2)
        run = run.expand(len(x), -1).long()
        return torch.cat([q, of_q], -1), Tokens(k, v, of_k, run, place.expand(len(x), -1).long())

    def _attend(
        self,
        q: Float[Tensor, "batch time heads d_r"],
        tokens: Tokens,
        seen: Tokens,
        state: PolySketchState | None,
        packed: bool,
    ) -> tuple[Float[Tensor, "batch time heads d"], Tensor | None]:
        """Outputs of rows without padding between tokens, and with a state its sums after the call."""
        q, of_q = q.split([self.head_dim, self.sketch_size], -1)
        total, sums = self._near(q, of_q, tokens, seen), None
        if state is not None or q.shape[1] > self.block:
            beyond, sums = self._beyond(of_q, tokens.run, seen, None if state is None else state.sums, packed)
            total = total + beyond
        if not self.causal and q.shape[1] > self.block:
            back = Tokens(*(each.flip(1) for each in tokens))
            ahead = self._beyond(of_q.flip(1), back.run, _after(self._kept(back, None), back), None, packed)[0]
            total = total + ahead.flip(1)
        return total[..., :-1] / (self.one + total[..., -1:]), sums

    def _kept(self, tokens: Tokens, state: PolySketchState | None) -> Tokens:
        """The `block` tokens before the call's; those that are not its first document's have the run 0."""
        batch = len(tokens.run)
        if state is None:
            nothing = (each.new_zeros(batch, self.block, *each.shape[2:]) for each in tokens)
            return Tokens(*nothing)
        place = state.position[:, None] - self.block + torch.arange(self.block, device=state.position.device)
        k, v, of_k = (each.to(tokens.k.dtype) for each in (state.k, state.v, state.sketch))
        return Tokens(k, v, of_k, (place >= 0).long(), place.clamp_min(0))

    def _near(self, q: Tensor, of_q: Tensor, tokens: Tokens, seen: Tokens) -> Float[Tensor, "batch time heads d_1"]:
        """Σ w [v, 1] over the keys less than `block` tokens away: exact in the query's own block, sketched else.

        Walks in pieces of up to `block` queries over the keys that one of them may reach: O(time · block).
        """
        time, piece = q.shape[1], min(self.block, q.shape[1])
        reach = piece + (1 if self.causal else 2) * (self.block - 1)
        tail = -time % piece
        ahead = tail if self.causal else tail + self.block - 1

        def windows(x: Tensor) -> Tensor:
            """[batch, 1 + keys, ...] -> [batch, pieces, reach, ...]"""
            x = pad(x[:, 1:], (0,) * (2 * (x.ndim - 2)) + (0, ahead))
            return x.unfold(1, reach, piece).movedim(-1, 2)

        def pieces(x: Tensor) -> Tensor:
            return pad(x, (0,) * (2 * (x.ndim - 2)) + (0, tail)).unflatten(1, (-1, piece))

        keys = Tokens(*(windows(each) for each in seen))
        run, place = pieces(tokens.run)[..., None], pieces(tokens.place)[..., None]
        away = torch.arange(reach, device=q.device) - torch.arange(piece, device=q.device)[:, None]
        visible = (away >= 0) & (away <= reach - piece) & (run == keys.run[:, :, None]) & (run != 0)
        together = place // self.block == keys.place[:, :, None] // self.block
        exact = einsum("bnqhd,bnkhd->bnhqk", wide(pieces(q)), wide(keys.k)) ** self.degree
        sketched = einsum("bnqhr,bnkhr->bnhqk", wide(pieces(of_q)), wide(keys.sketch)) ** 2
        weights = torch.where(visible[:, :, None], torch.where(together[:, :, None], exact, sketched), 0.0)
        above = einsum("bnhqk,bnkhd->bnqhd", weights, wide(keys.v))
        below = weights.sum(-1).movedim(2, 3)[..., None]
        return torch.cat([above, below], -1).flatten(1, 2)[:, :time]

    def _beyond(
        self, of_q: Tensor, run: Int[Tensor, "batch time"], seen: Tokens, sums: Tensor | None, packed: bool
    ) -> tuple[Float[Tensor, "batch time heads d_1"], Float[Tensor, "batch heads features d_1"]]:
        """Σ φ(q)ᵀφ(k) [v, 1] over the document's keys at least `block` tokens back, and the sums after the call."""
        met = meeting_dtype(of_q.dtype)
        old = Tokens(*(each[:, : of_q.shape[1]] for each in seen))
        mine = (old.run == run)[..., None, None]
        values = torch.cat([old.v, torch.ones_like(old.v[..., :1])], -1).to(met)
        y, sums, _ = linear_attention(
            self_tensor(wide(of_q)).to(met),
            self_tensor(torch.where(mine, wide(old.sketch), 0.0)).to(met),
            values,
            initial_state=sums,
            segments=run if packed else None,
        )
        return wide(y), sums


def _take(x: Shaped[Tensor, "batch time ..."], index: Int[Tensor, "batch taken"]) -> Tensor:
    """x[b, index[b]]"""
    shape = (*index.shape, *[1] * (x.ndim - 2))
    return x.gather(1, index.reshape(shape).expand(-1, -1, *x.shape[2:]))


def _valid_first(segments: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Indices of a row's tokens, then of its padding: a token `block` tokens back stands `block` places back."""
    return (segments == 0).long().argsort(dim=1, stable=True)


def _after(kept: Tokens, tokens: Tokens) -> Tokens:
    return Tokens(*(torch.cat(each, 1) for each in zip(kept, tokens, strict=True)))
