"""Whole models on the CPU, ours and transformers', of the same configuration and the same weights: training, prefill
and decoding. Part of `python -m benchmarks`; alone `python -m benchmarks.models_cpu [MODEL ...]`.

Width 512, 8 layers, a vocabulary of 32,000, float32. A training step is forward, the loss of the labels and backward,
without an optimizer; ours makes the loss as `zoo pretrain` does, without logits (`skip_logits`). Roof: FLOPs of the
matrix products for training and prefill, bytes of weights and state for a token.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers

import zoo.convert
from benchmarks.measure import OURS, Work, contest, write
from ops.native_memory import keep_freed_memory
from zoo.describe import active, count
from zoo.hf import ZooForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1408}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "num_local_experts": 8}
# Name: transformers' configuration and its options.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", HEADS),
    "mixtral": ("Mixtral", HEADS | {"intermediate_size": 704, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "mamba": ("Mamba", {"state_size": 16}),
    "mamba2": ("Mamba2", {"num_heads": 16, "head_dim": 64, "n_groups": 1, "state_size": 128, "chunk_size": 64}),
    "rwkv": ("Rwkv", {"attention_hidden_size": 512, "context_length": 2048, "intermediate_size": 2048}),
    "recurrent_gemma": (
        "RecurrentGemma",
        {"num_attention_heads": 8, "lru_width": 512, "intermediate_size": 3072, "attention_window_size": 256},
    ),
    "qwen3_next": (
        "Qwen3Next",
        HEADS
        | {
            "head_dim": 64,
            "linear_num_value_heads": 8,
            "linear_num_key_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 352,
            "shared_expert_intermediate_size": 352,
            "decoder_sparse_step": 1,
        },
    ),
    "jamba": (
        "Jamba",
        HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "mamba_dt_rank": 32, "use_mamba_kernels": False},
    ),
}
# Training steps of transformers that take minutes and more: see benchmarks.mamba_training_cpu.
SLOW = ("mamba", "jamba")


def pair(name: str, **changed: Any) -> tuple[Any, ZooForCausalLM]:
    """transformers' model of random weights and ours with the same; `changed`: options unlike those of SIZES."""
    kind, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | options | changed)
    theirs = transformers.AutoModelForCausalLM.from_config(config).float()
    return theirs, zoo.convert.load(theirs)


def flops(ours: ZooForCausalLM, time: int, logits: int | None = None) -> float:
    """Forward FLOPs of `time` tokens of one row, with so many logits (None: all)."""
    model = ours.model
    head = 2 * model.head.weight.numel() * (time if logits is None else logits)
    return head + time * sum(each.block.flops_per_token(time // 2) for each in model.residuals)


def step(model: Any, tokens: torch.Tensor, **options: Any) -> Callable[[], None]:
    """Forward, loss and backward."""

    def run() -> None:
        model(tokens, labels=tokens, use_cache=False, **options).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def training(name: str, theirs: Any, ours: ZooForCausalLM, slow: bool = False) -> Iterator[list[dict[str, Any]]]:
    for batch, time in ((2, 512), (1, 2048)):
        tokens = torch.randint(3, SIZES["vocab_size"], (batch, time))
        peer: Any = step(theirs.train(), tokens)
        if name in SLOW and not slow:
            peer = "takes minutes: see mamba_training_cpu"
        yield contest(
            f"{name} train",
            f"{batch}x{time}",
            {OURS: step(ours.train(), tokens, skip_logits=True), "transformers": peer},
            work=Work(3 * flops(ours, time) * batch, 0),
            tokens=batch * time,
            repeats=3,
            budget=60,
        )


@torch.inference_mode()
def prefill(name: str, theirs: Any, ours: ZooForCausalLM) -> list[dict[str, Any]]:
    tokens = torch.randint(3, SIZES["vocab_size"], (1, 512))
    return contest(
        f"{name} prefill",
        "1x512",
        {
            who: lambda model=model: model.eval()(tokens, use_cache=True, logits_to_keep=1)
            for who, model in ((OURS, ours), ("transformers", theirs))
        },
        work=Work(flops(ours, 512, 1), 0),
        tokens=512,
        repeats=3,
    )


@torch.inference_mode()
def decode(name: str, theirs: Any, ours: ZooForCausalLM, new: int = 64) -> list[dict[str, Any]]:
    tokens = torch.randint(3, SIZES["vocab_size"], (1, 4))
    chosen: dict[str, Any] = {"max_new_tokens": new, "do_sample": False}
    for model in (ours, theirs):
        model.generation_config.eos_token_id = None  # all tokens, and nothing that looks for the end
    weights = 4 * (active(ours.model) - ours.model.embedding.weight.numel())
    state = ours.model.state_bytes(4 + new // 2)
    return contest(
        f"{name} decode",
        f"batch 1, {new} tokens after 4",
        {
            who: lambda model=model: model.eval().generate(tokens, **chosen)
            for who, model in ((OURS, ours), ("transformers", theirs))
        },
        work=Work(0, (weights + 2 * state) * new),
        tokens=new,
        repeats=5,
    )


def main(names: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    keep_freed_memory()  # for all who run here: fresh pages cost a training step a quarter
    rows: list[dict[str, Any]] = []
    for name in names or MODELS:
        theirs, ours = pair(name)
        print(f"{name}: {count(ours):,} parameters, theirs {theirs.num_parameters():,}", flush=True)
        for found in (
            *training(name, theirs, ours),
            prefill(name, theirs, ours),
            decode(name, theirs, ours),
        ):
            rows += found
    if not names:
        write("models_cpu", "# Whole models on the CPU", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
