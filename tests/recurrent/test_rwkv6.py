"""RWKV-6 against its equations, its decays at both ends, its initial values and its sizes. The authors' own model runs
beside ours in benchmarks/oracles/rwkv6.py."""

import pytest
import torch
from torch.nn.functional import silu

import ops
import zoo
from tests.measure import run_chunks
from zoo.block import leaves, tags

WIDTH, HEADS, DIM = 12, 3, 4
KINDS = ["rwkv6", "rwkv6_channel_mix"]


def make(kind="rwkv6", by=0.3, **options):
    """Away from the initial zeros."""
    torch.manual_seed(0)
    block = zoo.block(kind, WIDTH, **({"heads": HEADS} if kind == "rwkv6" else {}) | options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return block


def shifted(x):
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def time_mix(block, x, S=None, before=None):
    """2404.05892's Finch, a token after another: read with the bonus, then decay and write. x: [time width]."""
    before = shifted(x) if before is None else before
    z = torch.tanh((x + (before - x) * block.mix_input) @ block.mix_encode.weight.T).split(block.mix_rank, -1)
    w, k, v, r, g = (
        x + (before - x) * (block.mix[each] + z[each] @ block.mix_decode[each]) for each in range(5)
    )  # fmt: skip
    w = block.decay + torch.tanh(w @ block.decay_encode.weight.T) @ block.decay_decode.weight.T
    w = torch.exp(-torch.exp(w)).unflatten(-1, (HEADS, DIM))
    r, k, v = (
        (each @ linear.weight.T).unflatten(-1, (HEADS, DIM))
        for each, linear in ((r, block.receptance), (k, block.key), (v, block.value))
    )
    S, rows = x.new_zeros(HEADS, DIM, DIM) if S is None else S, []
    for t in range(len(x)):
        written = torch.einsum("hi,hj->hij", k[t], v[t])
        rows.append(torch.einsum("hi,hij->hj", r[t], S + block.bonus[..., None] * written))
        S = w[t][..., None] * S + written
    o = torch.stack(rows)
    o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, correction=0, keepdim=True) + 64e-5).sqrt()
    o = o.flatten(-2) * block.norm_weight + block.norm_bias
    return (silu(g @ block.gate.weight.T) * o) @ block.output.weight.T, S


def channel_mix(block, x):
    before = shifted(x)
    k = x * (1 - block.mix_key) + before * block.mix_key
    r = x * (1 - block.mix_receptance) + before * block.mix_receptance
    k = torch.relu(k @ block.key.weight.T) ** 2
    return torch.sigmoid(r @ block.receptance.weight.T) * (k @ block.value.weight.T)


