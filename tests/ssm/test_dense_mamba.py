"""DenseMamba: the paper's equations with every hidden state in memory, and what the connections are to be."""

import pytest
import torch
from torch.nn.functional import silu, softplus

import zoo
from zoo.block import state_bytes, tags
from zoo.ssm.dense_mamba import DenseMamba


def randomised(block):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return block.double().eval()


def inputs(time, batch=1, width=6):
    return torch.randn(batch, time, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def hidden_states(layer, channels, dt, B):
    """h_t of a layer's own scan, all of them: [time inner n]."""
    A, h, states = -layer.mixer.A_log.exp(), torch.zeros_like(layer.mixer.A_log), []
    for t in range(len(channels)):
        h = torch.exp(dt[t, :, None] * A) * h + dt[t, :, None] * B[t] * channels[t, :, None]
        states.append(h)
    return torch.stack(states)


def equations(block, x):
    """2403.00818, section 3.2, one layer after another, one token and channel after another. x: [time width]."""
    before = []
    for layer in block.each_layer:
        m, u = layer.mixer, rms(x, layer.norm.weight)
        raw, z = m.in_proj(u).chunk(2, -1)
        taps, padded = m.conv.taps, torch.cat([raw.new_zeros(m.conv.taps - 1, m.inner), raw])
        channels = torch.stack([(padded[t : t + taps].T * m.conv.weight).sum(1) for t in range(len(x))])
        channels = silu(channels + (0 if m.conv.bias is None else m.conv.bias))
        dt, B, C = m.x_proj(channels).split([m.dt_rank, m.state_size, m.state_size], -1)
        own = hidden_states(layer, channels, softplus(m.dt_proj(dt)), B)
        y = torch.empty_like(channels)
        for t in range(len(x)):
            fused, further = own[t].clone(), []
            for i, states in enumerate(reversed(before[max(0, len(before) - block.dense_layers) :])):
                gate, _, out, _ = layer.select
                a = silu(out.weight @ silu(gate.weight @ u[t]))
                projected = states[t] if layer.project is None else states[t] @ layer.project[i].T
                if layer.C_proj is None:
                    fused += a[:, None] * projected
                else:
                    further.append(a[:, None] * projected)
            wide = torch.cat([fused, *further], 1)  # "concat": [inner, (1 + sources) n]
            row = C[t] if layer.C_proj is None else torch.cat([C[t], layer.C_proj(channels[t])])
            y[t] = wide @ row + m.D * channels[t]
        before.append(own)
        x = x + m.out_proj(y * silu(z))
    return x


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 4, "dense_layers": 2},
        {"layers": 3, "dense_layers": 5, "projection": "linear", "gate_rank": 3},
        {"layers": 4, "dense_layers": 2, "fusion": "concat", "bias": True, "conv_bias": False},
        {"layers": 2, "dense_layers": 0, "dt_rank": 3, "expand": 1},
    ],
)
def test_equals_the_equations_with_all_hidden_states(options):
    block = randomised(DenseMamba(6, state_size=3, conv_width=3, **options))
    x = inputs(11)
    with torch.no_grad():
        torch.testing.assert_close(block(x).y[0], equations(block, x[0]), rtol=1e-11, atol=1e-11)


