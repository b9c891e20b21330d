"""Decoding: the update of a state at large batches, and whole models a token at a time."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

import ops
from benchmarks.gpu.checking import Part, same
from benchmarks.gpu.contest import FORWARD, Contestant, Task, rows_of
from benchmarks.gpu.peers import FLA, first_line, peer
from benchmarks.gpu.setting import Setting, Work
from zoo.block import state_bytes
from zoo.graphs import Stepper
from zoo.model import LanguageModel

WINDOWED = {  # about 130M parameters, attention over a window and SwiGLU
    "vocab_size": 50288,
    "width": 768,
    "stack": [{"repeat": 12, "blocks": [{"kind": "gqa", "heads": 12, "kv_heads": 4, "window": 1024}, "swiglu"]}],
}
GATED_DELTA = {"vocab_size": 50288, "width": 768, "stack": [{"repeat": 12, "blocks": ["gated_delta_net", "swiglu"]}]}
MODELS: dict[str, Any] = {
    "mamba-130m": "mamba-130m",
    "mamba2-130m": "mamba2-130m",
    "rwkv4-169m": "rwkv4-169m",
    "rwkv7-0.1b": "rwkv7-0.1b",
    "gated_delta_net and swiglu": GATED_DELTA,
    "gqa over a window and swiglu": WINDOWED,
}
UPDATE, WHOLE = ">= 80% of bandwidth at batch >= 128", "CUDA graph >= 3 times eager, >= 45% of the weights' bandwidth"


def rows(setting: Setting) -> Iterator[list[dict[str, Any]]]:
    yield from rows_of(_updates(setting), setting)
    for name, config in MODELS.items():
        if setting.over:
            return
        yield _whole(setting, name, _tiny(name) if setting.smoke else config)


# State updates --------------------------------------------------------------------------------------------------


def _updates(setting: Setting) -> Iterator[Task]:
    for batch in [3] if setting.smoke else (128, 512):
        heads, d = setting.size(16, 3), setting.size(128, 16)
        yield _matrix_state(setting, batch, heads, d, delta=False)
        yield _matrix_state(setting, batch, heads, d, delta=True)
        yield _scan(setting, batch, setting.size(8192, 40))


def _matrix_state(setting: Setting, batch: int, heads: int, d: int, delta: bool) -> Task:
    state = setting.normal(batch, heads, d, d, dtype=torch.float32)
    inputs = {name: setting.normal(batch, 1, heads, d) for name in ("q", "k", "v")}
    inputs["log_decay"] = logsigmoid(setting.normal(batch, 1, heads, dtype=torch.float32) + 3)
    if delta:
        inputs["k"] = normalize(inputs["k"], dim=-1)
        inputs["beta"] = setting.normal(batch, 1, heads).sigmoid()

    def ours(initial_state: Tensor, impl: str = "auto", **given: Any) -> Any:
        op = ops.delta_rule if delta else ops.linear_attention
        return op(**given, initial_state=initial_state, impl=impl)[:2]

    def theirs(function: Any) -> Contestant:
        def run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor, **more: Tensor) -> Any:
            return function(q, k, v, g=log_decay, **more, scale=1.0, initial_state=initial_state,
                            output_final_state=True)  # fmt: skip

        return Contestant(run)

    place = "gated_delta_rule:fused_recurrent_gated_delta_rule" if delta else "simple_gla:fused_recurrent_simple_gla"
    dims = same("batch time heads d", "q", "k", "v", "out0")
    dims |= same("batch time heads", "log_decay", "beta")
    dims |= same("batch heads d e", "initial_state", "out1")
    return Task(
        f"one token, {'delta_rule' if delta else 'linear_attention'}, scalar gate",
        f"batch {batch}, heads {heads}, d {d}",
        UPDATE,
        inputs | {"initial_state": state},
        {"zoo": Contestant(ours), FLA: peer(f"fla.ops.{place}", theirs)},
        {FORWARD: Work(2 * 4 * state.numel() + 4 * inputs["q"].numel() * inputs["q"].element_size())},
        Part(dims, lambda **given: ours(impl="reference", **given), rows=2),
        graph=True,
    )


def _scan(setting: Setting, batch: int, channels: int, n: int = 16) -> Task:
    inputs = {
        "x": setting.normal(batch, 1, channels),
        "dt": (setting.uniform(batch, 1, channels) * 0.1 + 0.001).to(setting.dtype),
        "A": -torch.arange(1.0, n + 1, device=setting.device).repeat(channels, 1),
        "B": setting.normal(batch, 1, n),
        "C": setting.normal(batch, 1, n),
        "D": setting.normal(channels, dtype=torch.float32),
        "z": setting.normal(batch, 1, channels),
        "initial_state": setting.normal(batch, channels, n, dtype=torch.float32),
    }

    def ours(impl: str = "auto", **given: Tensor) -> tuple[Tensor, Tensor]:
        return ops.selective_scan(**given, impl=impl)

    def theirs(function: Any) -> Contestant:
        def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, initial_state: Tensor):
            one = (each[:, 0] for each in (x, dt))
            y = function(initial_state, *one, A, B[:, 0], C[:, 0], D, z[:, 0])  # writes the state in place
            return y[:, None], initial_state

        # The first call, which is compared, starts from the given state; later ones go on from where it left it.
        return Contestant(run, lambda given: given | {"initial_state": given["initial_state"].clone()})

    dims = same("batch time channels", "x", "dt", "z", "out0")
    dims |= {"A": "channels n", "B": "batch time n", "C": "batch time n", "D": "channels"}
    dims |= same("batch channels n", "initial_state", "out1")
    values = batch * channels
    least = Work(2 * 4 * values * n + 4 * values * inputs["x"].element_size() + 4 * channels * n, special=values * n)
    place = "mamba_ssm.ops.triton.selective_state_update:selective_state_update"
    return Task(
        "one token, selective_scan, D and z",
        f"batch {batch}, channels {channels}, states {n}",
        UPDATE,
        inputs,
        {"zoo": Contestant(ours), "mamba-ssm": peer(place, theirs)},
        {FORWARD: least},
        Part(dims, lambda **given: ours("reference", **given), rows=2),
        graph=True,
    )


# Whole models ---------------------------------------------------------------------------------------------------


def _tiny(name: str) -> dict[str, Any]:
    blocks: Mapping[str, list[Any]] = {
        "mamba-130m": ["mamba"],
        "mamba2-130m": ["mamba2"],
        "rwkv4-169m": ["rwkv4", "rwkv4_channel_mix"],
        "rwkv7-0.1b": [{"kind": "rwkv7", "layers": 2}],
        "gated_delta_net and swiglu": ["gated_delta_net", "swiglu"],
        "gqa over a window and swiglu": [{"kind": "gqa", "heads": 4, "kv_heads": 2, "window": 8}, "swiglu"],
    }
    return {"vocab_size": 97, "width": 32, "stack": [{"blocks": blocks[name]}]}


@torch.no_grad()
def _whole(setting: Setting, name: str, config: Any) -> list[dict[str, Any]]:
    """Greedy decoding at batch 1 behind a prompt, every token from the one before it."""
    base = {"task": "whole model, batch 1", "shape": name, "target": WHOLE, "pass": "a token"}
    print(f"whole model, {name}", flush=True)
    model = LanguageModel(config).to(setting.device, setting.dtype).eval()
    prompt = torch.randint(model.config.vocab_size, (1, setting.size(64, 7)), device=setting.device)
    count = setting.size(64, 5)
    ways: dict[str, Decoder] = {}
    tokens: dict[str, list[int]] = {}
    absent = []
    for who, make in (("zoo, eager", _eager), (f"zoo, {'CUDA graph' if setting.gpu else 'static buffers'}", _stepped)):
        try:
            way = make(model, prompt)
            tokens[who] = way(count)[0].tolist()
            ways[who] = way
        except Exception as error:
            absent.append(base | {"who": who, "absent": f"failed: {first_line(error)}"})
            print(f"  {who}: {absent[-1]['absent']}", flush=True)
    agree = sum(a == b for a, b in zip(*tokens.values(), strict=True)) / count if len(tokens) == 2 else None
    held = state_bytes(model.init_state(1))
    weights = {id(each): each for each in model.parameters()}
    if model.head.weight is not model.embedding.weight:
        weights.pop(id(model.embedding.weight))  # one row of it is read
    least = Work(sum(each.numel() * each.element_size() for each in weights.values()) + held)
    taken: dict[str, list[tuple[float, float]]] = {who: [] for who in ways}
    for _ in range(min(setting.repeats, 5)):
        for who, way in ways.items():
            taken[who].append(way(count)[1:])
    found = []
    for who, times in taken.items():
        if not times:
            continue
        device, host = ([each[place] for each in times] for place in (0, 1))
        row = {"who": who, "ms": statistics.median(device), "spread_ms": max(device) - min(device), "runs": len(times)}
        row |= {"host_ms": statistics.median(host), "peak_gb": None, "roof_ms": 1e3 * least.seconds()}
        row |= {"bytes": least.bytes, "flops": 0, "special": 0}
        row |= {} if agree is None else {"same_tokens": agree}
        row["parameters"] = sum(each.numel() for each in model.parameters())
        found.append(base | row)
        print(f"  {who:30s} {row['ms']:.4f} ms a token, roof {row['roof_ms']:.4f}; same tokens {agree}", flush=True)
    return found + absent


Decoder = Callable[[int], tuple[Tensor, float, float]]


def _eager(model: LanguageModel, prompt: Tensor) -> Decoder:
    def decode(count: int) -> tuple[Tensor, float, float]:
        out = model(prompt, model.init_state(1), logits_to_keep=1)
        state: Any = [out.state]

        def step(token: Tensor) -> Tensor:
            out = model(token, state[0], logits_to_keep=1)
            state[0] = out.state
            return out.logits[:, -1]

        return _greedy(step, out.logits[:, -1], count)

    return decode


def _stepped(model: LanguageModel, prompt: Tensor) -> Decoder:
    stepper = Stepper(model)

    def decode(count: int) -> tuple[Tensor, float, float]:
        stepper.reset()
        return _greedy(stepper, stepper.read(prompt), count)

    return decode


def _greedy(step: Callable[[Tensor], Tensor], logits: Tensor, count: int) -> tuple[Tensor, float, float]:
    """The tokens, and milliseconds a token: until the device had done them, and until Python had asked for them."""
    tokens = []
    if logits.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        token = logits.argmax(-1, keepdim=True)
        tokens.append(token)
        logits = step(token)
    asked = time.perf_counter() - started
    if logits.is_cuda:
        torch.cuda.synchronize()
    taken = time.perf_counter() - started
    return torch.cat(tokens, 1)[0], 1e3 * taken / count, 1e3 * asked / count
