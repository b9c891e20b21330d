"""What the formats with latent attention share (DeepSeek's, Kimi Linear): its options and fields, mixtures, names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zoo.attention.mla import MLA
from zoo.config import BlockSpec, ModelConfig
from zoo.convert import decoder
from zoo.convert.family import Entry, same
from zoo.convert.rope import to_position
from zoo.model import LanguageModel
from zoo.moe.moe import MoE
from zoo.moe.router_loss_free import LossFree

FEEDS = ("moe", "swiglu", "geglu")
# Coefficients of training in files: of the balancing loss (DeepSeek's own name; with seq_aux they weigh it in each
# sequence by itself, here it is over a batch), and how fast loss_free moves its bias (Megatron's name: no
# configuration of the published models holds it, since they are not trained on with it).
BALANCE, RATE = "aux_loss_alpha", "moe_router_bias_update_rate"
BIAS = "gate.e_score_correction_bias"


def needed(config: Any, name: str) -> Any:
    """A field that the class lets be None and its model does not. Raises ValueError there."""
    found = getattr(config, name)
    if found is None:
        raise ValueError(f"{name}=None says nothing, and {config.model_type} has no default for it; give a number")
    return found


def only(config: Any, **fixed: Any) -> None:
    """Raise ValueError for an option of files that transformers' model does not look at, where it says something else
    than what that model computes."""
    for name, wanted in fixed.items():
        found = getattr(config, name, wanted)
        if found is not None and found != wanted:
            raise ValueError(
                f"{name}={found!r} cannot be converted: transformers' model of {config.model_type} leaves it out and "
                f"computes as with {wanted!r}; set it to that where it says what the model is"
            )


# Attention ------------------------------------------------------------------------------------------------------


def attention(config: Any, position: Mapping[str, Any] | None) -> dict[str, Any]:
    """The mla block of a configuration. Raises ValueError for what has no counterpart."""
    decoder.refuse_dropout(config)
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads={config.num_key_value_heads} cannot be converted: latents make keys of all "
            f"num_attention_heads={config.num_attention_heads}; set it to that"
        )
    return {
        "kind": "mla",
        "heads": config.num_attention_heads,
        "kv_rank": config.kv_lora_rank,
        "q_rank": config.q_lora_rank,
        "nope_dim": config.qk_nope_head_dim,
        "rope_dim": config.qk_rope_head_dim,
        "value_dim": needed(config, "v_head_dim"),
        "position": position,
        "bias": config.attention_bias,
    }


def rotary(config: Any, layout: str) -> dict[str, Any]:
    """The position of a configuration; all qk_rope_head_dim components turn."""
    said = dict(config.rope_parameters or {})
    if (fraction := said.get("partial_rotary_factor") or 1) != 1:
        raise ValueError(
            f"rope_parameters: partial_rotary_factor={fraction} cannot be converted: all of "
            f"qk_rope_head_dim={config.qk_rope_head_dim} components turn; leave it out"
        )
    if config.head_dim != config.qk_rope_head_dim:
        raise ValueError(
            f"head_dim={config.head_dim} cannot be converted: it is how many components turn, which is "
            f"qk_rope_head_dim={config.qk_rope_head_dim}; leave it out"
        )
    return to_position(said) | {"layout": layout}


def attention_fields(spec: BlockSpec, width: int) -> dict[str, Any]:
    """The fields of an mla block but its position."""
    made: MLA = decoder.on_meta(spec, width)
    return {
        "num_attention_heads": made.heads,
        "num_key_value_heads": made.heads,
        "kv_lora_rank": made.kv_rank,
        "q_lora_rank": made.q_rank,
        "qk_nope_head_dim": made.nope_dim,
        "qk_rope_head_dim": made.rope_dim,
        "qk_head_dim": made.nope_dim + made.rope_dim,
        "head_dim": made.rope_dim,
        "v_head_dim": made.value_dim,
        "attention_bias": made.out.bias is not None,
        "attention_dropout": 0.0,
    }


# Mixtures -------------------------------------------------------------------------------------------------------


def mixture(config: Any, experts: int, router: Mapping[str, Any]) -> dict[str, Any]:
    """The moe block of a configuration. Raises ValueError for what has no counterpart."""
    unit, shared = decoder.gated_unit(config), needed(config, "n_shared_experts")
    if shared < 1:
        raise ValueError(
            f"n_shared_experts={shared} cannot be converted: the format's mixtures all have shared experts, without "
            "any it holds empty matrices; use at least 1"
        )
    return {
        "kind": "moe",
        "experts": experts,
        "top_k": needed(config, "num_experts_per_tok"),
        "hidden": config.moe_intermediate_size,
        "router": router,
        "expert": {name: value for name, value in unit.items() if name in ("kind", "approximate")},
        "shared_experts": shared,
        "load_balance": getattr(config, BALANCE, 0.0),
    }


def loss_free(config: Any) -> dict[str, Any]:
    """DeepSeek-V3's router."""
    return {
        "kind": "loss_free",
        "renormalise": bool(config.norm_topk_prob),
        "groups": needed(config, "n_group"),
        "top_groups": needed(config, "topk_group"),
        "scale": config.routed_scaling_factor,
        "update_rate": getattr(config, RATE, 0.0),
    }


