"""Masked models: what is hidden, that it changes and comes back, what the loss is over, what is measured; the whole
way from a configuration to the fill-mask pipeline."""

import csv
import itertools
import math
import re
import shutil

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from tests.train.helpers import ROOT, data, module, trainer, write_text
from train.checkpoint import read
from train.cli import main
from train.data.module import TextData
from train.data.tokenizer import Bytes, HuggingFace, load_tokenizer
from train.data.windows import IGNORED
from train.masking import MaskingConfig, Vocabulary, mask_tokens
from train.module import LanguageModule, check_tokenizer
from train.objective import Masked
from zoo.config import ModelConfig
from zoo.hf import ZooForMaskedLM, byte_tokenizer, save_byte_tokenizer
from zoo.hf.generate import generate
from zoo.model import losses

BOTH_WAYS = [{"kind": "gqa", "heads": 2, "kv_heads": 1, "causal": False}, "swiglu"]
BYTES = Vocabulary.of(Bytes())


def masked(stack=BOTH_WAYS, width=16, vocab_size=257, **options) -> ModelConfig:
    return ModelConfig(vocab_size=vocab_size, width=width, stack=stack, objective="masked", **options)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def hide(tokens, config=MaskingConfig(), segments=None, fresh=None, seed=0):  # noqa: B008 (frozen)
    return mask_tokens(tokens, segments, seeded(seed), BYTES, config, fresh)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


# What is hidden ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [MaskingConfig(), MaskingConfig(0.5, "word", 0.3, 0.6), MaskingConfig(1.0, "token", 0.0, 1.0)],
    ids=["bert", "words", "random"],
)
def test_shares_are_as_told_and_nothing_else_changes(config):
    tokens = torch.randint(1, 256, (300, 1000))
    inputs, targets = hide(tokens, config)
    chosen = targets != IGNORED
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    assert float(chosen.float().mean()) == pytest.approx(config.probability, abs=0.01)
    read_, wanted = inputs[chosen], tokens[chosen]
    # One random token in 255 is the token itself.
    other = config.random * 254 / 255
    assert float((read_ == BYTES.mask).float().mean()) == pytest.approx(config.masked, abs=0.01)
    assert float(((read_ != BYTES.mask) & (read_ != wanted)).float().mean()) == pytest.approx(other, abs=0.01)
    random = read_[(read_ != BYTES.mask) & (read_ != wanted)]
    counts = torch.bincount(random, minlength=257)
    assert counts[0] == counts[256] == 0  # neither the end of a document nor the mask stands in at random
    assert 0 < counts[1:256].min() <= counts[1:256].max() < 2.5 * counts[1:256].float().mean()


@pytest.mark.parametrize("unit", ["token", "word"])
def test_padding_special_and_old_tokens_are_never_chosen(unit):
    tokens = torch.randint(0, 256, (50, 40))
    segments = torch.randint(0, 3, tokens.shape)
    fresh = torch.rand(tokens.shape) < 0.7
    inputs, targets = hide(tokens, MaskingConfig(1.0, unit), segments, fresh)
    allowed = (segments != 0) & fresh & (tokens != 0)
    assert torch.equal(targets != IGNORED, allowed)
    assert torch.equal(inputs[~allowed], tokens[~allowed])
    assert 0 < allowed.sum() < allowed.numel()
    inputs, targets = hide(tokens, MaskingConfig(1.0, unit), torch.zeros_like(segments))
    assert torch.equal(inputs, tokens)
    assert (targets == IGNORED).all()


def test_words_are_chosen_whole_or_not_at_all():
    written = b"def read_2(\xc3\xa9t\xc3\xa9):  x1\0ab"
    words = [0, 0, 0, 1, *[2] * 6, 3, *[4] * 5, 5, 6, 7, 8, 9, 9, 10, 11, 11]
    tokens = torch.tensor([list(written)] * 500)
    segments = torch.tensor([[1] * 23 + [2] * 2] * 500)
    segments[:, 24:] = 3  # a document begins within "ab"
    words[-1] = 12
    _, targets = hide(tokens, MaskingConfig(0.3, "word"), segments)
    chosen = targets != IGNORED
    assert not chosen[:, written.index(b"\0")].any()
    for first in range(len(words)):
        for second in range(first):
            if written[first] and written[second]:
                together = bool((chosen[:, first] == chosen[:, second]).all())
                assert together == (words[first] == words[second]), (first, second)


