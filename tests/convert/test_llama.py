"""Llama checkpoints against transformers' own model: logits, generation, and the way back."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import zoo.convert
from tests.convert.peer import equals_transformers, randomise, there_and_back
from zoo.config import ModelConfig, preset
from zoo.convert.family import spelled_out
from zoo.convert.published import target_config
from zoo.hf import ZooConfig, ZooForCausalLM

SIZES = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 27,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 5,
}
ROPE = {"rope_theta": 70.0, "factor": 4.0, "original_max_position_embeddings": 16}
OPTIONS = {
    "llama 2": {"num_key_value_heads": 4},
    "tied, biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "multi-query, gelu": {"num_key_value_heads": 1, "hidden_act": "gelu", "rms_norm_eps": 0.01, "head_dim": 10},
    "llama 3": {
        "head_dim": 8,
        "hidden_act": "gelu_pytorch_tanh",
        "rope_parameters": ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "linear": {"head_dim": 2, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    "yarn": {"head_dim": 12, "rope_parameters": ROPE | {"rope_type": "yarn", "beta_fast": 20.0, "truncate": False}},
    "old file": {"head_dim": 4, "rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
}
CASES = {name: ("Llama", options) for name, options in OPTIONS.items()}
cases = pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)


def config_of(name, options, **more):
    return getattr(transformers, f"{name}Config")(**SIZES | options, **more)


def batch() -> torch.Tensor:
    return torch.randint(6, SIZES["vocab_size"], (3, 24))


@cases
def test_logits_and_generation_equal_transformers(name, options):
    equals_transformers(config_of(name, options, attn_implementation="eager"))


@cases
def test_there_and_back_is_bitwise_the_same(name, options, tmp_path):
    there_and_back(config_of(name, options, initializer_range=0.1, bos_token_id=3), tmp_path)


@pytest.mark.parametrize("name", ["llama-3.2-1b"])
def test_a_preset_is_a_published_configuration(name):
    """A model made here can be written as a Llama: what the configuration says is what the published one says."""
    kind, config = target_config(ZooConfig(model=preset(name)), None)
    assert kind.model_type == "llama"
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.hidden_size, config.num_key_value_heads, config.tie_word_embeddings) == (2048, 8, True)
    assert config.rope_parameters["original_max_position_embeddings"] == 8192
    with torch.device("meta"):
        assert transformers.LlamaForCausalLM(config).num_parameters() == 1_235_814_400
    assert spelled_out(kind.read(config)) == spelled_out(preset(name))


def test_a_model_trained_here_runs_as_a_llama(tmp_path):
    described = {"vocab_size": 31, "width": 24, "stack": ["gqa", "swiglu", "gqa", "swiglu"], "tied_embeddings": False}
    model = ZooForCausalLM(ZooConfig(model=described)).eval()
    zoo.convert.save(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(0, 31, (2, 9))
    torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


BLOCKS = [{"kind": "gqa", "heads": 2}, "swiglu"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stack": [{"kind": "gqa", "heads": 2, "window": 4}, "swiglu"]}, r"blocks\[0\].window=4 would become None"),
        ({"stack": [*BLOCKS, {"kind": "gqa", "heads": 3}, "swiglu"]}, r"blocks\[2\].heads=3 would become 2"),
        ({"stack": ["mamba", "swiglu"]}, r"stack\[0\] is of kind mamba; its blocks are gqa, then swiglu or geglu"),
        ({"stack": [*BLOCKS, "gqa"]}, "the stack has 3 blocks"),
        ({"stack": [{"kind": "gqa", "position": None}, "swiglu"]}, r"blocks\[0\].position=None would become"),
        ({"stack": [{"kind": "gqa", "bias": True}, "swiglu"]}, r"blocks\[0\].out_bias=False would become True"),
        ({"norm_position": "post"}, "norm_position='post' would become 'pre'"),
        ({"norm": "layer"}, "norm='layer' would become 'rms'"),
        ({"logit_softcap": 3.0}, "logit_softcap=3.0 would become None"),
        ({"dropout": 0.1}, "dropout=0.1 would become 0.0"),
        ({"width": 22, "stack": [{"kind": "gqa", "heads": 3, "head_dim": 4}, "swiglu"]}, "[^!]*not a multiple"),
    ],
)
def test_what_a_llama_cannot_hold_is_named(changed, message):
    config = ZooConfig(model={"vocab_size": 7, "width": 24, "stack": BLOCKS} | changed)
    with pytest.raises(ValueError, match="the format 'llama' cannot hold this model: " + message):
        target_config(config, "llama")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 has no counterpart"),
        ({"hidden_act": "relu"}, "hidden_act='relu' cannot be converted; silu, gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 9.0, "factor": 2.0}}, "rope_type='dynamic' cannot"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 cannot be converted",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: quantised weights"),
    ],
)
def test_options_that_cannot_be_converted_are_named(options, message, tmp_path):
    config = transformers.LlamaConfig(**SIZES | options)
    config.save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        zoo.convert.load(tmp_path)


def test_an_unknown_option_is_told_and_kept(tmp_path):
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, frobnicate=3))
    theirs.save_pretrained(tmp_path / "llama")
    with pytest.warns(UserWarning, match="LlamaConfig has no frobnicate"):
        zoo.convert.convert(tmp_path / "llama", tmp_path / "zoo")
    zoo.convert.convert(tmp_path / "zoo", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["frobnicate"] == 3


# Tensors --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    theirs = randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)))
    theirs.save_pretrained(folder)
    return folder


def change(stored, folder, **changes):
    """A copy of a checkpoint with tensors changed, or removed (None)."""
    shutil.copytree(stored, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = {"embed": "model.embed_tokens.weight", "q": "model.layers.1.self_attn.q_proj.weight"}.get(name, name)
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": None}, "lacks model.layers.1.self_attn.q_proj.weight"),
        ({"q": torch.zeros(24, 19)}, r"q_proj.weight has shape \(24, 19\), its configuration says \(24, 20\)"),
        ({"q": torch.zeros(24, 20, dtype=torch.bfloat16)}, "q_proj.weight, .*have different dtypes"),
        ({"q": torch.zeros(24, 20, dtype=torch.int8)}, "q_proj.weight is of torch.int8; quantised weights"),
        ({"score.weight": torch.zeros(2)}, "holds score.weight, which its configuration does not tell of"),
        ({"lm_head.weight": torch.zeros(37, 20)}, "lm_head.weight is not model.embed_tokens.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(stored, changes, message, tmp_path):
    folder = change(stored, tmp_path / "changed", **changes)
    with pytest.raises(ValueError, match=message):
        zoo.convert.load(folder)
    with pytest.raises(ValueError, match=message):
        zoo.convert.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_tensors_that_say_nothing_new_may_be_there(stored, tmp_path):
    """A tied head stored a second time, and the rotary frequencies that older files hold."""
    embedding = load_file(stored / "model.safetensors")["model.embed_tokens.weight"]
    extra = {"lm_head.weight": embedding, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    model = zoo.convert.load(change(stored, tmp_path / "more", **extra))
    assert torch.equal(model.model.head.weight, embedding)
    assert model.model.head.weight is model.model.embedding.weight


def test_shards_stream(stored, tmp_path, monkeypatch):
    """Never more than a shard and one entry in memory, and many shards are read and written as one."""
    from zoo.convert import tensors

    sharded = tmp_path / "sharded"
    transformers.LlamaForCausalLM.from_pretrained(stored).save_pretrained(sharded, max_shard_size="5KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    monkeypatch.setattr(tensors.write, "__defaults__", (6000,))
    largest = 0
    save = tensors.save_file

    def watched(held, *arguments, **options):
        nonlocal largest
        largest = max(largest, sum(each.nbytes for each in held.values()))
        return save(held, *arguments, **options)

    monkeypatch.setattr(tensors, "save_file", watched)
    zoo.convert.convert(sharded, tmp_path / "zoo")
    zoo.convert.convert(tmp_path / "zoo", tmp_path / "back")
    assert largest <= 6000
    for folder in ("zoo", "back"):
        assert len(list((tmp_path / folder).glob("*.safetensors"))) > 3
        assert not list((tmp_path / folder).glob("*.part"))
    tokens = batch()
    wanted = transformers.LlamaForCausalLM.from_pretrained(stored)(tokens).logits
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")(tokens).logits
    assert torch.equal(back, wanted)
    found = ZooForCausalLM.from_pretrained(tmp_path / "zoo")(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    next(iter(sorted(sharded.glob("*.safetensors")))).unlink()
    with pytest.raises(ValueError, match=r"lacks model-00001-of-.*copy the checkpoint again"):
        zoo.convert.load(sharded)


def test_pickles_damage_and_other_places(stored, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(stored, pickled)
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no safetensors files"):
        zoo.convert.load(pickled)
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model.bin\).*save them with save_pretrained"):
        zoo.convert.load(pickled)
    (pickled / "model.safetensors").write_bytes((stored / "model.safetensors").read_bytes()[:900])
    with pytest.raises(ValueError, match="is damaged or only partly written"):
        zoo.convert.load(pickled)
    with pytest.raises(ValueError, match="convert to another folder"):
        zoo.convert.convert(stored, stored)
    with pytest.raises(ValueError, match="becomes a zoo one; leave the family out"):
        zoo.convert.convert(stored, tmp_path / "out", "llama")
    with pytest.raises(FileNotFoundError, match="there is no folder /no/such"):
        zoo.convert.load("/no/such")


def test_other_models_are_named(tmp_path):
    transformers.GPT2Config(n_embd=4, n_layer=1, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="model_type='gpt2' cannot be converted; these can: llama, mistral, qwen2, qwen3, mixtral, "
    ):
        zoo.convert.load(tmp_path)
    other = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="LlamaForSequenceClassification cannot be converted; pass a LlamaForCausalLM"):
        zoo.convert.load(other)
    config = ZooConfig(model=ModelConfig(vocab_size=7, width=24, stack=BLOCKS))
    with pytest.raises(ValueError, match=r"model_type='lama' cannot be converted \(did you mean 'llama'\?\)"):
        target_config(config, "lama")
