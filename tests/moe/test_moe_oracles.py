"""transformers' mixtures and a whole OLMoE in float64, in values and gradients; rows of a language model alone."""

import contextlib

import pytest
import torch

import zoo
from zoo.moe.moe import MoE

WIDTH, EXPERTS, HIDDEN = 16, 6, 12
TOLERANCE = {"rtol": 0, "atol": 1e-9}


@contextlib.contextmanager
def float64():
    """What transformers computes in float32 whatever its weights are, in float64."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("float32", "float"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def randomised(module):
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def peer(name, renormalise):
    """transformers' block, and the options of ours."""
    import transformers

    sizes = {"hidden_size": WIDTH, "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    if name == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Peer

        config = transformers.MixtralConfig(**sizes, intermediate_size=HIDDEN, num_local_experts=EXPERTS)
        options = {"router": {"kind": "top_k", "order": "top_k_then_softmax"}}
    elif name == "deepseek_v2":
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe as Peer

        config = transformers.DeepseekV2Config(
            **sizes, moe_intermediate_size=HIDDEN, n_routed_experts=EXPERTS, n_shared_experts=2, topk_method="greedy"
        )
        options = {"router": {"kind": "top_k", "renormalise": False}, "shared_experts": 2}
    else:
        if name == "olmoe":
            from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock as Peer

            config = transformers.OlmoeConfig(**sizes, intermediate_size=HIDDEN, num_experts=EXPERTS)
        else:
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as Peer

            config = transformers.Qwen3MoeConfig(**sizes, moe_intermediate_size=HIDDEN, num_experts=EXPERTS)
        config.norm_topk_prob = renormalise
        options = {"router": {"kind": "top_k", "renormalise": renormalise}}
    config._experts_implementation = "eager"
    return randomised(Peer(config)), options


def pairs(block, theirs):
    """Our parameters beside theirs, in our layout."""
    yield block.router.weight, theirs.gate.weight
    yield block.experts.up, theirs.experts.gate_up_proj.transpose(1, 2)
    yield block.experts.down, theirs.experts.down_proj.transpose(1, 2)
    if block.shared is not None:
        dense = theirs.shared_experts
        yield block.shared.up.weight, torch.cat([dense.gate_proj.weight, dense.up_proj.weight])
        yield block.shared.down.weight, dense.down_proj.weight


@pytest.mark.parametrize(
    ("name", "renormalise"),
    [
        ("mixtral", True),
        ("olmoe", False),
        ("olmoe", True),
        ("qwen3_moe", False),
        ("qwen3_moe", True),
        ("deepseek_v2", False),
    ],
)
def test_blocks_are_transformers_with_gradients(name, renormalise):
    theirs, options = peer(name, renormalise)
    block = MoE(WIDTH, experts=EXPERTS, top_k=2, hidden=HIDDEN, **options).double()
    with torch.no_grad():
        for mine, wanted in pairs(block, theirs):
            mine.copy_(wanted)
    x = torch.randn(3, 11, WIDTH, dtype=torch.float64).requires_grad_()
    with float64():
        wanted = theirs(x)
    found = block(x).y
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    direction = torch.randn_like(wanted)
    gradients = torch.autograd.grad((found * direction).sum(), [x, *(mine for mine, _ in pairs(block, theirs))])
    # Those with respect to their parameters, brought to our layout by the same function.
    (wanted * direction).sum().backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    torch.testing.assert_close(gradients[0], x.grad, **TOLERANCE)
    for each, (_, other) in zip(gradients[1:], pairs(block, theirs), strict=True):
        torch.testing.assert_close(each, other, **TOLERANCE)


def olmoe():
    """A small OLMoE of transformers and the same model of ours."""
    import transformers

    config = transformers.OlmoeConfig(
        vocab_size=19, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=EXPERTS, num_experts_per_tok=3, attn_implementation="eager",
    )  # fmt: skip
    config._experts_implementation = "eager"
    with float64():
        theirs = randomised(transformers.OlmoeForCausalLM(config))
    stack = [
        {"kind": "gqa", "heads": 4, "kv_heads": 2, "qk_norm": "rms_across"},
        {"kind": "moe", "experts": EXPERTS, "top_k": 3, "hidden": HIDDEN}
        | {"router": {"kind": "top_k", "renormalise": False}},
    ]
    model = zoo.LanguageModel(
        {"vocab_size": 19, "width": WIDTH, "norm_eps": 1e-5, "tied_embeddings": False}
        | {"stack": [{"repeat": 2, "blocks": stack}]}
    ).double()
    with torch.no_grad():
        model.embedding.weight.copy_(theirs.model.embed_tokens.weight)
        model.head.weight.copy_(theirs.lm_head.weight)
        model.norm.weight.copy_(theirs.model.norm.weight)
        for index, layer in enumerate(theirs.model.layers):
            attention, mixture = model.blocks[2 * index], model.blocks[2 * index + 1]
            attention.norm.weight.copy_(layer.input_layernorm.weight)
            mixture.norm.weight.copy_(layer.post_attention_layernorm.weight)
            theirs_attention = layer.self_attn
            parts = [theirs_attention.q_proj, theirs_attention.k_proj, theirs_attention.v_proj]
            attention.block.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            attention.block.out.weight.copy_(theirs_attention.o_proj.weight)
            attention.block.q_norm.weight.copy_(theirs_attention.q_norm.weight)
            attention.block.k_norm.weight.copy_(theirs_attention.k_norm.weight)
            for mine, wanted in pairs(mixture.block, layer.mlp):
                mine.copy_(wanted)
    return theirs, model.eval()


def test_a_whole_olmoe_is_transformers():
    """With the norm of queries and keys over all heads, and decoding token by token."""
    theirs, model = olmoe()
    for norm in (model.blocks[0].block.q_norm, model.blocks[0].block.k_norm):
        norm.eps = 1e-5  # as its other norms
    model.blocks[2].block.q_norm.eps = model.blocks[2].block.k_norm.eps = 1e-5
    tokens = torch.randint(19, (2, 9))
    with torch.no_grad(), float64():
        wanted = theirs(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, wanted, **TOLERANCE)
        state = model.init_state(2)
        for time in range(9):
            out = model(tokens[:, time : time + 1], state)
            state = out.state
            torch.testing.assert_close(out.logits[:, 0], wanted[:, time], **TOLERANCE)


@pytest.mark.parametrize(
    "router", ["top_k", {"kind": "top_k", "capacity_factor": 0.5}, "base", "loss_free", "expert_choice"]
)
def test_a_rows_logits_do_not_depend_on_the_batch(router):
    """In eval mode: alone, among others, beside padding and in another order, to the last digits of float64."""
    if router == "expert_choice":
        router = {"kind": router, "allow_lookahead": True}
    mixture = {"kind": "moe", "experts": EXPERTS, "top_k": 1 if router == "base" else 2, "router": router}
    stack = ["gqa", {**mixture, "shared_experts": 1}, "mamba2", mixture]
    model = zoo.LanguageModel({"vocab_size": 19, "width": WIDTH, "stack": stack}).double().eval()
    tokens = torch.randint(19, (5, 14))
    with torch.no_grad():
        whole = model(tokens).logits
        order = torch.tensor([3, 0, 4, 2, 1])
        torch.testing.assert_close(model(tokens[order]).logits, whole[order], rtol=0, atol=1e-12)
        others = torch.cat([tokens[:1], torch.randint(19, (4, 14))])
        torch.testing.assert_close(model(others).logits[0], whole[0], rtol=0, atol=1e-12)
        for row in range(5):
            alone = model(tokens[row : row + 1]).logits[0]
            torch.testing.assert_close(alone, whole[row], rtol=0, atol=1e-12)
        segments = torch.zeros(2, 17, dtype=torch.long)
        segments[:, 3:] = 1
        padded = torch.cat([torch.randint(19, (2, 3)), tokens[:2]], 1)
        torch.testing.assert_close(model(padded, segments=segments).logits[:, 3:], whole[:2], rtol=0, atol=1e-12)
