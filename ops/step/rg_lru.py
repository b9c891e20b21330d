"""One token of Griffin's recurrent block."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ops.linear.kernels import OPTIONS, product
from ops.native_array import array
from ops.step import Around
from ops.step.norm import finish, normed, unpack
from ops.step.parts import EXACT, NOTHING, add, convolve, gelu_tanh, plus, sigmoid, softplus


def rg_lru(
    x: Tensor,
    conv: Tensor,
    h: Tensor,
    first: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    gates: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    Lambda: Tensor,
    c: float,
    around: Around,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [batch, 1, width], conv [batch, taps - 1, inner], h [batch, inner] -> y and both after the token.

    first [batch]: whether the token is its document's first. weights, biases: of y_proj, x_proj, the convolution and
    out_proj; gates: weight [heads, in, out] and bias [heads, out] of input and decay. The caller has asked
    `ops.step.takes`.
    """
    y = torch.empty(x.shape[0], 1, weights[3].shape[0])
    conv_after, h_after = torch.empty(conv.shape), torch.empty(h.shape)
    _run(
        array(x.contiguous())[:, 0],
        unpack(around),
        (array(conv.contiguous()), array(h.contiguous())),
        (array(conv_after), array(h_after)),
        array(first.contiguous()),
        tuple(array(each) for each in weights),
        tuple(NOTHING if each is None else array(each) for each in biases),
        tuple(array(each) for each in gates[0] + gates[1]),
        array(Lambda),
        np.float32(c),
        y.numpy()[:, 0],
    )
    return y, conv_after, h_after


@njit(**OPTIONS)
def _blocks(x, weight, bias, y):
    """A map in blocks, of one row: weight [heads, in, out]."""
    heads, size, _ = weight.shape
    for head in range(heads):
        part = y[head * size : (head + 1) * size]
        part[:] = bias[head]
        for i in range(size):
            add(part, weight[head, i], x[head * size + i])


@njit(**EXACT)
def _recur(u, first, input_gate, decay_gate, Lambda, c, before, after):
    for i in range(len(u)):
        log_a = -c * softplus(Lambda[i]) * sigmoid(decay_gate[i])
        scale = np.float32(1) if first else np.float32(np.sqrt(-np.expm1(np.float32(2) * log_a)))
        after[i] = np.float32(np.exp(log_a)) * before[i] + scale * sigmoid(input_gate[i]) * u[i]


@njit(**OPTIONS)
def _run(x, around, before, after, first, weights, biases, gates, Lambda, c, y):
    inner = len(Lambda)
    x_normed = normed(x, around)
    branch, u, mixed = (
        np.empty((len(x), inner), np.float32),
        np.empty((len(x), inner), np.float32),
        np.empty((len(x), inner), np.float32),
    )
    input_gate, decay_gate = np.empty(inner, np.float32), np.empty(inner, np.float32)
    product(0, inner, weights[0], x_normed, branch)
    plus(branch, biases[0])
    product(0, inner, weights[1], x_normed, u)
    plus(u, biases[1])
    for row in range(len(x)):
        convolve(u[row], weights[2], biases[2], before[0][row], after[0][row], mixed[row])
        _blocks(mixed[row], gates[0], gates[1], input_gate)
        _blocks(mixed[row], gates[2], gates[3], decay_gate)
        _recur(mixed[row], first[row], input_gate, decay_gate, Lambda, c, before[1][row], after[1][row])
        gelu_tanh(branch[row])
        for i in range(inner):
            branch[row, i] *= after[1][row, i]
    product(0, len(weights[3]), weights[3], branch, y)
    finish(x, y, biases[3], around)
