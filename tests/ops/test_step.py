"""One token of a block in one compiled call: the numbers of the block's own way, and only where it may be taken."""

import copy
import pickle

import pytest
import torch
from torch import nn

import ops
import zoo
from ops import step
from zoo.block import Block, Out
from zoo.layers.linear import Linear
from zoo.model import LanguageModel

pytest.importorskip("numba")

WIDTH, TIME, BEFORE = 64, 16, 9
CASES = {
    "swiglu": [{}, {"bias": True}],
    "geglu": [{}, {"approximate": "tanh", "bias": True}],
    "mlp": [{}, {"activation": "relu2", "bias": True}, {"activation": "relu"}, {"activation": "silu"}],
    "gqa": [
        {"heads": 8, "kv_heads": 2},
        {"heads": 4, "qk_norm": "rms", "bias": True, "out_bias": True, "scale": 0.1},
        {"heads": 4, "kv_heads": 1, "window": 6, "sinks": 2},
        {"heads": 4, "window": 5, "qk_norm": "rms_across"},
        {"heads": 4, "gate": True, "qk_norm": "rms_zero_centered", "position": {"kind": "rotary", "fraction": 0.5}},
        {"heads": 4, "position": {"kind": "rotary", "layout": "interleaved"}},
        {"heads": 2, "position": None},
    ],
    "mamba": [
        {},
        {"inner_norm": True, "bias": True, "state_size": 5},
        {"inner_norm": "weightless", "conv_bias": False},
    ],
    "mamba2": [
        {},
        {"groups": 2, "bias": True, "state_size": 8, "norm_before_gate": True},
        {"dt_limit": [0.001, 0.1], "groups": 2, "norm_groups": 1, "conv_bias": False},
        {"dt_limit": [0.01, None], "conv_width": 1},
    ],
    "rwkv4": [{}],
    "rwkv4_channel_mix": [{}],
    "rg_lru": [{}, {"heads": 4, "bias": False, "inner": 32}],
    "delta_net": [{"heads": 4}],
    "gated_delta_net": [{"heads": 4, "key_heads": 2, "head_dim": 8, "negative_eigenvalues": True}],
    "moe": [
        {"experts": 4},
        {
            "top_k": 3,
            "expert": {"kind": "geglu", "bias": True, "approximate": "tanh"},
            "shared_experts": 2,
            "shared_gate": True,
            "out_bias": True,
        },
        {"experts": 5, "top_k": 1, "expert": {"kind": "mlp", "activation": "relu2"}, "shared_experts": 1},
        {"router": {"kind": "top_k", "renormalise": False, "scale": 2.5}},
        {"router": {"kind": "top_k", "order": "top_k_then_softmax"}, "hidden": 13},
    ],
}
BOTH = [(kind, options) for kind, found in CASES.items() for options in found]


def model(kind, options, norm="rms", **more):
    torch.manual_seed(0)
    stack = [{"kind": kind, **options, **more}]
    made = LanguageModel({"vocab_size": 11, "width": WIDTH, "norm": norm, "stack": stack}).eval()
    for name, each in made.named_parameters():
        if each.ndim > 1 and "A_log" not in name:
            nn.init.normal_(each, std=0.2)
        elif "norm" in name or "bias" in name:
            nn.init.normal_(each, mean=0.5, std=0.2)
    return made


def decode(made, tokens, segments, impl):
    """Logits of the tokens after the first BEFORE, one at a time, and the state after them."""
    with ops.use(impl):
        state = made(tokens[:, :BEFORE], made.init_state(len(tokens)), segments).state
        found = []
        for place in range(BEFORE, tokens.shape[1]):
            out = made(tokens[:, place : place + 1], state)
            state = out.state
            found.append(out.logits)
    return torch.cat(found, 1), state


def leaves(state):
    return [leaf for each in state for leaf in (leaves(each) if isinstance(each, tuple) else [each]) if leaf.numel()]


