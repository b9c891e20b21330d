"""DeepSeek V2 and V3 and Kimi Linear checkpoints against transformers: logits, generation, and the way back."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import zoo.convert
from tests.convert.peer import equals_transformers, model_of, randomise, respell, there_and_back
from zoo.convert.family import spelled_out
from zoo.convert.kimi_linear import spelling
from zoo.convert.published import family, target_config, zoo_config
from zoo.hf import ZooConfig, ZooForCausalLM

SIZES = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 27,
    "moe_intermediate_size": 9,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "kv_lora_rank": 7,
    "q_lora_rank": None,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 5,
}
# Even sizes: transformers' rotation of DeepSeek V2 takes no others (view_as_complex of a part of the projection).
V2 = {"kv_lora_rank": 8, "qk_nope_head_dim": 4}
V2 |= {"n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 1}
V3 = {"n_routed_experts": 6, "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1}
KIMI = {"num_local_experts": 4, "n_group": 1, "topk_group": 1, "linear_head_dim": 6, "linear_num_heads": 3}
LINEAR, FULL = "linear_attention", "full_attention"
KIMI |= {"layer_types": [LINEAR, FULL, LINEAR]}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 70.0,
    "factor": 8.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
CASES = {
    "deepseek_v2": ("DeepseekV2", V2 | {"tie_word_embeddings": True, "hidden_act": "gelu", "rms_norm_eps": 0.01}),
    "deepseek_v2, groups, yarn": (
        "DeepseekV2",
        V2
        | {
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.7,
            "first_k_dense_replace": 0,
            "q_lora_rank": 4,
            "attention_bias": True,
            "rope_parameters": YARN,
        },
    ),
    "deepseek_v2, dense, biases": ("DeepseekV2", V2 | {"first_k_dense_replace": 3, "mlp_bias": True}),
    "deepseek_v3": ("DeepseekV3", V3 | {"q_lora_rank": 4, "attention_bias": True, "rope_parameters": YARN}),
    "deepseek_v3, halves": (
        "DeepseekV3",
        V3
        | {
            "rope_interleave": False,
            "norm_topk_prob": False,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.0,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_pytorch_tanh",
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
        },
    ),
    "kimi_linear": ("KimiLinear", KIMI),
    "kimi_linear, groups": (
        "KimiLinear",
        KIMI
        | {
            "num_local_experts": 6,
            "n_group": 3,
            "topk_group": 2,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
            "routed_scaling_factor": 0.7,
            "q_lora_rank": 4,
            "attention_bias": True,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "layer_types": [FULL, LINEAR, FULL],
            "linear_conv_kernel_dim": 3,
            "rms_norm_eps": 0.01,
        },
    ),
    "kimi_linear, no linear": (
        "KimiLinear",
        KIMI | {"layer_types": [FULL] * 3, "mlp_layer_types": ["dense", "sparse", "dense"], "hidden_act": "gelu"},
    ),
}
TYPES = {"DeepseekV2": "deepseek_v2", "DeepseekV3": "deepseek_v3", "KimiLinear": "kimi_linear"}
cases = pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)


def config_of(name, options, **more):
    return getattr(transformers, f"{name}Config")(**SIZES | options, **more)


@cases
def test_logits_and_generation_equal_transformers(name, options):
    # Of its experts' implementations only this one takes float64.
    equals_transformers(config_of(name, options, attn_implementation="eager", experts_implementation="eager"))


@cases
def test_there_and_back_is_bitwise_the_same(name, options, tmp_path):
    config = config_of(name, options, initializer_range=0.1, bos_token_id=3)
    there_and_back(config, tmp_path, spelling if name == "KimiLinear" else None)


@cases
def test_a_model_made_here_can_be_written(name, options):
    """What is read from a configuration needs no original to be written again."""
    kind = family(TYPES[name])
    read = kind.read(config_of(name, options))
    found, config = target_config(ZooConfig(model=read), kind.model_type)
    assert config.architectures == [found.architecture] == [f"{name}ForCausalLM"]
    assert spelled_out(found.read(config)) == spelled_out(read)
    with torch.device("meta"):
        theirs = [getattr(transformers, f"{name}ForCausalLM")(each) for each in (config, config_of(name, options))]
    shapes = [{name: each.shape for name, each in model.state_dict().items()} for model in theirs]
    assert shapes[0] == shapes[1]


# Published configurations ---------------------------------------------------------------------------------------

LONG = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
LATENT = {
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
}
DEEPSEEK = LATENT | {
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "max_position_embeddings": 163840,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "seq_aux": True,
}
V2_LITE = DEEPSEEK | {
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": LONG | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
DEEPSEEK_V3 = DEEPSEEK | {
    "model_type": "deepseek_v3",
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "rope_scaling": LONG | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
FULL_LAYERS = [4, 8, 12, 16, 20, 24, 27]
KIMI_LINEAR = LATENT | {
    "model_type": "kimi_linear",
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "linear_attn_config": {
        "full_attn_layers": FULL_LAYERS,
        "kda_layers": [layer for layer in range(1, 28) if layer not in FULL_LAYERS],
        "head_dim": 128,
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "moe_intermediate_size": 1024,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "pad_token_id": 163839,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "use_grouped_topk": True,
    "vocab_size": 163840,
}
FILES = {"v2-lite": (V2_LITE, 15_706_484_224), "v3": (DEEPSEEK_V3, 671_026_404_352)}
FILES |= {"kimi": (KIMI_LINEAR, 49_122_675_072)}


@pytest.mark.parametrize(("file", "parameters"), FILES.values(), ids=FILES)
@pytest.mark.filterwarnings("error:transformers' .* has no", "ignore:`rope_scaling` is deprecated")
def test_published_configurations(file, parameters):
    """Read as they are; parameters are counted; written again, with the original and without, they say the same."""
    kind = family(file["model_type"])
    given = kind.config_class(**file)
    ours = zoo_config(kind, given)
    with torch.device("meta"):
        model = ZooForCausalLM(ours)
        assert sum(each.numel() for each in model.parameters()) == parameters
        assert getattr(transformers, kind.architecture)(given).num_parameters() == parameters
    _, config = target_config(ours, None)
    wanted = {name: value for name, value in given.to_diff_dict().items() if name != "dtype"}
    assert config.to_diff_dict() == wanted | {"architectures": [kind.architecture]}
    ours.published = None
    _, config = target_config(ours, file["model_type"])
    said = config.to_dict()
    asked = set(file) - {"rope_theta", "rope_scaling", "torch_dtype", "model_max_length", "num_nextn_predict_layers"}
    asked -= {"ep_size", "seq_aux", "max_position_embeddings", "head_dim"}  # nothing of ours depends on them
    assert {name: said.get(name) for name in asked} == {name: file[name] for name in asked}


# What cannot be converted ---------------------------------------------------------------------------------------

REFUSED = [
    ("DeepseekV2", {"attention_dropout": 0.1}, "attention_dropout=0.1 has no counterpart"),
    ("DeepseekV2", {"num_key_value_heads": 1}, "num_key_value_heads=1 cannot be converted: .* num_attention_heads=5"),
    ("DeepseekV2", {"mlp_bias": True}, "mlp_bias=True cannot be converted with mixtures"),
    ("DeepseekV2", {"norm_topk_prob": True}, "norm_topk_prob=True cannot be converted: .* set it to false"),
    ("DeepseekV2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' cannot be converted; greedy and group"),
    ("DeepseekV2", {"topk_method": "group_limited_greedy"}, "n_group=None says nothing.* give a number"),
    ("DeepseekV2", {"n_shared_experts": 0}, "n_shared_experts=0 cannot be converted: .* use at least 1"),
    ("DeepseekV2", {"num_experts_per_tok": None}, "num_experts_per_tok=None says nothing"),
    ("DeepseekV2", {"moe_layer_freq": 2}, "moe_layer_freq=2 cannot be converted: .* as with 1"),
    ("DeepseekV2", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid' cannot be converted: .* as with 'softmax'"),
    ("DeepseekV2", {"hidden_act": "relu"}, "hidden_act='relu' cannot be converted"),
    ("DeepseekV3", {"topk_method": "greedy"}, "topk_method='greedy' cannot be converted: .* as with 'noaux_tc'"),
    ("DeepseekV3", {"v_head_dim": None}, "v_head_dim=None says nothing"),
    ("DeepseekV3", {"first_k_dense_replace": None}, "first_k_dense_replace=None says nothing"),
    ("DeepseekV3", {"topk_group": None}, "topk_group=None says nothing"),
    ("DeepseekV3", {"head_dim": 8}, "head_dim=8 cannot be converted: .* qk_rope_head_dim=6"),
    (
        "DeepseekV3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5 cannot be converted: all of qk_rope_head_dim=6",
    ),
    (
        "DeepseekV3",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 9.0, "factor": 2.0}},
        "rope_type='dynamic' cannot be converted",
    ),
    ("KimiLinear", {"tie_word_embeddings": True}, "tie_word_embeddings=True cannot be converted: .* set it to false"),
    (
        "KimiLinear",
        {"hidden_act": "gelu"},
        "hidden_act='gelu' cannot be converted: the convolution of",
    ),
    ("KimiLinear", {"mla_use_nope": False}, "mla_use_nope=False cannot be converted: .* as with True"),
    ("KimiLinear", {"moe_router_activation_func": "softmax"}, "moe_router_activation_func='softmax' cannot be"),
    ("KimiLinear", {"layer_types": ["sliding_attention"] * 3}, "layer_types: 'sliding_attention' cannot be converted"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_options_that_cannot_be_converted_are_named(name, options, message):
    sizes = {"DeepseekV2": V2, "DeepseekV3": V3, "KimiLinear": KIMI}[name]
    with pytest.raises(ValueError, match=message):
        family(TYPES[name]).read(config_of(name, sizes | options))


MIX = {"kind": "moe", "experts": 4, "shared_experts": 1, "load_balance": 0.0}
FREE = {"kind": "loss_free", "update_rate": 0.5}
HALF, BIASED = {"kind": "rotary"}, {"kind": "swiglu", "bias": True}
UNHELD = [
    ("deepseek_v2", [{"position": HALF}, MIX], r"blocks\[0\].position=.*'half'.* would become .*'interleaved'"),
    ("deepseek_v2", [{"position": None}, MIX], r"blocks\[0\].position=None would become"),
    ("deepseek_v2", [{}, MIX], r"blocks\[1\].router=.*'renormalise': True.* would become .*'renormalise': False"),
    ("deepseek_v2", [{}, MIX | {"router": FREE}], r"blocks\[1\].router=.*'loss_free'.* would become .*'top_k'"),
    ("deepseek_v2", [{}, MIX | {"shared_experts": 0}], "n_shared_experts=0 cannot be converted"),
    ("deepseek_v3", [{}, MIX | {"router": FREE}, {}, "swiglu"], r"blocks\[3\].kind='swiglu' would become 'moe'"),
    ("deepseek_v2", [{"kind": "gqa"}, MIX], r"stack\[0\] is of kind gqa; its blocks are mla, then moe or swiglu"),
    ("deepseek_v3", [{}, MIX], r"blocks\[1\].router=.*'top_k'.* would become .*'loss_free'"),
    (
        "deepseek_v3",
        [{}, MIX | {"router": FREE | {"scores": "softmax"}}],
        r"blocks\[1\].router=.*'softmax'.* would become .*'sigmoid'",
    ),
    ("deepseek_v3", [{}, MIX | {"router": FREE, "shared_hidden": 3}], r"blocks\[1\].shared_hidden=3 would become"),
    ("deepseek_v3", [{}, BIASED], r"blocks\[1\].bias=True would become False"),
    ("deepseek_v3", [{"rope_dim": 4}, "swiglu", {"rope_dim": 6}, "swiglu"], r"blocks\[2\].rope_dim=6 would become 4"),
    ("kimi_linear", [{}, "swiglu"], r"blocks\[0\].position=.*'rotary'.* would become None"),
    ("kimi_linear", [{"kind": "kda", "gate_bias": True}, "swiglu"], r"blocks\[0\].gate_bias=True would become False"),
    ("kimi_linear", [{"kind": "kda", "rank": 3}, "swiglu"], r"blocks\[0\].rank=3 would become 12"),
    ("kimi_linear", [{"kind": "kda", "value_head_dim": 5}, "swiglu"], r"blocks\[0\].value_head_dim=5 would become 12"),
]


@pytest.mark.parametrize(("name", "stack", "message"), UNHELD)
def test_what_a_format_cannot_hold_is_named(name, stack, message):
    attends = {"kind": "mla", "heads": 2}
    stack = [attends | each if index % 2 == 0 else each for index, each in enumerate(stack)]
    with pytest.raises(ValueError, match=f"the format '{name}' cannot hold this model: {message}"):
        target_config(ZooConfig(model={"vocab_size": 7, "width": 24, "stack": stack, "tied_embeddings": False}), name)


def test_coefficients_of_training_are_held():
    """They are no fields of the class, and go by names of their own."""
    stack = [{"kind": "mla", "heads": 2}, MIX | {"router": FREE, "load_balance": 0.25}]
    _, config = target_config(ZooConfig(model={"vocab_size": 7, "width": 24, "stack": stack}), "deepseek_v3")
    assert (config.aux_loss_alpha, config.moe_router_bias_update_rate) == (0.25, 0.5)


def test_tokens_of_a_model_made_here_are_its_own():
    """The class' defaults are those of a published model, and lie outside of a small vocabulary."""
    model = {"vocab_size": 7, "width": 24, "stack": ["kda", "swiglu"], "tied_embeddings": False, "norm_eps": 1e-5}
    _, config = target_config(ZooConfig(model=model, eos_token_id=3, published={"model_type": "llama"}), "kimi_linear")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 3, None)


