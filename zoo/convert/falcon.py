"""Falcon (2311.16867): `FalconForCausalLM`, attention and feed-forward side by side, or in turn in the first models."""

import warnings
from typing import Any

from transformers import FalconConfig

from zoo.config import BlockSpec, ModelConfig
from zoo.convert import fused
from zoo.convert.decoder import on_meta
from zoo.convert.family import Entry, Family, same
from zoo.convert.rope import from_position, to_position
from zoo.layers.parallel import Parallel
from zoo.model import LanguageModel

POST = "apply_residual_connection_post_layernorm"  # in every released configuration, and false


def read(config: FalconConfig) -> ModelConfig:
    """The model that a Falcon configuration describes.

    ALiBi's bias is divided by the root of head_dim along with the logits, and counts the tokens that the mask lets
    through. transformers computes slope · position in bfloat16. For up to 8 heads and 256 tokens that is exact; beyond,
    neighbours come to share a bias, and its logits differ from these (by 0.02 of the largest for 32 heads, 1024 tokens
    and random weights): this is warned of. Its eager implementation adds the bias twice, "sdpa" (its default) once.
    """
    _refuse(config)
    if config.alibi:
        position: dict[str, Any] = {"kind": "alibi", "multiplier": config.head_dim**-0.5}
        warnings.warn(
            "alibi: transformers rounds these biases to bfloat16, here they are exact; so logits differ a little for "
            "more than 8 heads or past 256 tokens",
            stacklevel=2,
        )
    else:
        position = to_position(config.rope_parameters or {})
    grouped = config.new_decoder_architecture or not config.multi_query
    attends = {
        "kind": "gqa",
        "heads": config.num_attention_heads,
        "kv_heads": config.num_kv_heads if grouped else 1,
        "position": position,
        "bias": bool(config.bias),
        "out_bias": bool(config.bias),
    }
    feeds = fused.mlp("activation", str(config.activation), config.ffn_hidden_size, bool(config.bias))
    layer: list[Any] = [attends, feeds]
    if config.new_decoder_architecture or config.parallel_attn:
        own = {"norm": "layer", "norm_eps": config.layer_norm_epsilon} if _norms(config) == 2 else {}
        layer = [{"kind": "parallel", "blocks": layer} | own]
    return fused.model(config, [{"repeat": config.num_hidden_layers, "blocks": layer}])


def _norms(config: Any) -> int | None:
    """LayerNorms before attention and feed-forward block side by side, as transformers counts them."""
    told = config.num_ln_in_parallel_attn
    return 2 if told is None and config.new_decoder_architecture else told


