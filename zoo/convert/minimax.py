"""MiniMax-Text-01 (2501.08313): `MiniMaxForCausalLM`, lightning and softmax attention, mixtures, norms after sums."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import MiniMaxConfig

from zoo.attention.gqa import GQA
from zoo.config import BlockSpec, ModelConfig
from zoo.convert import decoder
from zoo.convert.family import Entry, Family, same
from zoo.model import LanguageModel
from zoo.moe.moe import MoE
from zoo.recurrent.lightning import LightningAttention

KINDS = {"linear_attention": "lightning_attention", "full_attention": "gqa"}  # layer_types: our kind
FACTORS = {"lightning_attention": "linear_attn", "gqa": "full_attn", "moe": "mlp"}  # the prefix of their two factors
CALLED = decoder.Mixture("block_sparse_moe", "w1", "w3", "w2")


def read(config: MiniMaxConfig) -> ModelConfig:
    """The model that a MiniMax configuration describes.

    What a sum keeps is the normed stream, x ← α n(x) + β f(n(x)): the same as norms after sums, the first of them on
    the embedding and the model's last one after the last sum.

    Published files also hold the decays, rounded to their dtype, and transformers computes with those; here they are
    exact. On the way back they are left out, for transformers makes them anew from the configuration.
    """
    said: Any = config
    if said.router_jitter_noise:
        raise ValueError(
            f"router_jitter_noise={said.router_jitter_noise} has no counterpart, since it shakes what experts read "
            "too; set it to 0 (logits do not depend on it)"
        )
    stack: list[Any] = []
    for layer, kind in enumerate(said.layer_types):
        if kind not in KINDS:
            raise ValueError(f"layer_types: {kind!r} cannot be converted; {' and '.join(KINDS)} can")
        mixer = _lightning(said, layer) if kind == "linear_attention" else _attention(said)
        stack += [mixer, decoder.mixture(config, said.intermediate_size, renormalise=True)]
    for block in stack:
        names = {"skip": "alpha", "scale": "beta"}
        block["residual"] = {
            ours: getattr(said, f"{FACTORS[block['kind']]}_{theirs}_factor") for ours, theirs in names.items()
        }
    return decoder.decoder(config, stack, norm_position="post", embedding_norm=True)


def _lightning(said: Any, layer: int) -> dict[str, Any]:
    if said.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"hidden_act={said.hidden_act!r} cannot be converted: queries, keys and values of linear_attention layers "
            "here go through silu"
        )
    return {
        "kind": "lightning_attention",
        "heads": said.num_attention_heads,
        "head_dim": said.head_dim or said.hidden_size // said.num_attention_heads,
        "layer": layer,
        "layers": said.num_hidden_layers,
        "norm_eps": 1e-6,  # whatever rms_norm_eps says
    }


def _attention(said: Any) -> dict[str, Any]:
    return decoder.attention(said, window=said.sliding_window)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a MiniMax configuration: what the first block of a kind says, for all of that kind."""
    pairs = decoder.layers(config, ["moe"], list(KINDS.values()))
    names = {ours: theirs for theirs, ours in KINDS.items()}
    first = {spec.kind: spec for spec in reversed(config.blocks())}
    mixture, made = decoder.mixture_fields(first["moe"], config.width)
    found = decoder.outer_fields(config, len(pairs)) | mixture
    found |= {
        "intermediate_size": made.experts.hidden,
        "layer_types": [names[mixer.kind] for mixer, _ in pairs],
        "router_jitter_noise": 0.0,
    }
    for kind, spec in first.items():
        found |= {f"{FACTORS[kind]}_alpha_factor": spec.skip, f"{FACTORS[kind]}_beta_factor": spec.scale}
    if "lightning_attention" in first:
        lightning: LightningAttention = decoder.on_meta(first["lightning_attention"], config.width)
        found |= {"num_attention_heads": lightning.heads, "head_dim": lightning.head_dim}
        found["num_key_value_heads"] = lightning.heads  # read in layers of full attention alone
    if "gqa" in first:
        found |= _attention_fields(config, pairs)
    return found


def _attention_fields(config: ModelConfig, pairs: Sequence[tuple[BlockSpec, BlockSpec]]) -> dict[str, Any]:
    common, made = decoder.fields(config, [pair for pair in pairs if pair[0].kind == "gqa"])
    said = ("num_attention_heads", "num_key_value_heads", "rope_parameters", "attention_dropout")
    return {name: common[name] for name in said} | {"head_dim": made.head_dim, "sliding_window": made.window}


# Names ----------------------------------------------------------------------------------------------------------


def names(model: LanguageModel) -> list[Entry]:
    """The table of names. A norm after a sum is what theirs has in front of the next block."""
    depth = len(model.residuals)
    found = [
        same("embedding.weight", decoder.EMBEDDING),
        same("embedding_norm.weight", "model.layers.0.input_layernorm.weight"),
    ]
    if not model.config.tied_embeddings:
        found.append(same("head.weight", decoder.HEAD))
    for index, residual in enumerate(model.residuals):
        ours, theirs = f"blocks.{index}", f"model.layers.{index // 2}"
        layer, norm = residual.block, f"{theirs}.post_attention_layernorm"
        if isinstance(layer, MoE):
            norm = f"model.layers.{index // 2 + 1}.input_layernorm" if index + 1 < depth else "model.norm"
            found += decoder.mixture_names(f"{ours}.block", f"{theirs}.{CALLED.inside}", layer, CALLED)
        elif isinstance(layer, LightningAttention):
            found += _lightning_names(f"{ours}.block", f"{theirs}.self_attn", layer)
        elif isinstance(layer, GQA):
            found += decoder.attention_names(f"{ours}.block", f"{theirs}.self_attn", layer)
        found.append(same(f"{ours}.norm.weight", f"{norm}.weight"))
    return found


def _lightning_names(ours: str, theirs: str, layer: LightningAttention) -> list[Entry]:
    """Their qkv_proj holds for each head its query, its key and its value; ours all queries, keys, values and gates."""
    heads, size = layer.heads, layer.head_dim

    def join(parts: Sequence[Tensor]) -> Tensor:
        qkv, gate = parts
        return torch.cat([qkv.unflatten(0, (heads, 3, size)).transpose(0, 1).flatten(0, 2), gate])

    def split(whole: Tensor) -> list[Tensor]:
        qkv, gate = whole.split([3 * heads * size, heads * size])
        return [qkv.unflatten(0, (3, heads, size)).transpose(0, 1).flatten(0, 2), gate]

    return [
        Entry(f"{ours}.in_proj.weight", (f"{theirs}.qkv_proj.weight", f"{theirs}.output_gate.weight"), join, split),
        *(same(f"{ours}.{name}.weight", f"{theirs}.{name}.weight") for name in ("norm", "out_proj")),
    ]


FAMILY = Family(
    config_class=MiniMaxConfig,
    architecture="MiniMaxForCausalLM",
    read=read,
    write=write,
    names=names,
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
    # Decays, which its blocks make anew where a file lacks them (and round, where a file holds them in bfloat16).
    derived=tuple(
        f"model.layers.*.self_attn.{name}" for name in ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    ),
)
