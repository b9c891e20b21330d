"""The norm that scales by 1 + weight."""

import torch

from zoo.block import tags
from zoo.layers.norm import norm


def test_a_zero_centered_norm_scales_by_one_more():
    """At the start it is the plain one; a weight w does what 1 + w does there."""
    plain, ours = norm("rms", 10, 0.1).double(), norm("rms_zero_centered", 10, 0.1).double()
    x = torch.randn(3, 10, dtype=torch.float64)
    assert not ours.weight.any()
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-15)
    torch.nn.init.normal_(ours.weight)
    plain.weight.data = 1 + ours.weight.data
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-14)
    assert not tags(ours)["weight"].weight_decay


def test_a_small_weight_keeps_its_digits():
    """1 + 0.003 is 1 in bfloat16: the sum is taken in float32, and nothing but the result is rounded."""
    ours = norm("rms_zero_centered", 64).bfloat16()
    torch.nn.init.normal_(ours.weight, std=0.003)
    x = torch.randn(50, 64, dtype=torch.bfloat16)
    found = ours(x)
    assert found.dtype == torch.bfloat16
    wide = x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + ours.weight.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1.001 * 2**-8, atol=0)
