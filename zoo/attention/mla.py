"""Multi-head latent attention: keys and values of all heads come from one short vector a token, which alone is kept."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, einsum, nn

from ops import attention
from zoo.attention.kv_state import append, may_write
from zoo.block import Block, Out, leave, tag
from zoo.layers.checks import integer
from zoo.layers.heads import heads_and_dim
from zoo.layers.linear import Linear
from zoo.layers.norm import RMSNorm
from zoo.layers.places import Tokens, go_on, locate
from zoo.layers.position import Rotary, logit_factor
from zoo.layers.position import position as make_position

ROTARY: Mapping[str, Any] = {"kind": "rotary", "layout": "interleaved"}


class LatentState(NamedTuple):
    """Latents and turned shared keys of every token fed, padding included: `latent.shape[1]` is their number.

    A leaf of tokens is a view of a buffer with spare room behind it, as in `kv_state.KVState`; `runs` and `places`
    have no columns as long as every token fed was a row's one document's.
    """

    APPEND_ONLY = True  # see zoo.block.snapshot

    latent: Float[Tensor, "batch tokens rank_and_rope"]  # the normed latent, then the shared key
    runs: Int[Tensor, "batch slots"]  # 0 padding, else the document's run; slots is tokens or 0
    places: Int[Tensor, "batch slots"]  # position in the document
    position: Int[Tensor, " batch"]  # tokens so far of the document the row is in
    segment: Int[Tensor, " batch"]  # its id, 0 before the first token
    run: Int[Tensor, " batch"]  # its run, 0 before the first token


def _spell_out(state: LatentState) -> LatentState:
    """The same state with `runs` and `places` of every token."""
    batch, tokens = state.latent.shape[:2]
    if state.runs.shape[1] == tokens:
        return state
    places = torch.arange(tokens, device=state.latent.device, dtype=torch.int32).repeat(batch, 1)
    return LatentState(state.latent, state.run[:, None].repeat(1, tokens).int(), places, *state[3:])


class MLA(Block):
    """Multi-head latent attention (DeepSeek-V2, 2405.04434): keeps one short latent in place of keys and values.

        c_t = norm(W_dkv x_t)             the latent, kv_rank numbers, all that is kept of keys and values (eq. 9)
        k_h = [W_uk,h c ; r]              r = rotary(W_kr x), rope_dim numbers, one key for all heads (eqs. 10, 15, 17)
        v_h = W_uv,h c                    (eq. 11)
        q_h = [W_q,h u ; rotary(W_qr,h u)]    u = x, or norm(W_dq x) with a q_rank (eqs. 12-14, 16)
        y = W_o · concat_h softmax(q_h k_hᵀ · scale) v_h                         (eqs. 18, 19)

    It runs in one of two forms, equal up to rounding. Expanded: keys and values of all heads are made as above.
    Absorbed: q_nope·(W_uk c) = (W_ukᵀ q_nope)·c and Σ w_s W_uv c_s = W_uv Σ w_s c_s, so that every head reads the one
    key [c ; r] and the one value c as multi-query attention does: nothing of [tokens, heads, ...] is made but scores.
    `absorbs` takes the form with fewer FLOPs: with S tokens seen and T of them new, absorbed iff
    (S − T)·kv_rank·(nope_dim + value_dim) > T·S·(2·kv_rank + rope_dim − nope_dim − value_dim): decoding, and short
    chunks of a long context (T < 158 at DeepSeek-V3's sizes); a sequence without a past is expanded,
    unless the latent is tiny.

    Args:
        width: features of x.
        heads: None: as many as make heads of about 64.
        kv_rank: size of the latent; None: 4 · nope_dim (as published), at most half the width.
        q_rank: size of the queries' latent; None: queries are projected directly.
        nope_dim: components of a head's q and k that do not turn; None: width / heads.
        rope_dim: components that turn, even; None: half of nope_dim.
        value_dim: components of a head's value; None: nope_dim.
        position: {"kind": "rotary", ...} (zoo.layers.position) for the rope_dim components; published models lay
            them out interleaved. A YaRN scaling's `mscale_all_dim` changes the softmax scale, too. None: none turn.
        bias: on W_dq, W_dkv with W_kr, and W_o, as in published models.
        causal: False makes the bidirectional form, which takes no state.

    scale is 1/sqrt(nope_dim + rope_dim) times `zoo.layers.position.logit_factor`.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T heads (D + kv_rank + T) (nope_dim + rope_dim + value_dim))
        train memory: O(T D + T heads (nope_dim + rope_dim + value_dim))
        prefill: as training; a long chunk after S tokens expands them all, O(S heads (nope_dim + value_dim)) memory
        decode: O(heads (D + kv_rank) (nope_dim + rope_dim + value_dim) + T heads (kv_rank + rope_dim)) a token
        state bytes: T*(kv_rank + rope_dim)*b + 24 if causal else 0

    Grouped-query attention keeps 2·kv_heads·head_dim numbers a token, DeepSeek-V3's sizes (kv_rank 512, rope_dim 64)
    576: as many as 2.25 key-value heads of 128, where its 128 heads would need 32768 (2405.04434, table 1).

    State: `LatentState`. A projection W_uk, W_uv that is wrapped (LoRA) or sharded has no plain weight to absorb: then
    all calls are expanded.
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        kv_rank: int | None = None,
        q_rank: int | None = None,
        nope_dim: int | None = None,
        rope_dim: int | None = None,
        value_dim: int | None = None,
        position: Mapping[str, Any] | None = ROTARY,
        bias: bool = False,
        causal: bool = True,
    ):
        super().__init__(width)
        sizes = {"heads": heads, "kv_rank": kv_rank, "q_rank": q_rank, "nope_dim": nope_dim, "rope_dim": rope_dim,
                 "value_dim": value_dim}  # fmt: skip
        for name, value in sizes.items():
            if value is not None:
                none = "projects queries directly" if name == "q_rank" else "chooses one"
                integer(name, value, otherwise=f"; None {none}")
        self.heads, self.nope_dim = heads_and_dim(width, heads, nope_dim, "nope_dim")
        self.value_dim = self.nope_dim if value_dim is None else value_dim
        self.rope_dim = max(2, self.nope_dim // 4 * 2) if rope_dim is None else rope_dim
        self.kv_rank = max(1, min(4 * self.nope_dim, width // 2)) if kv_rank is None else kv_rank
        self.q_rank = q_rank
        self.causal = causal  # pyright: ignore[reportAttributeAccessIssue]  # this class has both forms
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim={rope_dim} must be even: rotary turns pairs; try {self.rope_dim + 1}")
        found = make_position(position, self.heads, self.rope_dim)
        if not (found is None or isinstance(found, Rotary)):
            raise ValueError(f"mla takes rotary positions or None, got {position!r}; gqa takes ALiBi")
        self.position = found
        self.scale = (self.nope_dim + self.rope_dim) ** -0.5 * logit_factor((position or {}).get("scaling"))

        queries = self.heads * (self.nope_dim + self.rope_dim)
        if q_rank is None:
            self.q_down = self.q_norm = None
            self.q_up = Linear(width, queries, bias=False)
        else:
            self.q_down, self.q_norm = Linear(width, q_rank, bias=bias), RMSNorm(q_rank)
            self.q_up = Linear(q_rank, queries, bias=False)
        self.kv_down, self.kv_norm = Linear(width, self.kv_rank + self.rope_dim, bias=bias), RMSNorm(self.kv_rank)
        self.kv_up = Linear(self.kv_rank, self.heads * (self.nope_dim + self.value_dim), bias=False)
        self.out = Linear(self.heads * self.value_dim, width, bias=bias)
        for linear in (self.q_down, self.kv_down, self.out):
            if bias and linear is not None:
                tag(linear, "bias", weight_decay=False)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> LatentState:
        if not self.causal:
            raise ValueError("MLA with causal=False is bidirectional and has no state")
        device = self.kv_down.weight.device if device is None else device
        dtype = self.kv_down.weight.dtype if dtype is None else dtype
        latent = torch.zeros(batch, 0, self.kv_rank + self.rope_dim, device=device, dtype=dtype)
        runs, places = (torch.zeros(batch, 0, device=device, dtype=torch.int32) for _ in range(2))
        return LatentState(
            latent, runs, places, *(torch.zeros(batch, device=device, dtype=torch.long) for _ in range(3))
        )

    def state_bytes(self, tokens: int, *, dtype: torch.dtype = torch.float32) -> int:
        """Grows by a latent and a shared key a token (and 8 bytes, once a row has had padding or a second document,
        which is not counted here); 0 in the bidirectional form."""
        if not self.causal:
            return 0
        return super().state_bytes(tokens, dtype=dtype) + tokens * (self.kv_rank + self.rope_dim) * dtype.itemsize

    def flops_per_token(self, context: int) -> int:
        """The projections, and the pairs of the cheaper form of one more token; W_uk and W_uv count once in both."""
        one = 2 * (self.kv_rank + self.rope_dim)
        if not self.causal:  # no past: all its tokens are new
            one = min(one, self.nope_dim + self.rope_dim + self.value_dim)
        return super().flops_per_token(context) + 2 * self.heads * one * (context + 1)

    def absorbs(self, time: int, keys: int) -> bool:
        """Whether `time` queries over `keys` tokens take fewer FLOPs absorbed than expanded."""
        if type(self.kv_up) is not Linear or type(self.kv_up.weight) is not nn.Parameter:
            return False  # the weight alone would be without what a wrapper adds
        up = self.kv_rank * (self.nope_dim + self.value_dim)
        expanded = keys * up + time * keys * (self.nope_dim + self.rope_dim + self.value_dim)
        return time * up + time * keys * 2 * (self.kv_rank + self.rope_dim) < expanded

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: LatentState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0.0)
        if state is None:
            runs, places = self._places(x, segments)
            q, latent = self._project(x, places)
            y = self._attend(q, latent, runs, runs)
        else:
            y, state = self._with_state(x, state, segments)
        y = self.out(y.flatten(2))
        if segments is not None and self.out.bias is not None:
            y = torch.where((segments != 0)[..., None], y, 0.0)
        return Out(y, state, {})

    # Queries and latents ---------------------------------------------------------------------------------------

    @staticmethod
    def _places(x: Tensor, segments: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Runs (None: one document a row) and positions of a call without a state."""
        if segments is None:
            return None, torch.arange(x.shape[1], device=x.device)[None]
        nothing = torch.zeros(x.shape[0], device=x.device, dtype=torch.long)
        tokens = locate(segments, nothing, nothing, nothing)
        return tokens.runs, tokens.places

    def _project(
        self, x: Float[Tensor, "batch time width"], places: Int[Tensor, "#batch time"]
    ) -> tuple[Float[Tensor, "batch time heads nope_and_rope"], Float[Tensor, "batch time rank_and_rope"]]:
        """Queries, and latents with shared keys; what turns is turned by its position."""
        u = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q_nope, q_rope = self.q_up(u).unflatten(-1, (self.heads, -1)).split((self.nope_dim, self.rope_dim), -1)
        latent, k_rope = self.kv_down(x).split((self.kv_rank, self.rope_dim), -1)
        if self.position is not None:
            cos, sin = self.position.angles(places, q_rope.dtype)
            q_rope = self.position.turn(q_rope, cos, sin)
            k_rope = self.position.turn(k_rope[:, :, None], cos, sin)[:, :, 0]
        latent = self.kv_norm(latent).to(k_rope.dtype)
        return torch.cat([q_nope, q_rope], -1), torch.cat([latent, k_rope], -1)

    def _with_state(self, x: Tensor, state: LatentState, segments: Tensor | None) -> tuple[Tensor, LatentState]:
        """Attention over what the state and the call hold."""
        old, time = state.latent.shape[1], x.shape[1]
        if segments is None and state.runs.shape[1] == 0:
            # One document a row and no padding: positions are indices, and nothing needs a mask.
            q, new = self._project(x, torch.arange(old, old + time, device=x.device)[None])
            latent = self._append(state.latent, new, q)
            segment, run = (leave(state.segment, None), state.run.clamp_min(1)) if old == 0 else state[4:]
            state = LatentState(latent, state.runs, state.places, state.position + time, segment, run)
            return self._attend(q, latent), state
        state = _spell_out(state)
        tokens = self._locate(state, segments, time)
        q, new = self._project(x, tokens.places)
        write = may_write(state.latent, q, new)
        runs, places = append(state.runs, tokens.runs, write), append(state.places, tokens.places, write)
        latent = self._append(state.latent, new, q)
        y = self._attend(q, latent, tokens.runs, runs)
        return y, LatentState(latent, runs, places, tokens.position, tokens.segment, tokens.run)

    @staticmethod
    def _append(latent: Tensor, new: Tensor, q: Tensor) -> Tensor:
        write = may_write(latent, q, new)
        return append(latent if latent.shape[1] else latent.to(new.dtype), new, write)

    @staticmethod
    def _locate(state: LatentState, segments: Tensor | None, time: int) -> Tokens:
        if segments is None:
            return go_on(time, state.position, state.segment, state.run)
        return locate(segments, state.position, state.segment, state.run)

    # The two forms ---------------------------------------------------------------------------------------------

    def _attend(
        self,
        q: Float[Tensor, "batch time heads nope_and_rope"],
        latent: Float[Tensor, "batch keys rank_and_rope"],
        q_runs: Int[Tensor, "batch time"] | None = None,
        k_runs: Int[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch time heads v"]:
        latent = latent.to(q.dtype)
        form = self._absorbed if self.absorbs(q.shape[1], latent.shape[1]) else self._expanded
        # A document's tokens stand in the order of their indices, padding between them or not.
        return form(q, latent, causal=self.causal, q_segments=q_runs, k_segments=k_runs, clean=True)

    def _expanded(self, q: Tensor, latent: Tensor, **rules: Any) -> Tensor:
        c, k_rope = latent.split((self.kv_rank, self.rope_dim), -1)
        k_nope, v = self.kv_up(c).unflatten(-1, (self.heads, -1)).split((self.nope_dim, self.value_dim), -1)
        k = torch.cat([k_nope, k_rope[:, :, None].expand(-1, -1, self.heads, -1)], -1)
        return attention(q, k, v, scale=self.scale, **rules)

    def _absorbed(self, q: Tensor, latent: Tensor, **rules: Any) -> Tensor:
        weights = self.kv_up.weight.unflatten(0, (self.heads, -1))
        w_uk, w_uv = weights.split((self.nope_dim, self.value_dim), 1)  # [heads, nope or value, rank]
        q_nope, q_rope = q.split((self.nope_dim, self.rope_dim), -1)
        q = torch.cat([einsum("bthn, hnc -> bthc", q_nope, w_uk), q_rope], -1)
        # The key serves as the value whole, its turned part is left behind: one size for both is what fast kernels
        # take, and cutting the value out of the state would copy it.
        key = latent[:, :, None]
        summed = attention(q, key, key, scale=self.scale, **rules)[..., : self.kv_rank]
        return einsum("bthc, hvc -> bthv", summed, w_uv)
