"""GLA against its recurrence, its decays at both ends, and the sizes of the paper and of the released model."""

import pytest
import torch
from torch.nn.functional import silu

import ops
import zoo
from zoo.block import tags
from zoo.describe import describe_model

WIDTH = 12


def equations(block, x, tau=16.0):
    """2312.06635, section 4.4, a token after another in float64: decay, then add, then read. x: [time width]."""
    projected = (each.unflatten(-1, (block.heads, -1)) for each in block.in_proj(x).split(block.sizes, -1))
    q, k, v, g = projected
    low = x @ block.decay_proj.encode.weight.T
    logits = low @ block.decay_proj.decode.weight.T + block.decay_proj.decode.bias
    alpha = torch.sigmoid(logits).pow(1 / tau).unflatten(-1, (block.heads, -1))
    S, rows = x.new_zeros(block.heads, k.shape[-1], v.shape[-1]), []
    for t in range(len(x)):
        S = alpha[t][..., None] * S + k[t][..., None] * v[t][:, None]
        rows.append(torch.einsum("hk,hkv->hv", q[t], S) / k.shape[-1] ** 0.5)
    o = torch.stack(rows)
    normed = block.norm.weight * o / (o.square().mean(-1, keepdim=True) + block.norm.eps).sqrt()
    return block.out_proj((silu(g) * normed).flatten(-2))


def make(**options):
    torch.manual_seed(0)
    block = zoo.block("gla", WIDTH, **options).double()
    torch.nn.init.normal_(block.norm.weight)
    return block


OPTIONS = [{}, {"heads": 3, "key_dim": 15, "value_dim": 9, "gate_rank": 4, "temperature": 1.0}]


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=["paper", "options"])
def test_it_is_the_equations(options, impl):
    """Values and gradients, two documents in a row."""
    block = make(**options)
    x = torch.randn(1, 41, WIDTH, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[2] * 6 + [5] * 35])
    tau = options.get("temperature", 16.0)
    wanted = torch.cat([equations(block, each, tau) for each in x[0].split([6, 35])])
    names = ["x", *(name for name, _ in block.named_parameters())]
    inputs, direction = [x, *block.parameters()], torch.randn_like(wanted)
    right = torch.autograd.grad((wanted * direction).sum(), inputs)
    with ops.use(impl):
        y = block(x, None, segments).y[0]
        found = torch.autograd.grad((y * direction).sum(), inputs)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-10)
    for name, a, b in zip(names, found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


# Biases of the gate: α is 0 to the last bit, or 1, or a channel is either or in between.
ENDS = {"forgets all": [-1e6], "forgets nothing": [80.0], "mixed": [-1e6, -2000.0, -16.0, 0.0, 9.0, 80.0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biases", ENDS.values(), ids=ENDS)
def test_decays_near_0_and_near_1(biases, dtype):
    """Finite, and as near float64 as the dtype's digits, in values and in every gradient, through the chunked form."""
    torch.manual_seed(0)
    block = zoo.block("gla", WIDTH, key_dim=12, norm_eps=1e-2)
    with torch.no_grad():
        block.decay_proj.decode.bias.copy_(torch.tensor(biases * (12 // len(biases))))
    block.to(dtype)
    exact = zoo.block("gla", WIDTH, key_dim=12, norm_eps=1e-2).double()
    exact.load_state_dict({name: value.double() for name, value in block.state_dict().items()})
    x = torch.randn(1, 300, WIDTH).to(dtype)
    found, wanted = [], []
    for each, into in ((block, found), (exact, wanted)):
        given = x.detach().to(each.in_proj.weight.dtype).requires_grad_()
        with ops.use("chunked"):
            y = each(given).y
            into += [y, *torch.autograd.grad(y.double().square().sum(), [given, *each.parameters()])]
    names = ["y", "x", *(name for name, _ in block.named_parameters())]
    for name, a, b in zip(names, found, wanted, strict=True):
        assert a.isfinite().all(), name
        size = max(b.norm().item(), 1e-3 * wanted[0].norm().item())  # gradients of a saturated gate are all but 0
        error = (a.double() - b).norm().item() / size
        assert error < (1e-4 if dtype == torch.float32 else 5e-2), f"{name}: {error}"


def test_what_the_ends_mean():
    """α = 0: a token sees itself alone. α = 1: linear attention without a decay."""
    block = make()
    x = torch.randn(1, 70, WIDTH, dtype=torch.float64)
    q, k, v, g = (each.unflatten(-1, (block.heads, -1))[0] for each in block.in_proj(x).split(block.sizes, -1))
    scores = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5
    for bias, seen in ((-1e6, torch.eye(70).double()), (800.0, torch.ones(70, 70).double().tril())):
        torch.nn.init.constant_(block.decay_proj.decode.bias, bias)
        o = torch.einsum("hnm,mhv->nhv", scores * seen, v)
        wanted = block.out_proj(block.norm(o, g).flatten(-2))
        torch.testing.assert_close(block(x).y[0], wanted, rtol=0, atol=1e-9)


def test_the_temperature_keeps_a_new_block_from_forgetting():
    torch.manual_seed(0)
    x = torch.randn(2, 50, 64)
    assert zoo.block("gla", 64).log_decay(x).exp().min() > 0.85
    assert zoo.block("gla", 64, temperature=1.0).log_decay(x).exp().max() < 0.95


def test_the_decay_of_bfloat16_has_float32s_digits():
    block, x = zoo.block("gla", WIDTH).bfloat16(), torch.randn(1, 50, WIDTH).bfloat16()
    wanted = torch.nn.functional.logsigmoid(block.decay_proj(x).double()).unflatten(-1, (3, -1)) / 16
    torch.testing.assert_close(block.log_decay(x), wanted.float(), rtol=1e-6, atol=0)


def test_its_sizes_and_its_tags():
    block = zoo.block("gla", 1024)
    assert (block.heads, block.sizes, block.decay_proj.rank) == (4, (512, 512, 1024, 1024), 16)
    d = 1024
    assert sum(p.numel() for p in block.parameters()) == 4 * d * d + 16 * d + 16 * 512 + 512 + 256
    assert [zoo.block("gla", width).heads for width in (1, 2, 6, 7, 24)] == [1, 1, 3, 1, 4]
    found = tags(block)
    assert not found["decay_proj.decode.bias"].weight_decay and not found["norm.weight"].weight_decay


def test_the_preset_has_the_released_size():
    """fla-hub/gla-1.3B-100B: 1.37 billion. Queries and keys of half the width, values, gate and output of the width,
    the gate's thin matrices and bias, the norm of 512 values, three matrices of 5632 = 2/3 · 4 · 2048 up to a multiple
    of 256, two norms a layer, embedding and head apart."""
    d = 2048
    layer = 4 * d * d + (d * 16 + 16 * 1024 + 1024) + 512 + 3 * d * 5632 + 2 * d
    total = 2 * 32000 * d + 24 * layer + d
    assert describe_model(zoo.preset("gla-1.3b"))["total"] == total == 1_365_514_240


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, r"heads=5 must divide key_dim=6 and value_dim=12; try 1"),
        ({"heads": 0}, "heads=0 must be a positive integer"),
        ({"key_dim": 0}, "key_dim=0"),
        ({"value_dim": "7"}, "value_dim='7'"),
        ({"gate_rank": 7}, "rank=7 is above 6"),
        ({"temperature": 0}, "temperature=0 must be positive"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0 must not be negative"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.block("gla", WIDTH, **options)
