"""Falcon Mamba: our Mamba with norms without weights on dt, B and C, against transformers' mixer and model."""

import pytest
import torch
from torch import nn

import zoo
from zoo.ssm.mamba import Mamba


def randomised(block: nn.Module) -> nn.Module:
    """Random weights everywhere, so that no term is hidden by its initial value."""
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if "A_log" in name or "bias" in name else 0.3))
    return block


def copy(ours: Mamba, mixer: nn.Module) -> None:
    names = ["x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D", "in_proj.weight", "out_proj.weight"]
    if ours.in_proj.bias is not None:
        names += ["in_proj.bias", "out_proj.bias"]
    weights = {name: ours.get_parameter(name) for name in names} | {"conv1d.weight": ours.conv.weight[:, None]}
    if ours.conv.bias is not None:
        weights["conv1d.bias"] = ours.conv.bias
    mixer.load_state_dict({name: each.detach().clone() for name, each in weights.items()}, strict=True)


@pytest.fixture
def exact(monkeypatch):
    """transformers' mixer rounds to float32 on the way; in float64 it is an oracle to the last bits."""
    to = torch.Tensor.to

    def stay(tensor, *args, **kwargs):
        if tensor.dtype == torch.float64 and torch.float32 in args:
            return tensor
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.Tensor, "to", stay)


def their_config(**options):
    from transformers import FalconMambaConfig

    return FalconMambaConfig(
        vocab_size=31, hidden_size=24, num_hidden_layers=3, state_size=6, residual_in_fp32=False, **options
    )


def their_mixer(ours: Mamba, **options):
    from transformers import FalconMambaModel

    mixer = FalconMambaModel(their_config(**options)).double().eval().layers[0].mixer
    copy(ours, mixer)
    return mixer


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("time", "ours", "theirs"),
    [
        (37, {}, {}),
        (1, {"bias": True, "dt_rank": 5}, {"use_bias": True, "time_step_rank": 5}),
        (
            9,
            {"conv_bias": False, "conv_width": 3, "expand": 3},
            {"use_conv_bias": False, "conv_kernel": 3, "expand": 3},
        ),
    ],
)
def test_mixer_equals_transformers(time, ours, theirs):
    block = randomised(Mamba(24, state_size=6, inner_norm="weightless", **ours)).double()
    mixer = their_mixer(block, **theirs)
    x = torch.randn(2, time, 24, dtype=torch.float64)
    left, right = (x.clone().requires_grad_() for _ in range(2))
    expected, y = mixer(left), block(right).y
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(y)
    (expected * weight).sum().backward()
    (y * weight).sum().backward()
    torch.testing.assert_close(right.grad, left.grad, rtol=1e-9, atol=1e-9)
    for name in ("A_log", "D", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"):
        torch.testing.assert_close(block.get_parameter(name).grad, mixer.get_parameter(name).grad, rtol=1e-9, atol=1e-9)
    plain = Mamba(24, state_size=6, **ours).double()
    plain.load_state_dict(block.state_dict())  # the norms have no weights
    assert (plain(x).y - y).abs().max() > 1e-2


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_model_equals_transformers(side):
    """Embedding to logits over whole sequences of unequal length, with padding on the left or on the right."""
    from transformers import FalconMambaForCausalLM

    theirs = FalconMambaForCausalLM(their_config(layer_norm_epsilon=1e-5)).double().eval()
    stack = [{"repeat": 3, "blocks": [{"kind": "mamba", "state_size": 6, "inner_norm": "weightless"}]}]
    ours = zoo.LanguageModel({"vocab_size": 31, "width": 24, "norm_eps": 1e-5, "stack": stack}).double().eval()
    randomised(ours)
    with torch.no_grad():
        theirs.backbone.embeddings.weight.copy_(ours.embedding.weight)
        theirs.backbone.norm_f.weight.copy_(ours.norm.weight)
        for residual, layer in zip(ours.blocks, theirs.backbone.layers, strict=True):
            copy(residual.block, layer.mixer)
            layer.norm.weight.copy_(residual.norm.weight)
        tokens = torch.randint(31, (2, 23))
        mask = torch.ones(2, 23, dtype=torch.long)
        if side == "left":
            mask[1, :7] = 0
        elif side == "right":
            mask[1, -7:] = 0
        expected = theirs(tokens, attention_mask=mask, use_cache=False).logits
        found = ours(tokens, segments=mask).logits
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("exact")
def test_decoding_equals_transformers():
    """A prompt, then a token at a time, each with its cache."""
    from transformers import DynamicCache

    block = randomised(Mamba(24, state_size=6, inner_norm="weightless")).double()
    mixer = their_mixer(block)
    x = torch.randn(2, 8, 24, dtype=torch.float64)
    cache, state = DynamicCache(config=mixer.config), block.init_state(2)
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 8)):
            expected = mixer(x[:, start:end], cache_params=cache)
            y, state, _ = block(x[:, start:end], state)
            torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_norms_have_no_parameters():
    names = {name for name, _ in Mamba(24, inner_norm="weightless").named_parameters()}
    assert names == {name for name, _ in Mamba(24).named_parameters()}
    with pytest.raises(ValueError, match="inner_norm='rms' must be true, false or 'weightless'"):
        zoo.block("mamba", 24, inner_norm="rms")
