"""What the operations on models share: a copy with some blocks exchanged, and dense layers as experts' matrices."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.block import Block
from zoo.config import BlockSpec, ModelConfig
from zoo.layers.ffn import FeedForward
from zoo.model import LanguageModel
from zoo.registry import block
from zoo.registry import options as options_of

# Given a block's place in the stack and the block: its new kind, options and tensors, or None to leave it as it is.
Change = Callable[[BlockSpec, Block], "tuple[str, dict[str, Any], dict[str, Tensor]] | None"]


def exchange(model: LanguageModel, change: Change) -> LanguageModel:
    """A copy of `model`, which stays as it is, with blocks exchanged as `change` says; its config says so too.

    New blocks have the dtype and device of those they replace. Shares no tensor with `model`.
    """
    specs = model.config.blocks()
    with torch.no_grad():
        changed = [change(spec, each.block) for spec, each in zip(specs, model.residuals, strict=True)]
    # Blocks that go are not copied: a large model would be held twice.
    gone = {id(each.block): None for each, new in zip(model.residuals, changed, strict=True) if new is not None}
    made = copy.deepcopy(model, gone)
    stack: list[dict[str, Any]] = []
    for spec, new, old, residual in zip(specs, changed, model.residuals, made.residuals, strict=True):
        if new is None:
            stack.append({"kind": spec.kind} | spec.options)
            continue
        kind, chosen, tensors = new
        stack.append({"kind": kind} | chosen)
        like = next(old.block.parameters())
        residual.block = block(kind, model.config.width, **chosen).to(like.device, like.dtype)
        residual.block.load_state_dict({name: tensor.detach() for name, tensor in tensors.items()})
        residual.block.train(old.block.training)
    made.config = ModelConfig.from_dict(model.config.to_dict() | {"stack": stack})
    return made


class Dense(NamedTuple):
    """A dense feed-forward layer as one expert: `expert` is the kind of experts that compute the same, with biases
    where the layer has any."""

    expert: dict[str, Any]
    up: Float[Tensor, "width inner"]
    down: Float[Tensor, "hidden width"]
    up_bias: Float[Tensor, " inner"] | None
    down_bias: Float[Tensor, " width"] | None
    hidden: int


def dense(spec: BlockSpec, layer: Block) -> Dense | None:
    """A block's matrices if it is a dense feed-forward layer, else None."""
    if not isinstance(layer, FeedForward):
        return None
    expert: dict[str, Any] = {"kind": spec.kind}
    for name in ("activation", "approximate", "bias"):
        known = options_of(spec.kind)
        if name in known:
            expert[name] = spec.options.get(name, known[name].default)
    hidden = layer.down.in_features
    return Dense(expert, layer.up.weight.mT, layer.down.weight.mT, layer.up.bias, layer.down.bias, hidden)


def refuse_nothing_done(found: int, what: str, model: LanguageModel) -> None:
    """Raise ValueError where a model holds no block that an operation is about."""
    if not found:
        kinds: Iterable[str] = dict.fromkeys(spec.kind for spec in model.config.blocks())
        raise ValueError(f"the model has no {what}; its blocks are {', '.join(kinds)}")
