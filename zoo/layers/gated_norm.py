"""RMSNorm with a gate, at the end of Mamba-2 and its kin."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ops import gated_norm
from zoo.block import tag


class GatedRMSNorm(nn.Module):
    """norm(x · silu(z)) (Mamba-2, 2405.21060, section 7.1), or with `before_gate` norm(x) · silu(z) (RetNet's and GLA's
    order): published models differ, and one's weights give nonsense in the other's. `activation`: "sigmoid" in the
    place of silu.

    norm is RMSNorm over each of `groups` equal runs of channels by itself, so that groups can live on different devices
    (section 8.1), with one weight a channel; in float32 at least. x, z: [..., width].
    """

    def __init__(
        self, width: int, groups: int = 1, before_gate: bool = False, eps: float = 1e-5, activation: str = "silu"
    ):
        super().__init__()
        self.groups, self.before_gate, self.eps, self.activation = groups, before_gate, eps, activation
        self.weight = nn.Parameter(torch.ones(width))
        tag(self, "weight", weight_decay=False)

    def forward(self, x: Float[Tensor, "*rows width"], z: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        given = (x, z, self.weight)
        if self.groups > 1:
            given = tuple(each.unflatten(-1, (self.groups, -1)) for each in given)
        y = gated_norm(*given, eps=self.eps, activation=self.activation, gate_first=not self.before_gate)
        return (y.flatten(-2) if self.groups > 1 else y).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, groups={self.groups}, before_gate={self.before_gate}, {self.activation}"
