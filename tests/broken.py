"""A small block that obeys every law, and for each law a block that breaks it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ops import segments as seg
from ops.dispatch import Implementation, Op
from zoo.block import Block, NoState, Out, enter, leave


def _scan(x: Tensor, decay: Tensor, initial: Tensor, reset: Tensor, valid: Tensor, wrong: float = 0.0):
    h, outputs = initial, []
    for t in range(x.shape[1]):
        h = torch.where(reset[:, t, None], 0, h)
        h = torch.where(valid[:, t, None], decay * h + x[:, t], h)
        outputs.append(h + wrong * x[:, t])
    return torch.stack(outputs, 1), h


def _wrong(**arguments):
    return _scan(**arguments, wrong=0.5)


GOOD = Op("average", Implementation("reference", _scan))
BAD = Op("average", Implementation("wrong", _wrong), Implementation("reference", _scan))
BAD_KERNEL = Op("average", Implementation("triton", _wrong), Implementation("reference", _scan))


class AverageState(NamedTuple):
    total: Tensor
    segment: Tensor


class Average(Block):
    """h_t = decay · h_{t-1} + W x_t, y = tanh(h): obeys every law."""

    op = GOOD

    def __init__(self, width: int):
        super().__init__(width)
        self.inside = nn.Linear(width, width)
        self.decay = nn.Parameter(torch.randn(width))

    def init_state(self, batch, *, device=None, dtype=None):
        total = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        return AverageState(
            torch.zeros(batch, self.width, device=device, dtype=total),
            torch.zeros(batch, device=device, dtype=torch.long),
        )

    def enter(self, state, segments):
        return enter(state, self.init_state(len(state.total), dtype=state.total.dtype), segments)

    def masks(self, x, segments):
        if segments is None:
            shape, device = x.shape[:2], x.device
            return torch.zeros(shape, dtype=torch.bool, device=device), torch.ones(
                shape, dtype=torch.bool, device=device
            )
        found = seg.runs(segments)
        return found.start, found.valid

    def forward(self, x, state=None, segments=None):
        self.check(x, state, segments)
        given = (
            self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else self.enter(state, segments)
        )
        reset, valid = self.masks(x, segments)
        inner = self.inside(torch.where(valid[..., None], x, 0)).to(given.total.dtype)
        decay = self.decay.sigmoid().to(inner.dtype)
        h, total = self.op("auto", x=inner, decay=decay, initial=given.total, reset=reset, valid=valid)
        y = torch.where(valid[..., None], torch.tanh(h), 0).to(x.dtype)
        return Out(y, None if state is None else self.next(given, total, segments), {})

    def next(self, given, total, segments):
        return AverageState(total, leave(given.segment, segments))


# One block for each law ---------------------------------------------------------------------------------------


class AlwaysState(Average):
    """contract: gives a state although none was given."""

    def forward(self, x, state=None, segments=None):
        return super().forward(x, state or self.init_state(len(x), dtype=x.dtype), segments)


class Rounds(Average):
    """precision: keeps three bits behind the point below float64."""

    def forward(self, x, state=None, segments=None):
        out = super().forward(x, state, segments)
        return out if x.dtype == torch.float64 else out._replace(y=(out.y * 8).round() / 8)


class LooksAhead(Average):
    """causality: the mean is over the whole call."""

    def forward(self, x, state=None, segments=None):
        return super().forward(x + 0.1 * x.mean(1, keepdim=True), state, segments)


class ForgetsChunks(Average):
    """chunks: a call of several tokens ignores the state."""

    def forward(self, x, state=None, segments=None):
        if state is not None and x.shape[1] > 1:
            state = self.init_state(len(x), dtype=x.dtype)
        return super().forward(x, state, segments)


class ForgetsSteps(Average):
    """token_by_token: the fast route of one token ignores the state."""

    def forward(self, x, state=None, segments=None):
        if state is not None and x.shape[1] == 1:
            state = self.init_state(len(x), dtype=x.dtype)
        return super().forward(x, state, segments)


class PaddingDecays(Average):
    """padding: the state decays at padding."""

    def masks(self, x, segments):
        reset, valid = super().masks(x, segments)
        return reset, torch.ones_like(valid)

    def forward(self, x, state=None, segments=None):
        x = x if segments is None else torch.where((segments != 0)[..., None], x, 0)
        return super().forward(x, state, segments)


class PacksLeak(Average):
    """packed: documents of a row see each other."""

    def masks(self, x, segments):
        reset, valid = super().masks(x, segments)
        return torch.zeros_like(reset), valid


class GoesOnInAnother(Average):
    """packed: a state goes on although the next call begins another document."""

    def enter(self, state, segments):
        return state


class CausalInDisguise(Average):
    """bidirectional: says it looks both ways and does not."""

    causal = False

    def forward(self, x, state=None, segments=None):
        return super().forward(x, None, segments)._replace(state=None)


class RowsMixed(Average):
    """select_commutes: the state of a row depends on its place in the batch."""

    def forward(self, x, state=None, segments=None):
        if state is not None:
            state = state._replace(total=state.total + 0.1 * state.total.roll(1, 0))
        return super().forward(x, state, segments)


class WritesInPlace(Average):
    """rolls_back: says its state only grows and overwrites it."""

    class InPlace(NamedTuple):
        total: Tensor
        segment: Tensor
        APPEND_ONLY = True

    def init_state(self, batch, *, device=None, dtype=None):
        return self.InPlace(*super().init_state(batch, device=device, dtype=dtype))

    def next(self, given, total, segments):
        with torch.no_grad():
            given.total.copy_(total)
        return self.InPlace(given.total, leave(given.segment, segments))


class CutsGradient(Average):
    """gradient_through_state: the returned state is detached."""

    def next(self, given, total, segments):
        return super().next(given, total.detach(), segments)


class SaysItGrows(Average):
    """state_size: says that its state grows, and it does not."""

    def state_bytes(self, tokens, *, dtype=torch.float32):
        return super().state_bytes(tokens, dtype=dtype) + tokens


class TwoAnswers(Average):
    """implementations: one implementation is not the reference."""

    op = BAD


class WrongKernel(Average):
    """interpreted: the Triton kernel is not the reference."""

    op = BAD_KERNEL


class HidesWeights(Average):
    """save_and_load: a weight that is no parameter and is not saved."""

    def __init__(self, width: int):
        super().__init__(width)
        self.hidden = torch.randn(())

    def forward(self, x, state=None, segments=None):
        return super().forward(x * self.hidden.to(x.dtype), state, segments)


class NeedsAnObject(Average):
    """config_round_trip: an option's default is an object, which no YAML file can hold."""

    def __init__(self, width: int, activation=torch.tanh):
        super().__init__(width)
        self.activation = activation


