"""RetNet's parallel, chunkwise and recurrent forms, written out from the paper, and what its norm takes out again."""

import math

import pytest
import torch
from torch.nn.functional import silu

import ops
import zoo
from ops import linear_attention
from zoo.block import tags
from zoo.describe import describe_model
from zoo.layers.position import Rotary

TIME = 23


def parts(block, x):
    """q and k as complex numbers [time heads pairs], turned by their positions; v; the gate; γ. One document."""
    q, k, v, g = (each.unflatten(-1, (block.heads, -1))[0] for each in block.in_proj(x).split(block.sizes, -1))
    h = torch.arange(block.heads, dtype=torch.float64)
    gamma = 1 - 2.0 ** (-5 - h)
    if block.decay == "linspace":
        gamma = 1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), block.heads, dtype=torch.float64).exp()
    q, k = (torch.view_as_complex(each.unflatten(-1, (-1, 2)).contiguous()) for each in (q, k))
    theta = 10000.0 ** (-torch.arange(q.shape[-1], dtype=torch.float64) / q.shape[-1])
    return q, k, v, g, gamma, theta


def parallel(q, k, v, gamma, theta):
    """Eq. 5: all pairs, turned, under the matrix D of decays."""
    n = torch.arange(len(q), dtype=torch.float64)
    turn = torch.polar(torch.ones(()).double(), n[:, None, None] * theta)
    D = torch.where(n[:, None] >= n, gamma[:, None, None] ** (n[:, None] - n).clamp_min(0), 0)
    scores = torch.einsum("nhd,mhd->hnm", q * turn, (k * turn).conj()).real * D
    return torch.einsum("hnm,mhv->nhv", scores, v)


def xpos(q, k, v, gamma, theta):
    """Eq. 3 with the magnitude where xPos has it, in queries (γ^n) and keys (γ^-m), and no D but the causal mask."""
    n = torch.arange(len(q), dtype=torch.float64)[:, None, None]
    turn = torch.polar(torch.ones(()).double(), n * theta)
    grown = gamma[:, None] ** n
    scores = torch.einsum("nhd,mhd->hnm", q * turn * grown, (k * turn / grown).conj()).real.tril()
    return torch.einsum("hnm,mhv->nhv", scores, v)


def chunkwise(q, k, v, gamma, theta, size=5):
    """Eq. 7: pairs within chunks, R between them."""
    n = torch.arange(len(q), dtype=torch.float64)
    turn = torch.polar(torch.ones(()).double(), n[:, None, None] * theta)
    q, k, found = q * turn, k * turn, []
    R = torch.zeros(q.shape[1], q.shape[2], v.shape[2], dtype=torch.complex128)
    for start in range(0, len(q), size):
        part = slice(start, start + size)
        i = torch.arange(len(q[part]), dtype=torch.float64)
        D = torch.where(i[:, None] >= i, gamma[:, None, None] ** (i[:, None] - i).clamp_min(0), 0)
        inner = torch.einsum("nhd,mhd->hnm", q[part], k[part].conj()).real * D
        cross = torch.einsum("nhd,hdv->nhv", q[part], R).real * gamma[:, None] ** (i[:, None, None] + 1)
        found.append(torch.einsum("hnm,mhv->nhv", inner, v[part]) + cross)
        late = gamma[:, None] ** (len(i) - 1 - i)[:, None, None]
        R = torch.einsum("mhd,mhv->hdv", k[part].conj(), (v[part] * late).to(R.dtype)) + R * gamma[
            :, None, None
        ] ** len(i)
    return torch.cat(found)


def recurrent(q, k, v, gamma, theta):
    """Eq. 1 with A = γ e^(iθ): the state turns instead of queries and keys, and no position is needed."""
    A = gamma[:, None] * torch.polar(torch.ones(()).double(), theta)
    s, found = torch.zeros(q.shape[1], q.shape[2], v.shape[2], dtype=torch.complex128), []
    for n in range(len(q)):
        s = A[..., None] * s + k[n].conj()[..., None] * v[n][:, None]
        found.append(torch.einsum("hd,hdv->hv", q[n], s).real)
    return torch.stack(found)


def finish(block, o, g):
    """Eq. 8 from o [time heads v_dim]: GroupNorm with a group a head for each token, gate, W_O."""
    if block.norm.kind == "group":
        normed = torch.nn.functional.group_norm(o.flatten(1), block.heads, eps=block.norm.eps)
    else:
        normed = (o * (o.square().mean(-1, keepdim=True) + block.norm.eps).rsqrt()).flatten(1)
    if block.norm.weight is not None:
        normed = normed * block.norm.weight.repeat(block.heads)
    return block.out_proj(silu(g.flatten(1)) * normed)


