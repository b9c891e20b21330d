"""`zoo evaluate`: lm-eval's tasks and perplexity of texts, against sums of log-probabilities made by hand."""

import json
import math
import socket

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.convert.peer import randomise
from tests.hf.models import causal, greedy, masked
from zoo.cli import main
from zoo.hf import ZooForCausalLM, byte_tokenizer, save_byte_tokenizer
from zoo.hf.evaluate import evaluate, harness
from zoo.hf.harness import HarnessLM, boundary, context_length, run_tasks
from zoo.hf.perplexity import Text, encode, read_text, sliding, streamed

CHOICES = [
    {"question": "one and", "choices": ["two", "three more", "x"], "answer": 0},
    {"question": "q", "choices": ["aaaa", "b"], "answer": 1},
    {"question": "a much longer question than others", "choices": ["no", "yes", "maybe so"], "answer": 2},
    {"question": "ééé", "choices": ["ü", "words"], "answer": 0},
    {"question": "again", "choices": ["!", "?"], "answer": 1},
]
TEXTS = ["the first text is long enough for several windows of a few tokens each, three", "short", "ünïcode here\n"]
PROMPTS = ["first prompt", "p", "a rather longer prompt", "another one", "fifth"]
LENGTH = 36  # tokens of context


def letters(stack: str) -> ZooForCausalLM:
    """A model of bytes that only says letters."""
    model = causal(stack, vocab_size=256)
    with torch.no_grad():
        model.model.head.weight[: ord("a")] = 0
        model.model.head.weight[ord("z") + 1 :] = 0
    return model


