"""AFT against the paper's double sum, its keys of any size, its windows, its states and its limits."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from tests.measure import gradients, run_chunks, same_gradients
from zoo.block import state_bytes, tags
from zoo.recurrent import aft_full
from zoo.recurrent.aft import AFT
from zoo.recurrent.aft_full import AFTFullState
from zoo.recurrent.aft_sums import CHUNK, EMPTY, Sums, average, constant, merge, near, pairs, total
from zoo.recurrent.aft_window import AFTWindowState

WIDTH = 24
OPTIONS = {
    "full": {"length": 100, "rank": 5},
    "local": {"window": 7, "length": 100, "rank": 5},
    "wide local": {"window": 45, "length": 100, "rank": 5},
    "conv": {"window": 5, "heads": 3},
    "own conv": {"window": 1, "heads": 2},
    "simple": {},
}


def build(name, **more):
    torch.manual_seed(3)
    block = AFT(WIDTH, name.split()[-1], **OPTIONS[name], **more).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


def biases(block, time):
    """w, [width time time], as the paper says it, pair by pair."""
    w = torch.zeros(WIDTH, time, time, dtype=torch.float64)
    if block.variant == "simple":
        return w
    bias, window = block.mix.bias, math.inf if block.variant == "full" else block.mix.bias.window
    pairwise = {}
    if block.variant == "conv":
        a = bias.weight
        mean = a.sum(1, keepdim=True) / a.shape[1]
        deviation = ((a - mean).pow(2).sum(1, keepdim=True) / a.shape[1] + 1e-5).sqrt()
        table = bias.gain[:, None] * (a - mean) / deviation + bias.shift[:, None]
        for t in range(time):
            for s in range(time):
                if abs(t - s) < window and (not block.causal or s <= t):
                    offset = t - s if block.causal else t - s + window - 1
                    pairwise[t, s] = table[:, offset].repeat_interleave(WIDTH // bias.heads)
    else:
        for t in range(time):
            for s in range(time):
                if abs(t - s) < window:
                    pairwise[t, s] = (bias.u[t] * bias.v[s]).sum().expand(WIDTH)
    rows = [[pairwise.get((t, s), w[:, t, s]) for s in range(time)] for t in range(time)]
    return torch.stack([torch.stack(row, -1) for row in rows], 1)


def paper(block, x):
    """Eq. 2, a query after another, nothing subtracted."""
    q, k, v = block.qkv(x).chunk(3, -1)
    w, rows = biases(block, x.shape[1]), []
    for t in range(x.shape[1]):
        last = t + 1 if block.causal else x.shape[1]
        weight = torch.exp(k[:, :last] + w[:, t, :last].T)
        rows.append(torch.sigmoid(q[:, t]) * (weight * v[:, :last]).sum(1) / weight.sum(1))
    return block.out(torch.stack(rows, 1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_the_papers_sum(name, causal, monkeypatch):
    """Values and gradients over three blocks of queries."""
    monkeypatch.setattr(aft_full, "QUERIES", 30)
    block = build(name, causal=causal)
    x = torch.randn(2, 71, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(block(x).y, paper(block, x), rtol=1e-10, atol=1e-10)
    wanted = gradients(block, x, lambda value: paper(block, value))
    same_gradients(gradients(block, x, lambda value: block(value).y), wanted, torch.float64, name)


@pytest.mark.parametrize("name", OPTIONS)
def test_states_go_on_and_documents_are_alone(name):
    """Chunks shorter and longer than blocks and windows, with padding and documents that begin and end anywhere."""
    block = build(name)
    x = torch.randn(2, 90, WIDTH, dtype=torch.float64)
    segments = torch.zeros(2, 90, dtype=torch.long)
    segments[0, 3:40], segments[0, 41:44], segments[0, 50:] = 1, 2, 1
    segments[0, 60:64] = 0
    segments[1, :88] = 5
    segments[1, 20:60:3] = 0
    wanted = torch.zeros_like(x)
    for row, where in ((0, range(3, 40)), (0, range(41, 44)), (0, range(50, 90)), (1, range(90))):
        where = torch.tensor([t for t in where if segments[row, t]])
        wanted[row, where] = paper(block, x[row : row + 1, where])[0]
    x = torch.where((segments != 0)[..., None], x, torch.nan)
    torch.testing.assert_close(block(x, None, segments).y, wanted, rtol=1e-9, atol=1e-9)
    for sizes in ([35, 1, 14, 40], [2, 60, 1, 27], [10, 45, 35]):
        torch.testing.assert_close(run_chunks(block, x, sizes, segments)[0], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPTIONS)
def test_documents_of_the_bidirectional_form_are_alone(name):
    block = build(name, causal=False)
    x = torch.randn(2, 50, WIDTH, dtype=torch.float64)
    segments = torch.zeros(2, 50, dtype=torch.long)
    segments[0, 2:45], segments[0, 45:48], segments[1, ::2] = 4, 2, 1
    y = block(torch.where((segments != 0)[..., None], x, torch.nan), None, segments).y
    for row, name_ in ((0, 4), (0, 2), (1, 1)):
        here = segments[row] == name_
        torch.testing.assert_close(y[row, here], paper(block, x[row : row + 1, here])[0], rtol=1e-9, atol=1e-9)
    assert (y[segments == 0] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_keys_of_300_survive(name, causal):
    """Keys from -300 to 300 in float32, small ones first: e^300 is no float32, and e^-300 next to it is nothing."""
    exact = build(name, causal=causal)
    with torch.no_grad():
        exact.qkv.weight[WIDTH : 2 * WIDTH] = 50.0 * torch.eye(WIDTH)
        if exact.variant in ("full", "local"):
            for each in (exact.mix.bias.u, exact.mix.bias.v):
                each.mul_(0.3)  # float32's e^300 leaves no digits to biases: keys of 300 have an ulp of 3e-5
    block = AFT(WIDTH, exact.variant, **OPTIONS[name], causal=causal)
    block.load_state_dict({key: value.float() for key, value in exact.state_dict().items()})
    exact.load_state_dict({key: value.double() for key, value in block.state_dict().items()})
    x = torch.randn(2, 70, WIDTH)
    x[:, :20] = -6.0 + 0.01 * torch.randn(2, 20, WIDTH)
    x = x.clamp(-6, 6)
    x[:, 20::9, ::2] = 6.0
    x[:, -3:] = -6.0
    wanted = paper(exact, x.double())
    assert exact.qkv(x.double())[..., WIDTH : 2 * WIDTH].abs().max() == 300
    torch.testing.assert_close(block(x).y.double(), wanted, rtol=2e-4, atol=2e-4)
    for value in gradients(block, x, lambda given: block(given).y).values():
        assert value.isfinite().all()
    if causal:
        found, state = run_chunks(block, x, [1] * 40 + [30])
        torch.testing.assert_close(found.double(), wanted, rtol=2e-4, atol=2e-4)
        if "maximum" in state._fields:
            assert state.maximum.max() == 300 and state.denominator.max() < 71


def test_a_bias_that_silences_a_large_key():
    """w = -60 on the token itself: a sum over all keys less (1 - e^w) e^k would leave only rounding."""
    block = AFT(8, "conv", window=2, heads=1)
    with torch.no_grad():
        block.mix.bias.weight.copy_(torch.tensor([[-100.0, 100.0]]))
        block.mix.bias.gain.fill_(30.0)
        block.mix.bias.shift.fill_(-30.0)  # -60 for the token itself, 0 for the one before
        block.qkv.weight[:8] = 0
        block.qkv.weight[8:16] = 25 * torch.eye(8)
        block.qkv.weight[16:] = torch.eye(8)
        block.out.weight.copy_(torch.eye(8))
    x = torch.zeros(1, 3, 8)
    x[0, 2] = 1.0  # a key of 25, silenced by 60
    weight = math.exp(25 - 60)
    wanted = torch.full((8,), 0.5 * weight / (weight + 2))  # of the other two, with keys of 0, one is in the window
    torch.testing.assert_close(block(x).y[0, 2], wanted, rtol=1e-4, atol=0)


def test_parts_of_a_sum():
    """A part by itself, merged, of nothing, and with a maximum that somebody differentiates."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 9, 6, dtype=torch.float64).unbind(0)
    left, right = torch.randn(1, 4, 3, dtype=torch.float64), torch.randn(1, 9, 3, dtype=torch.float64)
    some = torch.tensor([[True, False, True, True, True, False, True, True, True]])
    rows = torch.tensor([[True, True, False, True]])
    found = pairs(k, v, left, right, rows, some)
    exact = near(k, v, (left @ right.mT)[..., None], rows[:, :, None] & some[:, None])
    torch.testing.assert_close(average(found), average(exact))
    log_sums = [each.maximum + each.denominator.log() for each in (found, exact)]
    torch.testing.assert_close(log_sums[0][:, rows[0]], log_sums[1][:, rows[0]])
    assert (found.denominator[:, 2] == 0).all() and (found.maximum[:, 2] == EMPTY).all()
    assert (average(found)[:, 2] == 0).all()
    parts = merge(total(k, v, some), total(k, v, ~some))
    torch.testing.assert_close(average(parts), (k.softmax(1) * v).sum(1))
    nothing = total(k[:, :0], v[:, :0], None)
    torch.testing.assert_close(average(merge(parts, nothing)), average(parts))
    maximum = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    other = Sums(*(torch.tensor([each], dtype=torch.float64) for each in (2.0, 3.0, 1.0)))
    given = constant(Sums(torch.tensor([4.0]).double(), torch.tensor([1.0]).double(), maximum))
    average(merge(given, other)).sum().backward()
    m = maximum.detach().clone().requires_grad_()
    ((4 * m.exp() + 2 * math.e) / (m.exp() + 3 * math.e)).sum().backward()
    torch.testing.assert_close(maximum.grad, m.grad)


