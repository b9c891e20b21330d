"""Random Feature Attention (Peng et al., 2103.02143): random Fourier features of unit vectors; RFA-Gate."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from zoo.attention.features import RandomProjection, wide
from zoo.attention.kernel import KernelAttention, Mapped
from zoo.block import tag
from zoo.layers.checks import integer, number
from zoo.layers.wide import WideLinear


class RFA(KernelAttention):
    """Random Feature Attention (2103.02143): random Fourier features of unit q and k; with `gate`, RFA-Gate.

    φ(x) = [sin w_iᵀx̂, cos w_iᵀx̂]_i / √m,  x̂ = x/|x|,  w_i = σ ⊙ w̃_i, w̃_i ~ N(0, I)    (section 3.1)
    S_t = S_{t-1} + φ(k_t) v_tᵀ;  z_t = z_{t-1} + φ(k_t);  y_t = S_tᵀφ(q_t) / (φ(q_t)ᵀ z_t)
    gate: S_t = g_t S_{t-1} + (1 - g_t) φ(k_t) v_tᵀ, z_t alike, g_t = sigmoid(w_gᵀx_t + b_g) a head    (section 3.2)

    E[φ(q)ᵀφ(k)] = exp(-|σ ⊙ (q̂ - k̂)|²/2), for equal σ softmax's exp(σ² q̂ᵀk̂) but for a constant. σ is learned a head
    and dimension, from 1; the w̃ of each head are a buffer saved with the weights, drawn anew by `redraw`. Estimated
    weights can be negative, so their sum is kept from below `eps`.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D^2 + T heads features head_dim)
        train memory: O(T D + T heads features)
        prefill: O(T D^2 + T heads features head_dim)
        decode: O(D^2 + heads features head_dim) a token
        state bytes: max(4, b)*heads*features*(head_dim + 1) + 16

    Args:
        width: features of x.
        heads: None: as many as make heads of about 64.
        head_dim: features of a head; None: width / heads.
        features: 2m, sines and cosines; None: 2 head_dim.
        gate: RFA-Gate, which forgets what is long past: b_g starts at 3, a memory of 1/(1 - g) ≈ 20 tokens.
        eps: what the sum of weights is at least, where a key equal to the query weighs 1. None: 0.1, about what the
            authors' code has; 0.01 with the gate, whose weights add up to less than 1.
        position: {"kind": "rotary", ...} turns q and k, whose length stays 1; None (the paper's): positions come
            from the embedding, or recency from the gate.
        bias: on the projections of q, k, v and the output.
        causal: False makes the bidirectional form, which takes no state and no gate.

    State: `KernelState`, of constant size.
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        head_dim: int | None = None,
        features: int | None = None,
        gate: bool = False,
        eps: float | None = None,
        position: Mapping[str, Any] | None = None,
        bias: bool = False,
        causal: bool = True,
    ):
        super().__init__(width, heads, head_dim, position, bias, causal)
        if gate and not causal:
            raise ValueError("gate=True weighs by recency and needs causal=True; leave one of the two out")
        self.features = 2 * self.head_dim if features is None else integer("features", features, 2, "; or None")
        if self.features % 2:
            raise ValueError(f"features={features} must be even, sines and cosines; try {self.features + 1}")
        if eps is not None and number("eps", eps) <= 0:
            raise ValueError(f"eps={eps} must be positive; None chooses one")
        self.eps = (0.01 if gate else 0.1) if eps is None else eps  # pyright: ignore[reportAttributeAccessIssue]
        self.projection = RandomProjection(self.features // 2, self.head_dim, copies=self.heads)
        self.sigma = nn.Parameter(torch.ones(self.heads, self.head_dim))
        tag(self, "sigma", weight_decay=False)
        self.gate = WideLinear(width, self.heads) if gate else None
        if self.gate is not None:
            nn.init.constant_(self.gate.bias, 3.0)
            tag(self.gate, "bias", weight_decay=False)

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw other w̃: between steps of training, as the paper does from a pool, never with a state in use."""
        self.projection.redraw(generator)

    def flops_per_token(self, context: int) -> int:
        """And w̃ᵀq, w̃ᵀk, and the gate."""
        gate = 0 if self.gate is None else 2 * self.gate.weight.numel()
        return super().flops_per_token(context) + 4 * self.projection.weight.numel() + gate

    def map(
        self,
        q: Float[Tensor, "batch time heads d"],
        k: Float[Tensor, "batch time heads d"],
        x: Float[Tensor, "batch time width"],
        state: Any,
        segments: Int[Tensor, "batch time"] | None,
    ) -> Mapped:
        phi_q, phi_k = self._fourier(q), self._fourier(k)
        if self.gate is None:
            return Mapped(phi_q, phi_k)
        logit = self.gate(x.to(phi_k.dtype))
        # Logarithms of g and 1 - g, each from the logit: neither loses the small one of the two, nor its gradient.
        return Mapped(phi_q, phi_k * logsigmoid(-logit).exp()[..., None], logsigmoid(logit))

    def _fourier(self, x: Float[Tensor, "batch time heads d"]) -> Float[Tensor, "batch time heads features"]:
        x = wide(x)
        # A vector shorter than 0.001 stays shorter than 1, which bounds the gradient at x = 0.
        unit = x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp_min(1e-6))
        angle = self.projection(unit * self.sigma.to(x.dtype))
        return torch.cat([angle.sin(), angle.cos()], -1) * (self.features / 2) ** -0.5
