"""Linear time-invariant state space models, one system a channel: h_t = Ā h_{t-1} + B̄ u_t, y_t = C h_t + D u_t.

One system has three views that compute the same (2111.00396, section 2; 2110.13985, section 3): a convolution with the
filter K_l = C Āˡ B̄ for whole sequences, a recurrence for one token after another, and an associative scan. `LTI` holds
what does not depend on the form of Ā: views, states, documents. `DiagonalLTI` is the form with a diagonal Ā.
"""

import math
from typing import Any, ClassVar, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from ops import linear_recurrence, long_conv, vandermonde
from ops import segments as seg
from ops.precision import full_precision
from zoo.block import enter, leave, tag
from zoo.layers.checks import integer, number
from zoo.layers.spelling import nearest

CHUNK = 64  # tokens of which a state takes or gives in one product


class LTIState(NamedTuple):
    """Constant size: the states of every channel and a document id a row."""

    h: Float[Tensor, "batch channels ..."]  # complex numbers as real pairs in a last dimension; float32 at least
    segment: Int[Tensor, " batch"]


class LTI(nn.Module):
    """A causal map u [batch time channels] -> y of the same shape by one time-invariant system a channel.

    A subclass says what its system is: `discrete` (Ā, B̄, C in whatever form, made once a call), `kernel`, `step`,
    `read`, `respond`, `absorb`, `advance` and, where it has that view, `scan`. In them h is the state as it computes
    with, [batch channels n], complex where `paired` (then it is stored as real pairs).

    Attributes:
        view: "convolution" (one pass for all tokens, O(T log T)), "recurrence" (a loop over tokens), "scan", or "auto":
            the recurrence for one token, else the convolution. All give the same outputs and states.
        D: the skip, [channels], or None.
    """

    views: ClassVar[tuple[str, ...]] = ("convolution", "recurrence", "scan")
    paired: ClassVar[bool] = True

    def __init__(self, channels: int, state_shape: tuple[int, ...], skip: bool = True, outputs: int = 1):
        """`state_shape`: of one channel's h, without the pair. D starts standard normal (S4's choice). `outputs` of one
        channel: y has channels · outputs, those of a channel side by side."""
        super().__init__()
        self.channels, self.outputs = integer("channels", channels), integer("outputs", outputs)
        self.state_shape = (*state_shape, 2) if self.paired else state_shape
        self.view = "auto"
        self.D = nn.Parameter(torch.randn(channels * outputs)) if skip else None
        if skip:
            tag(self, "D", weight_decay=False)

    # What a subclass defines -----------------------------------------------------------------------------------

    def discrete(self) -> Any:
        """The system of this call from the parameters, float32 at least; the hooks below get it as `system`."""
        raise NotImplementedError(f"{type(self).__name__} defines no discrete")

    def filter(self, system: Any, length: int) -> Float[Tensor, "outputs ... length"]:
        """K_l = C Āˡ B̄ for l = 0 ... length - 1, without D."""
        raise NotImplementedError(f"{type(self).__name__} defines no filter")

    def step(self, system: Any, h: Tensor, u: Float[Tensor, "batch channels"]) -> Tensor:
        """Ā h + B̄ u."""
        raise NotImplementedError(f"{type(self).__name__} defines no step")

    def read(self, system: Any, h: Tensor) -> Float[Tensor, "... outputs"]:
        """C h, without D, for h [... channels n]."""
        raise NotImplementedError(f"{type(self).__name__} defines no read")

    def respond(self, system: Any, h: Tensor, length: int) -> Float[Tensor, "batch length outputs"]:
        """C Āᵗ⁺¹ h for t = 0 ... length - 1: what a state adds to the outputs after it."""
        raise NotImplementedError(f"{type(self).__name__} defines no respond")

    def absorb(self, system: Any, u: Float[Tensor, "batch time channels"]) -> Tensor:
        """Σ_j Āʲ B̄ u_{T-1-j}: the state after u, from nothing. Zeros at the beginning of u change nothing."""
        raise NotImplementedError(f"{type(self).__name__} defines no absorb")

    def advance(self, system: Any, h: Tensor, count: Int[Tensor, " batch"], most: int) -> Tensor:
        """Āᶜᵒᵘⁿᵗ h, each row by its own count, none above `most`."""
        raise NotImplementedError(f"{type(self).__name__} defines no advance")

    def scan(self, system: Any, u: Tensor, h: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor]:
        """All outputs (without D) and the last state by an associative scan; zeros for outputs at padding."""
        raise NotImplementedError(f"{type(self).__name__} defines no scan")

    def flops_per_token(self) -> int:
        """Of one step of the recurrence."""
        raise NotImplementedError(f"{type(self).__name__} defines no flops_per_token")

    # The contract ----------------------------------------------------------------------------------------------

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> LTIState:
        dtype = dtype or next(self.parameters()).dtype
        h = torch.zeros(batch, self.channels, *self.state_shape, device=device, dtype=self.state_dtype(dtype))
        return LTIState(h, torch.zeros(batch, device=device, dtype=torch.long))

    def state_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The real dtype h is kept in for activations of `dtype`."""
        return torch.promote_types(dtype, torch.float32)

    def kernel(self, length: int) -> Float[Tensor, "outputs ... length"]:
        """K_l = C Āˡ B̄, l = 0 ... length - 1: the answer to a unit impulse, without D."""
        return self.filter(self.discrete(), length)

    def forward(
        self,
        u: Float[Tensor, "batch time channels"],
        state: LTIState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time outputs"], LTIState | None]:
        """y in u's dtype, zero at padding, and the state after each row's last token (None if none was given)."""
        if segments is not None:
            u = torch.where((segments != 0)[..., None], u, 0)  # a NaN at padding would reach parameters' gradients
        h = None
        if state is not None:
            fresh = self.init_state(len(u), device=u.device, dtype=state.h.dtype) if segments is not None else state
            h = self.unpack(enter(state, fresh, segments).h)
        with full_precision(u.device):
            y, after = self._run()(self.discrete(), u, h, segments)
        if state is None:
            return y, None
        assert after is not None
        return y, LTIState(self.pack(after).to(state.h.dtype), leave(state.segment, segments))

    def pack(self, h: Tensor) -> Tensor:
        return torch.view_as_real(h) if self.paired else h

    def unpack(self, h: Tensor) -> Tensor:
        return torch.view_as_complex(h.contiguous()) if self.paired else h

    # The views -------------------------------------------------------------------------------------------------

    def _run(self) -> Any:
        if self.view not in ("auto", *self.views):
            raise ValueError(
                f"view={self.view!r} is unknown to {type(self).__name__}{nearest(str(self.view), self.views)}; choose "
                f"from auto, {', '.join(self.views)}"
            )
        return {
            "auto": self._auto,
            "convolution": self._convolution,
            "recurrence": self._recurrence,
            "scan": self._scan,
        }[self.view]

    def _auto(self, system: Any, u: Tensor, h: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor | None]:
        view = self._recurrence if u.shape[1] == 1 else self._convolution
        return view(system, u, h, segments)

    def _convolution(
        self, system: Any, u: Tensor, h: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        kernel = self.filter(system, u.shape[1])
        if h is None:
            return self.convolve(u, kernel, segments=segments), None
        batch, time, _ = u.shape
        response = self.respond(system, h, time)
        wide = u.to(kernel.dtype)
        if segments is None:
            count = torch.full((batch,), time, device=u.device)
            after = self.advance(system, h, count, time) + self.absorb(system, wide)
            y = self.convolve(u, kernel, response.to(kernel.dtype))
            return y, after
        found = seg.runs(segments)
        # The state belongs to the row's first document; its answer counts the tokens of that document.
        place = (found.valid.long().cumsum(1) - 1).clamp_min(0)[..., None].expand_as(response)
        response = torch.where((found.run == 1)[..., None], response.gather(1, place), 0)
        response = response.to(kernel.dtype)
        y = self.convolve(u, kernel, response, segments)
        # The last document's tokens, moved to the end: what stands before them is zero.
        documents = found.run.amax(1)
        last = found.valid & (found.run == documents[:, None])
        order = last.long().argsort(dim=1, stable=True)
        tokens = torch.where(last[..., None], wide, 0).gather(1, order[..., None].expand_as(wide))
        goes_on = (documents <= 1).reshape(-1, *[1] * (h.ndim - 1))
        before = torch.where(goes_on, self.advance(system, h, last.sum(1), time), 0)
        return y, before + self.absorb(system, tokens)

    def _recurrence(
        self, system: Any, u: Tensor, h: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if h is None:
            h = self.unpack(self.init_state(len(u), device=u.device, dtype=u.dtype).h)
        mark = None if segments is None else seg.marks(segments)
        wide = u.to(torch.promote_types(u.dtype, torch.float32))
        outputs = []
        for t in range(u.shape[1]):
            if mark is None:
                h = self.step(system, h, wide[:, t])
                outputs.append(self.read(system, h))
                continue
            now = mark[:, t].reshape(-1, *[1] * (h.ndim - 1))
            h = torch.where(now == 0, h, self.step(system, torch.where(now == 2, 0, h), wide[:, t]))
            outputs.append(torch.where(mark[:, t, None] != 0, self.read(system, h), 0))
        return self._skip(torch.stack(outputs, 1), wide).to(u.dtype), h

    def _scan(self, system: Any, u: Tensor, h: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = u.to(torch.promote_types(u.dtype, torch.float32))
        y, after = self.scan(system, wide, h, segments)
        return self._skip(y, wide).to(u.dtype), after

    def convolve(
        self, u: Tensor, kernel: Tensor, response: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Σ_s K_s u_{t-s} + D u_t + response_t within each document, in u's dtype."""
        return long_conv(self._spread(u), kernel, self.D, response=response, segments=segments)

    def _skip(self, y: Tensor, u: Tensor) -> Tensor:
        return y if self.D is None else y + self.D.to(u.dtype) * self._spread(u)

    def _spread(self, u: Tensor) -> Tensor:
        return u if self.outputs == 1 else u.repeat_interleave(self.outputs, -1)


