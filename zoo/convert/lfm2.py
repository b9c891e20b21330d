"""LFM2 (2511.23404): `Lfm2ForCausalLM`, gated short convolutions and, in some layers, attention."""

from typing import Any

from transformers import Lfm2Config

from zoo.attention.gqa import GQA
from zoo.config import ModelConfig
from zoo.convert import decoder
from zoo.convert.family import Entry, Family, same, taps
from zoo.model import LanguageModel
from zoo.ssm.gated_conv import GatedConvolution

KINDS = {"conv": "gated_conv", "full_attention": "gqa"}  # layer_types: our kind
# What published files hold beside their class' fields, of the code they were trained with: transformers reads past it.
LEFTOVERS = (
    *("block_dim", "block_norm_eps", "block_use_swiglu", "block_use_xavier_init", "block_mlp_init_scale"),
    *("block_out_init_scale", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "use_pos_enc"),
)


def read(config: Lfm2Config) -> ModelConfig:
    """The model that an LFM2 configuration describes."""
    said: Any = config
    mixers = {"conv": _convolution, "full_attention": _attention}
    unit = {"kind": "swiglu", "hidden": hidden(said)}
    stack: list[Any] = []
    for kind in said.layer_types:
        if kind not in mixers:
            raise ValueError(f"layer_types: {kind!r} cannot be converted; {' and '.join(mixers)} can")
        stack += [mixers[kind](said), unit]
    return ModelConfig(
        vocab_size=said.vocab_size,
        width=said.hidden_size,
        stack=stack,
        norm_eps=said.norm_eps,
        tied_embeddings=said.tie_word_embeddings,
        init_std=said.initializer_range,
    )


def hidden(said: Any) -> int:
    """The feed-forward block's size: two thirds of `intermediate_size`, stretched and rounded up, or just that."""
    if not said.block_auto_adjust_ff_dim:
        return said.intermediate_size
    size, multiple = int(said.block_ffn_dim_multiplier * int(2 * said.intermediate_size / 3)), said.block_multiple_of
    return -(-size // multiple) * multiple


def _convolution(said: Any) -> dict[str, Any]:
    return {"kind": "gated_conv", "conv_width": said.conv_L_cache, "bias": said.conv_bias}


def _attention(said: Any) -> dict[str, Any]:
    return decoder.attention(said, qk_norm="rms", qk_norm_eps=said.norm_eps)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of an LFM2 configuration: what the first block of a kind says, for all of that kind."""
    pairs = decoder.layers(config, ["swiglu"], list(KINDS.values()))
    names = {ours: theirs for theirs, ours in KINDS.items()}
    first = {mixer.kind: mixer for mixer, _ in reversed(pairs)}
    found: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(pairs),
        "layer_types": [names[mixer.kind] for mixer, _ in pairs],
        "norm_eps": decoder.eps(config),
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
        "intermediate_size": decoder.unit_fields(pairs[0][1], config.width)["intermediate_size"],
        "block_auto_adjust_ff_dim": False,
    }
    if "gated_conv" in first:
        made: GatedConvolution = decoder.on_meta(first["gated_conv"], config.width)
        found |= {"conv_L_cache": made.conv.taps, "conv_bias": made.conv.bias is not None}
    if "gqa" in first:
        common, attends = decoder.fields(config, [pair for pair in pairs if pair[0].kind == "gqa"])
        said = ("num_attention_heads", "num_key_value_heads", "rope_parameters")
        found |= {name: common[name] for name in said} | {"head_dim": attends.head_dim}
    return found


def names(model: LanguageModel) -> list[Entry]:
    """The table of names."""
    found = decoder.outer_names(model, "model.embedding_norm.weight")
    for index, residual in enumerate(model.residuals):
        ours, theirs = f"blocks.{index}", f"model.layers.{index // 2}"
        layer, norm = residual.block, "operator_norm"
        if isinstance(layer, GQA):
            norms = ("q_layernorm", "k_layernorm")
            found += decoder.attention_names(f"{ours}.block", f"{theirs}.self_attn", layer, "out_proj", norms)
        elif isinstance(layer, GatedConvolution):
            found += _convolution_names(f"{ours}.block", f"{theirs}.conv", layer)
        else:
            norm = "ffn_norm"
            found += decoder.unit_names(f"{ours}.block", f"{theirs}.feed_forward", layer, ("w1", "w3", "w2"))
        found.append(same(f"{ours}.norm.weight", f"{theirs}.{norm}.weight"))
    return found


def _convolution_names(ours: str, theirs: str, layer: GatedConvolution) -> list[Entry]:
    rest = [name for name, _ in layer.named_parameters() if name != "conv.weight"]
    found = [same(f"{ours}.{name}", f"{theirs}.{name}") for name in rest]
    return [*found, taps(f"{ours}.conv.weight", f"{theirs}.conv.weight")]


FAMILY = Family(
    config_class=Lfm2Config,
    architecture="Lfm2ForCausalLM",
    read=read,
    write=write,
    names=names,
    embedding=decoder.EMBEDDING,
    head=decoder.HEAD,
    more=("head_dim", *LEFTOVERS),
)
