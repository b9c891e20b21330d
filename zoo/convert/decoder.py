"""What the formats of decoders share: pairs of attention and a gated unit or a mixture of them, named as in Llama."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from zoo.attention.gqa import GQA, ROTARY
from zoo.config import BlockSpec, ModelConfig
from zoo.convert.family import Entry, same, stacked
from zoo.convert.rope import from_position, to_position
from zoo.layers.ffn import GatedUnit
from zoo.layers.norm import RMSNorm
from zoo.model import LanguageModel
from zoo.moe.moe import MoE
from zoo.registry import block

# hidden_act: the gated unit that uses it.
UNITS: dict[str, dict[str, Any]] = {
    "silu": {"kind": "swiglu"},
    "gelu": {"kind": "geglu"},
    "gelu_pytorch_tanh": {"kind": "geglu", "approximate": "tanh"},
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DERIVED = ("model.layers.*.self_attn.rotary_emb.inv_freq",)  # stored by transformers before 4.32


def attention(config: Any, partial: bool = False, **options: Any) -> dict[str, Any]:
    """The gqa block of a configuration. Raises ValueError for what has no counterpart. `partial`: see `to_position`."""
    refuse_dropout(config)
    return {
        "kind": "gqa",
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "position": to_position(config.rope_parameters or {}, partial),
        **options,
    }


def refuse_dropout(config: Any) -> None:
    """Raise ValueError for dropout of attention weights."""
    if dropout := getattr(config, "attention_dropout", 0):
        raise ValueError(f"attention_dropout={dropout} has no counterpart; set it to 0 (logits do not depend on it)")


def gated_unit(config: Any, bias: bool = False) -> dict[str, Any]:
    """The feed-forward block of a configuration. Raises ValueError for an activation that none has."""
    unit = UNITS.get("silu" if config.hidden_act == "swish" else config.hidden_act)
    if unit is None:
        raise ValueError(f"hidden_act={config.hidden_act!r} cannot be converted; {', '.join(UNITS)} can")
    return unit | {"hidden": config.intermediate_size, "bias": bias}


def decoder(config: PreTrainedConfig, stack: Sequence[Any], **more: Any) -> ModelConfig:
    """The model of this stack with a configuration's other sizes."""
    said: Any = config
    return ModelConfig(
        vocab_size=said.vocab_size,
        width=said.hidden_size,
        stack=stack,
        norm_eps=said.rms_norm_eps,
        tied_embeddings=said.tie_word_embeddings,
        init_std=said.initializer_range,
        **more,
    )


def layers(
    config: ModelConfig, feeds: Sequence[str] = ("swiglu", "geglu"), mixers: Sequence[str] = ("gqa",)
) -> list[tuple[BlockSpec, BlockSpec]]:
    """A stack's pairs of mixer and feed-forward block. Raises ValueError that names the block that does not fit."""
    specs, mix, feed = config.blocks(), " or ".join(mixers), " or ".join(feeds)
    for index, spec in enumerate(specs):
        if spec.kind not in (mixers if index % 2 == 0 else feeds):
            raise ValueError(f"{spec.where} is of kind {spec.kind}; its blocks are {mix}, then {feed}, in turn")
    if len(specs) % 2:
        raise ValueError(f"the stack has {len(specs)} blocks; its blocks are pairs of {mix} and {feed}")
    return list(zip(specs[::2], specs[1::2], strict=True))


def on_meta(spec: BlockSpec, width: int) -> Any:
    """The block of a spec, without memory."""
    with torch.device("meta"):
        return block(spec.kind, width, **spec.options)


def eps(config: ModelConfig) -> float:
    """What is added under the root of a model's RMSNorms."""
    return RMSNorm(config.width).eps if config.norm_eps is None else config.norm_eps


