"""`zoo convert` as a user types it, and training on from what it writes."""

import json

import pytest
import torch
import transformers

from tests.convert.peer import randomise
from tests.train.helpers import write_text
from zoo.cli import main
from zoo.hf import ZooConfig, ZooForCausalLM, load_tokenizer, save_byte_tokenizer

SIZES = {
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A published checkpoint with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), 0.2).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def run(*argv) -> int:
    return main([str(each) for each in argv])


def logits(folder):
    return ZooForCausalLM.from_pretrained(folder)(torch.arange(60, 80)[None]).logits


def test_there_and_back(llama, tmp_path, capsys):
    assert run("convert", "--from", llama, "--to", tmp_path / "zoo") == 0
    assert "holds a zoo checkpoint" in capsys.readouterr().out
    assert run("convert", "--from", tmp_path / "zoo", "--to", tmp_path / "back", "--family", "llama") == 0
    assert "holds a llama checkpoint" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "back")("abc")["input_ids"] == [97, 98, 99]
    assert (tmp_path / "back" / "config.json").read_text() == (llama / "config.json").read_text()


@pytest.mark.parametrize("operation", [["upcycle", "--experts", "3"], ["moefy", "--experts", "4"]])
def test_an_operation_and_training_on(operation, llama, tmp_path, capsys):
    """On a published checkpoint at once; the result is the same function, and one step of finetuning changes it."""
    made = tmp_path / "made"
    assert run("convert", *operation, "--from", llama, "--to", made) == 0
    assert f"zoo finetune --from {made}" in capsys.readouterr().out
    assert run("convert", "--from", llama, "--to", tmp_path / "zoo") == 0
    torch.testing.assert_close(logits(made), logits(tmp_path / "zoo"), rtol=1e-4, atol=1e-4)
    said = json.loads((made / "config.json").read_text())["model"]
    assert [each["kind"] for each in said["stack"]] == ["gqa", "moe"] * 2
    text = write_text(tmp_path / "text")
    options = {"data.source": text, "data.length": 16, "data.batch_size": 2, "data.cache": tmp_path / "cache"}
    options |= {"trainer.max_steps": 1, "trainer.accelerator": "cpu", "trainer.default_root_dir": tmp_path / "run"}
    options |= {"trainer.limit_val_batches": 1, "model.optimizer.learning_rate": "1.0e-2"}
    argv = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert run("finetune", "--from", made, *argv) == 0
    assert ZooForCausalLM.from_pretrained(tmp_path / "run" / "model").config.model["stack"] == said["stack"]
    assert not torch.allclose(logits(tmp_path / "run" / "model"), logits(made))


def test_share_kv_goes_back_to_the_published_format(llama, tmp_path):
    """--from and --to may stand before the operation."""
    assert run("convert", "--from", llama, "--to", tmp_path / "made", "share-kv", "--kv-heads", "2") == 0
    assert run("convert", "--from", tmp_path / "made", "--to", tmp_path / "back") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert theirs.config.num_key_value_heads == 2
    tokens = torch.arange(60, 80)[None]
    torch.testing.assert_close(theirs(tokens).logits, logits(tmp_path / "made"), rtol=1e-4, atol=1e-4)


def test_moefy_learns_from_a_text(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the state of the token is a block of the wave " * 30)
    for name, more in (("learned", ["--text", text]), ("similar", [])):
        arguments = ["--from", llama, "--to", tmp_path / name, "--experts", 4, "--top-k", 2]
        assert run("convert", "moefy", *arguments, *more) == 0
    learned, similar = (ZooForCausalLM.from_pretrained(tmp_path / name) for name in ("learned", "similar"))
    router = "model.blocks.1.block.router.bias"
    assert learned.state_dict()[router].any()
    assert not similar.state_dict()[router].any()


def test_a_masked_model_too(tmp_path):
    from zoo.hf import ZooForMaskedLM

    blocks = [{"kind": "gqa", "causal": False}, "swiglu"]
    described = {"vocab_size": 9, "width": 16, "stack": blocks, "objective": "masked"}
    ZooForMaskedLM(ZooConfig(model=described)).save_pretrained(tmp_path / "masked")
    assert run("convert", "upcycle", "--from", tmp_path / "masked", "--to", tmp_path / "made") == 0
    tokens = torch.randint(0, 9, (2, 7))
    made, parent = (ZooForMaskedLM.from_pretrained(tmp_path / each) for each in ("made", "masked"))
    torch.testing.assert_close(made(tokens).logits, parent(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--to", "x"], "which checkpoint? Give --from a folder"),
        (["upcycle", "--from", "/no/such"], "which checkpoint? Give --to a folder"),
        (["upcycle", "--from", "/no/such", "--to", "x"], "there is no folder /no/such"),
        (["--from", "/no/such", "--to", "x"], "there is no folder /no/such"),
        (["upcycle", "--from", "LLAMA", "--to", "x", "--top-k", "1"], "top_k=1 must be an integer from 2"),
        (["--family", "llama", "upcycle", "--from", "LLAMA", "--to", "x"], "upcycle writes a zoo checkpoint"),
        (["moefy", "--from", "LLAMA", "--to", "x", "--text", "EMPTY"], "is empty; give a text"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, message, llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").touch()
    assert run("convert", *(llama if each == "LLAMA" else each for each in argv)) == 2
    told = capsys.readouterr().err
    assert told.startswith("zoo convert: ")
    assert message in told
    assert not (tmp_path / "x").exists()