def make(**options):
    torch.manual_seed(0)
    block = zoo.block("retnet", 12, **options).double()
    if block.norm.weight is not None:
        torch.nn.init.normal_(block.norm.weight)
    return block


OPTIONS = [{}, {"heads": 3, "decay": "linspace", "norm": "rms", "norm_affine": True, "value_dim": 15}]


@pytest.mark.parametrize("form", [parallel, xpos, chunkwise, recurrent], ids=lambda form: form.__name__)
@pytest.mark.parametrize("options", OPTIONS, ids=["paper", "options"])
def test_every_form_of_the_paper(form, options):
    block = make(**options)
    x = torch.randn(1, TIME, 12, dtype=torch.float64, requires_grad=True)
    q, k, v, g, gamma, theta = parts(block, x)
    wanted = finish(block, form(q, k, v, gamma, theta) * (2 * q.shape[-1]) ** -0.5, g)
    names = ["x", *(name for name, _ in block.named_parameters())]
    inputs = [x, *block.parameters()]
    direction = torch.randn_like(wanted)
    right = torch.autograd.grad((wanted * direction).sum(), inputs)
    for impl in ("chunked", "reference"):
        with ops.use(impl):
            y = block(x).y[0]
            torch.testing.assert_close(y, wanted, rtol=0, atol=1e-10)
            found = torch.autograd.grad((y * direction).sum(), inputs)
        for name, a, b in zip(names, found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")
    state, pieces = block.init_state(1), []
    for part in x.split([7, 1, 1, 14], 1):
        y, state, _ = block(part, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1)[0], wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", ["group", "rms"])
def test_the_norm_takes_out_what_the_paper_divides_by(norm):
    """Section 2.2's three normalisations of scores, all of them in front of a norm without eps: the same output."""
    block = make(norm=norm, norm_eps=0.0)
    x = torch.randn(1, TIME, 12, dtype=torch.float64) * 3
    q, k, v, g, gamma, theta = parts(block, x)
    n = torch.arange(TIME, dtype=torch.float64)
    D = torch.where(n[:, None] >= n, gamma[:, None, None] ** (n[:, None] - n).clamp_min(0), 0)
    D = D / D.sum(-1, keepdim=True).sqrt()
    turn = torch.polar(torch.ones(()).double(), n[:, None, None] * theta)
    R = torch.einsum("nhd,mhd->hnm", q * turn, (k * turn).conj()).real * (2 * q.shape[-1]) ** -0.5 * D
    size = R.sum(-1, keepdim=True).abs()
    assert (size > 1).any() and (size < 1).any()
    wanted = finish(block, torch.einsum("hnm,mhv->nhv", R / size.clamp_min(1), v), g)
    torch.testing.assert_close(block(x).y[0], wanted, rtol=0, atol=1e-10)


def test_without_positions_it_is_lightning_attention():
    """MiniMax's: other decays (slopes by head and layer), blocks of pairs, a state between them, and decoding."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=12,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=4,
        block_size=5,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 4,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        oracle = MiniMaxLightningAttention(config, 1)
    finally:
        torch.set_default_dtype(before)
    oracle.norm = torch.nn.Identity()  # theirs rounds to float32
    x = torch.randn(2, TIME, 12, dtype=torch.float64)
    q, k, v = silu(oracle.qkv_proj(x)).unflatten(-1, (3, 12)).split(4, -1)
    log_decay = -oracle.slope_rate.flatten()
    y, state, _ = linear_attention(q, k, v, log_decay)
    wanted, final = oracle(x, None, None)
    found = oracle.out_proj(torch.sigmoid(oracle.output_gate(x)) * y.flatten(-2))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-10)
    cache = MiniMaxCache()
    cache.set_linear_cache(1, final)
    token = torch.randn(2, 1, 12, dtype=torch.float64)
    wanted, final = oracle(token, None, None, cache)
    q, k, v = silu(oracle.qkv_proj(token)).unflatten(-1, (3, 12)).split(4, -1)
    y, state, _ = linear_attention(q, k, v, log_decay, initial_state=state)
    found = oracle.out_proj(torch.sigmoid(oracle.output_gate(token)) * y.flatten(-2))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-10)


def test_the_decays_are_the_papers():
    """... and exact where 1 - 2^(-5-h) rounds to 1 in float32, from h = 20 on."""
    block = zoo.block("retnet", 80, heads=40)
    wanted = [math.log1p(-(2.0 ** (-5 - h))) for h in range(40)]
    for dtype in (torch.float64, torch.float32):
        found = block.log_decay("cpu", dtype)
        torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=2e-7, atol=0)
    found = zoo.block("retnet", 16, heads=4, decay="linspace").log_decay("cpu", torch.float64)
    wanted = [1 / 32, 32 ** (-2 / 3) * 512 ** (-1 / 3), 32 ** (-1 / 3) * 512 ** (-2 / 3), 1 / 512]
    torch.testing.assert_close(1 - found.exp(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)
    assert zoo.block("retnet", 4, heads=1, decay="linspace").log_decay("cpu", torch.float64).exp().item() == 31 / 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_all_but_never_forget(dtype):
    """40 heads, γ from 31/32 to 1 - 2^-44: finite, and as near float64 as the dtype's digits."""
    torch.manual_seed(0)
    exact = zoo.block("retnet", 80, heads=40, norm="rms", norm_eps=1e-2)
    block, exact = zoo.block("retnet", 80, heads=40, norm="rms", norm_eps=1e-2).to(dtype), exact.double()
    exact.load_state_dict({name: value.double() for name, value in block.state_dict().items()})
    x = torch.randn(1, 300, 80).to(dtype)
    found, wanted = [], []
    for each, into in ((block, found), (exact, wanted)):
        given = x.detach().to(each.in_proj.weight.dtype).requires_grad_()
        y = each(given).y
        into += [y, *torch.autograd.grad(y.double().square().sum(), [given, *each.parameters()])]
    for a, b in zip(found, wanted, strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error < (1e-5 if dtype == torch.float32 else 4e-2), error


def test_positions_count_a_documents_tokens():
    block = make()
    state = block.init_state(3)._replace(segment=torch.tensor([4, 4, 0]), position=torch.tensor([10, 10, 0]))
    segments = torch.tensor([[0, 4, 4, 0, 4, 0], [4, 0, 4, 6, 6, 6], [0, 0, 0, 0, 0, 0]])
    state = block(torch.randn(3, 6, 12).double(), state, segments).state
    assert state.position.tolist() == [13, 3, 0]
    assert state.segment.tolist() == [4, 6, 0]
    state = block(torch.randn(3, 2, 12).double(), state).state
    assert state.position.tolist() == [15, 5, 2]


def test_the_authors_angles_are_rotarys_with_another_base():
    size = 16
    theirs = 10000.0 ** -torch.linspace(0, 1, size // 2, dtype=torch.float64)
    ours = Rotary(size, base=10000.0 ** (size / (size - 2))).theta
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs, rtol=1e-12, atol=0)


def test_its_sizes_and_its_tags():
    block = zoo.block("retnet", 2048)
    assert (block.heads, block.sizes) == (8, (2048, 2048, 4096, 4096))
    assert sum(p.numel() for p in block.parameters()) == 8 * 2048**2
    assert [zoo.block("retnet", width).heads for width in (2, 4, 6, 24, 30, 512, 520)] == [1, 2, 3, 2, 3, 2, 4]
    assert not tags(zoo.block("retnet", 12, norm_affine=True))["norm.weight"].weight_decay


def test_the_preset_has_the_released_size():
    """fla-hub/retnet-1.3B-100B: 1.35 billion. Its eight d² of retention and the norm of 512 values, three matrices of
    2816 = 2/3 · 2 · 2048 up to a multiple of 256, two norms a layer, embedding and head apart."""
    d = 2048
    layer = 8 * d * d + 512 + 3 * d * 2816 + 2 * d
    total = 2 * 32000 * d + 24 * layer + d
    assert describe_model(zoo.preset("retnet-1.3b"))["total"] == total == 1_351_727_104


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, r"heads=5 must divide key_dim=12 and value_dim=24; try 1"),
        ({"heads": 0}, "heads=0 must be a positive integer"),
        ({"key_dim": 0}, "key_dim=0"),
        ({"value_dim": 2.5}, "value_dim=2.5"),
        ({"heads": 12}, "rotary turns pairs and head_dim=1 has none"),
        ({"position": {"kind": "alibi"}}, "retention has no logits.*use rotary, or None"),
        ({"decay": "power"}, r"decay='power' is unknown \(did you mean 'powers'\?\); choose from powers, linspace"),
        ({"norm": "layer"}, "norm='layer' is unknown.*choose from group, rms"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0 must not be negative"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.block("retnet", 12, **options)
