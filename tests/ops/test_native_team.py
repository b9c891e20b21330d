"""What compiled kernels of one token share out to torch's threads, and the loops that read ahead."""

import multiprocessing
import threading

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from numba import njit

import ops
from ops import native_team, native_threads
from ops.linear import ahead, kernels
from ops.step import moe
from zoo.model import LanguageModel

TEAM = native_threads._parallel() is not None
COUNTS = [0, 1, 15, 16, 31, 32, 33, 64, 100, 1409]


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("streams", "rows"), [(1, 1), (1, 2), (2, 1), (3, 2)])
def test_dots(streams, rows):
    dots = ahead.dots(streams, rows)

    @njit
    def compute(weight, x):
        return dots(weight.ctypes.data, weight.strides[0], x.ctypes.data, x.strides[0], x.shape[1])

    for count in COUNTS:
        weight, x = random(streams, count), random(rows, count) + 1
        wanted = weight.astype(np.float64) @ x.astype(np.float64).T
        np.testing.assert_allclose(np.reshape(compute(weight, x), wanted.shape), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_add_rows(rows):
    add = ahead.add_rows(rows)
    given = tuple(np.float32(each) for each in (0.5, -2, 3)[:rows])

    @njit
    def compute(y, matrix, factors, count):
        add(y.ctypes.data, matrix.ctypes.data, matrix.strides[0], factors, count)

    for count in COUNTS:
        y, matrix = random(count + 1), random(rows, count)
        wanted = y.astype(np.float64)
        wanted[:count] += np.array(given) @ matrix.astype(np.float64)
        compute(y, matrix, given, count)
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
        assert y[count] == random(count + 1)[count]  # nothing behind the end


@pytest.mark.skipif(not TEAM, reason="this torch has no team to lend")
@pytest.mark.parametrize("wide", [True, False], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(701, 131), (3, 40_000), (40_000, 3), (512, 512)], ids=str)
def test_products_are_the_same_on_any_number_of_threads(shape, rows, wide):
    outputs, inputs = shape
    weight = torch.from_numpy(random(outputs, inputs)).to(torch.float32 if wide else torch.bfloat16)
    x = random(rows, inputs)
    stored = weight.numpy() if wide else weight.view(torch.int16).numpy()
    assert weight.numel() >= kernels.LEAST
    found = []
    for threads in (1, 2, 3):
        y = np.full((rows, outputs), np.nan, np.float32)
        kernels.spread(threads, stored, x, y)
        found.append(y)
    np.testing.assert_allclose(found[0], x.astype(np.float64) @ weight.double().numpy().T, rtol=1e-4, atol=2e-3)
    for each in found[1:]:
        np.testing.assert_array_equal(each, found[0])


@pytest.mark.skipif(not TEAM, reason="this torch has no team to lend")
def test_rows_that_lie_apart_are_written_where_they_belong():
    weight, x, y = random(300, 256), random(2, 256), np.full((2, 2, 300), np.nan, np.float32)
    kernels.spread(2, weight, x, y[:, 0])
    np.testing.assert_allclose(y[:, 0], x.astype(np.float64) @ weight.T.astype(np.float64), rtol=1e-4, atol=1e-3)
    assert np.isnan(y[:, 1]).all()


@pytest.mark.skipif(not TEAM, reason="this torch has no team to lend")
@pytest.mark.parametrize("one", [True, False], ids=["a row for all", "a row each"])
@pytest.mark.parametrize("chosen", [[2], [1, 3], [3, 0, 2]], ids=len)
@pytest.mark.parametrize("outputs", [300, 3001])
def test_experts_are_the_same_on_any_number_of_threads(outputs, chosen, one):
    matrices, x = random(4, 257, outputs), random(1 if one else len(chosen), 257)
    found = []
    for threads in (1, 2, 5):
        y = np.full((len(chosen), outputs), np.nan, np.float32)
        moe._visit(threads, np.array(chosen), x, matrices, y)
        found.append(y)
    for place, expert in enumerate(chosen):
        wanted = x[0 if one else place].astype(np.float64) @ matrices[expert].astype(np.float64)
        np.testing.assert_allclose(found[0][place], wanted, rtol=1e-4, atol=1e-3)
    for each in found[1:]:
        np.testing.assert_array_equal(each, found[0])


def test_asks_for_no_more_threads_than_torch_has(two_threads, monkeypatch):
    assert native_team.threads() == (2 if TEAM else 1)
    torch.set_num_threads(1)
    assert native_team.threads() == 1
    torch.set_num_threads(2)
    monkeypatch.setattr(native_threads, "_parallel", lambda: None)
    assert native_team.threads() == 1


@torch.no_grad()
def decode(model, tokens=(3, 5, 7)):
    state, found = model.init_state(1), []
    for token in tokens:
        logits, state, *_ = model(torch.tensor([[token]]), state)
        found.append(logits)
    return torch.cat(found)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    stack = ["gqa", "swiglu", "mamba", {"kind": "moe", "experts": 4, "hidden": 512}, "rwkv4", "rwkv4_channel_mix"]
    return LanguageModel({"vocab_size": 500, "width": 256, "stack": stack}).eval()


def test_a_model_decodes_alike_on_any_number_of_threads(model, two_threads):
    found = decode(model)
    torch.set_num_threads(1)
    torch.testing.assert_close(found, decode(model), rtol=0, atol=0)
    with ops.use("torch"):
        torch.testing.assert_close(found, decode(model), rtol=1e-4, atol=1e-5)


def test_several_callers_at_once(model):
    wanted, found = decode(model), []

    def call():
        torch.set_num_threads(2)
        found.extend(decode(model) for _ in range(5))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for each in callers:
        each.start()
    for each in callers:
        each.join(120)
    assert len(found) == 15
    assert all(torch.equal(each, wanted) for each in found)


def _decode_in_child(model, results):
    results.put((native_team.threads(), decode(model).numpy()))


def test_decodes_in_a_forked_child(model, two_threads):
    """The team's threads are the parent's: waiting for them would never end."""
    wanted = decode(model)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_decode_in_child, args=(model, results))
    child.start()
    try:
        threads, found = results.get(timeout=120)
    finally:
        child.join(10)
        child.kill()
    assert threads == 1
    np.testing.assert_array_equal(found, wanted.numpy())
