"""What the formats of GPT-2's descendants share: one fused projection for queries, keys and values, two-layer
feed-forward blocks, LayerNorms with biases."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.attention.gqa import GQA
from zoo.config import BlockSpec, ModelConfig
from zoo.convert.decoder import on_meta
from zoo.convert.family import Entry, same
from zoo.layers.ffn import MLP
from zoo.layers.norm import LayerNorm

# transformers' names of an activation: ours. Several of theirs are one function; the first is the one that we write.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}


def mlp(field: str, activation: str, hidden: int | None, bias: bool) -> dict[str, Any]:
    """The feed-forward block of a configuration whose `field` names its activation. Raises ValueError for one that no
    block has."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{field}={activation!r} cannot be converted; {', '.join(ACTIVATIONS)} can")
    return {"kind": "mlp", "hidden": hidden, "activation": ACTIVATIONS[activation], "bias": bias}


def activation(spec: BlockSpec) -> str:
    """What transformers calls the activation of an mlp block."""
    ours = spec.options.get("activation", "gelu")
    return next(theirs for theirs, each in ACTIVATIONS.items() if each == ours)


def model(config: Any, stack: Sequence[Any], **more: Any) -> ModelConfig:
    """The model of this stack with a configuration's other sizes."""
    return ModelConfig(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        stack=stack,
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        tied_embeddings=config.tie_word_embeddings,
        init_std=config.initializer_range,
        **more,
    )


def fields(config: ModelConfig) -> dict[str, Any]:
    """The fields that `model` reads, but for the width, whose name differs."""
    return {
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": LayerNorm(config.width).eps if config.norm_eps is None else config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
    }


def layer(specs: Sequence[BlockSpec], width: int) -> tuple[GQA, MLP]:
    """The two blocks of a layer, without memory. Raises ValueError that names the one that does not fit."""
    for spec, kind in zip(specs, ("gqa", "mlp"), strict=False):
        if spec.kind != kind:
            raise ValueError(f"{spec.where} is of kind {spec.kind}; the blocks of a layer are gqa, then mlp")
    if len(specs) != 2:
        where = specs[0].where if specs else "the stack"
        raise ValueError(f"the layer at {where} has {len(specs)} blocks; the blocks of a layer are gqa, then mlp")
    attends, feeds = (on_meta(spec, width) for spec in specs)
    return attends, feeds


# Names ----------------------------------------------------------------------------------------------------------


def affine(ours: str, theirs: str, bias: bool = True) -> list[Entry]:
    """The weight and, where there is one, the bias of a norm or a projection."""
    return [same(f"{ours}.{name}", f"{theirs}.{name}") for name in ("weight", "bias")[: 1 + bias]]


def qkv(ours: str, theirs: str, attends: GQA) -> list[Entry]:
    """The fused projection. Theirs holds for each head of keys and values its query heads, the key and the value, one
    after the other (with a single such head: all queries, the key, the value); ours all queries, all keys, all values.
    """
    groups, size = attends.kv_heads, attends.head_dim
    queries = attends.heads // groups

    def join(parts: Sequence[Tensor]) -> Tensor:
        split = parts[0].unflatten(0, (groups, queries + 2, size)).split([queries, 1, 1], 1)
        return torch.cat([each.flatten(0, 2) for each in split])

    def split(whole: Tensor) -> list[Tensor]:
        rows = [heads * size for heads in (attends.heads, groups, groups)]
        each = [part.unflatten(0, (groups, -1, size)) for part in whole.split(rows)]
        return [torch.cat(each, 1).flatten(0, 2)]

    kinds = ("weight", "bias")[: 1 + (attends.qkv.bias is not None)]
    return [Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",), join, split) for kind in kinds]
