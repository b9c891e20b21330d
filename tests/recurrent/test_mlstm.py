"""mLSTM against transformers' xLSTM, the paper's unstabilised equations and its parallel form; gates at their ends."""

import pytest
import torch

import ops
import zoo
from zoo.block import tags
from zoo.recurrent.mlstm import MLSTM, MLSTMState, running_maximum

WIDTH, LAYERS = 128, 2  # transformers' cache fits widths of whole multiples of 128 alone


def randomise(module: torch.nn.Module, size: float) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))


def theirs():
    """transformers' xLSTM in float64: it holds states and the last norm's sums in float32 unless told."""
    from transformers import xLSTMConfig, xLSTMForCausalLM

    config = xLSTMConfig(
        vocab_size=19, hidden_size=WIDTH, num_heads=2, num_hidden_layers=LAYERS, norm_reduction_force_float32=False
    )
    model = xLSTMForCausalLM(config).double().eval()
    randomise(model, 0.1)
    model.backbone.out_norm.force_float32_reductions = False
    for block in model.backbone.blocks:
        kernels = block.mlstm_layer.mlstm_backend._inference_fn.keywords
        for name in ("mlstm_sequence_kernel", "mlstm_step_kernel"):
            kernels[name].keywords["dtype_state"] = torch.float64
    return model


def joined(parts, attribute: str = "weight"):
    return torch.cat([getattr(each, attribute) for each in parts])


def pairs(model: zoo.LanguageModel, oracle):
    """Our parameters, each with theirs that it stands for."""
    backbone = oracle.backbone
    yield model.embedding.weight, backbone.embeddings.weight
    yield model.norm.weight, backbone.out_norm.weight
    yield model.head.weight, oracle.lm_head.weight
    for index, block in enumerate(backbone.blocks):
        mixer, ffn = model.blocks[2 * index : 2 * index + 2]
        layer, gates = block.mlstm_layer, (block.mlstm_layer.igate_preact, block.mlstm_layer.fgate_preact)
        yield mixer.norm.weight, block.norm_mlstm.weight
        yield mixer.block.in_proj.weight, joined((layer.q, layer.k, layer.v, layer.ogate_preact))
        yield mixer.block.gate_proj.weight, joined(gates)
        yield mixer.block.gate_proj.bias, joined(gates, "bias")
        yield mixer.block.norm_weight, layer.multihead_norm.weight
        yield mixer.block.out_proj.weight, layer.out_proj.weight
        yield ffn.norm.weight, block.norm_ffn.weight
        yield ffn.block.up.weight, joined((block.ffn.proj_up_gate, block.ffn.proj_up))
        yield ffn.block.down.weight, block.ffn.proj_down.weight


def twins():
    """A model of ours and one of theirs with the same random weights, float64."""
    oracle = theirs()
    hidden = oracle.backbone.blocks[0].ffn.up_proj_dim
    blocks = [{"kind": "mlstm", "heads": 2}, {"kind": "swiglu", "hidden": hidden}]
    model = zoo.LanguageModel(
        {"vocab_size": 19, "width": WIDTH, "tied_embeddings": False, "norm_eps": 1e-6, "logit_softcap": 30.0}
        | {"stack": [{"repeat": LAYERS, "blocks": blocks}]}
    ).double()
    with torch.no_grad():
        found = list(pairs(model, oracle))
        for mine, wanted in found:
            mine.copy_(wanted)
    assert len(found) == len(list(model.parameters()))
    return model, oracle


