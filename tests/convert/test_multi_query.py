"""GPT-BigCode and Falcon checkpoints against transformers: logits, generation, and the way back."""

import pytest
import torch
import transformers

import zoo.convert
from tests.convert.peer import difference, equals_transformers, model_of, randomise, there_and_back
from zoo.config import preset
from zoo.convert.family import spelled_out
from zoo.convert.fused import ACTIVATIONS
from zoo.convert.published import family, target_config
from zoo.hf import ZooConfig
from zoo.layers.ffn import activation_function

TOKENS = {"vocab_size": 37, "pad_token_id": 0, "eos_token_id": 5}
SIZES = {
    "gpt_bigcode": TOKENS
    | {"n_embd": 20, "n_layer": 2, "n_head": 5, "n_positions": 40, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "falcon": TOKENS | {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6},
}
CLASSES = {"gpt_bigcode": "GPTBigCode", "falcon": "Falcon"}
ALIBI = {"alibi": True, "attn_implementation": "sdpa"}  # eager adds ALiBi's bias twice: to logits and to the mask
CASES = {
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt_bigcode, multi-head, untied": (
        "gpt_bigcode",
        {
            "multi_query": False,
            "n_inner": 27,
            "activation_function": "relu",
            "scale_attn_weights": False,
            "layer_norm_epsilon": 0.01,
            "tie_word_embeddings": False,
            "resid_pdrop": 0.0,
            "attention_softmax_in_fp32": False,
            "scale_attention_softmax_in_fp32": False,
            "n_layer": 3,
        },
    ),
    "falcon 7b": ("falcon", {"rope_parameters": {"rope_type": "default", "rope_theta": 70.0}}),
    "falcon 40b": (
        "falcon",
        {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "bias": True,
            "ffn_hidden_size": 31,
            "layer_norm_epsilon": 0.01,
            "tie_word_embeddings": False,
            "activation": "gelu_new",
        },
    ),
    "falcon 11b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1, "bias": True},
    ),
    "falcon, alibi, in turn": (
        "falcon",
        ALIBI | {"multi_query": False, "parallel_attn": False, "bias": True, "activation": "silu"},
    ),
    "falcon, alibi, side by side": ("falcon", ALIBI | {"multi_query": False}),
}
pytestmark = pytest.mark.filterwarnings("ignore:alibi", "ignore:embd_pdrop")
cases = pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES)


def config_of(kind, options, **more):
    options = SIZES[kind] | {"attn_implementation": "eager"} | options | more
    return getattr(transformers, f"{CLASSES[kind]}Config")(**options)


@cases
def test_logits_and_generation_equal_transformers(kind, options):
    equals_transformers(config_of(kind, options))


@cases
def test_there_and_back_is_bitwise_the_same(kind, options, tmp_path):
    there_and_back(config_of(kind, options, initializer_range=0.1, bos_token_id=3), tmp_path)


@cases
def test_a_model_made_here_can_be_written(kind, options):
    """What is read from a configuration needs no original to be written again."""
    described = family(kind).read(config_of(kind, options))
    found, config = target_config(ZooConfig(model=described), kind)
    assert config.architectures == [found.architecture] == [f"{CLASSES[kind]}ForCausalLM"]
    assert spelled_out(found.read(config)) == spelled_out(described)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
        assert theirs.num_parameters() == sum(p.numel() for p in zoo.LanguageModel(described).parameters())


@pytest.mark.parametrize("theirs", ACTIVATIONS)
def test_activations_are_transformers(theirs):
    x = torch.linspace(-6, 6, 99, dtype=torch.float64)
    wanted = transformers.activations.get_activation(theirs)(x)
    # gelu_fast writes the root of 2 / pi with ten digits.
    torch.testing.assert_close(activation_function(ACTIVATIONS[theirs])(x), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "kind", "size", "told"),
    [
        ("starcoderbase-1b", "gpt_bigcode", 1_137_207_296, {"n_inner": 8192, "multi_query": True, "resid_pdrop": 0.1}),
        ("falcon-7b", "falcon", 6_921_720_704, {"multi_query": True, "parallel_attn": True, "ffn_hidden_size": 18176}),
    ],
)
def test_a_preset_is_a_published_configuration(name, kind, size, told):
    found, config = target_config(ZooConfig(model=preset(name)), None)
    assert found.model_type == kind
    assert {option: getattr(config, option) for option in told} == told
    with torch.device("meta"):
        assert transformers.AutoModelForCausalLM.from_config(config).num_parameters() == size


