"""The online convolution: exact for every split, each pair of tokens counted once, O(log² T) a token."""

import math
from itertools import pairwise

import pytest
import torch

from tests.measure import Operations
from zoo.ssm import hyena_online as online
from zoo.ssm.hyena import Hyena


def go_on(slots: torch.Tensor, x: torch.Tensor, clock: int, kernel: torch.Tensor, in_place: bool):
    """The inputs' contributions to later ones, block by block: what each token is due when it comes."""
    slots, due = online.grown(slots, clock + x.shape[1]), []
    for begin, size in online.blocks(clock, x.shape[1]):
        now = slots[:, begin : begin + size].clone()
        block = x[:, begin - clock : begin - clock + size]
        inside = [(kernel[:, 1 : t + 1].flip(1).t() * block[:, :t]).sum(1) for t in range(size)]
        due.append(now + torch.stack(inside, 1))
        slots = online.put(slots, begin, block, kernel, in_place)
    return torch.cat(due, 1), slots


@pytest.mark.parametrize("in_place", [True, False])
def test_every_split_gives_the_direct_sum(in_place):
    x, kernel = torch.randn(2, 41, 3).double(), torch.randn(3, 128).double()
    wanted = torch.stack([(kernel[:, 1 : t + 1].flip(1).t() * x[:, :t]).sum(1) for t in range(41)], 1)
    for cut in range(1, 41):
        slots, clock, found = x.new_zeros(2, 0, 3), 0, []
        for size in (cut, 1, 40 - cut) if cut < 40 else (cut, 1):
            due, slots = go_on(slots, x[:, clock : clock + size], clock, kernel, in_place)
            found.append(due)
            clock += size
        torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-11, atol=1e-11)


def test_rebuilt_slots_are_those_of_the_way_there():
    x, kernel = torch.randn(2, 70, 3).double(), torch.randn(3, 128).double()
    slots = x.new_zeros(2, 0, 3)
    for t in range(70):
        _, slots = go_on(slots, x[:, t : t + 1], t, kernel, True)
        anew = online.rebuilt(x[:, : t + 1], kernel)
        assert anew.shape[1] == online.room(t + 1)
        torch.testing.assert_close(slots, anew, rtol=1e-11, atol=1e-11)


def test_blocks_are_aligned_and_few():
    for clock in range(70):
        for time in range(1, 70):
            found = list(online.blocks(clock, time))
            assert [begin for begin, _ in found] == [clock, *(begin + size for begin, size in found)][:-1]
            assert sum(size for _, size in found) == time
            assert all(size & (size - 1) == 0 and begin % size == 0 for begin, size in found)
            assert len(found) <= 2 * time.bit_length()
            ends = [begin + size for begin, size in found]
            assert online.lags(clock, time) == max(2 * math.gcd(end, 1 << 20) for end in ends)


def step_costs(start: int, steps: int) -> list[float]:
    """Operations of each of `steps` tokens after `start` ones."""
    block, x = Hyena(2, filter_width=4, filter_layers=0, bands=1).eval(), torch.randn(1, 1, 2)
    counts = []
    with torch.no_grad():
        state = block.init_state(1)
        if start:
            state = block(torch.randn(1, start, 2), state).state
        for _ in range(steps):
            with Operations() as operations:
                state = block(x, state).state
            counts.append(operations.count)
    return counts


def test_decoding_costs_the_square_of_the_logarithm_a_token():
    each = step_costs(0, 1024)
    mean = [sum(each[2**k : 2 ** (k + 1)]) / 2**k for k in range(10)]  # over the tokens from 2^k on
    # Were it linear in T, the last would be 16 times that of 4 doublings before; log² T is (10/6)², less the constant.
    assert mean[9] < 2.5 * mean[5], mean
    # What a doubling adds grows by about a constant itself.
    added = [b - a for a, b in pairwise(mean[3:])]
    assert max(added) < 2.5 * min(added), added


def test_most_tokens_cost_the_same_however_long_the_context():
    """Nothing hides an O(T) copy at every token: but for the one that completes 4096, tokens around it cost what those
    around 256 do, where the same blocks are completed."""
    near, far = step_costs(255 - 16, 33), step_costs(4095 - 16, 33)
    assert [index for index, pair in enumerate(zip(near, far, strict=True)) if pair[0] != pair[1]] == [16]


def test_a_sequence_in_chunks_costs_little_more_than_at_once():
    block = Hyena(2, filter_width=4, filter_layers=0, bands=1).eval()
    x, found = torch.randn(1, 2048, 2), {}
    for size in (2048, 256, 100):
        with torch.no_grad(), Operations() as operations:
            state = block.init_state(1)
            for part in x.split(size, 1):
                state = block(part, state).state
        found[size] = operations.count
    assert found[256] < 3 * found[2048] and found[100] < 4 * found[2048], found
