"""A mixture of experts on one token at once, for decoding on a CPU (`ops.step`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ops import step
from ops.step import Around
from zoo.block import STATELESS, Out, State, Step
from zoo.layers.ffn import MLP, GatedUnit, activation_name
from zoo.layers.linear import plain
from zoo.moe.experts import GEGLUExperts, MLPExperts, SwiGLUExperts
from zoo.moe.router_top_k import TopK

if TYPE_CHECKING:
    from zoo.moe.moe import MoE

KINDS = (SwiGLUExperts, GEGLUExperts, MLPExperts)


def bind_step(block: MoE, around: Around) -> Step | None:
    """`Block.bind_step` of MoE: the router top_k without groups, in eval mode, and experts of the usual kinds."""
    router, experts = block.router, block.experts
    if type(router) is not TopK or router.groups > 1 or block.training or block.exchange is not None:
        return None
    if type(experts) not in KINDS or any(each._forward_hooks or each._forward_pre_hooks for each in (router, experts)):
        return None
    name = activation_name(experts.activation)
    shared = _shared(block.shared, block)
    if name is None or shared is None:
        return None
    biases = None if experts.up_bias is None else (experts.up_bias, experts.down_bias)
    weights = (router.weight, experts.up, experts.down, *(biases or ()), *shared, block.out_bias)
    if not step.fits(*weights, around.weight, around.bias):
        return None
    from ops.step.moe import Choice, Shared, moe

    choice = Choice(router.top_k, router.order == "top_k_then_softmax", router.renormalise, router.scale)
    gated = not isinstance(experts, MLPExperts)
    always = Shared(*shared) if shared else None
    up, down, width = experts.up, experts.down, block.width
    run = moe(router.weight, choice, up, down, biases, name, gated, always, block.out_bias, around)

    def one(x: Tensor, state: State | None) -> Out | None:
        if type(state) not in STATELESS or not step.takes(x, width):
            return None
        return Out(run(x), state, {})

    return one


def _shared(dense: Any, block: MoE) -> tuple[Any, ...] | None:
    """The weights of the experts that all tokens visit, () where there are none, None where a kernel cannot have
    them."""
    if dense is None:
        return ()
    gate = block.shared_gate
    if type(dense).activate not in (GatedUnit.activate, MLP.activate) or not plain(dense.up, dense.down):
        return None
    if dense._forward_hooks or dense._forward_pre_hooks or (gate is not None and not plain(gate)):
        return None
    up, down = dense.up, dense.down
    return up.weight, up.bias, down.weight, down.bias, None if gate is None else gate.weight