def test_what_states_hold():
    """Constant but for "full"; a window of one has no ring; "full" forgets documents that have ended."""
    x = torch.randn(1, 40, WIDTH, dtype=torch.float64)
    for name in ("local", "conv", "simple", "own conv"):
        block = build(name)
        held = [state_bytes(block(x[:, :t], block.init_state(1)).state) for t in (1, 40)]
        assert held[0] == held[1] == block.state_bytes(10**6, dtype=torch.float64), name
    state = build("local")
    state = state(x, state.init_state(1)).state
    assert isinstance(state, AFTWindowState) and state.k.shape == (1, 6, WIDTH) and state.tokens.item() == 40
    assert build("own conv").init_state(1).k.shape == (1, 0, WIDTH)
    block = build("full")
    state = block.init_state(1)
    for document in range(1, 8):
        name = torch.full((1, 40), document)
        y, state, _ = block(x, state, name)
        torch.testing.assert_close(y, block(x).y)
        assert isinstance(state, AFTFullState) and state.k.shape[1] <= 100 + 40


def test_it_starts_as_simple_and_nothing_decays():
    torch.manual_seed(1)
    conv, simple = AFT(WIDTH), AFT(WIDTH, "simple")
    assert conv.window == 32 and conv.variant == "conv" and AFT(96).mix.bias.heads == 6
    simple.load_state_dict({name: value for name, value in conv.state_dict().items() if "bias" not in name})
    x = torch.randn(2, 50, WIDTH)
    torch.testing.assert_close(conv(x).y, simple(x).y, rtol=1e-5, atol=1e-6)
    full = AFT(WIDTH, "full")
    assert full.mix.bias.u.shape == (2048, 128)
    w = full.mix.bias.u @ full.mix.bias.v.T
    assert w.std().item() == pytest.approx(0.1, rel=0.1)
    found = tags(AFT(WIDTH, "local", bias=True)) | tags(conv)
    for name in ("mix.bias.u", "mix.bias.v", "mix.bias.gain", "mix.bias.shift", "mix.bias.weight", "qkv.bias"):
        assert not found[name].weight_decay
    assert "qkv.weight" not in found


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made inside has."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.found = max(self.found, each.numel())
        return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["full", "local", "conv"])
