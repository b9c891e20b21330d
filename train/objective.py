"""What a model is trained for: what it reads and must say, what is measured. `NextToken` and `Masked`, by
`ModelConfig.objective`; the LightningModule asks no further.
"""

import hashlib
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from train.data.tokenizer import Bytes
from train.data.windows import IGNORED
from train.masking import MaskingConfig, Vocabulary, mask_tokens, rows
from zoo.config import ModelConfig

Batch = dict[str, Tensor]
LN2 = 0.6931471805599453


class Task(NamedTuple):
    """What the network reads, and what it must say at each position (`IGNORED` where nothing is asked)."""

    tokens: Int[Tensor, "batch time"]
    targets: Int[Tensor, "batch time"]


class Objective(Protocol):
    """One of the things a model can be trained for."""

    curve: str  # the validation metric that is drawn over the run
    label: str  # its name and unit for people
    counted: int  # how many sums `count` returns
    reads_logits: bool  # whether `count` does; without, a validation batch has none (see LanguageModel's `targets`)

    def setup(self, data: Any, vocab_size: int) -> None:
        """Learn from the data module what is needed. Raises ValueError where data and model do not fit."""
        ...

    def training(self, batch: Batch, generator: torch.Generator) -> Task: ...

    def validation(self, batch: Batch) -> Task:
        """The same for the same windows, whenever and in whatever batches they come."""
        ...

    def count(self, logits: Tensor, task: Task, nats: Tensor, batch: Batch) -> Float[Tensor, " counted"]:
        """Sums over a validation batch, which add up over batches and ranks."""
        ...

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """What is logged, from the sums over the validation text."""
        ...

    def told(self, metrics: dict[str, float]) -> dict[str, str]:
        """What the bar shows beside the curve's own value, by name."""
        ...

    def summary(self, metrics: dict[str, float]) -> str:
        """A line at the end of a run; empty for none."""
        ...


def objective(config: ModelConfig, masking: MaskingConfig) -> Objective:
    """The objective that a model's configuration names."""
    if config.objective == "masked":
        return Masked(masking)
    if masking != MaskingConfig():
        raise ValueError(
            f"model.masking={masking} is for a masked model, but model.network.objective={config.objective!r}; "
            "leave it out, or set objective to masked"
        )
    return NextToken()


class NextToken:
    """Each token from those before it."""

    curve, label, counted, reads_logits = "val/bits_per_byte", "bits/byte", 3, False

    def setup(self, data: Any, vocab_size: int) -> None:
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is not None and tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"the tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, but the model has "
                f"vocab_size={vocab_size}; set model.network.vocab_size to {tokenizer.vocab_size}"
            )

    def training(self, batch: Batch, generator: torch.Generator) -> Task:
        return Task(batch["tokens"], batch["targets"])

    def validation(self, batch: Batch) -> Task:
        return Task(batch["tokens"], batch["targets"])

    def count(self, logits: Tensor, task: Task, nats: Tensor, batch: Batch) -> Tensor:
        return torch.stack([nats, (task.targets != IGNORED).sum(), batch["bytes"].sum()]).double()

    def metrics(self, sums: list[float]) -> dict[str, float]:
        nats, tokens, size = sums
        return {"val/loss": nats / max(tokens, 1), "val/bits_per_byte": nats / LN2 / max(size, 1)}

    def told(self, metrics: dict[str, float]) -> dict[str, str]:
        return {}

    def summary(self, metrics: dict[str, float]) -> str:
        return ""


class Masked:
    """Hidden tokens from all others; see `train.masking`. Measured beside the unigram baseline, which knows how often
    each token stands in the training text and nothing of the context: it always guesses the most frequent one."""

    counted, reads_logits = 5, True

    def __init__(self, masking: MaskingConfig):
        self.masking = masking
        self._unit("token")

    def _unit(self, unit: str) -> None:
        self.unit, self.curve, self.label = unit, f"val/masked_bits_per_{unit}", f"bits/masked {unit}"

    def setup(self, data: Any, vocab_size: int) -> None:
        tokenizer = data.tokenizer
        self.vocabulary = Vocabulary.of(tokenizer)
        if rows(tokenizer) > vocab_size:
            raise ValueError(
                f"the tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens and its mask token is "
                f"{tokenizer.mask}, but the model has vocab_size={vocab_size}; set model.network.vocab_size to "
                f"{rows(tokenizer)}"
            )
        self._unit("byte" if isinstance(tokenizer, Bytes) else "token")
        counts = torch.zeros(rows(tokenizer), dtype=torch.float64)
        counts[: tokenizer.vocab_size] = torch.from_numpy(data.counts()).double()
        counts = torch.where(self.vocabulary.ordinary, counts + 1, 0)  # a token never seen is possible yet
        self.unigram_nats = -(counts / counts.sum()).log()
        self.most_frequent = int(counts.argmax())

    def training(self, batch: Batch, generator: torch.Generator) -> Task:
        self.vocabulary = self.vocabulary.to(batch["tokens"].device)
        found = mask_tokens(
            batch["tokens"], batch.get("segments"), generator, self.vocabulary, self.masking, batch.get("fresh")
        )
        return Task(*found)

    def validation(self, batch: Batch) -> Task:
        """Drawn for each window from its own tokens."""
        made: list[Task] = []
        for row in range(len(batch["tokens"])):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            digest = hashlib.sha256(one["tokens"].cpu().numpy().tobytes()).digest()
            made.append(self.training(one, torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))))
        return Task(*(torch.cat(each) for each in zip(*made, strict=True)))

    def count(self, logits: Tensor, task: Task, nats: Tensor, batch: Batch) -> Tensor:
        chosen = task.targets != IGNORED
        wanted = task.targets[chosen]
        self.unigram_nats = self.unigram_nats.to(wanted.device)
        right = (logits[chosen].argmax(-1) == wanted).sum()
        guessed = (wanted == self.most_frequent).sum()
        return torch.stack([nats.double(), chosen.sum(), right, guessed, self.unigram_nats[wanted].sum()])

    def metrics(self, sums: list[float]) -> dict[str, float]:
        nats, chosen, right, guessed, unigram = sums
        number = max(chosen, 1)
        return {
            "val/loss": nats / number,
            self.curve: nats / LN2 / number,
            "val/masked_accuracy": right / number,
            f"val/unigram_bits_per_{self.unit}": unigram / LN2 / number,
            "val/unigram_accuracy": guessed / number,
        }

    def told(self, metrics: dict[str, float]) -> dict[str, str]:
        if "val/masked_accuracy" not in metrics:
            return {}
        model, unigram = metrics["val/masked_accuracy"], metrics["val/unigram_accuracy"]
        return {"masked accuracy": f"{model:.1%}", "unigram": f"{unigram:.1%}"}

    def summary(self, metrics: dict[str, float]) -> str:
        told = self.told(metrics)
        if not told:
            return ""
        return (
            f"masked accuracy {told['masked accuracy']} (always the most frequent token: {told['unigram']}), "
            f"{metrics[self.curve]:.3f} {self.label} (unigram: {metrics[f'val/unigram_bits_per_{self.unit}']:.3f})"
        )
