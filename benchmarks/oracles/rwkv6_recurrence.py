"""RWKV-6's recurrence: fla-org/flash-linear-attention, fla/ops/rwkv6/recurrent_naive.py (seen at bc3b101)."""

import runpy

import torch
from torch import Tensor

from benchmarks.oracles import difference, report, source
from ops import linear_attention

BATCH, HEADS, TIME, K_DIM, V_DIM = 2, 3, 70, 5, 7


def main() -> None:
    theirs = runpy.run_path(str(source(__doc__) / "fla/ops/rwkv6/recurrent_naive.py"))
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # they round to float32
    torch.manual_seed(0)
    q, k = (torch.randn(BATCH, HEADS, TIME, K_DIM) for _ in range(2))
    v, weight = (torch.randn(BATCH, HEADS, TIME, V_DIM) for _ in range(2))
    log_decay = -torch.exp(2 * torch.randn(BATCH, HEADS, TIME, K_DIM))
    # Sixteenths, and no gradient: they add it to float32 zeros.
    start = torch.randint(-16, 17, (BATCH, HEADS, K_DIM, V_DIM)) / 16
    inputs = [each.requires_grad_() for each in (q, k, v, log_decay, torch.randn(HEADS, K_DIM))]

    def gradients(y: Tensor, S: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad((y * weight).sum() + S.square().sum(), inputs)
        return dict(zip(("r", "k", "v", "decay", "bonus"), found, strict=True))

    y, S = theirs["naive_recurrent_rwkv6"](*inputs, scale=1.0, initial_state=start, output_final_state=True)
    wanted = {"y": y, "state": S} | gradients(y, S)
    for impl in ("chunked", "reference"):
        swapped = [each.transpose(1, 2) for each in inputs[:4]]
        found, last, _ = linear_attention(*swapped, bonus=inputs[4], initial_state=start, impl=impl)
        found = found.transpose(1, 2)
        both = {"y": found, "state": last} | gradients(found, last)
        report(f"{impl}, values and gradients", **{name: difference(both[name], wanted[name]) for name in wanted})


if __name__ == "__main__":
    main()
