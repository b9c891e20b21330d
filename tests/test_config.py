"""Configurations: data in, exact errors out; presets have their published sizes."""

import pytest
import torch

import zoo
from zoo.config import VERSION
from zoo.describe import count, describe_block, describe_model

GOOD = {"vocab_size": 11, "width": 8, "stack": ["swiglu"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be a positive integer"),
        ({"width": "8"}, "width='8' must be a positive integer"),
        ({"stack": []}, "stack is empty; list at least one block"),
        ({"stack": "swiglu"}, "stack='swiglu' must be a list of blocks"),
        ({"stack": ["swigul"]}, r"stack\[0\]: unknown block kind 'swigul' \(did you mean 'swiglu'\?\)"),
        (
            {"stack": ["mlp", {"kind": "gqa", "head": 2}]},
            r"stack\[1\]: block kind 'gqa' has no option 'head' \(did you",
        ),
        ({"stack": [{"repeat": 0, "blocks": ["mlp"]}]}, r"stack\[0\]\.repeat=0 must be a positive integer"),
        ({"stack": [{"repeat": 2, "blocks": [3]}]}, r"stack\[0\]\.blocks\[0\]=3 must be a block"),
        ({"stack": [{"repeat": 2}]}, "neither kind nor blocks"),
        ({"stack": [{"blocks": ["mlp"], "kinds": 1}]}, r"\['kinds'\] cannot stand beside"),
        ({"norm": "rsm"}, r"norm='rsm' is unknown \(did you mean 'rms'\?\); choose from rms, layer, rms_zero_centered"),
        ({"norm_position": "mid"}, "norm_position='mid' is unknown; choose from pre, post"),
        ({"objective": "causl"}, r"did you mean 'causal'\?"),
        ({"dropout": 1.5}, r"dropout=1.5 must be in \[0, 1\)"),
        (
            {"version": VERSION + 1},
            rf"version={VERSION + 1}, this library reads up to {VERSION}; pip install --upgrade",
        ),
        ({"dropout": "1e-1"}, "dropout='1e-1' is text, not a number"),
        ({"embedding_scale": 0}, "embedding_scale=0 would make every token alike"),
        ({"logit_scale": 0.0}, "logit_scale=0 would make every token as likely"),
        ({"stack": [{"kind": "mlp", "residual": 2}]}, r"stack\[0\].residual=2 must be a mapping such as {skip: 1.0"),
        ({"stack": [{"kind": "mlp", "residual": {"skp": 2}}]}, r"residual has no 'skp' \(did you mean 'skip'\?\)"),
        ({"stack": [{"kind": "mlp", "residual": {"scale": 0}}]}, r"stack\[0\].residual.scale=0 would leave the block"),
        ({"stack": [{"kind": "mlp", "residual": {"skip": "1"}}]}, r"stack\[0\].residual.skip='1' is text"),
        ({"logit_softcap": -1.0}, "logit_softcap=-1.0 must be positive, or null"),
        ({"tied_embeddings": "no"}, "tied_embeddings='no' must be true or false"),
        ({"version": -3}, "version=-3"),
        ({"heigth": 3}, "unknown key 'heigth'"),
    ],
)
def test_every_mistake_is_one_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        zoo.ModelConfig.from_dict(GOOD | change)


