"""RecurrentGemma, Qwen3-Next and LFM2 checkpoints against transformers: logits, generation, and the way back."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import zoo.convert
from tests.convert.peer import (
    differences,
    equals_transformers,
    in_float64,
    model_of,
    there_and_back,
    tokens_and_masks,
)
from zoo.config import preset
from zoo.convert.family import spelled_out
from zoo.convert.published import family, target_config
from zoo.hf import ZooConfig

SIZES = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 27,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "eos_token_id": 5,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 3,
    "linear_value_head_dim": 5,
    "head_dim": 8,
}
NEXT = DELTA | {"num_hidden_layers": 2, "full_attention_interval": 2}
MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 9,
    "shared_expert_intermediate_size": 11,
}
ROPE = {"rope_type": "default", "rope_theta": 70.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "recurrent_gemma": ("RecurrentGemma", {"attention_window_size": 7}),
    "recurrent_gemma, widths, biases": (
        "RecurrentGemma",
        {
            "lru_width": 15,
            "conv1d_width": 2,
            "attention_bias": True,
            "block_types": ["attention", "recurrent"],
            "attention_window_size": 3,
            "head_dim": 10,
            "rope_parameters": ROPE | {"partial_rotary_factor": 0.8},
            "logits_soft_cap": 200.0,
            "rms_norm_eps": 0.01,
            "tie_word_embeddings": False,
            "w_init_variance_scale": 0.3,
        },
    ),
    "recurrent_gemma, no convolution": (
        "RecurrentGemma",
        {
            "conv1d_width": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "rope_parameters": ROPE | {"partial_rotary_factor": 1.0},
        },
    ),
    "qwen3_next": ("Qwen3Next", NEXT | MIXTURE),
    "qwen3_next, some dense": (
        "Qwen3Next",
        DELTA
        | MIXTURE
        | {
            "layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention"],
            "mlp_only_layers": [3],
            "decoder_sparse_step": 2,
            "num_key_value_heads": 5,
            "linear_num_key_heads": 3,
            "linear_conv_kernel_dim": 2,
            "attention_bias": True,
            "norm_topk_prob": False,
            "rms_norm_eps": 0.01,
            "router_aux_loss_coef": 0.3,
            "tie_word_embeddings": True,
            "rope_parameters": YARN | {"partial_rotary_factor": 0.5},
        },
    ),
    "qwen3_next, all dense": (
        "Qwen3Next",
        DELTA
        | {
            "num_experts": 0,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention"] * 2,
            "hidden_act": "gelu",
            "rope_parameters": ROPE | {"partial_rotary_factor": 1.0},
        },
    ),
    "lfm2": ("Lfm2", {"full_attn_idxs": [1, 3], "block_multiple_of": 8, "num_attention_heads": 5}),
    "lfm2, sizes": (
        "Lfm2",
        {
            "layer_types": ["full_attention", "conv", "conv", "conv"],
            "conv_L_cache": 5,
            "block_auto_adjust_ff_dim": False,
            "norm_eps": 0.01,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "tie_word_embeddings": False,
            "rope_parameters": YARN,
        },
    ),
    "lfm2, stretched, biases": (
        "Lfm2",
        {"full_attn_idxs": [0], "block_ffn_dim_multiplier": 1.3, "block_multiple_of": 5, "conv_bias": True}
        | {"num_attention_heads": 2, "num_hidden_layers": 2},
    ),
}
TYPES = {"RecurrentGemma": "recurrent_gemma", "Qwen3Next": "qwen3_next", "Lfm2": "lfm2"}
# What transformers computes wrongly in a left-padded batch, for its convolutions read what stands at padding:
# RecurrentGemma's recurrent blocks take no mask at all; LFM2's mask what the projection before the convolution reads,
# and with conv_bias its output is not zero there.
READS_PADDING = ("recurrent_gemma", "recurrent_gemma, widths, biases", "lfm2, stretched, biases")


def marked(names):
    chosen = {name: CASES[name] for name in names}
    return pytest.mark.parametrize(("name", "options"), chosen.values(), ids=chosen)


cases = marked(CASES)


def config_of(name, options, **more):
    return getattr(transformers, f"{name}Config")(**SIZES | options, **more)


@marked(name for name in CASES if name not in READS_PADDING)
def test_logits_and_generation_equal_transformers(name, options):
    # Of its experts' implementations only this one takes float64.
    equals_transformers(config_of(name, options, attn_implementation="eager", experts_implementation="eager"))


@marked(READS_PADDING)
def test_where_transformers_reads_padding_each_row_equals_its_own(name, options):
    """Plain and right-padded batches equal transformers'; of a left-padded one each row equals the row alone there."""
    config = config_of(name, options, attn_implementation="eager")
    found, _, _ = differences(config, torch.float32)
    assert max(found["plain"], found["right"]) < 1e-5, found
    found, theirs, ours = differences(config, torch.float64)
    assert max(found["plain"], found["right"]) < 1e-9, found
    assert found["left"] > 1e-3, "transformers is right with padding on the left now: compare it there"
    tokens, masks = tokens_and_masks(config.vocab_size)
    chosen = {"max_new_tokens": 12, "do_sample": False}
    with torch.no_grad():
        logits = ours(tokens, attention_mask=masks["left"]).logits
    generated = ours.generate(tokens, attention_mask=masks["left"], **chosen)
    for row, length in enumerate((24, 17, 3)):
        alone = tokens[row : row + 1, 24 - length :]
        with in_float64(), torch.no_grad():
            wanted = theirs(alone, use_cache=False).logits[0]
            more = theirs.generate(alone, attention_mask=torch.ones_like(alone), **chosen)[0, length:]
        assert (logits[row, 24 - length :] - wanted).abs().max() < 1e-9 * wanted.abs().max()
        assert torch.equal(generated[row, 24 : 24 + len(more)], more)


