"""Jamba (2403.19887): `JambaForCausalLM`, Mamba with norms inside, attention without positions, some mixtures."""

from collections.abc import Sequence
from typing import Any

from transformers import JambaConfig

from zoo.attention.gqa import GQA
from zoo.config import ModelConfig
from zoo.convert import decoder, hybrid, mamba_parts
from zoo.convert.family import Entry, Family, same
from zoo.model import LanguageModel
from zoo.moe.moe import MoE
from zoo.ssm.mamba import Mamba


def read(config: JambaConfig) -> ModelConfig:
    """The model that a Jamba configuration describes."""
    said: Any = config
    decoder.refuse_dropout(said)
    attention = {
        "kind": "gqa",
        "heads": said.num_attention_heads,
        "kv_heads": said.num_key_value_heads,
        "head_dim": said.hidden_size // said.num_attention_heads,
        "position": None,
    }
    stack: list[Any] = []
    for kind, experts in zip(said.layers_block_type, said.layers_num_experts, strict=True):
        mixed = decoder.mixture(said, said.intermediate_size, renormalise=False)
        stack += [
            attention if kind == "attention" else hybrid.selective(said),
            mixed if experts > 1 else decoder.gated_unit(said),
        ]
    return decoder.decoder(config, stack)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a Jamba configuration: what the first block of a kind says, for all of that kind."""
    pairs = decoder.layers(config, ["moe", "swiglu", "geglu"], ["mamba", "gqa"])
    first = hybrid.first_of(config.blocks())
    attends = places("attention", [mixer.kind == "gqa" for mixer, _ in pairs])
    mixed = places("a mixture", [feed.kind == "moe" for _, feed in pairs])
    found = decoder.outer_fields(config, len(pairs)) | {
        "attn_layer_period": attends[0],
        "attn_layer_offset": attends[1],
        "expert_layer_period": mixed[0],
        "expert_layer_offset": mixed[1],
        "num_experts": 1,
        "use_mamba_kernels": False,  # transformers before 5.20 would insist on them
    }
    if "gqa" in first:
        made: GQA = decoder.on_meta(first["gqa"], config.width)
        found |= {"num_attention_heads": made.heads, "num_key_value_heads": made.kv_heads, "attention_dropout": 0.0}
    if unit := first.get("swiglu", first.get("geglu")):
        found |= decoder.unit_fields(unit, config.width)
    if "moe" in first:
        mixture, experts = decoder.mixture_fields(first["moe"], config.width)
        found |= mixture | {"intermediate_size": experts.experts.hidden}
    if "mamba" in first:
        found |= hybrid.selective_fields(first["mamba"], config.width)
    return found


def places(what: str, found: Sequence[bool]) -> tuple[int, int]:
    """Period and offset of the layers that have something. Raises ValueError for layers that no period tells."""
    having = [layer for layer, each in enumerate(found) if each]
    if not having:
        return len(found) + 1, len(found)
    period = having[1] - having[0] if len(having) > 1 else max(len(found), having[0] + 1)
    if having != list(range(having[0], len(found), period)) or having[0] >= period:
        raise ValueError(f"layers {having} have {what}, which no period and offset tell")
    return period, having[0]


def names(model: LanguageModel) -> list[Entry]:
    """The table of names."""
    found = decoder.outer_names(model, "model.final_layernorm.weight")
    for index, residual in enumerate(model.residuals):
        ours, theirs = f"blocks.{index}", f"model.layers.{index // 2}"
        layer, norm = residual.block, "input_layernorm"
        inside = (f"{ours}.block", f"{theirs}.feed_forward")
        if isinstance(layer, GQA):
            found += decoder.attention_names(f"{ours}.block", f"{theirs}.self_attn", layer)
        elif isinstance(layer, Mamba):
            found += mamba_parts.mixer(f"{ours}.block", f"{theirs}.mamba", layer)
        elif isinstance(layer, MoE):
            norm = "pre_ff_layernorm"
            router, *experts = decoder.mixture_names(*inside, layer)
            found += [same(router.ours, f"{inside[1]}.router.weight"), *experts]
        else:
            norm = "pre_ff_layernorm"
            found += decoder.unit_names(*inside, layer)
        found.append(same(f"{ours}.norm.weight", f"{theirs}.{norm}.weight"))
    return found


FAMILY = Family(
    config_class=JambaConfig,
    architecture="JambaForCausalLM",
    read=read,
    write=write,
    names=names,
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
)
