"""Bamba: `BambaForCausalLM`, Mamba-2 (2405.21060) and, in some layers, attention that turns half of each head."""

from typing import Any

from transformers import BambaConfig

from zoo.attention.gqa import GQA
from zoo.config import ModelConfig
from zoo.convert import decoder, hybrid, mamba_parts
from zoo.convert.family import Entry, Family, same
from zoo.layers.ffn import GatedUnit
from zoo.model import LanguageModel
from zoo.ssm.mamba2 import Mamba2


def read(config: BambaConfig) -> ModelConfig:
    """The model that a Bamba configuration describes."""
    said: Any = config
    bias = said.attention_bias
    stack: list[Any] = []
    for kind in said.layers_block_type:
        attends = kind in ("attention", "full_attention")
        mixer = decoder.attention(said, partial=True, bias=bias, out_bias=bias) if attends else hybrid.dual(said)
        stack += [mixer, decoder.gated_unit(said, said.mlp_bias)]
    return decoder.decoder(config, stack)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a Bamba configuration: what the first block of a kind says, for all of that kind."""
    pairs = decoder.layers(config, ["swiglu", "geglu"], ["mamba2", "gqa"])
    first = hybrid.first_of(config.blocks())
    feed: GatedUnit = decoder.on_meta(pairs[0][1], config.width)
    found = decoder.outer_fields(config, len(pairs)) | decoder.unit_fields(pairs[0][1], config.width)
    found |= {
        "mlp_bias": feed.up.bias is not None,
        "attn_layer_indices": [layer for layer, (mixer, _) in enumerate(pairs) if mixer.kind == "gqa"],
    }
    if "gqa" in first:
        common, attends = decoder.fields(config, [pair for pair in pairs if pair[0].kind == "gqa"])
        said = ("num_attention_heads", "num_key_value_heads", "attention_dropout", "rope_parameters")
        found |= {name: common[name] for name in said}
        found["attention_bias"] = attends.qkv.bias is not None
    return found | hybrid.dual_fields(first.get("mamba2"), config.width)


def names(model: LanguageModel) -> list[Entry]:
    """The table of names."""
    found = decoder.outer_names(model, "model.final_layernorm.weight")
    for index, residual in enumerate(model.residuals):
        ours, theirs = f"blocks.{index}", f"model.layers.{index // 2}"
        layer, norm = residual.block, "input_layernorm"
        if isinstance(layer, GQA):
            found += decoder.attention_names(f"{ours}.block", f"{theirs}.self_attn", layer)
        elif isinstance(layer, GatedUnit):
            norm = "pre_ff_layernorm"
            found += decoder.unit_names(f"{ours}.block", f"{theirs}.feed_forward", layer)
        else:
            assert isinstance(layer, Mamba2)
            found += mamba_parts.mixer(f"{ours}.block", f"{theirs}.mamba", layer)
        found.append(same(f"{ours}.norm.weight", f"{theirs}.{norm}.weight"))
    return found


FAMILY = Family(
    config_class=BambaConfig,
    architecture="BambaForCausalLM",
    read=read,
    write=write,
    names=names,
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
)
