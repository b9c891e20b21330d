"""What the operations on models share: a copy with some blocks exchanged, and dense layers as experts' matrices."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.block import Block
from zoo.config import BlockSpec, ModelConfig
from zoo.layers.ffn import FeedForward
from zoo.layers.parallel import Parallel, single
from zoo.model import LanguageModel
from zoo.registry import block
from zoo.registry import options as options_of

# Given a block's place in the stack and the block: its new kind, options and tensors, or None to leave it as it is.
Change = Callable[[BlockSpec, Block], "tuple[str, dict[str, Any], dict[str, Tensor]] | None"]


def exchange(model: LanguageModel, change: Change) -> LanguageModel:
    """A copy of `model`, which stays as it is, with blocks exchanged as `change` says; its config says so too.
    Of blocks side by side (kind parallel) `change` gets each.

    New blocks have the dtype and device of those they replace. Shares no tensor with `model`.
    """
    specs = model.config.blocks()
    with torch.no_grad():
        changed = [_change_inside(change, spec, each.block) for spec, each in zip(specs, model.residuals, strict=True)]
    # Blocks that go are not copied: a large model would be held twice.
    gone = {id(each.block): None for each, new in zip(model.residuals, changed, strict=True) if new is not None}
    made = copy.deepcopy(model, gone)
    stack: list[dict[str, Any]] = []
    for spec, new, old, residual in zip(specs, changed, model.residuals, made.residuals, strict=True):
        if new is None:
            stack.append(_entry(spec, spec.kind, spec.options))
            continue
        kind, chosen, tensors = new
        stack.append(_entry(spec, kind, chosen))
        like = next(old.block.parameters())
        residual.block = block(kind, model.config.width, **chosen).to(like.device, like.dtype)
        residual.block.load_state_dict({name: tensor.detach() for name, tensor in tensors.items()})
        residual.block.train(old.block.training)
    made.config = ModelConfig.from_dict(model.config.to_dict() | {"stack": stack})
    return made


def _entry(spec: BlockSpec, kind: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """A stack's entry for a block at the place of `spec`."""
    told = (spec.skip, spec.scale) != (1.0, 1.0)
    return {"kind": kind} | chosen | ({"residual": {"skip": spec.skip, "scale": spec.scale}} if told else {})


def _change_inside(
    change: Change, spec: BlockSpec, layer: Block
) -> tuple[str, dict[str, Any], dict[str, Tensor]] | None:
    """`change` for a block; for blocks side by side one whose parts are changed, if any is."""
    if not isinstance(layer, Parallel):
        return change(spec, layer)
    specs = [BlockSpec(*each, f"{spec.where}.blocks[{index}]") for index, each in enumerate(layer.specs)]
    changed = [_change_inside(change, *each) for each in zip(specs, layer.parts, strict=True)]
    if all(new is None for new in changed):
        return None
    entries = []
    tensors = {name: tensor for name, tensor in layer.state_dict().items() if not name.startswith("blocks.")}
    for index, (inner, part, new) in enumerate(zip(specs, layer.parts, changed, strict=True)):
        kind, chosen, held = (inner.kind, inner.options, part.state_dict()) if new is None else new
        entries.append({"kind": kind} | chosen)
        tensors |= {f"blocks.{index}.{name}": tensor for name, tensor in held.items()}
    return spec.kind, spec.options | {"blocks": entries}, tensors


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
        pairs = zip(model.config.blocks(), model.residuals, strict=True)
        kinds = dict.fromkeys(kind for spec, each in pairs for kind, _ in single(spec.kind, each.block))
        raise ValueError(f"the model has no {what}; its blocks are {', '.join(kinds)}")
