"""Softmax attention of a static sparse pattern: Sparse Transformer, Longformer, BigBird, StreamingLLM."""

from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ops import sparse_attention
from ops.sparse_attention import Pattern
from ops.sparse_attention import pattern as make_pattern
from ops.sparse_attention.part import visible
from ops.sparse_attention.windows import Longformer, Streaming
from zoo.attention.kv_state import KVState, append, may_write, new_kv, spell_out
from zoo.attention.slot_state import SlotState, grow, new_slots, write
from zoo.block import Block, Out, leave, tag
from zoo.layers.checks import integer
from zoo.layers.heads import heads_and_dim
from zoo.layers.linear import Linear
from zoo.layers.places import Tokens, go_on, locate
from zoo.layers.position import Rotary
from zoo.layers.position import position as make_position

ROTARY: Mapping[str, Any] = {"kind": "rotary"}
LONGFORMER: Mapping[str, Any] = {"kind": "longformer", "window": 256, "global_tokens": 1}


class Sparse(Block):
    """Softmax attention of a static sparse pattern: strided, fixed, Longformer, BigBird or streaming.

    y = W_o · concat_h softmax over the keys that the pattern lets a token see, with q, k, v projected from x.

    Patterns are rules on positions within a document, so each document begins anew; `ops.sparse_attention.PATTERNS`
    has each one's definition, options and paper: strided and fixed (Sparse Transformer, 1904.10509), longformer
    (2004.05150), bigbird (2007.14062), streaming (2309.17453). The time² matrix is never built.

    Args:
        width: features of x.
        heads: query heads; None: as many as make heads of about 64.
        kv_heads: key and value heads, each shared by heads / kv_heads query heads; must divide heads. None: heads.
        head_dim: features of a head; None: width / heads.
        position: {"kind": "rotary", ...} (zoo.layers.position), or None.
        pattern: plain data with a kind, e.g. {"kind": "strided", "stride": 128}, {"kind": "fixed", "stride": 128,
            "summaries": 8}, {"kind": "bigbird", "block": 64, "seed": 3}, {"kind": "streaming", "window": 1020}.
        bias: on all projections.
        global_projections: the global tokens of a bidirectional Longformer look at all others with projections of
            their own for queries, keys and values (its section 3.1), as the published models do.
        causal: False makes the bidirectional form, which takes no state.

    State: what a later token may still see. `SlotState` holds a ring and the sinks or global tokens (streaming,
    longformer), the current block and the summaries (fixed); strided and bigbird, where every token may be seen again,
    have a `KVState` of all tokens (strided of the local subset alone a ring).

    Cost (T tokens, D = width, b bytes a number; a token sees S keys: `window`, `stride` + T / `stride`, ...):
        train time: O(T D^2 + T S heads head_dim)
        train memory: O(T D)
        prefill: O(T D^2 + T S heads head_dim)
        decode: O(D^2 + S heads head_dim) a token
        state bytes: kept(T)*(2*kv_heads*head_dim*b + slot_bytes) + 24
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        position: Mapping[str, Any] | None = ROTARY,
        pattern: Mapping[str, Any] = LONGFORMER,
        bias: bool = False,
        global_projections: bool = False,
        causal: bool = True,
    ):
        super().__init__(width)
        self.heads, self.head_dim = heads_and_dim(width, heads, head_dim)
        self.kv_heads = self.heads if kv_heads is None else integer("kv_heads", kv_heads, otherwise="; None: heads")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={kv_heads} must divide heads={self.heads}; try {gcd(self.kv_heads, self.heads)}"
            )
        self.causal = causal  # pyright: ignore[reportAttributeAccessIssue]  # this class has both forms
        self.pattern: Pattern = make_pattern(pattern, causal)
        self.pattern.parts(self.heads)  # refuses a pattern that does not fit the heads
        self.slot_bytes = 0 if self.pattern.keeps_all else 8
        self.position = make_position(position, self.heads, self.head_dim)
        if not isinstance(self.position, Rotary | None):
            raise ValueError(f"position={position!r} is not for sparse attention; take {{'kind': 'rotary'}} or None")
        self.qkv = Linear(width, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=bias)
        self.out = Linear(self.heads * self.head_dim, width, bias=bias)
        self.global_qkv = self._global_projections(bias) if global_projections else None
        if bias:
            for linear in (self.qkv, self.out, self.global_qkv):
                if linear is not None:
                    tag(linear, "bias", weight_decay=False)

    def _global_projections(self, bias: bool) -> nn.Linear:
        if not isinstance(self.pattern, Longformer) or self.causal or not self.pattern.global_tokens:
            raise ValueError(
                "global_projections=True needs the pattern longformer with global_tokens and causal=False; "
                f"got {self.pattern}"
            )
        # The window and the global tokens' rows apart: their queries, keys and values differ.
        self.rows = replace(self.pattern, subsets="rows")
        self.pattern = replace(self.pattern, subsets="window")
        return Linear(self.width, self.qkv.out_features, bias=bias)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> KVState | SlotState:
        if not self.causal:
            raise ValueError("Sparse with causal=False is bidirectional and has no state")
        device = self.qkv.weight.device if device is None else device
        dtype = self.qkv.weight.dtype if dtype is None else dtype
        if self.pattern.keeps_all:
            return new_kv(batch, self.kv_heads, self.head_dim, device, dtype)
        return new_slots(batch, self.kept(0), self.kv_heads, self.head_dim, device, dtype)

    def kept(self, tokens: int) -> int:
        """Tokens that the state has room for after `tokens` tokens fed."""
        return self.pattern.kept(tokens)

    def state_bytes(self, tokens: int, *, dtype: torch.dtype = torch.float32) -> int:
        """A key and a value for each token that may still be seen. In a state that keeps all tokens 8 bytes a token
        come on top once a row has had padding or a second document, which is not counted here."""
        each = 2 * self.kv_heads * self.head_dim * dtype.itemsize + self.slot_bytes
        return self.kept(tokens) * each + 24

    def flops_per_token(self, context: int) -> int:
        """The projections, and 4 · heads · head_dim for every key that the token sees (without causal, the token in
        the middle)."""
        s = torch.arange(context + 1, device="cpu")
        t = s[-1] if self.causal else s[len(s) // 2]
        seen = visible(self.pattern, self.heads, t, s, s[-1] + 1)
        each = int(seen.sum()) * self.heads // seen.shape[0]
        return super().flops_per_token(context) + 4 * self.head_dim * each

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: KVState | SlotState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0.0)
        q, k, v = self._split(self.qkv(x))
        if state is None:
            y = self._whole(x, q, k, v, segments)
        elif isinstance(state, KVState):
            y, state = self._with_all(q, k, v, state, segments)
        else:
            y, state = self._with_slots(q, k, v, state, segments)
        y = self.out(y.flatten(2))
        if segments is not None and self.out.bias is not None:
            y = torch.where((segments != 0)[..., None], y, 0.0)
        return Out(y, state, {})

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.unflatten(-1, (-1, self.head_dim)).split((self.heads, self.kv_heads, self.kv_heads), 2)

    # Positions --------------------------------------------------------------------------------------------------

    @property
    def _by_cache(self) -> bool:
        """Whether sinks are seen from the query's position in the cache, not from that in the text."""
        made = self.pattern
        cached = isinstance(made, Streaming) and made.cache_positions and made.sinks > 0
        return cached and isinstance(self.position, Rotary)

    def _turn(self, q: Tensor, k: Tensor, places: Int[Tensor, "rows time"] | None) -> tuple[Tensor, Tensor]:
        """Queries and keys turned by their positions; None: 0, 1, ... Of a query that looks at sinks from another
        position than at the window, both turns are put behind one another (`_attend` knows)."""
        if not isinstance(self.position, Rotary):
            return q, k
        if places is None:
            places = torch.arange(q.shape[1], device=q.device)[None]
        cos, sin = self.position.angles(places, q.dtype)
        turned = self.position.turn(q, cos, sin)
        if self._by_cache and isinstance(self.pattern, Streaming):
            turned = torch.cat([turned, self.position(q, self.pattern.toward_sinks(places))], -1)
        return turned, self.position.turn(k, cos, sin)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *where: Tensor | None, pattern: Pattern | None = None) -> Tensor:
        """`where`: runs and positions of queries, then of keys, or nothing."""
        q_runs, q_places, k_runs, k_places = where or (None,) * 4
        k, v = k.to(q.dtype), v.to(q.dtype)
        if self._by_cache and isinstance(self.pattern, Streaming):
            # A key stands where the turn that it is to meet stands, and has zeros for the other.
            places = torch.arange(k.shape[1], device=k.device)[None] if k_places is None else k_places
            sink = (places < self.pattern.sinks)[:, :, None, None]
            k = torch.cat([torch.where(sink, 0.0, k), torch.where(sink, k, 0.0)], -1)
        return sparse_attention(
            q,
            k,
            v,
            self.pattern if pattern is None else pattern,
            scale=self.head_dim**-0.5,
            q_segments=q_runs,
            k_segments=k_runs,
            q_positions=q_places,
            k_positions=k_places,
            clean=True,
        )

    # Attention over what the state and the call hold --------------------------------------------------------------

    def _whole(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None) -> Tensor:
        """Attention within the call."""
        places, where = None, ()
        if segments is not None:
            nothing = torch.zeros(q.shape[0], device=q.device, dtype=torch.long)
            tokens = locate(segments, nothing, nothing, nothing)
            places, where = tokens.places, (tokens.runs, tokens.places) * 2
        q, k = self._turn(q, k, places)
        y = self._attend(q, k, v, *where)
        if self.global_qkv is None:
            return y
        q, k, v = self._split(self.global_qkv(x))
        q, k = self._turn(q, k, places)
        # Each is zero where the other is not.
        return y + self._attend(q, k, v, *where, pattern=self.rows)

    def _with_all(
        self, q: Tensor, k: Tensor, v: Tensor, state: KVState, segments: Tensor | None
    ) -> tuple[Tensor, KVState]:
        old, time = state.k.shape[1], k.shape[1]
        may = may_write(state.k, state.v, q, k, v)
        if old == 0 and state.k.dtype != k.dtype:
            state = state._replace(k=state.k.to(k.dtype), v=state.v.to(v.dtype))
        if segments is None and state.runs.shape[1] == 0:
            # One document a row and no padding: positions are indices.
            q, k = self._turn(q, k, torch.arange(old, old + time, device=k.device)[None])
            keys, values = append(state.k, k, may), append(state.v, v, may)
            segment, run = (leave(state.segment, None), state.run.clamp_min(1)) if old == 0 else state[5:]
            state = KVState(keys, values, state.runs, state.places, state.position + time, segment, run)
            return self._attend(q, keys, values), state
        state = spell_out(state)
        tokens = self._locate(state, segments, time)
        q, k = self._turn(q, k, tokens.places)
        keys, values = append(state.k, k, may), append(state.v, v, may)
        runs, places = append(state.runs, tokens.runs, may), append(state.places, tokens.places, may)
        y = self._attend(q, keys, values, tokens.runs, tokens.places, runs, places)
        return y, KVState(keys, values, runs, places, tokens.position, tokens.segment, tokens.run)

    def _with_slots(
        self, q: Tensor, k: Tensor, v: Tensor, state: SlotState, segments: Tensor | None
    ) -> tuple[Tensor, SlotState]:
        if state.k.dtype != k.dtype:
            state = state._replace(k=state.k.to(k.dtype), v=state.v.to(v.dtype))
        time = k.shape[1]
        tokens = self._locate(state, segments, time)
        q, k = self._turn(q, k, tokens.places)
        if self.kept(0) == 0:  # no slots before the first token: their number grows
            state = grow(state, time, self.kept(state.fed.shape[1] + time))
        before = state
        state = write(state, k, v, tokens, self.pattern.slot(tokens.places))
        if time == 1:
            # What the token took the slot of is not seen by it either.
            return self._attend(q, state.k, state.v, tokens.runs, tokens.places, state.runs, state.places), state
        pairs = zip(before[:4], (k, v, tokens.runs, tokens.places), strict=True)
        keys, values, runs, places = (torch.cat(pair, 1) for pair in pairs)
        return self._attend(q, keys, values, tokens.runs, tokens.places, runs, places), state

    @staticmethod
    def _locate(state: KVState | SlotState, segments: Tensor | None, time: int) -> Tokens:
        if segments is None:
            return go_on(time, state.position, state.segment, state.run)
        return locate(segments, state.position, state.segment, state.run)
