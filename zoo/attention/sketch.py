"""Polynomial sketches: short vectors whose product is close to (xᵀy)^degree (PolySketchFormer, 2310.01655)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.attention.features import RandomProjection
from zoo.layers.linear import Linear
from zoo.layers.norm import LayerNorm
from zoo.layers.spelling import nearest


class LearnedProjection(nn.Sequential):
    """What stands in for a random projection in a learned sketch: LayerNorm, one hidden layer of 8 times
    the sketch, GELU, no biases, as in the authors' code."""

    def __init__(self, rows: int, size: int):
        layers = Linear(size, 8 * rows, bias=False), Linear(8 * rows, rows, bias=False)
        for each in layers:
            # Outputs as large as inputs: a sketch that starts near zero weighs all but the local block by nothing.
            nn.init.normal_(each.weight, std=each.in_features**-0.5)
        super().__init__(LayerNorm(size), layers[0], nn.GELU(approximate="tanh"), layers[1])


class Sketch(nn.Module):
    """Sketch of a degree from 2: x -> √(1/r) (P₁ S₁(x)) ⊙ (P₂ S₂(x)), S₁ and S₂ sketches of half the degree (degree 1:
    x itself), P₁ and P₂ projections to r numbers (algorithm 1, PolySketchWithNegativity).

    With Gaussian P its expected product is (xᵀy)^degree, the error falling like 1/√r. With learned P it ends in
    √r tanh(·/√r), which bounds it.
    """

    def __init__(self, size: int, degree: int, rows: int, learned: bool):
        super().__init__()
        halves = degree // 2, degree - degree // 2
        self.rows, self.learned = rows, learned
        self.parts = nn.ModuleList(make_sketch(size, half, rows, learned) for half in halves)
        project: Callable[[int, int], nn.Module] = LearnedProjection if learned else RandomProjection
        self.projections = nn.ModuleList(project(rows, size if half == 1 else rows) for half in halves)

    def forward(self, x: Float[Tensor, "*shape size"]) -> Float[Tensor, "*shape rows"]:
        one, other = (project(part(x)) for part, project in zip(self.parts, self.projections, strict=True))
        root = self.rows**0.5
        return torch.tanh(one * other / root) * root if self.learned else one * other / root

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw other random projections; learned ones stay."""
        for each in self.modules():
            if isinstance(each, RandomProjection):
                each.redraw(generator)


KINDS = ("random", "learned")


def make_sketch(size: int, degree: int, rows: int, learned: bool) -> nn.Module:
    """A sketch of this degree; of degree 1 the vector itself."""
    return nn.Identity() if degree == 1 else Sketch(size, degree, rows, learned)


def is_learned(kind: str) -> bool:
    """Whether a sketch of this name is learned; a ValueError for an unknown name."""
    if kind not in KINDS:
        raise ValueError(f"sketch={kind!r} is unknown{nearest(kind, KINDS)}; choose random or learned")
    return kind == "learned"
