"""Jamba, Bamba and Granite 4 checkpoints against transformers: logits, generation, and the way back."""

import copy
import inspect

import pytest
import torch
import transformers
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated

from tests.convert.peer import differences, equals_transformers, in_float64, there_and_back, tokens_and_masks
from tests.test_config import PUBLISHED
from zoo.config import preset
from zoo.convert.family import spelled_out
from zoo.convert.granitemoehybrid import inverse
from zoo.convert.published import family, target_config
from zoo.hf import ZooConfig

SIZES = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 27,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "mamba_d_state": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 5,
}
DUAL = {"mamba_n_heads": 4, "mamba_chunk_size": 7}
# transformers 5.17 has one gated norm over all groups, which is wrong for more than one.
GROUPS = 2 if "group_size" in inspect.signature(GraniteMoeHybridRMSNormGated).parameters else 1
YARN = {"rope_type": "yarn", "rope_theta": 70.0, "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "jamba": (
        "Jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 3}
        | {"expert_layer_period": 2, "expert_layer_offset": 0, "router_aux_loss_coef": 0.3},
    ),
    "jamba, dense, tied": (
        "Jamba",
        {"attn_layer_period": 3, "attn_layer_offset": 0, "num_experts": 1, "tie_word_embeddings": True}
        | {"mamba_d_conv": 3, "mamba_expand": 3, "mamba_dt_rank": 7, "mamba_conv_bias": False}
        | {"rms_norm_eps": 0.01, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "swish"},
    ),
    "jamba, no attention": ("Jamba", {"num_hidden_layers": 2, "num_experts": 3, "num_experts_per_tok": 1}),
    "bamba": ("Bamba", DUAL | {"attn_layer_indices": [1], "mamba_n_groups": GROUPS, "z_loss_coefficient": 0.1}),
    "bamba, biases, tied": (
        "Bamba",
        DUAL
        | {"attn_layer_indices": [0, 1], "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
        | {"mamba_conv_bias": False, "mamba_d_conv": 3, "rms_norm_eps": 0.01, "mamba_expand": 4, "mamba_d_head": 20},
    ),
    "bamba, limited steps, yarn": (
        "Bamba",
        DUAL | {"attn_layer_indices": [2], "time_step_limit": [0.3, 0.9], "rope_parameters": YARN},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        DUAL
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "mamba_n_groups": GROUPS}
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 11, "logits_scaling": 6.0}
        | {"embedding_multiplier": 12, "residual_multiplier": 0.22, "attention_multiplier": 0.3},
    ),
    "granitemoehybrid, dense, rotary": (
        "GraniteMoeHybrid",
        DUAL
        | {"layer_types": ["full_attention", "linear_attention", "full_attention"], "mamba_conv_bias": False}
        | {"num_local_experts": 0, "shared_intermediate_size": 11, "logits_scaling": 49, "attention_bias": True}
        | {"position_embedding_type": "rope", "rope_parameters": YARN, "tie_word_embeddings": True}
        | {"num_attention_heads": 2, "num_key_value_heads": 2, "mamba_d_conv": 2, "rms_norm_eps": 0.01},
    ),
    "granitemoehybrid, attention alone": (
        "GraniteMoeHybrid",
        DUAL
        | {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2, "hidden_act": "gelu"}
        | {"num_local_experts": 3, "num_experts_per_tok": 1, "shared_intermediate_size": 11, "head_dim": 6},
    ),
}
BIASED = {
    "jamba, biases": ("Jamba", {"num_experts": 1, "mamba_proj_bias": True}),
    "bamba, biases": ("Bamba", DUAL | {"mamba_proj_bias": True}),
    "granitemoehybrid, biases": ("GraniteMoeHybrid", DUAL | {"mamba_proj_bias": True, "num_local_experts": 0}),
}
TYPES = {"Jamba": "jamba", "Bamba": "bamba", "GraniteMoeHybrid": "granitemoehybrid"}


def marked(chosen):
    return pytest.mark.parametrize(("name", "options"), chosen.values(), ids=chosen)


def config_of(name, options, **more):
    only = {"use_mamba_kernels": False} if name == "Jamba" else {}  # transformers 5.17 insists on them otherwise
    # Copied: Bamba's class writes into the rope_parameters that it is given.
    return getattr(transformers, f"{name}Config")(**copy.deepcopy(SIZES | only | options), **more)


@marked(CASES)
def test_logits_and_generation_equal_transformers(name, options):
    """transformers' path of Mamba-2 for one token leaves time_step_limit out, and its cache fails where no layer has
    attention: then without its cache."""
    # Of its experts' implementations only this one takes float64.
    config = config_of(name, options, attn_implementation="eager", experts_implementation="eager")
    attends = name != "Jamba" or "attention" in config.layers_block_type
    equals_transformers(config, cached=attends and "time_step_limit" not in options)


