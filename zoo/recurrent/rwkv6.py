"""RWKV-6, Finch (Peng et al., 2404.05892): a matrix state a head whose decay and token shift the token decides."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ops import gated_norm, linear_attention, token_mix
from zoo.block import Block, Out, enter, leave, tag
from zoo.layers.checks import number, place
from zoo.layers.heads import choose_heads
from zoo.layers.initial import orthogonal_
from zoo.layers.linear import Linear
from zoo.layers.low_rank import choose_rank
from zoo.layers.shift import token_shift

# e^7 is above 745, so that exp(-e^7) is 0 in float64 too. Without a bound e^w overflows from w = 89 on in float32, and
# the gradient, the infinite e^w times 0, is NaN.
_FASTEST = 7.0


class RWKV6State(NamedTuple):
    """Constant size: the last token, width · head_dim numbers, and the document they belong to (0: none yet)."""

    shift: Float[Tensor, "batch width"]
    S: Float[Tensor, "batch heads head_dim head_dim"]  # float32 at least
    segment: Int[Tensor, " batch"]


class RWKV6(Block):
    """RWKV-6 time mix (2404.05892): linear attention with a decay a key channel and token, over a learned token shift.

    d = x[t-1] - x[t];  z = tanh((x[t] + μ ⊙ d) A);  m_□ = x[t] + (λ_□ + z_□ B_□) ⊙ d for □ = w, k, v, r, g;
    r, k, v = W_□ m_□;  w_t = exp(-exp(ω + tanh(m_w C) D));
    o_t = r_t (S_{t-1} + Diag(u) k_tᵀ v_t);  S_t = Diag(w_t) S_{t-1} + k_tᵀ v_t, for each head;
    y = W_o (silu(W_g m_g) ⊙ LayerNorm_heads(o)).

    A holds the encoders of the five mixes side by side. ln w = -exp(ω + ...) is computed as it stands, in float32 at
    least, so that a w near 0 or near 1 keeps its digits. The norm has a weight and a bias a channel. As published all
    but the square matrices is kept out of weight decay, A, B, C and D too.

    Initial values are the published ones: A and C are 0 (the token decides nothing at first), W_o is 0 (a new block
    adds nothing), W_r and W_v orthogonal, W_k and W_g a tenth of that, and ω, u and the mixes go by channel and depth.

    Options:
        heads: None: of 64 channels as released, or about four in a small width.
        mix_rank, decay_rank: columns of A for each mix, and of C; None: 32 and 64 as released, or what a narrow model's
            matrix has at most.
        layer, layers: the block's place in its model, from 0; a model fills them in. They set initial values alone.
        norm_eps: the released 64e-5 is what GroupNorm's 1e-5 is for an o divided by 8.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D (D + mix_rank + decay_rank) + T D head_dim)
        train memory: O(T (D + chunk heads)) and one state a chunk of 32 tokens
        prefill: O(T D (D + mix_rank + decay_rank) + T D head_dim)
        decode: O(D (D + mix_rank + decay_rank) + D head_dim) a token, whatever the context
        state bytes: D*b + D*head_dim*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        mix_rank: int | None = None,
        decay_rank: int | None = None,
        layer: int = 0,
        layers: int = 1,
        norm_eps: float = 64e-5,
    ):
        super().__init__(width)
        place(layer, layers)
        if number("norm_eps", norm_eps) < 0:
            raise ValueError(f"norm_eps={norm_eps} must not be negative")
        self.heads = choose_heads(width, heads)
        self.head_dim = width // self.heads
        self.mix_rank = choose_rank("mix_rank", mix_rank, 32, width)
        self.decay_rank = choose_rank("decay_rank", decay_rank, 64, width)
        self.layer, self.layers, self.norm_eps = layer, layers, norm_eps
        self.mix_input = nn.Parameter(torch.empty(width))  # μ
        self.mix = nn.Parameter(torch.empty(5, width))  # λ of w, k, v, r and g
        self.mix_encode = Linear(width, 5 * self.mix_rank, bias=False)  # A
        self.mix_decode = nn.Parameter(torch.empty(5, self.mix_rank, width))  # B
        self.decay = nn.Parameter(torch.empty(width))  # ω
        self.decay_encode = Linear(width, self.decay_rank, bias=False)  # C
        self.decay_decode = Linear(self.decay_rank, width, bias=False)  # D
        self.bonus = nn.Parameter(torch.empty(self.heads, self.head_dim))  # u
        self.receptance = Linear(width, width, bias=False)
        self.key = Linear(width, width, bias=False)
        self.value = Linear(width, width, bias=False)
        self.gate = Linear(width, width, bias=False)
        self.norm_weight = nn.Parameter(torch.empty(width))
        self.norm_bias = nn.Parameter(torch.empty(width))
        self.output = Linear(width, width, bias=False)
        for name in ("mix_input", "mix", "mix_decode", "decay", "bonus", "norm_weight", "norm_bias"):
            tag(self, name, weight_decay=False)
        for linear in (self.mix_encode, self.decay_encode, self.decay_decode):
            tag(linear, "weight", weight_decay=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initial values (BlinkDL's RWKV-LM)."""
        depth = self.layer / max(self.layers - 1, 1)  # 0 ... 1
        rest = 1 - self.layer / self.layers  # 1 ... almost 0
        index = torch.arange(self.width, dtype=torch.float64)
        spot, line = index / self.width, index / max(self.width - 1, 1)
        linear, root = 1 - spot**rest, 1 - spot ** (rest / 2)
        self.mix_input.copy_(linear)
        self.mix.copy_(torch.stack([linear, linear, linear - 0.3 * depth, root, root]))
        self.decay.copy_(-6 + 5 * line ** (0.7 + 1.3 * depth))
        zigzag = 0.1 * ((index + 1) % 3 - 1)
        self.bonus.copy_((depth * (1 - line) + zigzag).unflatten(0, (self.heads, -1)))
        for decode in (self.mix_decode, self.decay_decode.weight):
            nn.init.uniform_(decode, -0.01, 0.01)
        for linear in (self.mix_encode, self.decay_encode, self.output):
            linear.weight.zero_()
        for linear, gain in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0), (self.gate, 0.1)):
            orthogonal_(linear.weight, gain)
        self.norm_weight.fill_(((1 + self.layer) / self.layers) ** 0.7)
        self.norm_bias.zero_()

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> RWKV6State:
        dtype = dtype or self.key.weight.dtype
        sums = batch, self.heads, self.head_dim, self.head_dim
        return RWKV6State(
            torch.zeros(batch, self.width, device=device, dtype=dtype),
            torch.zeros(sums, device=device, dtype=torch.promote_types(dtype, torch.float32)),
            torch.zeros(batch, device=device, dtype=torch.long),
        )

    def flops_per_token(self, context: int) -> int:
        """The matrices; 5 a number of the state (decay, outer product, sum, read-out); a channel 2 for z's input, twice
        5 for the mixes, 4 for the decay, 5 for the bonus, 9 for norm and gate; a rank's number 1 for its tanh."""
        matrices = sum(2 * p.numel() for p in self.parameters() if p.ndim >= 2 and p is not self.bonus)
        pieces = 5 * self.width * self.head_dim + (2 + 10 + 4 + 5 + 9) * self.width + 5 * self.mix_rank
        return matrices + pieces + self.decay_rank

    def log_decay(self, mixed: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time heads head_dim"]:
        """ln w_t, float32 at least: bfloat16 has no number between 0.996 and 1, and of a log near 0 8 bits."""
        low = self.decay_decode(torch.tanh(self.decay_encode(mixed)))
        wide = torch.promote_types(low.dtype, torch.float32)
        rate = (self.decay.to(wide) + low.to(wide)).clamp(max=_FASTEST)
        return -torch.exp(rate).unflatten(-1, (self.heads, -1))

    def mixes(
        self, x: Float[Tensor, "batch time width"], before: Float[Tensor, "batch time width"]
    ) -> tuple[Float[Tensor, "batch time width"], ...]:
        """What the decay, key, value, receptance and gate are made of: each channel between x and the token before."""
        (start,) = token_mix(x, before, self.mix_input[None])
        low = torch.tanh(self.mix_encode(start))
        moved = torch.einsum("btnr,nrw->nbtw", low.unflatten(-1, (5, -1)), self.mix_decode.to(low.dtype))
        return token_mix(x, before, self.mix, moved)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: RWKV6State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        carried = state
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0)  # a NaN at padding would reach weights' gradients
            if state is not None:
                fresh = self.init_state(len(x), device=x.device, dtype=state.shift.dtype)
                carried = enter(state, fresh, segments)
        before, shift = token_shift(x, None if carried is None else carried.shift, segments)
        for_decay, for_key, for_value, for_receptance, for_gate = self.mixes(x, before)
        r, k, v = (
            linear(mixed).unflatten(-1, (self.heads, -1))
            for linear, mixed in ((self.receptance, for_receptance), (self.key, for_key), (self.value, for_value))
        )
        o, last, _ = linear_attention(
            r,
            k,
            v,
            self.log_decay(for_decay),
            bonus=self.bonus,
            initial_state=None if carried is None else carried.S,
            segments=segments,
        )
        y = self.output(self.read(o, self.gate(for_gate)))
        if state is None:
            return Out(y, None, {})
        return Out(y, RWKV6State(shift, last.to(state.S.dtype), leave(state.segment, segments)), {})

    def read(
        self, o: Float[Tensor, "batch time heads head_dim"], gate: Float[Tensor, "batch time width"]
    ) -> Float[Tensor, "batch time width"]:
        """silu(gate) ⊙ LayerNorm_heads(o), in float32 at least; 0 at padding, where the gate is."""
        gate, weight, bias = (each.unflatten(-1, (self.heads, -1)) for each in (gate, self.norm_weight, self.norm_bias))
        return gated_norm(o, gate, weight, bias, self.norm_eps, center=True).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.width}, heads={self.heads}, layer={self.layer}, layers={self.layers}"
