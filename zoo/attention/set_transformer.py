"""Attention over sets (Lee et al., 1810.00825): MAB, SAB, the induced ISAB and the pooling head PMA.

Two forms differ in small ways. With d the width, h heads, and head_j = softmax(q_j k_jᵀ / sqrt(d)) v_j:

    "paper"    H = LN(X + [head_1 .. head_h] W_o),  MAB = LN(H + rFF(H)),  PMA = MAB(S, rFF(Z))      (sec. 3.1 and 3.2)
    "authors"  H = LN(X W_q + [head_1 .. head_h]),  MAB = LN(H + rFF(H)),  PMA = MAB(S, Z)           (their code)

Both divide logits by the root of the whole width, not of a head's, as the paper's scaled softmax and the code do.
rFF, which the paper leaves open, is the code's: relu(H W + b). The code leaves the norms out unless asked;
`norm=None` does that.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ops import attention
from ops import segments as seg
from zoo.block import Block, Out, State, each_document, tag
from zoo.layers.checks import integer
from zoo.layers.heads import choose_heads
from zoo.layers.linear import Linear
from zoo.layers.norm import norm as make_norm
from zoo.layers.spelling import nearest

FORMS = ("paper", "authors")


def _linear(width: int) -> nn.Linear:
    made = Linear(width, width)
    tag(made, "bias", weight_decay=False)
    return made


def _check_form(form: str) -> str:
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown{nearest(form, FORMS)}; choose from {', '.join(FORMS)}")
    return form


def _points(count: int, width: int) -> nn.Parameter:
    """Learned elements of a set: inducing points or seeds."""
    made = nn.Parameter(torch.empty(count, width))
    nn.init.xavier_uniform_(made)
    return made


class RowWise(nn.Module):
    """rFF(x) = relu(x W + b), each row for itself."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = _linear(width)

    def forward(self, x: Float[Tensor, "batch rows width"]) -> Float[Tensor, "batch rows width"]:
        return self.linear(x).relu()


class MAB(nn.Module):
    """Multihead attention block: every row of x attends to the set y (1810.00825, sec. 3.1); no positions.

    Args:
        width: features of x, y and the output.
        heads: must divide width; None: as many as make heads of about 64.
        norm: "layer", "rms", or None for neither norm.
        form: "paper" or "authors", see the module.
    """

    def __init__(self, width: int, heads: int | None = None, norm: str | None = "layer", form: str = "paper"):
        super().__init__()
        self.width, self.heads, self.form = width, choose_heads(width, heads), _check_form(form)
        self.q, self.k, self.v = _linear(width), _linear(width), _linear(width)
        self.out = _linear(width) if form == "paper" else None
        self.feed_forward = RowWise(width)
        self.norm1 = nn.Identity() if norm is None else make_norm(norm, width)
        self.norm2 = nn.Identity() if norm is None else make_norm(norm, width)

    def forward(
        self,
        x: Float[Tensor, "batch rows width"],
        y: Float[Tensor, "batch elements width"],
        x_segments: Int[Tensor, "batch rows"] | None = None,
        y_segments: Int[Tensor, "batch elements"] | None = None,
    ) -> Float[Tensor, "batch rows width"]:
        """MAB(x, y). A row sees the elements of its own segment (0 padding, None: all 1); zeros at padding rows.

        O(rows · elements · width + (rows + elements) · width²). A row that sees no element attends to nothing: its
        attention is zero.
        """
        if x_segments is not None:
            x = torch.where((x_segments != 0)[..., None], x, 0.0)
        if y_segments is not None:
            y = torch.where((y_segments != 0)[..., None], y, 0.0)
        queries = self.q(x)
        q, k, v = (rearrange(each, "b t (h d) -> b t h d", h=self.heads) for each in (queries, self.k(y), self.v(y)))
        scale = self.width**-0.5
        found = attention(
            q, k, v, causal=False, scale=scale, q_segments=x_segments, k_segments=y_segments, clean=True
        ).flatten(2)
        hidden = self.norm1(queries + found if self.out is None else x + self.out(found))
        result = self.norm2(hidden + self.feed_forward(hidden))
        return result if x_segments is None else torch.where((x_segments != 0)[..., None], result, 0.0)


class SetBlock(Block):
    """What SAB and ISAB share: bidirectional, no state, and norms and residuals of their own."""

    causal = False
    residual = False

    def __init__(self, width: int, heads: int | None, norm: str | None, form: str):
        super().__init__(width)
        self.heads, self.norm, self.form = choose_heads(width, heads), norm, _check_form(form)

    def _mab(self) -> MAB:
        return MAB(self.width, self.heads, self.norm, self.form)


