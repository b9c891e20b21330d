"""Llama 2 and 3 and what is published in their format (2302.13971, 2407.21783): `LlamaForCausalLM`."""

from typing import Any

import torch
from transformers import LlamaConfig

from zoo.attention.gqa import GQA, ROTARY
from zoo.config import ModelConfig
from zoo.convert.family import Entry, Family, same, stacked
from zoo.convert.rope import from_position, to_position
from zoo.layers.ffn import GatedUnit
from zoo.layers.norm import RMSNorm
from zoo.model import LanguageModel
from zoo.registry import block

# hidden_act: the gated unit that uses it.
UNITS: dict[str, dict[str, Any]] = {
    "silu": {"kind": "swiglu"},
    "gelu": {"kind": "geglu"},
    "gelu_pytorch_tanh": {"kind": "geglu", "approximate": "tanh"},
}


def read(config: LlamaConfig) -> ModelConfig:
    """The model that a Llama configuration describes."""
    if config.attention_dropout:
        raise ValueError(
            f"attention_dropout={config.attention_dropout} has no counterpart; set it to 0 (logits do not depend on it)"
        )
    unit = UNITS.get("silu" if config.hidden_act == "swish" else config.hidden_act)
    if unit is None:
        raise ValueError(f"hidden_act={config.hidden_act!r} cannot be converted; {', '.join(UNITS)} can")
    attention = {
        "kind": "gqa",
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "position": to_position(config.rope_parameters or {}),
        "bias": config.attention_bias,
        "out_bias": config.attention_bias,
    }
    feed = unit | {"hidden": config.intermediate_size, "bias": config.mlp_bias}
    return ModelConfig(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        stack=[{"repeat": config.num_hidden_layers, "blocks": [attention, feed]}],
        norm_eps=config.rms_norm_eps,
        tied_embeddings=config.tie_word_embeddings,
        init_std=config.initializer_range,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a Llama configuration: what the first two blocks say, for all."""
    specs = config.blocks()
    for index, spec in enumerate(specs):
        if spec.kind not in (("gqa",) if index % 2 == 0 else ("swiglu", "geglu")):
            raise ValueError(f"{spec.where} is of kind {spec.kind}; its blocks are gqa, then swiglu or geglu, in turn")
    if len(specs) % 2:
        raise ValueError(f"the stack has {len(specs)} blocks; its blocks are pairs of gqa and swiglu or geglu")
    with torch.device("meta"):
        attention, feed = (block(spec.kind, config.width, **spec.options) for spec in specs[:2])
    assert isinstance(attention, GQA) and isinstance(feed, GatedUnit)
    unit = {"kind": specs[1].kind}
    if specs[1].options.get("approximate", "none") != "none":
        unit["approximate"] = specs[1].options["approximate"]
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": feed.hidden,
        "num_hidden_layers": len(specs) // 2,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": next(name for name, each in UNITS.items() if each == unit),
        "rms_norm_eps": RMSNorm(config.width).eps if config.norm_eps is None else config.norm_eps,
        "rope_parameters": from_position(specs[0].options.get("position", ROTARY)),
        "attention_bias": attention.qkv.bias is not None,
        "attention_dropout": 0.0,
        "mlp_bias": feed.up.bias is not None,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
    }


def names(model: LanguageModel) -> list[Entry]:
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


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FAMILY = Family(
    config_class=LlamaConfig,
    architecture="LlamaForCausalLM",
    read=read,
    write=write,
    names=names,
    embedding=EMBEDDING,
    head=HEAD,
    derived=("model.layers.*.self_attn.rotary_emb.inv_freq",),  # stored by transformers before 4.32
)
