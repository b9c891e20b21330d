"""transformers' models as an oracle in float64."""

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

import zoo.convert
from zoo.convert.published import family
from zoo.convert.tensors import matches
from zoo.hf import ZooForCausalLM


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Inside, what transformers computes in float32 whatever the model's dtype (norms, rotary angles, softmax) is
    computed in float64. Build and run its float64 models inside."""
    scan = RecurrentGemmaRglru._rnn_scan  # its default of float32 is bound already
    slopes = MiniMaxLightningAttention.get_slope_rate  # made in the default dtype

    def exact_slopes(self: Any, *device: Any) -> torch.Tensor:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return slopes(self, *device)
        finally:
            torch.set_default_dtype(before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MiniMaxLightningAttention, "get_slope_rate", exact_slopes)
        patch.setattr(RecurrentGemmaRglru, "_rnn_scan", lambda *a, **k: scan(*a, **k, acc_dtype=torch.float64))
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def randomise(model: torch.nn.Module, size: float = 0.4) -> torch.nn.Module:
    """Every weight random, so that no two tensors can be taken for one another, and large enough to matter. Biases that
    help to choose experts are in float32 at least, as transformers keeps them when it loads a model."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=size)
        for module in model.modules():
            bias = getattr(module, "e_score_correction_bias", None)
            if bias is not None:
                wide = torch.promote_types(bias.dtype, torch.float32)
                module.e_score_correction_bias = torch.nn.Buffer(torch.randn_like(bias, dtype=wide))
    return model.eval()


def model_of(config: transformers.PreTrainedConfig, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """transformers' causal model of a configuration, of random weights."""
    return randomise(transformers.AutoModelForCausalLM.from_config(config).to(dtype))


def tokens_and_masks(vocab_size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Three rows of tokens, and masks of a plain, a left- and a right-padded batch of them."""
    tokens = torch.randint(6, vocab_size, (3, 24))
    masks = {where: torch.ones_like(tokens) for where in ("plain", "left", "right")}
    for row, length in enumerate((24, 17, 3)):
        masks["left"][row, : 24 - length] = 0
        masks["right"][row, length:] = 0
    return tokens, masks


def difference(
    theirs: transformers.PreTrainedModel, ours: ZooForCausalLM, tokens: torch.Tensor, mask: torch.Tensor | None
) -> float:
    """The largest difference of logits, as a share of the largest logit (it is tens: the weights are far from a
    trained model's)."""
    given = {} if mask is None else {"attention_mask": mask}
    places = {}
    if mask is not None and "position_ids" in inspect.signature(theirs.forward).parameters:
        places = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    exact = in_float64() if theirs.dtype == torch.float64 else contextlib.nullcontext()
    with exact, torch.no_grad():
        wanted = theirs(tokens, use_cache=False, **given, **places).logits
    with torch.no_grad():
        found = ours(tokens, **given).logits
    seen = torch.ones_like(tokens) if mask is None else mask
    return float((found - wanted)[seen == 1].abs().max() / wanted.abs().max())


def differences(
    config: transformers.PreTrainedConfig, dtype: torch.dtype
) -> tuple[dict[str, float], transformers.PreTrainedModel, ZooForCausalLM]:
    """`difference` for a plain, a left- and a right-padded batch, of a model of random weights; it, and ours."""
    with in_float64() if dtype == torch.float64 else contextlib.nullcontext():
        theirs = model_of(config, dtype)
    ours = zoo.convert.load(theirs)
    assert ours.dtype == dtype
    tokens, masks = tokens_and_masks(config.vocab_size)
    given = masks | {"plain": None}
    return {where: difference(theirs, ours, tokens, mask) for where, mask in given.items()}, theirs, ours


def equals_transformers(config: transformers.PreTrainedConfig, cached: bool = True) -> None:
    """Logits to 1e-9 of the largest (1e-5 in float32), of a plain, a left- and a right-padded batch; greedy generation
    alike. `cached=False` for a model whose cache transformers gets wrong: there it generates without."""
    found, _, _ = differences(config, torch.float32)
    assert max(found.values()) < 1e-5, found
    found, theirs, ours = differences(config, torch.float64)
    assert max(found.values()) < 1e-9, found
    tokens, masks = tokens_and_masks(config.vocab_size)
    chosen = {"max_new_tokens": 12, "do_sample": False, "attention_mask": masks["left"]}
    with in_float64():
        wanted = theirs.generate(tokens, use_cache=cached, **chosen)
    assert torch.equal(ours.generate(tokens, **chosen), wanted)


def respell(folder: Path, spelling: Callable[[str], str]) -> None:
    """Rename the tensors of a checkpoint."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({spelling(name): each for name, each in tensors.items()}, file, metadata={"format": "pt"})


def there_and_back(
    config: transformers.PreTrainedConfig, folder: Path, spelling: Callable[[str], str] | None = None
) -> None:
    """A published checkpoint in bfloat16 to a zoo one and back, by objects and by files: equal files. `spelling` gives
    the published names where transformers saves by others."""
    theirs = model_of(config, torch.bfloat16)
    theirs.generation_config.temperature = 0.5
    theirs.generation_config.do_sample = True
    theirs.save_pretrained(folder / "published")
    if spelling is not None:
        respell(folder / "published", spelling)
    derived = family(config.model_type).derived  # not written: it holds what the configuration says
    model = zoo.convert.load(folder / "published")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == config.eos_token_id
    assert model.generation_config.temperature == 0.5
    zoo.convert.save(model, folder / "saved")
    assert zoo.convert.convert(folder / "published", folder / "zoo") == "zoo"
    assert zoo.convert.convert(folder / "zoo", folder / "converted") == config.model_type
    for way in ("saved", "converted"):
        original, back = (load_file(folder / each / "model.safetensors") for each in ("published", way))
        original = {name: each for name, each in original.items() if not matches(name, derived)}
        assert original.keys() == back.keys()
        assert all(original[name].dtype == back[name].dtype for name in original)
        assert all(torch.equal(original[name], back[name]) for name in original)
        for name in ("config.json", "generation_config.json"):
            said, again = (json.loads((folder / each / name).read_text()) for each in ("published", way))
            assert said == again
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / way, dtype="auto")
        assert type(loaded) is type(theirs)
    stored = ZooForCausalLM.from_pretrained(folder / "zoo", dtype="auto")
    both = [dict(each.state_dict()) for each in (model, stored)]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
