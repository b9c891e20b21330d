"""The op against the recurrence inside transformers' RecurrentGemma: RG-LRU (Griffin, 2402.19427, eq. 1-4)."""

import pytest
import torch
from torch.nn.functional import softplus

from ops.linear_recurrence import linear_recurrence

WIDTH, HEADS = 12, 3


@pytest.fixture
def rglru(monkeypatch):
    """transformers' layer with random weights. Its loop sums in float32; here in float64, to be an oracle."""
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma import modeling_recurrent_gemma as theirs

    scan = theirs.RecurrentGemmaRglru._rnn_scan
    monkeypatch.setattr(theirs.RecurrentGemmaRglru, "_rnn_scan", lambda *a, **k: scan(*a, **k, acc_dtype=torch.float64))
    layer = theirs.RecurrentGemmaRglru(
        RecurrentGemmaConfig(hidden_size=WIDTH, lru_width=WIDTH, num_attention_heads=HEADS)
    ).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def gates(layer, x):
    """a_t and the gated, normalised input: r = σ(W_a x + b_a), i = σ(W_x x + b_x), a = exp(-8 r softplus(Λ)),
    √(1 - a²) · i · x. W_a and W_x are block diagonal, a block a head."""

    def gate(weight, bias):
        rows = x.unflatten(-1, (HEADS, -1))
        return torch.sigmoid(torch.einsum("bthi,hij->bthj", rows, weight) + bias).flatten(-2)

    log_a = -8 * gate(layer.recurrent_gate_weight, layer.recurrent_gate_bias) * softplus(layer.recurrent_param)
    gated = x * gate(layer.input_gate_weight, layer.input_gate_bias)
    return log_a.exp(), gated, (1 - (2 * log_a).exp()).sqrt()


@pytest.mark.parametrize("impl", ["reference", "chunked", "native"])
@pytest.mark.parametrize("time", [2, 70])
def test_equals_rglru_on_whole_sequences(rglru, impl, time):
    """The first token's input is not normalised: position 0 starts a document."""
    x = torch.randn(2, time, WIDTH, dtype=torch.float64)
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    positions = torch.arange(time).expand(2, -1)
    expected = rglru(theirs, positions)
    a, gated, norm = gates(rglru, mine)
    y, last = linear_recurrence(gated * torch.where(positions[..., None] == 0, 1.0, norm), a, impl=impl)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, rglru.recurrent_states, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(y)
    wanted = torch.autograd.grad((expected * weight).sum(), [theirs, rglru.recurrent_param])
    found = torch.autograd.grad((y * weight).sum(), [mine, rglru.recurrent_param])
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("impl", ["reference", "chunked", "native"])
def test_documents_are_its_resets(rglru, impl):
    """Where its positions start again at 0 (packed documents), ours have another segment."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4], list(range(12))])
    segments = torch.tensor([[4] * 4 + [9] * 3 + [4] * 5, [1] * 12])
    x = torch.randn(2, 12, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        expected = rglru(x, positions)
        a, gated, norm = gates(rglru, x)
        y, last = linear_recurrence(
            gated * torch.where(positions[..., None] == 0, 1.0, norm), a, segments=segments, impl=impl
        )
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, rglru.recurrent_states, rtol=1e-10, atol=1e-10)


def test_decoding_goes_on_from_its_state(rglru):
    """A prompt, then a token at a time: both carry the sum."""
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    positions, state = torch.arange(9).expand(2, -1), None
    with torch.no_grad():
        for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
            part = positions[:, start:end]
            expected = rglru(x[:, start:end], part)
            a, gated, norm = gates(rglru, x[:, start:end])
            inputs = gated * torch.where(part[..., None] == 0, 1.0, norm)
            y, state = linear_recurrence(inputs, a, initial_state=state)
            torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(state, rglru.recurrent_states, rtol=1e-10, atol=1e-10)
