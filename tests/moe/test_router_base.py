"""BASE: the assignment beside scipy's, and the router that takes it while training and the best logit after."""

import math

import pytest
import torch

import zoo
from zoo.moe.moe import MoE
from zoo.moe.router_base import PRECISION, Base, assign, balanced_sizes

WIDTH, EXPERTS = 16, 4


def scores_of(kind, tokens, experts):
    found = torch.randn(tokens, experts, dtype=torch.float64)
    match kind:
        case "skewed":
            found[:, 0] += 5
        case "whole numbers":
            found = torch.randint(0, 3, (tokens, experts)).double()
        case "equal tokens":
            found = found[:1].expand(tokens, experts)
        case "equal":
            found = torch.full((tokens, experts), 0.7, dtype=torch.float64)
        case "huge":
            found = 1e200 * found
        case "one outlier":
            found[0, 0] = 1e5
        case "correlated":
            found = found[:, :2] @ torch.randn(2, experts, dtype=torch.float64)
    return found


@pytest.mark.parametrize(("tokens", "experts"), [(8, 8), (40, 2), (42, 5), (96, 16), (7, 8), (1, 3), (5, 1)])
@pytest.mark.parametrize(
    "kind",
    ["normal", "skewed", "whole numbers", "equal tokens", "equal", "huge", "one outlier", "correlated"],
)
def test_assignment_is_as_good_as_scipys(kind, tokens, experts):
    from scipy.optimize import linear_sum_assignment

    scores = scores_of(kind, tokens, max(2, experts))[:, :experts]
    sizes = balanced_sizes(scores.argmax(1), experts)
    chosen = assign(scores, sizes)
    assert torch.equal(torch.bincount(chosen, minlength=experts), sizes)
    seats = scores[:, torch.arange(experts).repeat_interleave(sizes)].numpy()
    best = seats[linear_sum_assignment(seats, maximize=True)].sum()
    found = scores.gather(1, chosen[:, None]).sum().item()
    spread = (scores.amax(1) - scores.amin(1)).max().item()
    assert found == pytest.approx(best, abs=tokens * PRECISION * spread + 1e-12 * abs(best))
    if kind in ("whole numbers", "equal"):  # what is left out is less than the smallest difference
        assert found == pytest.approx(best, abs=1e-9)


def test_coarser_precision_is_kept_too():
    scores = scores_of("correlated", 60, 6)
    sizes = torch.full((6,), 10)
    totals = [
        scores.gather(1, assign(scores, sizes, precision)[:, None]).sum().item() for precision in (0.2, 1e-2, 1e-9)
    ]
    spread = (scores.amax(1) - scores.amin(1)).max().item()
    assert totals[0] >= totals[2] - 60 * 0.2 * spread
    assert totals[1] >= totals[2] - 60 * 1e-2 * spread
    assert totals[2] >= max(totals[:2])


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
def test_strange_scores_end_too(strange):
    scores = torch.randn(12, 3)
    scores[5, 1] = strange
    scores[7] = strange
    assert torch.bincount(assign(scores, torch.tensor([4, 4, 4]))).tolist() == [4, 4, 4]


def test_sizes():
    assert balanced_sizes(torch.tensor([2, 2, 2, 0, 0, 1, 1, 1]), 4).tolist() == [2, 2, 2, 2]
    assert balanced_sizes(torch.tensor([2, 2, 2, 0, 0, 1]), 4).tolist() == [2, 1, 2, 1]
    assert balanced_sizes(torch.tensor([3, 3]), 4).tolist() == [1, 0, 0, 1]  # 3 is wanted most; equals by number
    assert balanced_sizes(torch.empty(0, dtype=torch.long), 4).tolist() == [0, 0, 0, 0]


def skewed(top_k=1):
    block = MoE(WIDTH, experts=EXPERTS, top_k=top_k, router="base", load_balance=0.0).double()
    x = torch.randn(3, 8, WIDTH, dtype=torch.float64)
    x[..., 0] = 1
    with torch.no_grad():
        block.router.weight[1, 0] = 8.0  # every token's best is expert 1
    return block, x


