"""A bias that keeps its digits."""

import pytest
import torch

from zoo.layers.wide import WideLinear


@pytest.mark.parametrize("bias", [True, False])
def test_in_full_precision_it_is_a_linear_map(bias):
    made = WideLinear(5, 3, bias=bias, dtype=torch.float64)
    plain = torch.nn.Linear(5, 3, bias=bias, dtype=torch.float64)
    plain.load_state_dict(made.state_dict())
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(made(x), plain(x))


def test_the_bias_is_added_in_float32():
    made = WideLinear(5, 3).bfloat16()
    x = torch.randn(2, 5).bfloat16()
    with torch.no_grad():
        made.bias.fill_(256.0)
    y = made(x)
    assert y.dtype == torch.float32
    product = torch.nn.functional.linear(x, made.weight)
    assert torch.equal(y, product.float() + 256)
    assert not torch.equal(y.bfloat16().float(), y), "bfloat16 would have rounded the sum"
    assert WideLinear(5, 3, bias=False).bfloat16()(x).dtype == torch.bfloat16


def test_the_product_is_in_the_precision_of_what_comes_in():
    made = WideLinear(5, 3).bfloat16()
    x = torch.randn(2, 5)
    torch.testing.assert_close(made(x), x @ made.weight.float().T + made.bias.float())
