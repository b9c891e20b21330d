"""Lightning Attention (Qin et al., 2401.04658), as TransNormerLLM (2307.14995) and MiniMax-01 (2501.08313) use it.

What the papers tile (pairs within a block, a state between blocks) is one recurrence, which is what
`ops.linear_attention` runs: results do not depend on the size of blocks.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ops import linear_attention
from zoo.block import Block, Out, enter, leave
from zoo.layers.checks import number, place
from zoo.layers.gated_norm import GatedRMSNorm
from zoo.layers.heads import heads_and_dim
from zoo.layers.linear import Linear


class LightningState(NamedTuple):
    """Constant size: heads · head_dim² numbers and a document id a row."""

    S: Float[Tensor, "batch heads k_dim v_dim"]  # float32 at least
    segment: Int[Tensor, " batch"]


class LightningAttention(Block):
    """Lightning Attention (2401.04658; MiniMax-01, 2501.08313): linear attention that forgets faster in early layers.

    q, k, v = silu(W_qkv x);  S_t = λ S_{t-1} + k_t v_tᵀ;  o_t = S_tᵀ q_t, for each head;
    y = W_out (σ(W_g x) ⊙ RMSNorm(o))   with one norm over all heads.

    λ = exp(-2^(-8h/H) (1 - l/(L - 1 + 1e-5) + 1e-5)) for head h = 1 ... H in layer l = 0 ... L - 1: ALiBi's slopes,
    which shrink with depth to almost 0, no decay, in the last layer (TransNormerLLM, eq. 4; both 1e-5 as in MiniMax's
    implementation in transformers, and so that one layer divides by no 0). q·k has no factor: the norm takes it out.

    Options:
        heads, head_dim: None: heads of about 64 channels, in a small width at least four.
        layer, layers: l and L. They are part of the function, not of the first weights alone. A model counts its blocks
            unless told; MiniMax counts pairs of blocks.
        norm_eps: added under the norm's root.

    State: S (float32 at least), whatever the context.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D heads head_dim + T heads head_dim^2)
        train memory: O(T (D + heads head_dim + chunk heads)) and one state a chunk of 64 tokens
        prefill: O(T D heads head_dim + T heads head_dim^2)
        decode: O(D heads head_dim + heads head_dim^2) a token, whatever the context
        state bytes: heads*head_dim**2*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        head_dim: int | None = None,
        layer: int = 0,
        layers: int = 1,
        norm_eps: float = 1e-6,
    ):
        super().__init__(width)
        self.heads, self.head_dim = heads_and_dim(width, heads, head_dim)
        place(layer, layers)
        if number("norm_eps", norm_eps) < 0:
            raise ValueError(f"norm_eps={norm_eps} must not be negative")
        self.layer, self.layers = layer, layers
        inner = self.heads * self.head_dim
        self.in_proj = Linear(width, 4 * inner, bias=False)  # q, k, v and the gate
        self.norm = GatedRMSNorm(inner, before_gate=True, eps=norm_eps, activation="sigmoid")
        self.out_proj = Linear(inner, width, bias=False)

    def log_decay(self, device: Any, dtype: torch.dtype) -> Float[Tensor, " heads"]:
        """log λ of each head, made where it is used, so that it does not take the dtype of the weights."""
        head = torch.arange(1, self.heads + 1, device=device, dtype=dtype)
        return -torch.exp2(-8.0 / self.heads * head) * (1 - self.layer / (self.layers - 1 + 1e-5) + 1e-5)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> LightningState:
        dtype = torch.promote_types(dtype or self.in_proj.weight.dtype, torch.float32)
        S = torch.zeros(batch, self.heads, self.head_dim, self.head_dim, device=device, dtype=dtype)
        return LightningState(S, torch.zeros(batch, device=device, dtype=torch.long))

    def flops_per_token(self, context: int) -> int:
        """The matrices; 5 a number of the state (decay, outer product, sum, read-out); 5 a channel for the norm and the
        gate, 3 more for the activation of q, k and v."""
        matrices = 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        return matrices + self.heads * self.head_dim * (5 * self.head_dim + 8)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: LightningState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        carried = state
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0)  # a NaN at padding would reach weights' gradients
            if state is not None:
                fresh = self.init_state(len(x), device=x.device, dtype=state.S.dtype)
                carried = enter(state, fresh, segments)
        inner = self.heads * self.head_dim
        qkv, gate = self.in_proj(x).split([3 * inner, inner], -1)
        q, k, v = (each.unflatten(-1, (self.heads, -1)) for each in F.silu(qkv).chunk(3, -1))
        o, last, _ = linear_attention(
            q,
            k,
            v,
            self.log_decay(x.device, torch.promote_types(x.dtype, torch.float32)),
            initial_state=None if carried is None else carried.S,
            segments=segments,
        )
        y = self.out_proj(self.norm(o.flatten(-2), gate))
        if state is None:
            return Out(y, None, {})
        return Out(y, LightningState(last.to(state.S.dtype), leave(state.segment, segments)), {})

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, layer={self.layer}, layers={self.layers}"
