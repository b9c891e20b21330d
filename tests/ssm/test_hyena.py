"""Hyena against a plain loop of the paper's equations, and what its filters, documents and options must obey."""

import cmath
import math
from copy import deepcopy
from itertools import pairwise

import pytest
import torch

import zoo
from zoo.block import tags
from zoo.ssm.hyena import Hyena
from zoo.ssm.hyena_modal import HyenaModal


def randomised(block: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block.double()


# The oracle ----------------------------------------------------------------------------------------------------


def filter_value(block: Hyena, stage: int, channel: int, lag: int) -> float:
    """h^stage_channel at one lag: 2302.10866, equation 7, in plain numbers."""
    f, time = block.filter, lag / (block.length - 1)
    bands = [1e-4 + (f.bands - 1 - 1e-4) * i / max(f.bands - 1, 1) for i in range(f.bands)]
    waves = [cmath.exp(-2j * math.pi * k * lag / block.length) for k in bands]
    z = [time, *(w.real for w in waves), *(w.imag for w in waves)]
    for layer in f.layers:
        rows = zip(layer.weight.tolist(), layer.bias.tolist(), f.frequency.tolist(), strict=True)
        z = [math.sin(w * (sum(a * b for a, b in zip(row, z, strict=True)) + bias)) for row, bias, w in rows]
    index, features = channel * block.stages + stage, block.width * block.stages
    value = sum(a * b for a, b in zip(f.out.weight[index].tolist(), z, strict=True))
    if f.window is None:
        return value
    slow, fast = (-math.log(f.window["target"]) / f.window[name] for name in ("slow", "fast"))
    delta = slow + (fast - slow) * index / (features - 1)
    return value * (math.exp(-delta * time) + f.window["shift"])


def loop(block: Hyena, x: torch.Tensor) -> torch.Tensor:
    """Definition 3.1 with the short convolution in the place of the first filter, for x [time, width]."""
    time, width = x.shape
    inner = x @ block.in_proj.weight.T + block.in_proj.bias
    taps = block.conv.taps
    short = block.conv.bias.repeat(time, 1)
    for t in range(time):
        for j in range(min(taps, t + 1)):
            short[t] = short[t] + block.conv.weight[:, taps - 1 - j] * inner[t - j]
    *gates, v = (short[:, i * width : (i + 1) * width] for i in range(block.order + 1))
    v = v * gates[-1]
    for stage in range(block.order - 1):
        y = torch.zeros_like(v)
        h = [[filter_value(block, stage, c, lag) for c in range(width)] for lag in range(time)]
        for t in range(time):
            for s in range(t + 1):
                y[t] += torch.tensor(h[t - s], dtype=v.dtype) * v[s]
            y[t] += block.D[stage * width : (stage + 1) * width] * v[t]
        v = y * gates[block.order - 2 - stage]
    return v @ block.out_proj.weight.T + block.out_proj.bias


@pytest.mark.parametrize(
    "options",
    [
        {"order": 2, "length": 16},
        {
            "order": 3,
            "length": 9,
            "window": {"fast": 0.1, "slow": 0.8, "shift": 0.1},
            "frequency": 1.0,
            "conv_width": 4,
        },
        {"order": 4, "length": 5, "window": None, "bands": 1, "filter_layers": 0, "filter_width": 7},  # T > length
    ],
)
@torch.no_grad()
def test_equals_the_plain_loop(options):
    block = randomised(Hyena(4, **options))
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    expected = torch.stack([loop(block, row) for row in x])
    torch.testing.assert_close(block(x).y, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(block(x, block.init_state(2)).y, expected, rtol=1e-11, atol=1e-11)


# Filters -------------------------------------------------------------------------------------------------------


def test_a_filter_has_a_value_at_every_lag():
    """However many lags are asked for, before and beyond `length`, they are the same ones."""
    f = randomised(Hyena(6, order=3, length=10)).filter
    long = f(50)
    assert long.shape == (12, 50)
    for length in (1, 10, 11, 33):
        torch.testing.assert_close(f(length), long[:, :length], rtol=1e-12, atol=1e-12)


def test_the_window_falls_to_target_between_fast_and_slow():
    block = Hyena(5, length=101, window={"fast": 0.3, "slow": 1.5, "target": 0.02}).double()
    windowed = block.filter(151)
    block.filter.window = None
    ratio = windowed / block.filter(151)
    torch.testing.assert_close(ratio[0, 150], torch.tensor(0.02).double())  # slow: t = 1.5
    torch.testing.assert_close(ratio[4, 30], torch.tensor(0.02).double())  # fast: t = 0.3
    assert (ratio[:, 0] == 1).all() and (ratio[:, 1:] < ratio[:, :-1]).all()


def test_published_window_and_frequency_are_the_defaults():
    block = Hyena(24)
    assert block.filter.window == {"fast": 0.3, "slow": 1.5, "target": 0.01, "shift": 0.0}
    assert (block.filter.frequency == 14).all() and block.filter.layers[0].weight.shape == (64, 33)
    assert (block.order, block.conv.taps) == (2, 3)


def test_autocast_keeps_the_filters_and_the_slots_wide():
    block = Hyena(8).eval()
    x = torch.randn(1, 24, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = block.filter(40)
        state = block.init_state(1)
        y = torch.cat([(out := block(x[:, t : t + 1], state), state := out.state)[0].y for t in range(24)], 1)
    assert state.slots.dtype == torch.float32
    with torch.no_grad():
        exact = deepcopy(block).double().filter(40)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-3 * exact.abs().max().item())
        # The only error left is that of the projections.
        inputs = state.slots[:, :24]
        due = torch.zeros_like(state.slots[:, 24:])
        for t in range(24, 32):
            for s in range(24):
                if max((n & -n, n) for n in range(s + 1, t + 1))[1] <= 24:
                    due[:, t - 24] += found[:, t - s] * inputs[:, s]
        torch.testing.assert_close(state.slots[:, 24:], due, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(y.float(), block(x).y, rtol=0.1, atol=0.1)


# States --------------------------------------------------------------------------------------------------------


def test_a_gradient_finds_the_slots_as_they_were():
    """Where only the skip is trained nothing else has a gradient, and still no call may overwrite what it needs."""
    block, x = randomised(Hyena(6, order=3, length=12)).requires_grad_(False), torch.randn(2, 20, 6).double()
    block.D.requires_grad_(True)
    wanted = torch.autograd.grad(block(x).y.square().sum(), block.D)[0]
    state, outputs = block.init_state(2), []
    for part in x.split([8, 1, 7, 4], 1):  # 8 tokens are convolved by a transform, which keeps its inputs
        y, state, _ = block(part, state)
        outputs.append(y)
    found = torch.autograd.grad(torch.cat(outputs, 1).square().sum(), block.D)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_a_state_goes_in_and_out_of_inference_mode():
    block, x = randomised(Hyena(6)), torch.randn(2, 12, 6).double()
    with torch.no_grad():
        wanted, state, outputs = block(x).y, block.init_state(2), []
    for index, part in enumerate(x.split(2, 1)):  # tokens 5 to 8 and 9 to 12 find room for them made in another mode
        with torch.inference_mode() if index % 2 else torch.no_grad():
            y, state, _ = block(part, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), wanted, rtol=1e-10, atol=1e-10)


# Documents -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_rows_at_different_positions_decode_each_as_if_alone():
    """Rows begin documents at different steps, wait, go on: each document is what it is alone."""
    block = randomised(Hyena(6, order=3, length=12))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 40, 6, dtype=torch.float64, generator=generator)
    segments = torch.ones(3, 40, dtype=torch.long)
    segments[0, 13:] = 2
    segments[0, 25:29] = 0  # waits inside its second document
    segments[1, :9] = 0  # padded on the left
    segments[2, 6:], segments[2, 7:], segments[2, 30:] = 5, 1, 9  # a document of one token
    x[segments == 0] = torch.nan
    documents = [(0, 0, 13), (0, 13, 40), (1, 0, 40), (2, 0, 6), (2, 6, 7), (2, 7, 30), (2, 30, 40)]
    for sizes in ([1] * 40, [8] + [1] * 32, [40], [3, 17, 1, 1, 18]):
        state, outputs, start = block.init_state(3), [], 0
        for size in sizes:
            out = block(x[:, start : start + size], state, segments[:, start : start + size])
            outputs.append(out.y)
            state, start = out.state, start + size
        y = torch.cat(outputs, 1)
        assert (y[segments == 0] == 0).all()
        for row, begin, end in documents:
            index = torch.arange(begin, end)
            index = index[segments[row, index] != 0]
            alone = block(x[row : row + 1, index]).y[0]
            torch.testing.assert_close(y[row, index], alone, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_tokens_in_order_never_take_the_slow_way(monkeypatch):
    """Segments that only say "go on", as generation passes them, cost what none cost."""
    block = randomised(Hyena(6))
    state = block(torch.randn(2, 5, 6).double(), block.init_state(2), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])).state
    monkeypatch.setattr(Hyena, "_realign", lambda *_: pytest.fail("the slow way"))
    for _ in range(3):
        state = block(torch.randn(2, 1, 6).double(), state, torch.ones(2, 1, dtype=torch.long)).state
    block(torch.randn(2, 4, 6).double(), state)


