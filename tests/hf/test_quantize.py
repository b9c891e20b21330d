"""Weight-only quantisation: a model of rounded matrices, of every kind, alike in whole texts and token by token."""

import copy
import math
import sys

import pytest
import torch
from torch import nn

import zoo
from tests.hf.models import causal, greedy, tokens
from zoo.cli import main
from zoo.hf import quantize as module
from zoo.hf import save_byte_tokenizer
from zoo.hf.quantize import quantize, quantize_and_compare, weight_bytes
from zoo.registry import block_class

WIDTH = 64
CAUSAL = [kind for kind in zoo.kinds() if block_class(kind).causal]
# Kinds whose matrices are no linear maps, or none that are wide enough at this width.
NOTHING = {"low_rank_transformer", "slstm", "moe", "learned_position"}


@torch.no_grad()
def model_of(*stack, dtype=torch.float32, **options):
    """A model whose every matrix does something: some kinds begin as the identity."""
    model = causal(list(stack), dtype, width=WIDTH, init_std=0.5, **options)
    for each in model.modules():
        if isinstance(each, nn.Linear) and not each.weight.any():
            nn.init.normal_(each.weight, std=0.1)
    return model


def matrix(layer: nn.Linear) -> torch.Tensor:
    """The matrix that a layer multiplies by, whatever it is made of: its outputs for unit vectors."""
    unit = torch.eye(layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    return nn.functional.linear(unit, layer.weight).mT.contiguous()


def rounded(layer: nn.Linear) -> bool:
    return type(layer.weight) is not nn.Parameter


@torch.no_grad()
def dequantised(quantised, original):
    """The original with the quantised model's matrices in place of its own, as plain weights. Nothing else differs."""
    made = copy.deepcopy(original)
    modules = dict(made.named_modules())
    for name, layer in quantised.named_modules():
        if isinstance(layer, nn.Linear) and rounded(layer):
            modules[name].weight.copy_(matrix(layer))
            for other, value in layer.named_parameters():
                assert other == "weight" or torch.equal(value, getattr(modules[name], other))
    own = {name: value for name, value in quantised.named_parameters() if type(value) is nn.Parameter}
    theirs = dict(made.named_parameters())
    assert own and all(torch.equal(value, theirs[name]) for name, value in own.items())
    return made


@torch.no_grad()
def follows_the_law(model, mode: str, near: float) -> None:
    """Quantised, a model computes what one of plain rounded matrices does, near what it was, in one pass or many."""
    original, ids = copy.deepcopy(model), tokens(2, 19)
    before = original(ids, use_cache=False).logits
    quantize(model, mode)
    found = model(ids, use_cache=False).logits
    torch.testing.assert_close(dequantised(model, original)(ids, use_cache=False).logits, found, rtol=2e-4, atol=2e-4)
    error = float((found - before).norm() / before.norm())
    assert 0 < error < near, f"{mode} is off by {error:.3g}"
    out = model(ids[:, :11])
    parts = [out.logits]
    for place in range(11, 19):
        out = model(ids[:, place : place + 1], past_key_values=out.past_key_values)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), found, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", CAUSAL)
def test_every_kind(kind):
    model = model_of(kind)
    if kind in NOTHING:
        with pytest.raises(ValueError, match=r"nothing to quantise: the blocks hold \d+ linear maps"):
            quantize(model, "int8")
    else:
        follows_the_law(model, "int8", 0.02)


@pytest.mark.parametrize("stack", [["gqa", "swiglu"], ["mamba", "mla"], ["rwkv6", "rwkv6_channel_mix"], ["mamba2"]])
def test_four_bits(stack):
    follows_the_law(model_of(*stack), "int4", 0.15)


