"""Gated DeltaNet (Yang, Kautz & Hatamizadeh, 2412.06464): the delta rule with one decay a head and step."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.layers.checks import integer
from zoo.layers.gated_norm import GatedRMSNorm
from zoo.recurrent.delta import DeltaBlock, decay_parameters, fit_heads, steps


class GatedDeltaNet(DeltaBlock):
    """Gated DeltaNet (2412.06464): the delta rule with a data-dependent decay a head, as in Qwen3-Next.

    q, k, v = silu(conv(W x));  q and k over their length;  β_t = σ(w x_t);  α_t = exp(-exp(A_log) softplus(a_t + b))
    with a_t = w' x_t;  S_t = α_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ;  o_t = S_tᵀ q_t / √head_dim, for each head
    (eq. 10 and section 3.4);  y = W_out (norm_heads(o) ⊙ silu(W_z x)).

    ln α is computed as it stands, in float32 at least, so that an α near 0 or near 1 keeps its digits. The norm is
    RMSNorm with one weight a value that the heads share. A_log, b and the norm's weight are kept out of weight decay.
    in_proj's rows are those of q, k, v, β, a and z, each with its heads in order.

    Options:
        heads: of values; None: as many as leave each about 256 key channels, but two or more.
        key_heads: of queries and keys; each serves heads / key_heads consecutive heads of values. None: heads.
        head_dim: of queries and keys; None: 3/4 width / heads.
        value_head_dim: None: 2 head_dim, as in the paper.
        conv_width: tokens under each of the convolutions of q, k and v.
        negative_eigenvalues: β from 0 to 2, so that I - β k kᵀ may flip what a key holds (2411.12537).

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D (key_heads k_dim + heads v_dim) + T heads k_dim v_dim)
        train memory: O(T (key_heads k_dim + heads v_dim + chunk heads)) and one state a chunk of up to 64 tokens
        prefill: O(T D (key_heads k_dim + heads v_dim) + T heads k_dim v_dim)
        decode: O(D (key_heads k_dim + heads v_dim) + heads k_dim v_dim) a token, whatever the context
        state bytes: (conv.taps - 1)*conv.channels*b + heads*k_dim*v_dim*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        key_heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        conv_width: int = 4,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
    ):
        heads, k_dim = fit_heads(3 * width // 4, heads, head_dim, 256)
        key_heads = heads if key_heads is None else integer("key_heads", key_heads)
        if heads % key_heads:
            raise ValueError(f"key_heads={key_heads} must divide heads={heads}; try {math.gcd(key_heads, heads)}")
        v_dim = 2 * k_dim if value_head_dim is None else integer("value_head_dim", value_head_dim)
        parts = (heads, heads * v_dim)  # a, z
        super().__init__(width, (heads, key_heads, k_dim, v_dim), parts, conv_width, negative_eigenvalues, norm_eps)
        self.A_log, self.dt_bias = decay_parameters(self, heads, heads)
        self.norm = GatedRMSNorm(v_dim, before_gate=True, eps=norm_eps)

    def log_decay(self, x: Float[Tensor, "batch time width"], parts: list[Tensor]) -> Float[Tensor, "batch time heads"]:
        dt = steps(parts[0], self.dt_bias)
        return -torch.exp(self.A_log.to(dt.dtype)) * dt

    def read(
        self, o: Float[Tensor, "batch time heads v_dim"], x: Float[Tensor, "batch time width"], parts: list[Tensor]
    ) -> Float[Tensor, "batch time heads v_dim"]:
        return self.norm(o, parts[1].unflatten(-1, (self.heads, -1)))

    def native(self) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, float, bool]] | None:
        return (self.A_log, self.dt_bias), (self.norm.weight, self.norm.eps, True)
