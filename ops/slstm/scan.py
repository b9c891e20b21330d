"""sLSTM for any device, forward and backward a loop over time inside one torch custom op each.

Tensors are [time, heads, batch, gates · size] inside: a step is one batched matrix product for all heads and a dozen
pointwise operations. Backward, everything that depends on one token's numbers alone is computed for all tokens at once
from the stored memories; the loop carries no more than the gradients of h, c and n.

A dimension of 4 that holds no gates holds h, c, n, m.
"""

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import logsigmoid

from ops import segments as seg
from ops.precision import full_precision
from ops.slstm import EMPTY

State = tuple[Tensor, Tensor, Tensor, Tensor]


def slstm(
    logits: Float[Tensor, "batch time 4 width"],
    R: Float[Tensor, "heads size 4 size"],
    state: State,
    segments: Int[Tensor, "batch time"] | None,
) -> tuple[Float[Tensor, "batch time width"], State]:
    """See `ops.slstm`."""
    arguments = (logits, R, torch.stack(state), None if segments is None else seg.marks(segments))
    differentiable = torch.is_grad_enabled() and any(each.requires_grad for each in arguments[:3])
    if differentiable or torch.compiler.is_compiling():
        y, last, _ = _slstm(*arguments, differentiable)
    else:  # decoding: the dispatcher of custom ops costs time
        y, last, _ = _forward(*arguments, False)
    return y, (last[0], last[1], last[2], last[3].detach())


