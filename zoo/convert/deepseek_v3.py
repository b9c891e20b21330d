"""DeepSeek V3 and R1 (2412.19437): `DeepseekV3ForCausalLM`, experts chosen within groups and balanced by a bias.

The published files are in FP8, which must be dequantised first.
"""

from typing import Any

from transformers import DeepseekV3Config

from zoo.attention.mla import ROTARY
from zoo.config import ModelConfig
from zoo.convert import decoder, latent
from zoo.convert.family import Family
from zoo.convert.rope import from_position

# What other readers of the format look at.
FIXED = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def read(config: DeepseekV3Config) -> ModelConfig:
    """The model that a DeepSeek V3 configuration describes."""
    layout = "interleaved" if config.rope_interleave else "half"
    attends = latent.attention(config, latent.rotary(config, layout))
    dense, stack = decoder.gated_unit(config), list[Any]()
    for layer in range(config.num_hidden_layers):
        stack += [attends, dense if layer < latent.needed(config, "first_k_dense_replace") else _mixture(config)]
    return decoder.decoder(config, stack)


def _mixture(config: DeepseekV3Config) -> dict[str, Any]:
    latent.only(config, **FIXED)
    return latent.mixture(config, config.n_routed_experts, latent.loss_free(config))


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a DeepSeek V3 configuration."""
    found, first = latent.fields(config)
    position = first["mla"].options.get("position", ROTARY)
    return found | {
        "rope_parameters": from_position(position),
        "rope_interleave": (position or {}).get("layout") == "interleaved",
        "num_nextn_predict_layers": 0,
        **FIXED,
    }


FAMILY = Family(
    config_class=DeepseekV3Config,
    architecture="DeepseekV3ForCausalLM",
    read=read,
    write=write,
    names=latent.names,
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
    derived=decoder.DERIVED,
    beside=("model.layers.61.*",),  # predicts the token after the next; transformers leaves it out too
    more=("ep_size", "moe_layer_freq", "scoring_func", "seq_aux", "topk_method", latent.BALANCE, latent.RATE),
)
