"""`LTI` whose state matrix is not diagonal: h is N real numbers a channel, Ā [N N], its powers by repeated squaring."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from ops import segments as seg
from zoo.ssm.lti import CHUNK, LTI, step_parameter, widened


class Squares:
    """Ā^(2^k) for k = 0, 1, ..., each made when it is first asked for: a token's step needs none of them."""

    def __init__(self, first: Callable[[], Float[Tensor, "channels n n"]]):
        self.first = first
        self.made: list[Tensor] = []

    def __getitem__(self, k: int) -> Float[Tensor, "channels n n"]:
        while len(self.made) <= k:
            self.made.append(self.made[-1] @ self.made[-1] if self.made else self.first())
        return self.made[k]


@runtime_checkable
class Dense(Protocol):
    """What `DenseLTI` asks of a system. All in float64: Ā^T by squaring has T times the rounding error of Ā."""

    @property
    def A(self) -> Squares: ...
    @property
    def B(self) -> Float[Tensor, "channels n"]: ...
    @property
    def C(self) -> Float[Tensor, "channels each n"]: ...


class DenseLTI(LTI):
    """`LTI` with a dense Ā. A subclass defines `discrete` and `step`, and more where its structure allows better.

    The filter is C times a Krylov matrix (2110.13985, section 4.1: K_l = C Āˡ B̄), by doubling. The scan is the
    associative one over pairs (Āʲ, Σ): their left parts are the same for all tokens, so a sweep needs one square.
    Cost: O(N³ log T) a channel for the squares, O(N²√T + N T) for the filter, O(N² T log T) a row for the scan.
    """

    paired = False

    def __init__(
        self,
        channels: int,
        state_shape: tuple[int, ...],
        dt_min: float,
        dt_max: float,
        skip: bool = True,
        outputs: int = 1,
    ):
        super().__init__(channels, state_shape, skip, outputs)
        self.log_step = step_parameter(channels, dt_min, dt_max)

    def discrete(self) -> Dense:
        raise NotImplementedError(f"{type(self).__name__} defines no discrete")

    def filter(self, system: Any, length: int) -> Float[Tensor, "outputs length"]:
        """In two levels, l = i · 2^level + j: K_l = (C Āⁱ²ˡᵉᵛᵉˡ)(Āʲ B̄), so that no N × T matrix is held."""
        level = doublings(length) // 2
        within = krylov(system.A, system.B[..., None], 1 << level)
        starts = krylov(system.A, system.C.mT, -(-length // (1 << level)), level, transposed=True)
        kernel = einsum(starts, within, "c n im, c n j -> c im j")
        kernel = rearrange(kernel, "c (i m) j -> (c m) (i j)", m=self.outputs)[:, :length]
        return kernel.to(widened(self.log_step).dtype)

    def read(self, system: Dense, h: Float[Tensor, "... channels n"]) -> Float[Tensor, "... outputs"]:
        return einsum(h, system.C.to(h.dtype), "... c n, c m n -> ... c m").flatten(-2)

    def respond(
        self, system: Dense, h: Float[Tensor, "batch channels n"], length: int
    ) -> Float[Tensor, "batch length outputs"]:
        """In chunks of time: the state at each chunk's beginning, then all tokens of all chunks in one product."""
        level = min(doublings(CHUNK), doublings(length))
        after = einsum(system.C, system.A[0], "c m n, c n k -> c k m")
        rows = krylov(system.A, after, 1 << level, transposed=True).to(h.dtype)
        starts = krylov(system.A, rearrange(h, "b c n -> c n b"), -(-length // (1 << level)), level)
        y = einsum(rows, starts, "c n jm, c n ib -> c jm ib")
        y = rearrange(y, "c (j m) (i b) -> b (i j) (c m)", m=self.outputs, b=len(h))
        return y[:, :length]

    def absorb(self, system: Dense, u: Float[Tensor, "batch time channels"]) -> Float[Tensor, "batch channels n"]:
        """Sums over chunks of tokens in one product, then over pairs of those sums: no state a token is held."""
        level = min(doublings(CHUNK), doublings(u.shape[1]))
        later = krylov(system.A, system.B[..., None], 1 << level).flip(-1).to(u.dtype)
        tokens = rearrange(pad(u, (0, 0, -u.shape[1] % (1 << level), 0)), "b (k i) c -> b k i c", i=1 << level)
        sums = einsum(tokens, later, "b k i c, c n i -> b k c n")
        while sums.shape[1] > 1:
            sums = pad(sums, (0, 0, 0, 0, sums.shape[1] % 2, 0))
            sums = times(system.A[level], sums[:, ::2]) + sums[:, 1::2]
            level += 1
        return sums[:, 0]

    def advance(
        self, system: Dense, h: Float[Tensor, "batch channels n"], count: Int[Tensor, " batch"], most: int
    ) -> Float[Tensor, "batch channels n"]:
        """By the bits of count."""
        for bit in range(doublings(most + 1)):
            taken = (count >> bit) % 2 == 1
            h = torch.where(taken[:, None, None], times(system.A[bit], h), h)
        return h

    def scan(
        self, system: Dense, u: Float[Tensor, "batch time channels"], h: Tensor | None, segments: Tensor | None
    ) -> tuple[Float[Tensor, "batch time outputs"], Float[Tensor, "batch channels n"]]:
        """Hillis and Steele's sweeps: after sweep k a token has summed the 2^(k+1) tokens up to it."""
        batch, time, _ = u.shape
        found = None if segments is None else seg.runs(segments)
        run = None
        if found is not None:  # padding moves to the end, so that a document's tokens are neighbours
            order = (~found.valid).long().argsort(dim=1, stable=True)
            run, u = found.run.gather(1, order), u.gather(1, order[..., None].expand_as(u))
        x = einsum(u, system.B.to(u.dtype), "b t c, c n -> b t c n")
        if h is not None:
            x = torch.cat([x[:, :1] + times(system.A[0], h)[:, None], x[:, 1:]], 1)
        for k in range(doublings(time)):
            before = times(system.A[k], x[:, : -(1 << k)])
            if run is not None:
                before = torch.where((run[:, 1 << k :] == run[:, : -(1 << k)])[..., None, None], before, 0)
            x = torch.cat([x[:, : 1 << k], x[:, 1 << k :] + before], 1)
        y = self.read(system, x)
        if found is None:
            return y, x[:, -1]
        tokens = found.valid.sum(1)
        last = x[torch.arange(batch, device=x.device), (tokens - 1).clamp_min(0)]
        last = torch.where((tokens > 0)[:, None, None], last, 0 if h is None else h)
        place = (found.valid.long().cumsum(1) - 1).clamp_min(0)
        y = y.gather(1, place[..., None].expand_as(y))
        return torch.where(found.valid[..., None], y, 0), last


def doublings(count: int) -> int:
    """The least k with 2^k >= count."""
    k = 0
    while 1 << k < count:
        k += 1
    return k


def times(A: Float[Tensor, "channels n n"], h: Float[Tensor, "... channels n"]) -> Float[Tensor, "... channels n"]:
    """A h, in h's dtype."""
    return einsum(A.to(h.dtype), h, "c n k, ... c k -> ... c n")


def krylov(
    A: Squares, x: Float[Tensor, "channels n k"], count: int, level: int = 0, transposed: bool = False
) -> Float[Tensor, "channels n columns"]:
    """x, M x, M² x, ... with M = Ā^(2^level) or its transpose: count · k columns, in x's dtype, by doubling."""
    each = x.shape[-1]
    while x.shape[-1] < count * each:
        M = A[level].to(x.dtype)
        x = torch.cat([x, (M.mT if transposed else M) @ x[..., : count * each - x.shape[-1]]], -1)
        level += 1
    return x
