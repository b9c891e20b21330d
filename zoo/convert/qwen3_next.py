"""Qwen3-Next: `Qwen3NextForCausalLM`, Gated DeltaNet and gated attention, mixtures with a gated shared expert."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3NextConfig

from zoo.attention.gqa import GQA
from zoo.config import BlockSpec, ModelConfig
from zoo.convert import decoder
from zoo.convert.family import Entry, Family, same, taps
from zoo.model import LanguageModel
from zoo.moe.moe import MoE
from zoo.recurrent.gated_delta_net import GatedDeltaNet

KINDS = {"linear_attention": "gated_delta_net", "full_attention": "gqa"}  # layer_types: our kind


def read(config: Qwen3NextConfig) -> ModelConfig:
    """The model that a Qwen3-Next configuration describes."""
    said: Any = config
    mixers = {"linear_attention": _delta, "full_attention": _attention}
    stack: list[Any] = []
    for layer, kind in enumerate(said.layer_types):
        if kind not in mixers:
            raise ValueError(f"layer_types: {kind!r} cannot be converted; {' and '.join(mixers)} can")
        stack += [mixers[kind](said), _feed(said, layer)]
    return decoder.decoder(config, stack, norm="rms_zero_centered")


def _delta(said: Any) -> dict[str, Any]:
    if said.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"hidden_act={said.hidden_act!r} cannot be converted: the convolution of linear_attention layers here ends "
            "in silu"
        )
    return {
        "kind": "gated_delta_net",
        "heads": said.linear_num_value_heads,
        "key_heads": said.linear_num_key_heads,
        "head_dim": said.linear_key_head_dim,
        "value_head_dim": said.linear_value_head_dim,
        "conv_width": said.linear_conv_kernel_dim,
        "norm_eps": said.rms_norm_eps,
    }


def _attention(said: Any) -> dict[str, Any]:
    return decoder.attention(
        said,
        partial=True,
        bias=said.attention_bias,
        out_bias=said.attention_bias,
        qk_norm="rms_zero_centered",
        qk_norm_eps=said.rms_norm_eps,
        gate=True,
    )


def _feed(said: Any, layer: int) -> dict[str, Any]:
    if layer in said.mlp_only_layers or not said.num_experts or (layer + 1) % said.decoder_sparse_step:
        return decoder.gated_unit(said)
    shared = {"shared_experts": 1, "shared_hidden": said.shared_expert_intermediate_size, "shared_gate": True}
    return decoder.mixture(said, said.moe_intermediate_size, said.norm_topk_prob) | shared


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a Qwen3-Next configuration: what the first block of a kind says, for all of that kind."""
    feeds = ["moe", "swiglu", "geglu"]
    pairs = decoder.layers(config, feeds, list(KINDS.values()))
    names = {ours: theirs for theirs, ours in KINDS.items()}
    first = {spec.kind: spec for spec in reversed(config.blocks())}
    found = decoder.outer_fields(config, len(pairs)) | {
        "layer_types": [names[mixer.kind] for mixer, _ in pairs],
        "num_experts": 0,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }
    if "gqa" in first:
        common, attends = decoder.fields(config, [pair for pair in pairs if pair[0].kind == "gqa"])
        said = ("num_attention_heads", "num_key_value_heads", "attention_dropout")
        found |= {name: common[name] for name in said}
        found |= {
            "rope_parameters": {"partial_rotary_factor": 1.0} | common["rope_parameters"],  # the class' own is 0.25
            "head_dim": attends.head_dim,
            "attention_bias": attends.qkv.bias is not None,
        }
    if "gated_delta_net" in first:
        found |= _delta_fields(first["gated_delta_net"], config.width)
    if dense := next((first[kind] for kind in feeds[1:] if kind in first), None):
        found |= decoder.unit_fields(dense, config.width)
    if "moe" in first:
        mixture, made = decoder.mixture_fields(first["moe"], config.width)
        found |= mixture | {
            "moe_intermediate_size": made.experts.hidden,
            "shared_expert_intermediate_size": made.shared_hidden,
            "norm_topk_prob": getattr(made.router, "renormalise", None),
            "mlp_only_layers": [index for index, (_, feed) in enumerate(pairs) if feed.kind != "moe"],
        }
    return found