def test_dropout_is_kept_or_told(tmp_path):
    config = config_of("gpt_bigcode", {"embd_pdrop": 0.2, "attn_pdrop": 0.3, "resid_pdrop": 0.4})
    theirs = randomise(transformers.GPTBigCodeForCausalLM(config))
    with pytest.warns(UserWarning, match=r"embd_pdrop=0.2 and attn_pdrop=0.3 have no counterpart.*logits are alike"):
        ours = zoo.convert.load(theirs)
    assert {each.dropout for each in ours.model.residuals} == {0.4}
    zoo.convert.save(ours, tmp_path)
    back = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (back.embd_pdrop, back.attn_pdrop, back.resid_pdrop) == (0.2, 0.3, 0.4)


def test_rounding_of_alibi_is_told_and_what_it_amounts_to():
    """transformers' positions in bfloat16 are exact up to 256, as its slopes are for up to 8 heads."""
    theirs = falcon_with_alibi(heads=2)
    with pytest.warns(UserWarning, match="alibi: transformers rounds these biases to bfloat16, here they are exact"):
        ours = zoo.convert.load(theirs)
    tokens = torch.randint(6, 37, (1, 300))
    assert difference(theirs, ours, tokens[:, :256], None) < 1e-12
    assert 1e-6 < difference(theirs, ours, tokens, None) < 1e-2
    theirs = falcon_with_alibi(heads=12)
    assert 1e-6 < difference(theirs, zoo.convert.load(theirs), tokens[:, :24], None) < 1e-2


def falcon_with_alibi(heads):
    options = {"num_attention_heads": heads, "multi_query": False, "num_hidden_layers": 1}
    return model_of(config_of("falcon", ALIBI | options), torch.float64)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("gpt_bigcode", {"multi_query": False}), ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2})],
)
def test_operations_go_back_to_the_published_format(kind, options, tmp_path):
    """Fewer key and value heads, inside parallel blocks too, are another configuration of the same format."""
    ours = zoo.convert.load(randomise(transformers.AutoModelForCausalLM.from_config(config_of(kind, options))))
    ours.model = zoo.convert.share_kv(ours.model, 1)
    ours.config.model = ours.model.config.to_dict()
    zoo.convert.save(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    tokens = torch.randint(6, 37, (2, 9))
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    if kind == "gpt_bigcode":
        assert (theirs.config.multi_query, theirs.config.num_key_value_heads) == (True, 1)
    else:
        assert (theirs.config.new_decoder_architecture, theirs.config.num_kv_heads) == (True, 1)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gpt_bigcode", {"multi_query": False, "add_cross_attention": True}, "add_cross_attention=True cannot be"),
        ("gpt_bigcode", {"activation_function": "mish"}, "activation_function='mish' cannot be converted; gelu, "),
        ("falcon", {"activation": "quick_gelu"}, "activation='quick_gelu' cannot be converted; gelu, "),
        ("falcon", {"hidden_dropout": 0.1}, r"hidden_dropout=0.1 has no counterpart; set it to 0"),
        ("falcon", {"attention_dropout": 0.1}, r"attention_dropout=0.1 has no counterpart; set it to 0"),
        ("falcon", {"apply_residual_connection_post_layernorm": True}, "layernorm=True cannot be converted"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2 is for new_decoder_architecture=True"),
        ("falcon", {"multi_query": False, "num_kv_heads": 2}, "num_kv_heads=2 is for new_decoder_architecture=True"),
        (
            "falcon",
            {"new_decoder_architecture": True, "parallel_attn": False},
            "parallel_attn=False is not for new_decoder_architecture=True",
        ),
        (
            "falcon",
            {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3},
            "num_ln_in_parallel_attn=3 cannot be converted; 1 and 2 can",
        ),
        (
            "falcon",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not read by Falcon",
        ),
        (
            "falcon",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 9.0, "factor": 2.0}},
            "rope_type='dynamic' cannot",
        ),
    ],
)
def test_options_that_cannot_be_converted_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        family(kind).read(config_of(kind, options))


