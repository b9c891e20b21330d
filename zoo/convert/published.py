"""Published checkpoints in and out: `load`, `save` and `convert`, for every family in `FAMILIES`."""

import copy
import importlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from zoo.config import ModelConfig
from zoo.convert.adapter import merged
from zoo.convert.family import Family, published_config
from zoo.convert.tensors import Tensors, inward, matches, outward, write
from zoo.hf import ZooConfig, ZooForCausalLM, model_class
from zoo.hf.checkpoint import check_source, staged
from zoo.hf.lora import is_adapter
from zoo.layers.spelling import nearest
from zoo.model import LanguageModel

# transformers' model_type -> "module:name" of the Family, imported when first asked for.
FAMILIES: dict[str, str] = {
    "llama": "zoo.convert.llama:FAMILY",
    "mistral": "zoo.convert.mistral:FAMILY",
    "qwen2": "zoo.convert.qwen2:FAMILY",
    "qwen3": "zoo.convert.qwen3:FAMILY",
    "mixtral": "zoo.convert.mixtral:FAMILY",
    "olmoe": "zoo.convert.olmoe:FAMILY",
    "qwen3_moe": "zoo.convert.qwen3_moe:FAMILY",
    "deepseek_v2": "zoo.convert.deepseek_v2:FAMILY",
    "deepseek_v3": "zoo.convert.deepseek_v3:FAMILY",
    "kimi_linear": "zoo.convert.kimi_linear:FAMILY",
    "recurrent_gemma": "zoo.convert.recurrent_gemma:FAMILY",
    "qwen3_next": "zoo.convert.qwen3_next:FAMILY",
    "lfm2": "zoo.convert.lfm2:FAMILY",
    "gpt_bigcode": "zoo.convert.gpt_bigcode:FAMILY",
    "falcon": "zoo.convert.falcon:FAMILY",
    "mamba": "zoo.convert.mamba:FAMILY",
    "falcon_mamba": "zoo.convert.falcon_mamba:FAMILY",
    "mamba2": "zoo.convert.mamba2:FAMILY",
    "jamba": "zoo.convert.jamba:FAMILY",
    "bamba": "zoo.convert.bamba:FAMILY",
    "granitemoehybrid": "zoo.convert.granitemoehybrid:FAMILY",
    "rwkv": "zoo.convert.rwkv:FAMILY",
    "minimax": "zoo.convert.minimax:FAMILY",
}
# What a tokenizer is stored in: copied beside a converted checkpoint.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Of a configuration: what tells of the file, not of the model.
ABOUT_FILE = ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", "auto_map")