@torch.no_grad()
def test_a_row_that_has_not_begun_holds_up_no_other(monkeypatch):
    """A short prompt padded on the left, fed in chunks: until its first token its row is in order too."""
    monkeypatch.setattr(Hyena, "_realign", lambda *_: pytest.fail("the slow way"))
    block, x = randomised(Hyena(6, order=3, length=12)), torch.randn(2, 18, 6).double()
    x[0, :12] = torch.nan
    segments = torch.ones(2, 18, dtype=torch.long)
    segments[0, :12] = 0
    state, outputs = block.init_state(2), []
    for part, given in zip(x.split([5, 7, 1, 5], 1), segments.split([5, 7, 1, 5], 1), strict=True):
        y, state, _ = block(part, state, given)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    assert (y[0, :12] == 0).all()
    torch.testing.assert_close(y[0, 12:], block(x[:1, 12:]).y[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y[1], block(x[1:]).y[0], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_the_state_grows_as_declared_and_the_modal_one_does_not():
    block, modal = Hyena(24), HyenaModal(24)
    held = [block.state_bytes(tokens) for tokens in (0, 1, 2, 3, 4, 1000, 1024)]
    short = 2 * 3 * 24 * 4 + 8
    assert held == [short + slots * 24 * 4 for slots in (0, 2, 4, 4, 8, 1024, 2048)]
    assert modal.state_bytes(1) == modal.state_bytes(100_000)


def test_no_weight_decay_for_filters_and_biases():
    free = {name for name, each in tags(Hyena(24)).items() if not each.weight_decay}
    names = {name for name, _ in Hyena(24).named_parameters()}
    assert names - free == {"in_proj.weight", "out_proj.weight", "conv.weight"}


def test_flops_grow_with_the_square_of_the_logarithm():
    block = Hyena(64)
    assert block.flops_per_token(0) > block.outer_flops()
    growth = [block.flops_per_token(2**k - 1) - block.flops_per_token(2 ** (k - 1) - 1) for k in range(4, 14)]
    second = {round(b - a) for a, b in pairwise(growth)}
    assert second == {round(7.5 * 64)}  # a constant second difference in log T


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("hyena", {"order": 1}, "order=1 must be an integer from 2"),
        ("hyena", {"length": 1}, "length=1 must be an integer from 2"),
        ("hyena", {"conv_width": 0}, "conv_width=0"),
        ("hyena", {"filter_width": 0}, "filter_width=0"),
        ("hyena", {"filter_layers": -1}, "filter_layers=-1"),
        ("hyena", {"bands": 0}, "bands=0"),
        ("hyena", {"frequency": "1e1"}, "frequency='1e1' is text"),
        ("hyena", {"window": "off"}, "window='off' must be a mapping"),
        ("hyena", {"window": {"fats": 0.3}}, "window has no option 'fats'.*fast"),
        ("hyena", {"window": {"fast": 2.0}}, r"window.fast=2.0 and window.slow=1.5 must satisfy 0 < fast <= slow"),
        ("hyena", {"window": {"target": 1.0}}, "window.target=1.0 must be between 0 and 1"),
        ("hyena", {"window": {"shift": float("nan")}}, "window.shift=nan must be a finite number"),
        ("hyena_modal", {"modes": 0}, "modes=0"),
        ("hyena_modal", {"length": 1}, "length=1 must be an integer from 2"),
    ],
)
def test_bad_options_are_named(kind, options, words):
    with pytest.raises(ValueError, match=words):
        zoo.block(kind, 24, **options)