@cases
def test_there_and_back_is_bitwise_the_same(name, options, tmp_path):
    more = {} if name == "RecurrentGemma" else {"initializer_range": 0.1}
    there_and_back(config_of(name, options, bos_token_id=3, **more), tmp_path)


@cases
def test_a_model_made_here_can_be_written(name, options):
    """What is read from a configuration needs no original to be written again."""
    kind = family(TYPES[name])
    described = kind.read(config_of(name, options))
    found, config = target_config(ZooConfig(model=described), kind.model_type)
    assert config.architectures == [found.architecture] == [f"{name}ForCausalLM"]
    assert spelled_out(found.read(config)) == spelled_out(described)


@pytest.mark.parametrize(
    ("name", "kind", "parameters"),
    [
        ("recurrentgemma-2b", "recurrent_gemma", 2_682_862_080),
        ("qwen3-next-80b-a3b", "qwen3_next", 79_674_391_296),
        ("lfm2-1.2b", "lfm2", 1_170_340_608),
    ],
)
def test_a_preset_is_a_published_configuration(name, kind, parameters):
    found, config = target_config(ZooConfig(model=preset(name)), kind)
    with torch.device("meta"):
        assert transformers.AutoModelForCausalLM.from_config(config).num_parameters() == parameters
    assert spelled_out(found.read(config)) == spelled_out(preset(name))
    if kind == "recurrent_gemma":  # the class' other defaults are this model's
        config.w_init_variance_scale = 0.01
        del config.architectures
        own = found.config_class(num_key_value_heads=1, intermediate_size=15360)
        assert spelled_out(found.read(config)) == spelled_out(found.read(own))


