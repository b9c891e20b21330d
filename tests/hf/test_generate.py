"""`generate` in every mode says, token for token, what reading the whole sequence again for every token says."""

import copy
import inspect
import warnings

import pytest
import torch
from transformers import DynamicCache, StoppingCriteriaList

from tests.hf.models import STACKS, causal, greedy, left_padded, tokens
from zoo.hf import ZooCache, ZooForCausalLM, save_byte_tokenizer
from zoo.hf.generate import generate

NEW = 12
stacks = pytest.mark.parametrize("stack", STACKS)


class Crops:
    """Counts the tokens that drafts lost and the calls of a model's forward."""

    def __init__(self, monkeypatch):
        self.lost = self.calls = self.kept = 0
        crop, forward = ZooCache.crop, ZooForCausalLM.forward

        def counting_crop(cache, tokens_to_remove):
            self.lost += -tokens_to_remove
            return crop(cache, tokens_to_remove)

        def counting_forward(model, *args, **kwargs):
            self.calls += 1
            return forward(model, *args, **kwargs)

        counting_forward.__signature__ = inspect.signature(forward)  # pyright: ignore, transformers reads it
        monkeypatch.setattr(ZooCache, "crop", counting_crop)
        monkeypatch.setattr(ZooForCausalLM, "forward", counting_forward)


@stacks
def test_greedy(stack):
    model, ids = causal(stack), tokens()
    wanted = greedy(model, ids, NEW)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False), wanted)
    assert torch.equal(model.generate(ids, max_length=ids.shape[1] + NEW, do_sample=False), wanted)
    assert len(wanted[0, -NEW:].unique()) > 2, "a model that repeats itself proves nothing"


@stacks
def test_float32(stack):
    model, ids = causal(stack, dtype=torch.float32), tokens()
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False), greedy(model, ids, NEW))


@stacks
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.3},
        {"do_sample": True, "top_k": 10, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"num_beams": 2, "do_sample": True, "no_repeat_ngram_size": 2},
        {"do_sample": False, "prefill_chunk_size": 4},
    ],
    ids=["sample", "several", "beams", "beam-sample", "chunked-prefill"],
)
def test_with_and_without_cache(stack, options):
    model = causal(stack)
    ids, mask = left_padded([tokens(1, 9)[0], tokens(1, 5, seed=2)[0]])
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        if not use_cache:
            options = {name: value for name, value in options.items() if name != "prefill_chunk_size"}
        found.append(model.generate(ids, attention_mask=mask, max_new_tokens=NEW, use_cache=use_cache, **options))
    assert torch.equal(*found)


@stacks
def test_left_padding_changes_nothing(stack):
    model = causal(stack)
    rows = [tokens(1, length, seed=length)[0] for length in (9, 4, 1)]
    ids, mask = left_padded(rows)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, greedy(model, ids, NEW, mask))
    for row, each in zip(rows, found, strict=True):
        assert torch.equal(each[-NEW:], greedy(model, row[None], NEW)[0, -NEW:])


@stacks
def test_prompt_lookup(stack, monkeypatch):
    model, ids = causal(stack), tokens(1, 40)  # of 39 tokens: the last one mostly stood before
    wanted = greedy(model, ids, 30)
    count = Crops(monkeypatch)
    found = model.generate(
        ids, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=5, max_matching_ngram_size=1
    )
    assert torch.equal(found, wanted)
    assert count.lost > 0, "no draft was refused"


@stacks
@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0], ids=["twin", "near", "stranger"])
def test_assistant(stack, noise, monkeypatch):
    model, ids = causal(stack), tokens(1)
    wanted = greedy(model, ids, 30)
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += noise * torch.randn_like(parameter) * parameter.std(correction=0)
    draft.generation_config.num_assistant_tokens = 6
    draft.generation_config.assistant_confidence_threshold = 0.0
    count = Crops(monkeypatch)
    found = model.generate(ids, max_new_tokens=30, do_sample=False, assistant_model=draft)
    assert torch.equal(found, wanted)
    if noise:
        assert count.lost > 0, "no draft was refused"
    else:
        assert count.lost == 0, "a draft by the model itself was refused"


