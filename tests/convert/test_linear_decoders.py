"""RWKV-4 and MiniMax checkpoints against transformers: logits, generation, and the way back."""

import copy

import pytest
import torch
import transformers

import zoo.convert
from tests.convert.peer import (
    difference,
    differences,
    equals_transformers,
    in_float64,
    model_of,
    there_and_back,
    tokens_and_masks,
)
from tests.test_config import PUBLISHED
from zoo.config import preset
from zoo.convert.family import spelled_out
from zoo.convert.published import family, target_config
from zoo.hf import ZooConfig

SIZES = {"vocab_size": 37, "hidden_size": 20, "num_hidden_layers": 3, "pad_token_id": 0, "eos_token_id": 5}
RWKV = {
    "rwkv": ("Rwkv", {"rescale_every": 0}),
    "rwkv, tied": (
        "Rwkv",
        {"rescale_every": 0, "tie_word_embeddings": True, "intermediate_size": 33, "initializer_range": 0.3}
        | {"context_length": 77, "attention_hidden_size": 20},
    ),
}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 14, "block_size": 7}
MINIMAX = {
    "minimax": (
        "MiniMax",
        HEADS
        | {"num_local_experts": 5, "num_experts_per_tok": 3, "rms_norm_eps": 0.01, "sliding_window": 6}
        | {"full_attn_alpha_factor": 1.5, "full_attn_beta_factor": 0.7, "mlp_alpha_factor": 0.9, "mlp_beta_factor": 2}
        | {"linear_attn_alpha_factor": 3.5, "linear_attn_beta_factor": 1.1, "router_aux_loss_coef": 0.02}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "minimax, tied": (
        "MiniMax",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 14, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}, "num_local_experts": 3},
    ),
    "minimax, linear alone": (
        "MiniMax",
        HEADS | {"num_key_value_heads": 6, "hidden_act": "swish", "layer_types": ["linear_attention"] * 3},
    ),
    "minimax, full alone": ("MiniMax", HEADS | {"hidden_act": "gelu", "layer_types": ["full_attention"] * 3}),
}
CASES = RWKV | MINIMAX
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def config_of(name, options, **more):
    return getattr(transformers, f"{name}Config")(**SIZES | options, **more)


# transformers counts what MiniMax's cache holds in the first layer, which holds no keys where its kind is linear: from
# the second generated token on, the masks of padding and of a window are off. There we compare with generation without
# a cache.


@pytest.mark.parametrize(("name", "options"), MINIMAX.values(), ids=MINIMAX)
def test_logits_and_generation_equal_transformers(name, options):
    config = config_of(name, options, **EAGER)
    mixed = "full_attention" in config.layer_types
    equals_transformers(config, cached=not (mixed and config.layer_types[0] == "linear_attention"))


# transformers' Rwkv reads past attention_mask, so that padding on the left is text to it, and its step from a state
# mixes up the rows of a batch: we compare with rows alone.


@pytest.mark.parametrize(("name", "options"), RWKV.values(), ids=RWKV)
def test_logits_and_generation_equal_transformers_row_by_row(name, options):
    config = config_of(name, options)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        found, theirs, ours = differences(config, dtype)
        assert max(found["plain"], found["right"]) < tolerance, found
    assert found["left"] > 1e-3
    tokens, masks = tokens_and_masks(config.vocab_size)
    chosen = {"max_new_tokens": 12, "do_sample": False}
    continued = ours.generate(tokens, attention_mask=masks["left"], **chosen)
    for row, mask in enumerate(masks["left"]):
        alone = tokens[row : row + 1, mask == 1]
        with in_float64(), torch.no_grad():
            wanted = theirs(alone, use_cache=False).logits
            expected = theirs.generate(alone, attention_mask=torch.ones_like(alone), **chosen)
        with torch.no_grad():
            logits = ours(tokens, attention_mask=masks["left"]).logits[row, mask == 1]
        assert (logits - wanted).abs().max() < 1e-9 * wanted.abs().max()
        assert torch.equal(continued[row, 24 - alone.shape[1] :][: expected.shape[1]], expected[0])


