"""Fewer key and value heads: multi-head attention becomes grouped-query or multi-query (GQA, 2305.13245)."""

from typing import Any

import torch
from torch import Tensor

from zoo.attention.gqa import GQA
from zoo.block import Block
from zoo.config import BlockSpec
from zoo.convert.surgery import exchange, refuse_nothing_done
from zoo.layers.checks import integer
from zoo.model import LanguageModel


def share_kv(model: LanguageModel, kv_heads: int = 1) -> LanguageModel:
    """A new model whose `gqa` blocks have `kv_heads` key and value heads, each the mean of those it stands for
    (Ainslie et al., section 2.1). 1 makes multi-query attention.

    The paper then trains on for a few percent of the original steps; without that the model is worse. `model` stays as
    it is. Raises ValueError where kv_heads does not divide a block's (by its place), and for a model without any `gqa`
    block of more key and value heads.
    """
    integer("kv_heads", kv_heads)
    found = 0

    def change(spec: BlockSpec, block: Block) -> tuple[str, dict[str, Any], dict[str, Tensor]] | None:
        nonlocal found
        if not isinstance(block, GQA) or block.kv_heads == kv_heads:
            return None
        if block.kv_heads % kv_heads:
            fitting = [each for each in range(1, block.kv_heads + 1) if block.kv_heads % each == 0]
            raise ValueError(
                f"{spec.where}: kv_heads={kv_heads} must divide the {block.kv_heads} key and value heads that there "
                f"are; choose from {', '.join(map(str, fitting))}"
            )
        found += 1
        tensors = dict(block.state_dict())
        for name in ("qkv.weight", "qkv.bias"):
            if name in tensors:
                tensors[name] = _pooled(tensors[name], block, kv_heads)
        return spec.kind, spec.options | {"kv_heads": kv_heads}, tensors

    made = exchange(model, change)
    refuse_nothing_done(found, f"block of kind gqa with more than {kv_heads} key and value heads", model)
    return made


def _pooled(stacked: Tensor, block: GQA, kv_heads: int) -> Tensor:
    """Rows of queries, keys and values (and a gate's), keys and values as means over neighbouring heads, in float32 at
    least."""
    q, k, v, *gate = stacked.split([heads * block.head_dim for heads in block.parts])
    exact = torch.promote_types(stacked.dtype, torch.float32)
    pooled = [
        part.to(exact).unflatten(0, (kv_heads, -1, block.head_dim)).mean(1).flatten(0, 1).to(stacked.dtype)
        for part in (k, v)
    ]
    return torch.cat([q, *pooled, *gate])
