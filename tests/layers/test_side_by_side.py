"""Blocks side by side: the sum, norms, states, what is told of the blocks inside, and mistakes named by their place."""

import pytest
import torch

import zoo
from train.module import check_length
from zoo.block import NoState, add_sums, leaves
from zoo.convert.family import spelled_out
from zoo.describe import active, count, describe_model
from zoo.layers.parallel import Parallel
from zoo.model import losses

ATTENDS = {"kind": "gqa", "heads": 2, "kv_heads": 1}


def exact(width=12, **options) -> Parallel:
    torch.manual_seed(0)
    block = Parallel(width, **options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block.eval()


def test_it_is_gptj():
    """A layer of GPT-J: one norm, attention and feed-forward block side by side."""
    from transformers import GPTJConfig
    from transformers.models.gptj import modeling_gptj

    config = GPTJConfig(n_embd=16, n_head=2, rotary_dim=4, n_inner=20, n_positions=32, attn_implementation="eager")
    theirs = modeling_gptj.GPTJBlock(config, 0).eval()
    stack = [
        {"kind": "gqa", "heads": 2, "position": {"kind": "rotary", "layout": "interleaved", "fraction": 0.5}},
        {"kind": "mlp", "hidden": 20, "activation": "gelu_tanh", "bias": True},
    ]
    model = zoo.LanguageModel({"vocab_size": 3, "width": 16, "norm": "layer", "stack": [parallel(*stack)]}).eval()
    residual = model.residuals[0]
    attention, mlp = residual.block.parts
    with torch.no_grad():
        residual.norm.load_state_dict(theirs.ln_1.state_dict())
        names = ("q_proj", "k_proj", "v_proj")
        attention.qkv.weight.copy_(torch.cat([getattr(theirs.attn, name).weight for name in names]))
        attention.out.load_state_dict(theirs.attn.out_proj.state_dict())
        mlp.up.load_state_dict(theirs.mlp.fc_in.state_dict())
        mlp.down.load_state_dict(theirs.mlp.fc_out.state_dict())
    x = torch.randn(2, 9, 16)
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    places = {"position_ids": torch.arange(9)[None]}
    turns = getattr(modeling_gptj, "GPTJRotaryEmbedding", None)  # since transformers 5.24 the model makes them
    if turns is not None:
        places = {"position_embeddings": turns(config)(x, **places)}
    wanted = theirs(x, attention_mask=mask, **places)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    torch.testing.assert_close(residual(x).y, wanted, rtol=0, atol=1e-5)


def parallel(*blocks, **options):
    return {"kind": "parallel", "blocks": list(blocks)} | options


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
def test_outputs_are_added(norm):
    eps = {} if norm is None else {"norm_eps": 0.3}
    block = exact(blocks=[ATTENDS, "mlp", "mamba"], norm=norm, **eps)
    assert block.residual == (norm is None)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    segments = torch.tensor([[0, 1, 1, 1, 2, 2, 0], [3] * 7])
    norms = [torch.nn.Identity()] * 3 if norm is None else block.norms
    parts = sum(part(each(x), None, segments).y for part, each in zip(block.parts, norms, strict=True))
    wanted = parts if norm is None else parts + torch.where(segments[..., None] != 0, x, 0)
    torch.testing.assert_close(block(x, None, segments).y, wanted, rtol=0, atol=1e-12)
    if norm is not None:
        assert [each.eps for each in norms] == [0.3] * 3


def test_states_and_costs_are_those_of_its_blocks():
    block = exact(blocks=[ATTENDS, "mlp", {"kind": "mamba", "state_size": 3}])
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    state = block(x, block.init_state(2)).state
    assert type(state.parts[1]) is NoState
    for part, inner in zip(block.parts, state.parts, strict=True):
        wanted = part(x, part.init_state(2)).state
        assert all(torch.equal(a, b) for a, b in zip(leaves(inner), leaves(wanted), strict=True))
    assert block.state_bytes(9) == sum(part.state_bytes(9) for part in block.parts)
    assert block.flops_per_token(9) == sum(part.flops_per_token(9) for part in block.parts)
    with pytest.raises(ValueError, match="takes the ParallelState that its init_state makes, got KVState"):
        block(x, state.parts[0])


def test_blocks_inside_are_described_by_their_kinds():
    moe = {"kind": "moe", "experts": 4, "top_k": 1}
    nested = parallel(ATTENDS, parallel("mlp", moe), norm="layer")
    model = zoo.LanguageModel({"vocab_size": 5, "width": 12, "stack": [nested, "mlp"]})
    facts = describe_model(model.config)
    attention, inner = model.residuals[0].block.parts
    mlp, mixture = inner.parts
    assert list(facts["parameters"]) == ["embedding", "gqa", "mlp", "moe", "norms"]
    assert facts["parameters"]["gqa"] == count(attention)
    assert facts["parameters"]["mlp"] == count(mlp) + count(model.residuals[1].block)
    assert facts["parameters"]["norms"] == 12 + 12 + 2 * 24  # the model's two, and LayerNorms with their biases
    assert sum(facts["parameters"].values()) == facts["total"] == count(model)
    assert facts["active"] == active(model) == count(model) - 3 * 3 * 12 * mixture.experts.hidden


def test_a_mixture_inside_is_told_its_sums():
    """Its losses reach the training loss, and what its router learns by counting comes back to it."""
    moe = {"kind": "moe", "experts": 4, "router": {"kind": "loss_free", "update_rate": 0.01}}
    model = zoo.LanguageModel({"vocab_size": 5, "width": 12, "stack": ["mlp", parallel(ATTENDS, moe)]})
    mixture, total = model.residuals[1].block.parts[1], {}
    out = model(torch.randint(0, 5, (2, 9)))
    loss = "blocks.1/blocks.1/loss/load_balance"
    assert losses(out.aux) == out.aux[loss]
    add_sums(total, out.aux)
    assert set(total) == {"blocks.1/blocks.1/sum/choices"}
    assert not mixture.router.bias.any()
    model.after_step(1, total)
    choices = total["blocks.1/blocks.1/sum/choices"].float()
    assert torch.equal(mixture.router.bias.sign(), (choices.mean() - choices).sign())


def test_depth_reaches_its_blocks():
    """Initialisation that depends on the place in the stack; a place that is given stays."""
    given = {"kind": "rwkv4", "layer": 2, "layers": 9}
    stack = ["mlp", parallel("rwkv4", "mlp", given), "mlp"]
    torch.manual_seed(0)
    model = zoo.LanguageModel({"vocab_size": 5, "width": 12, "stack": stack})
    deep, _, told = model.residuals[1].block.parts
    for found, place in ((deep, {"layer": 1, "layers": 3}), (told, {"layer": 2, "layers": 9})):
        wanted = zoo.block("rwkv4", 12, **place)
        assert torch.equal(found.time_decay, wanted.time_decay)
    assert not torch.equal(deep.time_decay, told.time_decay)


def test_a_bidirectional_block_inside_makes_it_bidirectional():
    block = exact(blocks=["mlp", ATTENDS | {"causal": False}])
    assert not block.causal
    assert block.state_bytes(5) == 0
    message = r"is bidirectional and has no state"
    with pytest.raises(ValueError, match=message):
        block.init_state(1)
    stack = [parallel("mlp", ATTENDS | {"causal": False})]
    with pytest.raises(
        ValueError, match=r"stack\[0\] \(kind parallel\) holds blocks\[1\] \(kind gqa\), which is bidirectional and"
    ):
        zoo.LanguageModel({"vocab_size": 5, "width": 12, "stack": stack})
    masked = zoo.LanguageModel({"vocab_size": 5, "width": 12, "stack": stack, "objective": "masked"})
    assert masked(torch.tensor([[1, 2]])).logits.shape == (1, 2, 5)


def test_leave_to_look_ahead_is_passed_on():
    router = {"kind": "expert_choice", "allow_lookahead": True}
    stack = [parallel(ATTENDS, {"kind": "moe", "experts": 2, "router": router})]
    model = zoo.LanguageModel({"vocab_size": 5, "width": 12, "stack": stack})
    with pytest.raises(ValueError, match=r"stack\[0\] \(kind parallel\) looks at later tokens"):
        model.init_state(1)


def test_equal_models_are_spelled_alike():
    one = {"vocab_size": 5, "width": 12}
    short = zoo.ModelConfig(**one, stack=[parallel("gqa", "mlp", norm="rms")])
    width = {"hidden": 48, "activation": "gelu"}
    kinds = {"kind": "gqa", "position": {"kind": "rotary"}}, {"kind": "mlp"} | width
    long = zoo.ModelConfig(**one, stack=[parallel(*kinds, norm="rms", norm_eps=1e-6)])
    assert spelled_out(short) == spelled_out(long)
    other = zoo.ModelConfig(**one, stack=[parallel("gqa", {"kind": "mlp", "bias": True}, norm="rms")])
    differ = {name for name, value in spelled_out(short).items() if spelled_out(other)[name] != value}
    assert differ == {"blocks[0].blocks[1].bias"}


def test_training_on_longer_windows_is_refused_for_blocks_inside():
    bounded = {"kind": "linformer", "length": 16, "projected": 4}
    model = zoo.LanguageModel(
        {"vocab_size": 5, "width": 12, "stack": [parallel(bounded, "mlp")], "objective": "masked"}
    )
    check_length(model, 16)
    with pytest.raises(ValueError, match=r"stack\[0\] \(kind parallel\) is built for .* length=16 tokens"):
        check_length(model, 17)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": []}, r"blocks=\[\] must be a list of two blocks or more"),
        ({"blocks": ["mlp"]}, r"blocks=\['mlp'\] must be a list of two blocks or more"),
        ({"blocks": "mlp"}, "blocks='mlp' must be a list"),
        ({"blocks": ["mlp", 3]}, r"blocks\[1\]=3 must be a block such as"),
        ({"blocks": ["mlp", {"hidden": 3}]}, r"blocks\[1\]=.* must be a block such as"),
        ({"blocks": ["mlp", "gqq"]}, r"blocks\[1\] \(kind gqq\): unknown block kind 'gqq' \(did you mean 'gqa'\?\)"),
        (
            {"blocks": ["mlp", {"kind": "gqa", "head": 2}]},
            r"blocks\[1\] \(kind gqa\): block kind 'gqa' has no option 'head' \(did you mean 'heads'\?\)",
        ),
        ({"blocks": [ATTENDS | {"kv_heads": 3}, "mlp"]}, r"blocks\[0\] \(kind gqa\): kv_heads=3 must divide heads=2"),
        ({"blocks": ["mlp", "luna"]}, r"blocks\[1\] \(kind luna\) is composite: .* place it in the stack"),
        ({"blocks": ["mlp", "learned_position"]}, r"blocks\[1\] \(kind learned_position\) is composite"),
        ({"blocks": [parallel("mlp", "mlp", norm="rms"), "mlp"]}, r"blocks\[0\] \(kind parallel\) is composite"),
        ({"blocks": ["mlp", parallel("mlp", "gqq")]}, r"blocks\[1\] \(kind parallel\): blocks\[1\] \(kind gqq\): unkn"),
        ({"norm": "rsm"}, "norm='rsm' is unknown; choose from rms, "),
        ({"norm_eps": 0.1}, "norm_eps=0.1 needs a norm for each block; set norm to layer or rms"),
        ({"norm": "rms", "norm_eps": -1.0}, "norm_eps=-1.0 must not be negative"),
    ],
)
def test_mistakes_are_named_by_their_place(options, message):
    with pytest.raises(ValueError, match=message):
        Parallel(12, **options)
    if options.get("blocks"):
        with pytest.raises(ValueError, match=r"stack\[0\] \(kind parallel\): " + message):
            zoo.LanguageModel({"vocab_size": 5, "width": 12, "stack": [{"kind": "parallel"} | options]})
