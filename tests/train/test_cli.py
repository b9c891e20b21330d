"""The commands: help, typed configurations, overrides, typos, user mistakes in one line."""

import csv
import dataclasses
import re
import subprocess
import sys
import time

import pytest
import yaml

from tests.train.helpers import ROOT, finish, start, write_config, write_text
from train.cli import main
from zoo.config import load_config

CONFIGS = ROOT / "train" / "configs"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return write_config(folder / "config.yaml", write_text(folder / "text"))


def run(*arguments):
    """In this process: exit status, whether it returns it or exits."""
    try:
        return main([str(each) for each in arguments])
    except SystemExit as ended:
        return ended.code


def test_print_config_holds_everything_typed_and_reads_back(config, capsys, tmp_path):
    arguments = ["--config", config, "--model.network.width", "32", "--model.optimizer.learning_rate", "1"]
    assert run("pretrain", *arguments, "--data.passes", "3", "--print_config") == 0
    text = capsys.readouterr().out
    told = yaml.safe_load(text)
    assert told["model"]["network"]["width"] == 32
    assert told["model"]["optimizer"]["learning_rate"] == 1.0
    assert isinstance(told["model"]["optimizer"]["learning_rate"], float)
    assert told["data"]["passes"] == 3
    assert told["model"]["schedule"] == {"name": "cosine", "warmup": 2, "decay": 0.2, "floor": 0.0}
    assert told["checkpoint"] == {"every": 3, "keep": 2}
    (tmp_path / "again.yaml").write_text(text)
    assert run("pretrain", "--config", tmp_path / "again.yaml", "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out) == told


@pytest.mark.parametrize("command", ["pretrain", "finetune", "validate"])
def test_help_tells_every_option(command, capsys):
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    expected = ["--data.length", "tokens a window", "--trainer.max_steps", "--model.optimizer.muon_learning_rate"]
    expected += ["--model.network.vocab_size"] if command == "pretrain" else ["--from"]
    assert all(each in text for each in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.network.widht", "3"], "--model.network.widht"),
        (["--data.lenght", "3"], "--data.lenght"),
        (["--model.network.width", "abc"], "model.network.width"),
        (["--model.network.width", "1.5"], "model.network.width"),
        (["--model.optimizer.name", "sgd"], "model.optimizer.name"),
        (["--config", "/no/such.yaml"], "/no/such.yaml"),
        (["--model.network.stack", "[{kind: swigl}]"], "did you mean 'swiglu'"),
        (["--model.network.stack", "[{kind: swiglu, hiden: 3}]"], "has no option 'hiden' (did you mean 'hidden'?)"),
        (["--model.network.version", "99"], "pip install --upgrade efficient-zoo"),
        (["--data.length", "0"], "data.length=0 must be at least 1"),
        (["--data.length", "100000"], "data.length=100000 needs 100001 tokens"),
        (["--data.source", "/no/such"], "data.source='/no/such' does not exist"),
        (["--data.tokenizer", "/no/such"], "tokenizer='/no/such' does not exist"),
        (["--ckpt_path", "/no/step-3.ckpt"], "there is no checkpoint /no/step-3.ckpt"),
        (["--checkpoint.every", "0"], "every=0"),
        (["--model.network", "mamba-13m"], "unknown preset 'mamba-13m' (did you mean 'mamba-130m'?)"),
        (["--trainer.devices", "0"], "Change trainer.accelerator='cpu'"),
    ],
)
def test_mistakes_are_told_in_one_line(config, tmp_path, arguments, message, capsys):
    folder = tmp_path / "run"
    assert run("pretrain", "--config", config, "--trainer.default_root_dir", folder, *arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert len(told.strip().splitlines()) <= 6
    assert not (folder / "checkpoints").exists()


def test_a_typo_in_the_file_is_told(config, tmp_path, capsys):
    content = yaml.safe_load(config.read_text())
    content["data"]["lenght"] = content["data"].pop("length")
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump(content))
    assert run("pretrain", "--config", tmp_path / "typo.yaml") == 2
    assert "lenght" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; a configuration has keys such as model, data, trainer"),
        (b"- 3\n", "holds [3]; a configuration has keys"),
        (b"\xff\xfe\x00\x01", "is binary (byte 0 is no UTF-8); --config takes a YAML file"),
        (b"model: {network: [", "is not YAML"),
        (b"model: {network: mamba-130m}", "on the command line: --model.network mamba-130m"),
    ],
)
@pytest.mark.parametrize("form", ["--config {}", "--config={}", "-c {}"])
def test_files_that_hold_no_configuration_are_named(tmp_path, capsys, content, message, form):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert run("pretrain", *form.format(path).split()) == 2
    told = capsys.readouterr().err
    assert str(path) in told
    assert message in told


