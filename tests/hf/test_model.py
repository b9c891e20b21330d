"""Masks, losses, embeddings and checkpointing of the transformers models."""

import pytest
import torch
from torch.nn import functional

from tests.hf.models import STACKS, VOCAB, WIDTH, causal, config, left_padded, masked, tokens
from zoo.hf import ZooForCausalLM, ZooForMaskedLM, ZooOutput
from zoo.model import losses

stacks = pytest.mark.parametrize("stack", STACKS)
PACKED = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 3, 3, 3], [4, 4, 4, 4, 4, 1, 0, 0, 0, 0, 0]])


def cross_entropy(logits, labels):
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


@stacks
def test_loss(stack):
    model, ids = causal(stack).train(), tokens(2, 11)
    labels = ids.clone()
    labels[0, :4] = labels[1, 6] = -100
    out = model(ids, labels=labels)
    plain = cross_entropy(out.logits, labels)
    torch.testing.assert_close(out.loss, plain + losses(out.aux or {}), check_dtype=False)
    if stack == "hybrid":
        assert out.aux
        assert float(losses(out.aux)) > 0
    counted = model(ids, labels=labels, num_items_in_batch=torch.tensor(100))
    expected = plain * (labels[:, 1:] != -100).sum() / 100 + losses(out.aux or {})
    torch.testing.assert_close(counted.loss, expected, check_dtype=False)
    assert out.past_key_values is None
    assert model(ids, labels=labels, return_dict=False)[0] == out.loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(100)}, {"ignore_index": -7}], ids=str)
def test_the_loss_without_logits(kind, options):
    """The same loss and gradients, of packed rows too, and no logits."""
    if kind == "causal":
        model = causal("hybrid").train()
    else:
        model = masked([{"kind": "gqa", "heads": 4, "causal": False}, "swiglu"]).train()
    ids = tokens(2, 11)
    labels = ids.clone()
    labels[0, :4] = labels[1, 3] = options.get("ignore_index", -100)
    for mask in (None, PACKED if kind == "causal" and not options.get("ignore_index") else torch.ones_like(ids)):
        given = {"input_ids": ids, "attention_mask": mask, "labels": labels, **options}
        wanted = model(**given)
        found = model(**given, skip_logits=True)
        assert found.logits is None
        # transformers' own loss of a masked model is float32's
        like = {"check_dtype": False, "rtol": 1e-5, "atol": 1e-7} if kind == "masked" else {}
        torch.testing.assert_close(found.loss, wanted.loss, **like)
        torch.testing.assert_close(gradients(model, found.loss), gradients(model, wanted.loss), **like)
        assert len(model(**given, skip_logits=True, return_dict=False)) == len(wanted.to_tuple()) - 1


def test_who_skips_logits():
    """In training, as the configuration says; a call says otherwise."""
    model, ids = causal("attention"), tokens(2, 11)
    model.config.skip_logits = True
    assert model(ids, labels=ids).logits is not None
    assert model(ids, labels=ids, skip_logits=True).logits is None
    model.train()
    assert model(ids, labels=ids).logits is None
    assert model(ids).logits is not None
    assert model(ids, labels=ids, skip_logits=False).logits is not None
    assert model(ids, labels=ids, output_hidden_states=True).hidden_states[-1].shape == (2, 11, WIDTH)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=shifted).loss, model(ids, labels=ids).loss)
    for given in ({}, {"labels": ids, "use_cache": True}):
        with pytest.raises(ValueError, match="skip_logits"):
            model(ids, skip_logits=True, **given)
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 7
    assert float(model(ids, labels=ids).loss) == 7
    with pytest.raises(ValueError, match="loss_function"):
        model(ids, labels=ids, skip_logits=True)


