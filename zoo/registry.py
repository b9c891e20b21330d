"""kind -> "module:Class", imported when first asked for. Adding a block is a file and one line here."""

import importlib
import inspect
from typing import Any

from zoo.block import Block
from zoo.layers.spelling import nearest

KINDS: dict[str, str] = {
    # attention
    "gqa": "zoo.attention.gqa:GQA",
    "linformer": "zoo.attention.linformer:Linformer",
    "flurka": "zoo.attention.flurka:Flurka",
    "low_rank_transformer": "zoo.attention.low_rank:LowRankTransformer",
    "luna": "zoo.attention.luna:Luna",
    "set_transformer": "zoo.attention.set_transformer:ISAB",
    "mla": "zoo.attention.mla:MLA",
    "funnel": "zoo.attention.funnel:Funnel",
    "linear_attention": "zoo.attention.linear_attention:LinearAttention",
    "performer": "zoo.attention.performer:Performer",
    "rfa": "zoo.attention.rfa:RFA",
    "polysketch": "zoo.attention.polysketch:PolySketch",
    "sparse": "zoo.attention.sparse:Sparse",
    # feed-forward
    "swiglu": "zoo.layers.ffn:SwiGLU",
    "geglu": "zoo.layers.ffn:GEGLU",
    "mlp": "zoo.layers.ffn:MLP",
    # state space
    "s4d": "zoo.ssm.s4d:S4D",
    "dss": "zoo.ssm.dss:DSS",
    "lssl": "zoo.ssm.lssl:LSSL",
    "s4": "zoo.ssm.s4:S4",
    "liquid_s4": "zoo.ssm.liquid_s4:LiquidS4",
    "s5": "zoo.ssm.s5:S5",
    "gss": "zoo.ssm.gss:GSS",
    "gated_conv": "zoo.ssm.gated_conv:GatedConvolution",
    "mamba": "zoo.ssm.mamba:Mamba",
    "hyena": "zoo.ssm.hyena:Hyena",
    "hyena_modal": "zoo.ssm.hyena_modal:HyenaModal",
    "mamba2": "zoo.ssm.mamba2:Mamba2",
    "bst": "zoo.ssm.bst:BST",
    "dense_mamba": "zoo.ssm.dense_mamba:DenseMamba",
    "h3": "zoo.ssm.h3:H3",
    "bigs": "zoo.ssm.bigs:BiGS",
    "mamba3": "zoo.ssm.mamba3:Mamba3",
    # recurrence
    "aft": "zoo.recurrent.aft:AFT",
    "rwkv4": "zoo.recurrent.rwkv4:RWKV4",
    "rg_lru": "zoo.recurrent.rg_lru:RGLRU",
    "retnet": "zoo.recurrent.retnet:RetNet",
    "lightning_attention": "zoo.recurrent.lightning:LightningAttention",
    "gla": "zoo.recurrent.gla:GLA",
    "hgrn2": "zoo.recurrent.hgrn2:HGRN2",
    "delta_net": "zoo.recurrent.delta_net:DeltaNet",
    "gated_delta_net": "zoo.recurrent.gated_delta_net:GatedDeltaNet",
    "kda": "zoo.recurrent.kda:KDA",
    "mlstm": "zoo.recurrent.mlstm:MLSTM",
    "slstm": "zoo.recurrent.slstm:SLSTM",
    "rwkv4_channel_mix": "zoo.recurrent.rwkv4:RWKV4ChannelMix",
    "rwkv6": "zoo.recurrent.rwkv6:RWKV6",
    "rwkv6_channel_mix": "zoo.recurrent.rwkv6_channel_mix:RWKV6ChannelMix",
    "rwkv7": "zoo.recurrent.rwkv7:RWKV7",
    "rwkv7_channel_mix": "zoo.recurrent.rwkv7_channel_mix:RWKV7ChannelMix",
    # mixture of experts
    "moe": "zoo.moe.moe:MoE",
    # structure
    "learned_position": "zoo.layers.learned_position:LearnedPosition",
    "parallel": "zoo.layers.parallel:Parallel",
}


def kinds() -> tuple[str, ...]:
    """Every registered kind."""
    return tuple(KINDS)


def block_class(kind: str) -> type[Block]:
    """The class of a kind. An unknown kind is a KeyError-like ValueError that suggests the nearest."""
    if kind not in KINDS:
        raise ValueError(f"unknown block kind {kind!r}{nearest(kind, KINDS)}. Known kinds: {', '.join(KINDS)}")
    module, name = KINDS[kind].split(":")
    return getattr(importlib.import_module(module), name)


def options(kind: str) -> dict[str, inspect.Parameter]:
    """The options a kind takes, with their defaults and types."""
    parameters = dict(inspect.signature(block_class(kind)).parameters)
    parameters.pop("width", None)
    return parameters


def block(kind: str, width: int, **chosen: Any) -> Block:
    """Build a block: `zoo.block("mamba", 256, state_size=16)`. Every option has a default.

    Raises ValueError that names the unknown kind or option and the nearest known one.
    """
    cls = block_class(kind)
    known = options(kind)
    for name in chosen:
        if name not in known:
            raise ValueError(
                f"block kind {kind!r} has no option {name!r}{nearest(name, known)}. Its options: {', '.join(known)}"
            )
    return cls(width, **chosen)
