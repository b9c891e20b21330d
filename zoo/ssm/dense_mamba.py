"""DenseMamba (He et al., 2403.00818): Mamba layers whose hidden states reach the next layers' as well."""

from typing import Any, NamedTuple, cast

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from ops import selective_scan
from zoo.block import Block, Out, enter, leave
from zoo.layers.checks import integer
from zoo.layers.linear import Linear
from zoo.layers.norm import RMSNorm
from zoo.layers.spelling import nearest
from zoo.ssm.mamba import Mamba

FUSIONS = ("add", "concat")
PROJECTIONS = ("identity", "linear")


class LayerState(NamedTuple):
    """What one layer carries, as in Mamba."""

    conv: Float[Tensor, "batch taps_1 inner"]  # the last inputs of the convolution, oldest first
    scan: Float[Tensor, "batch inner n"]  # its own h, nothing fused into it; float32 at least


class DenseMambaState(NamedTuple):
    """Constant size: every layer's state and a document id a row."""

    layers: tuple[LayerState, ...]
    segment: Int[Tensor, " batch"]


class Hidden(NamedTuple):
    """The hidden states h of a layer over a call, as what they are made of: [batch time inner n] is never held."""

    x: Float[Tensor, "batch time inner"]
    dt: Float[Tensor, "batch time inner"]
    A: Float[Tensor, "inner n"]
    B: Float[Tensor, "batch time n"]
    start: Float[Tensor, "batch inner n"] | None  # h before the call
    segments: Int[Tensor, "batch time"] | None

    def read(
        self, C: Float[Tensor, "batch time n"], D: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch time inner"], Float[Tensor, "batch inner n"]]:
        """C_t h_t (+ D x_t) by a scan of its own, and h after the call."""
        return selective_scan(
            self.x, self.dt, self.A, self.B, C, D, initial_state=self.start, segments=self.segments
        )  # fmt: skip


class DenseLayer(nn.Module):
    """Norm, a Mamba mixer whose h_t takes in those of `sources` layers before it, residual."""

    def __init__(self, mixer: Mamba, sources: int, fusion: str, projection: str, gate_rank: int):
        super().__init__()
        self.norm = RMSNorm(mixer.width)
        self.mixer, self.sources = mixer, sources
        n = mixer.state_size
        self.select = self.project = self.C_proj = None
        if sources == 0:
            return
        self.select = nn.Sequential(
            Linear(mixer.width, gate_rank, bias=False),
            nn.SiLU(),
            Linear(gate_rank, mixer.inner, bias=False),
            nn.SiLU(),
        )
        if projection == "linear":
            self.project = nn.Parameter(torch.eye(n).repeat(sources, 1, 1))
        if fusion == "concat":
            self.C_proj = Linear(mixer.inner, sources * n, bias=False)

    def flops_per_token(self, context: int) -> int:
        """The mixer's; the gate, the projections of C, and for each source a scan of 9 a state and its gating."""
        dense = sum(2 * p.numel() for each in (self.select, self.C_proj) if each is not None for p in each.parameters())
        dense += 0 if self.project is None else 2 * self.project.numel()
        return (
            self.mixer.flops_per_token(context)
            + dense
            + self.sources * (9 * self.mixer.A_log.numel() + 2 * self.mixer.inner)
        )

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: LayerState | None,
        before: list[Hidden],
        segments: Int[Tensor, "batch time"] | None,
    ) -> tuple[Float[Tensor, "batch time width"], LayerState, Hidden]:
        """x after the layer, its state and its hidden states; `before`: those of the layers before, the last first."""
        m, u = self.mixer, self.norm(x)
        channels, gate = m.in_proj(u).chunk(2, -1)
        channels, conv = m.conv(channels, None if state is None else state.conv, segments)
        dt, B, C = m.x_proj(channels).split([m.dt_rank, m.state_size, m.state_size], -1)
        # float32: A dt is an exponent, and bfloat16's 8 bits of it would be 8 bits of the decay over many tokens.
        dt = softplus(m.dt_proj(m.dt_norm(dt)))
        A, start = -torch.exp(m.A_log.to(dt.dtype)), None if state is None else state.scan
        own, C = Hidden(channels, dt, A, m.B_norm(B), start, segments), m.C_norm(C)
        y, scan = own.read(C, m.D)
        if before:
            readings = [each.read(matrix)[0] for each, matrix in zip(before, self._matrices(C, channels), strict=True)]
            assert self.select is not None
            y = y + self.select(u) * sum(readings[1:], readings[0])
        y = m.out_proj(y * silu(gate))
        if m.out_proj.bias is not None and segments is not None:
            y = torch.where((segments != 0)[..., None], y, 0)
        return x + y, LayerState(conv, scan), own

    def _matrices(
        self, C: Float[Tensor, "batch time n"], channels: Float[Tensor, "batch time inner"]
    ) -> tuple[Float[Tensor, "batch time n"], ...]:
        """What reads each source's h: the layer's C, or with "concat" its further rows, behind the projection."""
        if self.C_proj is not None:
            return self.C_proj(channels).chunk(self.sources, -1)
        if self.project is None:
            return (C,) * self.sources
        return tuple(einsum(C, each.to(C.dtype), "b t n, n k -> b t k") for each in self.project)