# Tensors --------------------------------------------------------------------------------------------------------


def stored(name, folder, dtype=torch.bfloat16, **changes):
    """A checkpoint with tensors added, or changed by a function."""
    sizes = {"DeepseekV3": V3, "KimiLinear": KIMI}[name]
    model_of(config_of(name, sizes, bos_token_id=3), dtype).save_pretrained(folder)
    if name == "KimiLinear":
        respell(folder, spelling)
    tensors = load_file(folder / "model.safetensors")
    for pattern, change in changes.items():
        tensors |= {each: change(tensors[each]) for each in tensors if each.endswith(pattern)}
    return tensors


def keep(tensors, folder):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_layers_that_predict_further_tokens_are_left_out_with_a_warning(tmp_path):
    """Published files of DeepSeek V3 hold one as layer 61; a layer of another number is no such layer."""
    tensors = stored("DeepseekV3", tmp_path / "a")
    wanted = dict(tensors)
    tensors["model.layers.61.eh_proj.weight"] = torch.ones(20, 40, dtype=torch.bfloat16)
    tensors["model.layers.61.self_attn.o_proj.weight"] = torch.ones(20, 45, dtype=torch.bfloat16)
    keep(tensors, tmp_path / "a")
    said = r"holds model.layers.61.eh_proj.weight, model.layers.61.self_attn.o_proj.weight, which .* are left out, here"
    with pytest.warns(UserWarning, match=said):
        model = zoo.convert.load(tmp_path / "a")
    zoo.convert.save(model, tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == wanted.keys()
    keep(wanted | {"model.layers.3.eh_proj.weight": torch.ones(20, 40)}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds model.layers.3.eh_proj.weight, which its configuration does not tell"):
        zoo.convert.load(tmp_path / "a")


def test_eight_bit_weights_are_refused(tmp_path):
    stored("DeepseekV3", tmp_path)
    file = tmp_path / "config.json"
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantised}))
    with pytest.raises(ValueError, match="quantization_config: quantised weights cannot be converted; dequantise"):
        zoo.convert.load(tmp_path)


