"""Normalisation over the width."""

import torch
from torch import Tensor, nn

from ops import rms_norm
from ops.step import Around
from zoo.block import tag
from zoo.layers.checks import number


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich, 1910.07467, eq. 4). x: [..., width].

    The mean is taken in float32 at least: bfloat16 keeps 8 bits of a sum over the width.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        tag(self, "weight", weight_decay=False)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class ZeroCenteredRMSNorm(RMSNorm):
    """y = x / sqrt(mean(x²) + eps) · (1 + weight), with a weight that starts at 0 (Gemma, 2403.08295; Qwen3-Next).

    x: [..., width]. The same map as RMSNorm of another parameter: bfloat16 keeps more digits of a small weight than of
    1 + weight. All is computed in float32 at least, and the result rounded.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__(width, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x.to(wide), 1 + self.weight.to(wide), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose weight and bias are tagged as free of weight decay. x: [..., width]."""

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = True):
        super().__init__(width, eps=eps, bias=bias)
        tag(self, "weight", weight_decay=False)
        tag(self, "bias", weight_decay=False)


NORMS = {"rms": RMSNorm, "layer": LayerNorm, "rms_zero_centered": ZeroCenteredRMSNorm}


def norm(kind: str, width: int, eps: float | None = None) -> nn.Module:
    """The norm of this name (one of NORMS) over `width`, `eps` as in the class unless told."""
    if kind not in NORMS:
        raise ValueError(f"norm={kind!r} is unknown; choose from {', '.join(NORMS)}")
    if eps is not None and number("norm_eps", eps) < 0:
        raise ValueError(f"norm_eps={eps} must not be negative; None is the norm's own default")
    return NORMS[kind](width) if eps is None else NORMS[kind](width, eps=eps)


def around(norm: nn.Module, skip: float = 1.0, scale: float = 1.0) -> Around | None:
    """A norm before a block and a residual around it, as `ops.step` takes them; None where the norm is another."""
    if norm._forward_hooks or norm._forward_pre_hooks:
        return None
    kind = type(norm)
    if isinstance(norm, RMSNorm) and kind in (RMSNorm, ZeroCenteredRMSNorm):
        return Around(norm.weight, None, norm.eps, float(kind is ZeroCenteredRMSNorm), skip, scale)
    if isinstance(norm, LayerNorm) and kind is LayerNorm and norm.bias is not None:
        return Around(norm.weight, norm.bias, norm.eps, 0.0, skip, scale)
    return None