def test_larger_groups_are_smaller_and_less_exact():
    model, ids = model_of("gqa", {"kind": "mlp", "hidden": 128}), tokens(2, 19)
    models = {group: copy.deepcopy(model) for group in (32, 64)}
    done = {group: quantize(each, "int4", group) for group, each in models.items()}
    assert done[64].after < done[32].after
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        errors = {group: (each(ids, use_cache=False).logits - before).norm() for group, each in models.items()}
    assert 0 < errors[32] < errors[64]


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_bfloat16(mode):
    model, ids = model_of("gqa", {"kind": "mlp", "bias": True}, "mamba", dtype=torch.bfloat16), tokens(2, 19)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        quantize(model, mode)
        after = model(ids, use_cache=False).logits
    assert after.dtype == torch.bfloat16
    assert 0 < float((after - before).float().norm() / before.float().norm()) < {"int8": 0.05, "int4": 0.15}[mode]


def test_without_a_kernel_four_bits_are_held_in_bytes(monkeypatch):
    model = model_of("gqa", "mlp")
    small = quantize(copy.deepcopy(model), "int4")
    monkeypatch.setattr(module, "CPU_INT4", (("torchao.none", "Config"), ("torchao.quantization", "NoConfig")))
    done = quantize(copy.deepcopy(model), "int4")
    assert "no kernel for 4 bits on this cpu: each is held in a byte" in done.told()
    assert small.after < done.after < done.before
    follows_the_law(model, "int4", 0.15)


# What is quantised, and what it saves -------------------------------------------------------------------------------


def test_what_stays_is_told():
    """Matrices that a block reads itself, small maps, routers, experts; odd sizes get 8 bits for 4."""
    moe = {"kind": "moe", "experts": 4, "hidden": 40, "shared_experts": 1, "shared_gate": True}
    model = model_of("mla", moe, {"kind": "swiglu", "hidden": 70}, {"kind": "gla", "heads": 2})
    done = quantize(model, "int4")
    names = {name for name, each in model.model.blocks.named_modules() if isinstance(each, nn.Linear) and rounded(each)}
    assert names == {
        *(f"0.block.{each}" for each in ("q_up", "kv_down", "out")),
        *(f"1.block.shared.{each}" for each in ("up", "down")),
        *(f"2.block.{each}" for each in ("up", "down")),
        *(f"3.block.{each}" for each in ("in_proj", "out_proj")),
    }
    assert done.left == {
        "their block reads the matrix itself": ["0.block.kv_up"],
        "fewer than 32 inputs or outputs": [
            "1.block.shared_gate",
            "3.block.decay_proj.encode",
            "3.block.decay_proj.decode",
        ],
    }
    assert done.maps == {4: 5, 8: 4}  # 70 hidden units are no multiple of 32, 48 latents and keys neither, nor 40
    assert done.experts == 4 * 4 * (WIDTH * 80 + 40 * WIDTH)
    for told in ("5 linear maps in 4 bits and 4 linear maps in 8 bits", "0.block.kv_up (their block", "of experts"):
        assert told in done.told().replace("*", "0")


def test_routers_stay_however_large():
    model = model_of({"kind": "moe", "experts": 40, "top_k": 1, "router": {"kind": "stable", "rank": 32}}, "mlp")
    assert quantize(model, "int8").left == {
        "of routers": ["0.block.router.light.encode", "0.block.router.light.decode"]
    }


def test_bytes_are_those_of_the_tensors():
    model = model_of("gqa", "mlp", tied_embeddings=True)
    whole = 4 * sum(each.numel() for each in model.parameters())  # a tied head counts once
    assert weight_bytes(model) == whole
    layers = [each for each in model.model.blocks.modules() if isinstance(each, nn.Linear)]
    numbers, rows = sum(each.weight.numel() for each in layers), sum(each.out_features for each in layers)
    done = quantize(model, "int8")
    assert (done.before, done.after) == (whole, weight_bytes(model))
    # A byte a weight, and for each row a scale and perhaps a zero point.
    assert 4 * rows <= done.after - (whole - 3 * numbers) <= 12 * rows
    assert f"{whole:,} -> {done.after:,} bytes" in done.told()


