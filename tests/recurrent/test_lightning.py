"""Lightning Attention: the papers' recurrence and all pairs, written out; its slopes; transformers' block."""

import pytest
import torch
from torch.nn.functional import silu

import ops
import zoo
from zoo.block import tags

TIME = 23


def make(**options):
    torch.manual_seed(0)
    block = zoo.block("lightning_attention", 12, **options).double()
    torch.nn.init.normal_(block.norm.weight)
    return block


def slopes(heads, layer, layers):
    """TransNormerLLM's eq. 4 with MiniMax's 1e-5s."""
    depth = 1 - layer / (layers - 1 + 1e-5) + 1e-5
    return torch.tensor([2 ** (-8 * h / heads) * depth for h in range(1, heads + 1)], dtype=torch.float64)


def parts(block, x):
    q, k, v, gate = block.in_proj(x)[0].unflatten(-1, (4, block.heads, -1)).unbind(1)
    return silu(q), silu(k), silu(v), torch.sigmoid(gate)


def recurrent(q, k, v, slope):
    S, found = torch.zeros(q.shape[1], q.shape[2], v.shape[2], dtype=torch.float64), []
    for t in range(len(q)):
        S = S * torch.exp(-slope)[:, None, None] + k[t][..., None] * v[t][:, None]
        found.append(torch.einsum("hd,hdv->hv", q[t], S))
    return torch.stack(found)


def parallel(q, k, v, slope):
    t = torch.arange(len(q), dtype=torch.float64)
    distance = t[:, None] - t
    decay = torch.where(distance >= 0, torch.exp(-slope[:, None, None] * distance.clamp_min(0)), 0)
    return torch.einsum("hts,shv->thv", torch.einsum("thd,shd->hts", q, k) * decay, v)


def finish(block, o, gate):
    o = o.flatten(1)
    normed = o * (o.square().mean(-1, keepdim=True) + block.norm.eps).rsqrt() * block.norm.weight
    return block.out_proj(gate.flatten(1) * normed)


@pytest.mark.parametrize("form", [recurrent, parallel], ids=lambda form: form.__name__)
@pytest.mark.parametrize("options", [{}, {"heads": 3, "head_dim": 5, "layer": 1, "layers": 3, "norm_eps": 0.1}])
def test_every_form_of_the_papers(form, options):
    block = make(**options)
    x = torch.randn(1, TIME, 12, dtype=torch.float64, requires_grad=True)
    q, k, v, gate = parts(block, x)
    slope = slopes(block.heads, options.get("layer", 0), options.get("layers", 1))
    wanted = finish(block, form(q, k, v, slope), gate)
    inputs, direction = [x, *block.parameters()], torch.randn_like(wanted)
    right = torch.autograd.grad((wanted * direction).sum(), inputs)
    for impl in ("chunked", "reference"):
        with ops.use(impl):
            y = block(x).y[0]
            torch.testing.assert_close(y, wanted, rtol=0, atol=1e-10)
            found = torch.autograd.grad((y * direction).sum(), inputs)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_its_slopes_shrink_with_depth():
    """... to almost none in the last of several layers; the first layer's do not depend on how many follow."""
    for layer, layers in ((0, 1), (0, 5), (3, 5), (4, 5)):
        block = zoo.block("lightning_attention", 12, heads=6, layer=layer, layers=layers)
        found = block.log_decay("cpu", torch.float64)
        torch.testing.assert_close(found, -slopes(6, layer, layers), rtol=1e-12, atol=0)
    assert (found > -2e-5).all() and (found < 0).all()


def test_slopes_do_not_take_the_dtype_of_weights():
    torch.manual_seed(0)
    block = zoo.block("lightning_attention", 12, heads=6).bfloat16()
    exact = zoo.block("lightning_attention", 12, heads=6).double()
    exact.load_state_dict({name: each.double() for name, each in block.state_dict().items()})
    x = torch.randn(1, 300, 12).bfloat16()
    error = (block(x).y.double() - exact(x.double()).y).norm() / exact(x.double()).y.norm()
    assert error < 2e-2, error


def test_a_model_counts_its_blocks_unless_told():
    stack = ["lightning_attention", "swiglu", {"kind": "lightning_attention", "layer": 1, "layers": 2}]
    blocks = [each.block for each in zoo.LanguageModel({"vocab_size": 5, "width": 12, "stack": stack}).residuals]
    assert [(blocks[each].layer, blocks[each].layers) for each in (0, 2)] == [(0, 3), (1, 2)]


def test_its_sizes_and_its_tags():
    block = zoo.block("lightning_attention", 6144, heads=64, head_dim=128)
    assert sum(each.numel() for each in block.parameters()) == 5 * 6144 * 8192 + 8192
    assert not tags(block)["norm.weight"].weight_decay
    assert not list(block.buffers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads=5 must divide width=12"),
        ({"heads": 0}, "heads=0 must be a positive integer"),
        ({"head_dim": 1.5}, "head_dim=1.5 must be a positive integer"),
        ({"layer": 2, "layers": 2}, r"layer=2 must be in \[0, layers=2\)"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0 must not be negative"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.block("lightning_attention", 12, **options)