def test_a_published_lfm2_file_is_taken_without_a_word(tmp_path, recwarn):
    """Its file holds options of the code that it was trained with, and older names of others."""
    config = config_of("Lfm2", {"num_attention_heads": 2, "block_multiple_of": 4, "full_attn_idxs": [1]})
    model_of(config, torch.bfloat16).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said["block_ff_dim"], said["tie_embedding"] = said.pop("intermediate_size"), said.pop("tie_word_embeddings")
    said |= {"block_dim": 20, "block_use_swiglu": True, "conv_dim": 20, "num_heads": 2, "use_pos_enc": True}
    del said["layer_types"]
    (tmp_path / "config.json").write_text(json.dumps(said))
    model = zoo.convert.load(tmp_path)
    assert not [each for each in recwarn if "no effect" in str(each.message)]
    assert spelled_out(model.config.model_config) == spelled_out(family("lfm2").read(config))


def test_tensors_that_only_predict_ahead_are_left_out_and_told(tmp_path):
    """Qwen3-Next's files hold a head for several tokens, which transformers leaves out in silence."""
    model = model_of(config_of("Qwen3Next", NEXT | MIXTURE), torch.bfloat16)
    model.save_pretrained(tmp_path / "published")
    tensors = load_file(tmp_path / "published" / "model.safetensors")
    more = {"mtp.fc.weight": torch.zeros(20, 40), "mtp.norm.weight": torch.zeros(20)}
    save_file(tensors | more, tmp_path / "published" / "model.safetensors", metadata={"format": "pt"})
    message = "holds mtp.fc.weight, mtp.norm.weight, which the model does not compute with; they are left out"
    with pytest.warns(UserWarning, match=message):
        loaded = zoo.convert.load(tmp_path / "published")
    with pytest.warns(UserWarning, match=message):
        zoo.convert.convert(tmp_path / "published", tmp_path / "zoo")
    zoo.convert.save(loaded, tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == tensors.keys()
    shutil.copytree(tmp_path / "published", tmp_path / "more")
    save_file(tensors | {"model.mtp.weight": torch.zeros(2)}, tmp_path / "more" / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds model\.mtp\.weight, which its configuration does not tell of"):
        zoo.convert.load(tmp_path / "more")


GEMMA = {
    "norm": "rms_zero_centered",
    "embedding_scale": 4.90625,  # the root of 24 in bfloat16
    "logit_softcap": 30.0,
}
UNIT = {"kind": "geglu", "bias": True, "approximate": "tanh"}
LOCAL = {"kind": "gqa", "heads": 3, "window": 5, "out_bias": True, "position": {"kind": "rotary", "fraction": 0.5}}
STRETCHED = {"kind": "rotary", "scaling": {"kind": "linear", "factor": 2.0}}
GATED = {"kind": "gqa", "heads": 2, "gate": True, "qk_norm": "rms_zero_centered"}
SHARED = {"kind": "moe", "shared_experts": 1, "shared_gate": True}
CENTRED = {"norm": "rms_zero_centered"}
LFM2 = {"kind": "gqa", "heads": 2, "qk_norm": "rms", "qk_norm_eps": 1e-6}


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("recurrent_gemma", GEMMA | {"embedding_scale": 24**0.5}, "embedding_scale=4.89.* would become 4.90625"),
        ("recurrent_gemma", GEMMA | {"logit_softcap": None}, "logit_softcap=None: its logits are always capped"),
        ("recurrent_gemma", GEMMA | {"norm": "rms"}, "norm='rms' would become 'rms_zero_centered'"),
        (
            "recurrent_gemma",
            GEMMA | {"stack": ["rg_lru", UNIT | {"bias": False}]},
            r"blocks\[1\].bias=False would become True",
        ),
        (
            "recurrent_gemma",
            GEMMA | {"stack": ["rg_lru", "swiglu"]},
            "swiglu; its blocks are rg_lru or gqa, then geglu",
        ),
        (
            "recurrent_gemma",
            GEMMA | {"stack": [{"kind": "rg_lru", "heads": 2}, UNIT, LOCAL, UNIT]},
            r"blocks\[0\].heads=2 would become 3",
        ),
        (
            "recurrent_gemma",
            GEMMA | {"stack": [LOCAL | {"window": None}, UNIT]},
            "attention_window_size",
        ),
        (
            "recurrent_gemma",
            GEMMA | {"stack": [LOCAL | {"position": STRETCHED}, UNIT]},
            "rope_type='linear' cannot be converted",
        ),
        (
            "qwen3_next",
            CENTRED | {"stack": [GATED | {"gate": False}, "swiglu"]},
            r"blocks\[0\].gate=False would become True",
        ),
        ("qwen3_next", CENTRED | {"stack": [GATED | {"qk_norm": "rms"}, "swiglu"]}, "qk_norm='rms' would become"),
        (
            "qwen3_next",
            CENTRED | {"stack": [GATED, SHARED | {"shared_gate": False}]},
            "shared_gate=False would become True",
        ),
        ("qwen3_next", CENTRED | {"stack": [GATED, {"kind": "moe"}]}, r"blocks\[1\].shared_experts=0 would become 1"),
        (
            "qwen3_next",
            CENTRED | {"norm_eps": 1e-5, "stack": [{"kind": "gated_delta_net", "negative_eigenvalues": True}, SHARED]},
            r"blocks\[0\].negative_eigenvalues=True would become False",
        ),
        ("qwen3_next", {"stack": ["gated_delta_net", SHARED]}, "norm='rms' would become"),
        (
            "qwen3_next",
            CENTRED | {"stack": ["rwkv4", SHARED]},
            "rwkv4; its blocks are gated_delta_net or gqa, then moe or",
        ),
        (
            "lfm2",
            {"stack": ["gated_conv", {"kind": "swiglu", "bias": True}]},
            r"blocks\[1\].bias=True would become False",
        ),
        ("lfm2", {"stack": ["gated_conv", "geglu"]}, "geglu; its blocks are gated_conv or gqa, then swiglu, in turn"),
        ("lfm2", {"stack": [LFM2 | {"out_bias": True}, "swiglu"]}, r"blocks\[0\].out_bias=True would become False"),
        (
            "lfm2",
            {"stack": ["gated_conv", "swiglu", {"kind": "gated_conv", "conv_width": 5}, "swiglu"]},
            r"blocks\[2\].conv_width=5 would become 3",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_named(kind, changed, message):
    described = {"vocab_size": 7, "width": 24, "stack": ["rg_lru", UNIT]} | changed
    with pytest.raises(ValueError, match=f"the format '{kind}' cannot hold this model: .*{message}"):
        target_config(ZooConfig(model=described), kind)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("RecurrentGemma", {"hidden_activation": "gelu"}, "hidden_activation='gelu' cannot be converted"),
        ("RecurrentGemma", {"logits_soft_cap": 0.0}, "logits_soft_cap=0.0 divides the logits; it must be positive"),
        ("RecurrentGemma", {"block_types": ["recurrent", "mamba"]}, "block_types: 'mamba' cannot be converted"),
        ("RecurrentGemma", {"attention_dropout": 0.1}, "attention_dropout=0.1 has no counterpart"),
        (
            "RecurrentGemma",
            {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}},
            "rope_type='linear' cannot be converted",
        ),
        (
            "Qwen3Next",
            DELTA | MIXTURE | {"hidden_act": "gelu"},
            "hidden_act='gelu' cannot be converted: the convolution",
        ),
        ("Qwen3Next", DELTA | MIXTURE | {"attention_dropout": 0.1}, "attention_dropout=0.1 has no counterpart"),
        ("Lfm2", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' cannot be"),
        ("Lfm2", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 cannot be"),
    ],
)
def test_options_without_counterpart_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        family(TYPES[name]).read(config_of(name, options))


def test_layers_of_other_kinds_are_named():
    for name in ("Qwen3Next", "Lfm2"):
        config = config_of(name, {})
        config.layer_types = ["full_attention", "chunked_attention"]
        with pytest.raises(ValueError, match="layer_types: 'chunked_attention' cannot be converted"):
            family(TYPES[name]).read(config)
    config = config_of("RecurrentGemma", {})
    config.block_types = []
    with pytest.raises(ValueError, match=r"block_types=\[\] names no block"):
        family("recurrent_gemma").read(config)
