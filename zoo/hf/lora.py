"""Low-rank adapters (LoRA, 2106.09685) on zoo models, through peft: which parts get one, and peft's configuration.

model = ZooForCausalLM.from_pretrained("folder")
adapted = peft.get_peft_model(model, lora_config(model, rank=8))
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from zoo.hf.pretrained import ZooPreTrainedModel
from zoo.layers.spelling import nearest
from zoo.model import LanguageModel
from zoo.registry import block_class

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# kind -> names of its parts whose linear maps get no adapter unless asked for: maps that are thin themselves, and those
# that make gates, steps, decays or filters of tokens where the wide ones beside them make features. For Mamba this
# leaves in_proj, x_proj and out_proj, for RWKV the square maps and the channel mix, as is usual.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "mamba": ("dt_proj",),
    "dense_mamba": ("select",),  # its mixers are mamba's
    "hyena": ("filter",),
    "polysketch": ("sketch",),
    "rfa": ("gate",),
    "mlstm": ("gate_proj",),
    "gla": ("decay_proj",),
    "kda": ("decay_proj", "gate_proj"),
    "rwkv6": ("mix_encode", "decay_encode", "decay_decode"),
    "rwkv7": ("decay", "rate", "gate", "value_gate"),
    "moe": ("shared_gate",),
}


class Targets(NamedTuple):
    """Names of what gets an adapter within a `ZooPreTrainedModel`: linear maps, and experts' stacked matrices."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def require_peft() -> Any:
    """The package peft. Raises ImportError that tells how to install it."""
    try:
        import peft
    except ImportError as error:
        if (error.name or "").split(".")[0] != "peft":
            raise
        raise ImportError("LoRA adapters need peft: pip install 'efficient-zoo[peft]'") from error
    return peft


def is_adapter(folder: Any) -> bool:
    """Whether a folder holds an adapter as peft saves it."""
    return (Path(str(folder)) / CONFIG).is_file()


def adaptable(model: LanguageModel) -> Targets:
    """All that can get an adapter: every nn.Linear within a block, and the experts' matrices [experts, in, out]; but
    no router's."""
    modules, parameters = [], []
    for index, residual in enumerate(model.residuals):
        for name, module in residual.block.named_modules(prefix=f"model.blocks.{index}.block"):
            if "router" in name.split("."):
                continue
            if isinstance(module, nn.Linear):
                modules.append(name)
            for each in getattr(module, "per_expert", ()):
                value = getattr(module, each)
                if value.ndim == 3 and len(value) > 1:  # peft takes one alone for a matrix
                    parameters.append(f"{name}.{each}")
    return Targets(tuple(modules), tuple(parameters))


def usual_targets(model: LanguageModel) -> Targets:
    """What gets an adapter unless told otherwise: all that can, but what `LEFT_OUT` says of the blocks it is in."""
    left_out: dict[type, set[str]] = {block_class(kind): set(names) for kind, names in LEFT_OUT.items()}
    inside = [(f"model.{name}.", left_out[type(m)]) for name, m in model.named_modules() if type(m) in left_out]

    def kept(path: str) -> bool:
        return not any(path.startswith(to) and names & set(path[len(to) :].split(".")) for to, names in inside)

    return Targets(*(tuple(filter(kept, each)) for each in adaptable(model)))


def chosen_targets(model: LanguageModel, names: Sequence[str]) -> Targets:
    """What these names mean: the last part or parts of a path each ("qkv", "time_mix.key", "experts.up").

    Raises ValueError for a name that means nothing which can have an adapter.
    """
    possible = adaptable(model)
    for name in names:
        if not any(_ends(path, name) for part in possible for path in part):
            known = sorted({path.rpartition(".")[2] for part in possible for path in part})
            raise ValueError(
                f"lora.targets: {name!r} is no linear map of this model's blocks{nearest(name, known)}; "
                f"choose from {', '.join(known)}"
            )
    return Targets(*(tuple(p for p in part if any(_ends(p, name) for name in names)) for part in possible))


def lora_config(
    model: ZooPreTrainedModel,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> Any:
    """The `peft.LoraConfig` of adapters for a model: W x becomes W x + alpha / rank · B A x, with A of `rank` rows.

    `targets`: None for `usual_targets`, or names as `chosen_targets` reads them. A stack of experts gets one adapter an
    expert; its W + B A is made whole in every call. Raises ValueError where nothing can get an adapter, and for dropout
    on experts, whose inputs an adapter of a parameter does not see.
    """
    found = usual_targets(model.model) if targets is None else chosen_targets(model.model, targets)
    if not any(found):
        kinds = sorted({spec.kind for spec in model.model.config.blocks()})
        raise ValueError(f"nothing in blocks of kind {', '.join(kinds)} can have a LoRA adapter; train all weights")
    if dropout and found.parameters:
        linear = ", ".join(sorted({path.rpartition(".")[2] for path in found.modules}))
        raise ValueError(
            f"lora.dropout={dropout} cannot be applied before experts, whose matrices are stacked; set it to 0, or "
            f"lora.targets to other maps{f': [{linear}]' if linear else ''}"
        )
    return require_peft().LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_short(found.modules, (name for name, _ in model.named_modules())),
        target_parameters=_short(found.parameters, (name for name, _ in model.named_parameters()), least=2) or None,
        task_type="CAUSAL_LM" if model.can_generate() else None,
    )


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _short(chosen: Iterable[str], known: Iterable[str], least: int = 1) -> list[str]:
    """The shortest ends of the chosen names, of `least` parts or more, with which no other known name ends."""
    taken = set(chosen)
    others: set[str] = set()
    for path in set(known) - taken:
        parts = path.split(".")
        others.update(".".join(parts[start:]) for start in range(len(parts)))
    found = set()
    for path in taken:
        parts = path.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts) - least, -1, -1))
        found.add(next(end for end in ends if end not in others))
    return sorted(found)
