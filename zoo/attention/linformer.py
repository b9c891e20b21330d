"""Linformer: attention to a fixed number of slots that keys and values are projected to along time."""

from typing import cast

from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.attention.projected import Projected, ProjectedAttention, SoftmaxCore, TimeProjection, choose
from zoo.layers.checks import integer
from zoo.layers.ffn import MLP, check_hidden
from zoo.layers.heads import heads_and_dim
from zoo.layers.norm import LayerNorm

SHARING = ("none", "headwise", "key-value", "layerwise")


class Layer(nn.Module):
    """Projected attention and an MLP (GELU, biases) with their LayerNorms and residuals, as in RoBERTa."""

    def __init__(self, width: int, heads: int, head_dim: int, hidden: int, norm_position: str):
        super().__init__()
        self.norm_position = norm_position
        self.attention = ProjectedAttention(width, heads, head_dim, SoftmaxCore())
        self.ffn = MLP(width, hidden, bias=True)
        self.attention_norm, self.ffn_norm = LayerNorm(width), LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None, projection: TimeProjection) -> Tensor:
        if self.norm_position == "pre":
            x = x + self.attention(self.attention_norm(x), mask, projection)
            return x + self.ffn(self.ffn_norm(x)).y
        x = self.attention_norm(x + self.attention(x, mask, projection))
        return self.ffn_norm(x + self.ffn(x).y)


class Linformer(Projected):
    """Bidirectional attention in linear time: keys and values projected along time to k slots (2006.04768, eq. 7).

    y = W_o · concat_h softmax(q_h (E_h k_h)ᵀ / √d) F_h v_h with learned E_h, F_h [projected, length].

    The matrices have a column a position, so `length` is fixed here. A document's first token has the first column
    wherever it stands in its row; a shorter one uses the first columns, a longer one is an error.

    What layers share cannot live in one block of a flat stack. So with `layers` this is a composite block: it owns that
    many layers of attention and FFN with their norms and residuals, a model places it bare, and sharing="layerwise"
    keeps one matrix for all of them; other blocks of the stack have their own. Without `layers` it is attention
    alone, and "layerwise" is refused. For L layers of H heads there are 2LH matrices with "none", 2L with "headwise", L
    with "key-value" and 1 with "layerwise".

    Args:
        width: features of x.
        heads: None: as many as make heads of about 64.
        head_dim: features of a head; None: width / heads.
        length: n, the most tokens of a document.
        projected: k, the slots that queries attend to; the work a token grows with it, not with the length.
        sharing: "none" (E and F for each head), "headwise" (E and F for all heads of a layer), "key-value" (one E = F
            for all heads), "layerwise" (one for all layers, heads, keys and values).
        projection: "linear", or "conv", "mean" or "max" over windows of length / projected tokens (`TimeProjection`).
        layers: None: attention alone; else a composite block of so many layers.
        hidden: with layers, features inside each FFN; None: 4 · width.
        norm_position: with layers, "post" (RoBERTa's, which the paper trains): LayerNorm after each sum, or "pre".

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T heads head_dim (D + projected)), and O(T D hidden) more a layer with layers
        train memory: O(T (D + heads head_dim)), and O(T heads projected) where attention keeps its weights
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
        projection: str = "linear",
        layers: int | None = None,
        hidden: int | None = None,
        norm_position: str = "post",
    ):
        super().__init__(width)
        self.heads, self.head_dim = heads_and_dim(width, heads, head_dim)
        self.sharing = choose("sharing", sharing, SHARING)
        choose("norm_position", norm_position, ("post", "pre"))
        if layers is None:
            if sharing == "layerwise":
                raise ValueError(
                    "sharing='layerwise' needs one block that owns the layers: give layers=12 for twelve of them, "
                    "or take sharing='key-value', one matrix for each block"
                )
            if hidden is not None:
                raise ValueError(f"hidden={hidden!r} is the FFN's of a block with layers; give layers, or leave it out")
        else:
            integer("layers", layers, otherwise="; None: attention alone")
            self.residual = False  # pyright: ignore[reportAttributeAccessIssue]  # this class has both forms
        self.length, self.projected, self.layers = length, projected, layers
        self.hidden = 4 * width if hidden is None else check_hidden(hidden)
        # Apart from the layers, and handed to them: so a shared one has one name in a checkpoint.
        self.projections = nn.ModuleList(
            TimeProjection(length, projected, self.heads, sharing, projection)
            for _ in range(1 if layers is None or sharing == "layerwise" else layers)
        )
        size = (width, self.heads, self.head_dim)
        self.parts = nn.ModuleList(
            [ProjectedAttention(*size, SoftmaxCore())]
            if layers is None
            else [Layer(*size, self.hidden, norm_position) for _ in range(layers)]
        )

    @property
    def matrices(self) -> int:
        """How many distinct learned projections along time there are."""
        return sum(each.matrices for each in cast("list[TimeProjection]", list(self.projections)))

    def _pairs(self) -> list[tuple[nn.Module, TimeProjection]]:
        """Each part with its projection."""
        projections = cast("list[TimeProjection]", list(self.projections))
        if len(projections) < len(self.parts):
            projections = projections * len(self.parts)
        return list(zip(self.parts, projections, strict=True))

    def flops_per_token(self, context: int) -> int:
        """Of a document of context + 1 tokens, a token's share: slots are made once and read by all."""
        tokens = min(context + 1, self.length)
        total = 0
        for part, projection in self._pairs():
            if isinstance(part, Layer):
                total += part.attention.flops(tokens, projection) + part.ffn.flops_per_token(context) * tokens
            else:
                total += cast(ProjectedAttention, part).flops(tokens, projection)
        return total // tokens

    def run(
        self, x: Float[Tensor, "rows time width"], mask: Bool[Tensor, "rows time"] | None
    ) -> Float[Tensor, "rows time width"]:
        for part, projection in self._pairs():
            x = part(x, mask, projection)
        return x
