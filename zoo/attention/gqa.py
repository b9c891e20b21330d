"""Softmax attention with `heads` queries over `kv_heads` keys and values: MHA, MQA and what lies between."""

from collections.abc import Mapping
from math import gcd
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ops import attention
from ops.step import Around
from zoo.attention.gqa_step import bind_step
from zoo.attention.kv_state import (
    KVState,
    RingState,
    append,
    may_write,
    new_kv,
    new_ring,
    spell_out,
    write_one,
    write_ring,
)
from zoo.block import Block, Out, Step, leave, tag
from zoo.layers.checks import integer, number
from zoo.layers.heads import heads_and_dim
from zoo.layers.linear import Linear
from zoo.layers.norm import NORMS, norm
from zoo.layers.places import Tokens, go_on, locate
from zoo.layers.position import ALiBi, Rotary
from zoo.layers.position import position as make_position

ROTARY: Mapping[str, Any] = {"kind": "rotary"}


class GQA(Block):
    """Softmax attention, multi-head, grouped-query (2305.13245) or multi-query (1911.02150); window and sinks.

    y = W_o · concat_h softmax(q_h kᵀ_g(h) · scale) v_g(h), with q, k, v projected from x (the rows of `qkv` in turn,
    then those of a gate).

    Grouped-query attention (Ainslie et al., 2305.13245): query head h reads key and value head h // (heads/kv_heads).
    `kv_heads=1` is multi-query (Shazeer, 1911.02150), `kv_heads=heads` (the default) multi-head attention
    (Vaswani et al., 1706.03762). See `ops.attention` for what is visible and for the cost.

    Args:
        width: features of x.
        heads: query heads; None: as many as make heads of about 64.
        kv_heads: key and value heads; must divide heads.
        head_dim: features of a head; None: width / heads.
        position: {"kind": "rotary", ...} or {"kind": "alibi"} (zoo.layers.position), or None.
        window: a token sees the last `window` tokens of its document, itself among them; the state is then a ring
            of constant size. Without `causal` it sees as far on both sides.
        sinks: with a window, a document's first tokens that all of it sees (StreamingLLM, 2309.17453).
        qk_norm: "rms", "layer" or "rms_zero_centered": a norm over each head of q and k, before positions (Qwen 3,
            2505.09388); "rms_across": one over all heads together (OLMoE, 2409.02060).
        qk_norm_eps: added under those norms' root; None is the norm's own default.
        bias: on the projections of q, k and v, and of the gate.
        out_bias: on the output projection.
        softcap: logits become softcap · tanh(logits / softcap) (Gemma 2, 2408.00118).
        scale: factor on q·k; None: 1/sqrt(head_dim).
        gate: each head's output is weighed by σ(W_g x), component by component, before W_o (Gated Attention,
            2505.06708, section 2.2, position G1; Qwen3-Next).
        causal: False makes the bidirectional form, which takes no state.

    State: `KVState`, keys and values of all tokens fed; with a window `RingState`.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D heads head_dim + T^2 heads head_dim), with a window O(T window heads head_dim) in place of T^2
        train memory: O(T D); O(T window heads) more with a window on a CPU
        prefill: as train time, forward
        decode: O(D heads head_dim + T heads head_dim) a token, window + sinks in place of T with a window
        state bytes: (window + sinks)*(2*kv_heads*head_dim*b + 8) + 24 if window else T*2*kv_heads*head_dim*b + 24
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        position: Mapping[str, Any] | None = ROTARY,
        window: int | None = None,
        sinks: int = 0,
        qk_norm: str | None = None,
        qk_norm_eps: float | None = None,
        bias: bool = False,
        out_bias: bool = False,
        softcap: float | None = None,
        scale: float | None = None,
        gate: bool = False,
        causal: bool = True,
    ):
        super().__init__(width)
        self.heads, self.head_dim = heads_and_dim(width, heads, head_dim)
        self.kv_heads = self.heads if kv_heads is None else integer("kv_heads", kv_heads, otherwise="; None: heads")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={kv_heads} must divide heads={self.heads}; try {gcd(self.kv_heads, self.heads)}"
            )
        if window is not None:
            integer("window", window, otherwise=" (a token sees itself); None means no window")
        if integer("sinks", sinks, 0) and window is None:
            raise ValueError(f"sinks={sinks} needs a window; without a window all is seen")
        if softcap is not None and number("softcap", softcap) <= 0:
            raise ValueError(f"softcap={softcap} must be positive; None means no cap")
        if scale is not None:
            number("scale", scale)
        if not isinstance(gate, bool):
            raise ValueError(f"gate={gate!r} must be true or false")
        self.window, self.sinks, self.softcap, self.scale, self.gate = window, sinks, softcap, scale, gate
        self.causal = causal  # pyright: ignore[reportAttributeAccessIssue]  # this class has both forms
        self.position = make_position(position, self.heads, self.head_dim)
        self.parts = [self.heads, self.kv_heads, self.kv_heads] + [self.heads] * gate  # heads in qkv: q, k, v, gate
        self.qkv = Linear(width, sum(self.parts) * self.head_dim, bias=bias)
        self.out = Linear(self.heads * self.head_dim, width, bias=out_bias)
        for linear, has in ((self.qkv, bias), (self.out, out_bias)):
            if has:
                tag(linear, "bias", weight_decay=False)
        self.norm_across = qk_norm == "rms_across"
        self.q_norm, self.k_norm = (self._norm(qk_norm, heads, qk_norm_eps) for heads in (self.heads, self.kv_heads))
        self.qk_norm_eps = None if self.q_norm is None else self.q_norm.eps

    def _norm(self, kind: str | None, heads: int, eps: float | None) -> nn.Module | None:
        if kind is None:
            if eps is not None:
                raise ValueError(
                    f"qk_norm_eps={eps} needs a norm of queries and keys; set qk_norm to rms, or leave it out"
                )
            return None
        if self.norm_across:
            return norm("rms", heads * self.head_dim, eps)
        if kind not in NORMS:
            raise ValueError(f"qk_norm={kind!r} is unknown; choose from {', '.join(NORMS)}, rms_across")
        return norm(kind, self.head_dim, eps)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> KVState | RingState:
        if not self.causal:
            raise ValueError("GQA with causal=False is bidirectional and has no state")
        device = self.qkv.weight.device if device is None else device
        dtype = self.qkv.weight.dtype if dtype is None else dtype
        if self.window is None:
            return new_kv(batch, self.kv_heads, self.head_dim, device, dtype)
        return new_ring(batch, self.window + self.sinks, self.kv_heads, self.head_dim, device, dtype)

    def state_bytes(self, tokens: int, *, dtype: torch.dtype = torch.float32) -> int:
        """Constant with a window; else it grows by a key and a value a token (and 8 bytes, once a row has had padding
        or a second document, which is not counted here)."""
        constant = super().state_bytes(tokens, dtype=dtype)
        return (
            constant
            if self.window is not None
            else constant + tokens * 2 * self.kv_heads * self.head_dim * dtype.itemsize
        )

    def flops_per_token(self, context: int) -> int:
        """The projections, and 4 · heads · head_dim for every key that the token sees."""
        seen = context + 1
        if self.window is not None:
            seen = min(seen, self.window + self.sinks if self.causal else 2 * self.window - 1)
        return super().flops_per_token(context) + 4 * self.heads * self.head_dim * seen

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: KVState | RingState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        if x.shape[1] == 1 and segments is None:
            stepped = self.one_token(x, state)
            if stepped is not None:
                return stepped
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0.0)
        q, k, v, *gate = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.parts, 2)
        if self.q_norm is not None and self.k_norm is not None:
            if self.norm_across:
                q, k = self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)
            else:
                q, k = self.q_norm(q), self.k_norm(k)
        if state is None:
            y = self._whole(q, k, v, segments)
        elif isinstance(state, KVState):
            y, state = self._with_all(q, k, v, state, segments)
        else:
            y, state = self._with_ring(q, k, v, state, segments)
        for each in gate:
            y = y * torch.sigmoid(each)
        y = self.out(y.flatten(2))
        if segments is not None and self.out.bias is not None:
            y = torch.where((segments != 0)[..., None], y, 0.0)
        return Out(y, state, {})

    def bind_step(self, around: Around) -> Step | None:
        return bind_step(self, around)

    # Attention over what the state and the call hold ---------------------------------------------------------

    def _turn(self, q: Tensor, k: Tensor, places: Int[Tensor, "rows time"] | None) -> tuple[Tensor, Tensor]:
        """Queries and keys turned by their positions; None: 0, 1, ..."""
        if not isinstance(self.position, Rotary):
            return q, k
        if places is None:
            places = torch.arange(q.shape[1], device=q.device)[None]
        cos, sin = self.position.angles(places, q.dtype)
        return self.position.turn(q, cos, sin), self.position.turn(k, cos, sin)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_segments: Tensor | None = None,
        k_segments: Tensor | None = None,
        q_positions: Tensor | None = None,
        k_positions: Tensor | None = None,
        *,
        window: int | None = None,
        causal: bool = True,
    ) -> Tensor:
        slopes = self.position.slopes(q.device, q.dtype) if isinstance(self.position, ALiBi) else None
        k, v = k.to(q.dtype), v.to(q.dtype)
        return attention(
            q,
            k,
            v,
            causal=causal,
            scale=self.scale,
            window=window,
            sinks=self.sinks,
            softcap=self.softcap,
            slopes=slopes,
            q_segments=q_segments,
            k_segments=k_segments,
            q_positions=q_positions,
            k_positions=k_positions,
            clean=True,
        )

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None) -> Tensor:
        """Attention within the call."""
        if segments is None:
            q, k = self._turn(q, k, None)
            return self._attend(q, k, v, window=self.window, causal=self.causal)
        nothing = torch.zeros(q.shape[0], device=q.device, dtype=torch.long)
        tokens = locate(segments, nothing, nothing, nothing)
        if self.window is not None and self.causal and q.shape[1] > 2 * self._piece and q.device.type == "cpu":
            # A mask over the whole sequence would cost time²: walk it with a ring instead.
            ring = self.init_state(q.shape[0], device=q.device, dtype=q.dtype)
            assert isinstance(ring, RingState)
            return self._walk(q, k, v, ring, tokens)[0]
        q, k = self._turn(q, k, tokens.places)
        needed = self.window is not None or isinstance(self.position, ALiBi)
        places = tokens.places if needed else None
        return self._attend(q, k, v, tokens.runs, tokens.runs, places, places, window=self.window, causal=self.causal)

    def _with_all(
        self, q: Tensor, k: Tensor, v: Tensor, state: KVState, segments: Tensor | None
    ) -> tuple[Tensor, KVState]:
        old, time = state.k.shape[1], k.shape[1]
        write = may_write(state.k, state.v, q, k, v)
        if old == 0 and state.k.dtype != k.dtype:
            state = state._replace(k=state.k.to(k.dtype), v=state.v.to(v.dtype))
        if segments is None and state.runs.shape[1] == 0:
            # One document a row and no padding: positions are indices, and nothing needs a mask.
            q, k = self._turn(q, k, torch.arange(old, old + time, device=k.device)[None])
            keys, values = append(state.k, k, write), append(state.v, v, write)
            segment, run = (leave(state.segment, None), state.run.clamp_min(1)) if old == 0 else state[5:]
            state = KVState(keys, values, state.runs, state.places, state.position + time, segment, run)
            return self._attend(q, keys, values), state
        state = spell_out(state)
        tokens = self._locate(state, segments, time)
        q, k = self._turn(q, k, tokens.places)
        keys, values = append(state.k, k, write), append(state.v, v, write)
        runs, places = append(state.runs, tokens.runs, write), append(state.places, tokens.places, write)
        where = (tokens.places, places) if isinstance(self.position, ALiBi) else ()
        y = self._attend(q, keys, values, tokens.runs, runs, *where)
        return y, KVState(keys, values, runs, places, tokens.position, tokens.segment, tokens.run)

    def _with_ring(
        self, q: Tensor, k: Tensor, v: Tensor, state: RingState, segments: Tensor | None
    ) -> tuple[Tensor, RingState]:
        assert self.window is not None
        if state.k.dtype != k.dtype:
            state = state._replace(k=state.k.to(k.dtype), v=state.v.to(v.dtype))
        tokens = self._locate(state, segments, k.shape[1])
        if k.shape[1] > 1:
            y, state = self._walk(q, k, v, state, tokens)
            kept = (state.k, state.v, state.runs, state.places)
            return y, RingState(*kept, tokens.position, tokens.segment, tokens.run)
        q, k = self._turn(q, k, tokens.places)
        valid = None if segments is None else segments != 0
        state = write_one(state, k, v, tokens, self.window, self.sinks, valid)
        # What the ring holds of this document is just what this token sees: its slots are all that the mask asks for.
        where = (tokens.places, state.places) if isinstance(self.position, ALiBi) else ()
        return self._attend(q, state.k, state.v, tokens.runs, state.runs, *where, causal=False), state

    @property
    def _piece(self) -> int:
        """Tokens that meet the ring at a time."""
        assert self.window is not None
        return max(self.window, 64)

    def _walk(self, q: Tensor, k: Tensor, v: Tensor, state: RingState, tokens: Tokens) -> tuple[Tensor, RingState]:
        """Any number of tokens, piece by piece over the ring: O(time · window)."""
        assert self.window is not None
        q, k = self._turn(q, k, tokens.places)
        y = []
        for part in zip(*(each.split(self._piece, 1) for each in (q, k, v, tokens.runs, tokens.places)), strict=True):
            q_part, k_part, v_part, runs, places = part
            keys, values = torch.cat([state.k, k_part], 1), torch.cat([state.v, v_part], 1)
            seen, at = torch.cat([state.runs, runs], 1), torch.cat([state.places, places], 1)
            y.append(self._attend(q_part, keys, values, runs, seen, places, at, window=self.window))
            state = write_ring(state, k_part, v_part, runs, places, self.window, self.sinks)
        return torch.cat(y, 1), state

    @staticmethod
    def _locate(state: KVState | RingState, segments: Tensor | None, time: int) -> Tokens:
        if segments is None:
            return go_on(time, state.position, state.segment, state.run)
        return locate(segments, state.position, state.segment, state.run)
