"""DeltaNet (Yang et al., 2406.06484): linear attention that replaces what a key holds instead of adding to it."""

from jaxtyping import Float
from torch import Tensor

from zoo.layers.checks import integer
from zoo.layers.norm import RMSNorm
from zoo.recurrent.delta import DeltaBlock, fit_heads


class DeltaNet(DeltaBlock):
    """DeltaNet (2406.06484): linear attention with the delta rule, an online regression of values on keys.

    q, k, v = silu(conv(W x));  q and k over their length;  β_t = σ(w x_t);
    S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ;  o_t = S_tᵀ q_t / √head_dim, for each head (eq. 3 and section 3.4);
    y = W_out norm_heads(o), RMSNorm with one weight a value that the heads share.

    Options:
        heads: None: as many as leave each about 128 channels, but two or more.
        head_dim: of queries and keys; None: width / heads.
        value_head_dim: None: head_dim.
        conv_width: tokens under each of the convolutions of q, k and v.
        negative_eigenvalues: β from 0 to 2, so that I - β k kᵀ may flip what a key holds: a state can then follow a
            parity (2411.12537).

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D heads (k_dim + v_dim) + T heads k_dim v_dim)
        train memory: O(T heads (k_dim + v_dim + chunk)) and one state a chunk of up to 64 tokens
        prefill: O(T D heads (k_dim + v_dim) + T heads k_dim v_dim)
        decode: O(D heads (k_dim + v_dim) + heads k_dim v_dim) a token, whatever the context
        state bytes: (conv.taps - 1)*conv.channels*b + heads*k_dim*v_dim*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        conv_width: int = 4,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
    ):
        heads, k_dim = fit_heads(width, heads, head_dim, 128)
        v_dim = k_dim if value_head_dim is None else integer("value_head_dim", value_head_dim)
        super().__init__(width, (heads, heads, k_dim, v_dim), (), conv_width, negative_eigenvalues, norm_eps)
        self.norm = RMSNorm(v_dim, norm_eps)

    def read(
        self, o: Float[Tensor, "batch time heads v_dim"], x: Float[Tensor, "batch time width"], parts: list[Tensor]
    ) -> Float[Tensor, "batch time heads v_dim"]:
        return self.norm(o)

    def native(self) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, float, bool]] | None:
        return None, (self.norm.weight, self.norm.eps, False)
