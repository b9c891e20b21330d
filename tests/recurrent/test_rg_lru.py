"""RG-LRU against transformers' RecurrentGemma, its equations, and the square root's gradient at a = 1."""

import pytest
import torch

import zoo
from zoo.block import tags
from zoo.recurrent.rg_lru import RGLRU

WIDTH, HEADS = 12, 3


def pair(monkeypatch, **options):
    """Ours and transformers' block of the same weights, float64 (its loop sums in float32 unless told)."""
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma import modeling_recurrent_gemma as theirs

    scan = theirs.RecurrentGemmaRglru._rnn_scan
    monkeypatch.setattr(
        theirs.RecurrentGemmaRglru, "_rnn_scan", lambda *a, **k: scan(*a, **{**k, "acc_dtype": torch.float64})
    )
    config = RecurrentGemmaConfig(hidden_size=WIDTH, lru_width=WIDTH, num_attention_heads=HEADS, **options)
    oracle = theirs.RecurrentGemmaRecurrentBlock(config, 0).double()
    torch.manual_seed(0)
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    block = RGLRU(WIDTH, heads=HEADS).double()
    names = {
        "linear_x": "x_proj",
        "linear_y": "y_proj",
        "linear_out": "out_proj",
        "conv_1d": "conv",
        "rg_lru.input_gate_": "input_gate.",
        "rg_lru.recurrent_gate_": "decay_gate.",
        "rg_lru.recurrent_param": "Lambda",
    }
    weights = {}
    for name, value in oracle.state_dict().items():
        for before, after in names.items():
            name = name.replace(before, after)
        weights[name] = value.squeeze(1) if name == "conv.weight" else value
    block.load_state_dict(weights)
    return block, oracle


def test_it_is_recurrent_gemmas_block(monkeypatch):
    block, oracle = pair(monkeypatch)
    x = torch.randn(2, 23, WIDTH, dtype=torch.float64)
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    wanted, _ = oracle(theirs, torch.arange(23).expand(2, -1), torch.ones(2, 23), use_cache=False)
    y = block(mine).y
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(y)
    for found, right in (
        (mine, theirs),
        (block.Lambda, oracle.rg_lru.recurrent_param),
        (block.decay_gate.weight, oracle.rg_lru.recurrent_gate_weight),
        (block.conv.bias, oracle.conv_1d.bias),
    ):
        (a,) = torch.autograd.grad((y * direction).sum(), found, retain_graph=True)
        (b,) = torch.autograd.grad((wanted * direction).sum(), right, retain_graph=True)
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_decoding_is_theirs(monkeypatch):
    """A token after another with a cache, in both."""
    block, oracle = pair(monkeypatch)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        wanted = [oracle(x[:, :5], torch.arange(5).expand(2, -1), torch.ones(2, 5))[0]]
        wanted += [oracle(x[:, t : t + 1], torch.full((2, 1), t), torch.ones(2, 1))[0] for t in range(5, 9)]
        state, found = block.init_state(2), []
        for part in (x[:, :5], *x[:, 5:].split(1, 1)):
            y, state, _ = block(part, state)
            found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(wanted, 1), rtol=1e-9, atol=1e-9)


def test_it_is_the_equations():
    """2402.19427, eq. 1 to 4, a token after another, in two documents: the first token of each is not scaled."""
    torch.manual_seed(0)
    block = RGLRU(8, inner=6, heads=2, conv_width=1, c=5.0).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(1, 11, 8, dtype=torch.float64)
    u = block.conv.bias + block.conv.weight[:, 0] * block.x_proj(x[0])

    def gate(part):
        return torch.sigmoid(u @ torch.block_diag(*part.weight) + part.bias.flatten())

    a = torch.sigmoid(-block.Lambda) ** (5.0 * gate(block.decay_gate))  # softplus(Λ) = -log σ(-Λ)
    drive = gate(block.input_gate) * u
    rows = []
    for t in range(11):
        first = t in (0, 4)
        rows.append(drive[t] if first else a[t] * rows[-1] + (1 - a[t] ** 2).sqrt() * drive[t])
    gelu = torch.nn.functional.gelu(block.y_proj(x[0]), approximate="tanh")
    wanted = block.out_proj(gelu * torch.stack(rows))
    segments = torch.tensor([[3] * 4 + [5] * 7])
    torch.testing.assert_close(block(x, None, segments).y[0], wanted, rtol=1e-10, atol=1e-10)


def test_gradients_where_nothing_is_forgotten():
    """a = 1 to the last bit: √(1 - a²) is 0 and its slope infinite, but no gradient may be."""
    block = zoo.block("rg_lru", 8)
    with torch.no_grad():
        block.Lambda.fill_(-200.0)
    x = torch.randn(2, 7, 8, requires_grad=True)
    y = block(x).y
    y.square().sum().backward()
    for name, parameter in (("x", x), *block.named_parameters()):
        assert parameter.grad.isfinite().all(), name
    from zoo.recurrent.rg_lru import _Root

    at = torch.tensor([0.0, 1e-12, 0.25, 1.0], requires_grad=True)
    root = _Root.apply(at)
    root.sum().backward()
    torch.testing.assert_close(root, at.sqrt())
    torch.testing.assert_close(at.grad, torch.tensor([1000.0, 1000.0, 1.0, 0.5]))


def test_a_small_forgetting_keeps_its_digits():
    """1 - a² of a near 1 is not the difference of two rounded numbers: float32 equals float64 to float32's digits."""
    torch.manual_seed(0)
    narrow = zoo.block("rg_lru", 8, decay_min=1 - 1e-6, decay_max=1 - 1e-6)
    wide = zoo.block("rg_lru", 8).double()
    wide.load_state_dict(narrow.state_dict())
    u = torch.randn(1, 5, 8)
    first = torch.zeros(1, 5, dtype=torch.bool)
    torch.testing.assert_close(
        narrow.recurrence(u, first)[1].double(), wide.recurrence(u.double(), first)[1], rtol=1e-5, atol=0
    )


def test_its_beginning_and_its_tags():
    torch.manual_seed(0)
    block = zoo.block("rg_lru", 512, inner=640)
    decay = torch.exp(-8 * torch.nn.functional.softplus(block.Lambda))
    assert 0.9 <= decay.min() < 0.91 and 0.99 < decay.max() <= 0.9991
    assert block.input_gate.weight.shape == (10, 64, 64)
    found = tags(block)
    for name in ("Lambda", "input_gate.bias", "conv.bias", "x_proj.bias"):
        assert found[name] == (False, None)
    assert "x_proj.weight" not in found


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"heads=5 must divide inner=12; try 1"):
        zoo.block("rg_lru", 12, heads=5)
    with pytest.raises(ValueError, match="inner=0"):
        zoo.block("rg_lru", 12, inner=0)
    with pytest.raises(ValueError, match="c=-1"):
        zoo.block("rg_lru", 12, c=-1.0)
    with pytest.raises(ValueError, match="decay_max=1"):
        zoo.block("rg_lru", 12, decay_max=1.0)
