"""Mixtral (2401.04088): `MixtralForCausalLM`, Mistral's attention and mixtures of experts."""

from functools import partial
from typing import Any

from transformers import MixtralConfig

from zoo.config import ModelConfig
from zoo.convert import decoder
from zoo.convert.family import Family


def read(config: MixtralConfig) -> ModelConfig:
    """The model that a Mixtral configuration describes."""
    if config.router_jitter_noise:
        raise ValueError(
            f"router_jitter_noise={config.router_jitter_noise} has no counterpart, since it shakes what experts read "
            "too; set it to 0 (logits do not depend on it)"
        )
    mixture = decoder.mixture(config, config.intermediate_size, renormalise=True)
    blocks = [decoder.attention(config, window=config.sliding_window), mixture]
    return decoder.decoder(config, [{"repeat": config.num_hidden_layers, "blocks": blocks}])


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a Mixtral configuration: what the first two blocks say, for all."""
    pairs = decoder.layers(config, ["moe"])
    common, attention = decoder.fields(config, pairs)
    mixture, made = decoder.mixture_fields(pairs[0][1], config.width)
    own = {"head_dim": attention.head_dim, "sliding_window": attention.window, "router_jitter_noise": 0.0}
    return common | mixture | own | {"intermediate_size": made.experts.hidden}


FAMILY = Family(
    config_class=MixtralConfig,
    architecture="MixtralForCausalLM",
    read=read,
    write=write,
    names=partial(decoder.names, called=decoder.Mixture("block_sparse_moe", "w1", "w3", "w2")),
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
    derived=decoder.DERIVED,
)
