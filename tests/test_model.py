"""LanguageModel: what the stack adds to its blocks."""

import itertools

import pytest
import torch
from torch.nn.functional import layer_norm, linear, rms_norm

import zoo
from zoo.block import state_bytes
from zoo.model import losses

HYBRID = [
    {"kind": "mamba", "state_size": 4},
    {"kind": "moe", "experts": 3, "router_z": 0.1},
    {"kind": "gqa", "heads": 4, "window": 6},
    "rwkv4",
    "rwkv4_channel_mix",
    {"kind": "gqa", "heads": 2, "kv_heads": 1},
    "swiglu",
]


def build(stack=HYBRID, **options) -> zoo.LanguageModel:
    torch.manual_seed(1)
    return zoo.LanguageModel({"vocab_size": 17, "width": 24, "stack": stack} | options).double().eval()


@pytest.mark.parametrize(
    ("norm", "position", "embedding_norm", "tied"),
    [
        *itertools.product(["rms", "layer"], ["pre", "post"], [False, True], [False, True]),
        ("rms_zero_centered", "pre", True, True),
    ],
)
def test_the_formula(norm, position, embedding_norm, tied):
    """One linear-free check of norms, residuals and head against their definition, with weights away from one."""
    model = build(["mlp"], norm=norm, norm_position=position, embedding_norm=embedding_norm, tied_embeddings=tied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokens = torch.randint(17, (2, 5))

    def normed(x, module):
        if norm.startswith("rms"):
            return rms_norm(x, (24,), module.weight + (norm == "rms_zero_centered"), 1e-6)
        return layer_norm(x, (24,), module.weight, module.bias, 1e-5)

    x = model.embedding.weight[tokens]
    x = normed(x, model.embedding_norm) if embedding_norm else x
    (only,) = model.residuals
    if position == "pre":
        hidden = normed(x + only.block(normed(x, only.norm)).y, model.norm)
    else:
        hidden = normed(x + only.block(x).y, only.norm)
    out = model(tokens)
    torch.testing.assert_close(out.hidden, hidden, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.logits, linear(hidden, model.head.weight), rtol=0, atol=1e-12)
    assert (model.head.weight is model.embedding.weight) == tied


def test_scaled_embeddings_and_capped_logits():
    """Of the same weights: rows as if the table were 3 times as large, logits halved and bent below 0.5; embeddings
    given in the place of tokens alike."""
    plain = build(["mlp"], tied_embeddings=False)
    model = build(["mlp"], tied_embeddings=False, embedding_scale=3.0, logit_scale=0.5, logit_softcap=0.5)
    model.load_state_dict(plain.state_dict())
    tokens = torch.randint(17, (2, 5))
    wanted = 0.5 * torch.tanh(0.5 * plain(embeddings=3 * plain.embedding(tokens)).logits / 0.5)
    assert wanted.abs().max() > 0.05
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(embeddings=model.embedding(tokens)).logits, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_residual_sums_may_be_weighed(position):
    """α x + β f(x), norms where they are."""
    entry = {"kind": "mlp", "residual": {"skip": -2.0, "scale": 0.3}}
    model = build([entry, {"repeat": 2, "blocks": ["mlp", entry]}], norm_position=position)
    tokens = torch.randint(17, (2, 5))
    x = model.embedding(tokens)
    for index, each in enumerate(model.residuals):
        skip, scale = (1.0, 1.0) if index in (1, 3) else (-2.0, 0.3)
        if position == "pre":
            x = skip * x + scale * each.block(each.norm(x)).y
        else:
            x = each.norm(skip * x + scale * each.block(x).y)
    torch.testing.assert_close(model(tokens).hidden, model.norm(x), rtol=0, atol=1e-12)
    assert zoo.ModelConfig.from_dict(model.config.to_dict()) == model.config


def test_a_composite_block_has_residuals_of_its_own():
    with pytest.raises(ValueError, match=r"stack\[1\] \(kind dense_mamba\): residual with skip=2 and scale=1.0 is not"):
        build(["mlp", {"kind": "dense_mamba", "residual": {"skip": 2}}])


def test_a_composite_block_stands_bare(monkeypatch):
    """It has its own norms and residuals: the model adds none, whatever the model's norm position."""
    monkeypatch.setattr(zoo.registry.block_class("mlp"), "residual", False)
    for position in ("pre", "post"):
        model = build(["mlp"], norm_position=position, dropout=0.5).train()
        (only,) = model.residuals
        assert [name for name, _ in only.named_parameters()] == ["block.up.weight", "block.down.weight"]
        tokens = torch.randint(17, (2, 5))
        expected = model.norm(only.block(model.embedding(tokens)).y)
        torch.testing.assert_close(model(tokens).hidden, expected, rtol=0, atol=0)


def test_chunks_padding_and_packing_of_a_hybrid():
    model = build()
    tokens = torch.randint(17, (2, 20))
    whole = model(tokens).logits
    state, parts = model.init_state(2), []
    for size in (7, 1, 1, 11):
        start = sum(part.shape[1] for part in parts)
        out = model(tokens[:, start : start + size], state)
        state, parts = out.state, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-11)
    assert sum(map(state_bytes, state)) == 2 * model.state_bytes(20, dtype=torch.float64)
    segments = torch.tensor([[0] * 4 + [1] * 16, [1] * 8 + [2] * 12])
    packed = model(tokens, segments=segments).logits
    torch.testing.assert_close(packed[0, 4:], model(tokens[:1, 4:]).logits[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(packed[1, :8], whole[1, :8], rtol=0, atol=1e-11)
    torch.testing.assert_close(packed[1, 8:], model(tokens[1:, 8:]).logits[0], rtol=0, atol=1e-11)


def test_logits_to_keep_embeddings_and_hidden_states():
    model = build()
    tokens = torch.randint(17, (2, 9))
    whole = model(tokens, hidden_states=True)
    assert torch.equal(model(tokens, logits_to_keep=3).logits, whole.logits[:, -3:])
    assert torch.equal(model(tokens, logits_to_keep=torch.tensor([0, 4])).logits, whole.logits[:, [0, 4]])
    assert torch.equal(model(embeddings=model.embedding(tokens)).logits, whole.logits)
    assert len(whole.hidden_states) == len(model.blocks) + 1
    assert torch.equal(whole.hidden_states[0], model.embedding(tokens))
    assert torch.equal(whole.hidden_states[-1], whole.hidden)


def test_activation_checkpointing_changes_no_gradient():
    tokens = torch.randint(17, (2, 9))
    found = []
    for checkpointing in (False, True):
        model = build(dropout=0.2).train()
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(5)
        out = model(tokens)
        (out.logits.logsumexp(-1).mean() + losses(out.aux)).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_losses_are_those_of_the_blocks():
    out = build()(torch.randint(17, (2, 9)))
    names = {name for name in out.aux if "/loss/" in name}
    assert names == {"blocks.1/loss/load_balance", "blocks.1/loss/router_z"}
    torch.testing.assert_close(losses(out.aux), sum(out.aux[name] for name in names))
    assert losses({"blocks.0/stat/load": torch.ones(3)}) == 0.0


def test_dropout_acts_in_training_only():
    model, tokens = build(dropout=0.5), torch.randint(17, (1, 6))
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_masked_models_see_both_ways_and_have_no_state():
    model = build([{"kind": "gqa", "heads": 2, "causal": False}], objective="masked")
    tokens = torch.randint(17, (1, 6))
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 17
    assert not torch.equal(model(tokens).logits[:, 0], model(other).logits[:, 0])
    with pytest.raises(ValueError, match="a masked model has no state"):
        model.init_state(1)


def test_bad_input_is_named():
    model = build()
    with pytest.raises(ValueError, match="the state has 2 entries, this model has 7 blocks"):
        model(torch.zeros(1, 2, dtype=torch.long), model.init_state(1)[:2])
    with pytest.raises(ValueError, match="either tokens or embeddings"):
        model()
    with pytest.raises(ValueError, match=r"at least one token each, got shape \(1, 0\)"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"ids from 0 to 17, this model's go from 0 to 16"):
        model(torch.tensor([[0, 17]]))
