"""GPT-BigCode (2301.03988, 2305.06161): `GPTBigCodeForCausalLM`, StarCoder's GPT-2 with multi-query attention."""

import warnings
from typing import Any

from transformers import GPTBigCodeConfig

from zoo.config import ModelConfig
from zoo.convert import fused
from zoo.convert.decoder import on_meta
from zoo.convert.family import Entry, Family, same
from zoo.model import LanguageModel


def read(config: GPTBigCodeConfig) -> ModelConfig:
    """The model that a GPT-BigCode configuration describes.

    `resid_pdrop` is the model's dropout. `attention_softmax_in_fp32` and `scale_attention_softmax_in_fp32` change
    nothing in transformers either, whose softmax is in float32 always. Dropout that has no counterpart is warned of
    rather than refused, since every published model names some.
    """
    if config.add_cross_attention:
        raise ValueError(
            "add_cross_attention=True cannot be converted: there is no encoder to attend to; set it to false"
        )
    dropped = {name: getattr(config, name) for name in ("embd_pdrop", "attn_pdrop") if getattr(config, name)}
    if dropped:
        said = " and ".join(f"{name}={value}" for name, value in dropped.items())
        warnings.warn(f"{said} have no counterpart, so training drops nothing there; logits are alike", stacklevel=2)
    attends = {
        "kind": "gqa",
        "heads": config.n_head,
        "kv_heads": 1 if config.multi_query else config.n_head,
        "position": None,
        "bias": True,
        "out_bias": True,
        "scale": None if config.scale_attn_weights else 1.0,
    }
    feeds = fused.mlp("activation_function", config.activation_function, config.n_inner, bias=True)
    places = {"kind": "learned_position", "context": config.n_positions}
    stack = [places, {"repeat": config.n_layer, "blocks": [attends, feeds]}]
    return fused.model(config, stack, dropout=config.resid_pdrop)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a GPT-BigCode configuration: what the first layer says, for all."""
    places, *rest = config.blocks()
    if places.kind != "learned_position":
        raise ValueError(f"{places.where} is of kind {places.kind}; the first block is learned_position")
    attends, feeds = fused.layer(rest[:2], config.width)
    return fused.fields(config) | {
        "n_embd": config.width,
        "n_positions": on_meta(places, config.width).context,
        "n_layer": len(rest) // 2,
        "n_head": attends.heads,
        "n_inner": feeds.hidden,
        "multi_query": attends.kv_heads == 1,
        "num_key_value_heads": attends.kv_heads,
        "scale_attn_weights": attends.scale is None,
        "activation_function": fused.activation(rest[1]),
        "resid_pdrop": config.dropout,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "add_cross_attention": False,
    }


def names(model: LanguageModel) -> list[Entry]:
    """The table of names."""
    found = [
        same("embedding.weight", FAMILY.embedding),
        same("blocks.0.block.table.weight", "transformer.wpe.weight"),
        *fused.affine("norm", "transformer.ln_f"),
    ]
    if not model.config.tied_embeddings:
        found.append(same("head.weight", FAMILY.head))
    for index, residual in enumerate(model.residuals[1:]):
        ours, theirs = f"blocks.{index + 1}", f"transformer.h.{index // 2}"
        layer: Any = residual.block
        if index % 2 == 0:
            found += fused.affine(f"{ours}.norm", f"{theirs}.ln_1")
            found += fused.qkv(f"{ours}.block.qkv", f"{theirs}.attn.c_attn", layer)
            found += fused.affine(f"{ours}.block.out", f"{theirs}.attn.c_proj")
        else:
            found += fused.affine(f"{ours}.norm", f"{theirs}.ln_2")
            found += fused.affine(f"{ours}.block.up", f"{theirs}.mlp.c_fc")
            found += fused.affine(f"{ours}.block.down", f"{theirs}.mlp.c_proj")
    return found


FAMILY = Family(
    config_class=GPTBigCodeConfig,
    architecture="GPTBigCodeForCausalLM",
    read=read,
    write=write,
    names=names,
    embedding="transformer.wte.weight",
    head="lm_head.weight",
)
