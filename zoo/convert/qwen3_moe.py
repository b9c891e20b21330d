"""Qwen 3's mixtures of experts (2505.09388): `Qwen3MoeForCausalLM`, some layers of which may be dense."""

from typing import Any

from transformers import Qwen3MoeConfig

from zoo.config import ModelConfig
from zoo.convert import decoder
from zoo.convert.family import Family


def read(config: Qwen3MoeConfig) -> ModelConfig:
    """The model that a Qwen 3 MoE configuration describes."""
    biases = {"bias": config.attention_bias, "out_bias": config.attention_bias}
    norms = {"qk_norm": "rms", "qk_norm_eps": config.rms_norm_eps}
    attention = decoder.attention(config, window=config.sliding_window, **biases, **norms)
    stack: list[Any] = []
    for layer in range(config.num_hidden_layers):
        mixed = layer not in (config.mlp_only_layers or []) and (layer + 1) % config.decoder_sparse_step == 0
        if mixed and config.num_experts:
            feed = decoder.mixture(config, config.moe_intermediate_size, config.norm_topk_prob)
        else:
            feed = decoder.gated_unit(config)
        stack += [attention, feed]
    return decoder.decoder(config, stack)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a Qwen 3 MoE configuration."""
    pairs = decoder.layers(config, ["moe", "swiglu", "geglu"])
    common, attention = decoder.fields(config, pairs)
    mixed = [feed for _, feed in pairs if feed.kind == "moe"]
    dense = [feed for _, feed in pairs if feed.kind != "moe"]
    if not mixed:
        raise ValueError("it has no mixture of experts; qwen3 holds dense models")
    mixture, made = decoder.mixture_fields(mixed[0], config.width)
    units = decoder.unit_fields(dense[0], config.width) if dense else {}
    return (
        common
        | units
        | mixture
        | {
            "head_dim": attention.head_dim,
            "attention_bias": attention.qkv.bias is not None,
            "use_sliding_window": attention.window is not None,
            "sliding_window": attention.window,
            "moe_intermediate_size": made.experts.hidden,
            "norm_topk_prob": getattr(made.router, "renormalise", None),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [index for index, (_, feed) in enumerate(pairs) if feed.kind != "moe"],
        }
    )


FAMILY = Family(
    config_class=Qwen3MoeConfig,
    architecture="Qwen3MoeForCausalLM",
    read=read,
    write=write,
    names=decoder.names,
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
    more=("head_dim",),
)
