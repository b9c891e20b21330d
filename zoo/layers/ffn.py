"""Dense feed-forward blocks: SwiGLU, GEGLU and the two-layer MLP.

They look at one token at a time and hold no state: a given state is passed through. Rows of padding are zero in
the output, whatever stands there in the input, and add nothing to any gradient.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ops import gated, step
from ops.gated import ACTIVATIONS
from ops.step import Around
from zoo.block import STATELESS, Block, Out, State, Step, tag
from zoo.layers.linear import Linear, plain

_NAMES = {function: name for name, function in ACTIVATIONS.items()}


def activation_name(function: Callable[[Tensor], Tensor]) -> str | None:
    """The name under which compiled steps know it; None for any other function."""
    return _NAMES.get(function)


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of this name; a ValueError that lists the names for any other."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is unknown; choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def gelu_by(approximate: str) -> Callable[[Tensor], Tensor]:
    """GELU, exact ("none") or by its tanh approximation ("tanh")."""
    known = {"none": ACTIVATIONS["gelu"], "tanh": ACTIVATIONS["gelu_tanh"]}
    if approximate not in known:
        raise ValueError(f"approximate={approximate!r} is unknown; choose 'none' (exact GELU) or 'tanh'")
    return known[approximate]


def gate_by(activation: Callable[[Tensor], Tensor], inner: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows h"]:
    """activation(gate) ⊙ value, the gate in the first half of the last dimension."""
    name = activation_name(activation)
    if name is not None:
        return gated(inner, name)
    gate, value = inner.chunk(2, dim=-1)
    return activation(gate) * value


def gated_hidden(width: int) -> int:
    """8/3 width rounded up to a multiple of 8: a gated unit of as many parameters as an MLP of 4 width."""
    return -(-8 * width // 24) * 8


def check_hidden(hidden: int) -> int:
    if not isinstance(hidden, int) or hidden < 1:
        raise ValueError(f"hidden={hidden!r} must be a positive integer, or None for the default")
    return hidden


class FeedForward(Block):
    """What the dense feed-forward blocks share: two projections, padding, and no state. O(width · hidden) a token."""

    up: nn.Linear  # [width -> inner]
    down: nn.Linear  # [hidden -> width]
    activation: Callable[[Tensor], Tensor]

    def activate(self, inner: Float[Tensor, "batch time inner"]) -> Float[Tensor, "batch time hidden"]:
        raise NotImplementedError(f"{type(self).__name__} defines no activate")

    def bind_step(self, around: Around) -> Step | None:
        if not plain(self.up, self.down) or type(self).activate not in (GatedUnit.activate, MLP.activate):
            return None
        weights = (self.up.weight, self.up.bias, self.down.weight, self.down.bias)
        name, width = activation_name(self.activation), self.width
        if name is None or not step.fits(*weights, around.weight, around.bias):
            return None
        from ops.step.feed_forward import feed_forward

        run = feed_forward(*weights, name, isinstance(self, GatedUnit), around)

        def one(x: Tensor, state: State | None) -> Out | None:
            if type(state) not in STATELESS or not step.takes(x, width):
                return None
            return Out(run(x), state, {})

        return one

    def build(self, inner: int, hidden: int, bias: bool) -> None:
        self.up = Linear(self.width, inner, bias=bias)
        self.down = Linear(hidden, self.width, bias=bias)
        if bias:
            tag(self.up, "bias", weight_decay=False)
            tag(self.down, "bias", weight_decay=False)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        if segments is None:
            stepped = self.one_token(x, state) if x.shape[1] == 1 else None
            return Out(self.down(self.activate(self.up(x))), state, {}) if stepped is None else stepped
        valid = (segments != 0)[..., None]
        # Both ends: at the input, so that no NaN reaches a weight's gradient as 0 · NaN; at the output for biases.
        y = self.down(self.activate(self.up(torch.where(valid, x, 0.0))))
        return Out(torch.where(valid, y, 0.0), state, {})


class GatedUnit(FeedForward):
    """y = (activation(x Wg) ⊙ x Wu) Wd. `up.weight` [2·hidden, width] holds the gate's rows first, then the value's:
    one matrix product for both."""

    def __init__(self, width: int, hidden: int | None, bias: bool, activation: Callable[[Tensor], Tensor]):
        super().__init__(width)
        self.hidden = gated_hidden(width) if hidden is None else check_hidden(hidden)
        self.activation = activation
        self.build(2 * self.hidden, self.hidden, bias)

    def activate(self, inner: Float[Tensor, "batch time inner"]) -> Float[Tensor, "batch time hidden"]:
        return gate_by(self.activation, inner)


class SwiGLU(GatedUnit):
    """Gated feed-forward block with SiLU (Shazeer, 2002.05202, eq. 6).

    Options: `hidden`, by default 8/3 width rounded up to a multiple of 8; `bias` on all projections.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D hidden): three matrices
        train memory: O(T (D + hidden))
        prefill: O(T D hidden)
        decode: O(D hidden) a token, whatever the context
        state bytes: 0
    """

    def __init__(self, width: int, hidden: int | None = None, bias: bool = False):
        super().__init__(width, hidden, bias, F.silu)


class GEGLU(GatedUnit):
    """Gated feed-forward block with GELU (Shazeer, 2002.05202, eq. 6).

    Options: `hidden`, by default 8/3 width rounded up to a multiple of 8; `bias`; `approximate` "none" or "tanh".

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D hidden): three matrices
        train memory: O(T (D + hidden))
        prefill: O(T D hidden)
        decode: O(D hidden) a token, whatever the context
        state bytes: 0
    """

    def __init__(self, width: int, hidden: int | None = None, bias: bool = False, approximate: str = "none"):
        super().__init__(width, hidden, bias, gelu_by(approximate))


class MLP(FeedForward):
    """Two-layer feed-forward block: activation(x Wu) Wd (1706.03762, eq. 2); relu² is Primer's (2109.08668).

    Options: `hidden`, by default 4 · width; `activation` gelu, gelu_tanh, relu, relu2 or silu; `bias`.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D hidden): two matrices
        train memory: O(T (D + hidden))
        prefill: O(T D hidden)
        decode: O(D hidden) a token, whatever the context
        state bytes: 0
    """

    def __init__(self, width: int, hidden: int | None = None, activation: str = "gelu", bias: bool = False):
        super().__init__(width)
        self.hidden = 4 * width if hidden is None else check_hidden(hidden)
        self.activation = activation_function(activation)
        self.build(self.hidden, self.hidden, bias)

    def activate(self, inner: Float[Tensor, "batch time inner"]) -> Float[Tensor, "batch time hidden"]:
        return self.activation(inner)