def test_missing_keys_and_wrong_types_are_named():
    with pytest.raises(ValueError, match="lacks width, stack"):
        zoo.ModelConfig.from_dict({"vocab_size": 3})
    with pytest.raises(ValueError, match="a mapping of keys to values, got list"):
        zoo.ModelConfig.from_dict([1])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "gqa", "heads": 4, "kv_heads": 3}, r"stack\[0\] \(kind gqa\): kv_heads=3"),
        ({"kind": "gqa", "causal": False}, r"stack\[0\] \(kind gqa\) is bidirectional.*objective: masked"),
        ({"kind": "moe", "experts": 2, "top_k": 3}, r"stack\[0\] \(kind moe\): .*top_k=3"),
    ],
)
def test_a_block_that_cannot_be_built_is_named_with_its_place(spec, message):
    with pytest.raises(ValueError, match=message):
        zoo.LanguageModel({"vocab_size": 5, "width": 24, "stack": [spec]})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"tokens": torch.tensor([[0, 5]])}, ValueError, r"ids from 0 to 5.*from 0 to 4 \(vocab_size=5\).*tokenizer"),
        ({"tokens": torch.tensor([[-1, 2]])}, ValueError, "ids from -1 to 2"),
        ({"tokens": torch.ones(1, 2)}, TypeError, r"int64 or int32, got torch.float32.*long\(\)"),
        ({"tokens": torch.zeros(1, 0).long()}, ValueError, r"at least one token each, got shape \(1, 0\)"),
        ({}, ValueError, "either tokens or embeddings"),
        ({"embeddings": torch.ones(1, 2, 7)}, ValueError, "embeddings have width 7, this model has width=24"),
        (
            {"tokens": torch.tensor([[1, 2]]), "logits_to_keep": -1},
            ValueError,
            "logits_to_keep=-1 must not be",
        ),
        ({"tokens": torch.tensor([[1, 2]]), "state": ()}, ValueError, "state has 0 entries, this model has 2 blocks"),
    ],
)
def test_a_model_names_what_is_wrong_with_a_call(call, error, message):
    model = zoo.LanguageModel({"vocab_size": 5, "width": 24, "stack": ["mamba", "mlp"]})
    with pytest.raises(error, match=message):
        model(**call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_eps": "1e-5"}, "norm_eps='1e-5' is text, not a number; YAML takes 1e-3 for text"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0 must not be negative"),
        ({"init_std": "2e-2"}, "init_std='2e-2' is text"),
        ({"init_std": -1.0}, "init_std=-1.0 must not be negative"),
    ],
)
def test_numbers_of_a_model_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        zoo.LanguageModel(GOOD | change)


def test_repeat_is_written_out_and_yaml_comes_back(tmp_path):
    stack = [{"repeat": 2, "blocks": ["mlp", {"repeat": 3, "blocks": ["swiglu"]}]}, {"kind": "mlp", "hidden": 7}]
    config = zoo.ModelConfig(vocab_size=9, width=6, stack=stack, norm="layer", tied_embeddings=False)
    assert [spec.kind for spec in config.blocks()] == (["mlp"] + ["swiglu"] * 3) * 2 + ["mlp"]
    assert config.blocks()[1].where == "stack[0].blocks[1].blocks[0]"
    file = tmp_path / "model.yaml"
    file.write_text(config.to_yaml())
    assert zoo.load_config(file) == config
    file.write_text("stack: [")
    with pytest.raises(ValueError, match=r"model\.yaml is not YAML"):
        zoo.load_config(file)
    with pytest.raises(FileNotFoundError, match="no configuration file"):
        zoo.load_config(tmp_path / "none.yaml")


def test_a_config_keeps_its_own_copy():
    stack = [{"kind": "mlp", "hidden": 4}]
    config = zoo.ModelConfig(vocab_size=9, width=6, stack=stack)
    stack[0]["hidden"] = 5
    config.blocks()[0].options["hidden"] = 6
    assert config.blocks()[0].options == {"hidden": 4}


# Parameters of the released checkpoints, as their repositories' safetensors hold them (tied heads counted once), as
# transformers' own model of the released configuration has them, or, for RetNet and GLA, counted from that by hand.
PUBLISHED = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "mamba2-130m": 128_989_632,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-2.7b": 2_702_599_680,
    "codestral-mamba-7b": 7_285_403_648,
    "falcon-mamba-7b": 7_272_665_088,
    "bamba-9b": 9_780_235_392,
    "jamba-v0.1": 51_570_323_328,
    "blackmamba-2.8b": 2_783_213_584 - 1472,  # its last norm has a bias, which ours, the blocks' RMSNorm, has not
    "rwkv4-169m": 169_342_464,
    "rwkv4-430m": 430_397_440,
    "rwkv6-1.6b": 1_599_873_024,  # as its author's own model class (RWKV-LM, rwkv_v6_demo.py) has of that size
    # As flash-linear-attention's layers; the author's training code has 191_084_544, with a value gate in layer 0 that
    # nothing reads.
    "rwkv7-0.1b": 191_034_624,
    "retnet-1.3b": 1_351_727_104,
    "gla-1.3b": 1_365_514_240,
    "gated-deltanet-1.3b": 1_387_348_732,
    "recurrentgemma-2b": 2_682_862_080,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "lfm2-1.2b": 1_170_340_608,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "starcoderbase-1b": 1_137_207_296,
    "falcon-7b": 6_921_720_704,
    "mixtral-8x7b": 46_702_792_704,
    "olmoe-1b-7b": 6_919_161_856,
    "deepseek-moe-16b": 16_375_728_128,
}

