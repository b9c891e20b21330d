"""OLMoE (2409.02060): `OlmoeForCausalLM`, norms over all heads of queries and keys, and mixtures of experts."""

from typing import Any

from transformers import OlmoeConfig

from zoo.config import ModelConfig
from zoo.convert import decoder
from zoo.convert.family import Family


def read(config: OlmoeConfig) -> ModelConfig:
    """The model that an OLMoE configuration describes."""
    if config.clip_qkv is not None:
        raise ValueError(
            f"clip_qkv={config.clip_qkv} cannot be converted: no block here clips queries, keys and values"
        )
    biases = {"bias": config.attention_bias, "out_bias": config.attention_bias}
    norms = {"qk_norm": "rms_across", "qk_norm_eps": config.rms_norm_eps}
    mixture = decoder.mixture(config, config.intermediate_size, config.norm_topk_prob)
    blocks = [decoder.attention(config, **biases, **norms), mixture]
    return decoder.decoder(config, [{"repeat": config.num_hidden_layers, "blocks": blocks}])


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of an OLMoE configuration: what the first two blocks say, for all."""
    pairs = decoder.layers(config, ["moe"])
    common, attention = decoder.fields(config, pairs)
    mixture, made = decoder.mixture_fields(pairs[0][1], config.width)
    return (
        common
        | mixture
        | {
            "intermediate_size": made.experts.hidden,
            "norm_topk_prob": getattr(made.router, "renormalise", None),
            "attention_bias": attention.qkv.bias is not None,
            "clip_qkv": None,
        }
    )


FAMILY = Family(
    config_class=OlmoeConfig,
    architecture="OlmoeForCausalLM",
    read=read,
    write=write,
    names=decoder.names,
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
)
