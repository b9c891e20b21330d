"""Block-State Transformer: the paper's layer token by token, who sees whom, and the constant state."""

import pytest
import torch
from torch.nn.functional import softmax

import zoo
from zoo.block import leaves, state_bytes, tags
from zoo.ssm.bst import BST
from zoo.ssm.bst_context import BlockEnds, absorb, spread
from zoo.ssm.dss import DSSSystem
from zoo.ssm.s4d import S4DSystem

S4D = {"kind": "s4d", "state_size": 4, "dt_min": 0.05, "dt_max": 0.5}
DSS = {"kind": "dss", "state_size": 3, "length": 40, "dt_min": 0.05, "dt_max": 0.5}
SH = {"mode": "sh", "block": 5, "heads": 2, "ssm": S4D}
MH = {"mode": "mh", "block": 5, "heads": 3, "ssm": S4D}
MF = {"mode": "mf", "block": 5, "heads": 2, "states": 3, "ssm": S4D}


def built(width=12, **options):
    torch.manual_seed(11)
    block = BST(width, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        block.qkv.weight.mul_(3)  # logits that differ
    return block.double().eval()


def inputs(time, batch=1, width=12, seed=3):
    return torch.randn(batch, time, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filtered(lti, u, filters):
    """Each filter's SSM of each feature, one state after another: [time filters width]."""
    modes, skip = lti.discrete(), torch.zeros(lti.channels) if lti.D is None else lti.D
    drive = torch.ones_like(modes.log_a) if modes.drive is None else modes.drive
    y = torch.empty(len(u), filters, u.shape[1], dtype=u.dtype)
    for feature in range(u.shape[1]):
        for f in range(filters):
            c, h = feature * filters + f, torch.zeros_like(modes.log_a[0])
            for t in range(len(u)):
                h = modes.log_a[c].exp() * h + drive[c] * u[t, feature]
                real = (modes.weights[c] * h).real.sum() * (2 if lti.conjugate else 1)
                y[t, f, feature] = real + skip[c] * u[t, feature]
    return y


def rotated(x, slot):
    """1 · e^(i slot θ) of each pair (i, i + d/2), θ = 10000^(-2i/d)."""
    half = x.shape[-1] // 2
    turn = torch.polar(torch.ones(half).double(), slot * 10000.0 ** (-torch.arange(half).double() / half))
    z = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([z.real, z.imag], -1)


def equations(block, x, position="rotary"):
    """2306.09539, section 3 and appendix, a token after another, for one document x [time width]."""
    heads, d, size, part = block.heads, block.width // block.heads, block.block, block.contexts
    y = filtered(part.lti, x, block.filters)
    normed = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * part.norm.weight
    expected = []
    for t in range(len(x)):
        begin = t // size * size
        q, cross, *_ = (block.qkv.weight @ x[t]).split(block.width)
        tokens = range(begin, t + 1)
        kv = [(block.qkv.weight @ x[s]).split(block.width)[2:] for s in tokens]
        out = []
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            at = [(q[own], t - begin), *((k[own], s - begin) for s, (k, _) in zip(tokens, kv, strict=True))]
            query, *keys = [rotated(*each) if position == "rotary" else each[0] for each in at]
            logits = torch.stack([key @ query for key in keys]) / d**0.5
            if position == "alibi":
                logits = logits - 2.0 ** (-8 * (h + 1) / heads) * torch.tensor([t - s for s in tokens])
            out.append(softmax(logits, 0) @ torch.stack([v[own] for _, v in kv]))
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            if block.mode == "mf":
                outputs = part.start if begin == 0 else y[begin - 1]
                states = outputs / (outputs.square().mean(-1, keepdim=True) + 1e-6).sqrt() * part.norm.weight + part.ids
                keys, values = (states @ part.kv.weight[i * block.width :][own].T for i in range(2))
            elif block.mode == "mh":  # a head's own stream, its own map
                keys, values = (normed[begin : t + 1, h] @ part.weight[h]).split(d, -1)
            else:
                keys, values = (each[:, own] for each in (normed[begin : t + 1, 0] @ part.weight[0]).chunk(2, -1))
            out.append(softmax(keys @ cross[own] / d**0.5, 0) @ values)
        expected.append(block.out.weight @ torch.cat(out))
    return torch.stack(expected)


@pytest.mark.parametrize(
    ("options", "position"),
    [
        (SH, "rotary"),
        (SH | {"position": {"kind": "alibi"}, "block": 4}, "alibi"),
        (MH, "rotary"),
        (MH | {"position": None, "ssm": DSS, "block": 20}, None),
        (MF, "rotary"),
        (MF | {"position": {"kind": "alibi"}, "block": 4, "ssm": S4D | {"skip": False}}, "alibi"),
        (MF | {"position": None, "ssm": DSS, "block": 3}, None),
    ],
)
def test_equals_the_equations(options, position):
    block, x = built(**options), inputs(13)
    with torch.no_grad():
        wanted = equations(block, x[0], position)
        torch.testing.assert_close(block(x).y[0], wanted, rtol=1e-10, atol=1e-10)
        # With a state, and behind another document with padding between: other ways through the code.
        torch.testing.assert_close(block(x, block.init_state(1)).y[0], wanted, rtol=1e-10, atol=1e-10)
        row = torch.cat([inputs(7, seed=8), torch.full((1, 2, 12), torch.nan), x], 1)
        segments = torch.tensor([[4] * 7 + [0, 0] + [4, 0] + [6] * 11])
        y = block(row, None, segments).y[0]
        torch.testing.assert_close(y[11:], equations(block, row[0, 11:], position), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [SH, MH, MF])
def test_gradients_equal_the_equations(options):
    block, x = built(**options), inputs(8)
    parameters = list(block.parameters())
    found = torch.autograd.grad(block(x).y.sin().sum(), parameters)
    wanted = torch.autograd.grad(equations(block, x[0]).sin().sum(), parameters)
    for (name, _), ours, theirs in zip(block.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        assert ours.abs().max() > 1e-9, name


def seen(block, time=13):
    """Which tokens each output depends on, itself left out (its query does): [time time]."""
    jacobian = torch.autograd.functional.jacobian(lambda u: block(u[None]).y[0], inputs(time)[0])
    return (jacobian.abs().amax((1, 3)) > 1e-12) & ~torch.eye(time, dtype=torch.bool)


@pytest.mark.parametrize("options", [SH, MH, MF])
def test_tokens_see_their_block_and_nothing_later(options):
    """Without contexts: the block's tokens up to oneself."""
    block = built(**options)
    with torch.no_grad():
        block.out.weight[:, 12:] = 0
    t = torch.arange(13)
    wanted = (t[:, None] // 5 == t // 5) & (t[:, None] > t)
    assert torch.equal(seen(block), wanted)


@pytest.mark.parametrize("options", [SH, MH])
def test_streamed_contexts_hold_all_before_and_nothing_later(options):
    block = built(**options)
    with torch.no_grad():
        block.out.weight[:, :12] = 0
    assert torch.equal(seen(block), torch.ones(13, 13).tril(-1).bool())


def test_the_contexts_of_block_ends_hold_nothing_of_the_block():
    """The trap: the last state of the block itself would have seen its later tokens."""
    block = built(**MF)
    with torch.no_grad():
        block.out.weight[:, :12] = 0
    t = torch.arange(13)
    assert torch.equal(seen(block), t // 5 < t[:, None] // 5)


def test_heads_read_their_own_streams():
    """In "mh" the SSMs of one head reach that head's outputs alone; in "sh" all heads'."""
    for options, wanted in ((MH, [False, True, False]), (SH | {"heads": 3}, [True, True, True])):
        block, x = built(**options), inputs(9)
        rows = []
        block.out.register_forward_hook(lambda _, given, out, rows=rows: rows.append(given[0]))
        with torch.no_grad():
            block(x)
            block.contexts.lti.C.unflatten(0, (12, -1))[:, 1 % block.filters].add_(1)
            block(x)
        changed = (rows[0] - rows[1]).abs().unflatten(-1, (6, 4)).amax((0, 1, 3)) > 1e-9
        assert changed.tolist() == [False] * 3 + wanted


def test_the_first_block_has_learned_contexts():
    block, x = built(**MF), inputs(10)
    with torch.no_grad():
        before = block(x).y
        block.contexts.lti.C.add_(1)
        after = block(x).y
        torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=0)
        assert (after[:, 5:] - before[:, 5:]).abs().amax(-1).min() > 1e-6
        block.contexts.start.add_(1)
        again = block(x).y
        assert (again[:, :5] - after[:, :5]).abs().amax(-1).min() > 1e-6
        torch.testing.assert_close(again[:, 5:], after[:, 5:], rtol=0, atol=0)


@pytest.mark.parametrize("options", [SH, MH, MF])
@pytest.mark.parametrize("sizes", [[5, 5, 3], [4, 1, 5, 3], [2, 2, 2, 7], [12, 1], [1] * 13])
def test_any_split_goes_on_exactly(options, sizes):
    """Calls that end inside a block, at its end, and that fill none."""
    block, x = built(**options), inputs(13, 2)
    with torch.no_grad():
        whole, state, parts = block(x).y, block.init_state(2), []
        for piece in x.split(sizes, 1):
            y, state, _ = block(piece, state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
        direct = block(x, block.init_state(2)).state
    kept = 13 % 5  # of the keys only the block's own matter
    torch.testing.assert_close(state.k[:, -kept:], direct.k[:, -kept:])
    for found, wanted in zip(leaves(state)[2:], leaves(direct)[2:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [SH, MH, MF])
@pytest.mark.parametrize("length", [3, 5, 8])
def test_a_document_that_begins_behind_another_goes_on(options, length):
    """The state after a call is that of its last document, be it in its first block, at its end, or in the second."""
    block, x = built(**options), inputs(length + 9)
    row = torch.cat([inputs(7, seed=8), x[:, :length]], 1)
    with torch.no_grad():
        state = block(row, block.init_state(1), torch.tensor([[1] * 7 + [2] * length])).state
        torch.testing.assert_close(block(x[:, length:], state).y, block(x).y[:, length:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [SH, MH, MF])
@pytest.mark.parametrize("time", [1, 4])
def test_a_row_of_padding_keeps_its_state(options, time):
    block, segments = built(**options), torch.ones(2, time, dtype=torch.long)
    segments[1] = 0
    for length in (7, 10):  # inside a block, and at its end
        with torch.no_grad():
            state = block(inputs(length, 2), block.init_state(2)).state
            y, after, _ = block(torch.nan * inputs(time, 2), state, 0 * segments)
            mixed = block(inputs(time, 2), state, segments).state
        assert (y == 0).all()
        for kept, found, beside in zip(leaves(state), leaves(after), leaves(mixed), strict=True):
            torch.testing.assert_close(found, kept, rtol=0, atol=0)
            torch.testing.assert_close(beside[1], kept[1], rtol=0, atol=0)


@pytest.mark.parametrize("lost", ["k", "v", "context", "ssm", "position"])
def test_every_part_of_the_state_is_carried(lost):
    block, x = built(**(MF if lost == "context" else SH)), inputs(13)
    with torch.no_grad():
        whole, state = block(x).y, block(x[:, :7], block.init_state(1)).state
        torch.testing.assert_close(block(x[:, 7:], state).y, whole[:, 7:], rtol=1e-10, atol=1e-10)
        empty = getattr(block.init_state(1), lost)
        assert (block(x[:, 7:], state._replace(**{lost: empty})).y - whole[:, 7:]).abs().max() > 1e-3


def test_decoding_projects_contexts_only_where_a_block_begins_or_ends(monkeypatch):
    block, x, calls = built(**MF), inputs(15, 2), []
    project = BlockEnds.project
    monkeypatch.setattr(BlockEnds, "project", lambda self, outputs: calls.append(step) or project(self, outputs))
    with torch.no_grad():
        state = block.init_state(2)
        for step in range(15):
            state = block(x[:, step : step + 1], state).state
    assert calls == [0, 4, 9, 14]


@pytest.mark.parametrize("time", [1, 5, 64, 65, 200])
@pytest.mark.parametrize("kind", ["s4d", "dss"])
def test_block_sums_are_the_models_own(kind, time):
    """`absorb` for inputs that are not repeated = DiagonalLTI.absorb for repeated ones."""
    torch.manual_seed(2)
    lti = (S4DSystem(4 * 3, 6) if kind == "s4d" else DSSSystem(4 * 3, 3, length=90)).double()
    if kind == "dss":
        with torch.no_grad():
            lti.Lambda[:2, 0] = torch.tensor([0.3, 0.05])  # modes that grow: their drive is not 1
    u, modes = inputs(time, 2, 4), lti.discrete()
    torch.testing.assert_close(absorb(modes, u, 3), lti.absorb(modes, spread(u, 3)), rtol=1e-10, atol=1e-12)


def test_blocks_longer_than_a_chunk_of_the_sums():
    block, x = built(**MF | {"block": 70}), inputs(150)
    with torch.no_grad():
        y = filtered(block.contexts.lti, x[0], 3)
        taken = []
        block.contexts.project = lambda outputs: taken.append(outputs) or BlockEnds.project(block.contexts, outputs)
        block(x)
    torch.testing.assert_close(taken[0][0], torch.stack([block.contexts.start, y[69], y[139]]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("options", "most"), [(SH, 64), (MF | {"states": 16, "block": 32}, 64)])
@pytest.mark.parametrize("packed", [False, True])
def test_memory_grows_with_time_times_width(options, most, packed):
    """Nothing kept for the backward pass has time · time numbers, or with "mf" time · states · width."""
    torch.manual_seed(1)
    block, time, largest = BST(16, **options), 1024, 0
    segments = torch.ones(1, time, dtype=torch.long) if packed else None

    def note(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, note):
        block(torch.randn(1, time, 16), block.init_state(1) if packed else None, segments).y.sum().backward()
    assert largest <= most * time * 2


def test_the_state_is_constant_and_counted():
    for options, heads in ((SH, 4), (MH, 6), (MF, 2)):
        block = BST(12, **options)
        number = {"sh": 1, "mh": 3, "mf": 3}[block.mode]
        contexts = 2 * 3 * 12 * 2 if block.mode == "mf" else 0
        sums = 12 * number * 2 * 2 * 4  # two complex modes, float32
        wanted = 2 * 4 * heads * (12 // block.heads) * 2 + contexts + sums + 3 * 8
        assert block.state_bytes(10**6, dtype=torch.bfloat16) == wanted
        assert state_bytes(block.bfloat16().init_state(1)) == wanted


def test_flops_count_what_a_token_sees():
    block = BST(16, **SH | {"block": 8})
    assert block.flops_per_token(7) - block.flops_per_token(0) == 4 * 16 * 2 * 7
    assert block.flops_per_token(8) == block.flops_per_token(0)
    ends = BST(16, **MF | {"block": 8})
    assert ends.flops_per_token(7) - ends.flops_per_token(0) == 4 * 16 * 7


def test_any_diagonal_model_can_be_put_in():
    lti = S4DSystem(12 * 3, 6, "inv", "bilinear")
    block = built(mode="mh", block=5, heads=3, ssm=lti)
    assert block.contexts.lti is lti
    x = inputs(6)
    with torch.no_grad():
        torch.testing.assert_close(block(x).y[0], equations(block, x[0]), rtol=1e-10, atol=1e-10)


def test_heads_of_about_64():
    assert [BST(width, position=None).heads for width in (24, 25, 512, 768)] == [3, 5, 8, 12]


def test_no_weight_decay_where_the_dynamics_are():
    free = {name for name, each in tags(BST(24, **MF)).items() if not each.weight_decay}
    system = {f"contexts.lti.{name}" for name in ("log_step", "log_A_real", "A_imag", "B", "D")}
    assert free == system | {"contexts.ids", "contexts.start", "contexts.norm.weight"}
    assert tags(BST(24, **SH))["contexts.lti.A_imag"].learning_rate == 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "sm"}, "mode='sm' is unknown \\(did you mean 's?m?[sm]?h'\\?\\); choose from sh, mh, mf"),
        ({"block": 1}, "block=1 must be an integer from 2"),
        ({"heads": 5}, "heads=5 must divide width=24; try 1"),
        ({"heads": 0}, "heads=0 must be a positive integer; None chooses one"),
        ({"mode": "mf", "states": 0}, "states=0 must be a positive integer"),
        ({"ssm": {"kind": "s4"}}, "ssm kind 's4' is unknown \\(did you mean 's4d'\\?\\); choose from s4d, dss"),
        ({"ssm": {"state_size": 4}}, "ssm kind None is unknown"),
        ({"ssm": {"kind": "s4d", "state": 4}}, "ssm 's4d' has no option 'state' \\(did you mean 'state_size'"),
        ({"ssm": {"kind": "s4d", "state_size": 5}}, "state_size=5 must be even"),
        ({"ssm": "s4d"}, "ssm='s4d' must be a mapping such as {'kind': 's4d'}, or a DiagonalLTI"),
        ({"ssm": S4DSystem(24, 4), "mode": "mf"}, "ssm has channels=24 of outputs=1, but this mode needs 768 of 1"),
        ({"position": {"kind": "rotari"}}, "position kind 'rotari' is unknown"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        zoo.block("bst", 24, **options)


def test_the_state_of_another_mode_is_refused():
    one, other = BST(12, **SH), BST(12, **MF)
    with pytest.raises(ValueError, match="BSTState of other sizes"):
        one(torch.randn(1, 3, 12), other.init_state(1))
