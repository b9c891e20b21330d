"""Experts of the usual kind: feed-forward units whose matrices are stacked, one grouped product a projection.

An experts object has `forward(rows, sizes)`; it may have `few(tokens, chosen, weights)`, a short way for decoding,
and `shared(count)`, a block for experts that every token visits. A class and one line in `EXPERTS` add a kind.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ops import grouped_mm
from zoo.block import Block
from zoo.layers.ffn import GEGLU, MLP, SwiGLU, activation_function, check_hidden, gated_hidden, gelu_by
from zoo.moe.parallel import local
from zoo.moe.routers import build

EXPERTS: dict[str, str] = {
    "swiglu": "zoo.moe.experts:SwiGLUExperts",
    "geglu": "zoo.moe.experts:GEGLUExperts",
    "mlp": "zoo.moe.experts:MLPExperts",
    "mpo": "zoo.moe.experts_mpo:MPOExperts",
}


class Experts(nn.Module):
    """`up` [experts, width, inner] and `down` [experts, hidden, width], used as rows @ matrix, no biases.

    Both are stored input by output, as grouped_mm takes them: their gradients then need no transposed copy.
    """

    activation: Callable[[Tensor], Tensor]
    per_expert: ClassVar[tuple[str, ...]] = ("up", "down")  # parameters whose first dimension counts experts

    def __init__(self, width: int, experts: int, hidden: int, inner: int):
        super().__init__()
        self.width, self.experts, self.hidden = width, experts, hidden
        self.up = nn.Parameter(torch.empty(experts, width, inner))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.reset_parameters()

    @classmethod
    def options(cls) -> list[str]:
        """The names of these experts' own options, besides the sizes."""
        return [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def reset_parameters(self) -> None:
        """Each expert as nn.Linear by variance: normal with standard deviation 1/sqrt(3 inputs)."""
        for weight in (self.up, self.down):
            nn.init.normal_(weight, std=(3 * weight.shape[1]) ** -0.5)

    def activate(self, inner: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows hidden"]:
        raise NotImplementedError(f"{type(self).__name__} defines no activate")

    def shared(self, count: int) -> Block:
        """A dense block equal to the sum of `count` more experts that every token visits."""
        raise NotImplementedError(f"{type(self).__name__} defines no shared; use shared_experts=0")

    def parameters_used(self, visits: int) -> int:
        """Parameters that a token uses which visits so many experts."""
        return visits * (self.up.numel() + self.down.numel()) // self.experts

    def flops(self, visits: int) -> int:
        """Forward FLOPs of a token in the experts it visits."""
        return 2 * self.parameters_used(visits)

    def forward(self, rows: Float[Tensor, "rows width"], sizes: Int[Tensor, " experts"]) -> Float[Tensor, "rows width"]:
        """Rows sorted by expert, `sizes` to each; rows behind the last expert's come out as zeros."""
        return grouped_mm(self.activate(grouped_mm(rows, local(self.up), sizes)), local(self.down), sizes)

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
                    out.addmm_(self.activate(row @ self.up[expert]), self.down[expert], alpha=factor)
        return y

    def few_gathered(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Float[Tensor, "tokens width"]:
        """`few` without reading `chosen` on the host. Where it says "no expert" the last one runs, with weight 0."""
        index = chosen.clamp_max(self.experts - 1)
        inner = self.activate(torch.einsum("nd,nkdi->nki", tokens, self.up[index]))
        rows = torch.einsum("nkh,nkhd->nkd", inner, self.down[index])
        return torch.einsum("nkd,nk->nd", rows, weights.to(rows.dtype))


class SwiGLUExperts(Experts):
    """Experts silu(x Wg) ⊙ (x Wu) Wd (Mixtral, 2401.04088). `up[e]` holds the gate's columns, then the value's."""

    def __init__(self, width: int, experts: int, hidden: int | None = None):
        hidden = gated_hidden(width) if hidden is None else check_hidden(hidden)
        super().__init__(width, experts, hidden, 2 * hidden)

    def activate(self, inner: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows hidden"]:
        gate, value = inner.chunk(2, dim=-1)
        return F.silu(gate) * value

    def shared(self, count: int) -> Block:
        return SwiGLU(self.width, hidden=count * self.hidden)


class GEGLUExperts(SwiGLUExperts):
    """Experts gelu(x Wg) ⊙ (x Wu) Wd. Option: `approximate`, as of the block `geglu`."""

    def __init__(self, width: int, experts: int, hidden: int | None = None, *, approximate: str = "none"):
        super().__init__(width, experts, hidden)
        self.approximate, self.gate = approximate, gelu_by(approximate)

    def activate(self, inner: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows hidden"]:
        gate, value = inner.chunk(2, dim=-1)
        return self.gate(gate) * value

    def shared(self, count: int) -> Block:
        return GEGLU(self.width, hidden=count * self.hidden, approximate=self.approximate)


class MLPExperts(Experts):
    """Experts activation(x Wu) Wd (Switch Transformer, 2101.03961). Option: `activation`, as of the block `mlp`."""

    def __init__(self, width: int, experts: int, hidden: int | None = None, *, activation: str = "gelu"):
        self.activation_name, function = activation, activation_function(activation)
        hidden = 4 * width if hidden is None else check_hidden(hidden)
        super().__init__(width, experts, hidden, hidden)
        self.function = function

    def activate(self, inner: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows hidden"]:
        return self.function(inner)

    def shared(self, count: int) -> Block:
        return MLP(self.width, hidden=count * self.hidden, activation=self.activation_name)


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
