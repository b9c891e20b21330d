"""Mamba (2312.00752): `MambaForCausalLM`, the format of state-spaces' conversions mamba-130m-hf to mamba-2.8b-hf."""

from typing import Any

from transformers import MambaConfig

from zoo.config import ModelConfig
from zoo.convert import mamba_parts
from zoo.convert.family import Family


def read(config: MambaConfig) -> ModelConfig:
    """The model that a Mamba configuration describes."""
    return mamba_parts.model(config, mamba_parts.selective(config))


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a Mamba configuration: what the first block says, for all."""
    return mamba_parts.selective_fields(config)[0]


FAMILY = Family(
    config_class=MambaConfig,
    architecture="MambaForCausalLM",
    read=read,
    write=write,
    names=mamba_parts.names,
    embedding=mamba_parts.EMBEDDING,
    head=mamba_parts.HEAD,
    more=mamba_parts.LEFTOVERS,
)
