"""gqa against published models' attention with copied weights, its state in detail, and its bounds."""

import pytest
import torch
from torch import nn
from transformers import (
    FalconConfig,
    FalconModel,
    Gemma2Config,
    Gemma2Model,
    GPTBigCodeConfig,
    GPTBigCodeModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen3Config,
    Qwen3Model,
)

from zoo.attention.gqa import GQA
from zoo.attention.kv_state import KVState, RingState
from zoo.block import leaves, select, snapshot, state_bytes

WIDTH = 36
COMMON = {"hidden_size": WIDTH, "num_hidden_layers": 1, "vocab_size": 50, "attn_implementation": "eager"}
LLAMA = {**COMMON, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 1000.0}  # fmt: skip
OURS = {"heads": 6, "kv_heads": 2, "head_dim": 10}


def llama():
    scaling = {"kind": "llama3", "factor": 4.0, "original_context": 64}
    model = LlamaModel(LlamaConfig(**LLAMA, rope_parameters=LLAMA3, attention_bias=True))
    position = {"kind": "rotary", "base": 1000.0, "scaling": scaling}
    return model, model.layers[0].self_attn, GQA(WIDTH, **OURS, position=position, bias=True, out_bias=True)


def mistral():
    model = MistralModel(MistralConfig(**LLAMA, sliding_window=5))
    return model, model.layers[0].self_attn, GQA(WIDTH, **OURS, window=5)


def qwen3():
    model = Qwen3Model(Qwen3Config(**LLAMA))
    return model, model.layers[0].self_attn, GQA(WIDTH, **OURS, qk_norm="rms")


def gemma2():
    model = Gemma2Model(Gemma2Config(**LLAMA, attn_logit_softcapping=0.5, query_pre_attn_scalar=7, sliding_window=6))
    assert model.config.layer_types == ["sliding_attention"]
    return model, model.layers[0].self_attn, GQA(WIDTH, **OURS, softcap=0.5, scale=7**-0.5, window=6)


def gpt_bigcode():
    config = {"n_embd": WIDTH, "n_layer": 1, "n_head": 6, "vocab_size": 50, "attn_implementation": "eager"}
    model = GPTBigCodeModel(GPTBigCodeConfig(**config, multi_query=True))
    return model, model.h[0].attn, GQA(WIDTH, heads=6, kv_heads=1, position=None, bias=True, out_bias=True)


def falcon():
    # Its eager form adds the bias twice, once in the mask.
    common = {**COMMON, "hidden_size": 32, "attn_implementation": "sdpa"}
    model = FalconModel(FalconConfig(**common, num_attention_heads=4, alibi=True, bias=True,
                                     multi_query=True, new_decoder_architecture=False))  # fmt: skip
    position = {"kind": "alibi", "multiplier": 8**-0.5}
    ours = GQA(32, heads=4, kv_heads=1, position=position, bias=True, out_bias=True)
    return model, model.h[0].self_attention, ours


@torch.no_grad()
def copy_weights(theirs: nn.Module, ours: GQA) -> None:
    """Random weights for theirs, and the same for ours."""
    for name, parameter in theirs.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    found = dict(theirs.named_parameters())
    fused = next((name for name in ("c_attn", "query_key_value") if hasattr(theirs, name)), None)
    out = next(name for name in ("o_proj", "c_proj", "dense") if hasattr(theirs, name))
    for kind in ("weight", "bias"):
        parts = [fused] if fused else ["q_proj", "k_proj", "v_proj"]
        if f"{parts[0]}.{kind}" not in found:
            continue
        getattr(ours.qkv, kind).copy_(torch.cat([found[f"{each}.{kind}"] for each in parts]))
    for kind in ("weight", "bias"):
        if f"{out}.{kind}" in found:
            getattr(ours.out, kind).copy_(found[f"{out}.{kind}"])
    if ours.q_norm is not None:
        ours.q_norm.weight.copy_(theirs.q_norm.weight)
        ours.k_norm.weight.copy_(theirs.k_norm.weight)