@marked(BIASED)
def test_padding_on_the_left_is_as_none(name, options):
    """With mamba_proj_bias transformers' convolution reads in_proj's bias at padding on the left, where a text without
    padding has zeros. Ours are as transformers' without padding."""
    config = config_of(name, options, attn_implementation="eager")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        found, theirs, ours = differences(config, dtype)
        assert max(found["plain"], found["right"]) < tolerance, found
    tokens, masks = tokens_and_masks(config.vocab_size)
    with torch.no_grad():
        logits = ours(tokens, attention_mask=masks["left"]).logits
    for row, mask in enumerate(masks["left"]):
        with in_float64(), torch.no_grad():
            wanted = theirs(tokens[row : row + 1, mask == 1], use_cache=False).logits[0]
        assert (logits[row, mask == 1] - wanted).abs().max() < 1e-9 * wanted.abs().max()


@marked(CASES | BIASED)
def test_there_and_back_is_bitwise_the_same(name, options, tmp_path):
    there_and_back(config_of(name, options, initializer_range=0.1, bos_token_id=3), tmp_path)


@marked(CASES | BIASED)
def test_a_model_made_here_can_be_written(name, options):
    """What is read from a configuration needs no original to be written again."""
    kind = family(TYPES[name])
    described = kind.read(config_of(name, options))
    found, config = target_config(ZooConfig(model=described), kind.model_type)
    assert config.architectures == [found.architecture] == [f"{name}ForCausalLM"]
    assert spelled_out(found.read(config)) == spelled_out(described)
    given = config_of(name, options)
    with torch.device("meta"):
        theirs = [getattr(transformers, f"{name}ForCausalLM")(each) for each in (config, given)]
    shapes = [{name: each.shape for name, each in model.state_dict().items()} for model in theirs]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("name", "model_type"), [("jamba-v0.1", "jamba"), ("bamba-9b", "bamba")])
def test_presets_can_be_written(name, model_type):
    kind, config = target_config(ZooConfig(model=preset(name)), model_type)
    assert kind.model_type == model_type
    with torch.device("meta"):
        assert transformers.AutoModelForCausalLM.from_config(config).num_parameters() == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Jamba", {"hidden_act": "gelu"}, "hidden_act='gelu' cannot be converted: the convolution of Mamba layers"),
        ("Jamba", {"attention_dropout": 0.1}, "attention_dropout=0.1 has no counterpart"),
        ("Bamba", {"hidden_act": "relu"}, "hidden_act='relu' cannot be converted"),
        ("Bamba", {"attn_layer_indices": [1], "attention_dropout": 0.1}, "attention_dropout=0.1 has no counterpart"),
        ("GraniteMoeHybrid", {"hidden_act": "relu"}, "hidden_act='relu' cannot be converted"),
        ("GraniteMoeHybrid", {"logits_scaling": 0}, "logits_scaling=0 leaves nothing of the model"),
        ("GraniteMoeHybrid", {"residual_multiplier": 0.0}, "residual_multiplier=0.0 leaves nothing of the model"),
        (
            "GraniteMoeHybrid",
            {"position_embedding_type": "alibi"},
            "position_embedding_type='alibi' cannot be converted",
        ),
    ],
)
def test_options_without_counterpart_are_named(name, options, message):
    more = {} if name == "Jamba" else DUAL
    with pytest.raises(ValueError, match=message):
        family(TYPES[name]).read(config_of(name, more | options))


MAMBA = {"kind": "mamba", "inner_norm": True, "inner_norm_eps": 1e-6}


@pytest.mark.parametrize(
    ("name", "mixers", "changed", "message"),
    [
        ("jamba", ["gqa", "gqa", MAMBA], {}, r"layers \[0, 1\] have attention, which no period and offset tell"),
        ("jamba", ["mamba"], {}, r"blocks\[0\].inner_norm=False would become True"),
        ("jamba", [{"kind": "gqa", "position": {"kind": "rotary"}}], {}, r"blocks\[0\].position=.* would become None"),
        ("jamba", [MAMBA], {"norm_eps": 0.1}, r"blocks\[0\].inner_norm_eps=1e-06 would become 0.1"),
        ("bamba", ["mamba"], {}, r"stack\[0\] is of kind mamba; its blocks are mamba2 or gqa, then"),
        ("bamba", [{"kind": "mamba2", "norm_eps": 1e-6}], {"logit_scale": 0.5}, "logit_scale=0.5 would become 1.0"),
        ("granitemoehybrid", ["gqa"], {}, r"blocks\[0\].scale=None would become 0.35"),
    ],
)
def test_what_a_format_cannot_hold_is_named(name, mixers, changed, message):
    stack = [block for mixer in mixers for block in (mixer, "swiglu")]
    config = {"vocab_size": 7, "width": 24, "stack": stack} | changed
    with pytest.raises(ValueError, match=f"the format '{name}' cannot hold this model: {message}"):
        target_config(ZooConfig(model=config), name)


@pytest.mark.parametrize("divisor", [1.0, 3.0, 6.0, 8.0, 16.0, 49.0, 0.3])
def test_a_divisor_is_found_again(divisor):
    assert inverse(1 / divisor) == divisor
