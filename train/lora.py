"""LoRA: adapters in the place of all weights. The saved model stays as it is; see `zoo.hf.lora`."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.hf.lora import lora_config, require_peft
from zoo.hf.pretrained import ZooPreTrainedModel

SAMPLED = 2**16  # numbers of a tensor by which it is known again


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (2106.09685) are trained, and nothing else: W x becomes W x + alpha / rank · B A x.

    Args:
        rank: rows of A, columns of B.
        alpha: their product is weighed by alpha / rank.
        dropout: on the adapters' inputs.
        targets: names of the linear maps (and experts' matrices) that get an adapter, e.g. [qkv, out]; null: those of
            all blocks but thin ones that make gates and steps.
        dtype: of the frozen weights; null: as they are saved. Adapters are in float32 at least.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} must be at least 1")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha={self.alpha} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} is a probability: from 0 to below 1")
        if self.targets is not None and not self.targets:
            raise ValueError("lora.targets=[] names nothing to train; leave it out for the usual ones")


class Adapters:
    """Adapters on a model's network, which they change in place: its own weights are frozen from here on.

    `base`: where the model came from, by which the saved adapters name it.
    """

    def __init__(self, model: ZooPreTrainedModel, config: LoRAConfig, base: str):
        peft = require_peft()
        if config.dtype is not None:
            model.to(getattr(torch, config.dtype))
        # What must be the same when a run is resumed.
        self.about = asdict(config) | {"base": fingerprint(model.model)}
        local = Path(base).expanduser()
        model.name_or_path = str(local.resolve()) if local.is_dir() else base
        chosen = lora_config(model, config.rank, config.alpha, config.dropout, config.targets)
        self.peft = peft.get_peft_model(model, chosen)
        self.network = model.model
        self.names = {name for name, each in self.network.named_parameters() if each.requires_grad}

    @property
    def on_experts(self) -> str:
        """The experts' matrices that have adapters, for people; empty for none."""
        return ", ".join(sorted(self.peft.active_peft_config.target_parameters or []))

    def told(self) -> str:
        """For people: what is trained."""
        count = {name: each.numel() for name, each in self.network.named_parameters()}
        trained = sum(count[name] for name in self.names)
        config = self.peft.active_peft_config
        parts = ", ".join([*sorted(config.target_modules), *filter(None, [self.on_experts])])
        whole = sum(count.values()) - trained
        return f"adapters of rank {config.r} on {parts}: {trained:,} weights train beside {whole:,} frozen ones"

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write them as peft does, with the weights of the network's `state`."""
        whole = {f"base_model.model.model.{name}": value for name, value in state.items()}
        self.peft.save_pretrained(folder, state_dict=whole, save_embedding_layers=False)


def fingerprint(network: nn.Module) -> str:
    """A hash of a network's weights, of some of each tensor's numbers: sums of integers, the same on every machine."""
    found = hashlib.sha256()
    tensors = {name: each for name, each in network.state_dict().items() if isinstance(each, Tensor)}
    for name, value in tensors.items():
        bits = value.detach().flatten()[:: max(1, value.numel() // SAMPLED)].contiguous().view(torch.uint8)
        found.update(f"{name} {tuple(value.shape)} {int(bits.long().cumsum(0).sum())};".encode())
    return found.hexdigest()
