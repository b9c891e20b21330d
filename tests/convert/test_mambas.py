"""Mamba, Falcon Mamba and Mamba-2 checkpoints against transformers: logits, generation, and the way back."""

import dataclasses
import inspect
import json
import warnings

import pytest
import torch
import transformers
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

import zoo.convert
from tests.convert.peer import differences, equals_transformers, in_float64, there_and_back, tokens_and_masks
from tests.test_config import PUBLISHED
from zoo.config import preset
from zoo.convert.family import spelled_out
from zoo.convert.published import family, target_config, zoo_config
from zoo.hf import ZooConfig

SIZES = {"vocab_size": 37, "hidden_size": 20, "num_hidden_layers": 3, "pad_token_id": 0, "eos_token_id": 5}
HEADS = {"num_heads": 10, "head_dim": 4, "state_size": 6, "chunk_size": 7}
CASES = {
    "mamba": (
        "Mamba",
        {
            "state_size": 5,
            "expand": 3,
            "conv_kernel": 3,
            "time_step_rank": 7,
            "layer_norm_epsilon": 0.01,
            "residual_in_fp32": False,
            "time_step_min": 0.01,
            "time_step_max": 0.2,
            # Of these nothing but a model's first weights depends.
            "rescale_prenorm_residual": True,
            "time_step_scale": 2.0,
            "time_step_floor": 0.02,
            "time_step_init_scheme": "constant",
        },
    ),
    "mamba, untied": ("Mamba", {"tie_word_embeddings": False, "use_conv_bias": False, "hidden_act": "swish"}),
    "falcon_mamba": ("FalconMamba", {"expand": 16, "intermediate_size": 60, "tie_word_embeddings": False}),
    "falcon_mamba, eps": ("FalconMamba", {"state_size": 3, "mixer_rms_eps": 0.2, "use_conv_bias": False}),
    "mamba2": ("Mamba2", HEADS | {"n_groups": 1, "residual_in_fp32": False, "time_step_rank": 3}),
    "mamba2, groups, tied": (
        "Mamba2",
        HEADS
        | {"n_groups": 5, "conv_kernel": 2, "use_conv_bias": False, "layer_norm_epsilon": 0.1}
        | {"tie_word_embeddings": True},
    ),
    "mamba2, limited steps": (
        "Mamba2",
        HEADS | {"n_groups": 1, "expand": 4, "num_heads": 20, "time_step_limit": (0.3, 0.9)},
    ),
    "mamba2, steps from": ("Mamba2", HEADS | {"n_groups": 1, "time_step_limit": (0.3, float("inf"))}),
}
BIASED = {
    "mamba, biases": ("Mamba", {"state_size": 5, "use_bias": True}),
    "falcon_mamba, biases": ("FalconMamba", {"state_size": 5, "use_bias": True}),
    "mamba2, biases": ("Mamba2", HEADS | {"n_groups": 1, "use_bias": True}),
}
ALL = CASES | BIASED
# transformers 5.17 has one gated norm over all groups of Mamba-2, which mamba_ssm, where its weights come from, norms
# each by itself.
GROUPED = "group_size" in inspect.signature(MambaRMSNormGated).parameters
RIGHT = {name: case for name, case in CASES.items() if GROUPED or case[1].get("n_groups", 1) == 1}


def config_of(name, options, **more):
    return getattr(transformers, f"{name}Config")(**SIZES | options, **more)


def family_of(name):
    return family("falcon_mamba" if name == "FalconMamba" else name.lower())


# transformers' caches are right in generate, which goes on by one token after another. Where several tokens go on from
# one at once, Mamba and Falcon Mamba scan them from a state of zeros (Mamba-2 from the cache's): logits are off by as
# much as they are large. And Mamba-2's path for one token leaves time_step_limit out, so with a limit we compare with
# generation without a cache.


@pytest.mark.parametrize(("name", "options"), RIGHT.values(), ids=RIGHT)
def test_logits_and_generation_equal_transformers(name, options):
    equals_transformers(config_of(name, options), cached="time_step_limit" not in options)


@pytest.mark.parametrize(("name", "options"), BIASED.values(), ids=BIASED)
def test_padding_on_the_left_is_as_none(name, options):
    """With use_bias transformers' convolution reads the bias of in_proj at padding on the left, where a text without
    padding has zeros: its first tokens depend on the padding. Ours are as transformers' without padding."""
    config = config_of(name, options)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        found, theirs, ours = differences(config, dtype)
        assert max(found["plain"], found["right"]) < tolerance, found
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


@pytest.mark.parametrize(("name", "options"), ALL.values(), ids=ALL)
def test_there_and_back_is_bitwise_the_same(name, options, tmp_path):
    there_and_back(config_of(name, options, initializer_range=0.2, bos_token_id=3), tmp_path)