@stacks
def test_sampling_with_an_assistant(stack):
    """So cold that sampling takes the likeliest token: what drafts change would be seen."""
    model, ids = causal(stack), tokens(1)
    options = {"do_sample": True, "temperature": 1e-4, "max_new_tokens": NEW}
    found = model.generate(ids, assistant_model=causal(stack, seed=3), **options)
    assert torch.equal(found, greedy(model, ids, NEW))


def test_assistant_with_drafts_longer_than_the_first_bound():
    model, ids = causal("hybrid"), tokens(1, 3)
    draft = causal("recurrent", seed=7)
    draft.generation_config.num_assistant_tokens = 70
    draft.generation_config.num_assistant_tokens_schedule = "heuristic"
    draft.generation_config.assistant_confidence_threshold = 0.0
    enough = StoppingCriteriaList([lambda ids, scores: torch.tensor([ids.shape[1] >= 8] * len(ids))])
    options = {"max_new_tokens": 90, "do_sample": False, "stopping_criteria": enough}
    found = model.generate(ids, assistant_model=draft, **options)
    assert found.shape[1] >= 8
    assert torch.equal(found, greedy(model, ids, found.shape[1] - 3))


@stacks
def test_padded_prompt_with_an_assistant(stack):
    model = causal(stack)
    ids, mask = left_padded([tokens(1, 5)[0], tokens(1, 9)[0]])
    ids, mask = ids[:1], mask[:1]
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, assistant_model=causal(stack, seed=3)
    )
    assert torch.equal(found, greedy(model, ids, NEW, mask))


@stacks
@pytest.mark.parametrize("lookup", [None, 3], ids=["plain", "prompt-lookup"])
def test_several_tokens_continue_a_returned_cache(stack, lookup):
    model, ids = causal(stack), tokens(1, 8)
    first = model.generate(
        ids, max_new_tokens=9, do_sample=False, return_dict_in_generate=True, prompt_lookup_num_tokens=lookup
    )
    cache = first.past_key_values
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    longer = torch.cat([first.sequences, tokens(1, 6, seed=4)], 1)
    wanted = greedy(model, longer, NEW)
    again = copy.deepcopy(cache)
    found = model.generate(longer, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, wanted)
    # The new tokens alone, with a mask over all.
    new = longer[:, again.get_seq_length() :]
    found = model.generate(
        new, past_key_values=again, attention_mask=torch.ones_like(longer), max_new_tokens=NEW, do_sample=False
    )
    assert torch.equal(found[:, -NEW:], wanted[:, -NEW:])


@stacks
def test_padded_batch_continues(stack):
    model = causal(stack)
    ids, mask = left_padded([tokens(1, 3)[0], tokens(1, 7, seed=2)[0]])
    first = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, tokens(2, 4, seed=6)], 1)
    mask = torch.nn.functional.pad(mask, (0, longer.shape[1] - mask.shape[1]), value=1)
    found = model.generate(
        longer, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=NEW, do_sample=False
    )
    assert torch.equal(found, greedy(model, longer, NEW, mask))


@stacks
def test_one_prompt_for_several_uses(stack):
    model, prompt = causal(stack), tokens(1, 7)
    kept = ZooCache()
    with torch.no_grad():
        model(prompt, past_key_values=kept)
    for seed in (2, 3):
        longer = torch.cat([prompt, tokens(1, 3, seed=seed)], 1)
        found = model.generate(longer, past_key_values=copy.deepcopy(kept), max_new_tokens=NEW, do_sample=False)
        assert torch.equal(found, greedy(model, longer, NEW))


@stacks
def test_embeddings_as_prompt(stack):
    model, ids = causal(stack), tokens()
    wanted = greedy(model, ids, NEW)[:, -NEW:]
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False), wanted)