def test_a_rescaled_model_is_the_same_but_for_eps():
    """Halving the stream makes eps 4 times as large beside it; the weights that transformers has divided in place by
    then are read as they were."""
    config = config_of("Rwkv", {"rescale_every": 1})
    with in_float64():
        theirs = model_of(config, torch.float64)
    ours, tokens = zoo.convert.load(theirs), torch.randint(6, 37, (3, 24))
    plain = copy.deepcopy(theirs)
    plain.config.rescale_every = 0
    assert difference(plain, ours, tokens, None) < 1e-9
    weight = theirs.rwkv.blocks[2].attention.output.weight
    held = weight.detach().clone()
    with in_float64(), torch.no_grad():
        wanted = theirs(tokens, use_cache=False).logits
    assert theirs.rwkv.layers_are_rescaled and torch.equal(weight, held / 4)
    again = zoo.convert.load(theirs)
    assert all(torch.equal(ours.state_dict()[name], each) for name, each in again.state_dict().items())
    with torch.no_grad():
        found = ours(tokens).logits
    apart = (found - wanted).abs().max() / wanted.abs().max()
    assert 1e-9 < apart < 1e-3, apart


def test_decays_in_float32_stay_so():
    """transformers keeps RWKV's decays and bonus in float32 when it loads a model in float16."""
    theirs = model_of(config_of("Rwkv", {"rescale_every": 0}), torch.float16)
    for block in theirs.rwkv.blocks:
        block.attention.time_decay.data = torch.randn(20)
        block.attention.time_first.data = torch.randn(20)
    ours = zoo.convert.load(theirs)
    held = ours.model.residuals[2].block
    assert torch.equal(held.time_decay, theirs.rwkv.blocks[1].attention.time_decay)
    assert torch.equal(held.time_first, theirs.rwkv.blocks[1].attention.time_first)
    assert ours(torch.arange(12)[None]).logits.dtype == torch.float16


@pytest.mark.parametrize("size", [3, 24, 100])
def test_the_size_of_blocks_does_not_matter(size):
    config = config_of("MiniMax", MINIMAX["minimax"][1] | {"block_size": size}, **EAGER)
    found, _, _ = differences(config, torch.float64)
    assert max(found.values()) < 1e-9


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_there_and_back_is_bitwise_the_same(name, options, tmp_path):
    there_and_back(config_of(name, options, bos_token_id=3), tmp_path)


def test_decays_that_files_lack_are_made_anew(tmp_path):
    """We write no decays: transformers makes them as its formula says."""
    theirs = model_of(config_of(*MINIMAX["minimax"]), torch.float32)
    zoo.convert.save(zoo.convert.load(theirs), tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, wanted in theirs.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name].to(wanted.dtype), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_a_model_made_here_can_be_written(name, options):
    """What is read from a configuration needs no original to be written again."""
    kind, given = family(name.lower()), config_of(name, options)
    described = kind.read(given)
    found, config = target_config(ZooConfig(model=described), kind.model_type)
    assert config.architectures == [found.architecture] == [f"{name}ForCausalLM"]
    assert spelled_out(found.read(config)) == spelled_out(described)
    written = set(found.write(described)) - {"hidden_act", "head_dim"}  # "swish", and null
    assert {each: getattr(config, each) for each in written} == {each: getattr(given, each) for each in written}
    with torch.device("meta"):
        theirs = [getattr(transformers, f"{name}ForCausalLM")(each) for each in (config, given)]
    shapes = [
        {name: each.shape for name, each in model.state_dict().items() if "_decay" not in name or name[0] == "r"}
        for model in theirs
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["rwkv4-169m", "rwkv4-430m"])
def test_presets_can_be_written(name):
    kind, config = target_config(ZooConfig(model=preset(name)), None)
    assert kind.model_type == "rwkv"
    with torch.device("meta"):
        theirs = transformers.RwkvForCausalLM(config)
    assert theirs.num_parameters() == PUBLISHED[name]