@pytest.mark.parametrize(("name", "options"), ALL.values(), ids=ALL)
def test_a_model_made_here_can_be_written(name, options):
    """What is read from a configuration needs no original to be written again."""
    kind = family_of(name)
    described = kind.read(config_of(name, options))
    found, config = target_config(ZooConfig(model=described), kind.model_type)
    assert config.architectures == [found.architecture] == [f"{name}ForCausalLM"]
    assert spelled_out(found.read(config)) == spelled_out(described)
    given = config_of(name, options)
    written = set(found.write(described)) - {"expand", "hidden_act"}  # 16 beside an intermediate_size, and "swish"
    assert {each: getattr(config, each) for each in written} == {each: getattr(given, each) for each in written}
    with torch.device("meta"):
        theirs = [getattr(transformers, f"{name}ForCausalLM")(each) for each in (config, given)]
    shapes = [{name: each.shape for name, each in model.state_dict().items()} for model in theirs]
    assert shapes[0] == shapes[1]


def test_a_changed_model_is_written_with_its_own_sizes():
    """What the file said of its sizes, expand and intermediate_size both, goes; what it said besides stays."""
    original = config_of("FalconMamba", {"expand": 16, "intermediate_size": 60, "time_step_scale": 2.0})
    made = zoo_config(family("falcon_mamba"), original)
    made.model["stack"] = [{"kind": "mamba", "expand": 4, "inner_norm": "weightless"}]
    _, config = target_config(made, None)
    assert (config.expand, config.intermediate_size, config.num_hidden_layers) == (4, 80, 1)
    assert config.time_step_scale == 2.0


# Published configurations ---------------------------------------------------------------------------------------

PRESETS = {
    "mamba-130m": "mamba",
    "mamba-2.8b": "mamba",
    "falcon-mamba-7b": "falcon_mamba",
    "mamba2-130m": "mamba2",
    "mamba2-2.7b": "mamba2",
    "codestral-mamba-7b": "mamba2",
}


@pytest.mark.parametrize(("name", "model_type"), PRESETS.items(), ids=PRESETS)
def test_presets_can_be_written(name, model_type):
    kind, config = target_config(ZooConfig(model=preset(name)), model_type)
    with torch.device("meta"):
        theirs = getattr(transformers, kind.architecture)(config)
    assert theirs.num_parameters() == PUBLISHED[name]


def test_the_family_of_a_model_made_here_is_found():
    found = {name: target_config(ZooConfig(model=small(name)), None)[0].model_type for name in FILES}
    assert found == {"mamba-130m": "mamba", "falcon-mamba-7b": "falcon_mamba", "codestral-mamba-7b": "mamba2"}


# What the files of state-spaces/mamba-130m-hf, tiiuae/falcon-mamba-7b and mistralai/Mamba-Codestral-7B-v0.1 say.
STEPS = {"time_step_floor": 0.0001, "time_step_max": 0.1, "time_step_min": 0.001, "time_step_scale": 1.0}
COMMON = STEPS | {
    "bos_token_id": 0,
    "conv_kernel": 4,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "layer_norm_epsilon": 1e-05,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "time_step_init_scheme": "random",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
}
SEVEN = {"hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 64, "time_step_rank": 256}
FILES = {
    "mamba-130m": COMMON
    | {"model_type": "mamba", "expand": 2, "hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 24}
    | {"state_size": 16, "time_step_rank": 48, "vocab_size": 50280, "pad_token_id": 0, "eos_token_id": 0}
    | {"d_inner": 1536, "d_model": 768, "fused_add_norm": True, "n_layer": 24, "pad_vocab_size_multiple": 8}
    | {"rms_norm": True, "ssm_cfg": {}, "torch_dtype": "float32"},
    "falcon-mamba-7b": COMMON
    | SEVEN
    | {"model_type": "falcon_mamba", "expand": 16, "state_size": 16, "vocab_size": 65024}
    | {"pad_token_id": 11, "eos_token_id": 11, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    "codestral-mamba-7b": COMMON
    | SEVEN
    | {"model_type": "mamba2", "expand": 2, "state_size": 128, "vocab_size": 32768, "head_dim": 64, "num_heads": 128}
    | {"n_groups": 8, "norm_before_gate": True, "rms_norm": True, "chunk_size": 256, "tie_word_embeddings": False}
    | {"time_step_limit": [0.0, float("inf")], "pad_token_id": 0, "eos_token_id": 0, "torch_dtype": "bfloat16"},
}


def small(name):
    """A preset, of two layers."""
    config = preset(name)
    return dataclasses.replace(config, stack=config.stack[0]["blocks"] * 2)


@pytest.mark.parametrize("name", FILES)
def test_published_files_are_the_presets(name, tmp_path):
    """What a published config.json says is what our preset says, but for the scale of first weights; without a warning,
    though it holds what the class no longer has; and it comes back."""
    (tmp_path / "config.json").write_text(json.dumps(FILES[name]))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    kind = family(config.model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = zoo_config(kind, config)
    assert spelled_out(made.model_config) == spelled_out(dataclasses.replace(preset(name), init_std=0.1))
    made.save_pretrained(tmp_path / "zoo")
    _, back = target_config(ZooConfig.from_pretrained(tmp_path / "zoo"), None)
    back.save_pretrained(tmp_path / "back")
    said = json.loads((tmp_path / "back" / "config.json").read_text())
    limit = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}  # as transformers writes it today
    wanted = {name: limit.get(name, value) for name, value in FILES[name].items() if name != "torch_dtype"}
    assert {name: said.get(name) for name in wanted} == wanted


# What cannot be converted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Mamba", {"hidden_act": "gelu"}, "hidden_act='gelu' cannot be converted"),
        ("FalconMamba", {"hidden_act": "relu"}, "hidden_act='relu' cannot be converted"),
        ("Mamba2", HEADS | {"n_groups": 1, "hidden_act": "relu"}, "hidden_act='relu' cannot be converted"),
        ("Mamba", {"intermediate_size": 50}, "intermediate_size=50 cannot .* not a multiple of hidden_size=20"),
        ("Mamba", {"intermediate_size": 10}, "intermediate_size=10 cannot .* not a multiple of hidden_size=20"),
        ("Mamba", {"time_step_rank": "some"}, "time_step_rank='some' must be a positive integer or 'auto'"),
        ("FalconMamba", {"rms_norm": False}, "rms_norm=False cannot be converted"),
        ("Mamba2", HEADS | {"n_groups": 1, "intermediate_size": 60}, "intermediate_size=60 contradicts .* = 40"),
    ],
)
def test_options_without_counterpart_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        family_of(name).read(config_of(name, options))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([0.0, float("inf")], None),
        ([-1.0, float("inf")], None),
        ([-1.0, 0.5], [0.0, 0.5]),
        ([0.1, float("inf")], [0.1, None]),
    ],
)
def test_limits_of_steps(given, wanted):
    config = config_of("Mamba2", HEADS | {"n_groups": 1, "time_step_limit": given})
    described = family("mamba2").read(config)
    assert described.blocks()[0].options["dt_limit"] == wanted
    if wanted is not None:
        block = described.blocks()[0].options | {"kind": "mamba2", "dt_limit": tuple(wanted)}
        same = dataclasses.replace(described, stack=[block] * SIZES["num_hidden_layers"])
        assert spelled_out(same) == spelled_out(described)