@pytest.mark.parametrize("family", [llama, mistral, qwen3, gemma2, gpt_bigcode, falcon])
@torch.no_grad()
def test_published_attention(family):
    """A left-padded batch, then cached decoding, a chunk, and more tokens: what their module reads gives what it
    gives. Values are caught by a hook on their attention inside their own model, cache and masks."""
    model, theirs, ours = family()
    model, ours = model.double().eval(), ours.double().eval()
    copy_weights(theirs, ours)
    calls = []

    def catch(module, args, kwargs, output):
        calls.append((args[0] if args else kwargs["hidden_states"], output[0]))

    theirs.register_forward_hook(catch, with_kwargs=True)
    tokens = torch.randint(0, 50, (3, 20))
    segments = torch.ones_like(tokens)
    segments[1, :4] = 0
    segments[2, :9] = 0
    places = (segments.cumsum(1) - 1).clamp_min(0)
    cache, state, begin = None, ours.init_state(3), 0
    for size in (13, 1, 1, 4, 1):
        part = slice(begin, begin + size)
        cache = model(
            tokens[:, part], attention_mask=segments[:, : begin + size], position_ids=places[:, part],
            past_key_values=cache, use_cache=True,
        ).past_key_values  # fmt: skip
        x, wanted = calls[-1]
        found, state, _ = ours(x, state, segments[:, part])
        valid = segments[:, part] != 0
        # Falcon multiplies its bias in bfloat16, gemma2 and qwen3 take norms and softmax in float32.
        torch.testing.assert_close(found[valid], wanted[valid], atol=2e-6, rtol=2e-6)
        begin += size
    x = torch.cat([each for each, _ in calls], 1)
    wanted = torch.cat([each for _, each in calls], 1)
    torch.testing.assert_close(ours(x, None, segments).y[segments != 0], wanted[segments != 0], atol=2e-6, rtol=2e-6)


# The state -----------------------------------------------------------------------------------------------------


def feed(block, state, sizes, segments=None, width=24, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, sum(sizes), width, generator=generator, dtype=torch.float64)
    y, begin = [], 0
    for size in sizes:
        part = slice(begin, begin + size)
        out, state, _ = block(x[:, part], state, None if segments is None else segments[:, part])
        y.append(out)
        begin += size
    return torch.cat(y, 1), state, x


def storage(state):
    return state.k.untyped_storage().data_ptr()


@torch.no_grad()
def test_state_grows_by_doubling_in_place():
    block = GQA(24).double()
    _, state, _ = feed(block, block.init_state(2), [1])
    seen = [storage(state)]
    x = torch.randn(2, 1, 24, dtype=torch.float64)
    for _ in range(300):
        state = block(x, state).state
        if storage(state) != seen[-1]:
            seen.append(storage(state))
    assert state.k.shape[1] == 301 and state.runs.shape[1] == 0
    assert len(seen) <= 4  # rooms of 64, 128, 256, 512 tokens


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_branches_from_an_older_state(padded):
    """Going on from a snapshot: it is as it was, appends in place over the abandoned branch, and all equal a whole."""
    block = GQA(24, heads=3).double()
    segments = torch.ones(2, 40, dtype=torch.long)
    if padded:
        segments[0, :3] = 0
    wanted, _, x = feed(block, None, [40], segments)
    state = block(x[:, :30], block.init_state(2), segments[:, :30]).state
    kept = snapshot(state)
    assert storage(kept) == storage(state)
    before = [leaf.clone() for leaf in leaves(kept)]
    for seed in (5, 6):
        _, state, _ = feed(block, state, [1, 2, 1], seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(kept), strict=True))
    again = block(x[:, 30:], kept, segments[:, 30:])
    assert storage(again.state) == storage(kept)
    torch.testing.assert_close(again.y, wanted[:, 30:], atol=1e-12, rtol=0)


@torch.no_grad()
def test_narrowed_state_rolls_back():
    block = GQA(24).double()
    wanted, state, x = feed(block, block.init_state(2), [5, 1, 1, 1])
    back = state._replace(k=state.k[:, :5], v=state.v[:, :5], position=state.position - 3)
    torch.testing.assert_close(block(x[:, 5:], back).y, wanted[:, 5:], atol=1e-12, rtol=0)


@torch.no_grad()
def test_copies_never_write_behind_their_end():
    """Copies that keep a buffer's strides but not its room (one row), views of rows, and reordered rows."""
    block = GQA(24).double()
    wanted, _, x = feed(block, None, [9], batch=1)
    state = block(x[:, :5], block.init_state(1)).state
    for copied in (state._replace(k=state.k.clone(), v=state.v.clone()), select(state, torch.tensor([0]))):
        torch.testing.assert_close(block(x[:, 5:], copied).y, wanted[:, 5:], atol=1e-12, rtol=0)
    wanted, _, x = feed(block, None, [9], batch=2)
    state = block(x[:, :5], block.init_state(2)).state
    rows = [type(state)(*(leaf[row : row + 1] for leaf in state)) for row in range(2)]
    for row in (0, 1):  # two views of one buffer, each in its own row's room
        rows[row] = block(x[row : row + 1, 5:7], rows[row]).state
    for row in (0, 1):
        y = block(x[row : row + 1, 7:], rows[row]).y
        torch.testing.assert_close(y, wanted[row : row + 1, 7:], atol=1e-12, rtol=0)