def test_gradients_equal_the_equations():
    block = randomised(DenseMamba(6, layers=3, state_size=3, projection="linear"))
    x = inputs(5)
    parameters = list(block.parameters())
    found = torch.autograd.grad(block(x).y.sin().sum(), parameters)
    wanted = torch.autograd.grad(equations(block, x[0]).sin().sum(), parameters)
    for (name, _), ours, theirs in zip(block.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        assert ours.abs().max() > 1e-6, name


def test_without_connections_it_is_a_stack_of_mamba():
    block = randomised(DenseMamba(8, layers=2, dense_layers=0, state_size=4))
    x = y = inputs(9, 2, 8)
    for layer in block.each_layer:
        y = y + layer.mixer(layer.norm(y)).y
    torch.testing.assert_close(block(x).y, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fusion", ["add", "concat"])
def test_a_layer_takes_in_the_last_m_and_no_more(fusion):
    """With all but the last layer's outputs silenced, what a layer tells is told by its h alone: to the m after it."""
    block = randomised(DenseMamba(6, layers=5, dense_layers=2, state_size=3, fusion=fusion))
    x = inputs(7)
    assert [layer.sources for layer in block.each_layer] == [0, 1, 2, 2, 2]
    with torch.no_grad():
        for layer in block.each_layer[:-1]:
            layer.mixer.out_proj.weight.zero_()
        silent, reached = block(x).y, []
        for layer in block.each_layer[:-1]:
            layer.mixer.A_log.add_(0.5)
            reached.append(not torch.equal(block(x).y, silent))
            layer.mixer.A_log.sub_(0.5)
    assert reached == [False, False, True, True]


def test_sources_give_what_they_had_before_their_own_fusion():
    """The recurrence goes on from h, not from the fused state: layers' states are those of their own scans."""
    block = randomised(DenseMamba(6, layers=3, state_size=3))
    x = inputs(6)
    with torch.no_grad():
        ours = block(x, block.init_state(1)).state.layers
        block.each_layer[1].select[2].weight.mul_(3)  # layer 1's gate: no part of its h
        theirs = block(x, block.init_state(1)).state.layers
    torch.testing.assert_close(ours[1].scan, theirs[1].scan, rtol=0, atol=0)
    assert not torch.equal(ours[2].scan, theirs[2].scan)


def test_the_fused_states_are_never_made():
    """No tensor of a call, kept for the backward pass or not, has time · inner · state_size numbers."""
    block = DenseMamba(8, layers=3, state_size=16)
    time, largest = 256, 0

    def note(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, note):
        block(torch.randn(1, time, 8)).y.sum().backward()
    assert largest < time * 16 * 16 / 4


def test_decoding_goes_on_exactly():
    block = randomised(DenseMamba(6, layers=3, state_size=3, fusion="concat"))
    x = inputs(10, 2)
    with torch.no_grad():
        whole, state, parts = block(x).y, block.init_state(2), []
        for piece in x.split([4, 1, 1, 3, 1], 1):
            y, state, _ = block(piece, state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
        # Sources read with the states from before the call: without them what follows is another.
        kept = block(x[:, :5], block.init_state(2)).state
        lost = kept._replace(layers=(kept.layers[0]._replace(scan=0 * kept.layers[0].scan), *kept.layers[1:]))
        assert (block(x[:, 5:], lost).y - whole[:, 5:]).abs().max() > 1e-4


def test_the_state_is_that_of_as_many_mamba_layers():
    block, mamba = DenseMamba(24, layers=5, dense_layers=3), zoo.block("mamba", 24)
    each = state_bytes(mamba.init_state(1)) - 8
    assert block.state_bytes(10**6) == 5 * each + 8
    assert len(block.init_state(2).layers) == 5
    kinds = block.bfloat16().init_state(1).layers[0]
    assert (kinds.conv.dtype, kinds.scan.dtype) == (torch.bfloat16, torch.float32)


def test_flops_grow_with_the_connections():
    plain, dense = (DenseMamba(16, layers=3, dense_layers=m).flops_per_token(0) for m in (0, 2))
    scans = 3 * (9 * 32 * 16 + 2 * 32)  # three pairs of layers
    gates = 2 * 2 * (16 * 1 + 1 * 32)  # two layers with a gate of rank 1
    assert dense - plain == scans + gates
    assert plain == 3 * zoo.block("mamba", 16).flops_per_token(0)


def test_parameters():
    block = DenseMamba(32, layers=3, state_size=4, fusion="concat", bias=True)
    assert [name for name, each in tags(block).items() if each.weight_decay] == []
    assert not any(
        name.endswith(("bias", "A_log", "D")) and name not in tags(block) for name, _ in block.named_parameters()
    )
    assert block.each_layer[0].select is None  # nothing below it to select from
    assert block.each_layer[1].select[0].weight.shape == (2, 32)
    assert block.each_layer[2].C_proj.weight.shape == (2 * 4, 64)
    linear = DenseMamba(32, layers=3, state_size=4, projection="linear").each_layer[2].project
    torch.testing.assert_close(linear, torch.eye(4).expand(2, 4, 4))
    assert DenseMamba.residual is False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": 0}, "layers=0 must be a positive integer"),
        ({"dense_layers": -1}, "dense_layers=-1 must be an integer that is not negative"),
        ({"fusion": "ad"}, "fusion='ad' is unknown \\(did you mean 'add'\\?\\); choose from add, concat"),
        ({"projection": "lin"}, "projection='lin' is unknown \\(did you mean 'linear'\\?\\)"),
        ({"fusion": "concat", "projection": "linear"}, "adds nothing to fusion='concat'.*use projection='identity'"),
        ({"gate_rank": 0}, "gate_rank=0 must be a positive integer"),
        ({"state_size": 0}, "state_size=0 must be a positive integer"),
        ({"dt_rank": 99}, "dt_rank=99 must be an integer from 1 to expand \\* width = 48"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        zoo.block("dense_mamba", 24, **options)


def test_another_blocks_state_is_refused():
    block = DenseMamba(24, layers=2, state_size=4)
    with pytest.raises(ValueError, match="takes the DenseMambaState that its init_state makes"):
        block(torch.randn(1, 3, 24), zoo.block("mamba", 24, state_size=4).init_state(1))
