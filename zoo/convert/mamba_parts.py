"""What the formats of Mamba models share: a stack of mixers alone, and the names of their tensors."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from zoo.config import BlockSpec, ModelConfig
from zoo.convert.decoder import on_meta
from zoo.convert.family import Entry, same, taps
from zoo.layers.norm import RMSNorm
from zoo.model import LanguageModel
from zoo.registry import options
from zoo.ssm.mamba import Mamba
from zoo.ssm.mamba2 import Mamba2

EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"

# What published files hold beside their class' fields: mamba_ssm's own names and fields of older versions of the class.
# transformers reads past them. So do we, but for rms_norm and intermediate_size, which are looked at. Of
# norm_before_gate the published files say the opposite of what their weights were trained with (Codestral Mamba: true).
LEFTOVERS = (
    *("d_inner", "d_model", "n_layer", "ssm_cfg", "rms_norm", "fused_add_norm", "pad_vocab_size_multiple"),
    *("intermediate_size", "norm_before_gate", "time_step_init_scheme", "time_step_scale"),
)
# A parameter of our mixer: what formats call it.
CALLED = {
    "conv.bias": "conv1d.bias",
    "dt_norm.weight": "dt_layernorm.weight",
    "B_norm.weight": "b_layernorm.weight",
    "C_norm.weight": "c_layernorm.weight",
}


def selective(config: Any, **more: Any) -> dict[str, Any]:
    """The mamba block of a configuration. Raises ValueError for what has no counterpart.

    The sizes are those that transformers builds: `intermediate_size` goes before `expand`, which is 16 in Falcon Mamba
    7B's file, while its channels are twice its width.
    """
    expand, rest = divmod(config.intermediate_size, config.hidden_size)
    if rest or not expand:
        raise ValueError(
            f"intermediate_size={config.intermediate_size} cannot be converted: it is not a multiple of "
            f"hidden_size={config.hidden_size}"
        )
    if not str(config.time_step_rank).isdecimal():
        raise ValueError(f"time_step_rank={config.time_step_rank!r} must be a positive integer or 'auto'")
    return {"kind": "mamba", "expand": expand, "dt_rank": int(config.time_step_rank)} | _common(config) | more


def dual(config: Any, **more: Any) -> dict[str, Any]:
    """The mamba2 block of a configuration. Raises ValueError for what has no counterpart.

    Its `time_step_rank` is read by nothing: the steps come out of the first projection.
    """
    inner = getattr(config, "intermediate_size", None)
    if inner not in (None, config.expand * config.hidden_size):
        raise ValueError(
            f"intermediate_size={inner} contradicts expand * hidden_size = {config.expand * config.hidden_size}; "
            "correct it, or leave it out"
        )
    least, greatest = config.time_step_limit
    greatest = None if greatest == float("inf") else greatest
    return (
        {
            "kind": "mamba2",
            "expand": config.expand,
            "head_dim": config.head_dim,
            "groups": config.n_groups,
            "norm_eps": config.layer_norm_epsilon,
            "dt_limit": None if least <= 0 and greatest is None else [max(least, 0.0), greatest],
        }
        | _common(config)
        | more
    )


def _common(config: Any) -> dict[str, Any]:
    """The options that both blocks have. Of the fields that tell how weights begin, ours have the steps' range."""
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act={config.hidden_act!r} cannot be converted: the convolution here ends in silu")
    if getattr(config, "rms_norm", True) is not True:
        raise ValueError(f"rms_norm={config.rms_norm} cannot be converted: the norms of this format are RMSNorms")
    return {
        "state_size": config.state_size,
        "conv_width": config.conv_kernel,
        "dt_min": config.time_step_min,
        "dt_max": config.time_step_max,
        "bias": config.use_bias,
        "conv_bias": config.use_conv_bias,
    }


def model(config: PreTrainedConfig, block: Mapping[str, Any]) -> ModelConfig:
    """The model of this block in every layer, with a configuration's other sizes.

    `residual_in_fp32` is a matter of precision alone, kept for the way back: our stream has the embedding's dtype.
    """
    said: Any = config
    return ModelConfig(
        vocab_size=said.vocab_size,
        width=said.hidden_size,
        stack=[{"repeat": said.num_hidden_layers, "blocks": [dict(block)]}],
        norm_eps=said.layer_norm_epsilon,
        tied_embeddings=said.tie_word_embeddings,
        init_std=said.initializer_range,
    )


def fields(config: ModelConfig, kind: str) -> tuple[dict[str, Any], Any]:
    """The fields that all these configurations have, as the first block says, and that block.

    Raises ValueError that names a block of another kind.
    """
    specs = config.blocks()
    for spec in specs:
        if spec.kind != kind:
            raise ValueError(f"{spec.where} is of kind {spec.kind}; every block is {kind}")
    first = on_meta(specs[0], config.width)
    found = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(specs),
        "layer_norm_epsilon": RMSNorm(config.width).eps if config.norm_eps is None else config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "expand": first.inner // config.width,
        "state_size": first.state_size,
        "conv_kernel": first.conv.taps,
        "time_step_min": float(_said(specs[0], "dt_min")),
        "time_step_max": float(_said(specs[0], "dt_max")),
        "use_bias": first.in_proj.bias is not None,
        "use_conv_bias": first.conv.bias is not None,
    }
    return found, first


def selective_fields(config: ModelConfig) -> tuple[dict[str, Any], Mamba]:
    """The fields of a configuration of Mamba blocks, and the first of them."""
    found, first = fields(config, "mamba")
    return found | {"intermediate_size": first.inner, "time_step_rank": first.dt_rank}, first


def _said(spec: BlockSpec, option: str) -> Any:
    return spec.options.get(option, options(spec.kind)[option].default)


def mixer(ours: str, theirs: str, block: Mamba | Mamba2) -> list[Entry]:
    """The tensors of a mixer."""
    rest = [name for name, _ in block.named_parameters() if name != "conv.weight"]
    conv = taps(f"{ours}.conv.weight", f"{theirs}.conv1d.weight")
    return [conv, *(same(f"{ours}.{name}", f"{theirs}.{CALLED.get(name, name)}") for name in rest)]


def names(model: LanguageModel) -> list[Entry]:
    """The table of names."""
    found = [same("embedding.weight", EMBEDDING), same("norm.weight", "backbone.norm_f.weight")]
    if not model.config.tied_embeddings:
        found.append(same("head.weight", HEAD))
    for index, residual in enumerate(model.residuals):
        ours, theirs = f"blocks.{index}", f"backbone.layers.{index}"
        assert isinstance(residual.block, Mamba | Mamba2)
        found.append(same(f"{ours}.norm.weight", f"{theirs}.norm.weight"))
        found += mixer(f"{ours}.block", f"{theirs}.mixer", residual.block)
    return found