def _forward(
    logits: Float[Tensor, "batch time 4 width"],
    R: Float[Tensor, "heads size 4 size"],
    first: Float[Tensor, "4 batch width"],
    mark: UInt8[Tensor, "batch time"] | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with full_precision(logits.device):
        given = rearrange(logits, "b t g (h s) -> t h b (g s)", h=len(R)).contiguous()
        rates = R.flatten(2)
        h, c, n, m = rearrange(first, "k b (h s) -> k h b s", h=len(R)).contiguous()
        time = len(given)
        stored = given.new_empty(time if save else 0, 4, *h.shape)
        outputs = []
        for t in range(time):
            before = h, c, n, m
            if mark is not None:
                start = (mark[:, t] == 2)[:, None]
                h, c, n = (each.masked_fill(start, 0) for each in (h, c, n))
                m = m.masked_fill(start, EMPTY)
            i, f, z, o = torch.baddbmm(given[t], h, rates).chunk(4, -1)
            past = logsigmoid(f) + m
            m = torch.maximum(past, i)
            keep, write = torch.exp(past - m), torch.exp(i - m)
            c = torch.addcmul(keep * c, write, torch.tanh(z))
            n = torch.addcmul(write, keep, n)
            h = torch.sigmoid(o) * c / n
            if mark is not None:
                valid = (mark[:, t] != 0)[:, None]
                outputs.append(torch.where(valid, h, 0))
                h, c, n, m = (torch.where(valid, new, old) for new, old in zip((h, c, n, m), before, strict=True))
            else:
                outputs.append(h)
            if save:
                torch.stack((h, c, n, m), out=stored[t])
        y = rearrange(torch.stack(outputs), "t h b s -> b t (h s)").contiguous()
        last = rearrange(torch.stack((h, c, n, m)), "k h b s -> k b (h s)").contiguous()
    return y, last, stored


def _backward(
    logits: Float[Tensor, "batch time 4 width"],
    R: Float[Tensor, "heads size 4 size"],
    first: Float[Tensor, "4 batch width"],
    mark: UInt8[Tensor, "batch time"] | None,
    stored: Float[Tensor, "time 4 heads batch size"],
    gy: Float[Tensor, "batch time width"],
    glast: Float[Tensor, "4 batch width"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of logits, R and first (m's is 0). With ∂ the gradient of what has a name:

    ∂c += ∂h o / n;  ∂n -= ∂h h / n;  ∂ĩ = (∂c z + ∂n) i;  ∂f̃ = (∂c c_{t-1} + ∂n n_{t-1}) f σ(-f̃);  ∂z̃ = ∂c i (1 - z²);
    ∂õ = ∂h h (1 - o);  then ∂c *= f, ∂n *= f, ∂h = Rᵀ ∂logits, with i and f divided by e^m.
    """
    with full_precision(logits.device):
        heads = len(R)
        h, _, n, m = stored.unbind(1)
        before = torch.cat([rearrange(first, "k b (h s) -> 1 k h b s", h=heads), stored[:-1]])
        valid = start = None
        if mark is not None:
            marks = rearrange(mark, "b t -> t 1 b 1")
            valid, start = marks != 0, marks == 2
            nothing = torch.tensor([0, 0, 0, EMPTY], dtype=first.dtype, device=first.device).reshape(4, 1, 1, 1)
            before = torch.where(start[:, None], nothing, before)
        h0, c0, n0, m0 = before.unbind(1)
        given = rearrange(logits, "b t g (h s) -> t h b g s", h=heads)
        i, f, z, o = (given + einsum(h0, R, "t h b i, h i g o -> t h b g o")).unbind(-2)
        z, o = torch.tanh(z), torch.sigmoid(o)
        keep, write = torch.exp(logsigmoid(f) + m0 - m), torch.exp(i - m)
        forgot = keep * torch.sigmoid(-f)
        of_c = torch.stack([write * z, forgot * c0, write * (1 - z * z)], -2)  # of i, f and z
        of_n = torch.stack([write, forgot * n0], -2)  # of i and f
        of_o, to_c, to_n = h * (1 - o), o / n, h / n
        gh = rearrange(gy, "b t (h s) -> t h b s", h=heads)
        if valid is not None:
            # At padding the memory passes as it is; what was computed there from n = 0 is not finite.
            keep = torch.where(valid, keep, 1)
            of_o, to_c, to_n, gh = (torch.where(valid, each, 0) for each in (of_o, to_c, to_n, gh))
            of_c, of_n = (torch.where(valid[..., None], each, 0) for each in (of_c, of_n))

        back = rearrange(R, "h i g o -> h (g o) i")
        dgiven = torch.empty_like(given, memory_format=torch.contiguous_format)
        dh, dc, dn, _ = rearrange(glast, "k b (h s) -> k h b s", h=heads)
        for t in reversed(range(len(gh))):
            dh = dh + gh[t]
            dc = torch.addcmul(dc, dh, to_c[t])
            dn = torch.addcmul(dn, dh, to_n[t], value=-1)
            now = dgiven[t]
            torch.mul(dc[..., None, :], of_c[t], out=now[..., :3, :])
            now[..., :2, :].addcmul_(dn[..., None, :], of_n[t])
            torch.mul(dh, of_o[t], out=now[..., 3, :])
            dc, dn = dc * keep[t], dn * keep[t]
            earlier = now.flatten(-2) @ back
            if valid is not None and start is not None:
                earlier = torch.where(valid[t], earlier.masked_fill(start[t], 0), dh)
            dh = earlier
        dR = einsum(h0, dgiven, "t h b i, t h b g o -> h i g o")
        dfirst = torch.stack([dh, dc, dn, torch.zeros_like(dh)])
        dlogits = rearrange(dgiven, "t h b g s -> b t g (h s)").contiguous()
    return dlogits, dR.contiguous(), rearrange(dfirst, "k h b s -> k b (h s)").contiguous()


@torch.library.custom_op("zoo::slstm_scan", mutates_args=())
def _slstm(logits: Tensor, R: Tensor, first: Tensor, mark: Tensor | None, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """h of every token, the last memory [4, batch, width] and, where `save`, every token's, as it is inside."""
    return _forward(logits, R, first, mark, save)


@_slstm.register_fake
def _(logits, R, first, mark, save):
    batch, time, _, width = logits.shape
    stored = logits.new_empty(time if save else 0, 4, R.shape[0], batch, R.shape[1])
    return logits.new_empty(batch, time, width), logits.new_empty(4, batch, width), stored


@torch.library.custom_op("zoo::slstm_scan_backward", mutates_args=())
def _slstm_backward(
    logits: Tensor, R: Tensor, first: Tensor, mark: Tensor | None, stored: Tensor, gy: Tensor, glast: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(logits, R, first, mark, stored, gy, glast)


@_slstm_backward.register_fake
def _(logits, R, first, mark, stored, gy, glast):
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(each, memory_format=contiguous) for each in (logits, R, first))


def _setup(ctx, inputs, output):
    assert inputs[4], "a differentiable call stores the memories"
    ctx.save_for_backward(*inputs[:3], *(() if inputs[3] is None else inputs[3:4]), output[2])
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx, gy, glast, _):
    logits, R, first, *mark, stored = ctx.saved_tensors
    return (*_slstm_backward(logits, R, first, mark[0] if mark else None, stored, gy, glast), None, None)


_slstm.register_autograd(_gradients, setup_context=_setup)
