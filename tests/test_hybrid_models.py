"""Whole hybrids: presets of Jamba, Bamba and RecurrentGemma, all layers but narrow, against transformers' models."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.attention.gqa import GQA
from zoo.layers.ffn import SwiGLU
from zoo.moe.moe import MoE

WIDTH, VOCAB = 32, 29
NARROW = {"hidden": 40, "heads": 4, "kv_heads": 2, "experts": 4, "window": 5}


def narrow(entry):
    """The same stack with the sizes of NARROW."""
    if isinstance(entry, list):
        return [narrow(each) for each in entry]
    if isinstance(entry, Mapping):
        return {name: NARROW.get(name, narrow(value)) for name, value in entry.items()}
    return entry


def small(preset: str) -> zoo.LanguageModel:
    config = zoo.preset(preset).to_dict()
    config |= {"width": WIDTH, "vocab_size": VOCAB, "stack": narrow(config["stack"])}
    return zoo.LanguageModel(config).double().eval()


def randomise(model: nn.Module) -> None:
    """Random weights, of sizes that let signals through 32 layers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "A_log" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                fan_in = 1 if "embed" in name else parameter.shape[-1]
                parameter.normal_(std=fan_in**-0.5)


def set_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Exactly these: one that is missing or left over is an error."""
    module.load_state_dict(weights, strict=True)


def copy_mixer(ours: nn.Module, theirs: nn.Module) -> None:
    if isinstance(ours, GQA):
        qkv = torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight])
        set_weights(ours, {"qkv.weight": qkv, "out.weight": theirs.o_proj.weight})
        return
    names = {"dt_layernorm": "dt_norm", "b_layernorm": "B_norm", "c_layernorm": "C_norm", "conv1d": "conv"}
    weights = {}
    for name, weight in theirs.state_dict().items():
        part, dot, rest = name.partition(".")
        weights[names.get(part, part) + dot + rest] = weight.squeeze(1) if name == "conv1d.weight" else weight
    set_weights(ours, weights)


def copy_feed_forward(ours: nn.Module, theirs: nn.Module) -> None:
    if isinstance(ours, MoE):
        experts = theirs.experts
        weights = {"router.weight": theirs.router.weight, "experts.up": experts.gate_up_proj.mT}
        set_weights(ours, weights | {"experts.down": experts.down_proj.mT})
    else:
        assert isinstance(ours, SwiGLU)
        up = torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight])
        set_weights(ours, {"up.weight": up, "down.weight": theirs.down_proj.weight})


def copy(ours: zoo.LanguageModel, theirs: nn.Module) -> None:
    with torch.no_grad():
        ours.embedding.weight.copy_(theirs.model.embed_tokens.weight)
        ours.norm.weight.copy_(theirs.model.final_layernorm.weight)
        ours.head.weight.copy_(theirs.lm_head.weight)
        assert len(ours.residuals) == 2 * len(theirs.model.layers)
        for index, layer in enumerate(theirs.model.layers):
            mixer, feed_forward = ours.residuals[2 * index : 2 * index + 2]
            mixer.norm.weight.copy_(layer.input_layernorm.weight)
            feed_forward.norm.weight.copy_(layer.pre_ff_layernorm.weight)
            copy_mixer(mixer.block, layer.self_attn if hasattr(layer, "self_attn") else layer.mamba)
            copy_feed_forward(feed_forward.block, layer.feed_forward)


@pytest.fixture
def exact(monkeypatch):
    """transformers' layers round to float32 on the way; in float64 they are an oracle to the last bits."""
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def stay(tensor, *args, **kwargs):
        if tensor.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values()):
            return tensor
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.Tensor, "to", stay)
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim=dim))


