"""Gated linear attention (Yang et al., 2312.06635): each key channel forgets at a rate that the token decides."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ops import linear_attention
from zoo.block import Block, Out, enter, leave
from zoo.layers.checks import integer, number
from zoo.layers.gated_norm import GatedRMSNorm
from zoo.layers.heads import up_to_four
from zoo.layers.linear import Linear
from zoo.layers.low_rank import LowRankLinear


class GLAState(NamedTuple):
    """Constant size: key_dim · value_dim / heads numbers and a document id a row."""

    S: Float[Tensor, "batch heads k_dim v_dim"]  # float32 at least
    segment: Int[Tensor, " batch"]


class GLA(Block):
    """GLA (2312.06635): linear attention with a data-dependent decay a key channel.

    q, k, v, g = W_in x;  α_t = σ(x_t W₁ W₂ + b)^(1/τ);  S_t = Diag(α_t) S_{t-1} + k_t v_tᵀ;  o_t = S_tᵀ q_t / √d, for
    each head, d its key's size (section 4.1 and 4.4);  y = W_out (swish(g) ⊙ norm_heads(o)).

    The norm is RMSNorm over each head with one weight a value that the heads share, as in the authors' library and its
    released models (the paper's LayerNorm takes off the mean as well). log α is computed as log σ / τ in float32 at
    least, never through α, and the operation adds logs only; so α near 0 and near 1 are exact. b is kept out of weight
    decay.

    Options:
        heads: None: 4 as in the paper, or fewer where 4 do not divide both of the next.
        key_dim, value_dim: channels of all heads; None: width / 2 and width, as in the paper.
        gate_rank: columns of W₁; None: 16 as in the paper, or what a narrow model's matrix has at most.
        temperature: τ; above 1 it keeps what is new at the start from forgetting too much.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D (key_dim + value_dim) + T key_dim value_dim / heads)
        train memory: O(T (key_dim + value_dim + chunk heads)) and one state a chunk of 32 tokens
        prefill: O(T D (key_dim + value_dim) + T key_dim value_dim / heads)
        decode: O(D (key_dim + value_dim) + key_dim value_dim / heads) a token, whatever the context
        state bytes: key_dim*value_dim//heads*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        gate_rank: int | None = None,
        temperature: float = 16.0,
        norm_eps: float = 1e-6,
    ):
        super().__init__(width)
        self.key_dim = max(1, width // 2) if key_dim is None else integer("key_dim", key_dim)
        self.value_dim = width if value_dim is None else integer("value_dim", value_dim)
        self.heads = up_to_four(heads, key_dim=self.key_dim, value_dim=self.value_dim)
        if number("temperature", temperature) <= 0:
            raise ValueError(f"temperature={temperature} must be positive: the decay is sigmoid(...)^(1/temperature)")
        if number("norm_eps", norm_eps) < 0:
            raise ValueError(f"norm_eps={norm_eps} must not be negative")
        rank = min(16, width, self.key_dim) if gate_rank is None else integer("gate_rank", gate_rank)
        self.temperature = temperature
        self.sizes = (self.key_dim, self.key_dim, self.value_dim, self.value_dim)  # of q, k, v and the output's gate
        self.in_proj = Linear(width, sum(self.sizes), bias=False)
        self.decay_proj = LowRankLinear(width, self.key_dim, rank, bias=True)
        self.norm = GatedRMSNorm(self.value_dim // self.heads, before_gate=True, eps=norm_eps)
        self.out_proj = Linear(self.value_dim, width, bias=False)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> GLAState:
        dtype = torch.promote_types(dtype or self.in_proj.weight.dtype, torch.float32)
        sizes = self.heads, self.key_dim // self.heads, self.value_dim // self.heads
        segment = torch.zeros(batch, device=device, dtype=torch.long)
        return GLAState(torch.zeros(batch, *sizes, device=device, dtype=dtype), segment)

    def flops_per_token(self, context: int) -> int:
        """The matrices; 5 a number of the state (decay, outer product, sum, read-out); 4 a key channel for its decay;
        5 a value for norm and gate."""
        pieces = 5 * self.key_dim * self.value_dim // self.heads + 4 * self.key_dim + 5 * self.value_dim
        return super().flops_per_token(context) + pieces

    def log_decay(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time heads k_dim"]:
        """log α_t, float32 at least: bfloat16 has no number between 0.996 and 1, and of a log near 0 8 bits."""
        logits = self.decay_proj(x).to(torch.promote_types(x.dtype, torch.float32))
        return (F.logsigmoid(logits) / self.temperature).unflatten(-1, (self.heads, -1))

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: GLAState | None = None,
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
        o, last, _ = linear_attention(
            q,
            k,
            v,
            self.log_decay(x),
            scale=q.shape[-1] ** -0.5,
            initial_state=None if carried is None else carried.S,
            segments=segments,
        )
        y = self.out_proj(self.norm(o, g).flatten(-2))
        if state is None:
            return Out(y, None, {})
        return Out(y, GLAState(last.to(state.S.dtype), leave(state.segment, segments)), {})