@pytest.fixture
def counted(monkeypatch):
    """How many blocks were taken in one call."""
    taken = []
    true = step.takes

    def takes(*arguments):
        taken.append(true(*arguments))
        return taken[-1]

    monkeypatch.setattr(step, "takes", takes)
    return taken


@pytest.mark.parametrize("padded", [False, True], ids=["one row", "three rows, padded"])
@pytest.mark.parametrize("norm", ["rms", "layer", "rms_zero_centered"])
@pytest.mark.parametrize(("kind", "options"), BOTH, ids=str)
@torch.no_grad()
def test_gives_what_the_block_gives(kind, options, norm, padded, counted):
    if norm != "rms" and options != CASES[kind][0]:
        pytest.skip("norms are the kernels' common part: one case a kind")
    made = model(kind, options, norm, residual={"skip": 0.7, "scale": 1.5} if padded else {})
    tokens, segments = torch.randint(0, 11, (3 if padded else 1, TIME)), None
    if padded:
        segments = torch.ones(3, BEFORE, dtype=torch.long)
        segments[1, :4] = segments[2] = 0
    wanted, wanted_state = decode(made, tokens, segments, "torch")
    assert not any(counted)
    counted.clear()
    found, state = decode(made, tokens, segments, "native")
    assert len(counted) == TIME - BEFORE
    assert all(counted)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
    for one, other in zip(leaves(state), leaves(wanted_state), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "moe"])
@torch.no_grad()
def test_a_block_called_by_itself_takes_it_too(kind, counted):
    block = zoo.block(kind, WIDTH, **CASES[kind][0]).eval()
    x = torch.randn(2, TIME, WIDTH)
    state = block(x[:, :BEFORE], block.init_state(2)).state
    found = block(x[:, BEFORE : BEFORE + 1], state).y  # rows that are not contiguous
    assert counted == [True]
    torch.testing.assert_close(found, block(x).y[:, BEFORE : BEFORE + 1], rtol=2e-5, atol=2e-5)


def hooked(made):
    made.blocks[0].block.register_forward_hook(lambda *_: None)


def inner_hook(made):
    made.blocks[0].block.up.register_forward_pre_hook(lambda *_: None)


def adapted(made):
    class Adapted(Linear):
        pass

    made.blocks[0].block.up = Adapted(WIDTH, made.blocks[0].block.up.out_features, bias=False)


def other_function(made):
    made.blocks[0].block.activation = torch.tanh


def strided(made):
    weight = made.blocks[0].block.up.weight
    weight.data = weight.data.T.contiguous().T


def narrow(made):
    made.bfloat16()


def wide(made):
    made.double()


@pytest.mark.parametrize("before", [False, True], ids=["at once", "after a call"])
@pytest.mark.parametrize("change", [hooked, inner_hook, adapted, other_function, strided, narrow, wide])
@torch.no_grad()
def test_what_it_does_not_know_goes_the_usual_way(change, before, counted):
    """Hooks are called, adapters and functions of somebody's own take part, other types and layouts are computed."""
    made = model("swiglu", {})
    if before:
        made(torch.randint(0, 11, (1, 1)), made.init_state(1))
        assert all(counted)
        counted.clear()
    change(made)
    called = []
    for module in made.modules():
        if isinstance(module, Linear):
            module.register_forward_hook(lambda module, *_: called.append(module))
    made(torch.randint(0, 11, (1, 1)), made.init_state(1))
    assert not any(counted)
    assert made.blocks[0].block.up in called


def in_place(made):
    made.blocks[0].block.up.weight.mul_(2)


def other_memory(made):
    weight = made.blocks[0].block.up.weight
    weight.data = 2 * weight.data


def other_parameter(made):
    up = made.blocks[0].block.up
    up.weight = nn.Parameter(2 * up.weight)


def other_module(made):
    up = made.blocks[0].block.up
    made.blocks[0].block.up = Linear(WIDTH, up.out_features, bias=False)
    made.blocks[0].block.up.weight.copy_(2 * up.weight)


