"""RWKV-7's time mix (Peng et al., 2503.14456, sec. 4): a generalised delta rule, and values mixed with layer 0's."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ops import delta_rule, token_mix
from zoo.block import tag
from zoo.layers.initial import orthogonal_
from zoo.layers.linear import Linear
from zoo.layers.shift import token_shift
from zoo.layers.wide import WideLinear

_RATE = math.exp(-0.5)  # w is exp(-_RATE) = 0.545 at least


class LowRank(nn.Module):
    """f(x E) D + b, E and D thin. b is added in float32 at least: the sigmoids behind it saturate."""

    def __init__(self, width: int, rank: int, between: Callable[[Tensor], Tensor] | None = None, bias: bool = True):
        super().__init__()
        self.between = between
        self.encode = Linear(width, rank, bias=False)
        self.decode = WideLinear(rank, width, bias=bias)
        tag(self.encode, "weight", weight_decay=False)
        tag(self.decode, "weight", weight_decay=False)
        if bias:
            tag(self.decode, "bias", weight_decay=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.encode.weight)
        orthogonal_(self.decode.weight, 0.1)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        low = self.encode(x)
        return self.decode(low if self.between is None else self.between(low))


class TimeMix(nn.Module):
    """One layer's time mix; see `RWKV7`, which owns its state. `layer` 0 gives its values to the others and so has no
    value gate of its own."""

    def __init__(
        self, width: int, heads: int, ranks: tuple[int, int, int, int], layer: int, layers: int, norm_eps: float
    ):
        super().__init__()
        self.width, self.heads, self.layer, self.layers, self.norm_eps = width, heads, layer, layers, norm_eps
        decay, rate, value, gate = ranks
        self.mix = nn.Parameter(torch.empty(6, width))  # μ of r, w, k, v, a and g
        self.decay = LowRank(width, decay, torch.tanh)
        self.rate = LowRank(width, rate)
        self.value_gate = LowRank(width, value) if layer else None
        self.gate = LowRank(width, gate, torch.sigmoid, bias=False)
        self.removal = nn.Parameter(torch.empty(width))  # ξ
        self.replacement = nn.Parameter(torch.empty(width))  # how much α scales what is written
        self.bonus = nn.Parameter(torch.empty(heads, width // heads))  # ρ
        self.receptance = Linear(width, width, bias=False)
        self.key = Linear(width, width, bias=False)
        self.value = Linear(width, width, bias=False)
        self.norm_weight = nn.Parameter(torch.empty(width))
        self.norm_bias = nn.Parameter(torch.empty(width))
        self.output = Linear(width, width, bias=False)
        for name in ("mix", "removal", "replacement", "bonus", "norm_weight", "norm_bias"):
            tag(self, name, weight_decay=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initial values (BlinkDL's RWKV-LM)."""
        depth = self.layer / max(self.layers - 1, 1)  # 0 ... 1
        rest = 1 - self.layer / self.layers  # 1 ... almost 0
        index = torch.arange(self.width, dtype=torch.float64)
        line = index / max(self.width - 1, 1)
        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2], dtype=torch.float64)
        self.mix.copy_(1 - (index / self.width) ** (rest * powers[:, None]))
        middle = max(self.width // self.heads - 1, 1) / 2
        zigzag = index % (self.width // self.heads) / middle - 1
        zigzag = zigzag * zigzag.abs()
        for each in (self.decay, self.rate, self.value_gate, self.gate):
            if each is not None:
                each.reset_parameters()
        self.decay.decode.bias.copy_(-5.5 + 6 * line ** (1 + depth**0.3) + 2.5 * zigzag)
        self.rate.decode.bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * (line - 0.5))
        if self.value_gate is not None:
            self.value_gate.decode.bias.copy_(0.73 - 0.4 * (line - 0.5))
        self.removal.copy_(0.71 - 0.1 * (line - 0.5))
        self.replacement.fill_(1.02)
        self.bonus.fill_(-0.04)
        for linear, reach in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5)):
            nn.init.uniform_(linear.weight, -reach / self.width**0.5, reach / self.width**0.5)
        self.output.weight.zero_()
        self.norm_weight.fill_(((1 + self.layer) / self.layers) ** 0.7)
        self.norm_bias.zero_()

    def flops_per_token(self) -> int:
        """The matrices; 7 a number of the state (decay, two rank-one updates, read-out); some 50 a channel for mixes,
        gates, norms and the bonus; a rank's number 1."""
        matrices = sum(2 * p.numel() for p in self.parameters() if p.ndim >= 2 and p is not self.bonus)
        ranks = self.decay.encode.out_features + self.gate.encode.out_features
        return matrices + 7 * self.width * (self.width // self.heads) + 50 * self.width + ranks

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        first: Float[Tensor, "batch time width"] | None,
        shift: Float[Tensor, "batch width"] | None = None,
        S: Float[Tensor, "batch heads head_dim head_dim"] | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, layer 0's values, the last token and the last matrices. `first`: layer 0's values, None in it."""
        before, shift = token_shift(x, shift, segments)
        r, w, k, v, a, g = token_mix(x, before, self.mix)
        r, k, v = self.receptance(r), self.key(k), self.mix_value(v, first)
        log_decay = -_RATE * torch.sigmoid(self.decay(w))
        a, wide = torch.sigmoid(self.rate(a)), torch.promote_types(x.dtype, torch.float32)
        erased = F.normalize(self.by_head(k.to(wide) * self.removal.to(wide)), dim=-1)
        written = (k.to(wide) * (1 + (a - 1) * self.replacement.to(wide))).to(k.dtype)
        r, written, values, log_decay, a = (self.by_head(each) for each in (r, written, v, log_decay, a))
        erase = erased.to(k.dtype), (-a * erased).to(k.dtype)
        o, last = delta_rule(
            r, written, values, log_decay=log_decay, erase=erase, initial_state=S, segments=segments
        )  # fmt: skip
        y = self.output(self.read(o, r, written, values) * self.gate(g))
        return y, v if first is None else first, shift, last

    def mix_value(
        self, mixed: Float[Tensor, "batch time width"], first: Float[Tensor, "batch time width"] | None
    ) -> Float[Tensor, "batch time width"]:
        """The layer's values, each channel between its own and layer 0's."""
        v = self.value(mixed)
        if self.value_gate is None or first is None:
            return v
        return v + (first - v) * torch.sigmoid(self.value_gate(mixed)).to(v.dtype)

    def by_head(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time heads head_dim"]:
        return x.unflatten(-1, (self.heads, -1))

    def read(
        self,
        o: Float[Tensor, "batch time heads head_dim"],
        r: Float[Tensor, "batch time heads head_dim"],
        k: Float[Tensor, "batch time heads head_dim"],
        v: Float[Tensor, "batch time heads head_dim"],
    ) -> Float[Tensor, "batch time width"]:
        """LayerNorm_heads(o) and the bonus of the token itself, in float32 at least."""
        given, wide = o.dtype, torch.promote_types(o.dtype, torch.float32)
        o, r, k, v = (each.to(wide) for each in (o, r, k, v))
        normed = F.layer_norm(o, o.shape[-1:], eps=self.norm_eps).flatten(-2)
        normed = normed * self.norm_weight.to(wide) + self.norm_bias.to(wide)
        own = (r * k * self.bonus.to(wide)).sum(-1, keepdim=True) * v
        return (normed + own.flatten(-2)).to(given)