def family(model_type: str) -> Family:
    """The family of a model_type. Raises ValueError that lists the known ones."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} cannot be converted{nearest(model_type, FAMILIES)}; "
            f"these can: {', '.join(FAMILIES)}"
        )
    module, name = FAMILIES[model_type].split(":")
    return cast(Family, getattr(importlib.import_module(module), name))


def load(source: Any) -> ZooForCausalLM:
    """A zoo model with the weights of `source`: a folder or hub id of a published or zoo checkpoint, or of an adapter
    (which is merged into what it was trained on), or a transformers model of a known family (whose tensors are then
    shared where they need no change).

    Weights take the dtype of the embedding, but for those that a family lets keep their own. Raises ValueError that
    names what cannot be converted: a configuration's option, a tensor that is missing, not expected or of the wrong
    shape, pickled weights.
    """
    if isinstance(source, ZooForCausalLM):
        return source
    if isinstance(source, PreTrainedModel):
        kind = family(source.config.model_type)
        if type(source).__name__ != kind.architecture:
            raise ValueError(f"{type(source).__name__} cannot be converted; pass a {kind.architecture}")
        # As transformers would save them: in memory it stacks experts.
        tensors = Tensors.of(type(source).__name__, revert_weight_conversion(source, dict(kind.weights(source))))
        generation, config = source.generation_config, source.config
    else:
        folder = local_folder(source)
        if is_adapter(folder):
            return merged(folder, load)
        config = _config(folder)
        if isinstance(config, ZooConfig):
            return model_class(config).from_pretrained(folder)
        kind, tensors = family(config.model_type), Tensors.stored(folder)
        generation = _generation(folder)
    ours = zoo_config(kind, config)
    found = dict(inward(tensors, kind, _skeleton(ours.model_config)))
    dtype = next(iter(found.values())).dtype
    model = ZooForCausalLM.from_pretrained(None, config=ours, state_dict=found, dtype=dtype)
    held = model.state_dict(keep_vars=True)
    for name, tensor in found.items():  # from_pretrained made all of one dtype
        if tensor.dtype != dtype and matches(name, kind.own_dtype):
            held[name].data = tensor
    if generation is not None:
        model.generation_config = copy.deepcopy(generation)
    return cast(ZooForCausalLM, model.eval())


def save(model: ZooForCausalLM, folder: Any, family_name: str | None = None) -> None:
    """Write a zoo model in a published format: the one it came from, or the first that can hold it.

    What is written is what the format's own implementation computes the same with. Raises ValueError that names what
    the format cannot hold.
    """
    kind, config = target_config(model.config, family_name)
    tensors = outward(Tensors.of("the model", model.state_dict()), kind, _skeleton(model.config.model_config))
    config.dtype = model.dtype
    with staged(folder) as work:
        config.save_pretrained(work)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(work)
        write(Path(work), tensors)


def convert(source: Any, target: Any, family_name: str | None = None) -> str:
    """Convert a checkpoint's folder (or hub id) into another one: a published one into a zoo checkpoint, a zoo
    checkpoint into a published one. Returns the model_type written.

    Weights stream: no more than one file's tensors are in memory. The tokenizer goes along.
    """
    folder = local_folder(source)
    if Path(target).resolve() == folder.resolve():
        raise ValueError(f"{target} is where the checkpoint is; convert to another folder")
    if is_adapter(folder):
        raise ValueError(f"{source} holds an adapter; make a whole model of it first with zoo convert merge")
    config, tensors = _config(folder), Tensors.stored(folder)
    made: PreTrainedConfig
    if isinstance(config, ZooConfig):
        kind, made = target_config(config, family_name)
        ways = outward(tensors, kind, _skeleton(config.model_config))
    else:
        if family_name is not None:
            raise ValueError(f"{source} is a published checkpoint and becomes a zoo one; leave the family out")
        kind = family(config.model_type)
        made = zoo_config(kind, config)
        ways = inward(tensors, kind, _skeleton(made.model_config))
    made.dtype = config.dtype
    generation = _generation(folder)
    with staged(target) as work:
        made.save_pretrained(work)
        if generation is not None:
            generation.save_pretrained(work)
        write(Path(work), ways)
        copy_tokenizer(folder, Path(work))
    return made.model_type


def operate(source: Any, target: Any, operation: Callable[[LanguageModel], LanguageModel]) -> None:
    """Load a checkpoint, apply an operation such as `upcycle`, and write the result as a zoo checkpoint.

    The tokenizer goes along, and what is known of a published original, so that a result that its format can hold can
    be converted back.
    """
    folder = local_folder(source)
    model = load(folder)
    made = operation(model.model)
    model.model, model.config.model = made, made.config.to_dict()
    model.save_pretrained(target)
    copy_tokenizer(folder, Path(target))


def zoo_config(kind: Family, config: PreTrainedConfig) -> ZooConfig:
    """The zoo's configuration for a published one, which it keeps for the way back."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("quantization_config: quantised weights cannot be converted; dequantise them first")
    original = {name: value for name, value in config.to_diff_dict().items() if name not in ABOUT_FILE}
    unknown = sorted(set(original) - set(kind.config_class().to_dict()) - set(kind.more))
    if unknown:
        warnings.warn(
            f"transformers' {kind.config_class.__name__} has no {', '.join(unknown)}, so no effect is converted",
            stacklevel=3,
        )
    tokens: dict[str, Any] = {name: getattr(config, name, None) for name in TOKENS}
    return ZooConfig(model=kind.read(config), published=original, architectures=["ZooForCausalLM"], **tokens)


def target_config(config: ZooConfig, family_name: str | None) -> tuple[Family, PreTrainedConfig]:
    """The family to write a zoo model in and its configuration there."""
    original: dict[str, Any] | None = config.published
    names = [family_name] if family_name else [original["model_type"]] if original else list(FAMILIES)
    reasons = []
    for name in names:
        kind = family(name)
        try:
            found = published_config(kind, config.model_config, original)
        except ValueError as error:
            reasons.append(str(error))
            continue
        found.architectures = [kind.architecture]
        if original is None or original["model_type"] != name:  # the class' own defaults are another model's
            for token in TOKENS:
                setattr(found, token, getattr(config, token, None))
        return kind, found
    raise ValueError("; ".join(reasons))


def local_folder(source: Any) -> Path:
    """The folder of a checkpoint on this disk; a hub id's is fetched, without pickles."""
    check_source(source)
    if Path(str(source)).is_dir():
        return Path(str(source))
    return Path(snapshot_download(str(source), allow_patterns=["*.safetensors", "*.json", *TOKENIZER]))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer that lie beside a checkpoint."""
    for name in TOKENIZER:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _config(folder: Path) -> PreTrainedConfig:
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said = told.get("model_type")
    if said is None:
        raise ValueError(_nameless(folder, told))
    if said != ZooConfig.model_type:
        family(said)  # before transformers would ask for code of the checkpoint's own
    try:
        return AutoConfig.from_pretrained(folder)
    except StrictDataclassError as error:
        raise ValueError(f"{folder / 'config.json'} is no configuration of {said!r}: {error}") from error


def _nameless(folder: Path, told: Mapping[str, Any]) -> str:
    """What to say of a configuration that names no model_type."""
    if "ssm_cfg" in told:
        return (
            f"{folder} holds a checkpoint of the library mamba_ssm, whose weights are pickled; take one in the format "
            "of transformers (state-spaces/mamba-130m-hf in the place of state-spaces/mamba-130m), or make one with "
            "convert_mamba_ssm_checkpoint_to_pytorch.py or convert_mamba2_ssm_checkpoint_to_pytorch.py of "
            "transformers 4"
        )
    return f"{folder / 'config.json'} names no model_type; these can be converted: {', '.join(FAMILIES)}"


def _generation(folder: Path) -> GenerationConfig | None:
    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").exists() else None


def _skeleton(config: ModelConfig) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(config)
