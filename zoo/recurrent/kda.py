"""Kimi delta attention (Kimi team, 2510.26692): the delta rule with one decay a key channel and step."""

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.layers.checks import integer
from zoo.layers.gated_norm import GatedRMSNorm
from zoo.layers.low_rank import LowRankLinear
from zoo.recurrent.delta import DeltaBlock, decay_parameters, fit_heads, steps


class KDA(DeltaBlock):
    """Kimi delta attention (2510.26692): the delta rule in which each key channel forgets at its own rate.

    q, k, v = silu(conv(W x));  q and k over their length;  β_t = σ(w x_t);
    α_t = exp(-exp(A_log) softplus(x_t W₁ W₂ + b)), one a key channel, A_log one a head;
    S_t = (I - β_t k_t k_tᵀ) Diag(α_t) S_{t-1} + β_t k_t v_tᵀ;  o_t = S_tᵀ q_t / √head_dim, for each head (eq. 1);
    y = W_out (norm_heads(o) ⊙ σ(x W₃ W₄)), as in Kimi Linear.

    It decays first and erases then. ln α is computed as it stands, in float32 at least, so that an α near 0 or near 1
    keeps its digits. The norm is RMSNorm with one weight a value that the heads share. A_log, b and the norm's weight
    are kept out of weight decay.

    Options:
        heads: None: as many as leave each about 128 channels, but two or more.
        head_dim: of queries and keys; None: width / heads.
        value_head_dim: None: head_dim, as in Kimi Linear.
        rank: columns of W₁ and of W₃; None: value_head_dim as in Kimi Linear, or what the smaller matrix has at most.
        gate_bias: a bias on the output's gate, as in the authors' library; the released model has none.
        conv_width: tokens under each of the convolutions of q, k and v.
        negative_eigenvalues: β from 0 to 2, so that I - β k kᵀ may flip what a key holds (2411.12537).

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D (heads (k_dim + v_dim) + rank) + T heads k_dim v_dim)
        train memory: O(T heads (k_dim + v_dim + chunk)) and one state a chunk of up to 64 tokens
        prefill: O(T D (heads (k_dim + v_dim) + rank) + T heads k_dim v_dim)
        decode: O(D (heads (k_dim + v_dim) + rank) + heads k_dim v_dim) a token, whatever the context
        state bytes: (conv.taps - 1)*conv.channels*b + heads*k_dim*v_dim*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        rank: int | None = None,
        gate_bias: bool = False,
        conv_width: int = 4,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
    ):
        heads, k_dim = fit_heads(width, heads, head_dim, 128)
        v_dim = k_dim if value_head_dim is None else integer("value_head_dim", value_head_dim)
        super().__init__(width, (heads, heads, k_dim, v_dim), (), conv_width, negative_eigenvalues, norm_eps)
        if rank is None:
            rank = min(v_dim, width, self.key_dim)
        self.rank = rank
        if not isinstance(gate_bias, bool):
            raise ValueError(f"gate_bias={gate_bias!r} must be true or false")
        self.decay_proj = LowRankLinear(width, self.key_dim, rank)
        self.gate_proj = LowRankLinear(width, self.value_dim, rank, bias=gate_bias)
        self.A_log, self.dt_bias = decay_parameters(self, heads, self.key_dim)
        self.norm = GatedRMSNorm(v_dim, before_gate=True, eps=norm_eps, activation="sigmoid")

    def log_decay(
        self, x: Float[Tensor, "batch time width"], parts: list[Tensor]
    ) -> Float[Tensor, "batch time heads k_dim"]:
        dt = steps(self.decay_proj(x), self.dt_bias).unflatten(-1, (self.heads, -1))
        return -torch.exp(self.A_log.to(dt.dtype))[:, None] * dt

    def read(
        self, o: Float[Tensor, "batch time heads v_dim"], x: Float[Tensor, "batch time width"], parts: list[Tensor]
    ) -> Float[Tensor, "batch time heads v_dim"]:
        return self.norm(o, self.gate_proj(x).unflatten(-1, (self.heads, -1)))
