"""The sLSTM recurrence: the loop's gradients written out, memories that go on, padding, and what it refuses."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

import ops
from ops.slstm import EMPTY, slstm

HEADS, SIZE = 2, 3
WIDTH = HEADS * SIZE
SEGMENTS = torch.tensor([[0, 4, 4, 0, 4, 9, 9, 0], [1, 2, 2, 3, 3, 3, 3, 3], [0] * 8])


def inputs(time: int = 8, batch: int = 3):
    """logits, R and a memory (h, c, n, m), float64."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(batch, time, 4, WIDTH, dtype=torch.float64)
    R = torch.randn(HEADS, SIZE, 4, SIZE, dtype=torch.float64)
    h, c, m = (torch.randn(batch, WIDTH, dtype=torch.float64) for _ in range(3))
    n = 1 + torch.rand(batch, WIDTH, dtype=torch.float64)
    return logits, R, h.tanh(), c.tanh() * n, n, m


def test_it_is_the_papers_loop_unstabilised():
    """Eq. 8 to 14 with c and n as they are: nothing but a change of units lies between."""
    logits, R, h, c, n, m = inputs()
    y, last = slstm(logits, R, initial_state=(h, c, n, m))
    C, N = c * m.exp(), n * m.exp()
    for t in range(logits.shape[1]):
        mixed = torch.stack([h @ torch.block_diag(*R[:, :, gate]) for gate in range(4)], 1)
        i, f, z, o = (logits[:, t] + mixed).unbind(1)
        C, N = f.sigmoid() * C + i.exp() * z.tanh(), f.sigmoid() * N + i.exp()
        h = o.sigmoid() * C / N
        torch.testing.assert_close(y[:, t], h, rtol=1e-9, atol=1e-9)
    for found, wanted in ((last.h, h), (last.c * last.m.exp(), C), (last.n * last.m.exp(), N)):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("given", [True, False], ids=["memory", "nothing"])
def test_the_gradient_written_out_is_the_loops(segments, given):
    """Of logits, R and h, c, n, m of the initial memory, through h and the last memory."""
    results = []
    for impl in ("scan", "reference"):
        logits, R, *memory = (each.requires_grad_() for each in inputs())
        state = tuple(memory) if given else None
        y, last = slstm(logits, R, initial_state=state, segments=segments, impl=impl)
        assert not last.m.requires_grad
        wave = torch.arange(y.numel(), dtype=y.dtype).sin().reshape(y.shape)
        total = (y * wave).sum() + sum((each * wave[:, k]).sum() for k, each in enumerate(last[:3], 1))
        found = torch.autograd.grad(total, [logits, R, *(memory if given else ())])
        results.append([y, *last, *found])
    for number, (found, wanted) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=lambda text, n=number: f"{n}: {text}")
    assert all(each.abs().sum() > 0 for each in results[0][5:])