def test_it_is_transformers_model_and_so_are_its_gradients():
    model, oracle = twins()
    tokens = torch.randint(0, 19, (2, 71))  # a chunk of 64 and a loop over 7 in theirs
    found, wanted = model(tokens), oracle.backbone(tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(found.hidden, wanted, rtol=1e-9, atol=1e-9)
    logits = oracle(tokens, use_cache=False).logits  # in float32
    torch.testing.assert_close(found.logits.float(), logits, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(wanted)
    (found.hidden * direction).sum().backward()
    (wanted * direction).sum().backward()
    for parameter in oracle.parameters():
        parameter.data = torch.zeros(()) if parameter.grad is None else parameter.grad
    parts = [(mine.grad, wanted) for mine, wanted in pairs(model, oracle) if mine is not model.head.weight]
    assert len(parts) == 3 + 9 * LAYERS - 1
    for mine, right in parts:
        torch.testing.assert_close(mine, right.detach(), rtol=1e-9, atol=1e-9)


def test_decoding_is_theirs():
    model, oracle = twins()
    tokens = torch.randint(0, 19, (2, 72))
    with torch.no_grad():
        state, cache = model.init_state(2), None
        for part in (tokens[:, :67], *tokens[:, 67:].split(1, 1)):
            found = model(part, state)
            wanted = oracle.backbone(part, cache_params=cache, use_cache=True)
            state, cache = found.state, wanted.cache_params
            torch.testing.assert_close(found.hidden, wanted.last_hidden_state, rtol=1e-9, atol=1e-9)
        for index in range(LAYERS):
            C, n, m = cache.rnn_state[index]
            torch.testing.assert_close(state[2 * index].S, torch.cat([C, n[..., None]], -1), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(state[2 * index].m, m[..., 0], rtol=1e-9, atol=1e-9)


def recurrent(q, k, v, log_i, log_f):
    """2405.04517, eq. 19 to 27 for one document [time heads ...], without a stabiliser."""
    C = n = 0
    rows = []
    for t in range(len(q)):
        i, f = log_i[t].exp()[:, None], log_f[t].exp()[:, None]
        C = f[..., None] * C + i[..., None] * k[t][:, :, None] * v[t][:, None]
        n = f * n + i * k[t]
        query = q[t] * q.shape[-1] ** -0.5
        total = (n * query).sum(-1, keepdim=True).abs().clamp_min(1)
        rows.append((query[:, :, None] * C).sum(1) / total)
    return torch.stack(rows)


def parallel(q, k, v, log_i, log_f):
    """2405.04517, appendix A.3: all pairs of one document at once, each row by its largest exponent."""
    total = log_f.cumsum(0)
    exponent = total[:, None] - total[None] + log_i[None]
    exponent = exponent.masked_fill(~torch.ones(len(q), len(q)).tril().bool()[..., None], -torch.inf)
    m = exponent.amax(1).detach()
    scores = torch.einsum("thd,shd->tsh", q, k) * q.shape[-1] ** -0.5 * (exponent - m[:, None]).exp()
    return torch.einsum("tsh,shv->thv", scores, v) / torch.maximum(scores.sum(1).abs(), (-m).exp())[..., None]


def parts(time: int):
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, time, 2, size, dtype=torch.float64) for size in (4, 4, 5))
    log_i, logits = (3 * torch.randn(1, time, 2, dtype=torch.float64) for _ in range(2))
    return [each.requires_grad_() for each in (q, k, v, log_i, torch.nn.functional.logsigmoid(logits).detach())]


def nothing(dtype: torch.dtype = torch.float64):
    return MLSTMState(torch.zeros(1, 2, 4, 6, dtype=dtype), torch.zeros(1, 2, dtype=dtype), torch.zeros(1).long())


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_parallel_chunkwise_and_recurrent_forms_agree(impl):
    """Values and gradients, over two documents with padding between; the paper has no eps."""
    block = MLSTM(8, heads=2, eps=1e-300).double()
    given = parts(150)
    with torch.no_grad():
        given[3][:, 70:72] = 2000  # at padding: e^2000 times a gradient of 0 would be NaN
    segments = torch.tensor([[3] * 70 + [0] * 2 + [4] * 78])
    spans = slice(0, 70), slice(72, 150)
    with ops.use(impl):
        h = block.remember(*given, nothing(), segments)[0]
    found = torch.cat([h[0, span] for span in spans])
    direction = torch.randn_like(found)
    gradients = torch.autograd.grad((found * direction).sum(), given)
    for form in (recurrent, parallel):
        wanted = torch.cat([form(*(each[0, span] for each in given)) for span in spans])
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        right = torch.autograd.grad((wanted * direction).sum(), given)
        torch.testing.assert_close(gradients, right, rtol=1e-9, atol=1e-9)


def test_eps_counts_m_and_its_gradient_knows():
    """Where eps is no trifle, finite differences still are the gradient: the maximum is no constant."""
    block = MLSTM(8, heads=2, eps=0.3).double()
    given = [each.detach()[:, :6].requires_grad_() for each in parts(150)]
    S, m = (torch.randn_like(each).requires_grad_() for each in nothing()[:2])

    def run(*each):
        return block.remember(*each[:5], MLSTMState(each[5], each[6], torch.ones(1).long()), None)

    assert torch.autograd.gradcheck(run, (*given, S, m))


def ends(dtype: torch.dtype, bias_i: float, bias_f: float, spread: float):
    """A block whose gates are at their ends, uncapped, and its float64 twin."""
    torch.manual_seed(2)
    block = zoo.block("mlstm", 8, heads=2, soft_cap=None)
    with torch.no_grad():
        torch.nn.init.normal_(block.gate_proj.weight, std=spread)
        block.gate_proj.bias.copy_(torch.tensor([bias_i] * 2 + [bias_f] * 2))
    block.to(dtype)
    exact = zoo.block("mlstm", 8, heads=2, soft_cap=None).double()
    exact.load_state_dict({name: value.double() for name, value in block.state_dict().items()})
    return block, exact


# Biases of i and f and the spread of their weights: i from e^-300 to e^300 and f anything, f to the last bit 0 or 1.
ENDS = {
    "i from -300 to 300": (0.0, 0.0, 60.0),
    "i near e^300": (300.0, 2.0, 1.0),
    "i near e^-300": (-300.0, 2.0, 1.0),
    "f near 0": (0.0, -300.0, 1.0),
    "f near 1": (0.0, 90.0, 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ENDS)
def test_gates_at_their_ends(case, dtype):
    """exp(300) is infinite in float32, and so are products of ten such: values and gradients are finite, and where
    gates are not so steep that a rounding of the input counts, near float64's."""
    block, exact = ends(dtype, *ENDS[case])
    x = torch.randn(2, 90, 8).to(dtype)
    results = []
    for each in (block, exact):
        given = x.detach().to(each.norm_weight.dtype).requires_grad_()
        with ops.use("chunked"):
            y = each(given).y
        results.append([y, *torch.autograd.grad(y.double().square().sum(), [given, *each.parameters()])])
    logits = exact.gate_proj(x.double()).abs().max()
    assert logits > 85
    names = ["y", "x", *(name for name, _ in block.named_parameters())]
    for name, found, wanted in zip(names, *results, strict=True):
        assert found.isfinite().all(), name
        if ENDS[case][2] == 1.0 and name in ("y", "out_proj.weight", "norm_weight"):
            error = (found.double() - wanted).norm() / wanted.norm().clamp_min(1e-6)
            assert error < (1e-4 if dtype == torch.float32 else 5e-2), f"{name}: {error}"


def test_the_running_maximum_is_the_loop():
    torch.manual_seed(3)
    log_f, log_i = -50 * torch.rand(3, 41, 2), 100 * torch.randn(3, 41, 2)
    initial = torch.randn(3, 2)
    segments = torch.randint(0, 3, (3, 41)).sort(1).values
    segments[0] = 0
    segments[1, ::5] = 0
    found = running_maximum(log_f, log_i, initial, segments)
    for row in range(3):
        m, before = initial[row], None
        for t, now in enumerate(segments[row].tolist()):
            if now:
                m = torch.zeros(2) if before not in (None, now) else m
                m, before = torch.maximum(log_f[row, t] + m, log_i[row, t]), now
            torch.testing.assert_close(found[row, t], m, rtol=1e-5, atol=1e-4)


def test_its_beginning_its_sizes_and_its_tags():
    block = zoo.block("mlstm", 64)
    assert (block.sizes, block.heads) == ((32, 32, 64, 64), 4)
    assert not block.gate_proj.weight.any()
    assert block.gate_proj.bias.tolist() == [-10.0] * 4 + [3.0, 4.0, 5.0, 6.0]
    found = tags(block)
    assert {name for name in found if not found[name].weight_decay} == {"gate_proj.bias", "norm_weight"}
    assert [zoo.block("mlstm", width).heads for width in (1, 2, 6, 7, 24)] == [1, 1, 3, 1, 4]


def test_bad_options_are_named():
    for options, message in (
        ({"heads": 5}, r"heads=5 must divide qk_dim=6 and v_dim=12; try 1"),
        ({"heads": 0}, r"heads=0 must be a positive integer; None chooses"),
        ({"soft_cap": 0.0}, r"soft_cap=0.0 must be positive; None caps nothing"),
        ({"eps": 0.0}, r"eps=0.0 must be positive"),
        ({"norm_eps": -1.0}, r"norm_eps=-1.0 must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            zoo.block("mlstm", 12, **options)
