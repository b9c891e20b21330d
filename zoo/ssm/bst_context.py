"""Context states of the Block-State Transformer (Fathi et al., 2306.09539, section 3.3 and appendix): what an SSM tells
a block of tokens about everything before it, as keys and values."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Complex, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import pad

from ops import attention, linear_recurrence
from ops.precision import full_precision
from zoo.block import leave, tag
from zoo.layers.linear import Linear
from zoo.layers.norm import RMSNorm
from zoo.layers.spelling import nearest
from zoo.ssm.dss import DSSSystem
from zoo.ssm.lti import CHUNK, DiagonalLTI, LTIState, Modes, powers
from zoo.ssm.s4d import S4DSystem

SYSTEMS: dict[str, type[DiagonalLTI]] = {"s4d": S4DSystem, "dss": DSSSystem}


class Places(NamedTuple):
    """Where the tokens of a call stand. Rows are compact: a row's tokens, then its padding."""

    valid: Bool[Tensor, "batch time"]
    place: Int[Tensor, "batch time"]  # in the document; means nothing at padding
    run: Int[Tensor, "batch time"]  # 1, 2, ... the documents of the row; 0 at padding
    block: Int[Tensor, "batch time"]  # 0 is the block that the state is in, 1, 2, ... those that begin in the call
    before: Int[Tensor, " batch"]  # tokens of the first document before the call


def system(given: Mapping[str, Any] | DiagonalLTI, channels: int) -> DiagonalLTI:
    """The state space model of plain data such as {"kind": "s4d", "state_size": 16}, or a given one of this size."""
    if isinstance(given, DiagonalLTI):
        if (given.channels, given.outputs) != (channels, 1):
            raise ValueError(
                f"ssm has channels={given.channels} of outputs={given.outputs}, but this mode needs {channels} of 1: "
                "width · (1 with mode 'sh', heads with 'mh', states with 'mf')"
            )
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"ssm={given!r} must be a mapping such as {{'kind': 's4d'}}, or a DiagonalLTI")
    options = dict(given)
    kind = options.pop("kind", None)
    if kind not in SYSTEMS:
        raise ValueError(f"ssm kind {kind!r} is unknown{nearest(str(kind), SYSTEMS)}; choose from {', '.join(SYSTEMS)}")
    known = [name for name in inspect.signature(SYSTEMS[kind]).parameters if name != "channels"]
    for name in options:
        if name not in known:
            raise ValueError(
                f"ssm {kind!r} has no option {name!r}{nearest(name, known)}. Its options: {', '.join(known)}"
            )
    return SYSTEMS[kind](channels, **options)