def subword(kind):
    """A trained tokenizer of a kind, with the words of `SENTENCE`."""
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]", "eos_token": "[END]"}
    options = {"special_tokens": list(special.values()), "vocab_size": 140, "show_progress": False}
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
        backend.decoder = decoders.WordPiece()  # pyright: ignore
        learner = trainers.WordPieceTrainer(**options)
    elif kind == "endings":
        backend = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
        backend.decoder = decoders.BPEDecoder()  # pyright: ignore
        learner = trainers.BpeTrainer(end_of_word_suffix="</w>", **options)
    else:
        backend = Tokenizer(models.BPE(unk_token="[UNK]"))
        parts = {"bytes": (pre_tokenizers.ByteLevel(), decoders.ByteLevel())}
        parts["sentencepiece"] = (pre_tokenizers.Metaspace(), decoders.Metaspace())
        backend.pre_tokenizer, backend.decoder = parts[kind]  # pyright: ignore
        learner = trainers.BpeTrainer(**options)
    backend.train_from_iterator(
        ["the state of a model, (block) scan the wave " * 3, "gates of xabcdefghijklmnopqrstuvwxyz"], learner
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize("kind", ["wordpiece", "endings", "bytes", "sentencepiece"])
def test_words_of_subword_tokenizers(kind, tmp_path):
    subword(kind).save_pretrained(tmp_path)
    tokenizer = HuggingFace(str(tmp_path))
    vocabulary = Vocabulary.of(tokenizer)
    assert vocabulary.mask == tokenizer.tokenizer.mask_token_id
    assert not vocabulary.ordinary[tokenizer.tokenizer.all_special_ids].any()
    written = "the stathe wave, (unmodel) gasts"
    encoded = tokenizer.tokenizer(written, return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"]] * 400)
    assert tokenizer.tokenizer.unk_token_id not in encoded["input_ids"]
    words = encoded.word_ids()
    if kind in ("bytes", "sentencepiece"):  # their own words hold punctuation
        begins = [start for start, _ in encoded["offset_mapping"]]
        words = list(itertools.accumulate(not written[max(each - 1, 0) : each + 1].isalpha() for each in begins))
    assert len(words) > len(set(words)) + 3  # words of several tokens
    _, targets = mask_tokens(ids, None, seeded(), vocabulary, MaskingConfig(0.4, "word"))
    chosen = targets != IGNORED
    for first in range(len(words)):
        for second in range(first):
            together = bool((chosen[:, first] == chosen[:, second]).all())
            assert together == (words[first] == words[second]), encoded.tokens()[second : first + 1]


# When it is hidden ------------------------------------------------------------------------------------------------


def test_the_choice_follows_from_seed_rank_and_batch(monkeypatch, text, tmp_path):
    one, source = module(masked()), data(text)
    trainer(tmp_path, max_steps=1).fit(one, datamodule=source)
    batch = next(iter(source.train_dataloader()))
    seen = []
    monkeypatch.setattr(one.network, "forward", lambda tokens, **_: seen.append(tokens) or one.network(tokens))

    def tokens(batches=5, rank=0, seed="1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        monkeypatch.setattr(LanguageModule, "global_rank", rank)
        one.batches = batches
        return one.objective.training(batch, seeded(one._seed("/task"))).tokens

    torch.manual_seed(1)
    first = tokens()
    torch.rand(3)
    assert torch.equal(first, tokens())
    for other in (tokens(batches=6), tokens(rank=1), tokens(seed="2")):
        assert not torch.equal(first, other)


def test_a_second_pass_hides_other_tokens(text, tmp_path):
    one, source = module(masked()), data(text, batch_size=1, length=200, passes=2)
    seen = {}
    run = one.objective.training

    def training(batch, generator):
        task = run(batch, generator)
        seen.setdefault(tuple(batch["tokens"].flatten().tolist()), []).append(task.targets)
        return task

    one.objective.training = training  # type: ignore[method-assign]
    trainer(tmp_path, max_steps=-1, limit_val_batches=0).fit(one, datamodule=source)
    assert all(len(each) == 2 and not torch.equal(*each) for each in seen.values())


def prepared(source) -> Masked:
    source.prepare_data()
    source.setup("fit")
    found = Masked(MaskingConfig())
    found.setup(source, 257)
    return found


def test_validation_hides_the_same_in_whatever_batches(text):
    found = {}
    for size in (1, 3, 4):
        source = data(text, batch_size=size)
        objective = prepared(source)
        for _ in range(2):
            for batch in source.val_dataloader():
                task = objective.validation(batch)
                for row, window in enumerate(batch["tokens"]):
                    now = task.tokens[row], task.targets[row]
                    before = found.setdefault(tuple(window.tolist()), now)
                    assert all(torch.equal(*each) for each in zip(before, now, strict=True))
    chosen = torch.stack([targets != IGNORED for _, targets in found.values()])
    assert len(chosen) > 3
    assert len({tuple(each.tolist()) for each in chosen}) == len(chosen)


def test_a_resumed_run_is_bitwise_uninterrupted(tmp_path, text, capsys):
    """Interrupted between two checkpoints, with accumulated batches and dropout."""
    config = write(tmp_path / "config.yaml", text, accumulate_grad_batches=2)
    shared = ["--config", config, "--model.network.dropout", "0.1", "--model.masking.unit", "word"]
    assert run("pretrain", *shared, "--trainer.default_root_dir", tmp_path / "whole") == 0
    again = tmp_path / "again" / "checkpoints"
    again.mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / "checkpoints" / "step-6.ckpt", again)
    resumed = ["--trainer.default_root_dir", again.parent, "--ckpt_path", "last"]
    assert run("pretrain", *shared, *resumed) == 0
    one, two = (read(folder / "checkpoints" / "step-10.ckpt") for folder in (tmp_path / "whole", again.parent))
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    for index, state in one["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, two["optimizer_states"][0]["state"][index][name]), (index, name)
    curves = [each["callbacks"]["Metrics"] for each in (one, two)]
    assert curves[0]["train"] == curves[1]["train"]
    assert len({round(loss, 9) for _, loss in curves[0]["train"]}) == len(curves[0]["train"]) > 3
    assert curves[0]["validation"][-1] == curves[1]["validation"][-1]
    capsys.readouterr()


# What is learned and measured -------------------------------------------------------------------------------------


def test_the_loss_and_its_gradient_are_of_the_chosen_alone(text, tmp_path, monkeypatch):
    one, source = module(masked([*BOTH_WAYS, {"kind": "moe", "experts": 4}])), data(text)
    trainer(tmp_path, max_steps=1).fit(one, datamodule=source)
    batch = next(iter(source.train_dataloader()))
    outs = []
    run = one.network.forward
    monkeypatch.setattr(one.network, "forward", lambda *a, **k: outs.append(run(*a, **k)) or outs[-1])
    one.batches = 3
    loss = one.training_step(batch, 0)
    hidden = outs[0].hidden
    hidden.retain_grad()
    loss.backward()
    task = one.objective.training(batch, seeded(one._seed("/task")))
    chosen = task.targets != IGNORED
    assert 0 < chosen.sum() < chosen.numel() / 4
    assert torch.equal(hidden.grad.abs().sum(-1) > 0, chosen)
    expected = cross_entropy(one.network.head(hidden)[chosen], batch["tokens"][chosen]) + losses(outs[0].aux)
    torch.testing.assert_close(loss, expected)

    one.zero_grad()
    loss = one.training_step(batch | {"fresh": torch.zeros_like(batch["fresh"])}, 0)  # none can be chosen
    torch.testing.assert_close(loss, losses(outs[1].aux))
    loss.backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in one.parameters())


def test_the_baseline_is_of_the_training_texts_frequencies(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("aaaaabbbc" * 40)
    (tmp_path / "other.txt").write_text("bbbbbac?" * 40)  # the validation text has others
    source = data(text, validation=str(tmp_path / "other.txt"), batch_size=2)
    one = module(masked())
    told = trainer(tmp_path, limit_val_batches=1.0).validate(one, datamodule=source, verbose=False)[0]
    counts = source.counts()
    assert {chr(i): int(n) for i, n in enumerate(counts) if n} == {"a": 200, "b": 120, "c": 40, "\0": 1}
    targets, nats, right = [], 0.0, 0
    for batch in source.val_dataloader():
        task = one.objective.validation(batch)
        chosen = task.targets != IGNORED
        with torch.no_grad():
            logits = one.network(task.tokens, segments=batch["segments"]).logits[chosen]
        nats += float(cross_entropy(logits, task.targets[chosen], reduction="sum"))
        right += int((logits.argmax(-1) == task.targets[chosen]).sum())
        targets += task.targets[chosen].tolist()
    share = {token: (counts[ord(token)] + 1) / (360 + 255) for token in "abc?"}  # one more for each possible byte
    bits = [-math.log2(share[chr(each)]) for each in targets]
    assert len(targets) > 20
    assert told["val/unigram_accuracy"] == pytest.approx(targets.count(ord("a")) / len(targets))
    assert told["val/unigram_bits_per_byte"] == pytest.approx(sum(bits) / len(bits))
    assert told["val/masked_accuracy"] == pytest.approx(right / len(targets))
    assert told["val/masked_bits_per_byte"] == pytest.approx(nats / math.log(2) / len(targets), rel=1e-5)
    assert told["val/loss"] == pytest.approx(nats / len(targets), rel=1e-5)


def test_a_streams_frequencies_are_counted_without_storing_it(tmp_path):
    import datasets

    rows = [{"text": f"document {i} " * 3} for i in range(60)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    options = {"validation_share": 0.2, "length": 32, "cache": str(tmp_path / "cache")}
    stored = TextData(f"dataset:{tmp_path / 'rows'}", **options)
    stream = TextData(f"dataset:{tmp_path / 'rows'}", streaming=True, **options)
    for each in (stored, stream):
        each.prepare_data()
        each.setup("fit")
    assert stream.training is None
    counts = stored.counts()
    counts[0] = 0  # ends of documents
    assert counts.sum() > 500
    assert (stream.counts() == counts).all()


def test_it_learns_what_both_sides_tell(tmp_path):
    """A text in which each letter follows from its neighbours, all letters as frequent."""
    (tmp_path / "text.txt").write_text("abcdefgh" * 1200)
    source = data(tmp_path / "text.txt", length=25, batch_size=16, validation_share=0.3)
    one = module(masked(width=32))
    running = trainer(tmp_path, max_steps=200, val_check_interval=200, limit_val_batches=1.0)
    running.fit(one, datamodule=source)
    found = {name: float(value) for name, value in running.callback_metrics.items()}
    assert found["val/masked_accuracy"] > 0.9
    assert found["val/unigram_accuracy"] < 0.25
    assert found["val/masked_bits_per_byte"] < 1 < 2.9 < found["val/unigram_bits_per_byte"]


# The commands -----------------------------------------------------------------------------------------------------


def write(path, text, **trainer_options):
    config = {
        "seed_everything": 1,
        "model": {
            "network": {"vocab_size": 257, "width": 16, "objective": "masked", "stack": BOTH_WAYS},
            "optimizer": {"learning_rate": 1e-2},
            "schedule": {"warmup": 2},
        },
        "data": {"source": str(text), "length": 32, "batch_size": 4, "cache": str(path.parent / "cache")},
        "checkpoint": {"every": 3, "keep": 4},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 10,
            "val_check_interval": 5,
            "limit_val_batches": 4,
            "log_every_n_steps": 2,
            **trainer_options,
        },
    }
    path.write_text(yaml.safe_dump(config))
    return path


def run(*arguments):
    """In this process: exit status, whether it returns it or exits."""
    try:
        return main([str(each) for each in arguments])
    except SystemExit as ended:
        return ended.code


def test_pretrain_validate_finetune_fill_in(tmp_path, text, capsys):
    config, folder = write(tmp_path / "config.yaml", text), tmp_path / "run"
    assert run("pretrain", "--config", config, "--trainer.default_root_dir", folder) == 0
    out = capsys.readouterr().out
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/masked_accuracy"]]
    assert len(rows) == 2
    assert rows[0]["val/unigram_accuracy"] == rows[1]["val/unigram_accuracy"]  # the same masks
    right, most = (f"{float(rows[-1][f'val/{name}_accuracy']):.1%}" for name in ("masked", "unigram"))
    bits, base = (f"{float(rows[-1][f'val/{name}_bits_per_byte']):.3f}" for name in ("masked", "unigram"))
    assert f"masked accuracy {right} (always the most frequent token: {most})" in out
    assert f"{bits} bits/masked byte (unigram: {base})" in out
    assert (folder / "loss.png").exists()

    settings = yaml.safe_load(config.read_text())["data"]
    shared = ["--data.source", text, "--data.length", "32", "--data.cache", settings["cache"], "--data.batch_size", "4"]
    shared += ["--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "4"]
    assert run("validate", "--from", folder / "model", *shared) == 0
    table = capsys.readouterr().out
    for name in ("masked_accuracy", "unigram_accuracy", "masked_bits_per_byte", "unigram_bits_per_byte"):
        found = re.search(rf"val/{name}\D*([\d.]+)", table)
        assert found
        assert float(found[1]) == pytest.approx(float(rows[-1][f"val/{name}"]), abs=1e-5)
    tuned = ["--trainer.max_steps", "2", "--trainer.default_root_dir", tmp_path / "tuned"]
    assert run("finetune", "--from", folder / "model", *shared, *tuned, "--model.masking.probability", "0.3") == 0

    for saved in (folder / "model", tmp_path / "tuned" / "model"):
        with pytest.raises(ValueError, match=r"is a masked model: it fills in hidden tokens and cannot continue"):
            generate(str(saved), "def")
        check_fill_mask(saved, "a st[MASK]te")
    check_tokenizer(str(folder / "model"), Bytes(), masked=True)
    with pytest.raises(ValueError, match=r"another tokenizer than data\.tokenizer='bytes'"):
        check_tokenizer(str(folder / "model"), Bytes())


def check_fill_mask(folder, written):
    """transformers' own pipeline says what the model says."""
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, ZooForMaskedLM)
    batch = tokenizer([written], return_tensors="pt")
    place = (batch["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten()
    assert len(place) == 1
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0, place[0]]
    best = pipeline("fill-mask", model=str(folder))(written)[0]
    assert best["token"] == int(logits.argmax())
    assert best["score"] == pytest.approx(float(logits.softmax(0).max()), rel=1e-4)
    assert tokenizer.mask_token not in best["sequence"]


def test_a_tokenizer_of_ones_own(tmp_path, text, capsys):
    subword("wordpiece").save_pretrained(tmp_path / "tokenizer")
    size = len(load_tokenizer(str(tmp_path / "tokenizer")).tokenizer)  # type: ignore[attr-defined]
    config, folder = write(tmp_path / "config.yaml", text, max_steps=2, val_check_interval=2), tmp_path / "run"
    arguments = ["--config", config, "--data.tokenizer", tmp_path / "tokenizer", "--model.masking.unit", "word"]
    arguments += ["--trainer.default_root_dir", folder]
    assert run("pretrain", *arguments, "--model.network.vocab_size", str(size - 1)) == 2
    assert f"set model.network.vocab_size to {size}" in capsys.readouterr().err
    assert run("pretrain", *arguments, "--model.network.vocab_size", size) == 0
    assert re.search(r"bits/masked token \(unigram: [\d.]+\)", capsys.readouterr().out)
    check_fill_mask(folder / "model", "the [MASK] of")


def test_the_byte_tokenizer_with_a_mask(tmp_path):
    save_byte_tokenizer(tmp_path, mask=True)
    written = "Ā é 漢字\t🙂 [CLS] ÿ\x7f"
    for tokenizer in (byte_tokenizer(mask=True), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == 257
        assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("[MASK]", Bytes().mask)
        assert tokenizer(written)["input_ids"] == list(written.encode())
        assert tokenizer.decode(list(written.encode())) == written
        assert tokenizer("a[MASK]\0")["input_ids"] == [97, 256, 0]
        assert tokenizer(["é", "abc"], padding=True)["input_ids"] == [[0, *"é".encode()], [*b"abc"]]
    assert "[MASK]" not in byte_tokenizer().get_vocab()


def test_the_packages_masked_job_is_of_an_efficient_bidirectional_block():
    content = yaml.safe_load((ROOT / "train" / "configs" / "stdlib-masked-cpu.yaml").read_text())
    config = ModelConfig.from_dict(content["model"]["network"])
    assert config.objective == "masked"
    assert config.vocab_size == 257
    assert {spec.kind for spec in config.blocks()} & {"linformer", "funnel", "luna"}
    LanguageModule(config)


# Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.network.vocab_size", "256"], "its mask token is 256, but the model has vocab_size=256; set model."),
        (["--model.masking.probability", "0"], "masking.probability=0.0 is a share: above 0, at most 1"),
        (["--model.masking.masked", "0.95"], "masking.masked=0.95 and masking.random=0.1 are shares"),
        (["--model.masking.unit", "wrod"], "model.masking.unit"),
        (
            ["--model.network.objective", "causal", "--model.network.stack", "[swiglu]", "--model.masking.random", "0"],
            "is for a masked model, but model.network.objective='causal'; leave it out",
        ),
        (
            ["--model.network.stack", "[swiglu, {kind: linformer, length: 31, projected: 8}]"],
            "model.network.stack[1] (kind linformer) is built for documents of at most length=31 tokens",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, text, capsys, arguments, message):
    config = write(tmp_path / "config.yaml", text)
    assert run("pretrain", "--config", config, "--trainer.default_root_dir", tmp_path / "run", *arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_tokenizer_without_a_mask_token_says_what_to_do(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no mask token, .*add_special_tokens\(\{'mask_token': '\[MASK\]'\}\)"):
        Vocabulary.of(HuggingFace(str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 1.5}, "masking.probability=1.5"),
        ({"unit": "sentence"}, "masking.unit='sentence' is unknown; choose from token, word"),
        ({"random": -0.1}, "masking.random=-0.1"),
    ],
)
def test_bad_shares_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MaskingConfig(**options)