def _delta_fields(spec: BlockSpec, width: int) -> dict[str, Any]:
    made: GatedDeltaNet = decoder.on_meta(spec, width)
    return {
        "linear_num_value_heads": made.heads,
        "linear_num_key_heads": made.key_heads,
        "linear_key_head_dim": made.k_dim,
        "linear_value_head_dim": made.v_dim,
        "linear_conv_kernel_dim": made.conv.taps,
    }


# Names ----------------------------------------------------------------------------------------------------------


def names(model: LanguageModel) -> list[Entry]:
    """The table of names."""
    found = decoder.outer_names(model)
    for index, residual in enumerate(model.residuals):
        ours, theirs = f"blocks.{index}", f"model.layers.{index // 2}"
        layer, norm = residual.block, "input_layernorm"
        if isinstance(layer, GQA):
            found += _attention_names(f"{ours}.block", f"{theirs}.self_attn", layer)
        elif isinstance(layer, GatedDeltaNet):
            found += _delta_names(f"{ours}.block", f"{theirs}.linear_attn", layer)
        else:
            norm = "post_attention_layernorm"
            place = (f"{ours}.block", f"{theirs}.mlp")
            mixed = isinstance(layer, MoE)
            found += decoder.mixture_names(*place, layer) if mixed else decoder.unit_names(*place, layer)
        found.append(same(f"{ours}.norm.weight", f"{theirs}.{norm}.weight"))
    return found


def _attention_names(ours: str, theirs: str, layer: GQA) -> list[Entry]:
    """Their q_proj holds for each head the query's rows, then the gate's; ours all queries', then keys', values' and
    gates'."""
    size = layer.head_dim

    def join(parts: Sequence[Tensor]) -> Tensor:
        both, k, v = parts
        q, gate = both.unflatten(0, (layer.heads, 2, size)).unbind(1)
        return torch.cat([q.flatten(0, 1), k, v, gate.flatten(0, 1)])

    def split(whole: Tensor) -> list[Tensor]:
        q, k, v, gate = whole.split([heads * size for heads in layer.parts])
        both = torch.stack([each.unflatten(0, (-1, size)) for each in (q, gate)], 1)
        return [both.flatten(0, 2), k, v]

    found = decoder.attention_names(ours, theirs, layer)
    return [entry._replace(join=join, split=split) if f"{ours}.qkv." in entry.ours else entry for entry in found]


def _delta_names(ours: str, theirs: str, layer: GatedDeltaNet) -> list[Entry]:
    """Their two projections hold for each head of keys its query, its key and its heads' values and z, and its heads'
    β and a; ours all queries, keys, values, β, a and z."""
    groups = layer.key_heads
    each = layer.heads // groups
    wide = [layer.k_dim, layer.k_dim, each * layer.v_dim, each * layer.v_dim]  # q, k, v, z of a group
    rows = [groups * size for size in (*wide[:3], each, each, wide[3])]

    def join(parts: Sequence[Tensor]) -> Tensor:
        qkvz, ba = (part.unflatten(0, (groups, -1)) for part in parts)
        q, k, v, z = qkvz.split(wide, 1)
        b, a = ba.chunk(2, 1)
        return torch.cat([part.flatten(0, 1) for part in (q, k, v, b, a, z)])

    def split(whole: Tensor) -> list[Tensor]:
        q, k, v, b, a, z = (part.unflatten(0, (groups, -1)) for part in whole.split(rows))
        return [torch.cat([q, k, v, z], 1).flatten(0, 1), torch.cat([b, a], 1).flatten(0, 1)]

    theirs_in = (f"{theirs}.in_proj_qkvz.weight", f"{theirs}.in_proj_ba.weight")
    rest = ("A_log", "dt_bias", "norm.weight", "out_proj.weight")
    return [
        Entry(f"{ours}.in_proj.weight", theirs_in, join, split),
        taps(f"{ours}.conv.weight", f"{theirs}.conv1d.weight"),
        *(same(f"{ours}.{name}", f"{theirs}.{name}") for name in rest),
    ]


FAMILY = Family(
    config_class=Qwen3NextConfig,
    architecture="Qwen3NextForCausalLM",
    read=read,
    write=write,
    names=names,
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
    beside=("mtp.*",),  # a head that predicts tokens further ahead; transformers leaves it out too
)
