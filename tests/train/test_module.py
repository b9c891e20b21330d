"""What is learned and what is measured: loss, bits per byte, accumulation, recomputation, logs."""

import csv
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.train.helpers import DENSE, HYBRID, MOE, data, module, network, trainer, write_text
from train.data.windows import IGNORED
from train.metrics import Metrics, RunCSV, plot, scalars
from train.module import check_same
from zoo.model import LanguageModel, losses


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


def weights(one):
    return {name: value.detach().clone() for name, value in one.state_dict().items()}


def fit(one, source, folder, **options):
    running = trainer(folder, **options)
    running.fit(one, datamodule=source)
    return running


def test_the_loss_is_the_mean_over_predicted_tokens_and_the_blocks_losses(text, tmp_path):
    one, source = module(network([*DENSE, MOE])), data(text)
    running = fit(one, source, tmp_path, max_steps=1)
    one.train()
    batch = next(iter(source.train_dataloader()))
    batch["targets"][0, :20] = IGNORED
    torch.manual_seed(0)
    loss = one.training_step(batch, 0)
    torch.manual_seed(0)
    out = one.network(batch["tokens"], segments=batch["segments"])
    kept = batch["targets"] != IGNORED
    expected = cross_entropy(out.logits[kept], batch["targets"][kept]) + losses(out.aux)
    torch.testing.assert_close(loss, expected)
    assert losses(out.aux) > 0
    assert running.global_step == 1


def test_bits_per_byte_is_over_the_whole_validation_text(text, tmp_path):
    one, source = module(), data(text, batch_size=3, length=50)
    running = trainer(tmp_path, limit_val_batches=1.0)
    logits = []
    watch = one.network.register_forward_hook(lambda model, given, out: logits.append(out.logits.numel()))
    found = running.validate(one, datamodule=source, verbose=False)[0]
    watch.remove()
    assert logits and not any(logits), "the logits of a validation batch were made"
    nats = tokens = 0
    for document in _documents(source.held_out.corpus):
        # The windows cut the text; the model sees no further back than its window.
        tokens += len(document) - 1
    windows = source.held_out
    for index in range(len(windows)):
        sample = windows[index]
        with torch.no_grad():
            logits = one.network.eval()(sample["tokens"][None], segments=sample["segments"][None]).logits[0]
        nats += float(cross_entropy(logits, sample["targets"], ignore_index=IGNORED, reduction="sum"))
    assert found["val/loss"] == pytest.approx(nats / tokens, rel=1e-5)
    # Every byte is predicted but each document's first; the documents' ends cost nats and are no bytes of text.
    documents = windows.corpus.about["documents"]
    assert found["val/bits_per_byte"] == pytest.approx(
        nats / math.log(2) / (windows.corpus.about["bytes"] - documents), rel=1e-5
    )


def _documents(corpus):
    return [corpus.tokens[a:b] for a, b in zip(corpus.starts[:-1], corpus.starts[1:], strict=True)]


def test_it_learns(text, tmp_path):
    one, source = module(network(HYBRID)), data(text)
    before = trainer(tmp_path).validate(one, datamodule=source, verbose=False)[0]["val/loss"]
    fit(one, source, tmp_path, max_steps=60)
    assert trainer(tmp_path).validate(one, datamodule=source, verbose=False)[0]["val/loss"] < before - 1.5


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_accumulated_batches_are_one_batch(text, tmp_path, name):
    """In stream mode all windows (but the last, which these steps do not reach) have as many targets, so that the mean
    of means is the mean."""
    found = []
    for size, accumulated in ((8, 1), (4, 2)):
        one = module(name=name)
        source = data(text, batch_size=size, documents="stream", seed=1)
        options = {"accumulate_grad_batches": accumulated, "gradient_clip_val": 0.5, "precision": "64-true"}
        running = fit(one, source, tmp_path, max_steps=3, **options)
        assert running.global_step == 3
        found.append(weights(one))
    for each in found[0]:
        # Muon's matrix products are float32 whatever the parameters are.
        torch.testing.assert_close(found[0][each], found[1][each], atol=1e-4 if name == "muon" else 1e-8, rtol=0)


def test_activation_checkpointing_changes_nothing(text, tmp_path):
    found = []
    for checkpointing in (False, True):
        one = module(network(HYBRID, dropout=0.2), activation_checkpointing=checkpointing)
        fit(one, data(text), tmp_path, max_steps=2)
        assert one.network.gradient_checkpointing == checkpointing
        found.append(weights(one))
    assert all(torch.equal(found[0][each], found[1][each]) for each in found[0])


