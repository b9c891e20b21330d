"""Llama 2 and 3 and what is published in their format (2302.13971, 2407.21783): `LlamaForCausalLM`."""

from typing import Any

from transformers import LlamaConfig

from zoo.config import ModelConfig
from zoo.convert import decoder
from zoo.convert.family import Family


def read(config: LlamaConfig) -> ModelConfig:
    """The model that a Llama configuration describes."""
    biases = {"bias": config.attention_bias, "out_bias": config.attention_bias}
    blocks = [decoder.attention(config, **biases), decoder.gated_unit(config, config.mlp_bias)]
    return decoder.decoder(config, [{"repeat": config.num_hidden_layers, "blocks": blocks}])


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a Llama configuration: what the first two blocks say, for all."""
    pairs = decoder.layers(config)
    common, attention = decoder.fields(config, pairs)
    return (
        common
        | decoder.unit_fields(pairs[0][1], config.width)
        | {
            "head_dim": attention.head_dim,
            "attention_bias": attention.qkv.bias is not None,
            "mlp_bias": pairs[0][1].options.get("bias", False),
        }
    )


FAMILY = Family(
    config_class=LlamaConfig,
    architecture="LlamaForCausalLM",
    read=read,
    write=write,
    names=decoder.names,
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
    derived=decoder.DERIVED,
)
