"""Mistral and what is published in its format (2310.06825): `MistralForCausalLM`, Llama's with a sliding window."""

from typing import Any

from transformers import MistralConfig

from zoo.config import ModelConfig
from zoo.convert import decoder
from zoo.convert.family import Family


def read(config: MistralConfig) -> ModelConfig:
    """The model that a Mistral configuration describes."""
    blocks = [decoder.attention(config, window=config.sliding_window), decoder.gated_unit(config)]
    return decoder.decoder(config, [{"repeat": config.num_hidden_layers, "blocks": blocks}])


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a Mistral configuration: what the first two blocks say, for all."""
    pairs = decoder.layers(config)
    common, attention = decoder.fields(config, pairs)
    own = {"head_dim": attention.head_dim, "sliding_window": attention.window}
    return common | decoder.unit_fields(pairs[0][1], config.width) | own


FAMILY = Family(
    config_class=MistralConfig,
    architecture="MistralForCausalLM",
    read=read,
    write=write,
    names=decoder.names,
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
    derived=decoder.DERIVED,
)