def test_gradients_forbid_writing_in_place():
    """Backward after the state went on: nothing that it needs was overwritten."""
    for options in ({}, {"window": 4, "sinks": 1}):
        block = GQA(24, **options).double()
        x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            state = block(x[:, :4], block.init_state(2)).state
        y, total = [], 0.0
        for t in range(4, 7):
            out, state, _ = block(x[:, t : t + 1], state)
            total = total + out.square().sum()
            y.append(out)
        with torch.no_grad():
            block(x[:, 7:8], state)
        total.backward()
        assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad[:, 4:7].abs().sum() > 0


def test_state_made_in_inference_mode_goes_on_outside():
    for options in ({}, {"window": 4}):
        block = GQA(24, **options)
        x = torch.randn(1, 6, 24)
        with torch.inference_mode():
            state = block(x[:, :4], block.init_state(1)).state
            state = block(x[:, 4:5], state).state
        y = block(x[:, 5:], state).y
        torch.testing.assert_close(y, block(x).y[:, 5:])
        y.sum().backward()


@torch.no_grad()
def test_state_takes_the_activations_type():
    for options in ({}, {"window": 3}):
        block = GQA(24, **options)
        state = block.init_state(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for size in (3, 1, 2):
                state = block(torch.randn(1, size, 24), state).state
        assert state.k.dtype == state.v.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("position", [{"kind": "rotary"}, {"kind": "alibi"}])
def test_ring_over_many_windows(sinks, position):
    """Far past the window: the whole, pieces and single tokens agree, and with packed and padded rows."""
    block = GQA(24, heads=3, kv_heads=1, window=7, sinks=sinks, position=position).double()
    sizes = [130, 1, 1, 1, 67, 1, 9]
    segments = torch.ones(2, sum(sizes), dtype=torch.long)
    wanted, _, _ = feed(block, None, [sum(sizes)])
    found, state, _ = feed(block, block.init_state(2), sizes)
    torch.testing.assert_close(found, wanted, atol=1e-11, rtol=0)
    assert isinstance(state, RingState) and state.k.shape[1] == 7 + sinks
    assert state_bytes(state) == 2 * block.state_bytes(210, dtype=torch.float64)

    segments[0, :20], segments[0, 150:] = 0, 2
    segments[1, 60:70], segments[1, 131] = 0, 0
    wanted, _, x = feed(block, None, [sum(sizes)], segments)
    found, _, _ = feed(block, block.init_state(2), sizes, segments)
    torch.testing.assert_close(found, wanted, atol=1e-11, rtol=0)
    for row, name in ((0, 1), (0, 2), (1, 1)):
        own = segments[row] == name
        torch.testing.assert_close(wanted[row][own], block(x[row : row + 1, own]).y[0], atol=1e-11, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 6])
def test_documents_within_a_state(window):
    """Ids come and go: an id that returns after another is a new document; padding between chunks changes nothing."""
    block = GQA(24, heads=3, window=window).double()
    ids = torch.tensor([[1, 1, 1, 2, 2, 0, 1, 1, 0, 1, 5, 5], [0, 0, 4, 4, 4, 4, 4, 0, 0, 0, 4, 9]])
    for sizes in ([12], [3, 2, 1, 6], [1] * 12, [4, 4, 4]):
        y, _, x = feed(block, block.init_state(2), sizes, ids)
        for row, own in (
            (0, [0, 1, 2]),
            (0, [3, 4]),
            (0, [6, 7, 9]),
            (0, [10, 11]),
            (1, [2, 3, 4, 5, 6, 10]),
            (1, [11]),
        ):
            torch.testing.assert_close(y[row, own], block(x[row : row + 1, own]).y[0], atol=1e-12, rtol=0)
        assert (y[ids == 0] == 0).all()


@torch.no_grad()
def test_a_state_turns_from_plain_to_padded_and_back():
    """Without segments nothing is kept to mask; the first call with them writes it out, and later ones go on."""
    block = GQA(24, heads=3).double()
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    state = block(x[:, :4], block.init_state(2)).state
    assert state.runs.shape == (2, 0)
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    out, state, _ = block(x[:, 4:7], state, mask)
    assert state.runs.shape == (2, 7)
    more, state, _ = block(x[:, 7:], state)
    assert isinstance(state, KVState) and state.position.tolist() == [11, 12]
    own = [0, 1, 2, 3, 4, 6, *range(7, 12)]
    alone = block(x[:1, own]).y[0]
    torch.testing.assert_close(torch.cat([out[0, [0, 2]], more[0]]), alone[4:], atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.cat([out[1], more[1]]), block(x[1:]).y[0, 4:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [{}, {"window": 5, "sinks": 1}])
def test_compiles_with_state_and_segments(options):
    torch.compiler.reset()
    block = GQA(24, heads=3, **options)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 24)
    segments = torch.tensor([[0, 1, 1, 1, 1, 1, 2, 2, 2], [1] * 9])
    wanted = block(x, None, segments).y
    torch.testing.assert_close(compiled(x, None, segments).y, wanted)
    first, state, _ = compiled(x[:, :7], block.init_state(2), segments[:, :7])
    second, state, _ = compiled(x[:, 7:8], state, segments[:, 7:8])
    third, state, _ = block(x[:, 8:], state, segments[:, 8:])
    torch.testing.assert_close(torch.cat([first, second, third], 1), wanted)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"window": 3}])
