"""Mamba-2 (2405.21060): `Mamba2ForCausalLM`, the format of Codestral Mamba.

Its gated norm is over each group by itself. transformers up to 5.17 has one norm over all groups there, which is wrong
for weights with n_groups > 1, Codestral Mamba's too.
"""

from typing import Any

from transformers import Mamba2Config

from zoo.config import ModelConfig
from zoo.convert import mamba_parts
from zoo.convert.family import Family


def read(config: Mamba2Config) -> ModelConfig:
    """The model that a Mamba-2 configuration describes."""
    return mamba_parts.model(config, mamba_parts.dual(config))


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a Mamba-2 configuration: what the first block says, for all."""
    found, first = mamba_parts.fields(config, "mamba2")
    if first.norm.eps != found["layer_norm_epsilon"]:
        raise ValueError(
            f"its norms have eps={found['layer_norm_epsilon']} and those inside its blocks {first.norm.eps}, where the "
            f"format has one for all; set the model's norm_eps to {first.norm.eps}"
        )
    least, greatest = first.dt_limit or (0.0, None)
    return found | {
        "num_heads": first.heads,
        "head_dim": first.head_dim,
        "n_groups": first.groups,
        "time_step_limit": (float(least), float("inf") if greatest is None else float(greatest)),
    }


FAMILY = Family(
    config_class=Mamba2Config,
    architecture="Mamba2ForCausalLM",
    read=read,
    write=write,
    names=mamba_parts.names,
    embedding=mamba_parts.EMBEDDING,
    head=mamba_parts.HEAD,
    more=mamba_parts.LEFTOVERS,
)
