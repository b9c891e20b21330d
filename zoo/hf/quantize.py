"""Weight-only quantisation with torchao: 8 or 4 bits a weight where a block multiplies by a matrix."""

import importlib
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.block import Block
from zoo.layers.wide import WideLinear
from zoo.model import LanguageModel

MODES = ("int8", "int4")
GROUP, GROUPS = 32, (32, 64, 128)  # weights that share a scale (int4); fewer are more exact
SMALL = 32  # a map with fewer inputs or outputs (gates, steps) saves nothing and matters much
ROWS = 16  # the CPU's kernel for 4 bits takes outputs in so many rows
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPARED = 4096  # tokens at most on which quality is measured ...
COMPARED_NUMBERS = 2**26  # ... and log-probabilities at most that are held for it
# Where torchao keeps the kernel for 4 bits on CPUs, by release.
CPU_INT4 = (
    ("torchao.prototype.quantization.int4", "PrototypeInt4WeightOnlyConfig"),  # 0.18
    ("torchao.prototype.quantization.int4", "Int4WeightOnlyOpaqueTensorConfig"),  # 0.17
    ("torchao.prototype.int4_opaque_tensor", "Int4WeightOnlyOpaqueTensorConfig"),  # 0.15, 0.16
)


class Quantized(NamedTuple):
    """What `quantize` did.

    `maps`: how many linear maps by their bits; `left`: those inside the blocks that stay as they were, by reason;
    `experts`: bytes of experts' stacked matrices, which stay too; `before` and `after`: bytes of all weights; `kernel`:
    what is to be known of how 4 bits compute here, if anything.
    """

    mode: str
    maps: dict[int, int]
    left: dict[str, list[str]]
    experts: int
    before: int
    after: int
    kernel: str

    def told(self) -> str:
        """For people: what was done, and what was left."""
        maps = " and ".join(f"{count} linear maps in {bits} bits" for bits, count in self.maps.items())
        share = 100 * self.after / max(self.before, 1)
        done = [f"{self.mode}: {maps}, weights {self.before:,} -> {self.after:,} bytes ({share:.0f}%)"]
        left = ["embedding and head"] + [f"{', '.join(_patterns(names))} ({why})" for why, names in self.left.items()]
        if self.experts:
            left.append(f"{self.experts:,} bytes of experts (stacked matrices, which torchao's kernels do not take)")
        return "\n".join(["; ".join([*done, *filter(None, [self.kernel])]), f"left as they were: {'; '.join(left)}"])


class Quality(NamedTuple):
    """A quantised model beside the original, over `tokens` predictions: bits a token of both, KL(original, quantised)
    in bits a token, and the share of tokens for which both find the same one most likely."""

    tokens: int
    original: float
    quantized: float
    divergence: float
    agreement: float

    def told(self) -> str:
        return (
            f"on {self.tokens:,} tokens: {self.original:.4f} -> {self.quantized:.4f} bits a token, divergence "
            f"{self.divergence:.4f} bits a token, {self.agreement:.1%} the same most likely token"
        )


