"""Gated DeltaNet against transformers' Qwen3-Next and OLMo Hybrid, its decays' ends and its published size."""

import pytest
import torch
from torch import nn

import ops
import zoo
from zoo.block import tags
from zoo.recurrent.gated_delta_net import GatedDeltaNet

WIDTH = 20
SIZES = [
    {"heads": 4, "key_heads": 2, "head_dim": 5, "value_head_dim": 3, "conv_width": 4},
    {"heads": 2, "head_dim": 4, "value_head_dim": 8, "conv_width": 3},
]


@pytest.fixture
def exact(monkeypatch):
    """transformers' mixers round to float32 on the way; in float64 they are an oracle to the last bits."""
    to = torch.Tensor.to

    def stay(tensor, *args, **kwargs):
        if tensor.dtype == torch.float64 and torch.float32 in args:
            return to(tensor, torch.float64, **kwargs)
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.Tensor, "to", stay)


def make(**options) -> GatedDeltaNet:
    torch.manual_seed(0)
    block = GatedDeltaNet(WIDTH, norm_eps=1e-6, **options).double()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 if name in ("A_log", "dt_bias") else 0.2))
    return block


def rows(block: GatedDeltaNet) -> list[torch.Tensor]:
    """in_proj's rows of q, k, v, β, a and z."""
    sizes = [block.key_dim, block.key_dim, block.value_dim, block.heads, block.heads, block.value_dim]
    return list(block.in_proj.weight.split(sizes))


def qwen(block: GatedDeltaNet):
    """Theirs of our weights: the rows of q, k, v and z lie together key head by key head there, and those of β, a."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_value_heads=block.heads,
        linear_num_key_heads=block.key_heads,
        linear_key_head_dim=block.k_dim,
        linear_value_head_dim=block.v_dim,
        linear_conv_kernel_dim=block.conv.taps,
        rms_norm_eps=1e-6,
    )
    mixer = Qwen3NextGatedDeltaNet(config, 0).double().eval()
    q, k, v, beta, a, z = (each.unflatten(0, (block.key_heads, -1)) for each in rows(block))
    weights = {
        "in_proj_qkvz.weight": torch.cat([q, k, v, z], 1).flatten(0, 1),
        "in_proj_ba.weight": torch.cat([beta, a], 1).flatten(0, 1),
        "conv1d.weight": block.conv.weight[:, None],
        "A_log": block.A_log,
        "dt_bias": block.dt_bias,
        "norm.weight": block.norm.weight,
        "out_proj.weight": block.out_proj.weight,
    }
    mixer.load_state_dict({name: each.detach().clone() for name, each in weights.items()})
    return mixer, config


def equal(block: GatedDeltaNet, mixer: nn.Module, time: int, **names: str) -> None:
    """Outputs, and gradients of the input and of weights that lie alike in both."""
    x = torch.randn(2, time, WIDTH, dtype=torch.float64)
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    y, wanted = block(mine).y, mixer(theirs)
    assert wanted.dtype == torch.float64
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (wanted * direction).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-8)
    gradients = {name: each.grad for name, each in mixer.named_parameters()}
    for name in ("A_log", "dt_bias", "norm.weight", "out_proj.weight", "conv.weight"):
        found = block.get_parameter(name).grad
        wanted = gradients[names.get(name, name)].reshape(found.shape)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("options", SIZES, ids=["grouped", "equal"])
def test_it_is_qwen3_nexts(options, impl):
    block = make(**options)
    with ops.use(impl):
        equal(block, qwen(block)[0], 71, **{"conv.weight": "conv1d.weight"})


@pytest.mark.usefixtures("exact")
def test_decoding_is_theirs():
    """A prompt, then a token after another with a cache, in both; and both caches hold the same."""
    from transformers import DynamicCache

    block = make(**SIZES[0])
    mixer, config = qwen(block)
    x = torch.randn(2, 12, WIDTH, dtype=torch.float64)
    cache, state = DynamicCache(config=config), block.init_state(2)
    with torch.no_grad():
        for start, end in ((0, 7), (7, 8), (8, 9), (9, 10), (10, 11), (11, 12)):
            wanted = mixer(x[:, start:end], cache_params=cache)
            y, state, _ = block(x[:, start:end], state)
            torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.S, cache.layers[0].recurrent_states[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.conv, cache.layers[0].conv_states[0].mT[:, -3:], rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("exact")
def test_negative_eigenvalues_are_olmos():
    from transformers import OlmoHybridConfig
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

    block = make(**SIZES[1], negative_eigenvalues=True)
    block.norm.eps = 1e-5
    config = OlmoHybridConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=block.heads,
        linear_num_key_heads=block.key_heads,
        linear_key_head_dim=block.k_dim,
        linear_value_head_dim=block.v_dim,
        linear_conv_kernel_dim=block.conv.taps,
        linear_allow_neg_eigval=True,
    )
    mixer = OlmoHybridGatedDeltaNet(config, 0).double().eval()
    weights = dict(zip([f"{each}_proj.weight" for each in ("q", "k", "v", "b", "a", "g")], rows(block), strict=True))
    weights |= {"conv1d.weight": block.conv.weight[:, None], "o_proj.weight": block.out_proj.weight}
    weights |= {"A_log": block.A_log, "dt_bias": block.dt_bias, "o_norm.weight": block.norm.weight}
    mixer.load_state_dict({name: each.detach().clone() for name, each in weights.items()})
    names = {"conv.weight": "conv1d.weight", "out_proj.weight": "o_proj.weight", "norm.weight": "o_norm.weight"}
    equal(block, mixer, 39, **names)


ENDS = {"forgets all": 1e4, "forgets nothing": -80.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", ENDS.values(), ids=ENDS)
def test_decays_near_0_and_near_1(bias, dtype):
    """Finite values and gradients, near float64's, through the chunked form."""
    torch.manual_seed(0)
    block = GatedDeltaNet(WIDTH, norm_eps=1e-2)
    with torch.no_grad():
        block.dt_bias.copy_(torch.tensor([bias, -2.0]))
    block.to(dtype)
    wide = GatedDeltaNet(WIDTH, norm_eps=1e-2).double()
    wide.load_state_dict({name: value.double() for name, value in block.state_dict().items()})
    x = torch.randn(1, 150, WIDTH).to(dtype)
    results = []
    for each in (block, wide):
        given = x.detach().to(each.in_proj.weight.dtype).requires_grad_()
        with ops.use("chunked"):
            y = each(given).y
        results.append([y, *torch.autograd.grad(y.square().sum(), [given, *each.parameters()])])
    for name, a, b in zip(["y", "x", *(name for name, _ in block.named_parameters())], *results, strict=True):
        assert a.isfinite().all(), name
        error = (a.double() - b).norm() / max(b.norm(), 1e-3 * results[1][0].norm())
        assert error < (1e-4 if dtype == torch.float32 else 5e-2), f"{name}: {error}"


