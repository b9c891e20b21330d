"""Funnel-Transformer: an encoder that halves the sequence block by block, and a decoder back to every token."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ops import segments as seg
from zoo.attention.relative import Relation, RelativeAttention, distances, sinusoids
from zoo.block import Block, Out, State, each_document
from zoo.layers.checks import integer, number
from zoo.layers.ffn import MLP
from zoo.layers.heads import choose_heads
from zoo.layers.norm import LayerNorm
from zoo.layers.spelling import nearest

BLOCKS: Sequence[int | str] = [2, 2, 2]
POOLING: Mapping[str, Any] = {"kind": "mean", "q_only": True, "cls": None}
POSITION: Mapping[str, Any] = {"kind": "relative", "base": 10000.0}
EPS = 1e-9  # of the published models' layer norms


class Tokens(NamedTuple):
    """One document a row, padding on the right only."""

    x: Float[Tensor, "rows time width"]
    valid: Bool[Tensor, "rows time"] | None  # None: all
    types: Int[Tensor, "rows time"] | None


class FunnelLayer(nn.Module):
    """Attention and feed-forward part, each with its residual and a norm after it: LN(h + f(h)).

    Where queries are pooled the residual is theirs (2006.03236, sec. 2.2)."""

    def __init__(self, width: int, heads: int, hidden: int | None, activation: str, positions: bool, types: bool):
        super().__init__()
        self.attention = RelativeAttention(width, heads, positions, types)
        self.attention_norm = LayerNorm(width, eps=EPS)
        self.ffn = MLP(width, hidden, activation, bias=True)
        self.ffn_norm = LayerNorm(width, eps=EPS)

    def forward(
        self,
        queries: Float[Tensor, "rows queries width"],
        keys: Float[Tensor, "rows keys width"],
        relation: Relation,
    ) -> Float[Tensor, "rows queries width"]:
        x = self.attention_norm(queries + self.attention(queries, keys, relation))
        return self.ffn_norm(x + self.ffn(x).y)

    def flops(self, queries: int, keys: int, step: int) -> int:
        return self.attention.flops(queries, keys, step) + self.ffn.flops_per_token(0) * queries


class Funnel(Block):
    """Funnel-Transformer: encoder blocks that halve the sequence by pooling, and a decoder to full length.

    Each block after the first begins with an attention layer whose queries are pooled in pairs, while keys and values
    are not (Dai et al., 2006.03236, sec. 2.2), so block i works on ceil(T / 2^i) positions. For token-level output the
    last block's positions are repeated 2^(blocks-1) times, the first block's output is added and the decoder's layers
    follow (sec. 2.3). Attention is relative: `RelativeAttention`. Layers are post-norm, so what comes in should be
    normed (`embedding_norm: true` in a model, as the published models have it).

    Documents are pooled each by itself: pairs are of a document's own tokens, an odd one out is pooled alone, and
    padding, wherever it stands, is in no pair. `encode` gives the short sequence, for classification.

    Args:
        width: features of x; even.
        blocks: layers of each block; "3x2" is three layers of which each runs twice in a row with the same weights.
        decoder_layers: layers at full length behind the upsampling; may be 0.
        heads: None: as many as make heads of about 64.
        hidden: inner width of the feed-forward parts; None: 4 width.
        activation: of the feed-forward parts (zoo.layers.ffn).
        pooling: {"kind": "mean" or "max", "q_only": whether keys and values of a block's first layer stay unpooled,
            "cls": None, "separate" or "truncate"}. With "separate" the first token of each document is a [CLS]: it is
            never pooled with others, and sees and is seen without distance or type.
            "truncate" also leaves a document's last token out of each pooling, so that a length of 2^n stays one.
        position: {"kind": "relative", "base": 10000.0}, or None for no positions.
        token_types: the third term of the attention: whether two tokens are of one type (first or second sentence).

    Cost (T tokens, D = width, b bytes a number):
        train time: O(t D^2 + t^2 D) for each layer, t = T in the first block and the decoder, T / 2^i in block i
        train memory: O(t D + heads t^2) for each layer
        prefill: O(t D^2 + t^2 D) for each layer
        decode: none, it is bidirectional
        state bytes: 0
    """

    causal = False
    residual = False

    def __init__(
        self,
        width: int,
        blocks: Sequence[int | str] = BLOCKS,
        decoder_layers: int = 2,
        heads: int | None = None,
        hidden: int | None = None,
        activation: str = "gelu_tanh",
        pooling: Mapping[str, Any] = POOLING,
        position: Mapping[str, Any] | None = POSITION,
        token_types: bool = False,
    ):
        super().__init__(width)
        if width % 2:
            raise ValueError(f"width={width} must be even: a distance is width/2 sines and cosines; try {width + 1}")
        self.heads = choose_heads(width, heads)
        sizes = _sizes(blocks)
        self.pooling, self.q_only, self.cls = _pooling(pooling)
        self.base = _base(position)
        self.token_types = bool(token_types)

        def layers(count: int) -> nn.ModuleList:
            options = (self.heads, hidden, activation, self.base is not None, self.token_types)
            return nn.ModuleList(FunnelLayer(width, *options) for _ in range(count))

        self.blocks = nn.ModuleList(layers(count) for count, _ in sizes)
        self.repeats = tuple(repeats for _, repeats in sizes)
        self.decoder = layers(integer("decoder_layers", decoder_layers, 0))

    def flops_per_token(self, context: int) -> int:
        """One of the `context` + 1 tokens of a sequence: a whole pass over it, divided among them, rounded up."""
        time = context + 1
        total = sum(layer.flops(time, time, 1) for layer in self._layers(self.decoder))
        now = time
        for level, (block, repeats) in enumerate(zip(self.blocks, self.repeats, strict=True)):
            keys, now = now, self._pooled_length(now) if level else now
            runs = [layer for layer in self._layers(block) for _ in range(repeats)]
            first = (now, keys, 2) if level and self.q_only else (now, now, 1)
            total += runs[0].flops(*first) + sum(layer.flops(now, now, 1) for layer in runs[1:])
        return -(-total // time)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
        types: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        """`types`, with `token_types`: ids of kinds of token, such as of the first and second sentence. A negative id
        is of one kind with every other ([CLS] in the published models); None: all are of one kind."""
        self.check(x, state, segments)
        self._check_types(x, types)
        if segments is None:
            return Out(self._whole(Tokens(x, None, self._types(x, types))), None, {})
        type_rows = None if types is None else _documents(types.double()[..., None], segments)[0][..., 0].long()

        def run(rows: Tensor, mask: Tensor) -> Tensor:
            return self._whole(Tokens(rows, mask != 0, self._types(rows, type_rows)))

        return Out(each_document(run, x, segments), None, {})

    def encode(
        self,
        x: Float[Tensor, "batch time width"],
        segments: Int[Tensor, "batch time"] | None = None,
        types: Int[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch short width"], Int[Tensor, "batch short"]]:
        """The last encoder block's output and its `segments`: documents behind one another, padding on the right.

        A document of n tokens has ceil(n / 2^(blocks-1)) positions here (with a [CLS], it and those of the other
        n - 1). For sequence classification: pool them, or take the [CLS]. `types` as in `forward`.
        """
        self.check(x, None, segments)
        self._check_types(x, types)
        if segments is None:
            short, _ = self._encode(Tokens(x, None, self._types(x, types)))
            return short.x, torch.ones(short.x.shape[:2], dtype=torch.long, device=x.device)
        type_rows = None if types is None else _documents(types.double()[..., None], segments)[0][..., 0].long()
        rows, valid = _documents(x, segments)
        if not len(rows):
            return torch.zeros_like(x[:, :1]), torch.zeros_like(segments[:, :1])
        short, _ = self._encode(Tokens(rows, valid, self._types(rows, type_rows)))
        assert short.valid is not None
        return _pack(short.x, short.valid, segments)

    # One document a row ----------------------------------------------------------------------------------------

    def _whole(self, tokens: Tokens) -> Float[Tensor, "rows time width"]:
        short, first = self._encode(tokens)
        x = first + self._upsample(short, first.shape[1])
        relation = self._relation(tokens, tokens, 0, 0)
        for layer in self._layers(self.decoder):
            x = layer(x, x, relation)
        return x

    def _encode(self, tokens: Tokens) -> tuple[Tokens, Float[Tensor, "rows time width"]]:
        """The last block's positions, and the first block's output."""
        now, first = tokens, tokens.x
        for level, (block, repeats) in enumerate(zip(self.blocks, self.repeats, strict=True)):
            queries = self._pool(now) if level else now
            keys = now if self.q_only else queries
            within = self._relation(queries, queries, level, level)
            relation = within if keys is queries else self._relation(queries, keys, level, level - 1)
            now = queries
            for index, layer in enumerate(self._layers(block)):
                for turn in range(repeats):
                    begins = index == turn == 0
                    x = layer(now.x, keys.x if begins else now.x, relation if begins else within)
                    now = now._replace(x=x)
            if level == 0:
                first = now.x
        return now, first

    def _relation(self, queries: Tokens, keys: Tokens, query_level: int, key_level: int) -> Relation:
        """Positions at level i are 2^i tokens apart; a separate [CLS] stands one such step before the first token."""
        time, step, table, same = queries.x.shape[1], 2 ** (query_level - key_level), None, None
        if self.base is not None:
            offset = 2**key_level - 2**query_level if self.cls else 0
            where = distances(time, keys.x.shape[1], step, 2**key_level, offset, keys.x.device)
            table = sinusoids(where, self.width, self.base, keys.x.dtype)
        if queries.types is not None and keys.types is not None:
            left, right = queries.types[:, :, None], keys.types[:, None]
            same = (left == right) | (left < 0) | (right < 0)
        return Relation(step, table, same, keys.valid, bool(self.cls))

    def _pool(self, tokens: Tokens) -> Tokens:
        """Pairs of tokens pooled; with a [CLS] it stays and the others are paired."""
        x, valid, types = tokens
        if self.cls == "truncate" and x.shape[1] > 2:
            if valid is not None:
                length = valid.sum(1, keepdim=True)
                kept = torch.where(length > 2, length - 1, length)
                valid = (torch.arange(x.shape[1], device=x.device) < kept)[:, :-1]
            x, types = x[:, :-1], None if types is None else types[:, :-1]
        alone = 1 if self.cls else 0
        pooled, some = pool_pairs(x[:, alone:], None if valid is None else valid[:, alone:], self.pooling)
        if types is not None:
            types = torch.cat([types[:, :alone], types[:, alone::2]], 1)
        if valid is not None and some is not None:
            valid = torch.cat([valid[:, :alone], some], 1)
        return Tokens(torch.cat([x[:, :alone], pooled], 1), valid, types)

    def _upsample(self, short: Tokens, time: int) -> Float[Tensor, "rows time width"]:
        """Each position for all the tokens it stands for; zeros where truncation left a token without one."""
        x, alone = short.x, 1 if self.cls else 0
        if short.valid is not None:
            x = torch.where(short.valid[..., None], x, 0.0)
        x = torch.cat([x[:, :alone], x[:, alone:].repeat_interleave(2 ** (len(self.blocks) - 1), 1)], 1)
        return F.pad(x, (0, 0, 0, max(0, time - x.shape[1])))[:, :time]

    def _pooled_length(self, time: int) -> int:
        alone = 1 if self.cls else 0
        rest = time - alone - (self.cls == "truncate" and time > 2)
        return alone + -(-rest // 2)

    # Token types -----------------------------------------------------------------------------------------------

    def _types(self, x: Tensor, types: Tensor | None) -> Tensor | None:
        if self.token_types and types is None:
            return torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        return types

    def _check_types(self, x: Tensor, types: Tensor | None) -> None:
        if types is None:
            return
        if not self.token_types:
            raise ValueError("this Funnel was built without token types; build it with token_types=True to pass types")
        if types.shape != x.shape[:2] or types.dtype.is_floating_point:
            raise ValueError(
                f"types must hold one integer a token, here {tuple(x.shape[:2])}, got {types.dtype} of shape "
                f"{tuple(types.shape)}"
            )

    @staticmethod
    def _layers(modules: nn.Module) -> list[FunnelLayer]:
        return [each for each in modules.children() if isinstance(each, FunnelLayer)]


def pool_pairs(
    x: Float[Tensor, "rows time width"], valid: Bool[Tensor, "rows time"] | None, kind: str
) -> tuple[Float[Tensor, "rows short width"], Bool[Tensor, "rows short"] | None]:
    """Mean or maximum ("max") of the valid tokens of each pair, and which pairs have one; zeros where none has.
    An odd last token makes a pair by itself."""
    odd = x.shape[1] % 2
    whole = valid is None
    if valid is None:
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    pairs = F.pad(x, (0, 0, 0, odd)).unflatten(1, (-1, 2))
    kept = F.pad(valid, (0, odd)).unflatten(1, (-1, 2))
    some = kept.any(2)
    if kind == "max":
        y = torch.where(kept[..., None], pairs, -torch.inf).amax(2)
        y = torch.where(some[..., None], y, 0.0)
    else:
        y = torch.where(kept[..., None], pairs, 0.0).sum(2) / kept.sum(2).clamp_min(1)[..., None]
    return y, None if whole else some


# Packed rows ---------------------------------------------------------------------------------------------------


def _documents(
    x: Float[Tensor, "batch time features"], segments: Int[Tensor, "batch time"]
) -> tuple[Float[Tensor, "documents longest features"], Bool[Tensor, "documents longest"]]:
    """The documents of a packed batch, a row each, in order, and where their rows are no padding."""
    found = [(x[:0], segments[:0] != 0)]

    def keep(rows: Tensor, mask: Tensor) -> Tensor:
        found.append((rows, mask != 0))
        return rows

    each_document(keep, x, segments)
    return found[-1]


def _pack(
    x: Float[Tensor, "documents longest width"],
    valid: Bool[Tensor, "documents longest"],
    segments: Int[Tensor, "batch time"],
) -> tuple[Float[Tensor, "batch short width"], Int[Tensor, "batch short"]]:
    """Documents (of other lengths than in `segments`) put behind one another in the rows that they come from."""
    found = seg.runs(segments)
    begins = found.valid & (found.start | (found.previous < 0))
    row = begins.nonzero()[:, 0]
    lengths = valid.sum(1)
    per_row = lengths.new_zeros(len(segments)).index_add(0, row, lengths)
    place = lengths.cumsum(0) - lengths - (per_row.cumsum(0) - per_row)[row]
    place = place[:, None] + torch.arange(x.shape[1], device=x.device)
    index = row[:, None].expand_as(place)[valid], place[valid]
    short = int(per_row.max())
    packed = x.new_zeros(len(segments), short, x.shape[2]).index_put(index, x[valid])
    ids = segments[begins][:, None].expand_as(place)[valid]
    return packed, segments.new_zeros(len(segments), short).index_put(index, ids)


# Options -------------------------------------------------------------------------------------------------------


def _sizes(blocks: Sequence[int | str]) -> list[tuple[int, int]]:
    """Layers of each block and how often each runs."""
    hint = 'a list such as [4, 4, 4]; "3x2" is three layers that run twice each'
    if isinstance(blocks, str) or not isinstance(blocks, Sequence) or not blocks:
        raise ValueError(f"blocks={blocks!r} must hold the layers of each block, {hint}")
    sizes = []
    for each in blocks:
        count, _, repeats = each.partition("x") if isinstance(each, str) else (str(each), "", "")
        numbers = [int(part) if part.isascii() and part.isdecimal() else 0 for part in (count, repeats or "1")]
        if isinstance(each, bool) or min(numbers) < 1 or (isinstance(each, str) and not repeats):
            raise ValueError(f"blocks={list(blocks)!r} holds {each!r}, which is no number of layers; give {hint}")
        sizes.append((numbers[0], numbers[1]))
    return sizes


def _filled(name: str, given: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}={given!r} must be a mapping such as {dict(defaults)}")
    for key in given:
        if key not in defaults:
            raise ValueError(
                f"{name} has no option {key!r}{nearest(key, defaults)}. Its options: {', '.join(defaults)}"
            )
    return {**defaults, **given}


def _pooling(given: Mapping[str, Any]) -> tuple[str, bool, str | None]:
    chosen = _filled("pooling", given, POOLING)
    for name, known in (("kind", ("mean", "max")), ("q_only", (True, False)), ("cls", (None, "separate", "truncate"))):
        if not any(chosen[name] is each or (isinstance(each, str) and chosen[name] == each) for each in known):
            hint = nearest(chosen[name], known)
            raise ValueError(f"pooling {name}={chosen[name]!r} is unknown{hint}; choose from {known}")
    return chosen["kind"], chosen["q_only"], chosen["cls"]


def _base(position: Mapping[str, Any] | None) -> float | None:
    if position is None:
        return None
    chosen = _filled("position", position, POSITION)
    if chosen["kind"] != "relative":
        raise ValueError(
            f"position kind {chosen['kind']!r} is unknown; Funnel has 'relative', or None for no positions"
        )
    if number("position base", chosen["base"]) <= 1:
        raise ValueError(f"position base={chosen['base']} must be greater than 1")
    return float(chosen["base"])
