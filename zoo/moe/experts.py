"""Experts of the usual kind: feed-forward units whose matrices are stacked, one grouped product a projection.

An experts object has `forward(rows, sizes)`; it may have `few(tokens, chosen, weights)`, a short way for decoding,
and `shared(hidden)`, a dense block for experts that every token visits. A class and one line in `EXPERTS` add a kind.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ops import grouped_mm
from zoo.block import Block, tag
from zoo.layers.ffn import GEGLU, MLP, SwiGLU, activation_function, check_hidden, gate_by, gated_hidden, gelu_by
from zoo.moe.parallel import local
from zoo.moe.routers import build

EXPERTS: dict[str, str] = {
    "swiglu": "zoo.moe.experts:SwiGLUExperts",
    "geglu": "zoo.moe.experts:GEGLUExperts",
    "mlp": "zoo.moe.experts:MLPExperts",
    "mpo": "zoo.moe.experts_mpo:MPOExperts",
}


class Experts(nn.Module):
    """`up` [experts, width, inner] and `down` [experts, hidden, width], used as rows @ matrix; with `bias` also
    `up_bias` [experts, inner] and `down_bias` [experts, width].

    Matrices are stored input by output, as grouped_mm takes them: their gradients then need no transposed copy.
    """

    activation: Callable[[Tensor], Tensor]
    is_transposed = True  # what peft asks for: stored input by output

    def __init__(self, width: int, experts: int, hidden: int, inner: int, bias: bool):
        super().__init__()
        self.width, self.experts, self.hidden = width, experts, hidden
        self.up = nn.Parameter(torch.empty(experts, width, inner))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.up_bias = nn.Parameter(torch.empty(experts, inner)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(experts, width)) if bias else None
        # Parameters whose first dimension counts experts.
        self.per_expert = ("up", "down", "up_bias", "down_bias") if bias else ("up", "down")
        for name in self.per_expert[2:]:
            tag(self, name, weight_decay=False)
        self.reset_parameters()

    @classmethod
    def options(cls) -> list[str]:
        """The names of these experts' own options, besides the sizes."""
        return [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def reset_parameters(self) -> None:
        """Each expert as nn.Linear by variance: normal with standard deviation 1/sqrt(3 inputs), biases too."""
        for weight, bias in ((self.up, self.up_bias), (self.down, self.down_bias)):
            std = (3 * weight.shape[1]) ** -0.5
            nn.init.normal_(weight, std=std)
            if bias is not None:
                nn.init.normal_(bias, std=std)

    def activate(self, inner: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows hidden"]:
        raise NotImplementedError(f"{type(self).__name__} defines no activate")

    def shared(self, hidden: int) -> Block:
        """A dense block of this kind: experts that every token visits, with so many hidden units together."""
        raise NotImplementedError(f"{type(self).__name__} defines no shared; use shared_experts=0")

    def parameters_used(self, visits: int) -> int:
        """Parameters that a token uses which visits so many experts."""
        return visits * sum(p.numel() for p in self.parameters()) // self.experts

    def flops(self, visits: int) -> int:
        """Forward FLOPs of a token in the experts it visits."""
        return sum(max(1, p.ndim - 1) * visits * p.numel() // self.experts for p in self.parameters())

    def forward(self, rows: Float[Tensor, "rows width"], sizes: Int[Tensor, " experts"]) -> Float[Tensor, "rows width"]:
        """Rows sorted by expert, `sizes` to each; rows behind the last expert's come out as zeros."""
        inner = _biased(grouped_mm(rows, local(self.up), sizes), self.up_bias, sizes)
        return _biased(grouped_mm(self.activate(inner), local(self.down), sizes), self.down_bias, sizes)

    def few(
        self,
        tokens: Float[Tensor, "tokens width"],
        chosen: Int[Tensor, "tokens k"],
        weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens width"]:
        """The weighted sum for a handful of tokens: the chosen experts' slices alone, no sorting, no gradients.

        On the CPU each slice is used where it lies; elsewhere they are gathered, which needs no synchronisation.
        """
        if tokens.device.type != "cpu":
            return self.few_gathered(tokens, chosen, weights)
        y = torch.zeros_like(tokens)
        for row, out, numbers, factors in zip(
            tokens.split(1), y.split(1), chosen.tolist(), weights.tolist(), strict=True
        ):
            for expert, factor in zip(numbers, factors, strict=True):
                if expert < self.experts:
                    inner = row @ self.up[expert]
                    inner = inner if self.up_bias is None else inner + self.up_bias[expert]
                    out.addmm_(self.activate(inner), self.down[expert], alpha=factor)
                    if self.down_bias is not None:
                        out.add_(self.down_bias[expert], alpha=factor)
        return y

    def few_gathered(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Float[Tensor, "tokens width"]:
        """`few` without reading `chosen` on the host. Where it says "no expert" the last one runs, with weight 0."""
        index = chosen.clamp_max(self.experts - 1)
        inner = torch.einsum("nd,nkdi->nki", tokens, self.up[index])
        inner = inner if self.up_bias is None else inner + self.up_bias[index]
        rows = torch.einsum("nkh,nkhd->nkd", self.activate(inner), self.down[index])
        rows = rows if self.down_bias is None else rows + self.down_bias[index]
        return torch.einsum("nkd,nk->nd", rows, weights.to(rows.dtype))


def _biased(y: Float[Tensor, "rows out"], bias: Tensor | None, sizes: Int[Tensor, " experts"]) -> Tensor:
    """y plus the bias of each row's expert; rows behind the last expert's stay as they are."""
    if bias is None:
        return y
    expert = torch.searchsorted(sizes.cumsum(0), torch.arange(len(y), device=y.device), right=True)
    return y + F.pad(local(bias).to(y.dtype), (0, 0, 0, 1)).index_select(0, expert)


class SwiGLUExperts(Experts):
    """Experts silu(x Wg) ⊙ (x Wu) Wd (Mixtral, 2401.04088). `up[e]` holds the gate's columns, then the value's.
    Option: `bias`, on all projections."""

    def __init__(self, width: int, experts: int, hidden: int | None = None, *, bias: bool = False):
        hidden = gated_hidden(width) if hidden is None else check_hidden(hidden)
        super().__init__(width, experts, hidden, 2 * hidden, bias)
        self.activation = F.silu

    def activate(self, inner: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows hidden"]:
        return gate_by(self.activation, inner)

    def shared(self, hidden: int) -> Block:
        return SwiGLU(self.width, hidden=hidden, bias=self.up_bias is not None)


class GEGLUExperts(SwiGLUExperts):
    """Experts gelu(x Wg) ⊙ (x Wu) Wd. Options: `approximate` and `bias`, as of the block `geglu`."""

    def __init__(
        self, width: int, experts: int, hidden: int | None = None, *, approximate: str = "none", bias: bool = False
    ):
        super().__init__(width, experts, hidden, bias=bias)
        self.approximate, self.activation = approximate, gelu_by(approximate)

    def shared(self, hidden: int) -> Block:
        biased = self.up_bias is not None
        return GEGLU(self.width, hidden=hidden, bias=biased, approximate=self.approximate)


class MLPExperts(Experts):
    """Experts activation(x Wu) Wd (Switch Transformer, 2101.03961). Options: `activation` and `bias`, as of the block
    `mlp`."""

    def __init__(
        self, width: int, experts: int, hidden: int | None = None, *, activation: str = "gelu", bias: bool = False
    ):
        self.activation_name, function = activation, activation_function(activation)
        hidden = 4 * width if hidden is None else check_hidden(hidden)
        super().__init__(width, experts, hidden, hidden, bias)
        self.activation = function

    def activate(self, inner: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows hidden"]:
        return self.activation(inner)

    def shared(self, hidden: int) -> Block:
        biased = self.up_bias is not None
        return MLP(self.width, hidden=hidden, activation=self.activation_name, bias=biased)


def build_experts(spec: Any, width: int, experts: int, hidden: int | None) -> Any:
    """Experts from their name, from {"kind": name, **options}, or the object itself (its sizes are checked)."""
    if isinstance(spec, nn.Module):
        for name, wanted in (("width", width), ("experts", experts), ("hidden", hidden)):
            if wanted is not None and getattr(spec, name) != wanted:
                raise ValueError(
                    f"the experts were built for {name}={getattr(spec, name)}, the block has {name}={wanted}; "
                    f"pass the same {name} to both"
                )
        return spec
    return build(EXPERTS, "expert", spec, width=width, experts=experts, hidden=hidden)
