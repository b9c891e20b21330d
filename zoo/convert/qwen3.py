"""Qwen 3 (2505.09388): `Qwen3ForCausalLM`, with a norm over each head of queries and keys."""

from typing import Any

from transformers import Qwen3Config

from zoo.config import ModelConfig
from zoo.convert import decoder
from zoo.convert.family import Family


def read(config: Qwen3Config) -> ModelConfig:
    """The model that a Qwen 3 configuration describes."""
    biases = {"bias": config.attention_bias, "out_bias": config.attention_bias}
    norms = {"qk_norm": "rms", "qk_norm_eps": config.rms_norm_eps}
    return decoder.decoder(config, decoder.by_layer(config, **biases, **norms))


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a Qwen 3 configuration."""
    pairs = decoder.layers(config)
    common, attention = decoder.fields(config, pairs)
    own = {"head_dim": attention.head_dim, "attention_bias": attention.qkv.bias is not None}
    return common | decoder.unit_fields(pairs[0][1], config.width) | own | decoder.windows(pairs)


FAMILY = Family(
    config_class=Qwen3Config,
    architecture="Qwen3ForCausalLM",
    read=read,
    write=write,
    names=decoder.names,
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
)
