"""Kimi Linear (2510.26692): `KimiLinearForCausalLM`, KDA with latent attention without positions between its layers."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import KimiLinearConfig

from zoo.attention.mla import MLA
from zoo.config import BlockSpec, ModelConfig
from zoo.convert import decoder, latent
from zoo.convert.family import Entry, Family, same, stacked
from zoo.model import LanguageModel
from zoo.recurrent.kda import KDA

KINDS = {"linear_attention": "kda", "full_attention": "mla"}  # layer_types: our kind
CALLED = decoder.Mixture("block_sparse_moe", "w1", "w3", "w2", "shared_experts")
# What published files hold beside their class' fields: those of Moonshot's own class. transformers reads the first two.
MORE = (
    "linear_attn_config",
    "first_k_dense_replace",
    "num_nextn_predict_layers",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    latent.BALANCE,
    latent.RATE,
)

# What other readers of the format look at.
FIXED = {
    "mla_use_nope": True,
    "moe_layer_freq": 1,
    "moe_router_activation_func": "sigmoid",
    "topk_method": "noaux_tc",
    "use_grouped_topk": True,
}


def read(config: KimiLinearConfig) -> ModelConfig:
    """The model that a Kimi Linear configuration describes."""
    said: Any = config
    if said.tie_word_embeddings:
        raise ValueError(
            f"tie_word_embeddings={said.tie_word_embeddings} cannot be converted: transformers' model of kimi_linear "
            "leaves it out and has a head of its own; set it to false"
        )
    latent.only(said, **FIXED)
    mixers = {"linear_attention": _kda, "full_attention": _mla}
    stack: list[Any] = []
    for kind, feed in zip(said.layer_types, said.mlp_layer_types, strict=True):
        if kind not in mixers:
            raise ValueError(f"layer_types: {kind!r} cannot be converted; {' and '.join(mixers)} can")
        stack += [mixers[kind](said), _mixture(said) if feed == "sparse" else decoder.gated_unit(said)]
    return decoder.decoder(config, stack)


def _mla(said: Any) -> dict[str, Any]:
    return latent.attention(said, None)


def _kda(said: Any) -> dict[str, Any]:
    if said.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"hidden_act={said.hidden_act!r} cannot be converted: the convolution of linear_attention layers here ends "
            "in silu"
        )
    return {
        "kind": "kda",
        "heads": said.linear_num_heads,
        "head_dim": said.linear_head_dim,
        "rank": said.linear_head_dim,
        "conv_width": said.linear_conv_kernel_dim,
        "norm_eps": said.rms_norm_eps,
    }


def _mixture(said: Any) -> dict[str, Any]:
    return latent.mixture(said, said.num_experts, latent.loss_free(said))


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a Kimi Linear configuration, and those by which Moonshot's own class reads it."""
    common, first = latent.fields(config, list(KINDS.values()))
    pairs = decoder.layers(config, latent.FEEDS, list(KINDS.values()))
    theirs = KimiLinearConfig.attribute_map | {"n_routed_experts": "num_experts"}
    names = {ours: name for name, ours in KINDS.items()}
    found = {theirs.get(name, name): value for name, value in common.items()}
    found["layer_types"] = [names[mixer.kind] for mixer, _ in pairs]
    found |= FIXED
    found["mlp_layer_types"] = ["sparse" if feed.kind == "moe" else "dense" for _, feed in pairs]
    return found | _kda_fields(first["kda"], config.width, found["layer_types"]) if "kda" in first else found


def _kda_fields(spec: BlockSpec, width: int, kinds: Sequence[str]) -> dict[str, Any]:
    made: KDA = decoder.on_meta(spec, width)
    places = {
        name: [index + 1 for index, kind in enumerate(kinds) if kind == each]
        for name, each in (("kda_layers", "linear_attention"), ("full_attn_layers", "full_attention"))
    }
    sizes = {"num_heads": made.heads, "head_dim": made.k_dim, "short_conv_kernel_size": made.conv.taps}
    return {
        "linear_num_heads": made.heads,
        "linear_head_dim": made.k_dim,
        "linear_conv_kernel_dim": made.conv.taps,
        "linear_attn_config": sizes | places,
    }


# Names ----------------------------------------------------------------------------------------------------------


def names(model: LanguageModel) -> list[Entry]:
    """The table of names."""
    return latent.names(model, CALLED, {MLA: latent.attention_names, KDA: _kda_names})


def _kda_names(ours: str, theirs: str, layer: KDA) -> list[Entry]:
    rows = [layer.key_dim, layer.key_dim, layer.value_dim]  # of q, k and v

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.squeeze(1) for part in parts])

    def split(whole: Tensor) -> list[Tensor]:
        return [part.unsqueeze(1) for part in whole.split(rows)]

    inner = {
        "dt_bias": "dt_bias",
        "decay_proj.encode.weight": "f_a_proj.weight",
        "decay_proj.decode.weight": "f_b_proj.weight",
        "gate_proj.encode.weight": "g_a_proj.weight",
        "gate_proj.decode.weight": "g_b_proj.weight",
        "norm.weight": "o_norm.weight",
        "out_proj.weight": "o_proj.weight",
    }
    return [
        stacked(f"{ours}.in_proj.weight", [f"{theirs}.{part}_proj.weight" for part in "qkvb"], [*rows, layer.heads]),
        Entry(f"{ours}.conv.weight", tuple(f"{theirs}.{part}_conv1d.weight" for part in "qkv"), join, split),
        Entry(
            f"{ours}.A_log",
            (f"{theirs}.A_log",),
            lambda parts: parts[0].flatten(),
            lambda whole: [whole[None, None, :, None]],
        ),
        *(same(f"{ours}.{mine}", f"{theirs}.{part}") for mine, part in inner.items()),
    ]


def spelling(name: str) -> str:
    """The published name of a tensor: transformers saves a dense layer's matrices as if they were a mixture's."""
    return re.sub(r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj.", name)


FAMILY = Family(
    config_class=KimiLinearConfig,
    architecture="KimiLinearForCausalLM",
    read=read,
    write=write,
    names=names,
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
    spelling=spelling,
    own_dtype=("*.A_log", "*.dt_bias"),  # float32 in the published files
    more=(*FIXED, *MORE),
)