def test_memory(name, causal):
    """No [time time width], forward or backward; and what is kept for the gradients grows as the time."""

    def measure(time):
        options = OPTIONS[name] | ({"length": 600} if "length" in OPTIONS[name] else {})
        block, kept = AFT(WIDTH, name, **options, causal=causal), {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                y = block(torch.randn(1, time, WIDTH)).y
            y.sum().backward()
        return largest.found, sum(each.untyped_storage().nbytes() for each in kept.values())

    (_, few), (largest, many) = measure(256), measure(512)
    assert largest <= max(512 * 3 * WIDTH, CHUNK * (CHUNK + 2 * 7) * WIDTH, 512 * 256)
    assert many < 2.2 * few


def test_flops():
    """The terms that grow: with the context for "full", up to the window, not at all."""
    for name, growth in (("full", 100 * (4 * WIDTH + 2 * 5)), ("local", 0), ("conv", 0), ("simple", 0)):
        block = build(name)
        assert block.flops_per_token(150) - block.flops_per_token(50) == growth
    local, conv, simple = (build(name).flops_per_token(50) for name in ("local", "conv", "simple"))
    assert local - simple == 7 * (6 * WIDTH + 10) and conv - simple == 5 * 6 * WIDTH
    assert build("conv", causal=False).flops_per_token(50) - simple == 9 * 6 * WIDTH


@pytest.mark.parametrize("name", ["full", "local"])
def test_a_document_too_long_names_both_numbers(name):
    block, x = build(name), torch.randn(1, 101, WIDTH, dtype=torch.float64)
    message = "a document has 101 tokens, .* length=100; give length=101"
    with pytest.raises(ValueError, match=message):
        block(x)
    with pytest.raises(ValueError, match=message):
        build(name, causal=False)(x)
    with pytest.raises(ValueError, match=message):
        block(x, None, torch.ones(1, 101, dtype=torch.long))
    state = block(x[:, :100], block.init_state(1)).state
    with pytest.raises(ValueError, match=message):
        block(x[:, :1], state)
    two = torch.tensor([[1] * 50 + [2] * 51])
    torch.testing.assert_close(block(x, None, two).y[:, 50:], block(x[:, 50:]).y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "convolution"}, r"variant='convolution' is unknown.*choose from full, local, conv, simple"),
        ({"variant": "simple", "window": 4}, "window=4 is of no use to variant='simple', only to local, conv"),
        ({"rank": 4}, "rank=4 is of no use to variant='conv', only to full, local"),
        ({"heads": 5}, "heads=5 must divide width=24; try 4"),
        ({"window": 0}, "window=0 must be a positive integer"),
        ({"variant": "full", "length": 1.5}, "length=1.5 must be a positive integer"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.block("aft", WIDTH, **options)


def test_the_bidirectional_form_has_no_state():
    block = build("conv", causal=False)
    with pytest.raises(ValueError, match="causal=False is bidirectional"):
        block.init_state(1)