class SAB(SetBlock):
    """Set attention block: every element of a set attends to all, SAB(X) = MAB(X, X).

    (Lee et al., 1810.00825, sec. 3.1.) Equivariant to permutations; quadratic. Options as for `ISAB`.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D^2 + T^2 D)
        train memory: O(T D + heads T^2), O(T D) where the attention kernel keeps no weights
        prefill: O(T D^2 + T^2 D)
        decode: none, it is bidirectional
        state bytes: 0
    """

    def __init__(self, width: int, heads: int | None = None, norm: str | None = "layer", form: str = "paper"):
        super().__init__(width, heads, norm, form)
        self.mab = self._mab()

    def flops_per_token(self, context: int) -> int:
        """Every matrix once, and 4 · width for each element that the token sees."""
        return super().flops_per_token(context) + 4 * self.width * (context + 1)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        places = None if segments is None else seg.runs(segments).run
        return Out(self.mab(x, x, places, places), None, {})


class ISAB(SetBlock):
    """Set attention through learned inducing points, linear in the set's size (Set Transformer, 1810.00825).

    ISAB_m(X) = MAB(X, H) with H = MAB(I, X) (Lee et al., sec. 3.1): m learned inducing points I gather the set,
    and its elements attend to what they gathered. Equivariant to permutations of the set: there are no positions.
    A document of a packed row is a set of its own. `MAB`, `SAB` and the pooling head `PMA` are in the same module.

    Args:
        width: features of x.
        inducing: m, the number of inducing points.
        heads: must divide width; None: as many as make heads of about 64.
        norm: the norms inside both MABs: "layer", "rms", or None for none (the authors' `ln` flag).
        form: "paper" (residual around x, output projection) or "authors" (their code: the residual is the projected
            query and there is no output projection). Both scale logits by 1/sqrt(width).

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D^2 + T inducing D + inducing D^2)
        train memory: O(T D + heads T inducing), O(T D) where the attention kernel keeps no weights
        prefill: O(T D^2 + T inducing D + inducing D^2)
        decode: none, it is bidirectional
        state bytes: 0
    """

    def __init__(
        self,
        width: int,
        inducing: int = 16,
        heads: int | None = None,
        norm: str | None = "layer",
        form: str = "paper",
    ):
        super().__init__(width, heads, norm, form)
        self.inducing = integer("inducing", inducing)
        self.points = _points(inducing, width)
        self.gather = self._mab()
        self.spread = self._mab()

    def flops_per_token(self, context: int) -> int:
        """One more token is an element for the points (k, v) and a query to them (q, W_o, rFF), each of O(inducing)
        more; what the points themselves cost, once a document, is not counted."""
        matrices = 4 if self.form == "authors" else 5
        return 2 * matrices * self.width**2 + 8 * self.width * self.inducing

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        if segments is not None:
            return Out(each_document(self._sets, x, segments), None, {})
        return Out(self._sets(x, None), None, {})

    def _sets(
        self, x: Float[Tensor, "batch time width"], mask: Int[Tensor, "batch time"] | None
    ) -> Float[Tensor, "batch time width"]:
        """One set a row; `mask` is 0 at its padding, where x is finite and the result means nothing."""
        points = self.points.to(x.dtype).expand(len(x), -1, -1)
        return self.spread(x, self.gather(points, x, None, mask))


class PMA(nn.Module):
    """Pooling by multihead attention: learned seeds attend to a set, PMA_k(Z) = MAB(S, rFF(Z)) (1810.00825, sec. 3.2).

    A head, not a block: [batch, time, width] becomes [batch, seeds, width]. Invariant to permutations of the set.
    O(T D² + T seeds D).

    Args:
        width: features of x and of the output.
        seeds: k, how many vectors the set is pooled into.
        heads, norm, form: as in `MAB`; the form "authors" has no rFF before the pooling.
    """

    def __init__(
        self,
        width: int,
        seeds: int = 1,
        heads: int | None = None,
        norm: str | None = "layer",
        form: str = "paper",
    ):
        super().__init__()
        self.width = integer("width", width)
        self.points = _points(integer("seeds", seeds), width)
        self.mab = MAB(width, heads, norm, form)
        self.feed_forward = RowWise(width) if form == "paper" else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch seeds width"]:
        """A row's valid tokens pooled; zeros for a row of padding alone.

        Raises ValueError where a row holds several documents: the result has one place a row.
        """
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise ValueError(f"PMA takes [batch, time, width={self.width}], got shape {tuple(x.shape)}")
        points = self.points.to(x.dtype).expand(len(x), -1, -1)
        if segments is None:
            return self.mab(points, self.feed_forward(x))
        seg.check(segments, x.shape[0], x.shape[1])
        found = seg.runs(segments)
        if bool(found.start.any()):
            raise ValueError(
                f"PMA pools one set a row, but row {int(found.start.any(1).long().argmax())} of segments holds several "
                "documents; give each document a row of its own"
            )
        valid = segments != 0
        # Padding is taken out before rFF: its bias would make something of zeros, and of NaN a gradient.
        elements = self.feed_forward(torch.where(valid[..., None], x, 0.0))
        pooled = self.mab(points, elements, None, valid.long())
        return torch.where(valid.any(1)[:, None, None], pooled, 0.0)