class Streams(nn.Module):
    """Single-head ("sh") and multi-head ("mh") contexts: the SSM's outputs at the block's own tokens.

    K, V = W norm(y) with y = SSM(u), one filter a feature, for all heads; with `filters` = heads a head h has filters
    of its own, K_h, V_h = W_h norm(y_h) (the norm is that of Block-Recurrent Transformers' states, 2203.07852). Token t
    may see the states of its block up to its own: y_t holds nothing later than t. Memory of "mh": heads · width numbers
    a token.
    """

    def __init__(self, width: int, heads: int, filters: int, lti: DiagonalLTI):
        super().__init__()
        self.heads, self.filters, self.lti = heads, filters, lti
        self.norm = RMSNorm(width)
        groups = filters  # of heads that read one stream: all, or each its own
        self.weight = nn.Parameter(torch.empty(groups, width, 2 * width // groups))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def forward(
        self,
        u: Float[Tensor, "batch time width"],
        state: LTIState | None,
        segments: Int[Tensor, "batch time"] | None,
    ) -> tuple[Float[Tensor, "batch time two heads d"], LTIState | None]:
        """Keys and values of the context states that the tokens add, and the SSM's state."""
        y, state = self.lti(spread(u, self.filters), state, segments)
        y = self.norm(rearrange(y, "b t (d f) -> b t f d", f=self.filters))
        made = einsum(y, self.weight.to(y.dtype), "b t f d, f d e -> b t f e")
        heads = self.heads // self.filters
        return rearrange(made, "b t f (two h d) -> b t two (f h) d", two=2, h=heads), state


class BlockEnds(nn.Module):
    """Multi-filter contexts ("mf"): for each of `filters` SSMs a feature its output at the end of the block before.

    K, V = W (norm(c) + ids), c [filters, width] the outputs, `ids` the learned context IDs that tell the states apart
    (they have no order in time). A document's first block has learned ones in place of c.

    Outputs are made at blocks' ends alone: the SSMs' states are summed a block at a time and carried on from block to
    block by a linear recurrence, so there is nothing of size time · filters · width.
    """

    def __init__(self, width: int, heads: int, filters: int, lti: DiagonalLTI, block: int):
        super().__init__()
        self.heads, self.filters, self.lti, self.block = heads, filters, lti, block
        self.norm = RMSNorm(width)
        self.kv = Linear(width, 2 * width, bias=False)
        self.ids = nn.Parameter(torch.randn(filters, width))
        self.start = nn.Parameter(0.1 * torch.randn(filters, width))
        tag(self, "ids", weight_decay=False)
        tag(self, "start", weight_decay=False)

    def project(self, outputs: Float[Tensor, "... filters width"]) -> Float[Tensor, "... filters two heads d"]:
        made = self.kv(self.norm(outputs) + self.ids.to(outputs.dtype))
        return made.unflatten(-1, (2, self.heads, -1))

    def forward(
        self,
        q: Float[Tensor, "batch time heads d"],
        u: Float[Tensor, "batch time width"],
        state: tuple[Float[Tensor, "batch filters two heads d"], LTIState] | None,
        places: Places,
        segments: Int[Tensor, "batch time"] | None,
    ) -> tuple[Float[Tensor, "batch time heads d"], Tensor | None, LTIState | None]:
        """What the queries read (anything at padding); the context of the next token's block and the SSMs' state."""
        if u.shape[1] == 1:
            return self._one(q, u, state, places, segments)
        return self._many(q, u, state, places, segments)

    def _one(
        self, q: Tensor, u: Tensor, state: tuple[Tensor, LTIState] | None, places: Places, segments: Tensor | None
    ) -> tuple[Tensor, Tensor | None, LTIState | None]:
        """One token a row. Contexts are projected only in steps where some row's block begins or ends."""
        start = self.start.to(u.dtype)
        if state is None:
            kv = self.project(start).expand(len(q), -1, -1, -1, -1)
            return attention(q, kv[:, :, 0], kv[:, :, 1], causal=False), None, None
        kv, ssm = state
        begins, ends = places.place == 0, (places.place + 1) % self.block == 0
        if _some(begins):
            kv = _choose(places.valid & begins, self.project(start)[None].to(kv.dtype), kv)
        used = kv.to(q.dtype)
        y, ssm = self.lti(spread(u, self.filters), ssm, segments)
        if _some(ends):
            kv = _choose(places.valid & ends, self.project(self._outputs(y[:, 0])).to(kv.dtype), kv)
        return attention(q, used[:, :, 0], used[:, :, 1], causal=False), kv, ssm

    def _many(
        self, q: Tensor, u: Tensor, state: tuple[Tensor, LTIState] | None, places: Places, segments: Tensor | None
    ) -> tuple[Tensor, Tensor | None, LTIState | None]:
        """Any number of tokens, in rows of blocks. Packed documents ask the host for the number of blocks."""
        begin = 0 if state is not None else 1  # without a state nothing is in block 0
        block = places.block - begin
        count = -(-u.shape[1] // self.block) + 1 - begin
        if segments is not None:
            count = max(1, int(block.amax()) + 1)
        at = torch.where(places.valid, block * self.block + places.place % self.block, count * self.block)
        blocks = _lay(u, at, count * self.block).unflatten(1, (count, self.block))
        with full_precision(u.device):
            modes = self.lti.discrete()
            h, outputs = self._ends(modes, blocks, state, places, block, segments is not None)
        first = _lay((places.place < self.block)[..., None].long(), at, count * self.block)
        first = first.unflatten(1, (count, self.block)).amax((2, 3)) != 0  # blocks that a document begins with
        before = torch.cat([torch.zeros_like(outputs[:, :1]), outputs[:, :-1]], 1)
        kv = self.project(torch.where(first[..., None, None], self.start.to(u.dtype), before))
        if state is not None:
            # The state's context is for the next token's block: the one begun, or a new one if that was full.
            given = state[0].to(kv.dtype)
            new = (places.before > 0) & (places.before % self.block == 0)
            new = (torch.arange(count, device=u.device) == 1) & new[:, None] & ~first
            new = new | (torch.arange(count, device=u.device) == 0)
            kv = _choose(new, given[:, None], kv)
        rows = _lay(q.flatten(2), at, count * self.block).unflatten(1, (count, self.block))
        rows = rows.flatten(0, 1).unflatten(-1, q.shape[2:])
        keys = kv.flatten(0, 1)
        y = attention(rows, keys[:, :, 0], keys[:, :, 1], causal=False)
        y = take(y.unflatten(0, (len(q), count)).flatten(1, 2), at.clamp_max(count * self.block - 1))
        if state is None:
            return y, None, None
        with full_precision(u.device):
            after = self._after(modes, u, h, state[1], places, first)
        last = (places.valid.sum(1) - 1).clamp_min(0)[:, None]
        current = take(block, last).clamp_min(0)
        full = (take(places.place, last) + 1) % self.block == 0
        context = _choose(full, self.project(take(outputs, current)), take(kv, current))[:, 0]
        context = _choose(places.valid.any(1), context.to(state[0].dtype), state[0])
        return y, context, LTIState(after, leave(state[1].segment, segments))

    def _ends(
        self,
        modes: Modes,
        blocks: Float[Tensor, "batch count block width"],
        state: tuple[Tensor, LTIState] | None,
        places: Places,
        block: Int[Tensor, "batch time"],
        packed: bool,
    ) -> tuple[Complex[Tensor, "batch count channels n"], Float[Tensor, "batch count filters width"]]:
        """The SSMs' states and outputs at each block's end. They mean nothing where the call does not fill the block:
        none is read there."""
        batch, count = blocks.shape[:2]
        sums = absorb(modes, blocks.flatten(0, 1), self.filters).unflatten(0, (batch, count))
        if state is not None:
            h = self.lti.unpack(state[1].h)
            carried = self.lti.advance(modes, h, -places.before % self.block, self.block)
            sums = torch.cat([(sums[:, 0] + carried)[:, None], sums[:, 1:]], 1)
        documents = None
        if packed:
            index = torch.where(places.valid, block, count)
            documents = block.new_zeros(batch, count + 1).scatter(1, index, places.run)[:, :count]
            if state is not None:
                documents = torch.cat([torch.ones_like(documents[:, :1]), documents[:, 1:]], 1)
        whole = powers(modes.log_a, torch.full((1,), self.block, device=blocks.device))[..., 0]
        h, _ = linear_recurrence(sums.flatten(2), whole.flatten(), segments=documents)
        h = h.unflatten(2, whole.shape)
        y = self.lti.read(modes, h)
        if self.lti.D is not None:
            y = y + self.lti.D.to(y.dtype) * spread(blocks[:, :, -1], self.filters).to(y.dtype)
        return h, self._outputs(y.to(blocks.dtype))

    def _after(
        self,
        modes: Modes,
        u: Float[Tensor, "batch time width"],
        h: Complex[Tensor, "batch count channels n"],
        state: LTIState,
        places: Places,
        first: Bool[Tensor, "batch count"],
    ) -> Tensor:
        """The SSMs' state after each row's last token, from that at its block's begin and the tokens since."""
        given = self.lti.unpack(state.h)
        number = places.valid.sum(1)
        current = take(places.block, (number - 1).clamp_min(0)[:, None])
        index = number[:, None] - self.block + torch.arange(self.block, device=u.device)
        own = (index >= 0) & (take(places.block, index.clamp_min(0)) == current) & (number > 0)[:, None]
        tokens = torch.where(own[..., None], take(u, index.clamp_min(0)), 0)
        before = torch.cat([given[:, None].to(h.dtype), h[:, :-1]], 1)
        fresh = (current > 0) & first.gather(1, current)
        begin = torch.where(fresh[..., None], 0, take(before, current)[:, 0])
        after = self.lti.advance(modes, begin, own.sum(1), self.block) + absorb(modes, tokens, self.filters)
        return _choose(number > 0, self.lti.pack(after).to(state.h.dtype), state.h)

    def _outputs(self, y: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows filters width"]:
        return y.unflatten(-1, (-1, self.filters)).transpose(-1, -2)


def absorb(
    modes: Modes, u: Float[Tensor, "rows time width"], filters: int
) -> Complex[Tensor, "rows channels n"]:  # fmt: skip
    """`DiagonalLTI.absorb` of width · filters channels for the inputs of width: those are not repeated."""
    chunk = min(CHUNK, u.shape[1])
    later = powers(modes.log_a, torch.arange(chunk - 1, -1, -1, device=u.device))
    pairs = rearrange(torch.view_as_real(later), "(d f) n i two -> d f n i two", f=filters)
    tokens = rearrange(pad(u, (0, 0, -u.shape[1] % chunk, 0)), "b (k i) d -> b k i d", i=chunk)
    sums = einsum(tokens.to(pairs.dtype), pairs, "b k i d, d f n i two -> b k d f n two")
    sums = torch.view_as_complex(sums.contiguous()).flatten(2, 3)
    if sums.shape[1] > 1:
        later = powers(chunk * modes.log_a, torch.arange(sums.shape[1] - 1, -1, -1, device=u.device))
        sums = sums * rearrange(later, "c n k -> k c n")
    total = sums.sum(1)
    return total if modes.drive is None else modes.drive * total


def spread(u: Float[Tensor, "*rows width"], filters: int) -> Float[Tensor, "*rows channels"]:
    """Each feature as often as it has filters, side by side."""
    return u if filters == 1 else u.repeat_interleave(filters, -1)


def take(x: Shaped[Tensor, "batch time ..."], index: Int[Tensor, "batch taken"]) -> Shaped[Tensor, "batch taken ..."]:
    """x[b, index[b]]"""
    shape = (*index.shape, *[1] * (x.ndim - 2))
    return x.gather(1, index.reshape(shape).expand(-1, -1, *x.shape[2:]))


def _lay(
    x: Shaped[Tensor, "batch time features"], at: Int[Tensor, "batch time"], size: int
) -> Shaped[Tensor, "batch size features"]:
    """x at new places, zeros elsewhere; what goes to the place `size` is dropped."""
    empty = x.new_zeros(len(x), size + 1, x.shape[-1])
    return empty.scatter(1, at[..., None].expand_as(x), x)[:, :size]


def _choose(where: Bool[Tensor, "..."], yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(where.reshape(*where.shape, *[1] * (no.ndim - where.ndim)), yes, no)


def _some(where: Bool[Tensor, "..."]) -> bool:
    """Whether any is true. A graph cannot ask: there it is always taken for true."""
    return torch.compiler.is_compiling() or bool(where.any())