@torch.no_grad()
def quantize(model: Any, mode: str, group: int = GROUP) -> Quantized:
    """Quantise a causal model's linear maps in place: "int8" with a scale a row, "int4" with one for `group` weights.

    Activations stay as they are. A map is quantised where it is an nn.Linear inside a block that runs it as a layer in
    every pass (whole texts and single tokens); where a block reads the matrix itself, it stays. So do embedding and
    head, routers, maps for gates and decays (`WideLinear`), and those with fewer than 32 inputs or outputs. With int4,
    maps whose inputs are no multiple of `group` or whose outputs are none of 16 get 8 bits. The model is for inference
    only from here on.

    On GPUs int4 computes in bfloat16 (compute capability 8.0 or newer). Where torchao has no kernel for 4 bits it keeps
    each in a byte: as large as int8 and no faster, and `Quantized.kernel` says so.

    Raises ImportError without torchao, ValueError for an unknown mode, a model in float64, and where nothing fits.
    """
    torchao = require(mode)
    if group not in GROUPS:
        raise ValueError(f"group={group} must be one of {', '.join(map(str, GROUPS))}, which kernels for 4 bits take")
    if model.dtype not in DTYPES:
        raise ValueError(f"the model is {model.dtype}, and torchao quantises float32, bfloat16 and float16; convert it")
    found = {name: each for name, each in model.model.blocks.named_modules() if isinstance(each, nn.Linear)}
    called, left = _called(model.model, found), dict[str, list[str]]()
    for name, each in found.items():
        why = _refusal(name, each, called)
        if why is not None:
            left.setdefault(why, []).append(name)
    refused = {name for names in left.values() for name in names}
    chosen = [each for name, each in found.items() if name not in refused]
    if not chosen:
        why = "; ".join(f"{len(names)} of them: {why}" for why, names in left.items())
        raise ValueError(f"nothing to quantise: the blocks hold {len(found)} linear maps{f' ({why})' if why else ''}")
    before = weight_bytes(model)
    fine = [each for each in chosen if mode == "int4" and _fits_int4(each, group)]
    coarse = [each for each in chosen if mode == "int8" or not _fits_int4(each, group)]
    kernel = _int4(torchao, model, fine, group) if fine else ""
    if coarse:
        _apply(torchao, model, coarse, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    maps = {bits: len(layers) for bits, layers in ((4, fine), (8, coarse)) if layers}
    return Quantized(mode, maps, left, _expert_bytes(model), before, weight_bytes(model), kernel)


def quantize_and_compare(model: Any, mode: str, ids: Int[Tensor, " tokens"]) -> tuple[Quantized, Quality | None]:
    """Quantise a model, and compare it with what it was on the first tokens of `ids` (None where they predict none).

    As many tokens as log-probabilities fit in 256 MiB, 4096 at most.
    """
    count = min(COMPARED, max(64, COMPARED_NUMBERS // model.config.vocab_size))
    ids = ids[: count + 1].to(model.device)
    if len(ids) < 2:
        return quantize(model, mode), None
    old = _log_probabilities(model, ids)
    done = quantize(model, mode)
    new = _log_probabilities(model, ids)
    targets = ids[1:, None]
    original, quantized = (-float(each.gather(1, targets).double().mean()) / math.log(2) for each in (old, new))
    divergence = float((old.exp() * (old - new)).double().sum(1).mean()) / math.log(2)
    agreement = float((old.argmax(1) == new.argmax(1)).double().mean())
    return done, Quality(len(targets), original, quantized, max(divergence, 0.0), agreement)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights, shared ones once, scales of quantised ones too."""
    return sum(_bytes(each) for each in (*model.parameters(), *model.buffers()))


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in cast(Any, tensor).__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _expert_bytes(model: nn.Module) -> int:
    modules = [each for each in model.modules() if hasattr(each, "per_expert")]
    return sum(getattr(each, name).nbytes for each in modules for name in cast(Any, each).per_expert)


# What is quantised --------------------------------------------------------------------------------------------------


def _refusal(name: str, layer: nn.Linear, called: set[str]) -> str | None:
    """Why a map stays as it is, if it does."""
    if "router" in name.split("."):
        return "of routers"
    if isinstance(layer, WideLinear):
        return "of gates and decays"
    if min(layer.in_features, layer.out_features) < SMALL:
        return f"fewer than {SMALL} inputs or outputs"
    return None if name in called else "their block reads the matrix itself"


def _fits_int4(layer: nn.Linear, group: int) -> bool:
    return layer.in_features % group == 0 and layer.out_features % ROWS == 0


def _called(model: LanguageModel, layers: dict[str, nn.Linear]) -> set[str]:
    """The names of those that run as layers in every pass: a text without a state, with one, and one more token."""
    passes: list[set[str]] = []
    hooks = [each.register_forward_hook(lambda *_, n=name: passes[-1].add(n)) for name, each in layers.items()]
    tokens = torch.zeros(1, 8, dtype=torch.long, device=model.embedding.weight.device)
    training = model.training
    model.eval()
    try:
        passes.append(set())
        model(tokens)
        if all(cast(Block, each.block).causal for each in model.residuals):
            state = model.init_state(1)
            for part in (tokens[:, :7], tokens[:, 7:]):
                passes.append(set())
                state = model(part, state).state
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return set.intersection(*passes)


def _patterns(names: Iterable[str]) -> list[str]:
    """Names with their numbers as *, and how many there are of each."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name) for name in names)
    return [name if count == 1 else f"{name} × {count}" for name, count in counts.items()]


# How it is quantised ------------------------------------------------------------------------------------------------


def require(mode: str) -> Any:
    """torchao.quantization, for `mode`. Raises ValueError for an unknown mode, ImportError without torchao."""
    if mode not in MODES:
        raise ValueError(f"quantize={mode!r} is unknown; choose from {', '.join(MODES)}")
    try:
        return importlib.import_module("torchao.quantization")
    except ImportError as error:
        if (error.name or "").split(".")[0] != "torchao":
            raise
        raise ImportError("quantised weights need torchao: pip install 'efficient-zoo[quant]'") from error


def _apply(torchao: Any, model: nn.Module, layers: list[nn.Linear], config: Any) -> None:
    chosen = set(layers)
    for each in layers:
        each.weight.requires_grad_(False)
    torchao.quantize_(model, config, filter_fn=lambda module, name: module in chosen)


def _int4(torchao: Any, model: Any, layers: list[nn.Linear], group: int) -> str:
    """Quantise to 4 bits with the kernel of the model's device. Returns what is to be known of it."""
    device = model.device
    options: dict[str, Any] = {"group_size": group, "set_inductor_config": False}
    if device.type == "cpu" and (make := _cpu_int4()) is not None:
        _apply(torchao, model, layers, make(**options))
        fast = model.dtype == torch.bfloat16
        return "" if fast else "on CPUs 4 bits are fast in bfloat16 alone: reading a text now takes many times as long"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and _tiled(torchao):
        for each in layers:
            each.weight.data = each.weight.data.to(torch.bfloat16)  # all that this kernel takes
        # The one format on GPUs that needs no library besides torch itself.
        _apply(torchao, model, layers, torchao.Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d", **options))
        return "4 bits compute in bfloat16"
    granularity = torchao.PerGroup(group)
    _apply(
        torchao,
        model,
        layers,
        torchao.IntxWeightOnlyConfig(weight_dtype=cast(Any, torch).int4, granularity=granularity),
    )
    return f"the installed torchao has no kernel for 4 bits on this {device.type}: each is held in a byte"


def _tiled(torchao: Any) -> bool:
    """Whether this torchao knows the format; from 0.14 on."""
    return "int4_packing_format" in inspect.signature(torchao.Int4WeightOnlyConfig).parameters


def _cpu_int4() -> Callable[..., Any] | None:
    for module, name in CPU_INT4:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    return None


@torch.no_grad()
def _log_probabilities(model: Any, ids: Int[Tensor, " tokens"], window: int = 1024) -> Float[Tensor, "predicted vocab"]:
    """Of the token after each but the last, in windows that know nothing of one another."""
    parts = []
    for begin in range(0, len(ids) - 1, window):
        tokens = ids[begin : min(begin + window, len(ids) - 1)]
        parts.append(model(input_ids=tokens[None], use_cache=False).logits[0].float().log_softmax(-1))
    return torch.cat(parts)