@pytest.mark.parametrize("form", ["--model.network mamba-130m", "--model.network=mamba-130m"])
def test_a_preset_is_taken_by_its_name(config, capsys, form):
    arguments = [*form.split(), "--model.network.vocab_size", "256"]
    assert run("pretrain", "--config", config, *arguments, "--print_config") == 0
    told = yaml.safe_load(capsys.readouterr().out)["model"]
    assert load_config(told["network"]) == dataclasses.replace(load_config("mamba-130m"), vocab_size=256)
    assert told["optimizer"]["learning_rate"] == 0.01


def test_a_model_is_asked_for(config, capsys):
    assert run("pretrain", "--data.length", "8") == 2
    assert "which model? Give --config FILE.yaml" in capsys.readouterr().err
    assert run("pretrain", "--print_config") == 0  # shows what there is to fill in
    assert yaml.safe_load(capsys.readouterr().out)["model"]["network"]["stack"] is None
    assert run("finetune", "--config", config, "--from", "/no/such/model") == 2
    assert "finetune takes the network of the saved model (--from)" in capsys.readouterr().err


def test_an_unknown_command_and_a_missing_model(capsys, config):
    assert main(["train"]) == 2
    assert "choose from pretrain, finetune, validate" in capsys.readouterr().err
    for command in ("finetune", "validate"):
        assert run(command, "--data.length", "8") == 2
        assert "Give its folder or hub id with --from" in capsys.readouterr().err
    assert run("finetune", "--from", "/no/such/model") == 2
    assert "no model could be loaded from '/no/such/model'" in capsys.readouterr().err


def test_pretrain_validate_finetune(config, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "run"
    assert run("pretrain", "--config", config, "--trainer.default_root_dir", folder) == 0
    out = capsys.readouterr().out
    assert "val bits/byte" in out
    assert "tokens/s" in out
    made = {each.name for each in folder.iterdir()}
    assert made >= {"model", "checkpoints", "metrics.csv", "loss.png", "config.yaml", "data.json", "tensorboard"}
    assert len(yaml.safe_load((folder / "data.json").read_text())["training"]["sha256"]) == 64
    text = yaml.safe_load(config.read_text())["data"]
    shared = ["--data.source", text["source"], "--data.length", "32", "--data.cache", text["cache"]]
    shared += ["--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "2", "--data.batch_size", "4"]
    assert run("validate", "--from", folder / "model", *shared) == 0
    measured = capsys.readouterr().out
    assert list((tmp_path / "here").iterdir()) == []  # validation writes nothing
    with (folder / "metrics.csv").open() as file:
        last = [float(row["val/bits_per_byte"]) for row in csv.DictReader(file) if row["val/bits_per_byte"]][-1]
    found = re.search(r"val/bits_per_byte\D*([\d.]+)", measured)
    assert found
    assert float(found[1]) == pytest.approx(last, abs=1e-5)
    tuned = ["--trainer.max_steps", "2", "--trainer.default_root_dir", tmp_path / "tuned"]
    assert run("finetune", "--from", folder / "model", *shared, *tuned) == 0
    assert (tmp_path / "tuned" / "model" / "model.safetensors").exists()

    # The folder holds a run now: it is not written over, and resuming it finds nothing left to do.
    assert run("pretrain", "--config", config, "--trainer.default_root_dir", folder) == 2
    assert "resume it with --ckpt_path last" in capsys.readouterr().err
    again = ["--trainer.default_root_dir", folder, "--ckpt_path", "last"]
    assert run("pretrain", "--config", config, *again) == 0
    assert "nothing to train: step 8" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(each.name for each in CONFIGS.glob("*.yaml")))
def test_the_packages_configurations_are_valid(name, capsys):
    command = "finetune" if name.startswith("finetune") else "pretrain"
    assert run(command, "--config", CONFIGS / name, "--print_config") == 0
    told = yaml.safe_load(capsys.readouterr().out)
    if command == "pretrain":
        load_config(told["model"]["network"])


def test_the_first_line_is_there_at_once():
    before = time.perf_counter()
    process = start("pretrain", "--config", "/no/such.yaml")
    assert process.stdout is not None
    line = process.stdout.readline()
    seconds = time.perf_counter() - before
    finish(process, expected=2)
    assert line.startswith("zoo pretrain: loading")
    assert seconds < 2


def test_importing_the_command_imports_nothing_heavy():
    code = "import sys, train.cli; print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
