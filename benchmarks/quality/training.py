"""One run: a mixer trained on a task from a seed, and what it got right afterwards."""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from benchmarks.measure import machine
from benchmarks.quality.models import LAYERS, MIXERS, WIDTH, count, matched
from benchmarks.quality.tasks import IGNORED, AssociativeRecall, InductionHeads, SelectiveCopying, Task
from train.optim import OptimizerConfig, ScheduleConfig, build
from zoo.model import LanguageModel

HELD_OUT = 2**32  # seeds from here on are of data that no run trains on


@dataclass(frozen=True)
class Training:
    """`steps` of about `tokens` tokens; AdamW with `weight_decay` and blocks' own rates (train.optim), gradients
    clipped to norm 1, the rate warmed up over a twentieth of the steps and then a cosine to zero."""

    steps: int
    answers: int  # at least so many are tested at each size
    tokens: int = 1024
    weight_decay: float = 0.1
    init_std: float = 0.02  # of embedding and head


@dataclass(frozen=True)
class Setting:
    """What every mixer is trained on alike, and how."""

    task: Task
    training: Training


SETTINGS: dict[str, Setting] = {
    "selective_copying": Setting(SelectiveCopying(), Training(steps=2000, answers=2048)),
    "induction_heads": Setting(InductionHeads(), Training(steps=800, answers=256)),  # one answer a row
    "associative_recall": Setting(
        AssociativeRecall(),
        Training(steps=1200, answers=4096, tokens=2048, weight_decay=0.01, init_std=0.1),
    ),
}
RATES = (1e-2, 3e-3, 3e-2)


@torch.no_grad()
def accuracy(model: LanguageModel, task: Task, size: int, answers: int, seed: int) -> float:
    """Share of at least `answers` answers of one size that are right."""
    generator = Generator().manual_seed(HELD_OUT + seed)
    rows = max(1, 4096 // task.length(size))
    right = asked = 0
    while asked < answers:
        tokens, targets = task.test(generator, size, rows)
        where = targets != IGNORED
        said = model(tokens).logits[where].argmax(-1)
        right += int((said == targets[where]).sum())
        asked += said.numel()
    return right / asked


def train(model: LanguageModel, setting: Setting, rate: float, seed: int) -> list[float]:
    """Train in place; the mean loss of each twentieth of the steps. Equal seeds are equal data, whatever the mixer."""
    steps = setting.training.steps
    optimizer, schedule = build(
        model,
        OptimizerConfig(learning_rate=rate, weight_decay=setting.training.weight_decay),
        ScheduleConfig(warmup=steps // 20),
        steps,
        fused=True,
    )
    generator, losses = Generator().manual_seed(seed), []
    for step in range(steps):
        tokens, targets = setting.task.training(generator, step, steps, setting.training.tokens)
        where = targets != IGNORED
        loss = cross_entropy(model(tokens).logits[where], targets[where])
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    part = max(1, steps // 20)
    return [round(sum(each) / len(each), 4) for each in (losses[at : at + part] for at in range(0, steps, part))]


def described(setting: Setting) -> dict[str, Any]:
    """What makes two runs comparable, as plain data."""
    task = dataclasses.asdict(setting.task)  # pyright: ignore[reportArgumentType]  # tasks are dataclasses
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in task.items()}
    return {"task": plain, "training": dataclasses.asdict(setting.training), "width": WIDTH, "layers": LAYERS}


def run(name: str, mixer: str, rate: float, seed: int, setting: Setting | None = None) -> dict[str, Any]:
    """Train and test one model: a row of the results."""
    setting = setting or SETTINGS[name]
    task, answers = setting.task, setting.training.answers
    torch.manual_seed(seed)
    model, hidden = matched(MIXERS[mixer], task.vocab_size, setting.training.init_std)
    started = time.perf_counter()
    losses = train(model, setting, rate, seed)
    seconds = time.perf_counter() - started
    model.eval()
    # Rates are compared on data of their own, in sizes that were trained on.
    validation = [accuracy(model, task, size, answers, 2 * seed) for size in task.trained]
    return {
        "task": name,
        "mixer": mixer,
        "options": MIXERS[mixer],
        "rate": rate,
        "seed": seed,
        "setting": described(setting),
        "parameters": count(model),
        "hidden": hidden,
        "accuracy": {
            each: round(accuracy(model, task, size, answers, 2 * seed + 1), 4) for each, size in task.tests.items()
        },
        "validation": round(sum(validation) / len(validation), 4),
        "state_bytes": {each: model.state_bytes(task.length(size)) for each, size in task.tests.items()},
        "chance": round(1 / task.choices, 4),
        "losses": losses,
        "seconds": round(seconds, 1),
        "machine": machine(),
    }
