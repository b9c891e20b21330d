"""Luna's causal attention (2106.01540, sec. 3.3): pack and unpack by running means, with a state of constant size."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ops import linear_attention
from zoo.block import tag
from zoo.layers.linear import Linear


class LunaState(NamedTuple):
    """What the causal form keeps of the tokens so far of the document it is in: the two sums of every layer."""

    # Float32 at least: they sum T outer products. No decay: divided by the count they are running means.
    keys: Float[Tensor, "batch layers heads head_dim length"]  # Σ_s k_s a_sᵀ
    values: Float[Tensor, "batch layers heads length head_dim"]  # Σ_s a_s v_sᵀ
    position: Int[Tensor, " batch"]  # tokens so far of the document
    segment: Int[Tensor, " batch"]  # its id, 0 before the first token


def softplus2(x: Tensor) -> Tensor:
    """log₂(1 + 2^x): softplus to base 2, as the authors' code has it, which is 1 at 0 like elu(x) + 1."""
    return torch.logaddexp2(x, x.new_zeros(()))


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1. Below 0 that is exp(x), taken at once: the sum would round to 0 from x = -17 on in float32."""
    return torch.where(x > 0, x + 1, x.clamp_max(0).exp())


# ω of the packing attention: positive, and of one logit alone, since a softmax over time would read later tokens.
PACK_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"softplus": softplus2, "elu": elu1}


def projection(width: int, parts: int) -> nn.Linear:
    """`parts` projections of the width in one matrix, each drawn as the authors do: Xavier with a gain of 1/√2."""
    made = Linear(width, parts * width)
    for part in made.weight.chunk(parts):
        nn.init.xavier_uniform_(part, gain=0.5**0.5)
    tag(made, "bias", weight_decay=False)
    return made


def output(width: int) -> nn.Linear:
    """The projection of the concatenated heads: Xavier, without a bias at first."""
    made = Linear(width, width)
    nn.init.xavier_uniform_(made.weight)
    nn.init.zeros_(made.bias)
    tag(made, "bias", weight_decay=False)
    return made


class CausalNested(nn.Module):
    """Pack and unpack attention in which token t reads tokens up to t alone (2106.01540, sec. 3.3).

    With f(X, Y, Z)_t = x_t (1/t) Σ_{s<=t} y_sᵀ z_s, for each head (d components, P the packed sequence of length l):

        A_pack   = ω(P W_pq (X W_pk)ᵀ / √d)ᵀ        [time, l], ω softplus or elu + 1
        A_unpack = softmax(f(X W_q / √d, X W_k, A_pack))    over the l packed places, not over time
        Y        = f(A_unpack, A_pack, X W_v) W_o

    Both f are linear attention without normaliser, divided by t, so nothing of [time, d, l] is ever made. P must hold
    nothing of X. Projections as in the authors' code: the packing's key is its own, and W_v = W_k when `tied`.
    O(T D² + T l D).
    """

    def __init__(self, width: int, heads: int, tied: bool, pack_activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.heads, self.scale, self.pack_activation = heads, (width // heads) ** -0.5, pack_activation
        self.from_x = projection(width, 3 if tied else 4)  # pk, q, k (also v when tied), v
        self.from_p = projection(width, 1)
        self.out = output(width)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        p: Float[Tensor, "length width"],
        count: Float[Tensor, "rows time"],
        state: tuple[Float[Tensor, "batch heads d length"], Float[Tensor, "batch heads length d"]] | None,
        segments: Int[Tensor, "batch time"] | None,
    ) -> tuple[
        Float[Tensor, "batch time width"],
        Float[Tensor, "batch heads d length"],
        Float[Tensor, "batch heads length d"],
    ]:
        """Y, not masked at padding (x must be finite there), and the sums after it. `count` is t, 1 at a document's
        first token."""
        pk, q, k, *v = rearrange(self.from_x(x), "b t (n h d) -> n b t h d", h=self.heads, d=x.shape[-1] // self.heads)
        pq = rearrange(self.from_p(p), "l (h d) -> l h d", h=self.heads) * self.scale
        pack = self.pack_activation(einsum(pk, pq, "b t h d, l h d -> b t h l"))
        # Divided before the sum: Σ grows with t and might not fit the dtype of the outputs.
        over = (1 / count)[..., None, None]
        keys, values = (None, None) if state is None else state
        logits, keys, _ = linear_attention(
            (q * (over * self.scale)).to(x.dtype), k, pack, initial_state=keys, segments=segments
        )
        unpack = (logits.softmax(-1) * over).to(x.dtype)
        y, values, _ = linear_attention(unpack, pack, v[0] if v else k, initial_state=values, segments=segments)
        return self.out(y.flatten(2)), keys, values
