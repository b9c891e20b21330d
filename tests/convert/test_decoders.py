"""Mistral, Qwen, Mixtral and OLMoE checkpoints against transformers: logits, generation, and the way back."""

import pytest
import torch
import transformers

import zoo.convert
from tests.convert.peer import equals_transformers, there_and_back
from zoo.config import preset
from zoo.convert.family import spelled_out
from zoo.convert.published import family, target_config
from zoo.hf import ZooConfig

SIZES = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 27,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "eos_token_id": 5,
}
YARN = {"rope_type": "yarn", "rope_theta": 70.0, "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "mistral": ("Mistral", {"head_dim": 6, "sliding_window": 7, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "mistral, no window": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True, "hidden_act": "gelu"}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-5, "max_position_embeddings": 64}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2, tied, yarn": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "head_dim": 6, "sliding_window": 7}),
    "mixtral, one expert, gelu": ("Mixtral", {"num_experts_per_tok": 1, "hidden_act": "gelu_pytorch_tanh"}),
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 3, "rms_norm_eps": 1e-6}),
    "olmoe, biases, renormalised": (
        "Olmoe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 9, "head_dim": 6}),
    "qwen3_moe, some dense": (
        "Qwen3Moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 9,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "router_aux_loss_coef": 0.3,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 6, "tie_word_embeddings": True}),
    "qwen3, biases, eps": ("Qwen3", {"head_dim": 8, "attention_bias": True, "rms_norm_eps": 0.01}),
    "qwen3, windows": (
        "Qwen3",
        {
            "head_dim": 4,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}
cases = pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)


def config_of(name, options, **more):
    return getattr(transformers, f"{name}Config")(**SIZES | options, **more)


@cases
def test_logits_and_generation_equal_transformers(name, options):
    # Of its experts' implementations only this one takes float64.
    equals_transformers(config_of(name, options, attn_implementation="eager", experts_implementation="eager"))


@cases
def test_there_and_back_is_bitwise_the_same(name, options, tmp_path):
    there_and_back(config_of(name, options, initializer_range=0.1, bos_token_id=3), tmp_path)


@cases
def test_a_model_made_here_can_be_written(name, options):
    """What is read from a configuration needs no original to be written again."""
    kind = family({"Qwen3Moe": "qwen3_moe"}.get(name, name.lower()))
    described = kind.read(config_of(name, options))
    found, config = target_config(ZooConfig(model=described), kind.model_type)
    assert config.architectures == [found.architecture] == [f"{name}ForCausalLM"]
    assert spelled_out(found.read(config)) == spelled_out(described)


def test_a_preset_is_a_published_configuration():
    _, config = target_config(ZooConfig(model=preset("mistral-7b")), "mistral")
    with torch.device("meta"):
        assert transformers.MistralForCausalLM(config).num_parameters() == 7_241_732_096
    _, config = target_config(ZooConfig(model=preset("mixtral-8x7b")), "mixtral")
    with torch.device("meta"):
        assert transformers.MixtralForCausalLM(config).num_parameters() == 46_702_792_704


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("mistral", {"qk_norm": "rms"}, r"blocks\[0\].qk_norm='rms' would become None"),
        ("qwen2", {}, r"blocks\[0\].bias=False would become True"),
        ("qwen3", {}, r"blocks\[0\].qk_norm=None would become 'rms'"),
        ("mixtral", {}, r"stack\[1\] is of kind swiglu; its blocks are gqa, then moe, in turn"),
        ("qwen3_moe", {"qk_norm": "rms"}, "it has no mixture of experts; qwen3 holds dense models"),
        ("qwen3", {"qk_norm": "rms", "qk_norm_eps": 0.1}, r"blocks\[0\].qk_norm_eps=0.1 would become 1e-06"),
    ],
)
def test_what_a_format_cannot_hold_is_named(name, changed, message):
    stack = [{"kind": "gqa", "heads": 2} | changed, "swiglu"]
    with pytest.raises(ValueError, match=f"the format '{name}' cannot hold this model: {message}"):
        target_config(ZooConfig(model={"vocab_size": 7, "width": 24, "stack": stack}), name)
    with pytest.raises(ValueError, match="needs a norm of queries and keys"):
        zoo.block("gqa", 24, qk_norm_eps=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router_z": 0.1}, r"blocks\[1\].router_z=0.1 would become 0.0"),
        ({"router": "sinkhorn"}, r"blocks\[1\].router=.*'sinkhorn'.* would become .*'top_k'"),
        ({"router": {"kind": "top_k", "renormalise": False}}, r"blocks\[1\].router=.*False.* would become .*True"),
        ({"expert": "mlp"}, "experts of kind 'mlp' have no name there; swiglu and geglu have"),
        ({"expert": {"kind": "swiglu", "bias": True}}, r"blocks\[1\].expert=.*True.* would become .*False"),
        ({"shared_experts": 1}, r"blocks\[1\].shared_experts=1 would become 0"),
    ],
)
def test_mixtures_that_a_format_cannot_hold_are_named(options, message):
    stack = [{"kind": "gqa", "heads": 2}, {"kind": "moe", "experts": 4} | options]
    with pytest.raises(ValueError, match="the format 'mixtral' cannot hold this model: " + message):
        target_config(ZooConfig(model={"vocab_size": 7, "width": 24, "stack": stack}), "mixtral")


def test_options_without_counterpart_are_named():
    for name, options, message in (
        ("Mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 has no counterpart"),
        ("Olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 cannot be converted"),
    ):
        with pytest.raises(ValueError, match=message):
            family(name.lower()).read(config_of(name, options))


def test_layers_of_other_kinds_are_named():
    config = config_of("Qwen3", {"head_dim": 4})
    config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match="layer_types: 'chunked_attention' cannot be converted"):
        family("qwen3").read(config)