class DenseMamba(Block):
    """Mamba layers with dense hidden connections: h of the last layers is fused into each layer's (2403.00818).

    With h^l_t [inner, state_size] the hidden states of layer l's own scan (2312.00752; see `Mamba`), u^l its input,
    normed, and ⊙ over the states broadcast,

        h̃^l_t = Fuse(h^l_t, φ(h^{l-1}_t), ..., φ(h^{l-m}_t))    φ(h) = a^l_t ⊙ P h    a^l_t = silu(W_2 silu(W_1 u^l_t))
        y^l_t = (C^l_t h̃^l_t + D x^l_t) · silu(z^l_t)           out: x + W_out y^l

    (section 3.2: selective transition and hidden fusion). As in the authors' DenseRetNet the layers below give what
    they have before their own fusion, one gate a layer serves all its sources, it depends on that layer's input, and P
    is the identity unless asked for. h̃ is what C reads; the recurrence goes on from h, so each layer stays a scan.

    The authors have published no code of DenseMamba. The choices that the equations leave: a^l_t has a number a
    channel, and P maps the states of a channel (n -> n), one matrix a pair of layers. Both make the reading linear,

        C^l_t h̃^l_t = C^l_t h^l_t + Σ_i a^l_t ⊙ ((Pᵀ C^l_t) h^{l-i}_t),

    so a fused state is never made: layer l - i is scanned once more with layer l's C. That is exact, also from chunk to
    chunk, and holds nothing of size time · inner · state_size.

    A composite block: it owns its layers with their norms and residuals (x + mixer(RMSNorm(x))).

    Args:
        width: features of x.
        layers: Mamba layers.
        dense_layers: m, the layers before a layer whose hidden states it takes in (fewer in the first ones); 0: none.
        fusion: "add" sums the states; "concat" puts them side by side, so C has rows of its own for each source.
        projection: P, "identity" or "linear" (starts as the identity). "concat" has it in C's rows already.
        gate_rank: rows of W_1; None: ceil(width / 16).
        expand, state_size, conv_width, dt_rank, dt_min, dt_max, bias, conv_bias, inner_norm: every layer's `Mamba`.

    State: `DenseMambaState`, of constant size: that of as many Mamba layers, nothing for the connections.

    Cost (T tokens, D = width, b bytes a number; m = dense_layers):
        train time: O(layers T (D inner + (1 + m) inner state_size))
        train memory: O(layers (1 + m) T inner), and (1 + m) states of a layer for each 64 tokens
        prefill: O(layers T (D inner + (1 + m) inner state_size))
        decode: O(layers (D inner + (1 + m) inner state_size)) a token, whatever the context
        state bytes: layers*((conv_width - 1)*inner*b + inner*state_size*max(4, b)) + 8
    """

    residual = False

    def __init__(
        self,
        width: int,
        layers: int = 4,
        dense_layers: int = 2,
        fusion: str = "add",
        projection: str = "identity",
        gate_rank: int | None = None,
        expand: int = 2,
        state_size: int = 16,
        conv_width: int = 4,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        bias: bool = False,
        conv_bias: bool = True,
        inner_norm: bool | str = False,
    ):
        super().__init__(width)
        self.layers, self.dense_layers = integer("layers", layers), integer("dense_layers", dense_layers, 0)
        for name, value, known in (("fusion", fusion, FUSIONS), ("projection", projection, PROJECTIONS)):
            if value not in known:
                hint = nearest(str(value), known)
                raise ValueError(f"{name}={value!r} is unknown{hint}; choose from {', '.join(known)}")
        if (fusion, projection) == ("concat", "linear"):
            raise ValueError(
                "projection='linear' adds nothing to fusion='concat', whose rows of C project each source already; "
                "use projection='identity'"
            )
        rank = -(-width // 16) if gate_rank is None else integer("gate_rank", gate_rank)
        made = []
        for index in range(layers):
            mixer = Mamba(
                width, expand, state_size, conv_width, dt_rank, dt_min, dt_max, bias, conv_bias, inner_norm
            )  # fmt: skip
            made.append(DenseLayer(mixer, min(index, dense_layers), fusion, projection, rank))
        self.stack = nn.ModuleList(made)
        self.inner, self.state_size, self.conv_width = made[0].mixer.inner, state_size, conv_width

    @property
    def each_layer(self) -> list[DenseLayer]:
        """The layers, typed."""
        return cast("list[DenseLayer]", list(self.stack))

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> DenseMambaState:
        made = [layer.mixer.init_state(batch, device=device, dtype=dtype) for layer in self.each_layer]
        return DenseMambaState(tuple(LayerState(each.conv, each.scan) for each in made), made[0].segment)

    def flops_per_token(self, context: int) -> int:
        return sum(layer.flops_per_token(context) for layer in self.each_layer)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: DenseMambaState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        carried = state
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0)  # a NaN at padding would reach in_proj's gradient
            if state is not None:
                fresh = self.init_state(len(x), device=x.device, dtype=state.layers[0].conv.dtype)
                carried = enter(state, fresh, segments)
        hidden: list[Hidden] = []  # the last layer's first
        after = []
        for index, layer in enumerate(self.each_layer):
            own = None if carried is None else carried.layers[index]
            x, own, made = layer(x, own, hidden[: layer.sources], segments)
            after.append(own)
            hidden = [made, *hidden[: max(0, self.dense_layers - 1)]]
        if state is None:
            return Out(x, None, {})
        return Out(x, DenseMambaState(tuple(after), leave(state.segment, segments)), {})
