"""RWKV-7: its layers share the values of the first, its forms agree, its gates may saturate. The authors' own model
runs beside ours in benchmarks/oracles/rwkv7.py."""

import math

import pytest
import torch
from torch.nn.functional import layer_norm

import ops
import zoo
from tests.measure import run_chunks
from zoo.block import Tag, leaves, tags

WIDTH = 12


def make(kind="rwkv7", by=0.3, **options):
    """Away from the initial zeros."""
    torch.manual_seed(0)
    block = zoo.block(kind, WIDTH, **({"heads": 3, "layers": 3} if kind == "rwkv7" else {}) | options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return block


def written_out(block, x):
    """2503.14456's equations for one document, a token and a layer after another."""
    ran, after = [], [None] * block.layers
    for token in x.unbind(1):
        values = None
        for index, layer in enumerate(block.each_layer):
            mixer, feed = layer.time_mix, layer.channel_mix
            S, last, last_fed = after[index] or (0.0, torch.zeros_like(token), torch.zeros_like(token))
            u = layer_norm(token, (WIDTH,), layer.time_norm.weight, layer.time_norm.bias, 1e-5)
            m_r, m_w, m_k, m_v, m_a, m_g = (u + mu * (last - u) for mu in mixer.mix)
            low = {
                name: (part.encode.weight.T, part.decode.weight.T)
                for name, part in mixer.named_children()
                if hasattr(part, "encode")
            }
            E, D = low["decay"]
            w = torch.exp(-math.exp(-0.5) * torch.sigmoid(mixer.decay.decode.bias + torch.tanh(m_w @ E) @ D))
            E, D = low["rate"]
            alpha = torch.sigmoid(mixer.rate.decode.bias + m_a @ E @ D)
            E, D = low["gate"]
            gate = torch.sigmoid(m_g @ E) @ D
            r, k, v = m_r @ mixer.receptance.weight.T, m_k @ mixer.key.weight.T, m_v @ mixer.value.weight.T
            if index == 0:
                values = v
            else:
                E, D = low["value_gate"]
                nu = torch.sigmoid(mixer.value_gate.decode.bias + m_v @ E @ D)
                v = (1 - nu) * v + nu * values
            head = lambda each: each.unflatten(-1, (block.heads, -1))  # noqa: E731
            removed = head(k * mixer.removal)
            removed = removed / removed.norm(dim=-1, keepdim=True)
            k = head(k * (1 + mixer.replacement * (alpha - 1)))
            r, v, w, alpha = head(r), head(v), head(w), head(alpha)
            # The paper's S is [value, key]: S (diag(w) - κ̂ᵀ (α ⊙ κ̂)) + vᵀ k.
            change = torch.diag_embed(w) - removed[..., :, None] * (alpha * removed)[..., None, :]
            S = (S @ change if torch.is_tensor(S) else 0.0) + v[..., :, None] * k[..., None, :]
            o = (S @ r[..., None]).squeeze(-1)
            o = layer_norm(o, o.shape[-1:], eps=block.each_layer[0].time_mix.norm_eps).flatten(-2)
            own = ((r * mixer.bonus * k).sum(-1, keepdim=True) * v).flatten(-2)
            token = token + (gate * (o * mixer.norm_weight + mixer.norm_bias + own)) @ mixer.output.weight.T
            fed = layer_norm(token, (WIDTH,), layer.channel_norm.weight, layer.channel_norm.bias, 1e-5)
            inner = torch.relu((fed + feed.mix_key * (last_fed - fed)) @ feed.key.weight.T)
            token = token + inner**2 @ feed.value.weight.T
            after[index] = S, u, fed
        ran.append(token)
    return torch.stack(ran, 1)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_it_is_the_papers_equations(impl):
    block = make()
    x = torch.randn(2, 21, WIDTH, dtype=torch.float64, requires_grad=True)
    inputs = [x, *block.parameters()]
    with ops.use(impl):
        y = block(x).y
    wanted = written_out(block, x)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(y)
    found, right = (torch.autograd.grad((each * direction).sum(), inputs) for each in (y, wanted))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_new_block_passes_its_input_on_and_keeps_small_things_from_decay():
    """As published, the output matrices start at 0; square matrices alone decay."""
    block, x = zoo.block("rwkv7", WIDTH, layers=3), torch.randn(2, 9, WIDTH)
    assert torch.equal(block(x).y, x)
    assert torch.equal(zoo.block("rwkv7_channel_mix", WIDTH)(x).y, torch.zeros_like(x))
    decays = {name for name, _ in block.named_parameters() if tags(block).get(name, Tag()).weight_decay}
    square = {f"time_mix.{name}.weight" for name in ("receptance", "key", "value", "output")}
    square |= {"channel_mix.key.weight", "channel_mix.value.weight"}
    assert decays == {f"stack.{layer}.{name}" for layer in range(3) for name in square}


def test_the_released_ranks():
    """Of BlinkDL's 0.1B and 0.4B, as the training code's formula gives them."""
    for width, ranks in ((768, (64, 64, 32, 128)), (1024, (64, 64, 64, 160))):
        with torch.device("meta"):
            block = zoo.block("rwkv7", width)
        assert (block.decay_rank, block.rate_rank, block.value_rank, block.gate_rank) == ranks


def test_parallel_chunked_and_recurrent_are_one():
    block = make()
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


@pytest.mark.parametrize("gate", [0.0, -1e4])
def test_later_layers_hold_values_of_the_first(gate):
    """A shift of layer 0's values reaches layer 1's by its gate alone: not at all when that is 0."""
    mixer = make().each_layer[1].time_mix
    with torch.no_grad():
        mixer.value_gate.decode.bias.fill_(gate)
    x, first = torch.randn(2, 1, 9, WIDTH, dtype=torch.float64)
    moved = (mixer(x, first + 1)[0] - mixer(x, first)[0]).abs().max()
    assert (moved == 0) if gate else (moved > 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [-100.0, 100.0])
@pytest.mark.parametrize("decay", [-100.0, 100.0])
def test_saturated_decays_and_rates_are_finite(decay, rate, dtype):
    block = make(by=0.1)
    with torch.no_grad():
        for layer in block.each_layer:
            layer.time_mix.decay.decode.bias.fill_(decay)
            layer.time_mix.rate.decode.bias.fill_(rate)
    block.to(dtype)
    x = torch.randn(1, 150, WIDTH).to(dtype).requires_grad_()
    with ops.use("chunked"):
        y = block(x).y
    assert y.isfinite().all()
    for each in torch.autograd.grad(y.float().square().sum(), [x, *block.parameters()]):
        assert each.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("rwkv7", {"heads": 5}, "heads=5 must divide width=12; try 1"),
        ("rwkv7", {"layers": 0}, "layers=0 must be a positive integer"),
        ("rwkv7", {"value_rank": 13}, "value_rank=13 is above width=12, the rank of a full matrix; use at most 12"),
        ("rwkv7", {"norm_eps": -1.0}, "norm_eps=-1.0 must not be negative"),
        ("rwkv7_channel_mix", {"hidden": 0}, "hidden=0 must be a positive integer; None means 48"),
    ],
)
def test_bad_options_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.block(kind, WIDTH, **options)