def test_training_gives_every_expert_as_many_tokens_and_eval_the_best():
    block, x = skewed()
    training = block.router(x)
    assert torch.bincount(training.experts[:, 0]).tolist() == [6, 6, 6, 6]
    assert block(x).aux["stat/load"].tolist() == [0.25] * 4
    evaluation = block.router.eval()(x)
    assert torch.equal(evaluation.experts, training.logits.argmax(1, keepdim=True))
    assert evaluation.experts.unique().tolist() == [1]
    for routing in (training, evaluation):
        wanted = (x.flatten(0, 1) @ block.router.weight.T).sigmoid().gather(1, routing.experts)
        torch.testing.assert_close(routing.weights, wanted, rtol=0, atol=1e-14)


def test_values_and_gradients_are_a_loops():
    """y = sigmoid(w_e x) f_e(x), also where tokens were moved from the expert that they wanted."""
    block, x = skewed()
    x.requires_grad_()
    chosen = block.router(x).experts[:, 0]
    rows = []
    for token, expert in zip(x.flatten(0, 1), chosen.tolist(), strict=True):
        gate, value = (token @ block.experts.up[expert]).chunk(2)
        hidden = torch.nn.functional.silu(gate) * value
        rows.append((block.router.weight[expert] @ token).sigmoid() * (hidden @ block.experts.down[expert]))
    wanted, found = torch.stack(rows).view_as(x), block(x).y
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    direction = torch.randn_like(wanted)
    inputs = [x, *block.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((found * direction).sum(), inputs),
        torch.autograd.grad((wanted * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_padding_takes_no_place():
    """The assignment of the valid tokens is the one they get without padding; 22 tokens: 6, 6, 5 and 5."""
    block, x = skewed()
    segments = torch.ones(3, 8, dtype=torch.long)
    segments[0, 3], segments[2, 0] = 0, 0
    valid = segments.flatten() != 0
    garbage = torch.where((segments == 0)[..., None], torch.nan, x)
    aux = block(garbage, None, segments).aux
    routing = block.router(torch.where((segments == 0)[..., None], 0.0, x), segments)
    alone = block.router(x.flatten(0, 1)[valid][None])
    assert torch.equal(routing.experts[valid], alone.experts)
    assert torch.equal(routing.weights[valid], alone.weights)
    assert (routing.experts[~valid] == EXPERTS).all()
    assert not routing.weights[~valid].any()
    assert sorted(torch.bincount(alone.experts[:, 0]).tolist()) == [5, 5, 6, 6]
    assert aux["sum/choices"].sum() == 22
    nothing = block(x, None, torch.zeros_like(segments))
    assert not nothing.y.any()


def test_eval_looks_at_the_token_alone():
    block, x = skewed()
    block.eval()
    whole = block(x).y
    for row in range(3):
        for time in range(8):
            one = block(x[row : row + 1, time : time + 1]).y
            torch.testing.assert_close(one[0, 0], whole[row, time], rtol=0, atol=1e-12)


def test_compiles_in_training():
    block, x = skewed()
    segments = torch.tensor([[1] * 8, [0] + [1] * 7, [1] * 8])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for given in (None, segments):
        found, wanted = compiled(x, None, given), block(x, None, given)
        torch.testing.assert_close(found.y, wanted.y, rtol=0, atol=1e-12)
        assert torch.equal(found.aux["sum/choices"], wanted.aux["sum/choices"])


def test_errors_and_a_causal_model():
    with pytest.raises(ValueError, match="top_k=2, but base gives each token one expert; use top_k=1"):
        zoo.block("moe", WIDTH, router="base")
    with pytest.raises(ValueError, match="router 'base' has no option 'bias'"):
        zoo.block("moe", WIDTH, top_k=1, router={"kind": "base", "bias": True})
    assert Base.causal
    stack = [{"kind": "moe", "top_k": 1, "router": "base", "load_balance": 0.0}]
    model = zoo.LanguageModel({"vocab_size": 9, "width": WIDTH, "stack": stack})
    model(torch.randint(9, (2, 12))).logits.square().sum().backward()
    assert model.blocks[0].block.router.weight.grad.any()
