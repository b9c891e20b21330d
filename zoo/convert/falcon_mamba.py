"""Falcon Mamba (2410.05355): `FalconMambaForCausalLM`, Mamba with norms without weights on dt, B and C."""

from typing import Any

from transformers import FalconMambaConfig

from zoo.config import ModelConfig
from zoo.convert import mamba_parts
from zoo.convert.family import Family


def read(config: FalconMambaConfig) -> ModelConfig:
    """The model that a Falcon Mamba configuration describes."""
    norms = {"inner_norm": "weightless", "inner_norm_eps": config.mixer_rms_eps}
    return mamba_parts.model(config, mamba_parts.selective(config, **norms))


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a Falcon Mamba configuration: what the first block says, for all."""
    found, first = mamba_parts.selective_fields(config)
    if first.inner_norm_eps is None:
        raise ValueError("its blocks have no inner_norm; mamba holds models without")
    return found | {"mixer_rms_eps": first.inner_norm_eps}


FAMILY = Family(
    config_class=FalconMambaConfig,
    architecture="FalconMambaForCausalLM",
    read=read,
    write=write,
    names=mamba_parts.names,
    embedding=mamba_parts.EMBEDDING,
    head=mamba_parts.HEAD,
    more=mamba_parts.LEFTOVERS,
)