BIAS = "e_score_correction_bias"


@pytest.mark.parametrize(
    ("name", "wide"), [("DeepseekV3", ()), ("KimiLinear", ("A_log", "dt_bias"))], ids=["deepseek_v3", "kimi_linear"]
)
def test_what_is_in_float32_stays_so(name, wide, tmp_path):
    """In a bfloat16 checkpoint, to the last bit, by objects and by files, and in a zoo checkpoint's router."""
    exact = dict.fromkeys(wide, lambda each: torch.randn(each.shape))
    tensors = stored(name, tmp_path / "a", **exact)
    keep(tensors, tmp_path / "a")
    found = {each.dtype for name, each in tensors.items() if name.endswith((BIAS, *wide))}
    assert found == {torch.float32}
    model = zoo.convert.load(tmp_path / "a")
    assert model.dtype == torch.bfloat16
    assert model(torch.arange(6, 12)[None]).logits.isfinite().all()
    zoo.convert.save(model, tmp_path / "b")
    zoo.convert.convert(tmp_path / "a", tmp_path / "zoo")
    zoo.convert.convert(tmp_path / "zoo", tmp_path / "c")
    for back in (load_file(tmp_path / way / "model.safetensors") for way in "bc"):
        assert back.keys() == tensors.keys()
        assert all(back[each].dtype == tensors[each].dtype and torch.equal(back[each], tensors[each]) for each in back)
    again = ZooForCausalLM.from_pretrained(tmp_path / "zoo", dtype="auto")
    router = again.model.residuals[3].block.router
    assert (router.bias.dtype, router.weight.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(router.bias, tensors[next(each for each in tensors if each.endswith(BIAS))])


def test_a_routers_bias_in_bfloat16_becomes_float32(tmp_path):
    """As in transformers; its values are the same."""
    tensors = stored("DeepseekV3", tmp_path / "a", **{BIAS: torch.Tensor.bfloat16})
    keep(tensors, tmp_path / "a")
    zoo.convert.save(zoo.convert.load(tmp_path / "a"), tmp_path / "b")
    back = load_file(tmp_path / "b" / "model.safetensors")
    for name, each in tensors.items():
        assert back[name].dtype == (torch.float32 if name.endswith(BIAS) else torch.bfloat16)
        assert torch.equal(back[name], each.to(back[name].dtype))


def test_a_dense_layer_by_either_name(tmp_path):
    """transformers saves the matrices of Kimi Linear's dense layers as if they were a mixture's, and reads both."""
    config = config_of("KimiLinear", KIMI, experts_implementation="eager")
    theirs = randomise(transformers.KimiLinearForCausalLM(config))
    theirs.save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    odd, right = (f"model.layers.0.{inside}.up_proj.weight" for inside in ("block_sparse_moe", "mlp"))
    assert odd in tensors
    assert right not in tensors
    model = zoo.convert.load(tmp_path / "saved")
    zoo.convert.save(model, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == {spelling(name) for name in tensors}
    tokens = torch.arange(6, 30)[None]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", experts_implementation="eager")
    assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)
    keep(tensors | {right: tensors[odd].clone()}, tmp_path / "saved")
    with pytest.raises(ValueError, match=f"holds {odd} and {right}, which are names of one tensor; keep one"):
        zoo.convert.load(tmp_path / "saved")
