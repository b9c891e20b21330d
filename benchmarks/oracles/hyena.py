"""The Hyena operator: HazyResearch/safari, src/models/sequence/hyena.py (seen at 02220c6)."""

import sys
from typing import Any

import torch
from torch import nn

import zoo
from benchmarks.oracles import difference, perturb, report, source, stand_in

WIDTH, FILTER = 24, 16
# order, length the filter is made for, positional features, frequency, inner layers of the filter, tokens, window
CASES = [
    (2, 64, 33, 14, 2, 64, {}),
    (3, 50, 5, 1, 1, 37, {"shift": 0.1}),
    (4, 64, 3, 10, 0, 41, None),
    (5, 40, 9, 3, 1, 40, {"fast": 0.2, "slow": 2.0}),
]


class OptimModule(nn.Module):
    """What theirs inherits: a parameter with a learning rate of its own, or a buffer where that is 0."""

    def register(self, name: str, tensor: torch.Tensor, lr: float | None = None, wd: float = 0.0) -> None:
        if lr == 0.0:
            self.register_buffer(name, tensor)
        else:
            self.register_parameter(name, nn.Parameter(tensor))


def load(path: Any) -> Any:
    """Their module, without the training framework around it."""
    for name in ("src", "src.utils", "src.models"):
        stand_in(name)
    registry = stand_in("src.utils.registry", layer={})
    sys.modules["src.utils"].registry = registry  # type: ignore[attr-defined]
    stand_in("src.utils.train", OptimModule=OptimModule)
    assign = lambda self, **options: self.__dict__.update(options)  # noqa: E731
    stand_in("src.utils.config", instantiate=lambda *_, **__: theirs.HyenaFilter, auto_assign_attrs=assign)
    stand_in("src.models.nn", Activation=lambda _: nn.Identity())
    sys.path.insert(0, str(path / "src" / "models" / "sequence"))
    import hyena as theirs  # pyright: ignore[reportMissingImports]

    return theirs


def weights(theirs: nn.Module, order: int) -> dict[str, torch.Tensor]:
    """Theirs under our names."""
    given = theirs.state_dict()
    found = {
        f"{part}_proj.{name}": given[f"{part}_proj.{name}"] for part in ("in", "out") for name in ("weight", "bias")
    }
    found |= {"conv.weight": given["short_filter.weight"][:, 0], "conv.bias": given["short_filter.bias"]}
    found["D"] = given["filter_fn.bias"].reshape(WIDTH, order - 1).t().flatten()
    found["filter.frequency"] = given["filter_fn.implicit_filter.1.freq"][0]
    linear = [name.removesuffix("weight") for name in given if "implicit_filter" in name and name.endswith("weight")]
    for index, name in enumerate(linear[:-1]):
        found |= {f"filter.layers.{index}.{part}": given[name + part] for part in ("weight", "bias")}
    return found | {"filter.out.weight": given[linear[-1] + "weight"]}


def main() -> None:
    reference = load(source(__doc__))
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    for order, length, features, frequency, layers, time, window in CASES:
        names = {"fast": "fast_decay_pct", "slow": "slow_decay_pct", "shift": "shift"}
        modulation: dict[str, Any] = {"modulate": False} if window is None else {"fast_decay_pct": 0.3}
        modulation |= {names[name]: value for name, value in (window or {}).items()}
        theirs = reference.HyenaOperator(
            WIDTH,
            length,
            order=order,
            filter_order=FILTER,
            emb_dim=features,
            w=frequency,
            num_inner_mlps=layers,
            **modulation,
        )
        sizes = {"filter_width": FILTER, "filter_layers": layers, "bands": (features - 1) // 2, "frequency": frequency}
        ours = zoo.block("hyena", WIDTH, order=order, length=length, window=window, **sizes)
        positions = theirs.filter_fn.pos_emb.z.detach().clone()
        perturb(theirs, 0.1)
        with torch.no_grad():
            theirs.filter_fn.pos_emb.z.copy_(positions)  # a parameter there, the formula's values here
        ours.load_state_dict(weights(theirs, order))
        x = torch.randn(3, time, WIDTH)
        wanted, found = theirs(x), ours(x).y
        state = ours.init_state(3)
        tokens = []
        for token in x.split(1, 1):
            y, state, _ = ours(token, state)
            tokens.append(y)
        of = [(theirs.in_proj.weight, "in_proj"), (theirs.filter_fn.implicit_filter[0].weight, "filter.layers.0")]
        right = torch.autograd.grad(wanted.square().sum(), [weight for weight, _ in of])
        mine = torch.autograd.grad(found.square().sum(), [ours.get_parameter(f"{name}.weight") for _, name in of])
        gradients = max(difference(a, b) for a, b in zip(mine, right, strict=True))
        decoded = difference(torch.cat(tokens, 1), wanted)
        report(f"order {order}, window {window}", y=difference(found, wanted), gradients=gradients, decoded=decoded)


if __name__ == "__main__":
    main()
