"""Granite 4: `GraniteMoeHybridForCausalLM`, Mamba-2 or attention, and experts beside a block that all tokens share.

Its four multipliers are on the embedding, on what each block adds to the stream, on q·k and (a divisor) on the logits.
"""

from typing import Any

import torch
from transformers import GraniteMoeHybridConfig

from zoo.attention.gqa import GQA
from zoo.config import BlockSpec, ModelConfig
from zoo.convert import decoder, hybrid, mamba_parts
from zoo.convert.family import Entry, Family, same
from zoo.convert.rope import from_position
from zoo.model import LanguageModel
from zoo.moe.moe import MoE
from zoo.ssm.mamba2 import Mamba2

ATTENTION = ("attention", "full_attention")  # layer_types; the others are Mamba-2


def read(config: GraniteMoeHybridConfig) -> ModelConfig:
    """The model that a Granite configuration describes."""
    said: Any = config
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"):
        if not getattr(said, name):
            raise ValueError(f"{name}={getattr(said, name)} leaves nothing of the model; give a number other than 0")
    if said.position_embedding_type not in (None, "rope", "nope"):
        raise ValueError(
            f"position_embedding_type={said.position_embedding_type!r} cannot be converted; 'rope' and null can"
        )
    stack: list[Any] = []
    for kind in said.layer_types:
        stack += [_attention(said) if kind in ATTENTION else hybrid.dual(said), _feed(said)]
    for block in stack:
        block["residual"] = {"skip": 1.0, "scale": said.residual_multiplier}
    return decoder.decoder(
        config, stack, embedding_scale=said.embedding_multiplier, logit_scale=1 / said.logits_scaling
    )


def _attention(said: Any) -> dict[str, Any]:
    found = decoder.attention(
        said, bias=said.attention_bias, out_bias=said.attention_bias, scale=said.attention_multiplier
    )
    return found if said.position_embedding_type == "rope" else found | {"position": None}


def _feed(said: Any) -> dict[str, Any]:
    unit = decoder.gated_unit(said) | {"hidden": said.shared_intermediate_size}
    if not said.num_local_experts:
        return unit
    return {
        "kind": "moe",
        "experts": said.num_local_experts,
        "top_k": said.num_experts_per_tok,
        "hidden": said.intermediate_size,
        "router": {"kind": "top_k", "renormalise": True},
        "expert": {name: value for name, value in unit.items() if name in ("kind", "approximate")},
        "shared_experts": 1,
        "shared_hidden": said.shared_intermediate_size,
        "load_balance": said.router_aux_loss_coef,
    }


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a Granite configuration: what the first block of a kind says, for all of that kind."""
    pairs = decoder.layers(config, ["moe", "swiglu", "geglu"], ["mamba2", "gqa"])
    first = hybrid.first_of(config.blocks())
    found = decoder.outer_fields(config, len(pairs)) | {
        "layer_types": ["full_attention" if mixer.kind == "gqa" else "linear_attention" for mixer, _ in pairs],
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": pairs[0][0].scale,
        "logits_scaling": inverse(config.logit_scale),
        "position_embedding_type": None,
        "num_local_experts": 0,
    }
    if unit := first.get("swiglu", first.get("geglu")):
        fields = decoder.unit_fields(unit, config.width)
        found |= {"shared_intermediate_size": fields["intermediate_size"], "hidden_act": fields["hidden_act"]}
    if "moe" in first:
        found |= _mixture_fields(first["moe"], config.width)
    if "gqa" in first:
        found |= _attention_fields(first["gqa"], config.width)
    return found | hybrid.dual_fields(first.get("mamba2"), config.width)


def _mixture_fields(spec: BlockSpec, width: int) -> dict[str, Any]:
    mixture, made = decoder.mixture_fields(spec, width)
    mixture["num_local_experts"] = mixture.pop("num_experts")
    return mixture | {"intermediate_size": made.experts.hidden, "shared_intermediate_size": made.shared_hidden}


def _attention_fields(spec: BlockSpec, width: int) -> dict[str, Any]:
    made: GQA = decoder.on_meta(spec, width)
    position = spec.options.get("position", {"kind": "rotary"})
    turned = {} if position is None else {"rope_parameters": from_position(position)}
    return turned | {
        "position_embedding_type": None if position is None else "rope",
        "num_attention_heads": made.heads,
        "num_key_value_heads": made.kv_heads,
        "head_dim": made.head_dim,
        "attention_bias": made.qkv.bias is not None,
        "attention_dropout": 0.0,
        "attention_multiplier": made.head_dim**-0.5 if made.scale is None else made.scale,
    }


def inverse(factor: float) -> float:
    """The divisor that is this factor, in few digits where they say it."""
    exact = 1 / factor
    short = float(f"{exact:.12g}")
    return short if 1 / short == factor else exact


# Names ----------------------------------------------------------------------------------------------------------


def names(model: LanguageModel) -> list[Entry]:
    """The table of names."""
    found = decoder.outer_names(model)
    for index, residual in enumerate(model.residuals):
        ours, theirs = f"blocks.{index}", f"model.layers.{index // 2}"
        layer, norm = residual.block, "input_layernorm"
        if isinstance(layer, GQA):
            found += decoder.attention_names(f"{ours}.block", f"{theirs}.self_attn", layer)
        elif isinstance(layer, Mamba2):
            found += mamba_parts.mixer(f"{ours}.block", f"{theirs}.mamba", layer)
        elif isinstance(layer, MoE):
            norm = "post_attention_layernorm"
            found += _mixture_names(f"{ours}.block", f"{theirs}.block_sparse_moe")
            found += _unit_names(f"{ours}.block.shared", f"{theirs}.shared_mlp")
        else:
            norm = "post_attention_layernorm"
            found += _unit_names(f"{ours}.block", f"{theirs}.shared_mlp")
        found.append(same(f"{ours}.norm.weight", f"{theirs}.{norm}.weight"))
    return found


def _unit_names(ours: str, theirs: str) -> list[Entry]:
    pairs = {"up": "input_linear", "down": "output_linear"}
    return [same(f"{ours}.{mine}.weight", f"{theirs}.{each}.weight") for mine, each in pairs.items()]


def _mixture_names(ours: str, theirs: str) -> list[Entry]:
    """Both stack all experts: ours input by output, theirs output by input."""

    def turned(mine: str, each: str) -> Entry:
        to = (f"{theirs}.{each}.weight",)
        return Entry(f"{ours}.experts.{mine}", to, lambda parts: _turn(parts[0]), lambda whole: [_turn(whole)])

    router = same(f"{ours}.router.weight", f"{theirs}.router.layer.weight")
    return [router, turned("up", "input_linear"), turned("down", "output_linear")]


def _turn(stacked: torch.Tensor) -> torch.Tensor:
    return stacked.mT.contiguous()


FAMILY = Family(
    config_class=GraniteMoeHybridConfig,
    architecture="GraniteMoeHybridForCausalLM",
    read=read,
    write=write,
    names=names,
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
    more=("head_dim",),
)