def test_compiled_is_the_same_and_keeps_names(text, tmp_path, monkeypatch):
    compiled = []

    def compile_(self):
        compiled.append(self)
        torch.nn.Module.compile(self, backend="aot_eager")

    monkeypatch.setattr(LanguageModel, "compile", compile_)
    found = []
    for wanted in (False, True):
        one = module(network(["swiglu"]), compile=wanted)
        fit(one, data(text, documents="stream"), tmp_path, max_steps=2, limit_val_batches=0)
        found.append(weights(one))
    assert len(compiled) == 1
    assert found[0].keys() == found[1].keys()
    for each in found[0]:
        torch.testing.assert_close(found[0][each], found[1][each])


def test_bfloat16_mixed_keeps_float32_weights(text, tmp_path):
    one = module(network(HYBRID))
    fit(one, data(text), tmp_path, precision="bf16-mixed", gradient_clip_val=1.0)
    assert {value.dtype for value in one.network.parameters()} == {torch.float32}
    assert math.isfinite(float(one.last["loss"]))
    assert one.gradient_norm is not None
    assert float(one.gradient_norm) > 0


def test_random_numbers_follow_from_the_batch_not_from_what_ran_before(text, tmp_path):
    found = []
    for interval in (100, 1):  # validation in between draws nothing from training
        one = module(network(HYBRID, dropout=0.3))
        torch.manual_seed(interval)
        fit(one, data(text), tmp_path, max_steps=3, val_check_interval=interval)
        found.append(weights(one))
    assert all(torch.equal(found[0][each], found[1][each]) for each in found[0])


def test_logs_hold_losses_loads_and_speed_and_a_curve_is_drawn(text, tmp_path):
    one = module(network([*DENSE, MOE]))
    options = {"max_steps": 4, "log_every_n_steps": 2, "val_check_interval": 2}
    metrics = Metrics()
    running = trainer(tmp_path, logger=RunCSV(tmp_path, None), callbacks=[metrics], **options)
    running.fit(one, datamodule=data(text))
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    training = [row for row in rows if row["train/loss"]]
    assert [int(row["step"]) for row in training] == [2, 4]
    assert all(float(row["train/tokens_per_second"]) > 0 for row in training)
    loads = [float(training[-1][f"blocks.2/stat/load/{i}"]) for i in range(4)]
    assert sum(loads) == pytest.approx(1, rel=1e-3)
    assert float(training[-1]["blocks.2/loss/load_balance"]) > 0
    assert len([row for row in rows if row["val/bits_per_byte"]]) == 2
    assert [step for step, _ in metrics.validation] == [2, 4]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_log_goes_on_from_its_step(tmp_path):
    first = RunCSV(tmp_path, None)
    for step in (2, 4, 6):
        first.log_metrics({"a": step}, step)
    first.save()
    second = RunCSV(tmp_path, 4)
    second.log_metrics({"b": 1.0}, 6)
    second.save()
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), row["a"], row["b"]) for row in rows] == [(2, "2.0", ""), (4, "4.0", ""), (6, "", "1.0")]


def test_a_curve_of_nothing_but_training(tmp_path):
    plot([[1, 2.0], [2, 1.0]], [], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_scalars_of_vectors():
    found = scalars({"x/loss/a": torch.tensor(0.5), "x/stat/load": torch.tensor([0.25, 0.75])})
    assert found == {"x/loss/a": 0.5, "x/stat/load/0": 0.25, "x/stat/load/1": 0.75}


def test_passes_end_the_run_and_no_length_is_an_error(text, tmp_path):
    source = data(text, passes=2)
    running = fit(module(), source, tmp_path, max_steps=-1, limit_val_batches=0)
    assert source.training is not None
    assert running.global_step == 2 * len(source.training) // 4
    with pytest.raises(ValueError, match=r"how long shall this train\? Set trainer.max_steps, or data.passes"):
        fit(module(), data(text), tmp_path, max_steps=-1)


def test_a_small_vocabulary_is_refused(text, tmp_path):
    config = network().to_dict() | {"vocab_size": 100}
    with pytest.raises(ValueError, match="the tokenizer 'bytes' has 256 tokens, but the model has vocab_size=100"):
        fit(module(type(network()).from_dict(config)), data(text), tmp_path)


def test_another_network_is_named():
    one = network().to_dict()
    check_same(one, network().to_dict())
    with pytest.raises(ValueError, match=r"the checkpoint's network has width=16, the configuration's width=32"):
        check_same(one, network(width=32).to_dict())
