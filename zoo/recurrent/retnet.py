"""RetNet's multi-scale retention (Sun et al., 2307.08621): linear attention whose heads forget at fixed rates.

The paper's three forms are one recurrence, eq. 6 (recurrent: a token with a state), eq. 5 (parallel: the matrix of all
pairs) and eq. 7 (chunkwise: pairs within a chunk, a state between chunks), which is what `ops.linear_attention` runs;
its reference is the recurrent form. The parallel form costs O(T²) and is in the tests only.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ops import gated_norm, linear_attention
from ops import segments as seg
from zoo.block import Block, Out, enter, leave, tag
from zoo.layers.checks import integer, number
from zoo.layers.linear import Linear
from zoo.layers.position import ALiBi
from zoo.layers.position import position as make_position
from zoo.layers.spelling import nearest

XPOS = {"kind": "rotary", "layout": "interleaved"}
DECAYS = ("powers", "linspace")
NORMS = ("group", "rms")


class RetNetState(NamedTuple):
    """Constant size: key_dim · value_dim / heads numbers, a position and a document id a row."""

    S: Float[Tensor, "batch heads k_dim v_dim"]  # float32 at least
    position: Int[Tensor, " batch"]  # tokens so far of the document
    segment: Int[Tensor, " batch"]


class HeadNorm(nn.Module):
    """A norm over each head's values by itself, times silu of a gate. "group" takes off the mean (GroupNorm, a head a
    group), "rms" does not; `affine`: one weight a value, which heads share. In float32 at least; 0 stays 0."""

    def __init__(self, size: int, kind: str, affine: bool, eps: float):
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        if affine:
            tag(self, "weight", weight_decay=False)

    def forward(
        self, x: Float[Tensor, "batch time heads v_dim"], gate: Float[Tensor, "batch time heads v_dim"]
    ) -> Float[Tensor, "batch time heads v_dim"]:
        return gated_norm(x, gate, self.weight, eps=self.eps, center=self.kind == "group")

    def extra_repr(self) -> str:
        return f"{self.kind}, affine={self.weight is not None}, eps={self.eps}"


class RetNet(Block):
    """RetNet (2307.08621): gated multi-scale retention, linear attention with one fixed decay a head.

    q, k, v, g = W_in x;  S_n = γ S_{n-1} + k_n v_nᵀ;  o_n = S_nᵀ q_n / √d, for each head (eq. 6), d its key's size;
    y = W_out (swish(g) ⊙ GroupNorm_heads(o))   (eq. 8).

    xPos: q and k turn by n θ at position n of their document, so that q_n·k_m turns by (n - m) θ (eq. 3 and 4). xPos's
    other half multiplies q_n by ζ^n and k_m by ζ^-m with a ζ a pair of channels; the paper makes it one number a head,
    which is γ: the pair meets with γ^(n-m), a decay, and nothing else of it is left to apply (nothing overflows
    either). The state carries the position. Angles are rotary's, base^(-2i/d); the authors' code spaces them from 1 to
    1/base both included, which is rotary's with base^(d/(d-2)).

    Of the paper's three normalisations (section 2.2) the first is 1/√d. The other two divide a token's output in a head
    by a positive number (the root of its decays' sum, and its scores' sum where that is above 1), which the norm takes
    out again, but for its eps. They guard half-precision sums; S is float32 here, and they are left out.

    Options:
        heads: None: of 256 key channels as in the paper, or in narrow models the largest even size that leaves two.
        key_dim, value_dim: channels of all heads; None: width and 2 width, as in the paper.
        decay: "powers": γ_h = 1 - 2^(-5-h), h from 0 (eq. 8); "linspace": log(1 - γ_h) from log 1/32 to log 1/512 in
            equal steps, what the paper's experiments use (section 3.1).
        position: {"kind": "rotary", ...} (its base, layout, fraction, scaling), or None: decay alone.
        norm: "group" (the paper) or "rms", over each head; `norm_affine` gives it a weight (the paper has none).

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D (key_dim + value_dim) + T key_dim value_dim / heads)
        train memory: O(T (key_dim + value_dim + chunk heads)) and one state a chunk of 64 tokens
        prefill: O(T D (key_dim + value_dim) + T key_dim value_dim / heads)
        decode: O(D (key_dim + value_dim) + key_dim value_dim / heads) a token, whatever the context
        state bytes: key_dim*value_dim//heads*max(4, b) + 16
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        decay: str = "powers",
        position: Mapping[str, Any] | None = XPOS,
        norm: str = "group",
        norm_affine: bool = False,
        norm_eps: float = 1e-6,
    ):
        super().__init__(width)
        self.key_dim = width if key_dim is None else integer("key_dim", key_dim)
        self.value_dim = 2 * width if value_dim is None else integer("value_dim", value_dim)
        common = math.gcd(self.key_dim, self.value_dim)
        self.heads = _heads(self.key_dim, common) if heads is None else integer("heads", heads)
        if common % self.heads:
            raise ValueError(
                f"heads={heads} must divide key_dim={self.key_dim} and value_dim={self.value_dim}; "
                f"try {math.gcd(common, self.heads)}"
            )
        for name, value, allowed in (("decay", decay, DECAYS), ("norm", norm, NORMS)):
            if value not in allowed:
                raise ValueError(
                    f"{name}={value!r} is unknown{nearest(value, allowed)}; choose from {', '.join(allowed)}"
                )
        if number("norm_eps", norm_eps) < 0:
            raise ValueError(f"norm_eps={norm_eps} must not be negative")
        made = make_position(position, self.heads, self.key_dim // self.heads)
        if isinstance(made, ALiBi):
            raise ValueError(
                "position kind 'alibi' adds a bias to each pair's logit, and retention has no logits: its decay says "
                "how far a token is; use rotary, or None"
            )
        self.position, self.decay = made, decay
        self.sizes = (self.key_dim, self.key_dim, self.value_dim, self.value_dim)  # of q, k, v and the gate
        self.in_proj = Linear(width, sum(self.sizes), bias=False)
        self.norm = HeadNorm(self.value_dim // self.heads, norm, norm_affine, norm_eps)
        self.out_proj = Linear(self.value_dim, width, bias=False)

    def log_decay(self, device: Any, dtype: torch.dtype) -> Float[Tensor, " heads"]:
        """log γ of each head, made where it is used: of a γ rounded to float32 nothing would be left from head 20."""
        if self.decay == "powers":
            below = torch.exp2(-5.0 - torch.arange(self.heads, device=device, dtype=dtype))
        else:
            ends = math.log(1 / 32), math.log(1 / 512)
            below = torch.linspace(*ends, self.heads, device=device, dtype=dtype).exp()
        return torch.log1p(-below)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> RetNetState:
        dtype = torch.promote_types(dtype or self.in_proj.weight.dtype, torch.float32)
        sizes = self.heads, self.key_dim // self.heads, self.value_dim // self.heads
        counts = (torch.zeros(batch, device=device, dtype=torch.long) for _ in range(2))
        return RetNetState(torch.zeros(batch, *sizes, device=device, dtype=dtype), *counts)

    def flops_per_token(self, context: int) -> int:
        """The matrices; 5 a number of the state (decay, outer product, sum, read-out); 3 a channel that turns; 5 a
        value for norm and gate."""
        matrices = 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        turned = 0 if self.position is None else 2 * self.heads * self.position.dims
        return matrices + 5 * self.key_dim * self.value_dim // self.heads + 3 * turned + 5 * self.value_dim

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: RetNetState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        carried = state
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0)  # a NaN at padding would reach weights' gradients
            if state is not None:
                fresh = self.init_state(len(x), device=x.device, dtype=state.S.dtype)
                carried = enter(state, fresh, segments)
        q, k, v, g = (each.unflatten(-1, (self.heads, -1)) for each in self.in_proj(x).split(self.sizes, -1))
        places, position = _places(x, carried, segments)
        if self.position is not None:
            cos, sin = self.position.angles(places, q.dtype)
            q, k = self.position.turn(q, cos, sin), self.position.turn(k, cos, sin)
        o, last, _ = linear_attention(
            q,
            k,
            v,
            self.log_decay(x.device, torch.promote_types(x.dtype, torch.float32)),
            scale=q.shape[-1] ** -0.5,
            initial_state=None if carried is None else carried.S,
            segments=segments,
        )
        y = self.out_proj(self.norm(o, g).flatten(-2))
        if state is None:
            return Out(y, None, {})
        return Out(y, RetNetState(last.to(state.S.dtype), position, leave(state.segment, segments)), {})


def _places(
    x: Float[Tensor, "batch time width"], state: RetNetState | None, segments: Int[Tensor, "batch time"] | None
) -> tuple[Int[Tensor, "#batch time"], Int[Tensor, " #batch"]]:
    """Each token's position in its document, 0 at padding, and the position after the call. `state` has been entered:
    in a row that begins another document it stands at 0."""
    index = torch.arange(x.shape[1], device=x.device)
    before = index.new_zeros(1) if state is None else state.position
    if segments is None:
        return before[:, None] + index, before + x.shape[1]
    found = seg.runs(segments)
    rank = found.valid.long().cumsum(1) - 1  # among the row's valid tokens
    begin = torch.where(found.start, rank, 0).cummax(1).values  # the rank of the document's first
    places = torch.where(found.valid, rank - begin + torch.where(found.run == 1, before[:, None], 0), 0)
    final = torch.where(found.valid, index, -1).amax(1)
    after = places.gather(1, final.clamp_min(0)[:, None])[:, 0] + 1
    return places, torch.where(final >= 0, after, before)


def _heads(key_dim: int, common: int) -> int:
    """The fewest heads of 256 key channels or less, in a narrow model two, with even keys, which turn in pairs."""
    least = -(-key_dim // 256) if key_dim > 256 else 2
    fitting = [each for each in range(1, common + 1) if common % each == 0]
    even = [each for each in fitting if key_dim // each % 2 == 0] or fitting
    return next((each for each in even if each >= least), even[-1])