EQUATIONS = {"rwkv6": lambda *given: time_mix(*given)[0], "rwkv6_channel_mix": channel_mix}


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_equations(kind, impl):
    """Values and gradients, two documents in a row."""
    block = make(kind)
    x = torch.randn(1, 77, WIDTH, dtype=torch.float64, requires_grad=True)
    wanted = torch.cat([EQUATIONS[kind](block, each) for each in x[0].split([6, 71])])
    inputs, direction = [x, *block.parameters()], torch.randn_like(wanted)
    right = torch.autograd.grad((wanted * direction).sum(), inputs)
    with ops.use(impl):
        y = block(x, None, torch.tensor([[2] * 6 + [5] * 71])).y[0]
        found = torch.autograd.grad((y * direction).sum(), inputs)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-10)
    for name, a, b in zip(["x", *(name for name, _ in block.named_parameters())], found, right, strict=True):
        assert b.abs().max() > 1e-6, name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def test_it_goes_on_from_a_state():
    """From a given last token and matrices, whose gradients are the equations' too; and the last ones come back."""
    block, x = make(), torch.randn(1, 20, WIDTH, dtype=torch.float64)
    shift = torch.randn(1, WIDTH, dtype=torch.float64, requires_grad=True)
    S = torch.randn(1, HEADS, DIM, DIM, dtype=torch.float64, requires_grad=True)
    wanted, last = time_mix(block, x[0], S[0], torch.cat([shift, x[0, :-1]]))
    y, state, _ = block(x, block.init_state(1)._replace(shift=shift, S=S))
    torch.testing.assert_close(y[0], wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(state.S[0], last, rtol=0, atol=1e-10)
    torch.testing.assert_close(state.shift, x[:, -1], rtol=0, atol=0)
    found, right = (
        torch.autograd.grad((a.sin().sum() + b.sin().sum()), [shift, S]) for a, b in ((y, state.S), (wanted, last))
    )
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_parallel_chunked_and_recurrent_are_one(kind):
    """The whole sequence by the reference and by the chunked form, in uneven pieces, and a token after another."""
    block = make(kind)
    x = torch.randn(2, 70, WIDTH, dtype=torch.float64, requires_grad=True)
    inputs, direction = [x, *block.parameters()], torch.randn(2, 70, WIDTH, dtype=torch.float64)
    results = []
    for impl, sizes in (("reference", [70]), ("chunked", [70]), ("chunked", [33, 1, 36]), ("auto", [1] * 70)):
        with ops.use(impl):
            y, state = run_chunks(block, x, sizes)
            results.append([y, *leaves(state), *torch.autograd.grad((y * direction).sum(), inputs)])
    for each in results[1:]:
        for a, b in zip(each, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ω: w of every channel is 0 to the last bit, or 1, or a channel is either or in between. 100 is above what exp takes.
ENDS = {"forgets all": [100.0], "forgets nothing": [-90.0], "mixed": [100.0, 8.0, 4.0, 0.0, -7.0, -90.0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decays", ENDS.values(), ids=ENDS)
def test_decays_near_0_and_near_1(decays, dtype):
    """Finite, and as near float64 as the dtype's digits, in values and in every gradient, through the chunked form.

    The norm's eps is large: where all is forgotten r and u only scale o, and a norm that undoes that leaves of their
    gradients what bfloat16 rounds."""
    block = make(by=0.2, norm_eps=1.0)
    with torch.no_grad():
        block.decay.copy_(torch.tensor(decays * (WIDTH // len(decays))))
    block.to(dtype)
    exact = make(norm_eps=1.0)
    exact.load_state_dict({name: value.double() for name, value in block.state_dict().items()})
    x = torch.randn(1, 150, WIDTH).to(dtype)
    found, wanted = [], []
    for each, into in ((block, found), (exact, wanted)):
        given = x.detach().to(each.key.weight.dtype).requires_grad_()
        with ops.use("chunked"):
            y, state, _ = each(given, each.init_state(1))
            loss = y.double().square().sum() + state.S.double().square().sum()
        into += [y, *torch.autograd.grad(loss, [given, *each.parameters()])]
    for name, a, b in zip(["y", "x", *(name for name, _ in block.named_parameters())], found, wanted, strict=True):
        assert a.isfinite().all(), name
        size = max(b.norm().item(), 1e-3 * wanted[0].norm().item())  # gradients of a saturated decay are all but 0
        error = (a.double() - b).norm().item() / size
        assert error < (1e-5 if dtype == torch.float32 else 0.15), f"{name}: {error}"


def test_the_fastest_decay_is_0_in_float64():
    """So the bound on ln w changes no value: what is forgotten is gone to the last bit."""
    block = make()
    with torch.no_grad():
        block.decay.fill_(1e3)
    decay = block.log_decay(torch.randn(1, 4, WIDTH, dtype=torch.float64)).exp()
    assert (decay == 0).all()
    with torch.no_grad():
        block.decay.fill_(6.0)  # exp(-e^6), 6e-176, is a number
    assert (block.log_decay(torch.zeros(1, 1, WIDTH, dtype=torch.float64)).exp() > 0).all()


def test_the_decay_of_a_bfloat16_block_keeps_its_digits():
    block = make().bfloat16()
    torch.nn.init.zeros_(block.decay_decode.weight)
    found = block.log_decay(torch.randn(1, 1, WIDTH).bfloat16())
    wanted = -torch.exp(block.decay.double()).reshape(1, 1, HEADS, DIM)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-6, atol=0)


def test_published_initial_values():
    """Depth 1 of 3 by hand."""
    block = zoo.block("rwkv6", 6, heads=2, layer=1, layers=3)
    place, line = torch.arange(6) / 6, torch.arange(6) / 5
    linear, root = 1 - place ** (2 / 3), 1 - place ** (1 / 3)
    torch.testing.assert_close(block.mix_input, linear)
    torch.testing.assert_close(block.mix, torch.stack([linear, linear, linear - 0.15, root, root]))
    torch.testing.assert_close(block.decay, -6 + 5 * line**1.35)
    zigzag = torch.tensor([0.0, 0.1, -0.1, 0.0, 0.1, -0.1])
    torch.testing.assert_close(block.bonus, (0.5 * (1 - line) + zigzag).reshape(2, 3))
    torch.testing.assert_close(block.norm_weight, torch.full((6,), (2 / 3) ** 0.7))
    assert not block.norm_bias.any()
    for linear, gain in ((block.receptance, 1.0), (block.key, 0.1), (block.value, 1.0), (block.gate, 0.1)):
        torch.testing.assert_close(linear.weight @ linear.weight.T, gain**2 * torch.eye(6))
    for decode in (block.mix_decode, block.decay_decode.weight):
        assert 0.005 < decode.abs().max() <= 0.01
    assert not any(each.weight.any() for each in (block.mix_encode, block.decay_encode, block.output))
    channel = zoo.block("rwkv6_channel_mix", 6, layer=1, layers=3)
    torch.testing.assert_close(channel.mix_key, 1 - place ** (2 / 3))
    torch.testing.assert_close(channel.mix_receptance, 1 - place ** (2 / 3))
    torch.testing.assert_close(channel.key.weight.T @ channel.key.weight, torch.eye(6))
    assert not channel.value.weight.any()
    assert not channel.receptance.weight.any()


def test_a_model_of_bfloat16_can_be_made():
    """torch's own orthogonal initialisation takes no bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        block = zoo.block("rwkv6", WIDTH)
    finally:
        torch.set_default_dtype(before)
    square = (block.value.weight @ block.value.weight.T).float()
    torch.testing.assert_close(square, torch.eye(WIDTH), rtol=0, atol=0.03)


def test_sums_are_float32_for_bfloat16():
    block = make().bfloat16()
    state = block.init_state(2)
    after = block(torch.randn(2, 3, WIDTH).bfloat16(), state).state
    assert [each.dtype for each in after] == [torch.bfloat16, torch.float32, torch.int64]
    assert [each.dtype for each in after] == [each.dtype for each in state]


def test_sizes_and_what_the_optimizer_is_told():
    """Width 2048: 32 heads, ranks and hidden size of the released 1.6B; a narrow block has what fits."""
    with torch.device("meta"):
        block, channel = (zoo.block(kind, 2048) for kind in KINDS)
    assert (block.heads, block.head_dim, block.mix_rank, block.decay_rank) == (32, 64, 32, 64)
    assert channel.hidden == 7168
    assert zoo.block("rwkv6_channel_mix", 4).hidden == 14
    assert zoo.block("rwkv6_channel_mix", 24).hidden == 64
    for width in (1, 2, 24):
        assert zoo.block("rwkv6", width)(torch.randn(1, 3, width)).y.isfinite().all()
    decayed = {name for name, _ in block.named_parameters()} - set(tags(block))
    assert decayed == {f"{name}.weight" for name in ("receptance", "key", "value", "gate", "output")}
    assert not any(each.weight_decay for each in tags(block).values())
    assert {name: each.weight_decay for name, each in tags(channel).items()} == {
        "mix_key": False,
        "mix_receptance": False,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_flops_hold_the_matrices_and_ignore_the_context(kind):
    with torch.device("meta"):
        block = zoo.block(kind, 256)
    matrices = sum(2 * each.numel() for each in block.parameters() if each.ndim >= 2)
    assert matrices < block.flops_per_token(0) < 1.4 * matrices
    assert block.flops_per_token(10**6) == block.flops_per_token(0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("rwkv6", {"heads": 5}, "heads=5 must divide width=12; try 1"),
        ("rwkv6", {"mix_rank": 13}, "mix_rank=13 is above width=12, the rank of a full matrix; use at most 12"),
        ("rwkv6", {"decay_rank": 0}, "decay_rank=0 must be a positive integer"),
        ("rwkv6", {"layer": 2, "layers": 2}, r"layer=2 must be in \[0, layers=2\); count layers from 0"),
        ("rwkv6", {"norm_eps": -1.0}, "norm_eps=-1.0 must not be negative"),
        ("rwkv6_channel_mix", {"hidden": 0}, "hidden=0 must be a positive integer; None means 32"),
        ("rwkv6_channel_mix", {"layer": -1}, "layer=-1 must be an integer that is not negative"),
    ],
)
def test_bad_options_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.block(kind, WIDTH, **options)