def test_a_gate_weighs_each_component_of_a_head(options):
    """Against a block of the same q, k and v without one, whose output projection is left out."""
    gated = GQA(12, **OURS, bias=True, gate=True, **options).double()
    plain = GQA(12, **OURS, bias=True, **options).double()
    rows = 10 * 10  # of 6 queries, 2 keys and 2 values
    for name in ("weight", "bias"):
        getattr(plain.qkv, name).copy_(getattr(gated.qkv, name)[:rows])
    plain.out = nn.Identity()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    weighed = plain(x).y * torch.sigmoid(x @ gated.qkv.weight[rows:].T + gated.qkv.bias[rows:])
    wanted = gated.out(weighed)
    torch.testing.assert_close(gated(x).y, wanted, rtol=0, atol=1e-12)
    head, state, _ = gated(x[:, :4], gated.init_state(2))
    tail = gated(x[:, 4:], state).y
    torch.testing.assert_close(torch.cat([head, tail], 1), wanted, rtol=0, atol=1e-12)


# Shapes, counts, errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 7, 24, 46, 128, 514, 768, 4096])
def test_default_heads_fit_any_width(width):
    with torch.device("meta"):
        block = GQA(width)
    assert block.head_dim % 2 == 0 and block.heads % block.kv_heads == 0
    assert 2 <= block.head_dim <= 128
    if width <= 128:
        small = GQA(width)
        assert small(torch.randn(1, 3, width)).y.shape == (1, 3, width)
    assert (GQA(768).heads, GQA(768).head_dim) == (12, 64)


def test_flops():
    block = GQA(24, heads=4, kv_heads=2, head_dim=6, bias=True)
    projections = 2 * (24 * 8 * 6 + 24 * 24)
    assert block.flops_per_token(0) == projections + 4 * 24
    assert block.flops_per_token(99) == projections + 4 * 24 * 100
    ring = GQA(24, heads=4, kv_heads=2, head_dim=6, window=10, sinks=2)
    assert ring.flops_per_token(99) == ring.flops_per_token(9999) == projections + 4 * 24 * 12
    assert GQA(24, heads=4, window=10, causal=False).flops_per_token(99) == 2 * 4 * 24 * 24 + 4 * 24 * 19


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"heads": 6, "kv_heads": 4}, r"kv_heads=4 must divide heads=6; try 2"),
        ({"heads": 7}, r"heads=7 must divide width=24; try 1"),
        ({"heads": 0}, "heads=0"),
        ({"heads": 2, "kv_heads": 0}, "kv_heads=0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"heads": 8}, "head_dim=3"),
        ({"window": 0}, "window=0"),
        ({"sinks": 2}, "sinks=2 needs a window"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"qk_norm": "batch"}, "qk_norm='batch' is unknown; choose from rms, layer, rms_zero_centered, rms_across"),
        ({"gate": "headwise"}, "gate='headwise' must be true or false"),
        ({"heads": 2.0}, "heads=2.0 must be a positive integer"),
        ({"heads": "4"}, "heads='4' must be a positive integer"),
        ({"kv_heads": 1.5}, "kv_heads=1.5 must be a positive integer"),
        ({"window": 3.5}, "window=3.5 must be a positive integer"),
        ({"window": 4, "sinks": 1.5}, "sinks=1.5 must be an integer"),
        ({"window": 4, "sinks": -1}, "sinks=-1 must be an integer that is not negative"),
        ({"softcap": float("nan")}, "softcap=nan must be a finite number"),
        ({"softcap": "5e1"}, "softcap='5e1' is text, not a number"),
        ({"scale": float("inf")}, "scale=inf must be a finite number"),
        ({"position": {"kind": "rotary", "base": "1e6"}}, "base='1e6' is text.*YAML"),
        ({"position": {"kind": "rotaty"}}, "did you mean 'rotary'"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        GQA(24, **options)


def test_bidirectional_takes_no_state():
    block = GQA(24, causal=False)
    with pytest.raises(ValueError, match="bidirectional"):
        block.init_state(1)
    with pytest.raises(ValueError, match="bidirectional"):
        block(torch.randn(1, 2, 24), GQA(24).init_state(1))
    assert GQA(24).causal and not block.causal
