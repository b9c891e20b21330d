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


def attention(config: Any, **options: Any) -> dict[str, Any]:
    """The gqa block of a configuration. Raises ValueError for what has no counterpart."""
    if config.attention_dropout:
        raise ValueError(
            f"attention_dropout={config.attention_dropout} has no counterpart; set it to 0 (logits do not depend on it)"
        )
    return {
        "kind": "gqa",
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "position": to_position(config.rope_parameters or {}),
        **options,
    }


def gated_unit(config: Any, bias: bool = False) -> dict[str, Any]:
    """The feed-forward block of a configuration. Raises ValueError for an activation that none has."""
    unit = UNITS.get("silu" if config.hidden_act == "swish" else config.hidden_act)
    if unit is None:
        raise ValueError(f"hidden_act={config.hidden_act!r} cannot be converted; {', '.join(UNITS)} can")
    return unit | {"hidden": config.intermediate_size, "bias": bias}


def decoder(config: PreTrainedConfig, stack: Sequence[Any]) -> ModelConfig:
    """The model of this stack with a configuration's other sizes."""
    said: Any = config
    return ModelConfig(
        vocab_size=said.vocab_size,
        width=said.hidden_size,
        stack=stack,
        norm_eps=said.rms_norm_eps,
        tied_embeddings=said.tie_word_embeddings,
        init_std=said.initializer_range,
    )


def layers(config: ModelConfig, feeds: Sequence[str] = ("swiglu", "geglu")) -> list[tuple[BlockSpec, BlockSpec]]:
    """A stack's pairs of attention and feed-forward block. Raises ValueError that names the block that does not fit."""
    specs, known = config.blocks(), " or ".join(feeds)
    for index, spec in enumerate(specs):
        if spec.kind not in (("gqa",) if index % 2 == 0 else feeds):
            raise ValueError(f"{spec.where} is of kind {spec.kind}; its blocks are gqa, then {known}, in turn")
    if len(specs) % 2:
        raise ValueError(f"the stack has {len(specs)} blocks; its blocks are pairs of gqa and {known}")
    return list(zip(specs[::2], specs[1::2], strict=True))


def on_meta(spec: BlockSpec, width: int) -> Any:
    """The block of a spec, without memory."""
    with torch.device("meta"):
        return block(spec.kind, width, **spec.options)


def fields(config: ModelConfig, pairs: Sequence[tuple[BlockSpec, BlockSpec]]) -> tuple[dict[str, Any], GQA]:
    """The fields that every such configuration has, and the first attention block, on which they are read."""
    first = on_meta(pairs[0][0], config.width)
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(pairs),
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads,
        "rms_norm_eps": RMSNorm(config.width).eps if config.norm_eps is None else config.norm_eps,
        "rope_parameters": from_position(pairs[0][0].options.get("position", ROTARY)),
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
    }
    return common, first


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


def _experts(ours: str, theirs: str, layer: MoE, called: Mixture) -> list[Entry]:
    """Ours stack all experts, input by output; theirs are matrices of one expert each, output by input."""
    count = layer.router.experts
    pairs = [f"{theirs}.{index}.{part}.weight" for index in range(count) for part in (called.gate, called.up)]
    downs = [f"{theirs}.{index}.{called.down}.weight" for index in range(count)]

    def join_up(parts: Sequence[Tensor]) -> Tensor:
        both = zip(parts[::2], parts[1::2], strict=True)
        return torch.stack([torch.cat([gate.mT, up.mT], 1) for gate, up in both])

    def split_up(whole: Tensor) -> list[Tensor]:
        return [half.mT for expert in whole.unbind(0) for half in expert.chunk(2, 1)]

    return [
        Entry(f"{ours}.up", tuple(pairs), join_up, split_up),
        Entry(
            f"{ours}.down",
            tuple(downs),
            lambda parts: torch.stack([part.mT for part in parts]),
            lambda whole: [each.mT for each in whole.unbind(0)],
        ),
    ]


def names(model: LanguageModel, called: Mixture = Mixture()) -> list[Entry]:  # noqa: B008 (frozen)
    """The table of names."""
    found = [same("embedding.weight", EMBEDDING), same("norm.weight", "model.norm.weight")]
    if not model.config.tied_embeddings:
        found.append(same("head.weight", HEAD))
    for index, residual in enumerate(model.residuals):
        ours, theirs = f"blocks.{index}", f"model.layers.{index // 2}"
        layer = residual.block
        if isinstance(layer, GQA):
            norm, inner = "input_layernorm", "self_attn"
            rows = [heads * layer.head_dim for heads in (layer.heads, layer.kv_heads, layer.kv_heads)]
            maps = [("qkv", ("q_proj", "k_proj", "v_proj"), rows), ("out", ("o_proj",), [model.config.width])]
            if layer.q_norm is not None:
                found += [
                    same(f"{ours}.block.{each}.weight", f"{theirs}.self_attn.{each}.weight")
                    for each in ("q_norm", "k_norm")
                ]
        elif isinstance(layer, MoE):
            norm, inner, maps = "post_attention_layernorm", called.inside, []
            found.append(same(f"{ours}.block.router.weight", f"{theirs}.{inner}.gate.weight"))
            found += _experts(f"{ours}.block.experts", f"{theirs}.{inner}.experts", layer, called)
        else:
            assert isinstance(layer, GatedUnit)
            norm, inner = "post_attention_layernorm", "mlp"
            maps = [
                ("up", ("gate_proj", "up_proj"), [layer.hidden] * 2),
                ("down", ("down_proj",), [model.config.width]),
            ]
        found.append(same(f"{ours}.norm.weight", f"{theirs}.{norm}.weight"))
        for mine, parts, rows in maps:
            kinds = ("weight",) if getattr(layer, mine).bias is None else ("weight", "bias")
            for kind in kinds:
                found.append(
                    stacked(f"{ours}.block.{mine}.{kind}", [f"{theirs}.{inner}.{part}.{kind}" for part in parts], rows)
                )
    return found
