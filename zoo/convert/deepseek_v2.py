"""DeepSeek V2 and V2-Lite (2405.04434): `DeepseekV2ForCausalLM`, latent attention, mixtures after dense layers."""

from typing import Any

from transformers import DeepseekV2Config

from zoo.attention.mla import ROTARY
from zoo.config import ModelConfig
from zoo.convert import decoder, latent
from zoo.convert.family import Family
from zoo.convert.rope import from_position

FIXED = {"moe_layer_freq": 1, "scoring_func": "softmax"}  # what other readers of the format look at


def read(config: DeepseekV2Config) -> ModelConfig:
    """The model that a DeepSeek V2 configuration describes."""
    attends = latent.attention(config, latent.rotary(config, "interleaved"))
    dense, stack = decoder.gated_unit(config, config.mlp_bias), list[Any]()
    for layer in range(config.num_hidden_layers):
        stack += [attends, dense if layer < config.first_k_dense_replace else _mixture(config)]
    return decoder.decoder(config, stack)


def _mixture(config: DeepseekV2Config) -> dict[str, Any]:
    latent.only(config, **FIXED)
    if config.mlp_bias:
        raise ValueError(
            f"mlp_bias={config.mlp_bias} cannot be converted with mixtures, whose shared experts would have biases and "
            "the routed ones none; set it to false, or first_k_dense_replace to num_hidden_layers"
        )
    if config.norm_topk_prob:
        raise ValueError(
            f"norm_topk_prob={config.norm_topk_prob} cannot be converted: transformers' model leaves it out, "
            "DeepSeek's own divides the weights by their sum; set it to false, as all published ones do"
        )
    router: dict[str, Any] = {"kind": "top_k", "renormalise": False, "scale": config.routed_scaling_factor}
    if config.topk_method == "group_limited_greedy":
        router |= {"groups": latent.needed(config, "n_group"), "top_groups": latent.needed(config, "topk_group")}
    elif config.topk_method != "greedy":
        raise ValueError(f"topk_method={config.topk_method!r} cannot be converted; greedy and group_limited_greedy can")
    return latent.mixture(config, config.n_routed_experts, router)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a DeepSeek V2 configuration."""
    found, first = latent.fields(config)
    grouped = found.get("n_group", 1) > 1
    dense = [spec for kind, spec in first.items() if kind in latent.FEEDS[1:]]
    return found | {
        "rope_parameters": from_position(first["mla"].options.get("position", ROTARY)),
        "mlp_bias": "moe" not in first and dense[0].options.get("bias", False),
        "norm_topk_prob": False,
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        **FIXED,
    }


FAMILY = Family(
    config_class=DeepseekV2Config,
    architecture="DeepseekV2ForCausalLM",
    read=read,
    write=write,
    names=latent.names,
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
    derived=decoder.DERIVED,
    more=("ep_size", "moe_layer_freq", "scoring_func", "seq_aux", latent.BALANCE),
)