ATTENDS, FEEDS = {"kind": "gqa", "heads": 4, "kv_heads": 1}, {"kind": "mlp"}
PLACES = {"kind": "learned_position", "context": 50}
BIASED = [{"kind": "gqa", "heads": 4, "position": None, "bias": True, "out_bias": True}, {"kind": "mlp", "bias": True}]
GPT = {"kind": "mlp", "bias": True, "activation": "gelu_tanh"}


def side(*blocks, **options):
    return {"kind": "parallel", "blocks": list(blocks)} | options


@pytest.mark.parametrize(
    ("kind", "stack", "message"),
    [
        ("gpt_bigcode", BIASED, r"stack\[0\] is of kind gqa; the first block is learned_position"),
        ("gpt_bigcode", [PLACES, "mamba"], r"stack\[1\] is of kind mamba; the blocks of a layer are gqa, then mlp"),
        ("gpt_bigcode", [PLACES, ATTENDS], r"the layer at stack\[1\] has 1 blocks"),
        ("gpt_bigcode", [PLACES], "the layer at the stack has 0 blocks"),
        ("gpt_bigcode", [PLACES, ATTENDS | {"position": None}, GPT], r"blocks\[1\].bias=False would become True"),
        ("gpt_bigcode", [PLACES, BIASED[0] | {"scale": 0.3}, GPT], r"blocks\[1\].scale=0.3 would become 1.0"),
        ("gpt_bigcode", [PLACES, BIASED[0] | {"kv_heads": 2}, GPT], r"blocks\[1\].kv_heads=2 would become 4"),
        ("gpt_bigcode", [PLACES, *BIASED, BIASED[0], GPT], r"blocks\[4\].activation='gelu_tanh' would become 'gelu'"),
        ("falcon", [ATTENDS | {"kv_heads": 2}, FEEDS], r"blocks\[0\].kv_heads=2 would become 4"),
        ("falcon", [side(FEEDS, ATTENDS)], r"stack\[0\].blocks\[0\] is of kind mlp; the blocks of a layer are gqa"),
        ("falcon", [side(ATTENDS, FEEDS, FEEDS)], r"the layer at stack\[0\].blocks\[0\] has 3 blocks"),
        ("falcon", [side(ATTENDS, FEEDS, norm="rms")], r"blocks\[0\].norm='rms' would become 'layer'"),
        ("falcon", [side(ATTENDS, FEEDS, norm="layer", norm_eps=0.1)], r"blocks\[0\].norm_eps=0.1 would become 1e-05"),
        ("falcon", [side(ATTENDS, FEEDS), ATTENDS, FEEDS], r"blocks\[1\].kind='gqa' would become 'parallel'"),
        (
            "falcon",
            [side(ATTENDS | {"position": {"kind": "alibi"}}, FEEDS)],
            r"blocks\[0\].blocks\[0\].position=.*1.0.* would become .*0.4",
        ),
        ("falcon", [side(ATTENDS, FEEDS | {"bias": True})], r"blocks\[0\].blocks\[1\].bias=True would become False"),
    ],
)
def test_what_a_format_cannot_hold_is_named(kind, stack, message):
    model = {"vocab_size": 7, "width": 24, "norm": "layer", "stack": stack}
    with pytest.raises(ValueError, match=f"the format '{kind}' cannot hold this model: {message}"):
        target_config(ZooConfig(model=model), kind)