def test_transformers_own_trainer(tmp_path):
    """It trains without logits as it does with them, and evaluates with them."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 11).tolist()]
    common = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.01, "report_to": [], "use_cpu": True}
    losses_ = []
    for skip in (False, True):
        model = causal("hybrid")
        model.config.skip_logits = skip
        trainer = Trainer(model, TrainingArguments(str(tmp_path / str(skip)), **common), train_dataset=rows)
        trained = trainer.train().training_loss
        predicted = trainer.predict(rows[:2])
        assert predicted.predictions.shape == (2, 11, VOCAB)
        losses_.append((trained, predicted.metrics["test_loss"]))
    assert losses_[0] == pytest.approx(losses_[1], rel=1e-6)


@stacks
@torch.no_grad()
def test_packed_documents_are_separate_ones(stack):
    model, ids = causal(stack), tokens(2, 11)
    out = model(ids, attention_mask=PACKED, labels=ids)
    losses_, targets = 0.0, 0
    for row, segments in zip(ids, PACKED, strict=True):
        for document in segments.unique_consecutive():
            if document == 0:
                continue
            alone = row[segments == document][None]
            apart = model(alone, use_cache=False).logits
            found = out.logits[(ids == row).all(1)][0][segments == document]
            torch.testing.assert_close(found, apart[0])
            if alone.shape[1] > 1:
                losses_ += cross_entropy(apart, alone) * (alone.shape[1] - 1)
                targets += alone.shape[1] - 1
    torch.testing.assert_close(out.loss - losses(out.aux or {}), losses_ / targets, check_dtype=False)


@stacks
@torch.no_grad()
def test_positions_tell_documents_apart(stack):
    """What DataCollatorWithFlattening gives: one row, no mask, positions from 0 for each document."""
    model, ids = causal(stack), tokens(1, 9)
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 3]])
    found = model(ids, position_ids=position_ids, labels=ids)
    wanted = model(ids, attention_mask=segments, labels=ids)
    torch.testing.assert_close(found.logits, wanted.logits)
    torch.testing.assert_close(found.loss, wanted.loss)
    plain = model(ids, position_ids=torch.arange(9)[None], use_cache=False).logits
    torch.testing.assert_close(plain, model(ids, use_cache=False).logits)


@stacks
@torch.no_grad()
def test_masks(stack):
    model = causal(stack)
    rows = [tokens(1, 8)[0], tokens(1, 3, seed=2)[0]]
    ids, mask = left_padded(rows)
    for given in (mask, mask.bool(), mask.int()):
        logits = model(ids, attention_mask=given, use_cache=False).logits
        for row, found in zip(rows, logits, strict=True):
            torch.testing.assert_close(found[-len(row) :], model(row[None], use_cache=False).logits[0])
    ones = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    assert torch.equal(ones, model(ids, use_cache=False).logits)


@torch.no_grad()
def test_what_is_returned():
    model, ids = causal("hybrid"), tokens()
    whole = model(ids)
    assert isinstance(whole, ZooOutput)
    assert whole.past_key_values.get_seq_length() == 9
    assert whole.hidden_states is None
    for use_cache in (True, False):
        for keep in (1, 4, 20, torch.tensor([0, 5])):
            out = model(ids, logits_to_keep=keep, use_cache=use_cache, output_hidden_states=True)
            wanted = whole.logits[:, keep] if isinstance(keep, torch.Tensor) else whole.logits[:, -keep:]
            torch.testing.assert_close(out.logits, wanted)
            assert (out.past_key_values is not None) == use_cache
            assert len(out.hidden_states) == len(STACKS["hybrid"]) + 1
            assert all(each.shape == (2, 9, WIDTH) for each in out.hidden_states)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    torch.testing.assert_close(embedded.logits, whole.logits)
    model.config.use_cache = False
    assert model(ids).past_key_values is None
    with torch.enable_grad():
        assert causal("hybrid")(ids).past_key_values is None


@stacks
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # the name that every release knows
def test_activation_checkpointing(stack):
    model, ids = causal(stack).train(), tokens()
    calls = []
    model.model.blocks[0].block.register_forward_pre_hook(lambda *_: calls.append(1))
    found = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        calls.clear()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        assert len(calls) == 1 + enable, "the block runs again in the backward pass"
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    model.gradient_checkpointing_disable()
    calls.clear()
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 1


@pytest.mark.parametrize("size", [30, 50])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_resizing_the_vocabulary(size, tied, tmp_path):
    model, ids = causal(["swiglu", "rwkv4"], tied_embeddings=tied, dtype=torch.float32), tokens().clamp(max=29)
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(size)
    with torch.no_grad():
        after = model(ids).logits
    assert after.shape[-1] == size == model.config.vocab_size == model.model.config.vocab_size
    kept = min(size, VOCAB)
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(ZooForCausalLM.from_pretrained(tmp_path)(ids).logits, after)


def test_setting_embeddings():
    model = causal(["swiglu"], dtype=torch.float32)
    new = torch.nn.Embedding(VOCAB, WIDTH)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new
    assert model.model.embedding is new


def test_it_learns():
    model, ids = causal("hybrid", dtype=torch.float32, init_std=0.02).train(), tokens(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.5 * seen[0]


def test_it_compiles_whole():
    model, ids = causal(["swiglu", "mlp"], dtype=torch.float32).train(), tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mask in (None, torch.ones_like(ids).index_fill(1, torch.arange(3), 0)):
        plain, found = (each(ids, attention_mask=mask, labels=ids) for each in (model, compiled))
        torch.testing.assert_close(found.loss, plain.loss)
        torch.testing.assert_close(found.logits, plain.logits)


def test_masked_model():
    torch.manual_seed(0)
    stack = [{"kind": "gqa", "heads": 2, "causal": False}, "swiglu"]
    model = ZooForMaskedLM(config(stack, objective="masked")).double().eval()
    ids = tokens()
    labels = torch.full_like(ids, -100)
    labels[0, 3] = labels[1, 0] = 7
    out = model(ids, labels=labels)
    wanted = functional.cross_entropy(out.logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, wanted, check_dtype=False)
    changed = ids.clone()
    changed[:, -1] = 3
    assert (model(changed).logits[:, 0] != out.logits[:, 0]).any(), "the first token does not see the last"
    rows = [tokens(1, 8)[0], tokens(1, 3, seed=2)[0]]
    padded, mask = left_padded(rows)
    for row, found in zip(rows, model(padded, attention_mask=mask).logits, strict=True):
        torch.testing.assert_close(found[-len(row) :], model(row[None]).logits[0])
    assert not model.can_generate()


def test_a_causal_stack_may_be_masked_too():
    model = ZooForMaskedLM(config(["rwkv4", "swiglu"], objective="masked")).eval()
    assert model(tokens()).logits.shape == (2, 9, VOCAB)


@pytest.mark.parametrize("make", [causal, lambda s: ZooForMaskedLM(config(s, objective="masked")).double()])
def test_bad_inputs(make):
    model, ids = make(["swiglu"]), tokens()
    with pytest.raises(ValueError, match="pass either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="pass either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(2, 9, WIDTH))
    with pytest.raises(ValueError, match="the input is empty; pass at least one token"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 9, 9\); pass \[batch, time\]"):
        model(ids, attention_mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(ValueError, match="attention_mask has 5 columns for 9 new tokens"):
        model(ids, attention_mask=torch.ones(2, 5).long())
    with pytest.raises(TypeError, match="segments must hold integers"):
        model(ids, attention_mask=torch.full((2, 9), 0.5))
    with pytest.raises(ValueError, match="no attention maps; leave output_attentions out"):
        model(ids, output_attentions=True)


def test_labels_need_all_logits():
    with pytest.raises(ValueError, match="labels need the logits of every position"):
        causal(["swiglu"])(tokens(), labels=tokens(), logits_to_keep=1)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 8\) and the input \(2, 9\)"):
        causal(["swiglu"])(tokens(), labels=tokens()[:, 1:])