# What cannot be converted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Rwkv", {"attention_hidden_size": 24}, "attention_hidden_size=24 cannot .* hidden_size=20"),
        ("Rwkv", {"layer_norm_epsilon": 0.01}, "layer_norm_epsilon=0.01 cannot .* set it to 1e-05"),
        ("MiniMax", HEADS | {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 has no counterpart"),
        ("MiniMax", HEADS | {"attention_dropout": 0.1}, "attention_dropout=0.1 has no counterpart"),
        ("MiniMax", HEADS | {"hidden_act": "gelu"}, "hidden_act='gelu' cannot .* linear_attention layers"),
        (
            "MiniMax",
            HEADS | {"hidden_act": "relu", "layer_types": ["full_attention"] * 3},
            "hidden_act='relu' cannot be converted",
        ),
        (
            "MiniMax",
            HEADS | {"layer_types": ["sliding_attention"] * 3},
            "layer_types: 'sliding_attention' cannot be converted; linear_attention and full_attention can",
        ),
        (
            "MiniMax",
            HEADS | {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 cannot be converted",
        ),
    ],
)
def test_options_without_counterpart_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        family(name.lower()).read(config_of(name, options))


PAIR = ["rwkv4", "rwkv4_channel_mix"]
RIGHT = {"norm": "layer", "norm_eps": 1e-5, "embedding_norm": True}
LIGHTNING = {"kind": "lightning_attention", "layer": 0, "layers": 2}
MIX = {"kind": "moe", "router": {"kind": "top_k", "renormalise": True}}
AFTER = {"norm_position": "post", "embedding_norm": True}


@pytest.mark.parametrize(
    ("name", "stack", "more", "message"),
    [
        ("rwkv", ["rwkv4"], RIGHT, "the stack has 1 blocks; its blocks are pairs of rwkv4 and rwkv4_channel_mix"),
        ("rwkv", ["rwkv4", "swiglu"], RIGHT, r"stack\[1\] is of kind swiglu"),
        ("rwkv", PAIR, RIGHT | {"norm_eps": 0.1}, "norm_eps=0.1 would become 1e-05"),
        ("rwkv", PAIR, RIGHT | {"embedding_norm": False}, "embedding_norm=False would become True"),
        ("rwkv", PAIR, RIGHT | {"norm": "rms"}, "norm='rms' would become 'layer'"),
        (
            "rwkv",
            [*PAIR, "rwkv4", {"kind": "rwkv4_channel_mix", "hidden": 7}],
            RIGHT,
            r"blocks\[3\].hidden=7 would become 96",
        ),
        ("rwkv", [{"kind": "rwkv4", "residual": {"scale": 0.5}}, PAIR[1]], RIGHT, r"blocks\[0\].residual="),
        ("minimax", [LIGHTNING, "swiglu"], AFTER, r"stack\[1\] is of kind swiglu"),
        ("minimax", [LIGHTNING, MIX], {}, "norm_position='pre' would become 'post'"),
        ("minimax", [LIGHTNING, MIX, LIGHTNING, MIX], AFTER, r"blocks\[2\].layer=0 would become 1"),
        ("minimax", [LIGHTNING | {"norm_eps": 0.1}, MIX], AFTER, r"would become"),
        (
            "minimax",
            [LIGHTNING, MIX, LIGHTNING | {"layer": 1, "residual": {"skip": 2.0}}, MIX],
            AFTER,
            r"blocks\[2\].residual=.*2.0.* would become",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_named(name, stack, more, message):
    config = ZooConfig(model={"vocab_size": 7, "width": 24, "stack": stack} | more)
    with pytest.raises(ValueError, match=f"the format '{name}' cannot hold this model: .*{message}"):
        target_config(config, name)