def their_model(name: str) -> nn.Module:
    import transformers

    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"attn_implementation": "sdpa", "experts_implementation": "eager"}
    if name == "Jamba":
        sizes |= {"num_experts": 4}
    else:
        sizes |= {"attn_layer_indices": [9, 18, 27], "mamba_n_heads": 2, "mamba_d_head": 32, "mamba_d_state": 128}
        sizes |= {"mamba_chunk_size": 8}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)).double().eval()
    randomise(model)
    return model


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("preset", "name"), [("jamba-v0.1", "Jamba"), ("bamba-9b", "Bamba")])
def test_preset_equals_transformers_model(preset, name):
    """Embedding to logits over whole sequences, one of them padded on the left; then the second half from a state."""
    ours, theirs = small(preset), their_model(name)
    copy(ours, theirs)
    tokens = torch.randint(VOCAB, (2, 19))
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, :6] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask, position_ids=places, use_cache=False).logits
        found = ours(tokens, segments=mask).logits
        first = ours(tokens[:, :11], ours.init_state(2), mask[:, :11])
        second = ours(tokens[:, 11:], first.state, mask[:, 11:])
    assert expected.std() > 0.1
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-8, atol=1e-8)
    halves = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(halves[mask == 1], expected[mask == 1], rtol=1e-8, atol=1e-8)


def copy_gemma(ours: zoo.LanguageModel, theirs: nn.Module) -> None:
    with torch.no_grad():
        ours.embedding.weight.copy_(theirs.model.embed_tokens.weight)
        ours.norm.weight.copy_(theirs.model.final_norm.weight)
        for index, layer in enumerate(theirs.model.layers):
            mixer, feed_forward = ours.residuals[2 * index : 2 * index + 2]
            mixer.norm.weight.copy_(layer.temporal_pre_norm.weight)
            feed_forward.norm.weight.copy_(layer.channel_pre_norm.weight)
            mlp, weights = layer.mlp_block, layer.temporal_block.state_dict()
            for name in ("weight", "bias"):
                up = [getattr(mlp.gate_proj, name), getattr(mlp.up_proj, name)]
                getattr(feed_forward.block.up, name).copy_(torch.cat(up))
                getattr(feed_forward.block.down, name).copy_(getattr(mlp.down_proj, name))
            if isinstance(mixer.block, GQA):
                qkv = torch.cat([weights[f"{each}_proj.weight"] for each in "qkv"])
                out = {f"out.{name}": weights[f"o_proj.{name}"] for name in ("weight", "bias")}
                set_weights(mixer.block, {"qkv.weight": qkv} | out)
            else:
                set_weights(
                    mixer.block,
                    {
                        recurrent_name(name): each.squeeze(1) if name == "conv_1d.weight" else each
                        for name, each in weights.items()
                    },
                )


def recurrent_name(name: str) -> str:
    """Ours for a parameter of their recurrent block."""
    parts = {"linear_x": "x_proj", "linear_y": "y_proj", "linear_out": "out_proj", "conv_1d": "conv"}
    parts |= {"rg_lru.input_gate_": "input_gate.", "rg_lru.recurrent_gate_": "decay_gate."}
    for theirs, ours in (parts | {"rg_lru.recurrent_param": "Lambda"}).items():
        name = name.replace(theirs, ours)
    return name


@pytest.mark.usefixtures("exact")
def test_recurrent_gemma_equals_transformers_model(monkeypatch):
    """Embedding to logits, longer than the window; then in two parts. Their models know no padding."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    scan = RecurrentGemmaRglru._rnn_scan
    monkeypatch.setattr(RecurrentGemmaRglru, "_rnn_scan", lambda *a, **k: scan(*a, **k, acc_dtype=torch.float64))
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 80, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "attention_window_size": 5, "attn_implementation": "sdpa"}
    theirs = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes)).double().eval()
    randomise(theirs)
    config = zoo.preset("recurrentgemma-2b").to_dict()
    config |= {"width": WIDTH, "vocab_size": VOCAB, "embedding_scale": float(theirs.model.normalizer)}
    ours = zoo.LanguageModel(config | {"stack": narrow(config["stack"])}).double().eval()
    copy_gemma(ours, theirs)
    tokens = torch.randint(VOCAB, (2, 19))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        first = ours(tokens[:, :11], ours.init_state(2))
        second = ours(tokens[:, 11:], first.state)
        found = ours(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, rtol=1e-8, atol=1e-8)
