"""Experts whose matrices are matrix-product operators that share their largest tensor (MPOE, 2203.01104)."""

import inspect
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ops import gated, grouped_mm
from ops.precision import state_dtype
from zoo.block import Block
from zoo.layers.checks import integer, number
from zoo.layers.ffn import ACTIVATIONS, MLP, SwiGLU, activation_function, check_hidden, gated_hidden
from zoo.moe.parallel import local


def factorise(size: int, sites: int) -> list[int]:
    """`sites` factors of `size`, as even as its prime factors allow, large ones in the middle."""
    rest, primes, divisor = size, [], 2
    while rest > 1:
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        divisor += 1
    factors = [1] * sites
    for prime in reversed(primes):
        factors[factors.index(min(factors))] *= prime
    from_middle = sorted(range(sites), key=lambda site: abs(site - (sites - 1) / 2))
    placed = dict(zip(from_middle, sorted(factors, reverse=True), strict=True))
    return [placed[site] for site in range(sites)]


def bonds(inputs: Sequence[int], outputs: Sequence[int], bond: int | None) -> list[int]:
    """d_0 ... d_n of an operator with these factors: d_k = min(Π_{m≤k} i_m o_m, Π_{m>k} i_m o_m, bond), with
    which any matrix can be written if no `bond` caps them."""
    sizes = [i * o for i, o in zip(inputs, outputs, strict=True)]
    full = [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(len(sizes) + 1)]
    return full if bond is None else [min(each, bond) for each in full]


def decompose(
    matrix: Float[Tensor, "inputs outputs"], inputs: Sequence[int], outputs: Sequence[int], bond: int | None = None
) -> list[Tensor]:
    """The tensors [d_(k-1), i_k, o_k, d_k] of a matrix, by singular value decompositions from both ends.

    All but the middle one are orthogonal, so the middle one holds the matrix's size. Without `bond` their product is
    the matrix; with it, the squared distance is at most the sum of the squares of all singular values left out.
    Computed in float32 at least. O((inputs · outputs)^1.5) for even factors.
    """
    sites, middle = len(inputs), len(inputs) // 2
    d = bonds(inputs, outputs, bond)
    exact = matrix.to(state_dtype(matrix)).reshape(*inputs, *outputs)
    rest = exact.permute([axis for k in range(sites) for axis in (k, sites + k)]).reshape(1, -1)
    left: list[Tensor] = []
    right: list[Tensor] = []
    for k in range(middle):
        u, values, v = torch.linalg.svd(rest.reshape(d[k] * inputs[k] * outputs[k], -1), full_matrices=False)
        left.append(u[:, : d[k + 1]].reshape(d[k], inputs[k], outputs[k], d[k + 1]))
        rest = values[: d[k + 1], None] * v[: d[k + 1]]
    for k in reversed(range(middle + 1, sites)):
        u, values, v = torch.linalg.svd(rest.reshape(-1, inputs[k] * outputs[k] * d[k + 1]), full_matrices=False)
        right.append(v[: d[k]].reshape(d[k], inputs[k], outputs[k], d[k + 1]))
        rest = u[:, : d[k]] * values[: d[k]]
    return [*left, rest.reshape(d[middle], inputs[middle], outputs[middle], d[middle + 1]), *reversed(right)]


