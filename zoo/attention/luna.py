"""Luna, linear unified nested attention (2106.01540): a short packed sequence reads the long one, which reads it."""

from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ops import attention
from zoo.attention.luna_causal import PACK_ACTIVATIONS, CausalNested, LunaState, output, projection
from zoo.block import Block, Out, each_document, enter
from zoo.layers.checks import integer
from zoo.layers.ffn import MLP
from zoo.layers.heads import choose_heads
from zoo.layers.norm import LayerNorm
from zoo.layers.places import go_on, locate
from zoo.layers.spelling import nearest

POSITIONS = ("sinusoidal",)


def sinusoidal(places: Int[Tensor, "rows time"], width: int, dtype: torch.dtype) -> Float[Tensor, "rows time width"]:
    """sin and cos of a position at wavelengths from 2π to 10000 · 2π tokens (1706.03762, sec. 3.5), side by side.

    Angles in float32 at least: bfloat16 does not tell 257 from 256.
    """
    exact = torch.promote_types(dtype, torch.float32)
    even = torch.arange(0, width, 2, device=places.device, dtype=exact)
    angle = places[..., None].to(exact) * 10000.0 ** (-even / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., :width].to(dtype)


class Nested(nn.Module):
    """Pack and unpack attention, bidirectional (2106.01540, sec. 3.1):

        Y_P = Attn(P, X)    [length, width]     Y_X = Attn(X, Y_P) W_o    [time, width]

    Attn is multi-head softmax attention with projections of its own for each of the two. As in the authors' code Y_P
    has no output projection, and keys are values too when `tied`. O(T D² + T l D).
    """

    def __init__(self, width: int, heads: int, tied: bool):
        super().__init__()
        self.heads = heads
        parts = 1 if tied else 2
        self.from_x = projection(width, 1 + parts)  # q, pk (also pv when tied), pv
        self.from_p = projection(width, 1)
        self.from_packed = projection(width, parts)  # k (also v when tied), v
        self.out = output(width)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        p: Float[Tensor, "batch length width"],
        mask: Int[Tensor, "batch time"] | None,
    ) -> tuple[Float[Tensor, "batch time width"], Float[Tensor, "batch length width"]]:
        """Y_X and Y_P. A row is one document; `mask` is 0 at its padding, where x is finite and Y_X means nothing."""
        q, pk, *pv = self._split(self.from_x(x))
        (pq,) = self._split(self.from_p(p))
        packed = attention(pq, pk, pv[0] if pv else pk, causal=False, k_segments=mask, clean=True).flatten(2)
        k, *v = self._split(self.from_packed(packed))
        return self.out(attention(q, k, v[0] if v else k, causal=False).flatten(2)), packed

    def _split(self, made: Float[Tensor, "batch rows parts"]) -> Float[Tensor, "n batch rows heads d"]:
        d = self.out.in_features // self.heads
        return rearrange(made, "b t (n h d) -> n b t h d", h=self.heads, d=d)


