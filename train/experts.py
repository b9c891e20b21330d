"""Experts that no token visits are named while there is time to do something about it."""

from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from zoo.config import ModelConfig

CHOICES = "/sum/choices"  # what a mixture of experts calls its count of choices an expert


class DeadExperts(lightning.Callback):
    """Every `window` optimizer steps warns of each expert that no token of any rank has visited since the last look.

    Counts stay on their device in between. They are part of the checkpoint: a resumed run looks at the same steps.
    """

    def __init__(self, window: int = 100):
        if window < 1:
            raise ValueError(f"window={window} must be at least 1")
        self.window = window
        self.steps = 0
        self.counts: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop._should_accumulate() or not pl_module.sums:  # no step, or one that was skipped
            return
        for name, value in pl_module.sums.items():
            if name.endswith(CHOICES):
                self.counts[name] = self.counts[name].to(value) + value if name in self.counts else value
        self.steps += 1
        if self.steps == self.window:
            for line in dead(self.counts, pl_module.network.config):
                rank_zero_warn(f"step {trainer.global_step}: {line} in the last {self.window} steps")
            self.steps, self.counts = 0, {}

    def state_dict(self) -> dict[str, Any]:
        return {"window": self.window, "steps": self.steps, "counts": self.counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["window"] == self.window:  # else begin a window of the new length
            self.steps, self.counts = state_dict["steps"], dict(state_dict["counts"])


def dead(counts: dict[str, Tensor], config: ModelConfig) -> list[str]:
    """A line for each block with experts of count 0: "block 3 (moe): experts 2, 5 took no token"."""
    found: list[str] = []
    specs = config.blocks()
    for name, value in counts.items():
        experts = torch.nonzero(value == 0).flatten().tolist()
        if experts:
            place, *inner = name.removesuffix(CHOICES).split("/")
            index = int(place.removeprefix("blocks."))
            where = "/".join([f"block {index} ({specs[index].kind})", *inner])
            numbers = ", ".join(map(str, experts))
            found.append(f"{where}: expert{'s' * (len(experts) > 1)} {numbers} took no token")
    return found
