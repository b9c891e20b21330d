"""One token of a model's end: its last norm and its head."""

from collections.abc import Callable

from numba import njit
from torch import Tensor

from ops import native_team
from ops.linear.kernels import OPTIONS, spread
from ops.native_array import array
from ops.step import Around, fresh, rows
from ops.step.norm import normed, unpack


def head(weight: Tensor, around: Around) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """x [batch, 1, width] -> norm(x), and weight · norm(x) [batch, 1, outputs]. The caller has asked `ops.step.fits`,
    and for each token `ops.step.takes`."""
    norm, matrix = unpack(around), array(weight)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, hidden_rows = fresh(*x.shape)
        y, y_rows = fresh(x.shape[0], 1, weight.shape[0])
        _run(native_team.threads(), rows(x)[:, 0], norm, matrix, hidden_rows[:, 0], y_rows[:, 0])
        return hidden, y

    return run


@njit(**OPTIONS)
def _run(threads, x, around, weight, hidden, y):
    hidden[:] = normed(x, around)
    spread(threads, weight, hidden, y)
