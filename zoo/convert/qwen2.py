"""Qwen 2 and 2.5 (2407.10671, 2412.15115): `Qwen2ForCausalLM`, with biases on queries, keys and values alone."""

from typing import Any

from transformers import Qwen2Config

from zoo.config import ModelConfig
from zoo.convert import decoder
from zoo.convert.family import Family


def read(config: Qwen2Config) -> ModelConfig:
    """The model that a Qwen 2 configuration describes."""
    return decoder.decoder(config, decoder.by_layer(config, bias=True))


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a Qwen 2 configuration; its heads have width / heads features."""
    pairs = decoder.layers(config)
    common, _ = decoder.fields(config, pairs)
    return common | decoder.unit_fields(pairs[0][1], config.width) | decoder.windows(pairs)


FAMILY = Family(
    config_class=Qwen2Config,
    architecture="Qwen2ForCausalLM",
    read=read,
    write=write,
    names=decoder.names,
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
)
