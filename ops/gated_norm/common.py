"""What the implementations share: the formula by torch's operations, how tensors are laid out, and the graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


def chain(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    gate_first: bool,
    center: bool,
) -> Tensor:
    """The formula by torch's operations."""
    wide = torch.promote_types(torch.promote_types(x.dtype, gate.dtype), torch.float32)
    opened = ACTIVATIONS[activation](gate.to(wide))
    u = x.to(wide)
    if gate_first:
        u = u * opened
    width = x.shape[-1:]
    y = F.layer_norm(u, width, eps=eps) if center else F.rms_norm(u, width, eps=eps)
    if weight is not None:
        y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return (y if gate_first else y * opened).to(gate.dtype)


def groups_of(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[int, int]:
    """How many groups have a weight or bias of their own, and how many stand side by side in what is taken as a row, so
    that heads of a part of a projection need no copy."""
    kept = max(1 if each is None or each.ndim == 1 else len(each) for each in (weight, bias))
    return kept, kept if kept > 1 else x.shape[-2] if x.ndim > 3 else 1


def rows_of(x: Tensor, across: int) -> Tensor:
    """[rows, across], each row together; rows may lie apart, as parts of a projection do."""
    rows = x.reshape(-1, across)
    return rows if rows.stride(1) == 1 and rows.stride(0) >= across else rows.contiguous()


def with_gradient(forward: Callable[..., tuple[Tensor, ...]], backward: Callable[..., Any]) -> Callable[..., Tensor]:
    """The op of a `forward`, which gives y and two tensors more, and of a `backward`, which takes dy, the op's tensors,
    those two and the options, and gives a gradient for each of the op's tensors."""

    class GatedNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Any, bias: Any, eps: float, *options: Any) -> Tensor:
            y, *kept = forward(x, gate, weight, bias, eps, *options)
            ctx.save_for_backward(x, gate, weight, bias, *kept)
            ctx.eps, ctx.options = eps, options
            return y

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            *given, means, rates = ctx.saved_tensors
            if not torch.is_grad_enabled():
                return *backward(grads[0], *given, means, rates, *ctx.options), *(None,) * 4
            # Gradients of gradients: by operations that have some.
            asked = ctx.needs_input_grad[:4]
            wanted = [each for each, ask in zip(given, asked, strict=True) if ask]
            arguments = [*given, ctx.eps, *ctx.options]
            y = chain(*arguments)
            found = iter(torch.autograd.grad(y, wanted, grads[0], create_graph=True))
            return *(next(found) if ask else None for ask in asked), *(None,) * 4

    def run(
        x: Tensor,
        gate: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        activation: str,
        gate_first: bool,
        center: bool,
    ) -> Tensor:
        """See `ops.gated_norm`."""
        options = activation, gate_first, center
        if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, gate, weight, bias)):
            return GatedNorm.apply(x, gate, weight, bias, eps, *options)  # pyright: ignore[reportReturnType]
        return forward(x, gate, weight, bias, eps, *options)[0]

    return run