class Modes(NamedTuple):
    """A diagonal system, discretised: h = exp(log_a) h + drive u, y = (2) Re Σ_n weights h."""

    log_a: Complex[Tensor, "channels n"]
    weights: Complex[Tensor, "channels n"]  # C B̄: only the product matters, so it is all at the output
    drive: Complex[Tensor, "channels n"] | None = None  # a scale taken out of the weights into the state; None: 1


class DiagonalLTI(LTI):
    """`LTI` with a diagonal Ā: n complex modes a channel (2206.11893; 2203.14343). A subclass defines `discrete`.

    With `conjugate` a mode stands for itself and its conjugate, which is stored nowhere: hence 2 Re at the output.
    """

    def __init__(self, channels: int, n: int, *, conjugate: bool = True, skip: bool = True):
        super().__init__(channels, (integer("n", n),), skip)
        self.n, self.conjugate = n, conjugate

    def discrete(self) -> Modes:
        raise NotImplementedError(f"{type(self).__name__} defines no discrete")

    def flops_per_token(self) -> int:
        """A step of the recurrence: 6 for Ā h, 1 for + u, 4 for C h of every mode; the skip."""
        return self.channels * (11 * self.n + 2)

    def filter(self, system: Modes, length: int) -> Float[Tensor, "channels length"]:
        weights = system.weights if system.drive is None else system.weights * system.drive
        return vandermonde(weights, system.log_a, length, conjugate=self.conjugate)

    def step(
        self, system: Modes, h: Complex[Tensor, "batch channels n"], u: Float[Tensor, "batch channels"]
    ) -> Complex[Tensor, "batch channels n"]:
        drive = u[..., None] if system.drive is None else system.drive * u[..., None]
        return torch.exp(system.log_a) * h + drive

    def read(self, system: Modes, h: Complex[Tensor, "... channels n"]) -> Float[Tensor, "... channels"]:
        return self._real((system.weights * h).real.sum(-1))

    def respond(
        self, system: Modes, h: Complex[Tensor, "batch channels n"], length: int
    ) -> Float[Tensor, "batch length channels"]:
        """In chunks of time: the state at each chunk's beginning, then all tokens of all chunks in one product."""
        chunk = min(CHUNK, length)
        chunks = -(-length // chunk)
        starts = powers(system.log_a, 1 + chunk * torch.arange(chunks, device=h.device))
        inside = system.weights[..., None] * powers(system.log_a, torch.arange(chunk, device=h.device))
        states = torch.view_as_real(einsum(h, starts, "b c n, c n k -> b k c n"))
        y = einsum(states, torch.view_as_real(inside.conj().resolve_conj()), "b k c n two, c n i two -> b k i c")
        return self._real(rearrange(y, "b k i c -> b (k i) c")[:, :length])

    def absorb(self, system: Modes, u: Float[Tensor, "batch time channels"]) -> Complex[Tensor, "batch channels n"]:
        """Sums over chunks of tokens in one product, then over chunks of those sums: no state a token is held."""
        chunk, log_a = min(CHUNK, u.shape[1]), system.log_a
        later = powers(log_a, torch.arange(chunk - 1, -1, -1, device=u.device))
        tokens = rearrange(pad(u, (0, 0, -u.shape[1] % chunk, 0)), "b (k i) c -> b k i c", i=chunk)
        pairs = torch.view_as_real(later)
        sums = einsum(tokens.to(pairs.dtype), pairs, "b k i c, c n i two -> b k c n two")
        sums = torch.view_as_complex(sums.contiguous())
        while sums.shape[1] > 1:
            log_a, chunk = chunk * log_a, min(CHUNK, sums.shape[1])
            later = rearrange(powers(log_a, torch.arange(chunk - 1, -1, -1, device=u.device)), "c n i -> i c n")
            sums = pad(sums, (0, 0, 0, 0, -sums.shape[1] % chunk, 0))
            sums = (rearrange(sums, "b (k i) c n -> b k i c n", i=chunk) * later).sum(2)
        return sums[:, 0] if system.drive is None else system.drive * sums[:, 0]

    def advance(
        self, system: Modes, h: Complex[Tensor, "batch channels n"], count: Int[Tensor, " batch"], most: int
    ) -> Complex[Tensor, "batch channels n"]:
        return h * rearrange(powers(system.log_a, count), "c n b -> b c n")

    def scan(self, system: Modes, u: Tensor, h: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor]:
        flat = None if h is None else h.flatten(1)
        drive = torch.ones_like(system.log_a) if system.drive is None else system.drive
        x = einsum(u.to(drive.dtype), drive, "b t c, c n -> b t c n").flatten(2)
        states, last = linear_recurrence(
            x, torch.exp(system.log_a).flatten(), initial_state=flat, segments=segments
        )  # fmt: skip
        return self.read(system, states.unflatten(2, (self.channels, self.n))), last.unflatten(1, (-1, self.n))

    def _real(self, y: Tensor) -> Tensor:
        return 2 * y if self.conjugate else y


def powers(log_a: Complex[Tensor, "*channels n"], exponents: Int[Tensor, " k"]) -> Complex[Tensor, "*channels n k"]:
    """exp(k log_a). The angle is reduced in float64: after 10⁵ tokens float32 would have lost its digits."""
    size = torch.exp(log_a.real[..., None] * exponents)
    angle = torch.remainder(log_a.imag.double()[..., None] * exponents, 2 * torch.pi)
    return torch.polar(size, angle.to(size.dtype))


def expm1(z: Complex[Tensor, "..."]) -> Complex[Tensor, "..."]:
    """exp(z) - 1 to full precision for a small z."""
    real = torch.expm1(z.real) * torch.cos(z.imag) - 2 * torch.sin(z.imag / 2).square()
    return torch.complex(real, torch.exp(z.real) * torch.sin(z.imag))


def log1p(z: Complex[Tensor, "..."]) -> Complex[Tensor, "..."]:
    """log(1 + z) to full precision for a small z."""
    size = z.real * (2 + z.real) + z.imag.square()
    return torch.complex(torch.log1p(size) / 2, torch.atan2(z.imag, 1 + z.real))


def widened(parameter: Tensor) -> Tensor:
    """A parameter in float32 at least: exponents and steps in bfloat16 would have 8 bits over many tokens."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def step_parameter(channels: int, dt_min: float, dt_max: float) -> nn.Parameter:
    """log Δ a channel, Δ log-uniform in [dt_min, dt_max] (2111.00396, appendix D.1): the time scales it remembers."""
    if not 0 < number("dt_min", dt_min) <= number("dt_max", dt_max):
        raise ValueError(f"dt_min={dt_min} and dt_max={dt_max} must satisfy 0 < dt_min <= dt_max")
    return nn.Parameter(torch.empty(channels).uniform_(math.log(dt_min), math.log(dt_max)))


def tag_system(module: nn.Module, *names: str, learning_rate: float | None) -> None:
    """A, B and the step of a system: no weight decay and a rate of their own, at most 0.001 in S4 (2111.00396,
    appendix D.1), since a small change of them changes the filter's far end a lot. None: the optimizer's rate."""
    if learning_rate is not None and number("learning_rate", learning_rate) <= 0:
        raise ValueError(f"learning_rate={learning_rate} must be positive, or None for the optimizer's own")
    for name in names:
        tag(module, name, weight_decay=False, learning_rate=learning_rate)
