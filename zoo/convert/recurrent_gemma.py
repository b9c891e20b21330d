"""RecurrentGemma (2404.07839): `RecurrentGemmaForCausalLM`, RG-LRU and attention with a window in a pattern."""

from typing import Any

import torch
from transformers import RecurrentGemmaConfig

from zoo.attention.gqa import GQA
from zoo.config import ModelConfig
from zoo.convert import decoder
from zoo.convert.family import Entry, Family, same, taps
from zoo.model import LanguageModel
from zoo.recurrent.rg_lru import RGLRU

KINDS = {"recurrent": "rg_lru", "attention": "gqa"}  # block_types: our kind
ACTIVATION = "gelu_pytorch_tanh"  # of the recurrent block, whose ours has no other, and of the gated units
# Ours in a recurrent block: theirs.
RECURRENT = {
    "y_proj.weight": "linear_y.weight",
    "y_proj.bias": "linear_y.bias",
    "x_proj.weight": "linear_x.weight",
    "x_proj.bias": "linear_x.bias",
    "conv.bias": "conv_1d.bias",
    "input_gate.weight": "rg_lru.input_gate_weight",
    "input_gate.bias": "rg_lru.input_gate_bias",
    "decay_gate.weight": "rg_lru.recurrent_gate_weight",
    "decay_gate.bias": "rg_lru.recurrent_gate_bias",
    "Lambda": "rg_lru.recurrent_param",
    "out_proj.weight": "linear_out.weight",
    "out_proj.bias": "linear_out.bias",
}


def read(config: RecurrentGemmaConfig) -> ModelConfig:
    """The model that a RecurrentGemma configuration describes."""
    said: Any = config
    if said.hidden_activation != ACTIVATION:
        raise ValueError(f"hidden_activation={said.hidden_activation!r} cannot be converted; {ACTIVATION} can")
    if not said.logits_soft_cap or said.logits_soft_cap < 0:
        raise ValueError(f"logits_soft_cap={said.logits_soft_cap} divides the logits; it must be positive")
    unit = {"kind": "geglu", "hidden": said.intermediate_size // 2, "bias": True, "approximate": "tanh"}
    stack: list[Any] = []
    for kind in _kinds(said):
        stack += [_recurrent(said) if kind == "rg_lru" else _attention(said), unit]
    return ModelConfig(
        vocab_size=said.vocab_size,
        width=said.hidden_size,
        stack=stack,
        norm="rms_zero_centered",
        norm_eps=said.rms_norm_eps,
        embedding_scale=scale(said.hidden_size),
        tied_embeddings=said.tie_word_embeddings,
        logit_softcap=said.logits_soft_cap,
        init_std=_digits((said.w_init_variance_scale / said.conv1d_width) ** 0.5),  # transformers' own start
    )


def scale(width: int) -> float:
    """The factor on the embedding: √width as bfloat16 rounds it, whatever the model's dtype."""
    return torch.tensor(width**0.5, dtype=torch.bfloat16).item()


def _digits(number: float) -> float:
    """Twelve digits of a number, so that the root of its square is the number itself."""
    return float(f"{number:.12g}")


def _kinds(said: Any) -> list[str]:
    """Our kind of each layer's mixer."""
    if not said.block_types:
        raise ValueError(f"block_types={said.block_types!r} names no block; give recurrent or attention")
    for name in said.block_types:
        if name not in KINDS:
            raise ValueError(f"block_types: {name!r} cannot be converted; {' and '.join(KINDS)} can")
    pattern = [KINDS[name] for name in said.block_types]
    return [pattern[layer % len(pattern)] for layer in range(said.num_hidden_layers)]


def _recurrent(said: Any) -> dict[str, Any]:
    return {
        "kind": "rg_lru",
        "inner": said.lru_width,
        "heads": said.num_attention_heads,
        "conv_width": said.conv1d_width,
    }


def _attention(said: Any) -> dict[str, Any]:
    kind = said.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise ValueError(
            f"rope_parameters: rope_type={kind!r} cannot be converted; RecurrentGemma has none but default"
        )
    biases = {"bias": said.attention_bias, "out_bias": True}
    return decoder.attention(said, partial=True, window=said.attention_window_size, **biases)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a RecurrentGemma configuration: what the first block of a kind says, for all of that kind."""
    if config.logit_softcap is None:
        raise ValueError("logit_softcap=None: its logits are always capped")
    pairs = decoder.layers(config, ["geglu"], list(KINDS.values()))
    names = {ours: theirs for theirs, ours in KINDS.items()}
    first = {mixer.kind: (mixer, feed) for mixer, feed in reversed(pairs)}
    unit = decoder.unit_fields(pairs[0][1], config.width)
    found: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(pairs),
        "block_types": [names[mixer.kind] for mixer, _ in pairs],
        "intermediate_size": 2 * unit["intermediate_size"],
        "hidden_activation": unit["hidden_act"],
        "rms_norm_eps": decoder.eps(config),
        "tie_word_embeddings": config.tied_embeddings,
        "logits_soft_cap": config.logit_softcap,
    }
    conv_width = 4  # the class' own
    if "rg_lru" in first:
        recurrent: RGLRU = decoder.on_meta(first["rg_lru"][0], config.width)
        conv_width = recurrent.conv.taps
        found |= {"lru_width": recurrent.inner, "num_attention_heads": recurrent.heads, "num_key_value_heads": None}
    if "gqa" in first:
        common, attends = decoder.fields(config, [first["gqa"]])
        said = ("num_attention_heads", "num_key_value_heads", "attention_dropout")
        found |= {name: common[name] for name in said}
        found |= {
            "rope_parameters": {"partial_rotary_factor": 1.0} | common["rope_parameters"],  # the class' own is 0.5
            "head_dim": attends.head_dim,
            "attention_window_size": attends.window,
            "attention_bias": attends.qkv.bias is not None,
        }
    return found | {"conv1d_width": conv_width, "w_init_variance_scale": _digits(config.init_std**2 * conv_width)}


def names(model: LanguageModel) -> list[Entry]:
    """The table of names."""
    found = decoder.outer_names(model, "model.final_norm.weight")
    for index, residual in enumerate(model.residuals):
        ours, theirs = f"blocks.{index}", f"model.layers.{index // 2}"
        layer, norm = residual.block, "temporal_pre_norm"
        if isinstance(layer, GQA):
            found += decoder.attention_names(f"{ours}.block", f"{theirs}.temporal_block", layer)
        elif isinstance(layer, RGLRU):
            found += _recurrent_names(f"{ours}.block", f"{theirs}.temporal_block")
        else:
            norm = "channel_pre_norm"
            found += decoder.unit_names(f"{ours}.block", f"{theirs}.mlp_block", layer)
        found.append(same(f"{ours}.norm.weight", f"{theirs}.{norm}.weight"))
    return found


def _recurrent_names(ours: str, theirs: str) -> list[Entry]:
    found = [same(f"{ours}.{mine}", f"{theirs}.{each}") for mine, each in RECURRENT.items()]
    return [*found, taps(f"{ours}.conv.weight", f"{theirs}.conv_1d.weight")]


FAMILY = Family(
    config_class=RecurrentGemmaConfig,
    architecture="RecurrentGemmaForCausalLM",
    read=read,
    write=write,
    names=names,
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
)
