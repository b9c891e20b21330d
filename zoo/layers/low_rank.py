"""A linear map whose matrix is a product of two thin ones."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.block import tag
from zoo.layers.checks import integer
from zoo.layers.linear import Linear


def choose_rank(name: str, rank: int | None, usual: int, width: int) -> int:
    """`rank` if a matrix of this width can have it; None: `usual`, or the width where that is less."""
    if rank is None:
        return min(usual, width)
    if integer(name, rank) > width:
        raise ValueError(f"{name}={rank} is above width={width}, the rank of a full matrix; use at most {width}")
    return rank


class LowRankLinear(nn.Module):
    """y = x E D + b with E [inputs, rank], D [rank, outputs]: the linear encoder-decoder unit of LRT (1910.13923).

    `encode` holds E and `decode` holds D and the bias, as nn.Linear keeps them (transposed). rank · (inputs + outputs)
    parameters and multiply-adds a row in place of inputs · outputs. Initialised so that E D has the variance of an
    nn.Linear's matrix. Raises ValueError for a rank above that of the full matrix, which would only cost more.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool = False):
        super().__init__()
        full = min(integer("inputs", inputs), integer("outputs", outputs))
        if integer("rank", rank) > full:
            raise ValueError(
                f"rank={rank} is above {full}, the full rank of a matrix of {inputs} by {outputs}; "
                f"use at most rank={full}, or an nn.Linear"
            )
        self.inputs, self.outputs, self.rank = inputs, outputs, rank
        self.encode = Linear(inputs, rank, bias=False)
        self.decode = Linear(rank, outputs, bias=bias)
        if bias:
            tag(self.decode, "bias", weight_decay=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Variances 1/inputs and 1/(3 rank): an element of E D, a sum of `rank` products, has an nn.Linear's
        1/(3 inputs)."""
        nn.init.uniform_(self.encode.weight, -((3 / self.inputs) ** 0.5), (3 / self.inputs) ** 0.5)
        nn.init.uniform_(self.decode.weight, -(self.rank**-0.5), self.rank**-0.5)
        if self.decode.bias is not None:
            nn.init.uniform_(self.decode.bias, -(self.inputs**-0.5), self.inputs**-0.5)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, linear: nn.Linear, rank: int) -> "LowRankLinear":
        """The best map of this rank (Eckart & Young, 1936): the `rank` largest singular triples of the matrix.

        Its distance to the matrix is the next singular value in the spectral norm, the root of the sum of squares of
        all later ones in Frobenius'. Singular values are split evenly over both factors; the bias is kept. Computed
        in float32 at least. O(inputs · outputs · min(inputs, outputs)).
        """
        weight = linear.weight
        made = cls(linear.in_features, linear.out_features, rank, bias=linear.bias is not None)
        made = made.to(device=weight.device, dtype=weight.dtype)
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        root = values[:rank].sqrt()
        made.encode.weight.copy_(root[:, None] * right[:rank])
        made.decode.weight.copy_(left[:, :rank] * root)
        if linear.bias is not None:
            made.decode.bias.copy_(linear.bias)
        return made

    def dense(self) -> Float[Tensor, "outputs inputs"]:
        """The matrix E D as an nn.Linear's weight."""
        return self.decode.weight @ self.encode.weight

    @property
    def bias(self) -> Tensor | None:
        return self.decode.bias

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        return self.decode(self.encode(x))
