"""Block-State Transformer (Fathi et al., 2306.09539): attention within blocks of tokens, and to what an SSM keeps of
everything before."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from ops import attention
from ops import segments as seg
from zoo.block import Block, Out, enter, leave
from zoo.layers.checks import integer
from zoo.layers.heads import choose_heads
from zoo.layers.linear import Linear
from zoo.layers.position import ALiBi
from zoo.layers.position import position as make_position
from zoo.layers.spelling import nearest
from zoo.ssm.bst_context import BlockEnds, Places, Streams, system, take
from zoo.ssm.lti import DiagonalLTI, LTIState

MODES = ("sh", "mh", "mf")
SSM: Mapping[str, Any] = {"kind": "s4d", "state_size": 16}
ROTARY: Mapping[str, Any] = {"kind": "rotary"}


class BSTState(NamedTuple):
    """Constant size: the last block - 1 tokens' keys and values, the SSM's state, and with "mf" a block's context."""

    k: Float[Tensor, "batch block_1 sets_heads d"]  # oldest first; the last position mod block are the block's
    v: Float[Tensor, "batch block_1 sets_heads d"]  # heads of the tokens, then with "sh" and "mh" of their contexts
    context: Float[Tensor, "batch states two heads d"]  # keys and values for the block of the next token
    ssm: LTIState
    position: Int[Tensor, " batch"]  # tokens so far of the document
    segment: Int[Tensor, " batch"]


