"""Stepping with static buffers gives what plain decoding gives, token for token; a graph on a GPU does, too."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import zoo
from tests.variants import VARIANTS
from zoo.block import Block, Out, leaves
from zoo.graphs import Stepper
from zoo.model import LanguageModel
from zoo.registry import KINDS

VOCAB, ROWS, PROMPT, TOKENS = 11, 2, 6, 12
CASES = [(kind, chosen) for kind in zoo.kinds() for chosen in VARIANTS.get(kind, [{}])]


class SwapState(NamedTuple):
    a: Tensor
    b: Tensor


class Swap(Block):
    """Gives each leaf of its state back in the other's place, so that one buffer is read after it was written."""

    def init_state(self, batch, *, device=None, dtype=None):
        return SwapState(torch.zeros(batch, device=device), torch.ones(batch, device=device))

    def forward(self, x, state=None, segments=None):
        y = x if state is None else x + state.a[:, None, None]
        return Out(y, None if state is None else SwapState(state.b, state.a), {})


class GrowState(NamedTuple):
    seen: Tensor


class Grow(Block):
    """Says that its state has a constant size, and it has not."""

    def init_state(self, batch, *, device=None, dtype=None):
        return GrowState(torch.zeros(batch, 0, device=device))

    def forward(self, x, state=None, segments=None):
        return Out(x, None if state is None else GrowState(torch.cat([state.seen, x[..., 0]], 1)), {})


def model(*blocks, width=24):
    return LanguageModel({"vocab_size": VOCAB, "width": width, "stack": [{"blocks": list(blocks)}]}).eval()


@torch.no_grad()
def plain(built, tokens):
    """Logits behind the prompt and behind each further token."""
    out = built(tokens[:, :PROMPT], built.init_state(len(tokens)))
    found = [out.logits[:, -1]]
    for token in tokens[:, PROMPT:].split(1, 1):
        out = built(token, out.state)
        found.append(out.logits[:, -1])
    return torch.stack(found)


def stepped(stepper, tokens):
    found = [stepper.read(tokens[:, :PROMPT]).clone()]
    return torch.stack(found + [stepper(token).clone() for token in tokens[:, PROMPT:].unbind(1)])


def grows(built):
    return any(each.block.state_bytes(1) != each.block.state_bytes(1000) for each in built.residuals)


@pytest.mark.parametrize(("kind", "chosen"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_equals_plain_decoding(kind, chosen):
    """Every kind that can stand in a causal model: the same logits, or a refusal because its state grows."""
    try:
        built = model({"kind": kind, **chosen})
    except ValueError as error:
        assert "causal" in str(error)
        return
    if grows(built):
        with pytest.raises(ValueError, match=rf"stack\[0\]\.blocks\[0\] \(kind {kind}\) has a state that grows"):
            Stepper(built)
        return
    tokens = torch.randint(VOCAB, (ROWS, TOKENS))
    wanted = plain(built, tokens)
    torch.testing.assert_close(stepped(Stepper(built, ROWS), tokens), wanted, rtol=0, atol=0)
    assert wanted.std() > 0


HYBRID = ("mamba2", {"kind": "gqa", "heads": 2, "window": 4}, {"kind": "moe", "experts": 3}, "rwkv4")


def test_goes_on_and_comes_back():
    """Reading in two pieces is reading at once; a state taken is a copy, to come back to; reset starts anew."""
    built, tokens = model(*HYBRID), torch.randint(VOCAB, (ROWS, TOKENS))
    wanted = plain(built, tokens)
    stepper = Stepper(built, ROWS)
    stepper.read(tokens[:, :2])
    stepper.read(tokens[:, 2:PROMPT])
    kept = stepper.state
    copies = [leaf.clone() for leaf in leaves(kept)]
    for _ in range(2):
        stepper.reset(kept)
        found = [stepper(token[:, None]).clone() for token in tokens[:, PROMPT:].unbind(1)]
        torch.testing.assert_close(torch.stack(found), wanted[1:])
    assert all(torch.equal(a, b) for a, b in zip(leaves(kept), copies, strict=True))
    out = built(tokens[:, PROMPT : PROMPT + 1], kept)  # a state is the model's own
    torch.testing.assert_close(out.logits[:, -1], wanted[1])
    stepper.reset()
    torch.testing.assert_close(stepped(stepper, tokens), wanted)


def test_buffers_never_move():
    built = model(*HYBRID)
    stepper = Stepper(built, ROWS)
    places = [leaf.data_ptr() for leaf in leaves(stepper._state)] + [stepper.logits.data_ptr()]
    stepped(stepper, torch.randint(VOCAB, (ROWS, TOKENS)))
    assert [leaf.data_ptr() for leaf in leaves(stepper._state)] + [stepper.logits.data_ptr()] == places


def test_a_leaf_that_is_another_buffer(monkeypatch):
    monkeypatch.setitem(KINDS, "swap", "tests.test_graphs:Swap")
    built, tokens = model("swap"), torch.randint(VOCAB, (ROWS, TOKENS))
    torch.testing.assert_close(stepped(Stepper(built, ROWS), tokens), plain(built, tokens))


def test_padding_on_the_left():
    built, tokens = model(*HYBRID), torch.randint(VOCAB, (1, TOKENS))
    stepper = Stepper(built)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens[:, :PROMPT]], 1)
    first = stepper.read(padded, torch.tensor([[0] * 3 + [1] * PROMPT])).clone()
    found = torch.stack([first, *(stepper(token).clone() for token in tokens[:, PROMPT:].unbind(1))])
    torch.testing.assert_close(found, plain(built, tokens))