class BornOnCPU(Average):
    """meta_device: one parameter is always made on the CPU."""

    def __init__(self, width: int):
        super().__init__(width)
        self.decay = nn.Parameter(torch.randn(width, device="cpu"))


class Overflows(Average):
    """finite: exponentiates its input."""

    def forward(self, x, state=None, segments=None):
        return super().forward(x.exp(), state, segments)


class BreaksGraph(Average):
    """compiles: asks a tensor for a number."""

    def forward(self, x, state=None, segments=None):
        if x.sum().item() > 1e9:
            raise ValueError("too large")
        return super().forward(x, state, segments)


class Stateless(Average):
    """Obeys every law without a state, as feed-forward blocks do."""

    def init_state(self, batch, *, device=None, dtype=None):
        return NoState()

    def forward(self, x, state=None, segments=None):
        self.check(x, state, segments)
        valid = self.masks(x, segments)[1][..., None]
        return Out(torch.where(valid, self.inside(torch.where(valid, x, 0)), 0), state, {})


class BothWays(Average):
    """Obeys every law as a bidirectional block."""

    causal = False

    def forward(self, x, state=None, segments=None):
        self.check(x, state, segments)
        if segments is None:
            return Out(torch.tanh(self.inside(x)) + self.inside(x).mean(1, keepdim=True), None, {})
        found = seg.runs(segments)
        clean = torch.where(found.valid[..., None], x, 0)
        inner = self.inside(clean)
        same = ((found.run[:, :, None] == found.run[:, None]) & found.valid[:, None]).to(x.dtype)
        mean = same @ inner / same.sum(-1, keepdim=True).clamp_min(1)
        return Out(torch.where(found.valid[..., None], torch.tanh(inner) + mean, 0), None, {})


GOOD_BLOCKS = (Average, Stateless, BothWays)
BROKEN: dict[str, type[Block]] = {
    "contract": AlwaysState,
    "precision": Rounds,
    "causality": LooksAhead,
    "chunks": ForgetsChunks,
    "token_by_token": ForgetsSteps,
    "padding": PaddingDecays,
    "packed": PacksLeak,
    "packed_across_calls": GoesOnInAnother,
    "bidirectional": CausalInDisguise,
    "select_commutes": RowsMixed,
    "rolls_back": WritesInPlace,
    "gradient_through_state": CutsGradient,
    "state_size": SaysItGrows,
    "implementations": TwoAnswers,
    "interpreted": WrongKernel,
    "save_and_load": HidesWeights,
    "config_round_trip": NeedsAnObject,
    "meta_device": BornOnCPU,
    "finite": Overflows,
    "compiles": BreaksGraph,
}
