"""Fits Hyena's filters with a few modes (Massaroli et al., 2310.18780, section 3.2): a state of constant size.

A filter h_0 ... h_{L-1} becomes 2 Re Σ_n R_n λ_nˡ. The modes start as Kung's (1978): the leading singular vectors of
the Hankel matrix H_ij = h_{1+i+j} span the observable space of the best small system, and a shift by one lag within it
has the λ as its eigenvalues. Then R and λ are fitted together by Levenberg and Marquardt's least squares, every channel
by itself. Lag 0 is exact: D takes what the modes lack there.
"""

import copy
import dataclasses
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from zoo.layers.checks import integer
from zoo.ssm.hyena_gates import GatedConvolutions
from zoo.ssm.hyena_modal import HyenaModal, ModalFilter

ROWS = 512  # of the Hankel matrix, at most: its squares cost memory, and what is slower the last fit finds
AT_ONCE = 1 << 24  # numbers of a Jacobian held at a time
STEPS = 60  # of the last fit
# Price of |R|² beside the squared error of a filter of norm 1: |R| stays so small that float32 rounds below the error.
RIDGE = 1e-10
SLOWEST, FASTEST = -1e-6, -6.0  # log |λ|; a mode that does not decay would keep what it has heard for ever


class Distilled(NamedTuple):
    """A block with modal filters, and its filters' errors over the fitted lags, relative to the filter's own norm and
    largest value: one a stage and channel."""

    block: HyenaModal
    l2: Float[Tensor, "stages width"]
    linf: Float[Tensor, "stages width"]


class DistilledModel(NamedTuple):
    """A model whose Hyena blocks have modal filters, the errors of those by block number, and what became of logits."""

    model: Any
    filters: dict[int, Distilled]
    logits_l2: float  # root mean square of the change, relative to that of the logits less their mean
    logits_linf: float  # largest change of a logit
    agreement: float  # share of positions with the same most likely token


@torch.no_grad()
def distil(block: GatedConvolutions, filters: nn.Module, D: Tensor, modes: int, taps: int) -> Distilled:
    """`Hyena.distill`: `filters(taps)` gives the filters to fit, stage after stage."""
    integer("modes", modes)
    least = 4 * modes + 2
    integer("taps", taps, least, f" to fit modes={modes}, 4 numbers each; pass more taps or fewer modes")
    wanted = filters(taps).double()
    log_a, residue = fit(wanted, modes)
    lacking = wanted[:, 0] - 2 * residue.real.sum(1)
    new = HyenaModal(block.width, block.order, modes, max(taps, 2), block.conv_width).to(D.device, D.dtype)
    for name in ("in_proj", "conv", "out_proj"):
        getattr(new, name).load_state_dict(getattr(block, name).state_dict())
    made = torch.zeros_like(wanted)  # by the new block's own parameters, as they are rounded
    for index, each in enumerate(new.filters):
        assert isinstance(each, ModalFilter) and each.D is not None
        channels = block.stage(index)
        each.assign(log_a[channels], residue[channels], D[channels] + lacking[channels])
        made[channels] = each.kernel(taps).double()
        made[channels, 0] += (each.D - D[channels]).double()
    error = made - wanted
    l2 = error.norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-300)
    linf = error.abs().amax(1) / wanted.abs().amax(1).clamp_min(1e-300)
    shape = (block.stages, block.width)
    return Distilled(new.train(block.training), l2.reshape(shape), linf.reshape(shape))


@torch.no_grad()
def distill_model(model: Any, modes: int, tokens: Int[Tensor, "batch time"], taps: int | None = None) -> DistilledModel:
    """A `zoo.LanguageModel` with each `hyena` block of its stack distilled (`Hyena.distill`), and the change in its
    logits on `tokens`. The model stays as it is. The new one has a configuration of its own and saves as any model.

    Raises ValueError for a model without a hyena block.
    """
    specs = model.config.blocks()
    found = [index for index, spec in enumerate(specs) if spec.kind == "hyena"]
    if not found:
        kinds = ", ".join(dict.fromkeys(spec.kind for spec in specs))
        raise ValueError(f"the model has no hyena block to distill; its stack holds {kinds}")
    new, filters = copy.deepcopy(model), {}
    stack = [{"kind": spec.kind, **spec.options} for spec in specs]
    for index in found:
        filters[index] = made = model.blocks[index].block.distill(modes, taps)
        new.blocks[index].block = made.block
        options = {"order": made.block.order, "modes": modes, "conv_width": made.block.conv_width}
        stack[index] = {"kind": "hyena_modal", **options}
    new.config = dataclasses.replace(model.config, stack=stack)
    before, after = (_logits(each, tokens) for each in (model, new))
    spread = before - before.mean(-1, keepdim=True)
    return DistilledModel(
        new,
        filters,
        float((after - before).norm() / spread.norm()),
        float((after - before).abs().max()),
        float((after.argmax(-1) == before.argmax(-1)).double().mean()),
    )


def _logits(model: Any, tokens: Tensor) -> Float[Tensor, "batch time vocab"]:
    """In evaluation mode: dropout is no change of the filters."""
    training = model.training
    try:
        return model.eval()(tokens).logits.double()
    finally:
        model.train(training)


# The fit -------------------------------------------------------------------------------------------------------


