"""Learned positions: which row of the table a token gets, and what happens behind its last."""

import pytest
import torch

import zoo
from train.module import check_length
from train.optim import OptimizerConfig, groups
from zoo.layers.learned_position import LearnedPosition, PositionState


def make(context=12):
    return LearnedPosition(8, context=context).double()


def rows(block, x, y):
    """The row of the table that was added to each token, -1 where none was."""
    near = ((y - x)[..., None, :] - block.table.weight).abs().amax(-1)
    return torch.where(near.amin(-1) < 1e-12, near.argmin(-1), -1)


def test_rows_count_a_documents_own_tokens():
    """Padding counts nothing and comes out as zero; the next document begins at row 0; a state goes on."""
    block, x = make(), torch.randn(3, 9, 8, dtype=torch.float64)
    segments = torch.tensor([[1] * 9, [0, 0, 4, 4, 0, 4, 4, 2, 2], [5, 5, 5, 6, 6, 6, 6, 0, 0]])
    wanted = torch.tensor([range(9), [-1, -1, 0, 1, -1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2, 3, -1, -1]])
    y, none, _ = block(x, None, segments)
    assert none is None
    assert torch.equal(rows(block, x, y), wanted)
    assert (y[segments == 0] == 0).all()
    for sizes in ([1] * 9, [4, 5], [9]):
        state, start = block.init_state(3), 0
        for size in sizes:
            part = slice(start, start + size)
            y, state, _ = block(x[:, part], state, segments[:, part])
            assert torch.equal(rows(block, x[:, part], y), wanted[:, part])
            start += size
        assert state.position.tolist() == [9, 2, 4]
        assert state.segment.tolist() == [1, 2, 6]
    y, state, _ = block(x[:, :3], state)
    assert torch.equal(rows(block, x[:, :3], y), torch.tensor([[9, 10, 11], [2, 3, 4], [4, 5, 6]]))
    assert state.position.tolist() == [12, 5, 7]


def test_it_is_gpt2s():
    """The stream in front of GPT-2's first layer, with the positions that a padded batch is generated with."""
    from transformers import GPT2Config, GPT2Model

    theirs = GPT2Model(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=12)).eval()
    block = LearnedPosition(8, context=12)
    with torch.no_grad():
        block.table.weight.copy_(theirs.wpe.weight)
    tokens = torch.randint(0, 11, (2, 7))
    mask = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
    places = (mask.cumsum(1) - 1).clamp_min(0)
    wanted = theirs(tokens, attention_mask=mask, position_ids=places, output_hidden_states=True).hidden_states[0]
    found = block(theirs.wte(tokens), None, mask).y
    torch.testing.assert_close(found[mask == 1], wanted[mask == 1], rtol=0, atol=1e-6)


def test_a_document_longer_than_the_table_is_named():
    block, message = make(), r"a document of 13 tokens is longer than context=12, .*larger context"
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    full = PositionState(torch.tensor([12, 3]), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=message):
        block(x)
    with pytest.raises(ValueError, match=message):
        block(x, block.init_state(2))
    with pytest.raises(ValueError, match=message):
        block(x, None, torch.ones(2, 13, dtype=torch.long))
    for segments in (None, torch.ones(2, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match=message):
            block(x[:, :1], full, segments)


def test_a_row_may_be_longer_than_the_table():
    """Documents count, not rows: many packed ones, and padding behind a full one."""
    block, x = make(), torch.randn(1, 31, 8, dtype=torch.float64)
    segments = torch.tensor([[1] * 12 + [2] * 12 + [0] * 3 + [3] * 4])
    assert rows(block, x, block(x, None, segments).y).tolist() == [[*range(12), *range(12), -1, -1, -1, *range(4)]]
    _, state, _ = block(x[:, :12], block.init_state(1), segments[:, :12])
    y, state, _ = block(x[:, :1], state, torch.tensor([[0]]))
    assert (y == 0).all()
    assert rows(block, x[:, :1], block(x[:, :1], state, torch.tensor([[2]])).y).tolist() == [[0]]


def test_it_stands_bare_and_starts_small():
    torch.manual_seed(0)
    model = zoo.LanguageModel({"vocab_size": 9, "width": 64, "stack": ["learned_position", "mlp"]})
    block = model.residuals[0].block
    assert block.context == 2048
    assert not list(model.residuals[0].norm.parameters())
    assert block.table.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert zoo.block("learned_position", 64).flops_per_token(100) == 64
    tokens = torch.tensor([[3, 3, 3]])
    stream = model(tokens, hidden_states=True).hidden_states
    torch.testing.assert_close(stream[1] - stream[0], block.table.weight[None, :3])
    for name in ("adamw", "muon"):
        (group,) = [
            each
            for each in groups(model, OptimizerConfig(name=name))
            if any(one is block.table.weight for one in each["params"])
        ]
        assert (group["weight_decay"], group["muon"]) == (0.0, False)


def test_training_on_longer_windows_is_refused_at_the_start():
    model = zoo.LanguageModel({"vocab_size": 9, "width": 8, "stack": [{"kind": "learned_position", "context": 12}]})
    check_length(model, 12)
    with pytest.raises(ValueError, match=r"stack\[0\] \(kind learned_position\) is built for .* context=12 tokens and"):
        check_length(model, 13)


@pytest.mark.parametrize("context", [0, 2.0, True])
def test_context_is_checked(context):
    with pytest.raises(ValueError, match=f"context={context} must be a positive integer"):
        LearnedPosition(8, context=context)