def _refuse(config: Any) -> None:
    """Raise ValueError that names what has no counterpart, or what transformers' own model cannot run."""
    for name in ("hidden_dropout", "attention_dropout"):
        if value := getattr(config, name):
            raise ValueError(f"{name}={value} has no counterpart; set it to 0 (logits do not depend on it)")
    if getattr(config, POST, False):
        raise ValueError(f"{POST}=True cannot be converted: transformers does not read it either; set it to false")
    norms, heads = config.num_ln_in_parallel_attn, config.num_attention_heads
    if config.new_decoder_architecture:
        if not config.parallel_attn:
            raise ValueError(
                "parallel_attn=False is not for new_decoder_architecture=True; set one of the two otherwise"
            )
        if norms not in (None, 1, 2):
            raise ValueError(f"num_ln_in_parallel_attn={norms} cannot be converted; 1 and 2 can")
    else:
        if config.parallel_attn and norms == 2:
            raise ValueError("num_ln_in_parallel_attn=2 is for new_decoder_architecture=True; set it to 1")
        if not config.multi_query and config.num_kv_heads != heads:
            raise ValueError(
                f"num_kv_heads={config.num_kv_heads} is for new_decoder_architecture=True; without it and without "
                f"multi_query there are as many as num_attention_heads={heads}"
            )
    turned = (config.rope_parameters or {}).get("partial_rotary_factor")
    if not config.alibi and turned not in (None, 1):
        raise ValueError(f"rope_parameters: partial_rotary_factor={turned} is not read by Falcon; leave it out")


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a Falcon configuration: what the first layer says, for all."""
    specs = config.blocks()
    side, layer, norms = specs[0].kind == "parallel", specs[:2], None
    if side:
        both: Parallel = on_meta(specs[0], config.width)
        layer = [BlockSpec(*each, f"{specs[0].where}.blocks[{i}]") for i, each in enumerate(both.specs)]
        norms = both.norms
    attends, feeds = fused.layer(layer, config.width)
    position = layer[0].options.get("position", {"kind": "rotary"}) or {}
    alibi = position.get("kind") == "alibi"
    new = norms is not None or (side and attends.kv_heads not in (1, attends.heads))
    return fused.fields(config) | {
        "hidden_size": config.width,
        "num_hidden_layers": len(specs) if side else len(specs) // 2,
        "num_attention_heads": attends.heads,
        "num_kv_heads": attends.kv_heads if new else attends.heads,
        "multi_query": new or attends.kv_heads == 1,
        "new_decoder_architecture": new,
        "parallel_attn": side,
        "num_ln_in_parallel_attn": None if not new else 1 if norms is None else 2,
        "alibi": alibi,
        "rope_parameters": from_position({} if alibi else position),
        "bias": attends.qkv.bias is not None,
        "ffn_hidden_size": feeds.hidden,
        "activation": fused.activation(layer[1]),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def names(model: LanguageModel) -> list[Entry]:
    """The table of names."""
    found = [same("embedding.weight", FAMILY.embedding), *fused.affine("norm", "transformer.ln_f")]
    if not model.config.tied_embeddings:
        found.append(same("head.weight", FAMILY.head))
    for index, residual in enumerate(model.residuals):
        ours, block = f"blocks.{index}", residual.block
        if isinstance(block, Parallel):
            theirs = f"transformer.h.{index}"
            if block.norms is None:
                found += fused.affine(f"{ours}.norm", f"{theirs}.input_layernorm")
            else:
                found += fused.affine(f"{ours}.block.norms.0", f"{theirs}.ln_attn")
                found += fused.affine(f"{ours}.block.norms.1", f"{theirs}.ln_mlp")
            found += _attention(f"{ours}.block.blocks.0", theirs, block.parts[0])
            found += _feed_forward(f"{ours}.block.blocks.1", theirs, block.parts[1])
            continue
        theirs = f"transformer.h.{index // 2}"
        if index % 2 == 0:
            found += fused.affine(f"{ours}.norm", f"{theirs}.input_layernorm")
            found += _attention(f"{ours}.block", theirs, block)
        else:
            found += fused.affine(f"{ours}.norm", f"{theirs}.post_attention_layernorm")
            found += _feed_forward(f"{ours}.block", theirs, block)
    return found


def _attention(ours: str, theirs: str, block: Any) -> list[Entry]:
    found = fused.qkv(f"{ours}.qkv", f"{theirs}.self_attention.query_key_value", block)
    return found + fused.affine(f"{ours}.out", f"{theirs}.self_attention.dense", block.out.bias is not None)


def _feed_forward(ours: str, theirs: str, block: Any) -> list[Entry]:
    bias = block.up.bias is not None
    found = fused.affine(f"{ours}.up", f"{theirs}.mlp.dense_h_to_4h", bias)
    return found + fused.affine(f"{ours}.down", f"{theirs}.mlp.dense_4h_to_h", bias)


FAMILY = Family(
    config_class=FalconConfig,
    architecture="FalconForCausalLM",
    read=read,
    write=write,
    names=names,
    embedding="transformer.word_embeddings.weight",
    head="lm_head.weight",
    more=(POST,),
)
