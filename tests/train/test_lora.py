"""Training on from published checkpoints, all weights or adapters: what trains, what is kept, what comes back."""

import csv
import json
import re
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import zoo.convert
from tests.convert.peer import randomise
from tests.train.helpers import DENSE, MOE, data, finish, network, start, trainer, write_text
from train.checkpoint import AtomicCheckpointIO, Checkpoints, read
from train.lora import Adapters, LoRAConfig, fingerprint
from train.module import FromPretrained, load_pretrained
from train.optim import OptimizerConfig, ScheduleConfig, groups
from zoo.cli import main
from zoo.hf import ZooConfig, ZooForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture(scope="module")
def llama(text, tmp_path_factory):
    """A published checkpoint in bfloat16, with a subword tokenizer of its own."""
    folder = tmp_path_factory.mktemp("llama")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()  # pyright: ignore
    files = [str(each) for each in sorted(text.iterdir())]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train(files, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, **ids)
    randomise(transformers.LlamaForCausalLM(config), 0.2).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A zoo checkpoint with experts whose router moves its bias after every step, as nothing else does."""
    folder = tmp_path_factory.mktemp("hybrid") / "model"
    torch.manual_seed(0)
    stack = [*DENSE, MOE, {"kind": "moe", "experts": 4, "router": "loss_free"}]
    ZooForCausalLM(ZooConfig(model=network(stack))).save_pretrained(folder)
    return folder


def run(*argv):
    return main([str(each) for each in argv])


def finetune(source, text, folder, *more):
    shared = ["--data.source", text, "--data.length", "32", "--data.batch_size", "4"]
    shared += ["--data.cache", text.parent / "cache", "--trainer.accelerator", "cpu", "--trainer.max_steps", "4"]
    shared += ["--trainer.limit_val_batches", "1", "--trainer.log_every_n_steps", "1", "--checkpoint.every", "2"]
    shared += ["--model.optimizer.learning_rate", "0.01", "--model.schedule.warmup", "0"]
    shared += ["--trainer.default_root_dir", folder]
    return run("finetune", "--from", source, *shared, *more)


def tokens():
    return torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(folder, dtype=torch.float64):
    return zoo.convert.load(folder).to(dtype)(tokens()).logits


def test_adapters_of_a_published_checkpoint_there_and_back(llama, text, tmp_path, capsys):
    """Train, generate, merge, evaluate the loss, convert back: transformers computes what was trained."""
    folder = tmp_path / "run"
    assert finetune(llama, text, folder, "--model.lora.rank", "4", "--model.lora.alpha", "64") == 0
    told = capsys.readouterr().out
    found = re.search(r"adapters of rank 4 on down, out, qkv, up: ([\d,]+) weights train beside ([\d,]+) frozen", told)
    assert found
    original = transformers.AutoModelForCausalLM.from_pretrained(llama)
    stored = load_file(folder / "model" / "adapter_model.safetensors")
    assert int(found[1].replace(",", "")) == sum(each.numel() for each in stored.values())
    assert int(found[2].replace(",", "")) == original.num_parameters()
    said = json.loads((folder / "model" / "adapter_config.json").read_text())
    assert (said["r"], said["base_model_name_or_path"]) == (4, str(llama))
    assert sorted(each.name for each in (folder / "checkpoints").iterdir() if each.is_dir()) == ["step-2", "step-4"]
    assert not list(folder.rglob("model.safetensors"))
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["tokenizer"] == str(llama)

    adapter = folder / "model"
    assert run("generate", "--model", adapter, "--prompt", "the state", "--max-new-tokens", "4") == 0
    assert capsys.readouterr().out.startswith("the state")
    assert run("convert", "merge", "--from", adapter, "--to", tmp_path / "merged") == 0
    assert run("convert", "--from", tmp_path / "merged", "--to", tmp_path / "back") == 0
    assert "holds a llama checkpoint" in capsys.readouterr().out
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is transformers.LlamaForCausalLM
    assert back.dtype == torch.bfloat16
    assert back.config.to_dict() == original.config.to_dict() | {"_name_or_path": str(tmp_path / "back")}
    wanted = logits(adapter)
    torch.testing.assert_close(logits(tmp_path / "merged"), wanted, rtol=0, atol=0)
    torch.testing.assert_close(back.double()(tokens()).logits, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - logits(llama)).abs().max() > 0.1
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")("the state of")["input_ids"]
    assert words == transformers.AutoTokenizer.from_pretrained(llama)("the state of")["input_ids"]
    with_peft = peft.PeftModel.from_pretrained(zoo.convert.load(llama).double(), str(adapter))
    assert (with_peft(input_ids=tokens()).logits - wanted).abs().max() < 0.05  # merged it is rounded to bfloat16

    # The adapter's folder is a model: it is measured, and trained on from, like any other.
    shared = ["--data.source", text, "--data.length", "32", "--data.cache", text.parent / "cache"]
    shared += ["--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "1", "--data.batch_size", "4"]
    assert run("validate", "--from", adapter, *shared) == 0
    measured = re.search(r"val/loss\D*([\d.]+)", capsys.readouterr().out)
    with (folder / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert measured
    assert float(measured[1]) < losses[0]
    assert finetune(adapter, text, tmp_path / "second", "--model.lora.rank", "2") == 0
    assert (logits(tmp_path / "second" / "model") - wanted).abs().max() > 0.01


def test_all_weights_of_a_published_checkpoint_and_back(llama, text, tmp_path, capsys):
    """What is known of the original stays with the trained model."""
    assert finetune(llama, text, tmp_path / "run") == 0
    assert "adapters" not in capsys.readouterr().out
    trained = ZooForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert trained.dtype == torch.float32
    assert trained.generation_config.eos_token_id == 1
    assert run("convert", "--from", tmp_path / "run" / "model", "--to", tmp_path / "back") == 0
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(back(tokens()).logits, trained(tokens()).logits, rtol=1e-4, atol=1e-4)
    before = zoo.convert.load(llama).float().state_dict()
    assert not [name for name, each in trained.state_dict().items() if torch.equal(each, before[name])]
    original = transformers.AutoConfig.from_pretrained(llama)
    assert back.config.rope_parameters == original.rope_parameters
    assert back.config.eos_token_id == 1


@pytest.mark.slow
def test_a_sharded_run_resumes_with_its_adapters_alone(hybrid, text, tmp_path):
    """Over two processes, experts with adapters among them; its checkpoints are gathered and loaded in another way."""
    shared = ["finetune", "--from", hybrid, "--data.tokenizer", "bytes", "--data.source", text, "--data.length", "32"]
    shared += ["--data.batch_size", "2", "--data.cache", text.parent / "cache", "--checkpoint.every", "1"]
    shared += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "sharded"]
    shared += ["--trainer.max_steps", "2", "--model.lora.rank", "2", "--model.schedule.warmup", "0"]
    finish(start(*shared, "--trainer.default_root_dir", tmp_path / "whole"))
    held = tmp_path / "whole" / "checkpoints" / "step-1.ckpt"
    assert all("lora_" in name for name in read(held)["state_dict"])
    finish(start(*shared, "--trainer.default_root_dir", tmp_path / "again", "--ckpt_path", held))
    one, two = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("whole", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    begun = load_file(held.with_suffix("") / "adapter_model.safetensors")
    assert all(not torch.equal(value, begun[name]) for name, value in one.items())


# Runs within this process ----------------------------------------------------------------------------------------


def module(source, lora=LoRAConfig(rank=4), **options):  # noqa: B008 (frozen)
    torch.manual_seed(0)
    rates = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    return FromPretrained(str(source), lora=lora, optimizer=rates, schedule=ScheduleConfig(warmup=2), **options)


def fit(one, text, folder, *callbacks, ckpt_path=None, **options):
    plugins = [AtomicCheckpointIO()]
    running = trainer(
        folder, callbacks=list(callbacks), plugins=plugins, enable_checkpointing=bool(callbacks), **options
    )
    running.fit(one, datamodule=data(text), ckpt_path=ckpt_path)
    return one


def test_a_resumed_run_is_bitwise_uninterrupted(hybrid, text, tmp_path):
    """From a checkpoint that holds the adapters and their optimizer alone; experts with jitter, and dropout."""
    lora = LoRAConfig(rank=4, alpha=8, dropout=0.2, targets=["qkv", "out"])
    whole = fit(module(hybrid, lora), text, tmp_path / "whole", Checkpoints(every=3, keep=9), max_steps=6)
    path = tmp_path / "whole" / "checkpoints" / "step-3.ckpt"
    held = read(path)
    assert set(held["state_dict"]) == {f"network.{name}" for name in whole.adapters.names}
    assert len(held["optimizer_states"][0]["state"]) == len(whole.adapters.names)
    small = sum(each.numel() for each in held["state_dict"].values())
    assert small < sum(each.numel() for each in whole.network.parameters()) / 2
    again = fit(module(hybrid, lora), text, tmp_path / "again", max_steps=6, ckpt_path=str(path))
    now = dict(again.network.state_dict())
    assert all(torch.equal(each, now[name]) for name, each in whole.network.state_dict().items())
    assert any(not torch.equal(held["state_dict"][f"network.{name}"], now[name]) for name in whole.adapters.names)


def test_nothing_but_adapters_changes(hybrid, text, tmp_path):
    """Not even what blocks do after a step (the bias of a loss_free router)."""
    one = fit(module(hybrid), text, tmp_path, max_steps=3)
    base = load_pretrained(str(hybrid)).state_dict()
    now = {name.replace(".base_layer", ""): each for name, each in one.network.state_dict().items()}
    assert all(torch.equal(each, now[name]) for name, each in base.items())
    trained = dict(one.network.named_parameters())
    begun = dict(module(hybrid).network.named_parameters())
    assert all(not torch.equal(trained[name], begun[name]) for name in one.adapters.names)
    assert {name for name, each in trained.items() if each.grad is not None} <= one.adapters.names
    found = groups(one.network, one.optimizer_config)
    assert sum(len(group["params"]) for group in found) == len(one.adapters.names)
    assert {group["weight_decay"] for group in found} == {0.1}


def test_computing_activations_again_changes_no_gradient(hybrid, text, tmp_path):
    lora = LoRAConfig(rank=2)
    one, two = (module(hybrid, lora, activation_checkpointing=again) for again in (False, True))
    batch = next(iter(prepared(text).train_dataloader()))
    found = []
    for each in (one, two):
        torch.manual_seed(1)
        each.network(batch["tokens"]).logits.float().logsumexp(-1).sum().backward()
        found.append({name: value.grad for name, value in each.network.named_parameters() if value.requires_grad})
    assert found[0].keys() == found[1].keys() == one.adapters.names
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def prepared(text):
    source = data(text)
    source.prepare_data()
    source.setup("fit")
    return source


def test_experts_with_adapters_are_not_divided(hybrid):
    one = module(hybrid)
    one._device_mesh = {"data_parallel": SimpleNamespace(size=lambda: 2)}
    one._trainer = SimpleNamespace(strategy=SimpleNamespace(divides_experts=True))
    with pytest.raises(ValueError, match=r"expert_parallel divides experts.*or leave experts.down, experts.up out of"):
        one.configure_model()


def test_frozen_weights_keep_their_dtype_or_take_the_one_asked_for(llama):
    def dtypes(lora):
        parameters = list(module(llama, lora).network.named_parameters())
        return {each.dtype for name, each in parameters if "lora_" not in name}, {
            each.dtype for name, each in parameters if "lora_" in name
        }

    assert dtypes(LoRAConfig()) == ({torch.bfloat16}, {torch.float32})
    assert dtypes(LoRAConfig(dtype="float32")) == ({torch.float32}, {torch.float32})
    assert {each.dtype for each in module(llama, None).network.parameters()} == {torch.float32}


def test_another_run_cannot_be_resumed(hybrid, text, tmp_path):
    fit(module(hybrid), text, tmp_path / "lora", Checkpoints(every=1), max_steps=1)
    fit(module(hybrid, None), text, tmp_path / "full", Checkpoints(every=1), max_steps=1)
    adapters, whole = (str(tmp_path / each / "checkpoints" / "step-1.ckpt") for each in ("lora", "full"))
    with pytest.raises(ValueError, match="the checkpoint holds adapters and this run trains all weights"):
        fit(module(hybrid, None), text, tmp_path / "x", ckpt_path=adapters)
    with pytest.raises(ValueError, match="the checkpoint holds all weights and this run trains adapters"):
        fit(module(hybrid), text, tmp_path / "x", ckpt_path=whole)
    with pytest.raises(ValueError, match=r"trained with rank=4, and model.lora.rank=5 now; resume with"):
        fit(module(hybrid, LoRAConfig(rank=5)), text, tmp_path / "x", ckpt_path=adapters)
    other = ZooForCausalLM.from_pretrained(hybrid)
    with torch.no_grad():
        other.model.embedding.weight[3, 3] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"trained with base=.* the saved model is another one"):
        fit(module(tmp_path / "other"), text, tmp_path / "x", ckpt_path=adapters)


def test_a_fingerprint_is_of_numbers_and_names():
    torch.manual_seed(0)
    one = torch.nn.Linear(3, 5).bfloat16()
    two = torch.nn.Linear(3, 5).bfloat16()
    assert fingerprint(one) != fingerprint(two)
    two.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(two)
    assert fingerprint(torch.nn.Sequential(one)) != fingerprint(one)
    with torch.no_grad():
        two.weight.copy_(two.weight.roll(1, 0))
    assert fingerprint(one) != fingerprint(two)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.lora.rank", "0"], "lora.rank=0 must be at least 1"),
        (["--model.lora.alpha", "0"], "lora.alpha=0.0 must be positive"),
        (["--model.lora.dropout", "1"], "lora.dropout=1.0 is a probability"),
        (["--model.lora.targets", "[]"], "lora.targets=[] names nothing"),
        (["--model.lora.targets", "[qvk]"], "'qvk' is no linear map of this model's blocks (did you mean 'qkv'?)"),
        (["--model.lora.rnk", "3"], "Option 'rnk' is not accepted"),
        (["--model.lora", "{}", "--data.tokenizer", "bytes"], "was trained with another tokenizer"),
    ],
)
def test_mistakes_are_told(llama, text, tmp_path, arguments, message, capsys):
    try:
        status = finetune(llama, text, tmp_path / "run", *arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_a_model_without_a_tokenizer_asks_for_one(hybrid, llama, text, tmp_path, capsys):
    assert finetune(hybrid, text, tmp_path / "run") == 2
    assert "lies no tokenizer that can be read" in capsys.readouterr().err
    assert finetune(hybrid, text, tmp_path / "run", "--data.tokenizer", "bytes", "--trainer.max_steps", "1") == 0
    with pytest.raises(ValueError, match="holds no adapter"):
        raise_of("convert", "merge", "--from", llama, "--to", tmp_path / "x", capsys=capsys)
    assert not (tmp_path / "x").exists()


def raise_of(*argv, capsys):
    """The error of a command that ends with status 2."""
    capsys.readouterr()
    assert run(*argv) == 2
    raise ValueError(capsys.readouterr().err)


def test_adapters_name_their_base_as_it_was_given(llama, monkeypatch):
    """A folder by its whole path, since the adapter may be loaded from elsewhere; a hub id as it is."""
    monkeypatch.chdir(llama.parent)
    names = []
    for base in (llama.name, "owner/name"):
        made = Adapters(zoo.convert.load(llama), LoRAConfig(rank=1), base)
        names.append(made.peft.active_peft_config.base_model_name_or_path)
    assert names == [str(llama), "owner/name"]