class MPOExperts(nn.Module):
    """Experts whose matrices are W_e = T_e1 ... T_e(m-1) C T_e(m+1) ... T_en, with one C for all experts (MPOE).

    Site k of a matrix [inputs, outputs] is a tensor [d_(k-1), i_k, o_k, d_k], where the i_k multiply to inputs, the o_k
    to outputs and neighbours are contracted over the bond d_k. C, in the middle, is the largest: experts share most of
    their parameters and differ in the auxiliary tensors around it. A matrix has
    d_(m-1) i_m o_m d_m + experts · Σ_(k≠m) d_(k-1) i_k o_k d_k parameters.

    Each call writes the matrices out, O(experts · inputs · outputs · d_(n-1)) whatever the number of tokens, and then
    works as on dense experts; the gradient reaches the tensors through them. While decoding only those of the chosen
    experts are written out.

    Options:
    - `bond`: upper bound of d_k; None: none, then any dense expert can be written (with no fewer parameters).
    - `sites`: how many tensors a matrix has, an odd number.
    - `activation`: "swiglu" (gate, value and down), or one of the block `mlp` (up and down).
    - `mask`: while training, the probability with which an expert's part of the gradient of C is left out. C gets the
      gradients of all experts, an auxiliary tensor only its expert's: this keeps C from running ahead (the paper's
      gradient mask). Drawn for each expert in each call.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        hidden: int | None = None,
        *,
        bond: int | None = None,
        sites: int = 3,
        activation: str = "swiglu",
        mask: float = 0.0,
    ):
        super().__init__()
        if integer("sites", sites, 3) % 2 == 0:
            raise ValueError(f"sites={sites} has no middle; use {sites - 1} or {sites + 1}")
        if not 0 <= number("mask", mask) < 1:
            raise ValueError(f"mask={mask!r} must be at least 0 and below 1, where the shared tensor would never learn")
        if activation != "swiglu" and activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is unknown; choose from swiglu, {', '.join(ACTIVATIONS)}")
        self.gated = activation == "swiglu"
        self.activation, self.mask = activation, mask
        self.bond = None if bond is None else integer("bond", bond, otherwise=", or None for no bound")
        usual = gated_hidden(width) if self.gated else 4 * width
        self.width, self.experts = width, experts
        self.hidden = usual if hidden is None else check_hidden(hidden)
        self.middle = sites // 2
        wide, inner = factorise(width, sites), factorise(self.hidden, sites)
        # What each matrix is called, and the factors of its inputs and outputs.
        rising = ("gate", "value") if self.gated else ("up",)
        self.factors: dict[str, tuple[list[int], list[int]]] = dict.fromkeys(rising, (wide, inner))
        self.factors["down"] = (inner, wide)
        stacked: list[str] = []
        for name, (inputs, outputs) in self.factors.items():
            d = bonds(inputs, outputs, self.bond)
            for k in range(sites):
                shape = (d[k], inputs[k], outputs[k], d[k + 1])
                own = () if k == self.middle else (experts,)
                self.register_parameter(f"{name}_{k}", nn.Parameter(torch.empty(*own, *shape)))
                if own:
                    stacked.append(f"{name}_{k}")
        self.per_expert = tuple(stacked)  # parameters whose first dimension counts experts
        self.reset_parameters()

    @classmethod
    def options(cls) -> list[str]:
        """The names of these experts' own options, besides the sizes."""
        return [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def sites(self, name: str) -> list[nn.Parameter]:
        """The tensors of a matrix, first to last."""
        return [getattr(self, f"{name}_{k}") for k in range(len(self.factors[name][0]))]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Auxiliary tensors orthogonal, as `decompose` makes them, C normal: a matrix has then the variance of an
        nn.Linear's, 1/(3 inputs)."""
        for name, (_, outputs) in self.factors.items():
            for k, site in enumerate(self.sites(name)):
                if k == self.middle:
                    nn.init.normal_(site, std=(math.prod(outputs) / (3 * site.numel())) ** 0.5)
                    continue
                # Towards the middle: bonds grow that way, so the longer side has orthonormal vectors.
                rows = math.prod(site.shape[1:-1]) if k < self.middle else math.prod(site.shape[2:])
                tall = torch.randn(self.experts, rows, site.numel() // self.experts // rows, device=site.device)
                made = torch.linalg.qr(tall).Q
                site.copy_((made if k < self.middle else made.mT).reshape(site.shape))

    @torch.no_grad()
    def from_dense(self, **matrices: Float[Tensor, "inputs outputs"]) -> "MPOExperts":
        """Make every expert the dense one of these matrices, as near as the bond allows; returns self.

        `gate`, `value` and `down` (`up` and `down` without a gate), as rows @ matrix. The experts start alike, as in
        the paper, where they come from one pretrained feed-forward layer.
        """
        if set(matrices) != set(self.factors):
            raise ValueError(f"these experts have the matrices {', '.join(self.factors)}, got {', '.join(matrices)}")
        for name, matrix in matrices.items():
            inputs, outputs = self.factors[name]
            wanted = (math.prod(inputs), math.prod(outputs))
            if tuple(matrix.shape) != wanted:
                raise ValueError(
                    f"{name} has shape {tuple(matrix.shape)}, these experts need [inputs, outputs]={wanted}"
                )
            for site, part in zip(self.sites(name), decompose(matrix, inputs, outputs, self.bond), strict=True):
                site.copy_(part)
        return self

    def matrix(self, name: str, chosen: Int[Tensor, " some"] | None = None) -> Float[Tensor, "some inputs outputs"]:
        """The matrices of this name written out, of the experts `chosen` or all that this process holds."""
        sites = [site if k == self.middle else local(site) for k, site in enumerate(self.sites(name))]
        if chosen is not None:
            sites = [site if k == self.middle else site[chosen] for k, site in enumerate(sites)]
        if self.training and self.mask and torch.is_grad_enabled():
            shared = sites[self.middle]
            learns = torch.rand(len(sites[0]), 1, 1, 1, 1, device=shared.device) >= self.mask
            sites[self.middle] = torch.where(learns, shared, shared.detach())
        whole = sites[0][:, 0]
        for site in sites[1:]:
            where = "e" if site.ndim == 5 else ""
            whole = torch.einsum(f"eIOd,{where}diof->eIiOof", whole, site).flatten(1, 2).flatten(2, 3)
        return whole[..., 0]

    def rising(self, chosen: Int[Tensor, " some"] | None = None) -> Float[Tensor, "some width inner"]:
        """The matrices from width to inner; of a gated unit the gate's columns, then the value's."""
        return torch.cat([self.matrix(name, chosen) for name in self.factors if name != "down"], -1)

    def activate(self, inner: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows hidden"]:
        if not self.gated:
            return activation_function(self.activation)(inner)
        return gated(inner, "silu")

    def forward(self, rows: Float[Tensor, "rows width"], sizes: Int[Tensor, " experts"]) -> Float[Tensor, "rows width"]:
        """Rows sorted by expert, `sizes` to each; rows behind the last expert's come out as zeros."""
        return grouped_mm(self.activate(grouped_mm(rows, self.rising(), sizes)), self.matrix("down"), sizes)

    def few(
        self,
        tokens: Float[Tensor, "tokens width"],
        chosen: Int[Tensor, "tokens k"],
        weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens width"]:
        """The weighted sum for a handful of tokens: the chosen experts' matrices alone, no gradients.
        Where `chosen` says "no expert" the last one runs, with weight 0."""
        index, (count, k) = chosen.clamp_max(self.experts - 1).reshape(-1), chosen.shape
        rows = tokens.repeat_interleave(k, 0)[:, None]
        rows = self.activate(rows @ self.rising(index)) @ self.matrix("down", index)
        return torch.einsum("nkd,nk->nd", rows.reshape(count, k, -1), weights.to(rows.dtype))

    def shared(self, hidden: int) -> Block:
        """A dense block: experts that every token visits, with so many hidden units together."""
        if self.gated:
            return SwiGLU(self.width, hidden=hidden)
        return MLP(self.width, hidden=hidden, activation=self.activation)

    def parameters_used(self, visits: int) -> int:
        """Parameters that a token uses which visits so many experts: what they share, once, and their own tensors."""
        own = sum(getattr(self, name).numel() for name in self.per_expert)
        return sum(p.numel() for p in self.parameters()) - own + visits * own // self.experts

    def flops(self, visits: int) -> int:
        """Forward FLOPs of a token in the matrices of the experts it visits. Writing them out comes once a call."""
        return 2 * visits * sum(math.prod(inputs) * math.prod(outputs) for inputs, outputs in self.factors.values())

    def extra_repr(self) -> str:
        return f"width={self.width}, experts={self.experts}, hidden={self.hidden}, bond={self.bond}"