def mixture_fields(spec: BlockSpec, width: int) -> dict[str, Any]:
    """The fields of a mixture in DeepSeek's names."""
    common, made = decoder.mixture_fields(spec, width)
    router: Any = made.router
    found = {
        "hidden_act": common["hidden_act"],
        "n_routed_experts": router.experts,
        "num_experts_per_tok": router.top_k,
        "moe_intermediate_size": made.experts.hidden,
        "n_shared_experts": spec.options.get("shared_experts", 0),
        "norm_topk_prob": getattr(router, "renormalise", False),
        "n_group": getattr(router, "groups", 1),
        "topk_group": getattr(router, "top_groups", 1),
        "routed_scaling_factor": getattr(router, "scale", 1.0),
        BALANCE: made.load_balance,
    }
    if isinstance(router, LossFree):
        found[RATE] = router.update_rate
    return found


def fields(config: ModelConfig, mixers: Sequence[str] = ("mla",)) -> tuple[dict[str, Any], dict[str, BlockSpec]]:
    """The fields that all these configurations have, in DeepSeek's names, and the first block of each kind, for all of
    that kind."""
    pairs = decoder.layers(config, FEEDS, mixers)
    first = {spec.kind: spec for spec in reversed(config.blocks())}
    mixed = [feed.kind == "moe" for _, feed in pairs]
    found = decoder.outer_fields(config, len(pairs))
    found["first_k_dense_replace"] = mixed.index(True) if any(mixed) else len(pairs)
    if "mla" in first:
        found |= attention_fields(first["mla"], config.width)
    if dense := next((first[kind] for kind in FEEDS[1:] if kind in first), None):
        found |= decoder.unit_fields(dense, config.width)
    if "moe" in first:
        found |= mixture_fields(first["moe"], config.width)
    return found, first


# Names ----------------------------------------------------------------------------------------------------------


def attention_names(ours: str, theirs: str, layer: MLA) -> list[Entry]:
    """An mla block."""
    parts = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "out": "o_proj"}
    if layer.q_down is None:
        parts |= {"q_up": "q_proj"}
    else:
        parts |= {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj"}
    return [
        same(f"{ours}.{mine}.{kind}", f"{theirs}.{part}.{kind}")
        for mine, part in parts.items()
        for kind, _ in getattr(layer, mine).named_parameters()
    ]


def names(
    model: LanguageModel,
    called: decoder.Mixture = decoder.Mixture(shared="shared_experts"),  # noqa: B008 (frozen)
    mixers: Mapping[type, Callable[[str, str, Any], list[Entry]]] = {MLA: attention_names},
) -> list[Entry]:
    """The table of names; `mixers` has the tables of those kinds that mix tokens."""
    found = decoder.outer_names(model)
    for index, residual in enumerate(model.residuals):
        ours, theirs = f"blocks.{index}", f"model.layers.{index // 2}"
        layer, norm = residual.block, "post_attention_layernorm"
        if type(layer) in mixers:
            norm = "input_layernorm"
            found += mixers[type(layer)](f"{ours}.block", f"{theirs}.self_attn", layer)
        elif isinstance(layer, MoE):
            found += decoder.mixture_names(f"{ours}.block", f"{theirs}.{called.inside}", layer, called)
            if isinstance(layer.router, LossFree):
                found.append(same(f"{ours}.block.router.bias", f"{theirs}.{called.inside}.{BIAS}"))
        else:
            found += decoder.unit_names(f"{ours}.block", f"{theirs}.mlp", layer)
        found.append(same(f"{ours}.norm.weight", f"{theirs}.{norm}.weight"))
    return found