def fit(
    h: Float[Tensor, "channels taps"], modes: int
) -> tuple[Complex[Tensor, "channels n"], Complex[Tensor, "channels n"]]:
    """(log λ, R) of `modes` modes for each filter, fitted to lags 1 ... taps - 1. O(channels (m³ + taps m²)), m = 512
    or half the taps."""
    at_once = max(1, AT_ONCE // (4 * modes * h.shape[1]))
    parts = [_fit(part, modes) for part in h.double().split(at_once)]
    log_a, residue = (torch.cat(each) for each in zip(*parts, strict=True))
    return log_a, residue


def _fit(h: Tensor, modes: int) -> tuple[Tensor, Tensor]:
    # A filter of zeros has no norm, and no need for one.
    scale = h[:, 1:].norm(dim=1, keepdim=True)
    unit = h[:, 1:] / torch.where(scale > 0, scale, 1)
    log_a = _hankel_modes(unit, modes)
    log_a, residue = _refine(unit, log_a, _residues(unit, log_a))
    return log_a, residue * scale


def _powers(log_a: Tensor, taps: int) -> Complex[Tensor, "channels n taps"]:
    return torch.exp(log_a[..., None] * torch.arange(taps, device=log_a.device))


def _hankel_modes(g: Float[Tensor, "channels lags"], modes: int) -> Complex[Tensor, "channels n"]:
    """Kung's λ: g_l = h_{l+1}. Of each conjugate pair the one above the real line; a real one stands for itself."""
    rows = min(ROWS, g.shape[1] // 2)
    rank = min(2 * modes, rows - 1)
    found = []
    for each in g:  # one at a time: a Hankel matrix is large
        hankel = each.unfold(0, g.shape[1] - rows + 1, 1)
        _, vectors = torch.linalg.eigh(hankel @ hankel.t())
        span = vectors[:, -rank:]
        values = torch.linalg.eigvals(torch.linalg.pinv(span[:-1]) @ span[1:])
        values = values[values.imag > -1e-12]
        log_a = torch.log(torch.where(values.abs() > 0, values, 1e-12))
        log_a = torch.complex(log_a.real.clamp(FASTEST, SLOWEST), log_a.imag)
        # More than `modes` where some are real: those stay that the filter needs most.
        weight = _residues(each[None], log_a[None])[0].abs() / (-torch.expm1(2 * log_a.real)).sqrt()
        log_a = log_a[weight.argsort(descending=True)[:modes]]
        spare = torch.full((modes - log_a.numel(),), -1.0, device=g.device, dtype=log_a.dtype)
        found.append(torch.cat([log_a, spare]))
    return torch.stack(found)


def _residues(g: Float[Tensor, "channels lags"], log_a: Complex[Tensor, "channels n"]) -> Complex[Tensor, "channels n"]:
    """The best R for given λ, at lags 1 ...: linear least squares with a ridge, as λ may coincide."""
    columns = 2 * torch.view_as_real(_powers(log_a, g.shape[1] + 1)[..., 1:])
    basis = torch.cat([columns[..., 0], -columns[..., 1]], 1)
    gram = basis @ basis.mT
    ridge = RIDGE * torch.eye(gram.shape[1], device=g.device, dtype=g.dtype)
    solved = torch.linalg.solve(gram + ridge, basis @ g[..., None])[..., 0]
    return torch.complex(*solved.chunk(2, 1))


def _refine(
    g: Float[Tensor, "channels lags"],
    log_a: Complex[Tensor, "channels n"],
    residue: Complex[Tensor, "channels n"],
) -> tuple[Complex[Tensor, "channels n"], Complex[Tensor, "channels n"]]:
    """Levenberg-Marquardt over log |λ|, angle, Re R and Im R; a step that does not lower a channel's error is not
    taken there."""
    lag = torch.arange(1, g.shape[1] + 1, device=g.device)
    damping = torch.full_like(g[:, :1], 1e-3)
    price = RIDGE * (torch.arange(4 * log_a.shape[1], device=g.device) >= 2 * log_a.shape[1])

    def measure(log_a: Tensor, residue: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        waves = _powers(log_a, g.shape[1] + 1)[..., 1:]
        error = g - 2 * (residue[..., None] * waves).real.sum(1)
        total = error.square().sum(1, keepdim=True) + RIDGE * residue.abs().square().sum(1, keepdim=True)
        return error, waves, total

    error, waves, total = measure(log_a, residue)
    for _ in range(STEPS):
        moved = 2 * lag * residue[..., None] * waves
        slopes = torch.cat([moved.real, -moved.imag, 2 * waves.real, -2 * waves.imag], 1)
        gram = slopes @ slopes.mT
        diagonal = gram.diagonal(dim1=1, dim2=2)
        held = damping * diagonal + 1e-15 * diagonal.amax(1, keepdim=True) + price + 1e-300
        here = torch.cat([torch.zeros_like(log_a.real), torch.zeros_like(log_a.real), residue.real, residue.imag], 1)
        down = (slopes @ error[..., None])[..., 0] - price * here
        rate, angle, real, imag = torch.linalg.solve(gram + torch.diag_embed(held), down).chunk(4, 1)
        new_log_a = torch.complex((log_a.real + rate).clamp(FASTEST, SLOWEST), log_a.imag + angle)
        new_residue = residue + torch.complex(real, imag)
        new_error, new_waves, new_total = measure(new_log_a, new_residue)
        better = new_total < total  # never with a NaN
        damping = torch.where(better, damping / 4, damping * 3).clamp(1e-12, 1e12)
        log_a, residue = torch.where(better, new_log_a, log_a), torch.where(better, new_residue, residue)
        error, total = torch.where(better, new_error, error), torch.where(better, new_total, total)
        waves = torch.where(better[..., None], new_waves, waves)
    return log_a, residue
