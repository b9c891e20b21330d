"""The tasks of benchmarks.quality ask what can be answered, nowhere else; runs are equal, kept and resumed."""

import dataclasses
import json

import pytest
import torch
from torch import Generator

from benchmarks.quality import store
from benchmarks.quality.models import MIXERS, PARAMETERS, TOLERANCE, WIDTH, count, matched
from benchmarks.quality.tasks import IGNORED, AssociativeRecall, InductionHeads, SelectiveCopying, places
from benchmarks.quality.training import SETTINGS, Setting, Training, accuracy, run

TASKS = [
    SelectiveCopying(),
    InductionHeads(),
    AssociativeRecall(),
    SelectiveCopying((12, 14), (), 12, 3),
    AssociativeRecall((2, 5), 5),
]
SMALL = Setting(AssociativeRecall((2, 3), 4), Training(steps=4, tokens=64, answers=30))


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def copied(task, row):
    """The data of a row in order, one for each marker."""
    return [(len(row) - task.count + m, token) for m, token in enumerate(t for t in row[: -task.count] if t)]


def induced(task, row):
    return [(len(row) - 1, row[row.index(task.choices) + 1])]


def recalled(task, row):
    """Every key that stands there again, and the token after its first place."""
    found = [(at, row[row.index(token) + 1]) for at, token in enumerate(row) if token and token in row[:at]]
    return [(at, value) for at, value in found if row[at] <= task.choices]


SOLVERS = {SelectiveCopying: copied, InductionHeads: induced, AssociativeRecall: recalled}


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_answers_are_in_the_tokens_and_asked_nowhere_else(task):
    for size in task.tests.values():
        tokens, targets = task.test(seeded(size), size, 20)
        assert tokens.shape == targets.shape == (20, task.length(size))
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < task.vocab_size
        for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
            answers = SOLVERS[type(task)](task, row)
            assert answers
            assert [(at, each) for at, each in enumerate(target) if each != IGNORED] == sorted(answers)
            assert all(each in row[: at + 1] for at, each in answers)  # causal: it stood there before


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_data_is_a_function_of_the_seed(task):
    size = next(iter(task.tests.values()))
    first, again = (task.test(seeded(3), size, 16) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.targets, again.targets)
    assert not torch.equal(first.tokens, task.test(seeded(4), size, 16).tokens)
    generator = seeded(3)
    assert not torch.equal(*(task.test(generator, size, 16).tokens for _ in range(2)))  # fresh at every step


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_training_is_of_the_sizes_that_validation_is(task):
    lengths = set()
    for step in range(40):
        tokens, _ = task.training(seeded(step), step, 40, 1024)
        lengths.add(tokens.shape[1])
        assert 1024 - tokens.shape[1] < tokens.numel() <= 1024
    assert lengths == {task.length(size) for size in task.trained}
    assert set(task.trained) <= set(task.tests.values())


def test_recall_begins_with_few_pairs():
    task, seen = AssociativeRecall(), []
    for step in range(600):
        seen.append(task.training(seeded(0), step, 600, 256).tokens.shape[1] // 4)
    assert set(seen[:100]) == {4, 8}
    assert set(seen[:299]) == {4, 8, 16, 32}
    assert all(seen[300:].count(size) == 60 for size in task.trained)


def test_places_are_different_sorted_and_uniform():
    found = places(seeded(0), 4000, 10, 4)
    assert bool((found.diff(dim=1) > 0).all())
    share = torch.bincount(found.flatten(), minlength=10) / 4000
    assert share == pytest.approx(torch.full((10,), 0.4), abs=0.04)


def test_answers_are_uniform():
    for task in (SelectiveCopying(), InductionHeads(), AssociativeRecall()):
        size = max(task.trained)
        _, targets = task.test(seeded(1), size, 20_000 // task.length(size) * 8)
        share = torch.unique(targets[targets != IGNORED], return_counts=True)[1].double()
        assert len(share) == task.choices
        assert (share / share.sum()).numpy() == pytest.approx(1 / task.choices, rel=0.35)


def test_too_many_pairs_are_refused():
    with pytest.raises(ValueError, match="size=9 pairs need as many different keys; choices=8"):
        AssociativeRecall(choices=8).test(seeded(0), 9, 1)


@pytest.mark.parametrize("mixer", MIXERS)
def test_models_have_equal_parameters(mixer):
    for setting in SETTINGS.values():
        vocab = setting.task.vocab_size
        model, hidden = matched(MIXERS[mixer], vocab)
        target = PARAMETERS + 2 * vocab * WIDTH
        assert abs(count(model) - target) <= TOLERANCE * target
        assert hidden > 8  # a layer has a feed-forward part to speak of


def test_a_mixer_too_large_to_match_is_refused():
    with pytest.raises(ValueError, match=r"has .* parameters with hidden=1, more than 3% from 2[0-9]+; choose smaller"):
        matched({"kind": "gqa"}, 10, parameters=1000)


class Perfect(torch.nn.Module):
    """Says the answers of recall, with the share `wrong` of rows all wrong."""

    def __init__(self, task, wrong: int):
        super().__init__()
        self.task, self.wrong = task, wrong

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, self.task.vocab_size)
        for index, row in enumerate(tokens.tolist()):
            for at, value in recalled(self.task, row):
                logits[index, at, 0 if index % self.wrong == 0 else value] = 1
        return type("Out", (), {"logits": logits})


def test_accuracy_counts_answers():
    task = AssociativeRecall((4,), 8)
    assert accuracy(Perfect(task, 10**9), task, 4, 100, 0) == pytest.approx(1, abs=0.01)  # row 0 is wrong
    assert accuracy(Perfect(task, 4), task, 4, 2000, 0) == pytest.approx(0.75)


@pytest.fixture(scope="module")
def row():
    return run("associative_recall", "gqa", 1e-2, 0, SMALL)


def test_a_run_is_a_function_of_its_seed(row):
    again = run("associative_recall", "gqa", 1e-2, 0, SMALL)
    other = run("associative_recall", "gqa", 1e-2, 1, SMALL)
    assert again["losses"] == row["losses"] and again["accuracy"] == row["accuracy"]
    assert other["losses"] != row["losses"]
    assert len(row["losses"]) == 4 and set(row["accuracy"]) == {"2 pairs", "3 pairs"}
    assert (
        row["state_bytes"]["3 pairs"] - row["state_bytes"]["2 pairs"] == 4 * 2 * (2 * WIDTH) * 4
    )  # tokens, layers, k and v


def test_finished_runs_are_kept_and_stale_ones_are_not(row, tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "associative_recall", SMALL)
    runs, results = tmp_path / "runs", tmp_path / "results"
    store.save(row, runs)
    worse = row | {"rate": 3e-3, "validation": row["validation"] - 0.01}
    store.save(worse, runs)
    store.merge(runs, results)
    assert set(store.load(runs, results)) == {store.key(row), store.key(worse)}
    for path in runs.iterdir():
        path.unlink()
    assert set(store.load(runs, results)) == {store.key(row), store.key(worse)}  # from quality.json alone
    assert json.loads((results / "quality.json").read_text())["rows"][1] == row
    text = (results / "quality.md").read_text()
    assert text.count("| gqa |") == 1 and "| 0.01 | 0.003 0.01 |" in text and "2 pairs | 3 pairs" in text
    longer = dataclasses.replace(SMALL, training=dataclasses.replace(SMALL.training, steps=5))
    monkeypatch.setitem(SETTINGS, "associative_recall", longer)
    assert store.load(runs, results) == {}