def fields(config: ModelConfig, pairs: Sequence[tuple[BlockSpec, BlockSpec]]) -> tuple[dict[str, Any], GQA]:
    """The fields that every such configuration has, and the first attention block, on which they are read."""
    first = on_meta(pairs[0][0], config.width)
    common = outer_fields(config, len(pairs)) | {
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads,
        "rope_parameters": from_position(pairs[0][0].options.get("position", ROTARY)),
        "attention_dropout": 0.0,
    }
    return common, first


def outer_fields(config: ModelConfig, layers: int) -> dict[str, Any]:
    """The fields that say nothing of attention."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": layers,
        "rms_norm_eps": eps(config),
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
    }


def unit_fields(spec: BlockSpec, width: int) -> dict[str, Any]:
    """The fields of a gated unit: its size and activation."""
    feed = on_meta(spec, width)
    assert isinstance(feed, GatedUnit)
    return {"intermediate_size": feed.hidden, "hidden_act": _activation(spec.kind, spec.options)}


def _activation(kind: str, options: Mapping[str, Any]) -> str:
    unit = {"kind": kind} | {n: v for n, v in options.items() if n == "approximate" and v != "none"}
    found = next((name for name, each in UNITS.items() if each == unit), None)
    if found is None:
        raise ValueError(f"experts of kind {kind!r} have no name there; swiglu and geglu have")
    return found


def windows(pairs: Sequence[tuple[BlockSpec, BlockSpec]]) -> dict[str, Any]:
    """Fields that say which layers have a window; one size for all that have (Qwen)."""
    sizes = [attends.options.get("window") for attends, _ in pairs]
    window = next((size for size in sizes if size is not None), None)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": next((i for i, size in enumerate(sizes) if size is not None), len(sizes)),
        "layer_types": ["full_attention" if size is None else "sliding_attention" for size in sizes],
    }


def by_layer(config: Any, **options: Any) -> list[dict[str, Any]]:
    """The stack of a configuration whose `layer_types` say which layers have its window."""
    feed, stack = gated_unit(config), []
    for kind in config.layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer_types: {kind!r} cannot be converted; full_attention and sliding_attention can")
        stack += [attention(config, window=config.sliding_window if kind == "sliding_attention" else None, **options)]
        stack += [feed]
    return stack


class Mixture(NamedTuple):
    """How a format names a mixture of experts within a layer."""

    inside: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_expert"


def mixture(config: Any, hidden: int, renormalise: bool) -> dict[str, Any]:
    """The moe block of a configuration. Losses are weighed by its coefficient, in each layer by itself."""
    unit = gated_unit(config)
    return {
        "kind": "moe",
        "experts": config.num_experts,
        "top_k": config.num_experts_per_tok,
        "hidden": hidden,
        "router": {"kind": "top_k", "renormalise": renormalise},
        "expert": {name: value for name, value in unit.items() if name in ("kind", "approximate")},
        "load_balance": config.router_aux_loss_coef,
    }


def mixture_fields(spec: BlockSpec, width: int) -> tuple[dict[str, Any], MoE]:
    """The fields of a mixture that its formats share, and the block."""
    made: MoE = on_meta(spec, width)
    expert = spec.options.get("expert", "swiglu")
    expert = dict(expert) if isinstance(expert, Mapping) else {"kind": expert}
    found = {
        "hidden_act": _activation(expert.pop("kind"), expert),
        "num_experts": made.router.experts,
        "num_experts_per_tok": made.router.top_k,
        "router_aux_loss_coef": made.load_balance,
    }
    return found, made


def mixture_names(
    ours: str,
    theirs: str,
    layer: MoE,
    called: Mixture = Mixture(),  # noqa: B008 (frozen)
) -> list[Entry]:
    """A router, its experts (ours stack them all, input by output; theirs are matrices of one expert each, output by
    input) and the shared ones."""
    count = layer.router.experts
    pairs = [f"{theirs}.experts.{index}.{part}.weight" for index in range(count) for part in (called.gate, called.up)]
    downs = [f"{theirs}.experts.{index}.{called.down}.weight" for index in range(count)]

    def join_up(parts: Sequence[Tensor]) -> Tensor:
        both = zip(parts[::2], parts[1::2], strict=True)
        return torch.stack([torch.cat([gate.mT, up.mT], 1) for gate, up in both])

    def split_up(whole: Tensor) -> list[Tensor]:
        return [half.mT for expert in whole.unbind(0) for half in expert.chunk(2, 1)]

    found = [
        same(f"{ours}.router.weight", f"{theirs}.gate.weight"),
        Entry(f"{ours}.experts.up", tuple(pairs), join_up, split_up),
        Entry(
            f"{ours}.experts.down",
            tuple(downs),
            lambda parts: torch.stack([part.mT for part in parts]),
            lambda whole: [each.mT for each in whole.unbind(0)],
        ),
    ]
    if layer.shared is not None:
        found += unit_names(f"{ours}.shared", f"{theirs}.{called.shared}", layer.shared)
    if layer.shared_gate is not None:
        found.append(same(f"{ours}.shared_gate.weight", f"{theirs}.{called.shared}_gate.weight"))
    return found


def projections(
    ours: str, theirs: str, layer: Any, maps: Sequence[tuple[str, Sequence[str], Sequence[int]]]
) -> list[Entry]:
    """Weights and, where there are, biases of projections that hold theirs below one another: for each ours, theirs and
    the rows of each."""
    found = []
    for mine, parts, rows in maps:
        for kind in ("weight",) if getattr(layer, mine).bias is None else ("weight", "bias"):
            found.append(stacked(f"{ours}.{mine}.{kind}", [f"{theirs}.{part}.{kind}" for part in parts], rows))
    return found


def attention_names(
    ours: str, theirs: str, layer: GQA, out: str = "o_proj", norms: Sequence[str] = ("q_norm", "k_norm")
) -> list[Entry]:
    """An attention block whose projections of queries, keys and values are three."""
    rows = [heads * layer.head_dim for heads in layer.parts]
    maps = [("qkv", ("q_proj", "k_proj", "v_proj"), rows), ("out", (out,), [layer.width])]
    found = projections(ours, theirs, layer, maps)
    if layer.q_norm is not None:
        pairs = zip(("q_norm", "k_norm"), norms, strict=True)
        found += [same(f"{ours}.{mine}.weight", f"{theirs}.{each}.weight") for mine, each in pairs]
    return found


def unit_names(
    ours: str, theirs: str, layer: Any, called: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
) -> list[Entry]:
    """A gated unit."""
    assert isinstance(layer, GatedUnit)
    maps = [("up", called[:2], [layer.hidden] * 2), ("down", called[2:], [layer.width])]
    return projections(ours, theirs, layer, maps)


def outer_names(model: LanguageModel, norm: str = "model.norm.weight") -> list[Entry]:
    """Embedding, last norm and an untied head."""
    found = [same("embedding.weight", EMBEDDING), same("norm.weight", norm)]
    return found if model.config.tied_embeddings else [*found, same("head.weight", HEAD)]


def names(model: LanguageModel, called: Mixture = Mixture()) -> list[Entry]:  # noqa: B008 (frozen)
    """The table of names."""
    found = outer_names(model)
    for index, residual in enumerate(model.residuals):
        ours, theirs = f"blocks.{index}", f"model.layers.{index // 2}"
        layer, norm = residual.block, "post_attention_layernorm"
        if isinstance(layer, GQA):
            norm = "input_layernorm"
            found += attention_names(f"{ours}.block", f"{theirs}.self_attn", layer)
        elif isinstance(layer, MoE):
            found += mixture_names(f"{ours}.block", f"{theirs}.{called.inside}", layer, called)
        else:
            found += unit_names(f"{ours}.block", f"{theirs}.mlp", layer)
        found.append(same(f"{ours}.norm.weight", f"{theirs}.{norm}.weight"))
    return found
