"""FLuRKA: keys and values projected along time to a few slots, and a kernel in place of softmax over them."""

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from zoo.attention.features import FEATURE_MAPS, RandomProjection, wide
from zoo.attention.projected import Core, Projected, ProjectedAttention, TimeProjection, choose
from zoo.layers.checks import integer
from zoo.layers.heads import heads_and_dim

KERNELS = (*FEATURE_MAPS, "favor")
SHARING = ("none", "headwise", "key-value")


class KernelCore(Core):
    """φ(q) (φ(k)ᵀ v) / (φ(q) φ(k)ᵀ 1) over the filled slots, summed in float32 at least.

    `feature_map` names a deterministic φ of zoo.attention.features, or "favor": Performer's positive orthogonal random
    features exp(ω x' − |x'|²/2), x' = x / d^(1/4) (2009.14794, lemma 1), `features` of them.
    """

    def __init__(self, feature_map: str, head_dim: int, features: int | None):
        super().__init__()
        choose("feature_map", feature_map, KERNELS)
        if feature_map == "favor":
            self.map = None
            self.features = 4 * head_dim if features is None else integer("features", features, otherwise="; or None")
            self.projection = RandomProjection(self.features, head_dim, orthogonal=True)
            # Largest features are 1, a query's and the slots'; their product may be of any size below it.
            self.eps = 1e-24
            return
        if features is not None:
            raise ValueError(
                f"features={features!r} are for feature_map='favor'; {feature_map!r} makes its own number of them"
            )
        self.map, count = FEATURE_MAPS[feature_map]
        self.features, self.projection, self.eps = count(head_dim), None, 1e-6

    def featurize(
        self, q: Float[Tensor, "rows time heads d"], k: Float[Tensor, "rows slots heads d"]
    ) -> tuple[Float[Tensor, "rows time heads features"], Float[Tensor, "rows slots heads features"]]:
        """φ(q) and φ(k). Those of "favor" without their 1/√m and each divided by a constant, which the quotient
        cancels: a query's by its largest, a row's slots all by the largest of them."""
        q, k = wide(q), wide(k)
        if self.projection is None:
            assert self.map is not None
            return self.map(q), self.map(k)
        scale = q.shape[-1] ** -0.25
        log_q, log_k = self.projection(q * scale), self.projection(k * scale)
        log_k = log_k - (k * scale).square().sum(-1, keepdim=True) / 2
        top_q, top_k = log_q.detach().amax(-1, keepdim=True), log_k.detach().amax((1, 3), keepdim=True)
        return torch.exp(log_q - top_q), torch.exp(log_k - top_k)

    def forward(
        self,
        q: Float[Tensor, "rows time heads d"],
        k: Float[Tensor, "rows slots heads d"],
        v: Float[Tensor, "rows slots heads d"],
        filled: Bool[Tensor, "rows slots"] | None,
    ) -> Float[Tensor, "rows time heads d"]:
        phi_q, phi_k = self.featurize(q, k)
        if filled is not None:
            phi_k = torch.where(filled[:, :, None, None], phi_k, 0.0)
        sums = einsum(phi_k, wide(v), "b k h m, b k h d -> b h m d")
        above = einsum(phi_q, sums, "b t h m, b h m d -> b t h d")
        below = einsum(phi_q, phi_k.sum(1), "b t h m, b h m -> b t h")
        return (above / below.clamp_min(self.eps)[..., None]).to(v.dtype)

    def flops(self, tokens: int, slots: int, heads: int, head_dim: int) -> int:
        each = 2 * heads * self.features * head_dim * (tokens + slots)  # the sums made and read
        return each * (1 if self.projection is None else 2) + 2 * heads * self.features * tokens


class Flurka(Projected):
    """FLuRKA, bidirectional: kernel attention (φ in place of softmax) over slots projected along time (2306.15799).

    y = W_o · concat_h φ(q_h) (φ(E_h k_h)ᵀ F_h v_h) / (φ(q_h) φ(E_h k_h)ᵀ 1): both parts at once. First Linformer's
    projection of keys and values along time, `projected` slots of at most `length` tokens; then the kernel attention of
    Linear Transformer or Performer over these slots. Queries never meet a slot: they read one [features, head_dim] sum,
    and reading costs a token the same at any length. Weights φφᵀ are positive, so y is a weighted mean of F v.

    The matrices have a column a position: a document's first token has the first column wherever it stands in its row,
    a shorter document uses the first columns, a longer one than `length` is an error. "layerwise" sharing is that of
    `linformer` with layers, which owns the layers that share.

    Args:
        width: features of x.
        heads: None: as many as make heads of about 64.
        head_dim: features of a head; None: width / heads.
        length: n, the most tokens of a document.
        projected: k, the slots.
        sharing: "none" (E and F for each head), "headwise" (E and F for all heads), "key-value" (one E = F).
        feature_map: φ: "elu" (elu + 1, Linear Transformer), "relu", "softmax", "taylor" (zoo.attention.features), or
            "favor" (Performer's random features of exp(q·k / √d)).
        features: m of "favor"; None: 4 · head_dim. `core.projection.redraw()` of its attention draws others.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T heads head_dim (D + projected + features))
        train memory: O(T (D + heads features))
        prefill: as train time, forward
        decode: none, it is bidirectional
        state bytes: 0
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        head_dim: int | None = None,
        length: int = 2048,
        projected: int = 128,
        sharing: str = "headwise",
        feature_map: str = "elu",
        features: int | None = None,
    ):
        super().__init__(width)
        self.heads, self.head_dim = heads_and_dim(width, heads, head_dim)
        self.length, self.projected = length, projected
        if sharing == "layerwise":
            raise ValueError(
                "sharing='layerwise' shares a matrix with other layers, which a block of a stack does not own; "
                "take 'key-value', one matrix a block, or kind linformer with layers"
            )
        choose("sharing", sharing, SHARING)
        core = KernelCore(feature_map, self.head_dim, features)
        self.features = core.features
        self.projection = TimeProjection(length, projected, self.heads, sharing, "linear")
        self.attention = ProjectedAttention(width, self.heads, self.head_dim, core)

    def flops_per_token(self, context: int) -> int:
        """Of a document of context + 1 tokens, a token's share: slots are made once and read by all."""
        tokens = min(context + 1, self.length)
        return self.attention.flops(tokens, self.projection) // tokens

    def run(
        self, x: Float[Tensor, "rows time width"], mask: Bool[Tensor, "rows time"] | None
    ) -> Float[Tensor, "rows time width"]:
        return self.attention(x, mask, self.projection)
