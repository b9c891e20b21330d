"""Synthetic sequence tasks that separate families of mixers: selective copying, induction heads, associative recall.

A task makes batches of `tokens` and `targets`: `targets[b, t]` is what the logits at position t must say, `IGNORED`
where nothing is asked. Data is fresh at every call and a function of the generator alone. Every answer can be read off
the tokens up to its position, so perfect accuracy is possible, and a guess is right once in `choices`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Int
from torch import Generator, Tensor

IGNORED = -100  # what cross_entropy skips


class Batch(NamedTuple):
    tokens: Int[Tensor, "batch time"]
    targets: Int[Tensor, "batch time"]


class Task(Protocol):
    """`training` makes one step's batch of about `tokens` tokens, of one of the sizes in `trained`; `tests` names the
    sizes that a model is tested at, and `test` makes a batch of one of them."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def choices(self) -> int: ...
    @property
    def trained(self) -> tuple[int, ...]: ...
    @property
    def tests(self) -> Mapping[str, int]: ...
    def length(self, size: int) -> int: ...
    def training(self, generator: Generator, step: int, steps: int, tokens: int) -> Batch: ...
    def test(self, generator: Generator, size: int, batch: int) -> Batch: ...


class Sized:
    """Training on several sizes in turn: at first on the two smallest, from the middle of the steps on, on all.

    Every step has about as many tokens as any other, so small sizes have more rows. Small models learn what is asked
    from the small sizes and then hold it over the large ones; on the largest alone most stay at guessing for long.
    """

    def training(self: Task, generator: Generator, step: int, steps: int, tokens: int) -> Batch:
        sizes = self.trained
        allowed = min(len(sizes), 2 + 2 * (len(sizes) - 2) * step // steps)
        size = sizes[step % allowed]
        return self.test(generator, size, max(1, tokens // self.length(size)))


def places(generator: Generator, batch: int, length: int, count: int) -> Int[Tensor, "batch count"]:
    """`count` different positions below `length` for each row, uniform, in rising order."""
    return torch.rand(batch, length, generator=generator).argsort(1)[:, :count].sort(1).values


@dataclass(frozen=True)
class SelectiveCopying(Sized):
    """Copy `count` data tokens, which stand at random places among noise, in their order (2312.00752, section 4.1.1).

    `size` positions of noise (token 0) and data (1 to choices), then `count` markers (choices + 1); the logits at
    the m-th marker must say the m-th data token. A time-invariant convolution knows how long ago a token was, not
    which it was, and what it must skip changes from row to row. Tested also at contexts longer than any trained on.
    """

    trained: tuple[int, ...] = (16, 32, 64, 128)
    longer: tuple[int, ...] = (256, 512)
    count: int = 8
    choices: int = 14

    @property
    def vocab_size(self) -> int:
        return self.choices + 2

    @property
    def tests(self) -> Mapping[str, int]:
        return {f"{self.count} of {size}": size for size in self.trained + self.longer}

    def length(self, size: int) -> int:
        return size + self.count

    def test(self, generator: Generator, size: int, batch: int) -> Batch:
        data = torch.randint(1, self.choices + 1, (batch, self.count), generator=generator)
        tokens = torch.zeros(batch, self.length(size), dtype=torch.long)
        tokens.scatter_(1, places(generator, batch, size, self.count), data)
        tokens[:, size:] = self.choices + 1
        targets = torch.full_like(tokens, IGNORED)
        targets[:, size:] = data
        return Batch(tokens, targets)


@dataclass(frozen=True)
class InductionHeads(Sized):
    """Say what followed the special token when it stands there again (2312.00752, section 4.1.2; H3, 2212.14052).

    Uniform tokens 0 to choices - 1; the special token (choices) stands at one random place and at the last position,
    where the logits must say the token after its first occurrence. Tested also at lengths longer than any trained on.
    """

    trained: tuple[int, ...] = (16, 32, 64, 128)
    longer: tuple[int, ...] = (256, 512, 1024)
    choices: int = 16

    @property
    def vocab_size(self) -> int:
        return self.choices + 1

    @property
    def tests(self) -> Mapping[str, int]:
        return {f"length {size}": size for size in self.trained + self.longer}

    def length(self, size: int) -> int:
        return size

    def test(self, generator: Generator, size: int, batch: int) -> Batch:
        tokens = torch.randint(self.choices, (batch, size), generator=generator)
        first = torch.randint(size - 2, (batch, 1), generator=generator)  # the answer stands before the last position
        tokens.scatter_(1, first, self.choices)
        tokens[:, -1] = self.choices
        targets = torch.full_like(tokens, IGNORED)
        targets[:, -1:] = tokens.gather(1, first + 1)
        return Batch(tokens, targets)


@dataclass(frozen=True)
class AssociativeRecall(Sized):
    """Multi-query associative recall (Zoology, 2312.04927, section 3): for each key asked for again, say its value.

    `size` pairs of a key and its value (different keys of 1 to choices, values of choices + 1 to 2 choices), then
    2 · size positions in which every key stands once more, at random places in random order among noise (token 0). The
    logits at a repeated key must say its value. A row has 4 · size positions.
    """

    trained: tuple[int, ...] = (4, 8, 16, 32, 64)
    choices: int = 64

    @property
    def vocab_size(self) -> int:
        return 2 * self.choices + 1

    @property
    def tests(self) -> Mapping[str, int]:
        return {f"{size} pairs": size for size in self.trained}

    def length(self, size: int) -> int:
        return 4 * size

    def test(self, generator: Generator, size: int, batch: int) -> Batch:
        if size > self.choices:
            raise ValueError(f"size={size} pairs need as many different keys; choices={self.choices}")
        keys = 1 + torch.rand(batch, self.choices, generator=generator).argsort(1)[:, :size]
        values = torch.randint(self.choices + 1, self.vocab_size, (batch, size), generator=generator)
        asked = torch.rand(batch, size, generator=generator).argsort(1)
        where = 2 * size + places(generator, batch, 2 * size, size)
        tokens = torch.zeros(batch, self.length(size), dtype=torch.long)
        tokens[:, 0 : 2 * size : 2] = keys
        tokens[:, 1 : 2 * size : 2] = values
        tokens.scatter_(1, where, keys.gather(1, asked))
        targets = torch.full_like(tokens, IGNORED).scatter_(1, where, values.gather(1, asked))
        return Batch(tokens, targets)