def test_the_layer_has_the_papers_size():
    """1.3B: width 2048, six heads of 256 for keys and 512 for values: six matrices of 2048², as attention's and half
    of a feed-forward's."""
    block = GatedDeltaNet(2048)
    d, k, v = 2048, 1536, 3072
    assert (block.heads, block.key_heads, block.k_dim, block.v_dim) == (6, 6, 256, 512)
    assert d * (2 * k + 3 * v) == 6 * d * d
    assert sum(p.numel() for p in block.parameters()) == 6 * d * d + 2 * 6 * d + 4 * (2 * k + v) + 2 * 6 + 512


def test_its_beginning_and_its_tags():
    torch.manual_seed(0)
    block = GatedDeltaNet(64, heads=2000, head_dim=1)
    assert {name for name, each in tags(block).items() if not each.weight_decay} == {"A_log", "dt_bias", "norm.weight"}
    A, dt = block.A_log.exp(), nn.functional.softplus(block.dt_bias)
    assert 1 <= A.min() < 1.1 and 15.9 < A.max() <= 16.001 and abs(A.mean() - 8.5) < 0.4
    assert 0.999e-3 < dt.min() < 1.1e-3 and 0.9e-1 < dt.max() < 1.001e-1
    assert abs(dt.log10().mean() + 2) < 0.05  # log-uniform


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4, "key_heads": 6}, "key_heads=6 must divide heads=4; try 2"),
        ({"key_heads": 0}, "key_heads=0 must be a positive integer"),
        ({"value_head_dim": -1}, "value_head_dim=-1 must be a positive integer"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.block("gated_delta_net", WIDTH, **options)