def other_norm(made):
    made.blocks[0].norm.weight.data = 2 * made.blocks[0].norm.weight.data


def assigned(made):
    made.load_state_dict({name: 1.5 * each for name, each in made.state_dict().items()}, assign=True)


def there_and_back(made):
    made.double().float().blocks[0].block.up.weight.mul_(2)


@pytest.mark.parametrize(
    "change", [in_place, other_memory, other_parameter, other_module, other_norm, assigned, there_and_back]
)
@torch.no_grad()
def test_weights_that_change_between_calls_are_seen(change, counted):
    made = model("swiglu", {})
    token = torch.randint(0, 11, (1, 1))
    before = made(token, made.init_state(1)).logits
    change(made)
    with ops.use("torch"):
        wanted = made(token, made.init_state(1)).logits
    counted.clear()
    found = made(token, made.init_state(1)).logits
    assert counted == [True]
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(found, before)


@pytest.fixture
def ends(monkeypatch):
    """How often a model's norm and head were taken in one call, or not."""
    taken = []
    true = LanguageModel._bind_end

    def bind(self):
        run = true(self)

        def counted(x):
            taken.append(True)
            return run(x)

        return None if run is None else counted

    monkeypatch.setattr(LanguageModel, "_bind_end", bind)
    return taken


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"norm": "layer", "tied_embeddings": True, "logit_softcap": 3.0},
        {"norm": "rms_zero_centered", "logit_scale": 0.5},
    ],
    ids=["plain", "layer, tied", "zero-centred"],
)
@torch.no_grad()
def test_the_end_of_a_model_gives_what_its_parts_give(more, ends):
    made = LanguageModel({"vocab_size": 11, "width": WIDTH, "stack": ["gqa"], **more}).eval()
    for each in made.norm.parameters():
        nn.init.normal_(each, mean=0.5, std=0.2)
    token = torch.randint(0, 11, (3, 1))
    with ops.use("torch"):
        wanted = made(token, hidden_states=True)
    assert not ends
    for keep in (0, 1):
        found = made(token, logits_to_keep=keep, hidden_states=True)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(found.hidden, wanted.hidden, rtol=2e-5, atol=2e-5)
        assert found.hidden_states[-1] is found.hidden
    assert ends == [True] * 2
    torch.testing.assert_close(made(token, logits_to_keep=torch.tensor([0])).logits, wanted.logits)
    assert len(ends) == 2


def watched_norm(made):
    made.norm.register_forward_hook(lambda *_: None)


def watched_head(made):
    made.head.register_forward_pre_hook(lambda *_: None)


def other_head(made):
    made.head = nn.Linear(WIDTH, 11, bias=False)


def biased_head(made):
    made.head = Linear(WIDTH, 11, bias=True)


@pytest.mark.parametrize("change", [watched_norm, watched_head, other_head, biased_head, narrow, wide])
@torch.no_grad()
def test_an_end_that_it_does_not_know_goes_the_usual_way(change, ends):
    made = model("swiglu", {})
    token = torch.randint(0, 11, (1, 1))
    made(token)
    assert ends == [True]
    change(made)
    found = made(token).logits
    assert ends == [True]
    with ops.use("torch"):
        torch.testing.assert_close(found, made(token).logits)


@pytest.mark.parametrize("change", ["weight", "norm", "head", "copy"])
@torch.no_grad()
def test_an_end_that_changes_between_calls_is_seen(change, ends):
    made = LanguageModel({"vocab_size": 11, "width": WIDTH, "stack": ["swiglu"], "tied_embeddings": False}).eval()
    token = torch.randint(0, 11, (1, 1))
    before = made(token).logits
    if change == "weight":
        made.head.weight.mul_(2)
    elif change == "norm":
        made.norm.weight = nn.Parameter(2 * made.norm.weight)
    elif change == "head":
        twice = 2 * made.head.weight
        made.head = Linear(WIDTH, 11, bias=False)
        made.head.weight.copy_(twice)
    else:
        made = copy.deepcopy(made)
        assert made._held_end is None
        made.head.weight.mul_(2)
    torch.testing.assert_close(made(token).logits, 2 * before, rtol=2e-5, atol=2e-5)
    assert ends == [True] * 2


