"""Norm and gate: a program takes ROWS rows at a time. Row i at k of the grid's second axis is token i // INNER and its
group i % INNER + k: either all groups share a weight (INNER = groups, one k), or each has its own (INNER = 1)."""

# pyright: reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def _open(gate, SILU: tl.constexpr):
    """a(gate) and its slope."""
    s = tl.sigmoid(gate)
    if SILU:
        return gate * s, s * (1 + gate * (1 - s))
    return s, s * (1 - s)


@triton.jit
def _mean(tile, width):
    return tl.sum(tile, 1) / width


@triton.jit
def forward(
    x,
    gate,
    weight,
    bias,
    y,
    means,
    rates,
    lines,
    groups,
    width,
    along,
    across,
    eps,
    INNER: tl.constexpr,
    SILU: tl.constexpr,
    FIRST: tl.constexpr,
    CENTER: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    own = tl.program_id(1)
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    token, group = line // INNER, line % INNER + own
    lanes = tl.arange(0, BLOCK)
    inside = (line < lines)[:, None] & (lanes < width)[None, :]
    place = (group * width)[:, None] + lanes[None, :]
    u = tl.load(x + token[:, None] * along + place, mask=inside, other=0.0).to(tl.float32)
    opened, _ = _open(tl.load(gate + token[:, None] * across + place, mask=inside, other=0.0).to(tl.float32), SILU)
    if FIRST:
        u *= opened
    row = token * groups + group
    if CENTER:
        mean = _mean(u, width)
        tl.store(means + row, mean, mask=line < lines)
        u = tl.where(inside, u - mean[:, None], 0.0)
    rate = 1 / tl.sqrt(_mean(u * u, width) + eps)
    tl.store(rates + row, rate, mask=line < lines)
    u *= rate[:, None]
    if WEIGHT:
        u *= tl.load(weight + own * width + lanes, mask=lanes < width, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        u += tl.load(bias + own * width + lanes, mask=lanes < width, other=0.0).to(tl.float32)[None, :]
    if not FIRST:
        u *= opened
    tl.store(y + row[:, None] * width + lanes[None, :], u.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    dy,
    x,
    gate,
    weight,
    bias,
    means,
    rates,
    dx,
    dgate,
    sums,
    lines,
    groups,
    width,
    down,
    along,
    across,
    INNER: tl.constexpr,
    SILU: tl.constexpr,
    FIRST: tl.constexpr,
    CENTER: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Also this program's sums for weight and bias into its [2, width] of `sums` [programs, 2, k, width]."""
    program, own = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    there = lanes < width
    w = tl.full([BLOCK], 1.0, tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    if WEIGHT:
        w = tl.load(weight + own * width + lanes, mask=there, other=0.0).to(tl.float32)
    if BIAS:
        b = tl.load(bias + own * width + lanes, mask=there, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(program * ROWS, lines, tl.num_programs(0) * ROWS):
        line = start + tl.arange(0, ROWS).to(tl.int64)
        token, group = line // INNER, line % INNER + own
        valid = line < lines
        inside = valid[:, None] & there[None, :]
        place = (group * width)[:, None] + lanes[None, :]
        slopes = tl.load(dy + token[:, None] * down + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + token[:, None] * along + place, mask=inside, other=0.0).to(tl.float32)
        door = tl.load(gate + token[:, None] * across + place, mask=inside, other=0.0).to(tl.float32)
        opened, bent = _open(door, SILU)
        row = token * groups + group
        rate = tl.load(rates + row, mask=valid, other=0.0)[:, None]
        normed = value * opened if FIRST else value
        if CENTER:
            normed -= tl.load(means + row, mask=valid, other=0.0)[:, None]
        normed = tl.where(inside, normed * rate, 0.0)
        after = slopes if FIRST else slopes * opened  # the slope at the norm
        pulled = after * w[None, :]
        inner = pulled - normed * _mean(pulled * normed, width)[:, None]
        if CENTER:
            inner -= _mean(pulled, width)[:, None]
        inner *= rate
        if FIRST:
            dvalue, ddoor = inner * opened, inner * value * bent
        else:
            dvalue, ddoor = inner, slopes * (normed * w[None, :] + b[None, :]) * bent
        onto = row[:, None] * width + lanes[None, :]
        tl.store(dx + onto, dvalue.to(dx.dtype.element_ty), mask=inside)
        tl.store(dgate + onto, ddoor.to(dgate.dtype.element_ty), mask=inside)
        dweight += tl.sum(after * normed, 0)
        dbias += tl.sum(after, 0)
    kept = tl.num_programs(1)
    into = sums + (program * 2 * kept + own) * width + lanes
    if WEIGHT:
        tl.store(into, dweight, mask=there)
    if BIAS:
        tl.store(into + kept * width, dbias, mask=there)
