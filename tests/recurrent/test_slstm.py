"""sLSTM against the paper's unstabilised equations; gates at their ends; heads that do not mix."""

import pytest
import torch

import zoo
from zoo.block import tags
from zoo.recurrent.slstm import SLSTM


def randomised(width: int, **options) -> SLSTM:
    torch.manual_seed(0)
    block = SLSTM(width, **options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


def equations(block, x):
    """2405.04517, eq. 8 to 14 and figure 10, for one document [time width], without a stabiliser."""
    padded = torch.nn.functional.pad(x, (0, 0, block.conv.taps - 1, 0))
    seen = block.conv.bias + sum(block.conv.weight[:, j] * padded[j : j + len(x)] for j in range(block.conv.taps))
    seen = seen * torch.sigmoid(seen)
    W, R = ([torch.block_diag(*M[:, :, gate]) for gate in range(4)] for M in (block.W, block.R))
    h = c = n = torch.zeros(block.width, dtype=x.dtype)
    rows = []
    for t in range(len(x)):
        i, f, z, o = (u[t] @ W[g] + h @ R[g] + block.bias[g] for g, u in enumerate((seen, seen, x, x)))
        f, i = torch.sigmoid(f), i.exp()
        c, n = f * c + i * torch.tanh(z), f * n + i
        h = torch.sigmoid(o) * c / n
        rows.append(h)
    heads = torch.stack(rows).unflatten(-1, (block.heads, -1))
    centred = heads - heads.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + block.norm_eps).sqrt()
    return normed.flatten(-2) * block.norm_weight


def test_it_is_the_unstabilised_equations():
    """Values and gradients, in two documents with padding between."""
    block = randomised(12, heads=3, conv_width=3)
    x = torch.randn(1, 25, 12, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[3] * 11 + [0] * 2 + [4] * 12])
    spans = slice(0, 11), slice(13, 25)
    y = block(x, None, segments).y[0]
    found = torch.cat([y[span] for span in spans])
    wanted = torch.cat([equations(block, x[0, span]) for span in spans])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(wanted)
    to = (x, *block.parameters())
    a = torch.autograd.grad((found * direction).sum(), to)
    b = torch.autograd.grad((wanted * direction).sum(), to)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# The biases of i and f: e^±300, f to the last bit 0 or 1, all of them.
ENDS = {
    "i near e^300": ([300.0], [2.0]),
    "i near e^-300": ([-300.0], [2.0]),
    "i anything": ([300.0, -300.0, 90.0, 0.0], [2.0]),
    "f near 0": ([0.0], [-300.0]),
    "f near 1": ([0.0], [90.0]),
    "mixed": ([300.0, 0.0], [-300.0, -17.0, 9.0, 90.0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ENDS)
def test_gates_at_their_ends(case, dtype):
    """Finite, and as near float64 as the dtype's digits, in values and in every gradient."""
    torch.manual_seed(1)
    block = SLSTM(8, heads=2, norm_eps=1e-2)
    with torch.no_grad():
        for row, biases in enumerate(ENDS[case]):
            block.bias[row].copy_(torch.tensor(biases * (8 // len(biases))))
    block.to(dtype)
    exact = SLSTM(8, heads=2, norm_eps=1e-2).double()
    exact.load_state_dict({name: value.double() for name, value in block.state_dict().items()})
    x = torch.randn(2, 60, 8).to(dtype)
    results = []
    for each in (block, exact):
        given = x.detach().to(each.R.dtype).requires_grad_()
        y = each(given).y
        results.append([y, *torch.autograd.grad(y.double().square().sum(), [given, *each.parameters()])])
    names = ["y", "x", *(name for name, _ in block.named_parameters())]
    for name, found, wanted in zip(names, *results, strict=True):
        assert found.isfinite().all(), name
        size = max(wanted.norm().item(), 1e-2 * results[1][0].norm().item())  # a saturated gate's are all but 0
        error = (found.double() - wanted).norm().item() / size
        assert error < (1e-4 if dtype == torch.float32 else 5e-2), f"{name}: {error}"


def test_heads_do_not_mix():
    """One head's tokens never reach another's channels; within a head, one channel's change the others' later."""
    block = randomised(8, heads=2)
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    other = x.clone()
    other[..., 4:] = torch.randn(1, 6, 4, dtype=torch.float64)
    a, b = block(x).y, block(other).y
    assert torch.equal(a[..., :4], b[..., :4]) and not torch.allclose(a[..., 4:], b[..., 4:])
    with torch.no_grad():
        block.W.zero_()
        block.W[0, 0, 2, 0] = 1  # z of channel 0 alone sees anything, of channel 0
    h = block(x, block.init_state(1)).state.h
    other = x.clone()
    other[:, 0, 0] += 1
    moved = block(other, block.init_state(1)).state.h != h
    assert moved[0].tolist() == [True] * 4 + [False] * 4


def test_its_beginning_its_sizes_and_its_tags():
    block = SLSTM(24)
    assert block.W.shape == block.R.shape == (4, 6, 4, 6)
    assert sum(p.numel() for p in block.parameters()) == 2 * 4 * 24 * 24 // 4 + 4 * 24 + 24 + 5 * 24
    assert not block.bias[[0, 2, 3]].any()
    assert block.R.abs().max() <= 24**-0.5 and block.R.std() > 0.4 * 24**-0.5
    forget = block.bias[1].unflatten(0, (4, 6))
    assert torch.equal(forget, forget[:1].expand(4, 6))
    assert forget[0, 0] == 5 and forget[0, -1] == -7 and (forget[0].diff() < 0).all()
    deep = SLSTM(24, layer=3, layers=4).bias[1, :6]  # exponents 0.3 and 1.6 at the ends of a model
    torch.testing.assert_close(deep[1:-1], 5 - 12 * (torch.arange(1, 5) / 5) ** 1.6)
    torch.testing.assert_close(forget[0, 1:-1], 5 - 12 * (torch.arange(1, 5) / 5) ** 0.3)
    found = tags(block)
    assert {name for name in found if not found[name].weight_decay} == {"bias", "norm_weight", "conv.bias"}
    assert [SLSTM(width).heads for width in (1, 2, 6, 7, 24)] == [1, 2, 3, 1, 4]


def test_a_model_tells_it_its_depth():
    model = zoo.LanguageModel({"vocab_size": 5, "width": 16, "stack": [{"repeat": 3, "blocks": ["slstm", "swiglu"]}]})
    means = [each.block.bias[1].mean().item() for each in model.blocks if isinstance(each.block, SLSTM)]
    assert len(means) == 3 and means == sorted(means) and means[0] < means[-1]


def test_bad_options_are_named():
    for options, message in (
        ({"heads": 5}, r"heads=5 must divide width=12; try 1"),
        ({"conv_width": 0}, r"conv_width=0 must be a positive integer"),
        ({"layer": 2, "layers": 2}, r"layer=2 must be in \[0, layers=2\)"),
        ({"norm_eps": -1.0}, r"norm_eps=-1.0 must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            zoo.block("slstm", 12, **options)