@torch.no_grad()
def test_what_is_kept_goes_into_no_copy_and_no_file(counted):
    """A copy has weights of its own, and a file none of the functions."""
    made = model("gqa", {"heads": 4})
    token = torch.randint(0, 11, (1, 1))
    before = made(token, made.init_state(1)).logits
    assert made.blocks[0]._held_step is not None
    copied, read = copy.deepcopy(made), pickle.loads(pickle.dumps(made))
    assert copied.blocks[0]._held_step is None
    assert read.blocks[0]._held_step is None
    for each in copied.parameters():
        each.mul_(1.5)
    counted.clear()
    torch.testing.assert_close(made(token, made.init_state(1)).logits, before, rtol=0, atol=0)
    torch.testing.assert_close(read(token, read.init_state(1)).logits, before, rtol=0, atol=0)
    assert not torch.allclose(copied(token, copied.init_state(1)).logits, before)
    assert counted == [True] * 3


def test_what_is_kept_holds_no_memory_of_weights_that_moved():
    made = model("swiglu", {})
    with torch.no_grad():
        made(torch.zeros(1, 1, dtype=torch.long), made.init_state(1))
    assert made.blocks[0]._held_step is not None
    made.double()
    assert made.blocks[0]._held_step is None


def test_gradients_and_compilation_go_the_usual_way(counted):
    made = model("gqa", {"heads": 4})
    token = torch.randint(0, 11, (1, 1))
    made(token, made.init_state(1)).logits.sum().backward()
    assert made.blocks[0].block.qkv.weight.grad is not None
    with torch.no_grad():
        torch.compile(made, backend="aot_eager", fullgraph=True)(token, made.init_state(1))
        with torch.autocast("cpu", torch.bfloat16):
            made(token, made.init_state(1))
        made(token.expand(step.MOST + 1, 1), made.init_state(step.MOST + 1))
    assert not any(counted)


@torch.no_grad()
def test_dropout_is_not_left_out():
    made = LanguageModel({"vocab_size": 11, "width": WIDTH, "dropout": 0.5, "stack": ["swiglu"]}).train()
    drawn = [made(torch.zeros(1, 1, dtype=torch.long), made.init_state(1)).logits for _ in range(8)]
    assert any(not torch.equal(each, drawn[0]) for each in drawn[1:])


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind not in ("swiglu", "geglu", "mlp", "moe")])
@torch.no_grad()
def test_a_state_that_does_not_fit_is_an_error(kind):
    """Never memory behind a tensor's end."""
    block, other = (zoo.block(kind, width).eval() for width in (WIDTH, 2 * WIDTH))
    x = torch.randn(2, 1, WIDTH)
    for state in (other.init_state(2), block.init_state(3), (torch.zeros(2),)):
        with pytest.raises(ValueError, match=r"state|takes"):
            block(x, state)
    assert block.one_token(x, block.init_state(3)) is None
    assert block.one_token(x, other.init_state(2)) is None


@torch.no_grad()
def test_a_subclass_with_its_own_forward_is_not_passed_by(counted):
    class Doubled(type(zoo.block("swiglu", WIDTH))):
        def forward(self, x, state=None, segments=None):
            return Out(2 * x, state, {})

    assert Doubled.bind_step is Block.bind_step
    made = model("swiglu", {})
    made.blocks[0].block = Doubled(WIDTH).eval()
    x = torch.randn(1, 1, WIDTH)
    torch.testing.assert_close(made.blocks[0](x, made.blocks[0].block.init_state(1)).y, x + 2 * made.blocks[0].norm(x))
    assert not counted
