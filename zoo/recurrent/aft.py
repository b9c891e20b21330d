"""Attention Free Transformer (Zhai et al., 2105.14103): averages of values weighted by keys and learned positions."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ops.wkv import empty_state, wkv
from zoo.block import Block, Out, State, each_document, enter, leave, tag
from zoo.layers.checks import integer
from zoo.layers.linear import Linear
from zoo.layers.spelling import nearest
from zoo.recurrent.aft_bias import Band, Offsets
from zoo.recurrent.aft_full import Full
from zoo.recurrent.aft_sums import Sums, average, total
from zoo.recurrent.aft_window import Windowed

# The options that a variant has; None stands for the default here.
DEFAULTS: dict[str, dict[str, int | None]] = {
    "full": {"length": 2048, "rank": 128},
    "local": {"window": 32, "length": 2048, "rank": 128},
    "conv": {"window": 32, "heads": None},
    "simple": {},
}


class AFTSimpleState(NamedTuple):
    """The sums of `ops.wkv`, float32 at least, and the document they belong to (0: none yet). Constant size."""

    numerator: Float[Tensor, "batch width"]
    denominator: Float[Tensor, "batch width"]
    maximum: Float[Tensor, "batch width"]
    segment: Int[Tensor, " batch"]


class AFT(Block):
    """Attention Free Transformer (2105.14103): no queries times keys, but values weighted by keys and positions.

    y_t = W_o (σ(q_t) ⊙ Σ_s e^(k_s + w_ts) v_s / Σ_s e^(k_s + w_ts)), per channel, with q, k, v linear in x (eq. 2). The
    sums run over a document's tokens up to t. Every sum carries the maximum that was subtracted: keys of any size fit.

    Args:
        width: features of x.
        variant: what w is, a number a pair of places in the document.
            "full": u_t · v_s, learned, for every pair of the first `length` places.
            "local": the same where |t - s| < window, 0 beyond (eq. 3): distant keys still count.
            "conv": a number an offset below `window` and a head, 0 beyond (section 3.4), normalised, with a gain
                and a shift that start at 0. No limit on the length.
            "simple": 0.
        window: of "local" and "conv"; a token is in its own window. None: 32.
        heads: of "conv": neighbouring channels with the same w. None: as many as leave each 16 channels or more.
        length: of "full" and "local": the most tokens of a document; a longer one is an error. None: 2048.
        rank: of "full" and "local": features of u and v. None: 128.
        bias: on the four projections.
        causal: False makes the bidirectional form, sums over the whole document; it takes no state.

    State: "simple" three float32 numbers a channel (`AFTSimpleState`); "local" and "conv" also the last window - 1 keys
    and values (`AFTWindowState`); "full" all keys and values (`AFTFullState`).

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D^2), and "full" O(T^2 (D + rank)), "local" and "conv" O(T window D)
        train memory: O(T D), and "full" and "local" O(T rank)
        prefill: as train time, forward
        decode: O(D^2) a token, and "full" O(T (D + rank)), "local" and "conv" O(window D)
        state bytes: T*2*D*b + 8 if variant == "full" else
            3*D*max(4, b) + 8 + ((window - 1)*2*D*b + 8 if window else 0)
    """

    def __init__(
        self,
        width: int,
        variant: str = "conv",
        window: int | None = None,
        heads: int | None = None,
        length: int | None = None,
        rank: int | None = None,
        bias: bool = False,
        causal: bool = True,
    ):
        super().__init__(width)
        chosen = _choose(variant, {"window": window, "heads": heads, "length": length, "rank": rank})
        self.variant, self.window = variant, chosen.get("window")
        self.causal = causal  # pyright: ignore[reportAttributeAccessIssue]  # this class has both forms
        self.qkv = Linear(width, 3 * width, bias=bias)
        self.out = Linear(width, width, bias=bias)
        for linear in (self.qkv, self.out) if bias else ():
            tag(linear, "bias", weight_decay=False)
        self.mix: Full | Windowed | Simple
        if variant == "full":
            self.mix = Full(width, **chosen)
        elif variant == "local":
            self.mix = Windowed(width, Band(**chosen))
        elif variant == "conv":
            count = chosen.get("heads") or _heads(width)
            if width % count:
                raise ValueError(f"heads={count} must divide width={width}; try {_divisor(width, count)}")
            self.mix = Windowed(width, Offsets(chosen["window"], count, causal))
        else:
            self.mix = Simple(width)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        if not self.causal:
            raise ValueError("AFT with causal=False is bidirectional and has no state")
        device = self.qkv.weight.device if device is None else device
        return self.mix.init_state(batch, device=device, dtype=dtype or self.qkv.weight.dtype)

    def state_bytes(self, tokens: int, *, dtype: torch.dtype = torch.float32) -> int:
        """Constant but for "full": it grows by a key and a value a token (and 8 bytes, once a row has had padding or a
        second document, which is not counted here)."""
        constant = super().state_bytes(tokens, dtype=dtype)
        return constant + (tokens * 2 * self.width * dtype.itemsize if self.variant == "full" else 0)

    def flops_per_token(self, context: int) -> int:
        """Four matrices, the gate and the average 3 a channel; a running sum 12 a channel. A key of "full" takes 4 a
        channel and the bias 2 · rank, one within a window 6 a channel besides."""
        flops, seen = 4 * 2 * self.width**2 + 3 * self.width, context + 1
        if isinstance(self.mix, Full):
            return flops + seen * (4 * self.width + 2 * self.mix.bias.rank)
        flops += 12 * self.width
        if isinstance(self.mix, Windowed):
            bias = self.mix.bias
            reach = min(seen, bias.window if self.causal else 2 * bias.window - 1)
            flops += reach * (6 * self.width + (2 * bias.rank if isinstance(bias, Band) else 0))
        return flops

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        if not self.causal:
            y = self._both_sides(x, None) if segments is None else each_document(self._both_sides, x, segments)
            return Out(y, None, {})
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0)  # a NaN at padding would reach weights' gradients
        q, k, v = self.qkv(x).chunk(3, -1)
        average, state = self.mix(k, v, state, segments)
        y = self.out(torch.sigmoid(q) * average.to(x.dtype))
        if segments is not None and self.out.bias is not None:
            y = torch.where((segments != 0)[..., None], y, 0)
        return Out(y, state, {})

    def _both_sides(self, x: Tensor, mask: Int[Tensor, "batch time"] | None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        average = self.mix.both_sides(k, v, None if mask is None else mask != 0)
        return self.out(torch.sigmoid(q) * average.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.width}, variant={self.variant!r}, causal={self.causal}"


class Simple(nn.Module):
    """AFT-simple: w = 0. The running average is that of `ops.wkv` with neither decay nor bonus."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def init_state(self, batch: int, *, device: Any, dtype: torch.dtype) -> AFTSimpleState:
        sums = empty_state(batch, self.width, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return AFTSimpleState(*sums, torch.zeros(batch, device=device, dtype=torch.long))

    def forward(
        self,
        k: Float[Tensor, "batch time width"],
        v: Float[Tensor, "batch time width"],
        state: AFTSimpleState | None,
        segments: Int[Tensor, "batch time"] | None,
    ) -> tuple[Float[Tensor, "batch time width"], AFTSimpleState | None]:
        """Causal averages, and the state after the call where one is given."""
        sums, given = None, state
        if state is not None:
            fresh = self.init_state(k.shape[0], device=k.device, dtype=state.numerator.dtype)
            given = enter(state, fresh, segments)
            sums = given[:3]
        none = torch.zeros(self.width, device=k.device, dtype=torch.promote_types(k.dtype, torch.float32))
        y, final = wkv(k.contiguous(), v.contiguous(), none, none, initial_state=sums, segments=segments)
        if state is None:
            return y, None
        numerator, denominator, maximum = (each.to(state.numerator.dtype) for each in final)
        return y, AFTSimpleState(numerator, denominator, maximum, leave(state.segment, segments))

    def both_sides(
        self,
        k: Float[Tensor, "batch time width"],
        v: Float[Tensor, "batch time width"],
        valid: Bool[Tensor, "batch time"] | None,
    ) -> Float[Tensor, "batch time width"]:
        """Averages over each row's whole document; `valid` is false behind its end."""
        wide = torch.promote_types(k.dtype, torch.float32)
        sums: Sums = total(k.to(wide), v.to(wide), valid)
        return average(sums)[:, None].expand(-1, k.shape[1], -1)


def _choose(variant: str, given: dict[str, int | None]) -> dict[str, Any]:
    """The options of a variant, with its defaults; an option that it has no use for is an error."""
    if variant not in DEFAULTS:
        raise ValueError(
            f"variant={variant!r} is unknown{nearest(variant, DEFAULTS)}; choose from {', '.join(DEFAULTS)}"
        )
    known = DEFAULTS[variant]
    for name, value in given.items():
        if value is not None:
            if name not in known:
                users = ", ".join(each for each, names in DEFAULTS.items() if name in names)
                raise ValueError(f"{name}={value!r} is of no use to variant={variant!r}, only to {users}; leave it out")
            integer(name, value)
    return {name: default if given[name] is None else given[name] for name, default in known.items()}


def _divisor(width: int, most: int) -> int:
    """The largest divisor of width up to `most`."""
    return next(count for count in range(min(width, most), 0, -1) if width % count == 0)


def _heads(width: int) -> int:
    """As many heads as leave each 16 channels or more."""
    return _divisor(width, max(1, width // 16))
