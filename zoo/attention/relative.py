"""Attention whose logits know content, distance and token type (Transformer-XL, 1901.02860; Funnel, 2006.03236)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, einsum, nn
from torch.nn import functional as F

from zoo.block import tag
from zoo.layers.linear import Linear


class Relation(NamedTuple):
    """What queries and keys are to one another besides their content. Made once, used by every layer of a length."""

    step: int  # keys from one query to the next: 1, or 2 where pooled queries meet keys that are not
    sinusoids: Float[Tensor, "distances width"] | None  # of `distances`; None: no positions
    same: Bool[Tensor, "batch queries keys"] | None  # whether two tokens are of one type; None: no types
    valid: Bool[Tensor, "batch keys"] | None  # keys that are no padding; None: all
    apart: bool  # the first token is a [CLS], which has neither place nor type


def distances(queries: int, keys: int, step: int, stride: int, offset: int, device: torch.device) -> Int[Tensor, " n"]:
    """Distances in tokens for which a relation needs sinusoids, falling: n = step · queries + keys.

    Query i stands at offset + i · step · stride, key j at j · stride; entry t is
    offset + (step · queries - t) · stride.
    """
    count = torch.arange(step * queries + keys, device=device)
    return offset + (step * queries - count) * stride


def sinusoids(distances: Int[Tensor, " n"], width: int, base: float, dtype: torch.dtype) -> Float[Tensor, "n width"]:
    """[sin(d θ_i), cos(d θ_i)] with θ_i = base^(-2i/width) of each distance d (1706.03762, sec. 3.5).

    Angles are float32 at least: bfloat16 cannot count past 256.
    """
    exact = torch.promote_types(dtype, torch.float32)
    theta = base ** (torch.arange(0, width, 2, device=distances.device, dtype=exact) / -width)
    angle = distances.to(exact)[:, None] * theta
    return torch.cat([angle.sin(), angle.cos()], -1).to(dtype)


def shift(
    logits: Float[Tensor, "batch heads queries n"], keys: int, step: int
) -> Float[Tensor, "batch heads queries keys"]:
    """From logits by distance (the order of `distances`) to logits by key. O(1) memory: a view of another row length.

    Query i meets key j at entry step · (queries - i) + j. In the flattened matrix of rows of n, that is entry
    i · (n - step) + j behind the first step · queries, so rows of n - step begin at their first key.
    """
    queries, n = logits.shape[2:]
    flat = logits.flatten(2)[..., step * queries :]
    return flat.unflatten(-1, (queries, n - step))[..., :keys]


class RelativeAttention(nn.Module):
    """Multi-head attention of queries over keys with three terms a logit, bidirectional.

    logit_ij = ((q_i + u) · k_j + (q_i + v) · W_R r(i - j) + (q_i + w) · e(i, j)) / sqrt(head_dim)

    with r the sinusoids of a distance, e one of two learned vectors (other type, same type) and u, v, w learned biases
    a head (Dai et al., 1901.02860, sec. 3.3; Dai et al., 2006.03236, app. A.2.1). Without `positions` or `types` the
    second or third term is absent. Queries get no bias vector of their own: u, v and w are theirs.

    Cost for Q queries and K keys: O((Q + K) D² + Q K D) time, O(heads Q K) memory for the logits' second and third
    terms and the gradient.
    """

    def __init__(self, width: int, heads: int, positions: bool, types: bool):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.query = Linear(width, width, bias=False)
        self.key_value = Linear(width, 2 * width)
        self.out = Linear(width, width)
        for linear in (self.key_value, self.out):
            tag(linear, "bias", weight_decay=False)
        self.content_bias = self._bias()
        self.distance = Linear(width, width, bias=False) if positions else None
        self.distance_bias = self._bias() if positions else None
        self.type_bias = self._bias() if types else None
        self.type_vectors = nn.Parameter(0.02 * torch.randn(2, heads, self.head_dim)) if types else None
        names = {"content_bias", "distance_bias", "type_bias", "type_vectors"}
        for name in names & dict(self.named_parameters(recurse=False)).keys():
            tag(self, name, weight_decay=False)

    def _bias(self) -> nn.Parameter:
        return nn.Parameter(torch.zeros(self.heads, self.head_dim))

    def flops(self, queries: int, keys: int, step: int) -> int:
        """Forward FLOPs of one sequence; the distances' projection, which a batch shares, counts as its own."""
        inner = self.heads * self.head_dim
        total = 2 * inner**2 * (2 * queries + 2 * keys) + 4 * queries * keys * inner
        if self.distance is not None:
            n = step * queries + keys
            total += 2 * n * inner**2 + 2 * queries * n * inner
        return total if self.type_vectors is None else total + 4 * queries * inner

    def forward(
        self,
        queries: Float[Tensor, "batch queries width"],
        keys: Float[Tensor, "batch keys width"],
        relation: Relation,
    ) -> Float[Tensor, "batch queries width"]:
        q = self._split(self.query(queries))
        k, v = (self._split(each).transpose(1, 2) for each in self.key_value(keys).chunk(2, -1))
        content = (q + self.content_bias.to(q.dtype)).transpose(1, 2)
        y = F.scaled_dot_product_attention(content, k, v, attn_mask=self._mask(q, k.shape[2], relation))
        return self.out(y.transpose(1, 2).flatten(2))

    def _split(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time heads head_dim"]:
        return x.unflatten(-1, (self.heads, self.head_dim))

    def _mask(self, q: Tensor, keys: int, relation: Relation) -> Tensor | None:
        """What is added to the logits of the content; or which keys are seen, where that is all; or None."""
        seen = None if relation.valid is None else relation.valid[:, None, None]
        terms = [
            term for term in (self._by_distance(q, keys, relation), self._by_type(q, relation)) if term is not None
        ]
        if not terms:
            return seen
        added = sum(terms[1:], terms[0]) * self.head_dim**-0.5
        if relation.apart:
            added = F.pad(added[:, :, 1:, 1:], (1, 0, 1, 0))
        return added if seen is None else added.masked_fill(~seen, -torch.inf)

    def _by_distance(
        self, q: Tensor, keys: int, relation: Relation
    ) -> Float[Tensor, "batch heads queries keys"] | None:
        if self.distance is None or self.distance_bias is None or relation.sinusoids is None:
            return None
        r = self.distance(relation.sinusoids).unflatten(-1, (self.heads, self.head_dim))
        logits = einsum("b i h d, n h d -> b h i n", q + self.distance_bias.to(q.dtype), r)
        return shift(logits, keys, relation.step)

    def _by_type(self, q: Tensor, relation: Relation) -> Float[Tensor, "batch heads queries keys"] | None:
        if self.type_vectors is None or self.type_bias is None or relation.same is None:
            return None
        logits = einsum("b i h d, s h d -> b h i s", q + self.type_bias.to(q.dtype), self.type_vectors.to(q.dtype))
        other, same = logits.split(1, -1)
        return torch.where(relation.same[:, None], same, other)
