"""mLSTM of xLSTM (Beck et al., 2405.04517) as in xLSTM 7B (2503.13427): a matrix memory with exponential gates."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ops import gated_norm, linear_attention
from ops.segments import marks
from zoo.block import Block, Out, enter, leave, tag
from zoo.layers.checks import integer, number
from zoo.layers.heads import up_to_four
from zoo.layers.linear import Linear
from zoo.layers.wide import WideLinear

LEAST = -80.0  # e^80 is finite in float32; where m is below, h is 0 to 30 digits


class MLSTMState(NamedTuple):
    """Constant size: qk_dim · (v_dim / heads + 1) + heads numbers and a document id a row."""

    S: Float[Tensor, "batch heads k_dim v_dim_1"]  # C e^-m and, as the last column, n e^-m; float32 at least
    m: Float[Tensor, "batch heads"]
    segment: Int[Tensor, " batch"]


class MLSTM(Block):
    """mLSTM (2405.04517): linear attention that forgets by a gate a head and writes by an exponential one.

    C_t = f_t C_{t-1} + i_t k_t v_tᵀ;  n_t = f_t n_{t-1} + i_t k_t;  h_t = C_tᵀ q_t / max(|n_t·q_t|, 1)   (eq. 19 to 27)
    for each head, with q over √d, d its key's size; i = exp(cap(W_i x + b_i)), f = σ(cap(W_f x + b_f)),
    cap(a) = c tanh(a / c);  y = W_out (σ(W_o x) ⊙ norm(h)), LayerNorm over each head, weights but no bias: the layer
    of xLSTM 7B.

    With m_t = max(log f_t + m_{t-1}, log i_t) (eq. 15), C e^-m and n e^-m are sums of a linear attention whose log
    decay log f_t + m_{t-1} - m_t and log weight log i_t - m_t are never positive: `ops.linear_attention` computes them,
    n as the memory of a value that is always 1, and h = C e^-m q / (max(|n e^-m·q|, e^-m) + eps). So gates of any size
    are safe. At the start next to nothing is forgotten (b_f from 3 to 6 over the heads) or written (b_i = -10), and W_i
    and W_f are 0. Biases and the norm's weight are kept out of weight decay.

    Options:
        heads: None: 4, or fewer where 4 do not divide both of the next.
        qk_dim, v_dim: channels of all heads; None: width / 2 and width, as in xLSTM 7B.
        soft_cap: c; None: no cap, as in the first paper.
        eps: as in xLSTM 7B. There m counts: in units of C and n it is eps e^m.

    Cost (T tokens, D = width, b bytes a number):
        train time: O(T D (qk_dim + v_dim) + T qk_dim v_dim / heads)
        train memory: O(T (qk_dim + v_dim + chunk heads)) and one state a chunk of 64 tokens
        prefill: O(T D (qk_dim + v_dim) + T qk_dim v_dim / heads)
        decode: O(D (qk_dim + v_dim) + qk_dim v_dim / heads) a token, whatever the context
        state bytes: (qk_dim*(v_dim//heads + 1) + heads)*max(4, b) + 8
    """

    def __init__(
        self,
        width: int,
        heads: int | None = None,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        soft_cap: float | None = 15.0,
        eps: float = 1e-6,
        norm_eps: float = 1e-6,
    ):
        super().__init__(width)
        self.qk_dim = max(1, width // 2) if qk_dim is None else integer("qk_dim", qk_dim)
        self.v_dim = width if v_dim is None else integer("v_dim", v_dim)
        self.heads = up_to_four(heads, qk_dim=self.qk_dim, v_dim=self.v_dim)
        if soft_cap is not None and number("soft_cap", soft_cap) <= 0:
            raise ValueError(f"soft_cap={soft_cap} must be positive; None caps nothing")
        if number("eps", eps) <= 0:
            raise ValueError(f"eps={eps} must be positive: |n·q| may be 0, and e^-m too small for float32")
        if number("norm_eps", norm_eps) < 0:
            raise ValueError(f"norm_eps={norm_eps} must not be negative")
        self.soft_cap, self.eps, self.norm_eps = soft_cap, eps, norm_eps
        self.sizes = (self.qk_dim, self.qk_dim, self.v_dim, self.v_dim)  # of q, k, v and the output's gate
        self.in_proj = Linear(width, sum(self.sizes), bias=False)
        self.gate_proj = WideLinear(width, 2 * self.heads)  # to the logits of i, then of f
        self.norm_weight = nn.Parameter(torch.ones(self.v_dim))
        self.out_proj = Linear(self.v_dim, width, bias=False)
        with torch.no_grad():
            self.gate_proj.weight.zero_()
            self.gate_proj.bias[: self.heads].fill_(-10)
            self.gate_proj.bias[self.heads :].copy_(torch.linspace(3, 6, self.heads))
        tag(self.gate_proj, "bias", weight_decay=False)
        tag(self, "norm_weight", weight_decay=False)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> MLSTMState:
        dtype = torch.promote_types(dtype or self.in_proj.weight.dtype, torch.float32)
        sizes = self.heads, self.qk_dim // self.heads, self.v_dim // self.heads + 1
        return MLSTMState(
            torch.zeros(batch, *sizes, device=device, dtype=dtype),
            torch.zeros(batch, self.heads, device=device, dtype=dtype),
            torch.zeros(batch, device=device, dtype=torch.long),
        )

    def flops_per_token(self, context: int) -> int:
        """The matrices; 5 a number of the state (decay, outer product, sum, read-out); 10 a value for denominator, norm
        and gate."""
        state = 5 * self.qk_dim * (self.v_dim // self.heads + 1)
        return super().flops_per_token(context) + state + 10 * self.v_dim

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: MLSTMState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        carried = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        if segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0)  # a NaN at padding would reach weights' gradients
            if state is not None:
                fresh = self.init_state(len(x), device=x.device, dtype=state.S.dtype)
                carried = enter(state, fresh, segments)
        q, k, v, o = self.in_proj(x).split(self.sizes, -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        if k.dtype == torch.float16:  # no room for e^(log i - m)
            q, k, v = q.to(wide), k.to(wide), v.to(wide)
        q, k, v = (each.unflatten(-1, (self.heads, -1)) for each in (q, k, v))
        gates = self.gate_proj(x)
        if self.soft_cap is not None:
            gates = self.soft_cap * torch.tanh(gates / self.soft_cap)
        log_i, logits = gates.split(self.heads, -1)
        h, S, m = self.remember(q, k, v, log_i, F.logsigmoid(logits), carried, segments)
        each = (self.heads, -1)
        h = gated_norm(
            h,
            o.unflatten(-1, each),
            self.norm_weight.unflatten(-1, each),
            eps=self.norm_eps,
            activation="sigmoid",
            center=True,
        )
        y = self.out_proj(h.flatten(-2))
        if state is None:
            return Out(y, None, {})
        return Out(y, MLSTMState(S.to(state.S.dtype), m.to(state.m.dtype), leave(state.segment, segments)), {})

    def remember(
        self,
        q: Float[Tensor, "batch time heads k_dim"],
        k: Float[Tensor, "batch time heads k_dim"],
        v: Float[Tensor, "batch time heads v_dim"],
        log_i: Float[Tensor, "batch time heads"],
        log_f: Float[Tensor, "batch time heads"],
        state: MLSTMState,
        segments: Int[Tensor, "batch time"] | None,
    ) -> tuple[
        Float[Tensor, "batch time heads v_dim"],
        Float[Tensor, "batch heads k_dim v_dim_1"],
        Float[Tensor, "batch heads"],
    ]:
        """h, in log_i's dtype, and the last S and m."""
        before = state.m.to(log_f.dtype)
        m = running_maximum(log_f, log_i, before, segments)
        log_decay = log_f + torch.cat([before[:, None], m[:, :-1]], 1) - m
        log_decay = log_decay - log_decay.detach().clamp_min(0)  # above 0 by rounding alone; the gradient stays whole
        weight = log_i - m
        if segments is not None:
            weight = torch.where((segments != 0)[..., None], weight, 0)  # m knows nothing of padding's gates
        both, S, _ = linear_attention(
            q,
            (k * weight.exp()[..., None]).to(k.dtype),
            F.pad(v, (0, 1), value=1.0),
            log_decay,
            scale=q.shape[-1] ** -0.5,
            initial_state=state.S,
            segments=segments,
        )
        both = both.to(log_i.dtype)
        total = torch.maximum(both[..., -1].abs(), torch.exp(-m.clamp_min(LEAST))) + self.eps
        return both[..., :-1] / total[..., None], S, m[:, -1]


def running_maximum(
    log_f: Float[Tensor, "batch time heads"],
    log_i: Float[Tensor, "batch time heads"],
    initial: Float[Tensor, "batch heads"],
    segments: Int[Tensor, "batch time"] | None,
) -> Float[Tensor, "batch time heads"]:
    """m_t = max(log f_t + m_{t-1}, log i_t), m = 0 before each document but the first of a row; padding repeats m.

    By doubling a window: log2(time) passes, and no difference of two long sums, which would lose their digits. It has a
    gradient: with eps, h depends on m.
    """
    rate, top = log_f, log_i
    if segments is not None:
        mark = marks(segments)[..., None]
        top = torch.where(mark == 2, torch.maximum(log_i, log_f), log_i)  # from m = 0
        top = torch.where(mark == 0, -torch.inf, top)
        rate = torch.where(mark == 1, log_f, torch.where(mark == 0, 0.0, -torch.inf).to(log_f.dtype))
    top = torch.cat([torch.maximum(top[:, :1], rate[:, :1] + initial[:, None]), top[:, 1:]], 1)
    window = 1
    while window < top.shape[1]:
        reached = torch.maximum(top[:, window:], rate[:, window:] + top[:, :-window])
        top = torch.cat([top[:, :window], reached], 1)
        rate = torch.cat([rate[:, :window], rate[:, window:] + rate[:, :-window]], 1)
        window *= 2
    return top
