"""Hyena (Poli et al., 2302.10866): long convolutions with implicit filters, interleaved with gates."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from ops import long_conv
from ops import segments as seg
from zoo.block import Out, leave, tag
from zoo.ssm import hyena_online as online
from zoo.ssm.hyena_distill import Distilled, distil
from zoo.ssm.hyena_filter import WINDOW, ImplicitFilter
from zoo.ssm.hyena_gates import GatedConvolutions, Short


class HyenaState(NamedTuple):
    """Grows with the tokens fed, padding included: the inputs of the long convolutions are all kept.

    The tokens of the document that a row is in are the last of its `fed` slots, without a gap; before them are zeros.
    """

    conv: Float[Tensor, "batch taps_1 inner"]  # the last inputs of the short convolution, oldest first
    # [0, fed): inputs; [fed, room): what they give to the outputs to come; float32 at least. See hyena_online.
    slots: Float[Tensor, "batch room channels"]
    # Tokens fed, as a shape that holds nothing: what is due at a token follows from it without a look at values.
    fed: UInt8[Tensor, "batch fed 0"]
    segment: Int[Tensor, " batch"]


class Hyena(GatedConvolutions):
    """Gated long convolutions with implicit filters (2302.10866): every earlier token in O(T log T).

    (x_0, ..., x_{N-1}, v) = conv(W_in u);  v = x_{N-1} ⊙ v;
    v = x_{N-2-s} ⊙ (h^s ∗ v + D^s ⊙ v) for s = 0 ... N-2;  y = W_out v;  N = order.

    As in the published code the first of the paper's N long convolutions (definition 3.1) is the short one, so N - 1
    filters a channel are learned. The filters are functions of the lag: see `ImplicitFilter`.

    With a state the convolution goes on exactly. Tokens that follow one another in every row cost O(log² T) each
    (amortised, in chunks of any sizes: `hyena_online`), of which some tokens pay much more than others: each 2^k-th one
    a transform over 2^k. A call in which a row is padded or begins another document costs O(T log T). For a state of
    constant size `distill` the block. torch.compile makes a graph of its own for every number of tokens seen: decode
    without it, or from a distilled block.

    Args:
        width: features of x, and channels of each convolution.
        order: N, gates and one more than long convolutions; at least 2.
        length: tokens in the filters' unit of time, such as the training length; longer sequences are fine.
        conv_width: taps of the short convolution over all order + 1 branches.
        filter_width, filter_layers: of the filters' network: hidden features, hidden layers behind the first.
        bands: complex exponentials among its inputs.
        frequency: of its sines at the start.
        window: {"fast", "slow", "target", "shift"} (some of them), or None for filters without a window.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D^2 order + T D order log T + T filter_width (filter_width filter_layers + D order))
        train memory: O(T D order + T filter_width filter_layers)
        prefill: O(T D^2 order + T D order log T + T filter_width (filter_width filter_layers + D order))
        decode: O(D^2 order + D order log^2 T + filter_width (filter_width filter_layers + D order) log T) a token,
            amortised
        state bytes: (conv_width - 1)*(order + 1)*D*b + (T and 1 << T.bit_length())*(order - 1)*D*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        order: int = 2,
        length: int = 1024,
        conv_width: int = 3,
        filter_width: int = 64,
        filter_layers: int = 2,
        bands: int = 16,
        frequency: float = 14.0,
        window: Mapping[str, float] | None = WINDOW,
    ):
        super().__init__(width, order, conv_width)
        self.length = length
        self.filter = ImplicitFilter(
            width, self.stages, length, filter_width, filter_layers, bands, frequency, window
        )  # fmt: skip
        self.D = nn.Parameter(torch.randn(self.channels))
        tag(self, "D", weight_decay=False)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> HyenaState:
        dtype = dtype or self.in_proj.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        return HyenaState(
            self.conv.init_state(batch, device=device, dtype=dtype),
            torch.zeros(batch, 0, self.channels, device=device, dtype=wide),
            torch.zeros(batch, 0, 0, device=device, dtype=torch.uint8),
            torch.zeros(batch, device=device, dtype=torch.long),
        )

    def state_bytes(self, tokens: int, *, dtype: torch.dtype = torch.float32) -> int:
        wide = torch.promote_types(dtype, torch.float32)
        short = (self.conv_width - 1) * (self.order + 1) * self.width * dtype.itemsize
        return short + online.room(tokens) * self.channels * wide.itemsize + 8

    def flops_per_token(self, context: int) -> int:
        """Projections, the short convolution and gates, and the mean of the online convolution's costs: for each k a
        2^{k+1}-th of three transforms over 2^{k+1} numbers (5/2 n log n each), one product and the filters' network."""
        levels = range((context + 1).bit_length())
        transforms = sum(self.channels * (7.5 * (level + 1) + 4) + self.filter.flops() for level in levels)
        return self.outer_flops() + round(transforms) + 4 * self.channels + self.filter.flops()

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: HyenaState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        short = None if state is None else Short(state.conv, state.segment)
        v, gates, conv = self.project(x, short, segments)
        if state is None:
            kernel = self.filter(x.shape[1])
            for index, gate in enumerate(gates):
                v = self._convolve(index, v, kernel, gate, segments=segments)
            return Out(self.finish(v, segments), None, {})
        if segments is None or _in_order(state.segment, segments):
            v, slots = self._go_on(v, gates, state)
        else:
            v, slots = self._realign(v, gates, state, segments)
        fed = torch.cat([state.fed, state.fed.new_zeros(x.shape[0], x.shape[1], 0)], 1)
        state = HyenaState(conv.to(state.conv.dtype), slots, fed, leave(state.segment, segments))
        return Out(self.finish(v, segments), state, {})

    def distill(self, modes: int, taps: int | None = None) -> Distilled:
        """A `HyenaModal` block whose filters are `modes` decaying oscillations a channel (2310.18780), fitted to the
        first `taps` lags of this block's (default: `length`), and how far they are from them. This block stays.

        The new block has a state of constant size. Beyond `taps` its filters are what the oscillations become.
        """
        return distil(self, self.filter, self.D, modes, self.length if taps is None else taps)

    def _convolve(self, index: int, v: Tensor, kernel: Tensor, gate: Tensor, **given: Any) -> Tensor:
        channels = self.stage(index)
        return long_conv(v, kernel[channels], self.D[channels], gate, **given)

    def _go_on(self, v: Tensor, gates: list[Tensor], state: HyenaState) -> tuple[Tensor, Tensor]:
        """Tokens that follow the state's in every row: block by block, see `hyena_online`."""
        clock, time = state.fed.shape[1], v.shape[1]
        kernel = self.filter(online.lags(clock, time))
        in_place = _may_write(state.slots, v, kernel, self.D)
        slots = online.grown(state.slots, clock + time)
        outputs = []
        for begin, size in online.blocks(clock, time):
            now = slice(begin - clock, begin - clock + size)
            u, inputs = v[:, now], []
            for index, gate in enumerate(gates):
                inputs.append(u)
                due = slots[:, begin : begin + size, self.stage(index)]
                u = self._convolve(index, u, kernel[:, :size], gate[:, now], response=due)
            slots = online.put(slots, begin, torch.cat(inputs, -1), kernel, in_place)
            outputs.append(u)
        return torch.cat(outputs, 1), slots

    def _realign(
        self, v: Tensor, gates: list[Tensor], state: HyenaState, segments: Int[Tensor, "batch time"]
    ) -> tuple[Tensor, Tensor]:
        """Any padding and any documents: one convolution over all that is kept, and the slots anew."""
        clock, time = state.fed.shape[1], v.shape[1]
        kernel = self.filter(online.room(clock + time))
        found = seg.runs(segments)
        now = seg.first(segments)
        goes_on = (now == 0) | (state.segment == 0) | (now == state.segment)
        history = torch.where(goes_on[:, None, None], state.slots[:, :clock], 0)
        inputs = []
        for index, gate in enumerate(gates):
            inputs.append(v)
            past = history[..., self.stage(index)]
            v = self._convolve(index, v, kernel[:, : clock + time], gate, history=past, segments=segments)
        documents = found.run.amax(1, keepdim=True)
        # Only the last document goes on; `history` is zeros where that is not the state's.
        kept = torch.cat([(documents <= 1).expand(-1, clock), found.valid & (found.run == documents)], 1)
        tokens = torch.cat([history, torch.cat(inputs, -1).to(history.dtype)], 1)
        return v, online.rebuilt(online.aligned(tokens, kept), kernel)


def _in_order(segment: Int[Tensor, " batch"], segments: Int[Tensor, "batch time"]) -> bool:
    """Whether every token of a call is the next of the document that its row is in, or its row is padding so far (zeros
    in its slots stay zeros). One host synchronisation; a compiled graph cannot have it and takes the general way."""
    if torch.compiler.is_compiling():
        return False
    document = torch.where(segment == 0, segments[:, 0], segment)[:, None]
    return bool((segments == document).all())


def _may_write(slots: Tensor, *others: Tensor) -> bool:
    """Whether slots may be written in place: no gradient will want what is there now, nor does a graph hold them."""
    if torch.compiler.is_compiling() or slots.requires_grad:
        return False
    if torch.is_grad_enabled() and any(each.requires_grad for each in others):
        return False
    return torch.is_inference_mode_enabled() or not slots.is_inference()
