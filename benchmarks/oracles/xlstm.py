"""sLSTM's layer, and mLSTM's parallel form: NX-AI/xlstm, xlstm/blocks/slstm/layer.py with the "vanilla" cell and
xlstm/blocks/mlstm/backends.py (seen at 032a6fb)."""

import sys

import torch
from einops import rearrange
from torch import nn

from benchmarks.oracles import difference, perturb, report, source
from zoo.recurrent.mlstm import MLSTM, MLSTMState
from zoo.recurrent.slstm import SLSTM

WIDTH, HEADS, TIME = 24, 4, 41


def give(theirs: nn.Module, ours: SLSTM) -> dict[str, torch.Tensor]:
    """Their weights for ours. What their layer calls fgate computes the input gate's logits, and the reverse."""
    gates = [getattr(theirs, name).weight for name in ("fgate", "igate", "zgate", "ogate")]
    kernel = theirs.slstm_cell._recurrent_kernel_
    return {
        "W": torch.stack([rearrange(each, "h o i -> h i o") for each in gates], 2),
        "R": rearrange(kernel, "h (g o) i -> h i g o", g=4),
        "bias": rearrange(theirs.slstm_cell._bias_, "(g c) -> g c", g=4),
        "norm_weight": 1 + theirs.group_norm.weight,
        "conv.weight": theirs.conv1d.conv.weight[:, 0],
        "conv.bias": theirs.conv1d.conv.bias,
    }


def slstm() -> None:
    from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig  # pyright: ignore[reportMissingImports]

    for standard in (False, True):
        torch.manual_seed(0)
        initial = "standard" if standard else "zeros"
        config = sLSTMLayerConfig(
            embedding_dim=WIDTH, num_heads=HEADS, backend="vanilla", recurrent_weight_init=initial
        )
        theirs, ours = sLSTMLayer(config), SLSTM(WIDTH, HEADS)
        report("sLSTM, forget gates at the start", bias=difference(ours.bias, give(theirs, ours)["bias"]))
        perturb(theirs, 0.3)
        ours.load_state_dict(give(theirs, ours))
        x = 3 * torch.randn(2, TIME, WIDTH)
        mine, right = (x.clone().requires_grad_() for _ in range(2))
        y, wanted = ours(mine).y, theirs(right)
        direction = torch.randn_like(wanted)
        (y * direction).sum().backward()
        (wanted * direction).sum().backward()
        report(
            f"sLSTM, R {initial}",
            y=difference(y, wanted),
            dx=difference(mine.grad, right.grad),
            dR=difference(
                ours.R.grad, rearrange(theirs.slstm_cell._recurrent_kernel_.grad, "h (g o) i -> h i g o", g=4)
            ),
            dbias=difference(ours.bias.grad.flatten(), theirs.slstm_cell._bias_.grad),
        )
        with torch.no_grad():
            state, found, cache, parts = ours.init_state(2), [], {}, []
            for part in (x[:, :17], *x[:, 17:].split(1, 1)):
                out = ours(part, state)
                state = out.state
                found.append(out.y)
                given = theirs(part, **cache, return_last_state=True)
                parts.append(given[0])
                cache = given[1]
        report(
            "sLSTM, decoded",
            y=difference(torch.cat(found, 1), torch.cat(parts, 1)),
            memory=difference(torch.stack(state[1:5]), cache["slstm_state"]),
        )


def mlstm() -> None:
    from xlstm.blocks.mlstm.backends import parallel_stabilized_simple  # pyright: ignore[reportMissingImports]

    torch.manual_seed(1)
    ours, size = MLSTM(WIDTH, HEADS, eps=1e-300), WIDTH // HEADS
    q, k, v = (torch.randn(2, TIME, HEADS, size) for _ in range(3))
    log_i, logits = (3 * torch.randn(2, TIME, HEADS) for _ in range(2))
    nothing = MLSTMState(torch.zeros(2, HEADS, size, size + 1), torch.zeros(2, HEADS), torch.zeros(2).long())
    h, *_ = ours.remember(q, k, v, log_i, nn.functional.logsigmoid(logits), nothing, None)
    parts = [rearrange(each, "b t h ... -> b h t ...") for each in (q, k, v, log_i[..., None], logits[..., None])]
    wanted = parallel_stabilized_simple(*parts, eps=0.0)
    report("mLSTM, the parallel form", h=difference(h, rearrange(wanted, "b h t v -> b t h v")))


def main() -> None:
    sys.path.insert(0, str(source(__doc__)))
    torch.set_default_dtype(torch.float64)
    slstm()
    mlstm()


if __name__ == "__main__":
    main()
