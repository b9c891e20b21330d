"""HGRN2 (Qin et al., 2404.07904): a gated linear recurrence whose state is expanded by an outer product."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ops import linear_attention
from zoo.block import Block, Out, enter, leave, tag
from zoo.layers.checks import integer, number, place
from zoo.layers.linear import Linear
from zoo.layers.norm import RMSNorm


class HGRN2State(NamedTuple):
    """Constant size: width · head_dim numbers and a document id a row."""

    S: Float[Tensor, "batch heads head_dim head_dim"]  # float32 at least
    segment: Int[Tensor, " batch"]


class HGRN2(Block):
    """HGRN2 (2404.07904): linear attention whose key is what its forget gate lets go, 1 - f, so it needs no more gates.

    o, z, i = W_in x;  f_t = β + (1 - β) σ(z_t);  S_t = Diag(f_t) S_{t-1} + (1 - f_t) i_tᵀ;  h_t = S_tᵀ swish(o_t), for
    each head;  y = W_out norm(h).

    The norm is RMSNorm over all heads at once. The output gate o is linear attention's query; there is none after the
    norm. h is divided by √head_dim, as in the released models, which the norm undoes but for its eps.

    β in [0, 1), the lower bound of the forget gates, keeps upper layers from forgetting fast (HGRN, 2311.04823). It is
    learned, a number a channel: a sigmoid, kept out of weight decay. The papers take it from a softmax over the layers,
    added up from the second layer on, which ties the layers (β never falls with depth); a block of ours has its own.
    Both start at layer / layers: 0 in the first layer, where β is not a parameter. A trained model's β is loaded as its
    logit.

    1 - f is (1 - β) σ(-z), never a difference of nearly equal numbers; log f is log1p of it where f is above 1/2, below
    it the log of β + (1 - β) σ(z) by logs added up. So f near 0 and near 1 are exact. In float32 at least.

    Options:
        head_dim: channels of a head, how often the state is as large as the width (the paper's expansion ratio); None:
            128 as in the paper, or in narrow models the largest size that makes two heads.
        lower_bound: β at the start; None: layer / layers. 0 fixes it at 0.
        layer, layers: the block's place in its model, from 0; a model fills them in.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D^2 + T D head_dim)
        train memory: O(T (D + chunk heads)) and one state a chunk of 32 tokens
        prefill: O(T D^2 + T D head_dim)
        decode: O(D^2 + D head_dim) a token, whatever the context
        state bytes: D*head_dim*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        head_dim: int | None = None,
        lower_bound: float | None = None,
        layer: int = 0,
        layers: int = 1,
        norm_eps: float = 1e-6,
    ):
        super().__init__(width)
        self.head_dim = _head_dim(width) if head_dim is None else integer("head_dim", head_dim)
        if width % self.head_dim:
            raise ValueError(f"head_dim={head_dim} must divide width={width}; try {math.gcd(width, self.head_dim)}")
        place(layer, layers)
        start = layer / layers if lower_bound is None else number("lower_bound", lower_bound)
        if not 0 <= start < 1:
            raise ValueError(f"lower_bound={lower_bound} must be in [0, 1): forget gates lie between it and 1")
        if number("norm_eps", norm_eps) < 0:
            raise ValueError(f"norm_eps={norm_eps} must not be negative")
        self.heads = width // self.head_dim
        self.in_proj = Linear(width, 3 * width, bias=False)  # the output gate, the forget gate, the input
        # The bound's logit. Of the first layer's 0 it is -inf, which nothing can be learned from.
        self.lower_bound = nn.Parameter(torch.full((width,), math.log(start / (1 - start)))) if start else None
        if start:
            tag(self, "lower_bound", weight_decay=False)
        self.norm = RMSNorm(width, eps=norm_eps)
        self.out_proj = Linear(width, width, bias=False)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> HGRN2State:
        dtype = torch.promote_types(dtype or self.in_proj.weight.dtype, torch.float32)
        sizes = self.heads, self.head_dim, self.head_dim
        segment = torch.zeros(batch, device=device, dtype=torch.long)
        return HGRN2State(torch.zeros(batch, *sizes, device=device, dtype=dtype), segment)

    def flops_per_token(self, context: int) -> int:
        """The matrices; 5 a number of the state (decay, outer product, sum, read-out); 16 a channel for both gates and
        the norm."""
        return super().flops_per_token(context) + 5 * self.width * self.head_dim + 16 * self.width

    def gates(
        self, z: Float[Tensor, "batch time width"]
    ) -> tuple[Float[Tensor, "batch time width"], Float[Tensor, "batch time width"]]:
        """log f and 1 - f, float32 at least: bfloat16 has no number between 0.996 and 1."""
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if self.lower_bound is None:
            return F.logsigmoid(z), torch.sigmoid(-z)
        bound = self.lower_bound.to(z.dtype)
        k = torch.sigmoid(-bound) * torch.sigmoid(-z)
        low = torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + F.logsigmoid(z))
        return torch.where(k < 0.5, torch.log1p(-k.clamp_max(0.5)), low), k

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: HGRN2State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        carried = state
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0)  # a NaN at padding would reach weights' gradients
            if state is not None:
                fresh = self.init_state(len(x), device=x.device, dtype=state.S.dtype)
                carried = enter(state, fresh, segments)
        o, z, i = self.in_proj(x).chunk(3, -1)
        log_f, k = self.gates(z)
        q, k, v, log_f = (each.unflatten(-1, (self.heads, -1)) for each in (F.silu(o), k.to(x.dtype), i, log_f))
        y, last, _ = linear_attention(
            q,
            k,
            v,
            log_f,
            scale=self.head_dim**-0.5,
            initial_state=None if carried is None else carried.S,
            segments=segments,
        )
        y = self.out_proj(self.norm(y.flatten(-2)))
        if state is None:
            return Out(y, None, {})
        return Out(y, HGRN2State(last.to(state.S.dtype), leave(state.segment, segments)), {})


def _head_dim(width: int) -> int:
    """The largest divisor of the width up to 128, and up to half of it in narrow models."""
    most = max(1, min(128, width // 2))
    return next(each for each in range(most, 0, -1) if width % each == 0)