@pytest.mark.parametrize(
    ("name", "stack", "message"),
    [
        ("mamba", ["mamba", "swiglu"], r"stack\[1\] is of kind swiglu; every block is mamba"),
        ("mamba", [{"kind": "mamba", "inner_norm": True}], r"blocks\[0\].inner_norm=True would become False"),
        ("mamba", ["mamba", {"kind": "mamba", "dt_rank": 3}], r"blocks\[1\].dt_rank=3 would become 2"),
        ("falcon_mamba", ["mamba"], "its blocks have no inner_norm; mamba holds models without"),
        ("falcon_mamba", [{"kind": "mamba", "inner_norm": True}], r"inner_norm=True would become 'weightless'"),
        ("mamba2", ["mamba"], r"stack\[0\] is of kind mamba; every block is mamba2"),
        ("mamba2", [{"kind": "mamba2", "norm_before_gate": True}], "norm_before_gate=True would become False"),
        ("mamba2", [{"kind": "mamba2", "groups": 4, "norm_groups": 2}], "norm_groups=2 would become 4"),
        (
            "mamba2",
            [{"kind": "mamba2", "norm_eps": 0.1}],
            "inside its blocks 0.1, where .* set the model's norm_eps to 0.1",
        ),
        ("mamba2", ["mamba2", {"kind": "mamba2", "norm_eps": 0.1}], r"blocks\[1\].norm_eps=0.1 would become 1e-05"),
        ("mamba2", [{"kind": "mamba2", "residual": {"scale": 0.5}}], r"blocks\[0\].residual=.*0.5.* would become"),
    ],
)
def test_what_a_format_cannot_hold_is_named(name, stack, message):
    config = ZooConfig(model={"vocab_size": 7, "width": 24, "stack": stack, "norm_eps": 1e-5})
    with pytest.raises(ValueError, match=f"the format '{name}' cannot hold this model: .*{message}"):
        target_config(config, name)


def test_checkpoints_of_mamba_ssm_are_refused(tmp_path):
    """state-spaces' own files: a configuration of their library and pickled weights."""
    said = {"d_model": 24, "n_layer": 2, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True}
    (tmp_path / "config.json").write_text(json.dumps(said))
    torch.save({}, tmp_path / "pytorch_model.bin")
    for attempt in (zoo.convert.load, lambda folder: zoo.convert.convert(folder, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"library mamba_ssm, whose weights are pickled; take .*mamba-130m-hf"):
            attempt(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 24}))
    with pytest.raises(ValueError, match=r"config.json names no model_type; these can be converted: llama"):
        zoo.convert.load(tmp_path)