# Parameters in total and those one token uses, as papers round them; the last says whether they count embeddings.
ROUNDED = {
    "blackmamba-1.5b": (1.5e9, 340e6, True),
    "blackmamba-2.8b": (2.8e9, 630e6, True),
    "jamba-v0.1": (52e9, 12e9, True),
    "moe-mamba-25m": (542e6, 26e6, False),
    "moe-mamba-100m": (2439e6, 117e6, False),
    "bst-200m": (200e6, 200e6, True),
    "mixtral-8x7b": (46.7e9, 12.9e9, True),
    "olmoe-1b-7b": (6.92e9, 1.28e9, True),
    "deepseek-moe-16b": (16.4e9, 2.8e9, True),
    "glam-like": (143e9, 9.8e9, False),
}

# width, layers, layers with attention of the released H3 hybrids.
H3_HYBRIDS = {
    "h3-hybrid-125m": (768, 12, [6]),
    "h3-hybrid-355m": (1024, 24, [8, 16]),
    "h3-hybrid-1.3b": (2048, 24, [8, 16]),
    "h3-hybrid-2.7b": (2560, 32, [10, 21]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_their_published_size(name):
    assert describe_model(zoo.preset(name))["total"] == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_presets_have_their_published_rounded_size(name):
    """To 3 percent: 1.458 billion is called 1.5."""
    total, active, embeddings = ROUNDED[name]
    facts = describe_model(zoo.preset(name))
    outside = 0 if embeddings else sum(facts["parameters"].get(part, 0) for part in ("embedding", "head"))
    assert facts["total"] - outside == pytest.approx(total, rel=0.03)
    assert facts["active"] - outside == pytest.approx(active, rel=0.03)


# The released configurations, for transformers' own models.
CONFIGURATIONS = {
    **{
        f"mamba2-{size}": (
            "Mamba2",
            {"vocab_size": 50288, "hidden_size": width, "num_hidden_layers": layers, "num_heads": width // 32}
            | {"head_dim": 64, "n_groups": 1, "tie_word_embeddings": True},
        )
        for size, width, layers in (
            ("130m", 768, 24), ("370m", 1024, 48), ("780m", 1536, 48), ("1.3b", 2048, 48), ("2.7b", 2560, 64)
        )
    },
    "codestral-mamba-7b": ("Mamba2", {"hidden_size": 4096, "num_heads": 128, "n_groups": 8, "num_hidden_layers": 64}),
    "falcon-mamba-7b": (
        "FalconMamba",
        {"vocab_size": 65024, "hidden_size": 4096, "num_hidden_layers": 64, "tie_word_embeddings": False},
    ),
    "bamba-9b": ("Bamba", {"vocab_size": 128256, "attn_layer_indices": [9, 18, 27], "mamba_d_state": 128}),
    "jamba-v0.1": ("Jamba", {}),  # its defaults
    "recurrentgemma-2b": ("RecurrentGemma", {"num_key_value_heads": 1, "intermediate_size": 15360}),
    "mixtral-8x7b": ("Mixtral", {}),  # its defaults
    "starcoderbase-1b": (
        "GPTBigCode",
        {"vocab_size": 49152, "n_embd": 2048, "n_head": 16, "n_inner": 8192, "n_layer": 24, "n_positions": 8192},
    ),
    "falcon-7b": ("Falcon", {}),  # its defaults
    "olmoe-1b-7b": ("Olmoe", {"intermediate_size": 1024}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_presets_are_as_large_as_transformers_models(name):
    import transformers

    kind, options = CONFIGURATIONS[name]
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options))
    assert count(model) == PUBLISHED[name]


def test_attention_stands_where_the_released_hybrids_have_it():
    layers = [spec.kind for spec in zoo.preset("bamba-9b").blocks()][::2]
    assert [index for index, kind in enumerate(layers) if kind == "gqa"] == [9, 18, 27]
    from transformers import JambaConfig

    theirs, stack = JambaConfig(), zoo.preset("jamba-v0.1").blocks()
    mixers, units = [spec.kind for spec in stack[::2]], [spec.kind for spec in stack[1::2]]
    assert mixers == [{"attention": "gqa", "mamba": "mamba"}[kind] for kind in theirs.layers_block_type]
    assert units == ["moe" if experts > 1 else "swiglu" for experts in theirs.layers_num_experts]


def test_gated_delta_net_is_as_large_as_a_released_model():
    """puigde/gated-deltanet-380M-15B-slimpajama of flash-linear-attention: 357,781,928 parameters as it tells."""
    blocks = [
        {"kind": "gated_delta_net", "heads": 4, "head_dim": 256, "value_head_dim": 256},
        {"kind": "swiglu", "hidden": 2816},
    ]
    small = {"width": 1024, "stack": [{"repeat": 21, "blocks": blocks}]}
    facts = describe_model(zoo.ModelConfig.from_dict(zoo.preset("gated-deltanet-1.3b").to_dict() | small))
    assert facts["total"] == 357_781_928


def test_mambaformer_is_as_large_as_its_authors():
    """2402.04248's standard model: a Mamba block, then 12 times attention with biases and Mamba, LayerNorm before each
    and at the end; Mamba blocks as transformers counts them."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    with torch.device("meta"):
        mamba = count(MambaMixer(MambaConfig(hidden_size=256), 0))
        attention = count(torch.nn.MultiheadAttention(256, 8))
    norms = 26 * 2 * 256
    facts = describe_model(zoo.preset("mambaformer"))
    assert facts["total"] - facts["parameters"]["embedding"] == 13 * mamba + 12 * attention + norms
    kinds = [spec.kind for spec in zoo.preset("mambaformer").blocks()]
    assert kinds == ["mamba"] + 12 * ["gqa", "mamba"]


def test_switch_is_as_large_as_the_released_but_for_cross_attention():
    """google/switch-base-128, 7.4 billion parameters: encoder and decoder in a row, less the decoder's cross-attention
    with its norms, the tables of relative positions and one of the two last norms."""
    import transformers

    config = transformers.SwitchTransformersConfig(
        d_ff=3072, num_experts=128, num_sparse_encoder_layers=6, num_sparse_decoder_layers=6
    )
    with torch.device("meta"):
        model = transformers.SwitchTransformersForConditionalGeneration(config)
    left_out = 12 * (4 * 768 * 768 + 768) + 2 * 32 * 12 + 768
    facts = describe_model(zoo.preset("switch-base-like"))
    assert facts["total"] == count(model) - left_out
    assert facts["total"] == pytest.approx(7.4e9, rel=0.01)
    one_expert = 2 * 768 * 3072
    assert facts["active"] == facts["total"] - 12 * 127 * one_expert


@pytest.mark.parametrize("name", H3_HYBRIDS)
def test_h3_hybrids_are_as_large_as_the_released(name):
    """Counted from the released code: GPT-2's embedding (padded to 50264), in each layer two LayerNorms, an MLP of 4
    width, and attention or H3: four projections, shift systems (B, C: 64 each, D), diagonal systems (B, C complex: 32
    each, A complex: 32, a step, D) for each feature; all projections have biases."""
    width, layers, attention = H3_HYBRIDS[name]
    projections = 4 * (width * width + width)
    h3 = projections + width * ((64 + 64 + 1) + (2 * 32 + 2 * 32 + 2 * 32 + 1 + 1))
    mlp = 2 * 4 * width * width + 4 * width + width
    norms = 2 * 2 * width
    total = 50264 * width + layers * (mlp + norms) + 2 * width
    total += len(attention) * projections + (layers - len(attention)) * h3
    assert describe_model(zoo.preset(name))["total"] == total
    assert total == pytest.approx({"m": 1e6, "b": 1e9}[name[-1]] * float(name[10:-1]), rel=0.025)
    mixers = [spec.kind for spec in zoo.preset(name).blocks()[::2]]
    assert mixers == ["gqa" if layer in attention else "h3" for layer in range(layers)]


def test_every_published_preset_is_tested_and_mixtral_uses_12_9b():
    ours = {name for name in zoo.presets() if name.startswith("stdlib-")}
    assert set(zoo.presets()) - ours == {*PUBLISHED, *ROUNDED, *H3_HYBRIDS, "mambaformer", "switch-base-like"}
    assert describe_model(zoo.preset("mixtral-8x7b"))["active"] == 12_879_925_248
    with pytest.raises(ValueError, match=r"unknown preset 'mamba-130' \(did you mean 'mamba-130m'\?\)"):
        zoo.preset("mamba-130")


@pytest.mark.parametrize("kind", zoo.kinds())
def test_describe_counts_every_parameter_once(kind):
    facts = describe_block(kind, 24)
    assert sum(facts["parameters"].values()) == count(zoo.block(kind, 24))
    assert facts["about"]
    assert all(row["flops"] > 0 for row in facts["contexts"])


def test_parameters_tagged_against_decay_are_found_by_full_name():
    from zoo.block import tags

    model = zoo.LanguageModel({"vocab_size": 5, "width": 24, "stack": ["mamba", "rwkv4"]})
    found = tags(model)
    names = dict(model.named_parameters())
    assert set(found) <= set(names)
    assert "blocks.0.norm.weight" in found
    assert any("A_log" in name for name in found)
    assert isinstance(names["embedding.weight"], torch.nn.Parameter)