def test_a_causal_lm_of_transformers():
    from zoo.hf import ZooConfig, ZooForCausalLM

    built = model(*HYBRID)
    wrapped = ZooForCausalLM(ZooConfig(model=built.config.to_dict())).eval()
    wrapped.model.load_state_dict(built.state_dict())
    tokens = torch.randint(VOCAB, (ROWS, TOKENS))
    torch.testing.assert_close(stepped(Stepper(wrapped, ROWS), tokens), plain(built, tokens))


def test_errors(monkeypatch):
    built = model("mamba")
    stepper = Stepper(built, ROWS)
    with pytest.raises(ValueError, match=r"one token for each of 2 rows, got \(3,\)"):
        stepper(torch.zeros(3, dtype=torch.long))
    for other in (built.init_state(3), model("rwkv4").init_state(ROWS), ()):
        with pytest.raises(ValueError, match=r"does not fit this stepper \(of batch=2\)"):
            stepper.reset(other)
    with pytest.raises(TypeError, match="got Linear"):
        Stepper(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        Stepper(model("mamba").train())
    with pytest.raises(ValueError, match="batch=0"):
        Stepper(built, 0)
    with pytest.raises(ValueError, match="on a GPU, this one is on cpu"):
        Stepper(built, graph=True)
    with pytest.raises(ValueError, match=r"stack\[0\]\.blocks\[1\] \(kind gqa\) .* give it a window"):
        Stepper(model("mamba", {"kind": "gqa", "heads": 2}))
    masked = {"vocab_size": VOCAB, "width": 24, "objective": "masked", "stack": [{"blocks": ["bigs"]}]}
    with pytest.raises(ValueError, match="masked model has no state"):
        Stepper(LanguageModel(masked).eval())
    monkeypatch.setitem(KINDS, "grow", "tests.test_graphs:Grow")
    with pytest.raises(ValueError, match=r"\(kind grow\) has a state that grows"):
        Stepper(model("grow"))


GPU_STACKS = [["mamba"], ["mamba2"], ["rwkv7"], ["gated_delta_net"], ["retnet"], list(HYBRID)]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("stack", GPU_STACKS, ids=lambda stack: str(stack[0]))
def test_a_graph_is_the_same(stack, batch):
    built, tokens = model(*stack, width=64).cuda(), torch.randint(VOCAB, (batch, 40)).cuda()
    stepper = Stepper(built, batch)
    assert stepper._graph is not None
    wanted = plain(built, tokens)
    for _ in range(2):
        stepper.reset()
        torch.testing.assert_close(stepped(stepper, tokens), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_block_that_waits_for_the_gpu_is_told_of(monkeypatch):
    class Waits(Swap):
        def forward(self, x, state=None, segments=None):
            assert x.sum().item() is not None
            return super().forward(x, state, segments)

    monkeypatch.setattr("tests.test_graphs.Waits", Waits, raising=False)
    monkeypatch.setitem(KINDS, "waits", "tests.test_graphs:Waits")
    with pytest.raises(RuntimeError, match=r"cannot be captured.*graph=False"):
        Stepper(model("waits").cuda())