def test_end_of_text_stops_a_row():
    model, ids = causal("hybrid"), tokens()
    free = greedy(model, ids, NEW)
    end = int(free[0, ids.shape[1] + 3])
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=0)
    row = free[0, ids.shape[1] :].tolist()
    stop = row.index(end) + 1
    assert found[0, ids.shape[1] :].tolist()[:stop] == row[:stop]
    assert not found[0, ids.shape[1] + stop :].any()


def test_bad_calls_say_what_to_do():
    model, ids = causal(["swiglu", "rwkv4"]), tokens()
    with pytest.raises(ValueError, match="the prompt is empty; pass at least one token"):
        model.generate(ids[:, :0], max_new_tokens=2)
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate(max_new_tokens=2)
    with pytest.raises(ValueError, match=r"token 99, the model's vocabulary has 40; use the tokenizer"):
        model.generate(ids.clone().fill_(99), max_new_tokens=2)
    with pytest.raises(ValueError, match="one document a row and attention_mask holds ids up to 2"):
        model.generate(ids, attention_mask=torch.full_like(ids, 2), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"a row of the prompt ends in padding.*pad on the left"):
        model.generate(ids, attention_mask=torch.tensor([[1] * 9, [1] * 8 + [0]]), max_new_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation='static' is no way"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    cache = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match=r"the cache holds 10 tokens and the input 9; pass the whole sequence"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="keep their state in a ZooCache"):
        model(ids, past_key_values=DynamicCache())
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="cache and past_key_values are two names of one thing"):
            call(ids, cache=ZooCache(), past_key_values=cache)


def test_both_names_of_a_cache():
    """transformers renamed past_key_values to cache: a model takes and gives both, silently."""
    model, ids = causal("hybrid"), tokens()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message=".*past_key_values")
        first = model(ids, use_cache=True)
        assert isinstance(first.cache, ZooCache)
        assert first.past_key_values is first["past_key_values"] is first["cache"] is first.get("cache") is first.cache
        assert first.get("past_key_values") is first.cache and "past_key_values" in first and "cache" in first
        without = model(ids, use_cache=False)
        assert without.past_key_values is None and without.get("past_key_values", 7) == 7
        assert "past_key_values" not in without and "cache" not in without
        kept, found = copy.deepcopy(first.cache), []
        for name in ("cache", "past_key_values"):
            out = model(ids[:, :2], **{name: copy.deepcopy(kept)})
            made = model.generate(
                torch.cat([ids, ids], 1), **{name: copy.deepcopy(kept)}, max_new_tokens=3, do_sample=False
            )
            found.append((out.logits, made))
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    again = model.generate(torch.cat([ids, ids], 1), max_new_tokens=3, do_sample=False)
    assert torch.equal(found[0][1], again)


@pytest.mark.parametrize(
    ("place", "options", "message"),
    [
        ("run/model", {"device": "nothing"}, "device='nothing' cannot be used here"),
        ("run/model", {"top_p": 3.0}, r"top_p=3\.0 is a share of the probability"),
        ("run", {}, r"run holds no saved model .*; it is in .*run/model"),
        ("nowhere", {}, "there is no folder .*nowhere"),
        ("bare", {}, r"bare holds no tokenizer .*zoo\.hf\.save_byte_tokenizer"),
    ],
)
def test_the_command_says_what_to_do(tmp_path, place, options, message):
    for name in ("run/model", "bare"):
        causal(["swiglu"], vocab_size=256).save_pretrained(tmp_path / name)
    save_byte_tokenizer(tmp_path / "run/model")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        generate(str(tmp_path / place), "a", **options)


def test_the_command_writes_what_the_model_says(tmp_path, capsys):
    model = causal("hybrid", vocab_size=256, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    told = generate(str(tmp_path), "def f", max_new_tokens=5, temperature=0, device="cpu")
    wanted = greedy(model, torch.tensor([list(b"def f")]), 5)
    assert told["text"] == bytes(wanted[0].tolist()).decode(errors="replace")
    assert told["tokens"] == 5
    assert told["text"] in capsys.readouterr().out