@torch.no_grad()
def test_quality_is_what_both_say():
    model = model_of("mamba", "gqa", "swiglu")
    original, ids = copy.deepcopy(model), tokens(1, 40)[0]
    done, quality = quantize_and_compare(model, "int4", ids)
    assert done.mode == "int4" and quality is not None
    p, q = (each(ids[None, :-1], use_cache=False).logits[0].double().log_softmax(-1) for each in (original, model))
    targets = range(39), ids[1:]
    assert quality.tokens == 39
    assert quality.original == pytest.approx(-float(p[targets].mean()) / math.log(2), rel=1e-5)
    assert quality.quantized == pytest.approx(-float(q[targets].mean()) / math.log(2), rel=1e-5)
    assert quality.divergence == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()) / math.log(2), rel=1e-3)
    assert 0 < quality.divergence < 1
    assert quality.agreement == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert f"{quality.original:.4f} -> {quality.quantized:.4f} bits a token" in quality.told()


@torch.no_grad()
def test_quality_is_measured_on_as_many_tokens_as_fit(monkeypatch):
    monkeypatch.setattr(module, "COMPARED", 70)
    quality = quantize_and_compare(model_of("mamba"), "int8", tokens(1, 500)[0])[1]
    assert quality is not None and quality.tokens == 70
    monkeypatch.setattr(module, "COMPARED_NUMBERS", 1)
    quality = quantize_and_compare(model_of("mamba"), "int8", tokens(1, 500)[0])[1]
    assert quality is not None and quality.tokens == 64
    assert quantize_and_compare(model_of("mamba"), "int8", tokens(1, 1)[0])[1] is None


# Where it is used ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_generation_is_that_of_the_quantised_model(mode):
    model, ids = model_of("mamba", "swiglu", {"kind": "gqa", "heads": 2, "window": 6}, "rwkv4"), tokens()
    quantize(model, mode)
    assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False), greedy(model, ids, 10))


def test_the_command(tmp_path, capsys):
    folder, text = tmp_path / "model", tmp_path / "text"
    model_of("mamba", "swiglu", vocab_size=256).save_pretrained(folder)
    save_byte_tokenizer(folder)
    text.write_text("words and words " * 9)
    argv = ["generate", "--model", str(folder), "--max-new-tokens", "3", "--device", "cpu", "--quantize", "int8"]
    assert main([*argv, "--prompt", "abc", "--text", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "[int8: 5 linear maps in 8 bits, weights" in printed
    assert "on 143 tokens: " in printed and "the same most likely token" in printed
    assert main([*argv, "--prompt", "abc"]) == 0
    assert "on 2 tokens" in capsys.readouterr().out
    assert main([*argv, "--prompt", "a"]) == 0
    assert "one token tells nothing of quality: give --text FILE" in capsys.readouterr().out
    assert main([*argv[:-2], "--prompt", "a", "--text", str(text)]) == 2
    assert "give quantize, int8 or int4, too" in capsys.readouterr().err


def test_mistakes_are_told(monkeypatch):
    with pytest.raises(ValueError, match="quantize='int2' is unknown; choose from int8, int4"):
        quantize(model_of("mamba"), "int2")
    with pytest.raises(ValueError, match=r"the model is torch\.float64, and torchao quantises float32, bfloat16"):
        quantize(model_of("mamba", dtype=torch.float64), "int8")
    with pytest.raises(ValueError, match="group=16 must be one of 32, 64, 128"):
        quantize(model_of("mamba"), "int4", group=16)
    with pytest.raises(ValueError, match=r"12 linear maps \(12 of them: fewer than 32 inputs or outputs"):
        quantize(model_of("low_rank_transformer"), "int8")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"need torchao: pip install 'efficient-zoo\[quant\]'"):
        quantize(model_of("mamba"), "int8")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_on_a_gpu(mode, dtype):
    model = model_of("mamba", "gqa", {"kind": "swiglu", "hidden": 96}, dtype=dtype).cuda()
    ids = tokens(2, 19).cuda()
    before = model(ids, use_cache=False).logits
    done = quantize(model, mode)
    after = model(ids, use_cache=False).logits
    assert after.dtype == dtype and done.after < done.before
    assert 0 < float((after - before).float().norm() / before.float().norm()) < {"int8": 0.05, "int4": 0.15}[mode]
    out = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert out.shape == (2, 24)
