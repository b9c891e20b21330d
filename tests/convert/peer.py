"""transformers' models as an oracle in float64."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import zoo.convert
from zoo.hf import ZooForCausalLM


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Inside, what transformers computes in float32 whatever the model's dtype (norms, rotary angles, softmax) is
    computed in float64. Build and run its float64 models inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def randomise(model: torch.nn.Module, size: float = 0.4) -> torch.nn.Module:
    """Every weight random, so that no two tensors can be taken for one another, and large enough to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=size)
    return model.eval()


def model_of(config: transformers.PreTrainedConfig, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """transformers' causal model of a configuration, of random weights."""
    return randomise(transformers.AutoModelForCausalLM.from_config(config).to(dtype))


def equals_transformers(config: transformers.PreTrainedConfig) -> None:
    """Logits to 1e-9 of the largest, of a plain, a left- and a right-padded batch; greedy generation alike."""
    tokens = torch.randint(6, config.vocab_size, (3, 24))
    with in_float64():
        theirs = model_of(config, torch.float64)
    ours = zoo.convert.load(theirs)
    assert ours.dtype == torch.float64
    masks = {"plain": torch.ones_like(tokens), "left": torch.ones_like(tokens), "right": torch.ones_like(tokens)}
    for row, length in enumerate((24, 17, 3)):
        masks["left"][row, : 24 - length] = 0
        masks["right"][row, length:] = 0
    for where, mask in masks.items():
        given = {} if where == "plain" else {"attention_mask": mask}
        with in_float64(), torch.no_grad():
            wanted = theirs(tokens, position_ids=(mask.cumsum(1) - 1).clamp_min(0), **given).logits
        found = ours(tokens, **given).logits
        # A large logit is tens: the weights are far from a trained model's.
        error = (found - wanted)[mask == 1].abs().max() / wanted.abs().max()
        assert error < 1e-9, f"{where}: {error}"
    chosen = {"max_new_tokens": 12, "do_sample": False, "attention_mask": masks["left"]}
    with in_float64():
        wanted = theirs.generate(tokens, **chosen)
    assert torch.equal(ours.generate(tokens, **chosen), wanted)


def there_and_back(config: transformers.PreTrainedConfig, folder: Path) -> None:
    """A published checkpoint in bfloat16 to a zoo one and back, by objects and by files: equal files."""
    theirs = model_of(config, torch.bfloat16)
    theirs.generation_config.temperature = 0.5
    theirs.generation_config.do_sample = True
    theirs.save_pretrained(folder / "published")
    model = zoo.convert.load(folder / "published")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == config.eos_token_id
    assert model.generation_config.temperature == 0.5
    zoo.convert.save(model, folder / "saved")
    assert zoo.convert.convert(folder / "published", folder / "zoo") == "zoo"
    assert zoo.convert.convert(folder / "zoo", folder / "converted") == config.model_type
    for way in ("saved", "converted"):
        original, back = (load_file(folder / each / "model.safetensors") for each in ("published", way))
        assert original.keys() == back.keys()
        assert all(torch.equal(original[name], back[name]) for name in original)
        for name in ("config.json", "generation_config.json"):
            said, again = (json.loads((folder / each / name).read_text()) for each in ("published", way))
            assert said == again
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / way, dtype="auto")
        assert type(loaded) is type(theirs)
    stored = ZooForCausalLM.from_pretrained(folder / "zoo", dtype="auto")
    both = [dict(each.state_dict()) for each in (model, stored)]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