class BST(Block):
    """Block-State Transformer: attention within a block of tokens, and to context states of an SSM (2306.09539).

        y_t = W_o [Attn(q_t; k_s, v_s of the block's s <= t) ; Attn(q'_t; K, V of the block's context states)]

    Softmax attention in `heads` heads for each of the two, side by side (section 3.2: the cell of Block-Recurrent
    Transformers, 2203.07852, without its recurrence: queries of its own for the contexts, their keys and values by
    another projection, both results through one linear map). Blocks of `block` tokens are counted from a document's
    first; no token sees another block's tokens, as in the paper's appendix, where blocks are mapped independently.

    Contexts, by `mode` (section 3.3 and appendix; `Streams`, `BlockEnds`):
        "sh", single-head: the outputs of one SSM at the block's own tokens, under a causal mask; all heads read them.
        "mh", multi-head: the same, but each head reads the outputs of filters of its own.
        "mf", multi-filter: the outputs of `states` SSMs at the last token of the block before, all visible to all
            tokens of the block, told apart by learned context IDs; a document's first block has learned ones.
    So a context holds nothing of tokens behind the one that reads it: an output y_s sums tokens up to s, s <= t, and
    "mf" ends before the block begins.

    A mixer: the paper's layer is norm, this and a residual, then a feed-forward block with its own, which a model
    already gives to each block of its list. So nothing is gained by owning them, and any feed-forward will do.

    Args:
        width: features of x.
        mode: "sh", "mh" or "mf".
        block: tokens of a block (the paper's window), from 2.
        heads: of both attentions; must divide width. None: as many as make heads of about 64.
        states: context states of a block, for "mf" alone.
        ssm: {"kind": "s4d" or "dss", and its options}, or a DiagonalLTI of width · (1, heads or states) channels.
        position: {"kind": "rotary", ...} or {"kind": "alibi"} for the attention within blocks; None: none. Contexts
            have none: an SSM's outputs know where they stand.

    State: `BSTState`, of constant size.

    Cost (T tokens, D = width, b bytes a number; F = 1 in "sh", heads in "mh", states in "mf"; N = the SSM's modes):
        train time: O(T D^2 + T block D) and for contexts O(F D T log T + F D N T), "mf" O(F D N T + F D^2 T / block)
        train memory: O(T D) in "sh", O(T D F) in "mh", O(T D (1 + F N / 64)) in "mf"; never T^2
        prefill: O(T D^2 + T block D) and the contexts' as above
        decode: O(D^2 + block D + F D N) a token, in "mf" O(F D^2) more at a block's end
        state bytes: 2*(block - 1)*sets*D*b + 2*states*D*b + 2*D*filters*contexts.lti.n*(8 if wide else max(4, b)) + 24
    """

    def __init__(
        self,
        width: int,
        mode: str = "sh",
        block: int = 512,
        heads: int | None = None,
        states: int = 32,
        ssm: Mapping[str, Any] | DiagonalLTI = SSM,
        position: Mapping[str, Any] | None = ROTARY,
    ):
        super().__init__(width)
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown{nearest(str(mode), MODES)}; choose from {', '.join(MODES)}")
        self.mode, self.block = mode, integer("block", block, 2)
        self.heads = choose_heads(width, heads)
        self.states = integer("states", states) if mode == "mf" else 0
        self.filters = {"sh": 1, "mh": self.heads, "mf": self.states}[mode]
        self.sets = 1 if mode == "mf" else 2  # of heads, each with a key and a value a token
        self.position = make_position(position, self.heads, width // self.heads)
        lti = system(ssm, width * self.filters)
        self.wide = lti.state_dtype(torch.float32) == torch.float64
        self.qkv = Linear(width, 4 * width, bias=False)  # q, q' to the contexts, k, v
        self.contexts = (
            BlockEnds(width, self.heads, self.filters, lti, block)
            if mode == "mf"
            else Streams(width, self.heads, self.filters, lti)
        )
        self.out = Linear(2 * width, width, bias=False)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> BSTState:
        device = self.out.weight.device if device is None else device
        dtype = self.out.weight.dtype if dtype is None else dtype
        d = self.width // self.heads
        k, v = (
            torch.zeros(batch, self.block - 1, self.sets * self.heads, d, device=device, dtype=dtype) for _ in range(2)
        )
        context = torch.zeros(batch, self.states, 2, self.heads, d, device=device, dtype=dtype)
        ssm = self.contexts.lti.init_state(batch, device=device, dtype=dtype)
        position, segment = (torch.zeros(batch, device=device, dtype=torch.long) for _ in range(2))
        return BSTState(k, v, context, ssm, position, segment)

    def flops_per_token(self, context: int) -> int:
        """Projections, the SSM's step, and what a token sees; a block's contexts are spread over its tokens."""
        near = context % self.block + 1
        pairs = 4 * self.width * (near * self.sets + self.states)
        ends = self.states / self.block if self.mode == "mf" else 1
        project = int(4 * self.width**2 * ends)
        return 2 * (self.qkv.weight.numel() + self.out.weight.numel()) + pairs + project + self._lti.flops_per_token()

    @property
    def _lti(self) -> DiagonalLTI:
        return cast(DiagonalLTI, self.contexts.lti)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: BSTState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        carried, order, rows = state, None, segments
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0)
            if state is not None:
                fresh = self.init_state(len(x), device=x.device, dtype=state.k.dtype)
                carried = enter(state, fresh, segments)
            if x.shape[1] > 1:
                order = (segments == 0).long().argsort(dim=1, stable=True)
                x, rows = take(x, order), take(segments, order)
        places = self._locate(x, rows, None if carried is None else carried.position)
        q, cross, k, v = self.qkv(x).unflatten(-1, (4, self.heads, -1)).unbind(2)
        if self.position is not None and not isinstance(self.position, ALiBi):
            cos, sin = self.position.angles(places.place % self.block, x.dtype)
            q, k = self.position.turn(q, cos, sin), self.position.turn(k, cos, sin)
        context = ssm = None
        if isinstance(self.contexts, Streams):
            kv, ssm = self.contexts(x, None if carried is None else carried.ssm, rows)
            k, v = torch.cat([k, kv[:, :, 0]], 2), torch.cat([v, kv[:, :, 1]], 2)
            y = self._within(torch.cat([q, cross], 2), k, v, places, carried, rows is not None)
        else:
            given = None if carried is None else (carried.context, carried.ssm)
            read, context, ssm = self.contexts(cross, x, given, places, rows)
            y = self._within(q, k, v, places, carried, rows is not None)
            y = torch.cat([y, torch.where(places.valid[..., None, None], read, 0)], 2)
        y = self.out(y.flatten(2))
        if order is not None:
            y = take(y, order.argsort(1))
        if carried is None or state is None:
            return Out(y, None, {})
        assert ssm is not None
        return Out(y, self._after(carried, k, v, context, ssm, places, segments), {})

    def _locate(self, x: Tensor, rows: Tensor | None, position: Tensor | None) -> Places:
        """Where the tokens of compact rows stand, the first document going on from `position`."""
        batch, time, _ = x.shape
        index = torch.arange(time, device=x.device).expand(batch, time)
        before = index.new_zeros(batch) if position is None else position
        if rows is None:
            valid, run, place = (
                torch.ones_like(index, dtype=torch.bool),
                torch.ones_like(index),
                before[:, None] + index,
            )
        else:
            found = seg.runs(rows)
            valid, run = found.valid, found.run
            begin = torch.where(found.start, index, 0).cummax(1).values
            place = index - begin + torch.where(run == 1, before[:, None], 0)
        return Places(valid, place, run, (valid & (place % self.block == 0)).long().cumsum(1), before)

    def _within(
        self, q: Tensor, k: Tensor, v: Tensor, places: Places, state: BSTState | None, packed: bool
    ) -> Float[Tensor, "batch time heads d"]:
        """Attention of each token to its block up to itself; 0 at padding. O(time · block)."""
        slopes = None
        if isinstance(self.position, ALiBi):
            slopes = self.position.slopes(q.device, q.dtype)
            slopes = pad(slopes, (0, q.shape[2] - self.heads))  # contexts know their places
        if state is None and not packed:
            return self._whole_blocks(q, k, v, slopes)
        ids = own = torch.where(places.valid, places.block + 1, 0)
        if state is not None:
            k, v = torch.cat([state.k.to(k.dtype), k], 1), torch.cat([state.v.to(v.dtype), v], 1)
            back = torch.arange(self.block - 1, 0, -1, device=q.device)
            ids = torch.cat([(back <= (places.before % self.block)[:, None]).long(), ids], 1)
        return attention(
            q, k, v, window=self.block, slopes=slopes, q_segments=own, k_segments=ids, clean=True
        )  # fmt: skip

    def _whole_blocks(self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None) -> Tensor:
        """Sequences from their first token on: a row a block, and no mask but the causal one."""
        batch, time = q.shape[:2]
        if time <= self.block:
            return attention(q, k, v, slopes=slopes)
        rows = [pad(x, (0, 0, 0, 0, 0, -time % self.block)).unflatten(1, (-1, self.block)) for x in (q, k, v)]
        y = attention(*(x.flatten(0, 1) for x in rows), slopes=slopes)
        return y.unflatten(0, (batch, -1)).flatten(1, 2)[:, :time]

    def _after(
        self,
        state: BSTState,
        k: Tensor,
        v: Tensor,
        context: Tensor | None,
        ssm: LTIState,
        places: Places,
        segments: Tensor | None,
    ) -> BSTState:
        number = places.valid.sum(1)
        last = (number - 1).clamp_min(0)[:, None]
        kept = number[:, None] + torch.arange(self.block - 1, device=k.device)
        k, v = (
            take(torch.cat([old, new.to(old.dtype)], 1), kept) for old, new in ((state.k, k), (state.v, v))
        )  # fmt: skip
        position = torch.where(number > 0, take(places.place, last)[:, 0] + 1, state.position)
        context = state.context if context is None else context
        return BSTState(k, v, context, ssm, position, leave(state.segment, segments))
