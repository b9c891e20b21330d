"""The gated short convolution against its equation one number after another, its reach, and its state."""

import pytest
import torch

import zoo
from zoo.block import state_bytes, tags
from zoo.ssm.gated_conv import GatedConvolution


def randomised(**options) -> GatedConvolution:
    torch.manual_seed(0)
    block = GatedConvolution(6, **options).double()
    with torch.no_grad():
        for each in block.parameters():
            each.normal_(std=0.7)
    return block


@pytest.mark.parametrize("options", [{}, {"conv_width": 4, "bias": True}, {"conv_width": 1}])
@torch.no_grad()
def test_equals_the_papers_equation(options):
    block = randomised(**options)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    rows = block.in_proj(x)
    B, C, u = rows[..., :6], rows[..., 6:12], rows[..., 12:]
    taps = options.get("conv_width", 3)
    wanted = torch.zeros_like(x)
    for t in range(9):
        for back in range(min(taps, t + 1)):
            wanted[:, t] += block.conv.weight[:, taps - 1 - back] * B[:, t - back] * u[:, t - back]
        if block.conv.bias is not None:
            wanted[:, t] += block.conv.bias
        wanted[:, t] *= C[:, t]
    torch.testing.assert_close(block(x).y, block.out_proj(wanted), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_token_reaches_conv_width_tokens_and_no_further():
    block = randomised(conv_width=4)
    x = torch.randn(1, 12, 6, dtype=torch.float64)
    other = x.clone()
    other[:, 5] += 1
    changed = (block(x).y - block(other).y).abs().amax((0, 2)) > 1e-9
    assert changed.tolist() == [5 <= t < 9 for t in range(12)]


@torch.no_grad()
def test_the_state_is_the_last_products():
    """It goes on as the whole; without it the first tokens after the cut differ."""
    block = randomised()
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    whole = block(x).y
    state = block(x[:, :7], block.init_state(2)).state
    B, _, u = block.in_proj(x).chunk(3, -1)
    torch.testing.assert_close(state.conv, (B * u)[:, 5:7], rtol=0, atol=1e-12)
    assert state_bytes(state) == 2 * block.state_bytes(10**6, dtype=torch.float64) == 2 * (2 * 6 * 8 + 8)
    torch.testing.assert_close(block(x[:, 7:], state).y, whole[:, 7:], rtol=0, atol=1e-12)
    alone = block(x[:, 7:]).y
    assert (alone[:, :2] - whole[:, 7:9]).abs().amin((0, 2)).min() > 1e-9
    torch.testing.assert_close(alone[:, 2:], whole[:, 9:], rtol=0, atol=1e-12)


def test_sizes_and_tags():
    block = zoo.block("gated_conv", 6, conv_width=4, bias=True)
    assert block.flops_per_token(0) == block.flops_per_token(10**6) == 2 * (6 * 18 + 6 * 6 + 6 * 4) + 2 * 6
    assert {name for name, each in tags(block).items() if not each.weight_decay} == {
        "in_proj.bias",
        "conv.bias",
        "out_proj.bias",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_width": 0}, "conv_width=0 must be a positive integer"),
        ({"bias": "no"}, "bias='no' must be true or false"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GatedConvolution(6, **options)
