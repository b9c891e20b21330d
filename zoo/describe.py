"""What a block or a model costs: parameters by part, FLOPs and state bytes per token at several contexts."""

import inspect
from typing import Any

import torch
from torch import nn

from zoo.block import Block
from zoo.config import ModelConfig
from zoo.layers.parallel import single
from zoo.model import LanguageModel
from zoo.registry import block, block_class, options

CONTEXTS = (1, 1024, 8192, 65536)
# What a docstring says under "Cost"; "state bytes" is a Python expression of the block's attributes and T, D, b.
COSTS = ("train time", "train memory", "prefill", "decode", "state bytes")


def describe_block(kind: str, width: int, chosen: dict[str, Any] | None = None) -> dict[str, Any]:
    """Facts of one block of `kind` at this width: options, parameters by part, FLOPs and state bytes."""
    with torch.device("meta"):
        built = block(kind, width, **(chosen or {}))
    return {
        "kind": kind,
        "class": f"{block_class(kind).__module__}.{block_class(kind).__name__}",
        "about": (block_class(kind).__doc__ or "").strip().split("\n\n")[0],
        "width": width,
        "causal": built.causal,
        "options": {name: parameter.default for name, parameter in options(kind).items()} | (chosen or {}),
        "parameters": parameters_by_part(built),
        "cost": cost_table(kind),
        "contexts": [costs(built, context) for context in CONTEXTS],
    }


def cost_table(kind: str) -> dict[str, str]:
    """The cost section of a kind's docstring: how train time and memory, prefill, decode and state grow.

    T is tokens, D the width, b the bytes of one number; other names are attributes of the block. Raises ValueError
    where a line is missing.
    """
    lines = inspect.cleandoc(block_class(kind).__doc__ or "").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("Cost (")), len(lines))
    found: dict[str, str] = {}
    name = ""
    for line in lines[start + 1 :]:
        if not line.startswith("    "):
            break
        head, colon, rest = line.strip().partition(": ")
        if colon and head in COSTS:
            name, found[head] = head, rest
        elif name:
            found[name] += " " + line.strip()
    missing = [each for each in COSTS if each not in found]
    if missing:
        raise ValueError(f"the docstring of {block_class(kind).__name__} has no cost line for {', '.join(missing)}")
    return found


def describe_model(config: ModelConfig) -> dict[str, Any]:
    """Facts of a model: parameters by kind of block, FLOPs and state bytes per token. Builds nothing in memory."""
    with torch.device("meta"):
        model = LanguageModel(config)
    parts: dict[str, int] = {"embedding": model.embedding.weight.numel()}
    for spec, residual in zip(config.blocks(), model.residuals, strict=True):
        for kind, each in single(spec.kind, residual.block):
            parts[kind] = parts.get(kind, 0) + count(each)
    if not config.tied_embeddings:
        parts["head"] = model.head.weight.numel()
    parts["norms"] = count(model) - sum(parts.values())
    head = 2 * model.head.weight.numel()
    contexts = []
    for context in CONTEXTS:
        each = [costs(residual.block, context) for residual in model.residuals]
        total = {name: sum(cost[name] for cost in each) for name in ("flops", "state_bytes")}
        contexts.append({"context": context, "flops": total["flops"] + head, "state_bytes": total["state_bytes"]})
    return {"parameters": parts, "total": count(model), "active": active(model), "contexts": contexts}


def count(module: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def active(model: nn.Module) -> int:
    """Parameters that one token uses: of a mixture, only the chosen experts'."""
    total = count(model)
    for module in model.modules():
        used = getattr(module, "active_parameters", None)
        if isinstance(module, Block) and used is not None:
            total += used() - count(module)
    return total


def parameters_by_part(module: nn.Module) -> dict[str, int]:
    """Parameters of each direct part, shared ones once; the sum is the whole."""
    parts = {name: count(child) for name, child in module.named_children() if count(child)}
    own = {name: parameter.numel() for name, parameter in module.named_parameters(recurse=False)}
    return own | parts


def costs(built: Block, context: int) -> dict[str, int]:
    """Forward FLOPs of one more token after `context` tokens, and a row's bytes of state (float32 activations)."""
    state = built.state_bytes(context) if built.causal else 0
    return {"context": context, "flops": built.flops_per_token(context), "state_bytes": state}
