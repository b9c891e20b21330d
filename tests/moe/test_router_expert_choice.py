"""Expert choice: what experts take, document by document, and that causal models refuse it."""

import math

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo.moe.moe import MoE
from zoo.moe.router_expert_choice import ExpertChoice

WIDTH, EXPERTS = 16, 5
PACKED = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 0, 1, 2, 2, 2, 2, 0, 1, 1, 1],
        [5, 5, 0, 5, 5, 5, 3, 0, 0, 0, 0, 0, 0, 0],
    ]
)


def documents(segments):
    """(row, times) of each run of one id, padding left out."""
    for row, ids in enumerate(segments.tolist()):
        last, times = 0, []
        for time, each in enumerate(ids):
            if each == 0:
                continue
            if each != last and times:
                yield row, times
                times = []
            last = each
            times.append(time)
        if times:
            yield row, times


def definition(block, x, segments):
    """Eq. 1-2 with plain loops: for each document, each expert's k tokens of largest probability. Also the visits."""
    y, visits = torch.zeros_like(x), torch.zeros(x.shape[:2], dtype=torch.long)
    for row, times in documents(segments):
        scores = (x[row, times] @ block.router.weight.T).softmax(-1)
        k = math.ceil(len(times) * block.router.top_k / EXPERTS)
        for expert in range(EXPERTS):
            for place in scores[:, expert].topk(k).indices.tolist():
                time = times[place]
                gate, value = (x[row, time] @ block.experts.up[expert]).chunk(2)
                part = (F.silu(gate) * value) @ block.experts.down[expert]
                y[row, time] += scores[place, expert] * part
                visits[row, time] += 1
    return y, visits


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_definition(top_k, packed):
    block = MoE(WIDTH, experts=EXPERTS, top_k=top_k, router="expert_choice", load_balance=0.0).double()
    x = torch.randn(3, 14, WIDTH, dtype=torch.float64).requires_grad_()
    segments = PACKED if packed else torch.ones_like(PACKED)
    wanted, visits = definition(block, x, segments)
    found = block(x, None, PACKED if packed else None)
    torch.testing.assert_close(found.y, wanted, rtol=0, atol=1e-12)
    unserved = ((visits == 0) & (segments != 0)).sum() / (segments != 0).sum()
    torch.testing.assert_close(found.aux["stat/unserved"], unserved, check_dtype=False)
    assert found.aux["sum/choices"].sum() == visits.sum()
    assert len(found.aux["sum/choices"].unique()) == 1  # every expert has the same load
    if top_k != 2:  # some tokens are left with as many places as tokens, none with a place at every expert
        assert (unserved > 0) == (top_k == 1)
    direction, inputs = torch.randn_like(wanted), [x, *block.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((found.y * direction).sum(), inputs),
        torch.autograd.grad((wanted * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_columns_are_no_more_than_visits():
    router = ExpertChoice(WIDTH, EXPERTS, 1)
    x = torch.randn(1, 15, WIDTH)
    routing = router(x)
    visits = (routing.experts < EXPERTS).sum(1)
    assert routing.experts.shape[1] == visits.max() < EXPERTS
    with torch.device("meta"):
        block = MoE(WIDTH, experts=EXPERTS, router="expert_choice")
        assert block(torch.empty(2, 9, WIDTH)).y.shape == (2, 9, WIDTH)


def test_earlier_of_equal_tokens():
    router = ExpertChoice(WIDTH, 4, 1)
    routing = router(torch.randn(1, 1, WIDTH).expand(2, 8, WIDTH))
    assert (routing.experts.reshape(2, 8, 4)[:, :2] < 4).all()
    assert (routing.experts.reshape(2, 8, 4)[:, 2:] == 4).all()


def test_rows_do_not_compete():
    block = MoE(WIDTH, experts=EXPERTS, router="expert_choice").double()
    x = torch.randn(3, 14, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(block(x[1:2]).y, block(x).y[1:2], rtol=0, atol=1e-12)


def stack(**options):
    return [{"kind": "moe", "router": {"kind": "expert_choice", **options}, "load_balance": 0.0}, "gqa"]


def test_a_causal_model_refuses_it_with_the_reason():
    described = {"vocab_size": 9, "width": WIDTH}
    message = r"stack\[0\] \(kind moe\) has the router expert_choice.*later tokens.*allow_lookahead: true"
    with pytest.raises(ValueError, match=message):
        zoo.LanguageModel({**described, "stack": stack()})
    with pytest.raises(ValueError, match=message):
        zoo.LanguageModel({**described, "stack": stack(allow_lookahead=False)})
    with pytest.raises(ValueError, match="allow_lookahead='yes' must be true or false"):
        zoo.LanguageModel({**described, "stack": stack(allow_lookahead="yes")})
    masked = zoo.LanguageModel({**described, "stack": stack(), "objective": "masked"})
    assert masked(torch.randint(9, (2, 12))).logits.shape == (2, 12, 9)


def test_allowed_in_words_it_trains_looks_ahead_and_has_no_state():
    model = zoo.LanguageModel({"vocab_size": 9, "width": WIDTH, "stack": stack(allow_lookahead=True)})
    block = model.blocks[0].block
    assert not block.causal
    assert block.refusal is None
    tokens = torch.randint(9, (2, 12))
    other = torch.cat([tokens[:, :6], torch.randint(9, (2, 6))], 1)
    assert not torch.equal(model(tokens).logits[:, :6], model(other).logits[:, :6])
    model(tokens).logits.square().sum().backward()
    assert block.router.weight.grad.any()
    message = r"stack\[0\] \(kind moe\) looks at later tokens, so the model cannot go on from a state.*use_cache=False"
    with pytest.raises(ValueError, match=message):
        model.init_state(2)
    with pytest.raises(ValueError, match="takes no state"):
        block(torch.randn(2, 3, WIDTH), zoo.NoState())
