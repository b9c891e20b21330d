"""The recurrences: fla-org/flash-linear-attention, the plain loops in fla/ops/*/naive.py (seen at bc3b101)."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.oracles import difference, report, source
from ops import delta_rule, linear_attention, linear_recurrence

BATCH, HEADS, TIME, K_DIM, V_DIM = 2, 3, 70, 5, 7
Pair = tuple[Tensor, Tensor | None]
Run = Callable[..., Pair]


def exact() -> None:
    """They round to float32 in several ways; in float64 they are an oracle to the last bits."""
    to = torch.Tensor.to
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.Tensor.to = lambda x, *a, **k: x if torch.float32 in (*a, *k.values()) else to(x, *a, **k)  # type: ignore


def compare(name: str, inputs: list[Tensor], theirs: Run, ours: Run) -> None:
    """Values, last states and gradients. `theirs` and `ours` take and give [batch, time, heads, ...]."""
    inputs = [each.detach().requires_grad_() for each in inputs]

    def run(function: Run, **options: Any) -> list[Tensor]:
        y, S = function(*inputs, **options)
        weight = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
        total = (y * weight).sum() + (0 if S is None else S.square().sum())
        return [y, *([] if S is None else [S]), *torch.autograd.grad(total, inputs)]

    wanted = run(theirs)
    found = {}
    for impl in ("chunked", "reference"):
        got = run(ours, impl=impl)
        found[impl] = max(difference(a, b) for a, b in zip(got[-len(wanted) :], wanted, strict=True))
    report(name, **found)


def by_head(function: Callable[..., Any], **options: Any) -> Run:
    """A loop over [batch, heads, time, ...] as one over [batch, time, heads, ...]."""

    def run(*inputs: Tensor) -> Pair:
        y, S = function(*(each.transpose(1, 2) for each in inputs), **options)
        return y.transpose(1, 2), S

    return run


def main() -> None:
    folder: Path = source(__doc__) / "fla" / "ops"
    exact()
    torch.manual_seed(0)

    def naive(name: str, file: str = "naive") -> dict[str, Any]:
        return runpy.run_path(str(folder / name / f"{file}.py"))

    final, scale = {"output_final_state": True}, K_DIM**-0.5
    q, k, a, b = (torch.randn(BATCH, TIME, HEADS, K_DIM) for _ in range(4))
    k = torch.nn.functional.normalize(k, dim=-1)
    v = torch.randn(BATCH, TIME, HEADS, V_DIM)
    beta = torch.rand(BATCH, TIME, HEADS)
    decay, decays = (
        -torch.exp(2 * torch.randn(BATCH, TIME, HEADS)),
        -torch.exp(2 * torch.randn(BATCH, TIME, HEADS, K_DIM)),
    )
    a = torch.nn.functional.normalize(a, dim=-1)
    b = -torch.sigmoid(b) * a

    def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, impl: str) -> Pair:
        return linear_attention(q, k, v, decay, scale=scale, impl=impl)[:2]

    def retain(q: Tensor, k: Tensor, v: Tensor, impl: str) -> Pair:
        decay = torch.log1p(-(2.0 ** (-5 - torch.arange(HEADS))))
        return linear_attention(q, k, v, decay, scale=scale, impl=impl)[0], None

    def retention(*inputs: Tensor) -> Pair:
        return naive("retention")["naive_retention"](*(each.transpose(1, 2) for each in inputs)).transpose(1, 2), None

    compare("retention (theirs makes the decays in float32)", [q, k, v], retention, retain)
    gla = naive("gla")["naive_recurrent_gla"]
    compare("gla", [q, k, v, decays], lambda *x: gla(*x, **final), attend)
    finch = naive("rwkv6", "recurrent_naive")["naive_recurrent_rwkv6"]
    bonus = torch.randn(HEADS, K_DIM)
    compare(
        "rwkv6",
        [q, k, v, decays, bonus],
        lambda q, k, v, w, u: by_head(lambda *x: finch(*x, u, scale=1.0, **final))(q, k, v, w),
        lambda q, k, v, w, u, impl: linear_attention(q, k, v, w, bonus=u, impl=impl)[:2],
    )
    hgrn = naive("hgrn")["naive_recurrent_hgrn"]
    compare(
        "hgrn",
        [v[:, :, 0], -torch.rand(BATCH, TIME, V_DIM)],
        lambda x, g: hgrn(x, g, **final),
        lambda x, g, impl: linear_recurrence(x, g.exp(), impl=impl)[:2],
    )
    delta = naive("delta_rule")["delta_rule_recurrence"]
    compare(
        "delta_rule",
        [q, k, v, beta],
        by_head(delta),
        lambda *x, impl: delta_rule(*x, scale=scale, impl=impl),
    )
    gated = naive("gated_delta_rule")["naive_recurrent_gated_delta_rule"]
    kda = naive("kda")["naive_recurrent_kda"]
    for name, decayed, run in (
        ("gated_delta_rule", decay, lambda q, k, v, beta, g: gated(q, k, v, beta, g, **final)),
        ("kda", decays, lambda q, k, v, beta, g: kda(q, k, v, g, beta, **final)),
    ):
        compare(
            name,
            [q, k, v, beta, decayed],
            run,
            lambda q, k, v, beta, g, impl: delta_rule(q, k, v, beta, log_decay=g, scale=scale, impl=impl),
        )
    general = naive("generalized_delta_rule/dplr")["dplr_recurrence"]
    compare(
        "generalized_delta_rule",
        [q, k, v, a, b, decays],
        by_head(general),
        lambda q, k, v, a, b, g, impl: delta_rule(q, k, v, log_decay=g, erase=(a, b), scale=scale, impl=impl),
    )


if __name__ == "__main__":
    main()