def test_it_is_the_gradient():
    """Against finite differences, of a function of c e^m and n e^m: of the initial m as well."""
    logits, R, *memory = (each[:2] if each.shape[0] == 3 else each for each in inputs(4))

    def run(*each):
        y, last = slstm(each[0], each[1], initial_state=each[2:])
        units = last.m.detach().exp()
        return y, last.c / last.n, units * last.n

    tensors = [each.detach().requires_grad_() for each in (logits, R, *memory[:3])]
    m = memory[3].detach()
    assert torch.autograd.gradcheck(lambda *each: run(*each, m)[:2], tensors)
    m.requires_grad_()
    (found,) = torch.autograd.grad(run(*tensors, m)[0].sum(), m)
    with torch.no_grad():
        step = torch.zeros_like(m)
        step[1, 2] = 1e-6
        ends = [run(*tensors, m + sign * step)[0].sum() for sign in (1, -1)]
    torch.testing.assert_close(found[1, 2], (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("impl", ["scan", "reference"])
def test_padding_is_never_read_and_an_all_padded_row_keeps_its_memory(impl):
    logits, R, *memory = inputs()
    wanted, kept = slstm(logits, R, initial_state=tuple(memory), segments=SEGMENTS, impl=impl)
    logits = torch.where((SEGMENTS == 0)[..., None, None], torch.nan, logits).requires_grad_()
    y, last = slstm(logits, R, initial_state=tuple(memory), segments=SEGMENTS, impl=impl)
    assert torch.equal(y, wanted) and (y[SEGMENTS == 0] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(last, kept, strict=True))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(last, memory, strict=True))
    (found,) = torch.autograd.grad(y.sum(), logits)
    assert (found[SEGMENTS == 0] == 0).all() and found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_of_any_size(dtype):
    """n e^-m stays between 1 and the number of tokens, so h is a mean of numbers below 1 and nothing overflows."""
    logits, R, *_ = (each.to(dtype) for each in inputs(60))
    logits = (200 * logits).requires_grad_()
    assert logits.abs().max() > 600
    y, last = slstm(logits, R)
    assert ((last.n >= 1) & (last.n <= 60)).all() and (y.abs() <= 1).all()
    assert torch.autograd.grad(y.square().sum(), logits)[0].isfinite().all()


def test_a_memory_of_zeros_is_none():
    """Whatever its m: with n = 0 there is nothing that m is the size of."""
    logits, R, h, *_ = inputs()
    logits[:, :, 0] -= 2000  # below an m of 0 by more than float64 holds
    zeros = torch.zeros_like(h)
    wanted = slstm(logits, R)[0]
    assert wanted.isfinite().all()
    for m in (zeros, zeros + EMPTY, zeros + 50):
        assert torch.equal(slstm(logits, R, initial_state=(zeros, zeros, zeros, m))[0], wanted)


def test_time_is_not_unrolled_by_torch_compile():
    """Twice the tokens are the same graph: one node for the loop forward, one backward, with documents and without."""
    nodes = []

    def count(graph, example):
        nodes.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    for time in (8, 64):
        logits, R, *_ = inputs(time)
        logits.requires_grad_()
        segments = torch.ones(3, time, dtype=torch.long)
        segments[:, 5:] = 2
        torch.compiler.reset()
        compiled = torch.compile(lambda x, R=R, s=segments: slstm(x, R, segments=s)[0], fullgraph=True, backend=backend)
        found = torch.autograd.grad(compiled(logits).sin().sum(), logits)
        wanted = torch.autograd.grad(slstm(logits, R, segments=segments)[0].sin().sum(), logits)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert len(nodes) == 4 and nodes[:2] == nodes[2:]


@pytest.mark.parametrize("heads", [1, 4])
def test_its_cost(heads):
    """A matrix product of each head's channels alone, once a token."""
    size = 24 // heads
    logits, R = torch.randn(3, 10, 4, 24), torch.randn(heads, size, 4, size)
    with FlopCounterMode(display=False) as counted:
        slstm(logits, R)
    assert counted.get_total_flops() == 10 * 8 * 3 * 24**2 // heads


def test_what_does_not_fit_is_named():
    logits, R, *memory = inputs()
    for arguments, options, message in (
        ((logits[:, :, :3], R), {}, r"\[batch, time, 4, width\] of i, f, z and o, got \(3, 8, 3, 6\)"),
        ((logits[:, :0], R), {}, r"time=0"),
        ((logits, R[:1]), {}, r"R has shape \(1, 3, 4, 3\), but logits have width=6"),
        ((logits, R), {"initial_state": (*memory[:3], memory[3][:2])}, r"pass \(h, c, n, m\), each .* = \(3, 6\)"),
        ((logits, R), {"segments": SEGMENTS[:, :3]}, r"segments has shape \(3, 3\)"),
        ((logits, R), {"impl": "chunked"}, r"impl='chunked' .* choose from auto, scan, reference"),
    ):
        with pytest.raises(ValueError, match=message):
            slstm(*arguments, **options)
    with pytest.raises(TypeError, match=r"floating point \(real\) tensors, got torch.int64"):
        slstm(logits, R.long())
    assert ops.explain(slstm, logits, R).chosen == "scan"