@pytest.fixture
def offline(monkeypatch):
    """Any attempt to reach the network is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"connects to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def write_tasks(folder, **tasks) -> None:
    """A YAML file and a file of documents for each task, as a user would write them."""
    for name, (documents, options) in tasks.items():
        rows = folder / f"{name}.jsonl"
        rows.write_text("".join(json.dumps(each) + "\n" for each in documents))
        said = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(json.dumps(said | options))  # JSON is YAML


CHOICE_TASK = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
TEXT_TASK = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
}
WRITING_TASK = {
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["q"], "max_gen_toks": 9, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


@torch.no_grad()
def nats(model, context: list[int], then: list[int]) -> float:
    """-log p(then | context) from one forward without padding or cache."""
    logits = model(torch.tensor([context + then]), use_cache=False).logits[0].log_softmax(-1)
    return -float(sum(logits[len(context) + place - 1, token] for place, token in enumerate(then)))


def windowed_nats(model, text: list[int], length: int) -> float:
    """As the harness says: windows that do not overlap but for the token before each; 0 stands before the text."""
    whole, total = [0, *text], 0.0
    for begin in range(0, len(text), length):
        end = min(begin + length, len(text))
        # The last window is filled up with context.
        start = begin if begin == 0 or end - begin == length else max(end - length, 0)
        total += nats(model, whole[start : begin + 1], text[begin:end])
    return total


@pytest.mark.parametrize("stack", ["recurrent", "hybrid"])
@pytest.mark.usefixtures("offline")
def test_tasks_of_every_type_equal_sums_by_hand(stack, tmp_path):
    model, tokenizer = letters(stack), byte_tokenizer()
    written = [
        tokenizer.decode(greedy(model, torch.tensor([list(each.encode())]), 9)[0, len(each.encode()) :]).split("q")[0]
        for each in PROMPTS
    ]
    answers = [each if index % 2 == 0 else f"{each}!" for index, each in enumerate(written)]
    assert any(len(each) == 9 for each in written) and len(set(written)) > 2
    write_tasks(
        tmp_path,
        choice=(CHOICES, CHOICE_TASK),
        texts=([{"text": each} for each in TEXTS], TEXT_TASK),
        writing=([{"prompt": p, "answer": a} for p, a in zip(PROMPTS, answers, strict=True)], WRITING_TASK),
    )
    right = normed = 0
    for each in CHOICES:
        scores = [-nats(model, list(each["question"].encode()), list(f" {c}".encode())) for c in each["choices"]]
        right += int(np.argmax(scores)) == each["answer"]
        normed += (
            int(np.argmax([value / len(c) for value, c in zip(scores, each["choices"], strict=True)])) == each["answer"]
        )
    bits = sum(windowed_nats(model, list(each.encode()), LENGTH) for each in TEXTS) / math.log(2)
    bits_per_byte = bits / sum(len(each.encode()) for each in TEXTS)
    for batch_size in (1, 4):
        options = {"include_path": str(tmp_path), "batch_size": batch_size, "max_length": LENGTH}
        found = run_tasks(model, tokenizer, ["choice", "texts", "writing"], **options)["results"]
        assert found["choice"]["acc,none"] == pytest.approx(right / len(CHOICES))
        assert found["choice"]["acc_norm,none"] == pytest.approx(normed / len(CHOICES))
        assert found["texts"]["bits_per_byte,none"] == pytest.approx(bits_per_byte, rel=1e-9)
        assert found["texts"]["byte_perplexity,none"] == pytest.approx(2**bits_per_byte, rel=1e-9)
        assert found["writing"]["exact_match,none"] == pytest.approx(3 / 5)


def requests(kind: str, *arguments: tuple):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


@pytest.mark.parametrize("stack", ["attention", "recurrent", "hybrid"])
def test_padding_changes_no_number(stack):
    """Requests of several lengths at once are padded; each has the log-probability it has alone."""
    model, pairs = letters(stack), [(text[:cut], text[cut:]) for text in TEXTS for cut in (1, 3, len(text) - 2)]
    alone = [-nats(model, list(begin.encode()), list(rest.encode())) for begin, rest in pairs]
    whole = [-windowed_nats(model, list(each.encode()), LENGTH) for each in TEXTS]
    for batch_size in (1, 4):
        lm = HarnessLM(model, byte_tokenizer(), batch_size, 200)
        found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
        assert [value for value, _ in found] == pytest.approx(alone, rel=1e-9)
        lm = HarnessLM(model, byte_tokenizer(), batch_size, LENGTH)
        asked = requests("loglikelihood_rolling", *((each,) for each in TEXTS))
        assert lm.loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(whole, rel=1e-9)


def test_the_harness_learns_what_a_model_and_its_tokenizer_are():
    model = causal("recurrent", vocab_size=256, dtype=torch.bfloat16)
    lm = HarnessLM(model, byte_tokenizer())
    assert (lm.prefix_token_id, lm.eot_token_id, lm.max_length, lm.softmax_dtype) == (0, 0, 2048, torch.float32)
    tokenizer = words()
    assert HarnessLM(causal("recurrent"), tokenizer).prefix_token_id == tokenizer.bos_token_id == 1
    assert boundary(model, tokenizer) == 1
    model.config.published = {"max_position_embeddings": 77}
    assert context_length(model) == 77
    assert context_length(causal([{"kind": "learned_position", "context": 9}, "mamba"])) == 9
    tokenizer = words()  # the harness gave the other one a token for padding
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="names none; add eos_token"):
        boundary(model, tokenizer)


def test_an_unknown_task_or_folder_is_named(tmp_path, monkeypatch):
    from zoo.hf import harness as module

    manager = module.TaskManager
    monkeypatch.setattr(  # the harness's own thousands take seconds to list
        module, "TaskManager", lambda include_path=None, include_defaults=True: manager(None, include_path, False)
    )
    write_tasks(tmp_path, choice=(CHOICES, CHOICE_TASK))
    model = causal("recurrent", vocab_size=256)
    with pytest.raises(ValueError, match=r"no task 'chioce' \(did you mean 'choice'\?\); `lm-eval ls tasks`"):
        run_tasks(model, byte_tokenizer(), ["chioce"], include_path=str(tmp_path))
    with pytest.raises(ValueError, match="limit=-1 must be a number of examples"):
        run_tasks(model, byte_tokenizer(), ["choice"], limit=-1)
    with pytest.raises(FileNotFoundError, match="no folder /no/such"):
        run_tasks(model, byte_tokenizer(), ["choice"], include_path="/no/such")
    found = run_tasks(model, byte_tokenizer(), [str(tmp_path / "choice.yaml")], limit=0.4)
    assert found["n-samples"]["choice"]["effective"] == 2


# Perplexity of a text -----------------------------------------------------------------------------------------------


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of words that puts a token before each text."""
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "[BOS]", "one", "two", "thrée", "four"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("[BOS] $0", special_tokens=[("[BOS]", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", bos_token="[BOS]")


def some_text(length: int = 53) -> Text:
    ids = np.random.default_rng(0).integers(0, 40, length)
    return Text(ids, length - 1)


def fixed_length(model, ids: list[int], window: int, stride: int) -> float:
    """transformers' recipe (perplexity of fixed-length models): labels of tokens that were predicted before are left
    out."""
    total, before = 0.0, 1
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        total += nats(model, ids[begin:before], ids[before:end])
        before = end
        if end == len(ids):
            break
    return total


@pytest.mark.parametrize("stack", ["recurrent", "hybrid"])
@pytest.mark.parametrize(
    ("window", "stride", "batch_size"), [(16, 4, 3), (16, 15, 1), (2, 1, 7), (7, 3, 2), (53, 9, 1), (99, 50, 2)]
)
def test_a_sliding_window_is_the_recipe(stack, window, stride, batch_size):
    model, text = causal(stack), some_text()
    found = sliding(model, text, window, stride, batch_size)
    assert found.nats == pytest.approx(fixed_length(model, text.ids.tolist(), window, stride), rel=1e-9)
    assert (found.tokens, found.bytes) == (52, 52)
    assert found.bits_per_byte == found.bits_per_token == pytest.approx(found.nats / 52 / math.log(2))
    assert found.perplexity == pytest.approx(2**found.bits_per_token)


class Watched:
    """In place of a model: notes how much context each predicted token has, and finds all tokens alike."""

    device = torch.device("cpu")

    def __init__(self):
        self.context: list[tuple[int, int]] = []

    def __call__(self, input_ids, use_cache, logits_to_keep):
        assert not use_cache
        for row in input_ids.tolist():
            self.context += [(row[place], place) for place in range(len(row) - logits_to_keep + 1, len(row))]
        return transformers.utils.ModelOutput(logits=torch.zeros(*input_ids.shape, 60)[:, -logits_to_keep:])


@pytest.mark.parametrize(("window", "stride"), [(8, 3), (8, 7), (10, 1), (60, 5)])
def test_each_token_is_predicted_once_with_enough_context(window, stride):
    model, text = Watched(), Text(np.arange(53), 52)
    found = sliding(model, text, window, stride, 2)
    assert found.perplexity == pytest.approx(60)
    assert sorted(token for token, _ in model.context) == list(range(1, 53))
    assert all(context >= min(token, window - stride) for token, context in model.context)


@pytest.mark.parametrize("stack", ["attention", "recurrent", "hybrid"])
def test_a_stream_is_a_window_without_end(stack):
    model, text = causal(stack), some_text()
    whole = nats(model, text.ids[:1].tolist(), text.ids[1:].tolist())
    assert sliding(model, text, 53, 1).nats == pytest.approx(whole, rel=1e-9)
    for chunk in (1, 7, 52, 100):
        found = streamed(model, text, chunk)
        assert found.nats == pytest.approx(whole, rel=1e-9)
    longer = streamed(model, some_text(80), 7)
    assert (longer.state_bytes == found.state_bytes) == (stack == "recurrent"), "a recurrence's state is constant"
    with pytest.raises(ValueError, match="window=0 is the length of a chunk"):
        streamed(model, text, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window=1 must be at least 2"),
        ({"window": 8, "stride": 8}, "stride=8 must be at least 1 and less than window=8"),
        ({"window": 8, "stride": 0}, "stride=0 must be at least 1"),
        ({"window": 8, "stride": 4, "batch_size": 0}, "batch_size=0"),
    ],
)
def test_a_window_that_cannot_be_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        sliding(causal("recurrent"), some_text(), **options)


def test_a_text_is_read_with_its_bytes(tmp_path):
    file = tmp_path / "text"
    file.write_bytes("é two\r\n".encode())
    found = read_text(file, byte_tokenizer())
    assert (found.ids.tolist(), found.bytes) == ([0xC3, 0xA9, *b" two\r\n"], 7)
    assert isinstance(found.ids, np.memmap)
    tokenizer = words()
    assert encode("one thrée\n", tokenizer) == (pytest.approx([1, 2, 4]), 11)  # [BOS] is no text
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$0")  # pyright: ignore
    assert encode("thrée one", tokenizer).bytes == 4  # all but the first word
    assert encode("", tokenizer).ids.size == 0
    file.write_bytes(b"one \xff")
    with pytest.raises(ValueError, match=r"is not UTF-8 \(byte 4\)"):
        read_text(file, tokenizer)
    for content in (b"", b"a"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"holds {len(content)} tokens"):
            read_text(file, byte_tokenizer())


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A zoo checkpoint and a published one, each with a tokenizer of bytes, and a text."""
    root = tmp_path_factory.mktemp("evaluate")
    causal(["mamba", "swiglu"], torch.float32, vocab_size=256, width=32, init_std=0.5).save_pretrained(root / "zoo")
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    torch.manual_seed(0)
    randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), 0.2).save_pretrained(root / "llama")
    masked(["bigs"], torch.float32, vocab_size=257).save_pretrained(root / "masked")
    for name in ("zoo", "llama", "masked"):
        save_byte_tokenizer(root / name)
    (root / "text").write_text("def f(x):\n    return x + 1\n" * 4)
    return root


def run(*argv) -> int:
    return main([str(each) for each in argv])


@pytest.mark.usefixtures("offline")
def test_the_command(folders, tmp_path, capsys):
    """On a published checkpoint: tasks and text at once, a table of each, and a file that holds all of it."""
    write_tasks(tmp_path, choice=(CHOICES, CHOICE_TASK))
    output = tmp_path / "results.json"
    argv = ["--tasks", "choice", "--include-path", tmp_path, "--limit", 3, "--batch-size", 2, "--output", output]
    argv += ["--text", folders / "text", "--window", 32, "--device", "cpu", "--dtype", "float64"]
    assert run("evaluate", "--model", folders / "llama", *argv) == 0
    printed = capsys.readouterr().out
    found = json.loads(output.read_text())
    score = found["text"]["scores"]["float64"]
    assert found["model"] == str(folders / "llama")
    assert (found["text"]["window"], found["text"]["stride"]) == (32, 16)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folders / "llama").double()
    wanted = fixed_length(theirs, list((folders / "text").read_bytes()), 32, 16)
    assert score["nats"] == pytest.approx(wanted, rel=1e-9)
    assert f"{score['bits_per_byte']:.4f}" in printed
    accuracy = found["harness"]["results"]["choice"]["acc,none"]
    assert found["harness"]["n-samples"]["choice"]["effective"] == 3
    assert f"{accuracy:.4f}" in printed and "acc_norm" in printed


def test_the_command_quantises_and_streams(folders, tmp_path, capsys):
    argv = ["--text", folders / "text", "--device", "cpu", "--stream", "--window", 20, "--quantize", "int8"]
    assert run("evaluate", "--model", folders / "zoo", *argv, "--output", tmp_path / "found.json") == 0
    assert "linear maps in 8 bits" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    before, after = (found["text"]["scores"][name] for name in ("float32", "int8"))
    assert before["bits_per_byte"] != after["bits_per_byte"]
    assert before["bits_per_byte"] == pytest.approx(after["bits_per_byte"], rel=0.02)
    assert found["quantized"]["after"] < found["quantized"]["before"]
    assert before["state_bytes"] > 0 and "stride" not in found["text"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "zoo"], "what shall be evaluated? Give --tasks NAME,... or --text FILE"),
        (["--model", "zoo", "--text", "text", "--stream", "--stride", "3"], "stride=3 is for a sliding window"),
        (["--model", "zoo", "--text", "none"], "none"),
        (["--model", "zoo", "--text", "text", "--batch-size", "some"], "batch_size='some' must be a number"),
        (["--model", "zoo", "--text", "none", "--quantize", "int3"], "quantize='int3' is unknown; choose from int8"),
        (["--model", "zoo", "--text", "text", "--output", "/no/such/file"], "there is no folder /no/such"),
        (["--model", "zoo", "--text", "text", "--dtype", "int8"], "dtype='int8' is unknown; use float32"),
        (["--model", "masked", "--text", "text"], "only causal models can"),
        (["--model", "none", "--text", "text"], "none"),
    ],
)
def test_a_mistake_is_one_line(argv, message, folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    argv = [str(folders / each) if each in ("none",) else each for each in argv]
    assert run("evaluate", "--device", "cpu", *argv) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("zoo evaluate: ") and told.count("\n") == 1


def test_a_missing_package_is_told(monkeypatch):
    import sys

    for name in [each for each in sys.modules if each.split(".")[0] == "lm_eval"] + ["zoo.hf.harness"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("zoo.hf.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"lm_eval is not installed: pip install 'efficient-zoo\[eval\]'"):
        evaluate(causal("recurrent"), byte_tokenizer(), tasks=["choice"])
    monkeypatch.undo()
    assert harness().run_tasks