class LunaLayer(nn.Module):
    """A layer: X_A = LN(Y_X + X), X' = LN(FFN(X_A) + X_A), and with `norm_p` P' = LN(Y_P + P)."""

    def __init__(self, nested: nn.Module, width: int, hidden: int | None, activation: str, packs: bool):
        super().__init__()
        self.nested = nested
        self.norm_x = LayerNorm(width)
        # Where P goes no further it has no norm: a parameter without a gradient would stop distributed training.
        self.norm_p = LayerNorm(width) if packs else None
        self.feed_forward = MLP(width, hidden, activation, bias=True)
        self.norm_out = LayerNorm(width)

    def finish(self, x: Tensor, y: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """What follows the attention on x."""
        x = self.norm_x(x + y)
        return self.norm_out(x + self.feed_forward(x).y)


class Luna(Block):
    """Nested linear attention through a short packed sequence that flows on from layer to layer (Luna, 2106.01540).

    Each layer (Ma et al., sec. 3.1 and 3.2) packs X into P, a sequence of fixed length l, unpacks it to X, and applies
    a feed-forward layer; norms come after residuals. P of layer 0 is learned:

        Y_P = Attn(P, X)    Y_X = Attn(X, Y_P)    P' = LN(Y_P + P)    X_A = LN(Y_X + X)    X' = LN(FFN(X_A) + X_A)

    Causal form (sec. 3.3; the equations stand with `CausalNested`): running means take the place of softmax over time,
    and P may hold nothing of X. So P does not grow through layers there: as in the authors' decoder, whose causal
    attention hands P on as it came, every layer packs with the same learned P, by projections of its own.

    The packed length is l for every document; the authors' code can also cut P to a shorter document's length.

    Args:
        width: features of x.
        layers: layers in this block; it owns their norms and residuals, and a model places it bare.
        heads: of both attentions; must divide width. None: as many as make heads of about 64.
        length: l, the length of the packed sequence.
        hidden: width of the feed-forward layers; None: 4 · width.
        activation: theirs, one of zoo.layers.ffn.
        pack_activation: ω of the causal form, "softplus" (to base 2, the authors') or "elu" (elu + 1).
        tied: keys are values as well, the paper's way to keep the parameters of a Transformer.
        position: "sinusoidal" adds 1706.03762's positions, counted in each document, to x before the first layer, as
            the paper's models do (they want inputs of about unit size: embedding_norm); None adds nothing.
        causal: False makes the bidirectional form, which takes no state.

    State: `LunaState`, of constant size.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(layers T (D^2 + D hidden + length D))
        train memory: O(layers T (D + hidden + heads length)), and one state a chunk of the scan in the causal form
        prefill: O(layers T (D^2 + D hidden + length D))
        decode: O(layers (D^2 + D hidden + length D)) a token and O(layers length D^2) a call, to project P
        state bytes: 2*layers*D*length*max(4, b) + 16 if causal else 0
    """

    residual = False

    def __init__(
        self,
        width: int,
        layers: int = 1,
        heads: int | None = None,
        length: int = 16,
        hidden: int | None = None,
        activation: str = "relu",
        pack_activation: str = "softplus",
        tied: bool = True,
        position: str | None = "sinusoidal",
        causal: bool = True,
    ):
        super().__init__(width)
        self.heads = choose_heads(width, heads)
        self.length = integer("length", length)
        if pack_activation not in PACK_ACTIVATIONS:
            known = ", ".join(PACK_ACTIVATIONS)
            raise ValueError(f"pack_activation={pack_activation!r} is unknown; choose from {known}")
        if position is not None and position not in POSITIONS:
            raise ValueError(
                f"position={position!r} is unknown{nearest(position, POSITIONS)}; choose sinusoidal, or None for none"
            )
        self.tied, self.position = tied, position
        self.causal = causal  # pyright: ignore[reportAttributeAccessIssue]  # this class has both forms
        self.packed = nn.Parameter(torch.empty(length, width).normal_(std=width**-0.5))
        made = []
        for index in range(integer("layers", layers)):
            omega = PACK_ACTIVATIONS[pack_activation]
            nested = CausalNested(width, self.heads, tied, omega) if causal else Nested(width, self.heads, tied)
            packs = not causal and index < layers - 1
            made.append(LunaLayer(nested, width, hidden, activation, packs))
        self.stack = nn.ModuleList(made)
        self.hidden = made[0].feed_forward.hidden

    @property
    def layers(self) -> int:
        return len(self.stack)

    @property
    def each_layer(self) -> list[LunaLayer]:
        """The layers, typed."""
        return cast("list[LunaLayer]", list(self.stack))

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> LunaState:
        if not self.causal:
            raise ValueError("Luna with causal=False is bidirectional and has no state")
        device = self.packed.device if device is None else device
        dtype = torch.promote_types(self.packed.dtype if dtype is None else dtype, torch.float32)
        d = self.width // self.heads
        return LunaState(
            torch.zeros(batch, self.layers, self.heads, d, self.length, device=device, dtype=dtype),
            torch.zeros(batch, self.layers, self.heads, self.length, d, device=device, dtype=dtype),
            torch.zeros(batch, device=device, dtype=torch.long),
            torch.zeros(batch, device=device, dtype=torch.long),
        )

    def state_bytes(self, tokens: int, *, dtype: torch.dtype = torch.float32) -> int:
        return super().state_bytes(tokens, dtype=dtype) if self.causal else 0

    def flops_per_token(self, context: int) -> int:
        """Every matrix that meets the token once, and what the attentions do to the l packed places. Projections of
        the packed sequence itself, once a document or call, are not counted."""
        projections = (4 if self.causal else 3) + (not self.tied)
        # Causal: the packing's logits, and an update and a reading of both sums. Else two attentions over l places.
        nested = (10 if self.causal else 8) * self.width * self.length
        return self.layers * (2 * projections * self.width**2 + 4 * self.width * self.hidden + nested)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: LunaState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        if self.causal:
            return self._forward_causal(x, state, segments)
        if segments is not None:
            return Out(each_document(self._documents, x, segments), None, {})
        return Out(self._documents(x, None), None, {})

    def _documents(
        self, x: Float[Tensor, "batch time width"], mask: Int[Tensor, "batch time"] | None
    ) -> Float[Tensor, "batch time width"]:
        """The bidirectional form on one document a row."""
        x = self._place(x, torch.arange(x.shape[1], device=x.device)[None])
        p = self.packed.to(x.dtype).expand(len(x), -1, -1)
        for layer in self.each_layer:
            y, packed = layer.nested(x, p, mask)
            x = layer.finish(x, y)
            if layer.norm_p is not None:
                p = layer.norm_p(p + packed)
        return x

    def _forward_causal(self, x: Tensor, given: LunaState | None, segments: Tensor | None) -> Out:
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0.0)
        begin = self.init_state(len(x), device=x.device, dtype=x.dtype)
        state = begin if given is None else enter(given, begin, segments)
        if segments is None:
            tokens = go_on(x.shape[1], state.position, state.segment, state.segment)
        else:
            tokens = locate(segments, state.position, state.segment, state.segment)
        x = self._place(x, tokens.places)
        count = (tokens.places + 1).to(state.keys.dtype)
        p, sums = self.packed.to(x.dtype), []
        for index, layer in enumerate(self.each_layer):
            start = (state.keys[:, index], state.values[:, index])
            y, *after = layer.nested(x, p, count, start, segments)
            x = layer.finish(x, y)
            sums.append(after)
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0.0)
        if given is None:
            return Out(x, None, {})
        keys, values = (torch.stack(each, 1) for each in zip(*sums, strict=True))
        return Out(x, LunaState(keys, values, tokens.position, tokens.segment), {})

    def _place(self, x: Float[Tensor, "batch time width"], places: Int[Tensor, "rows time"]) -> Tensor:
        """x with positions added to it."""
        return x if self.position is None else x + sinusoidal(places, self.width, x.dtype)
