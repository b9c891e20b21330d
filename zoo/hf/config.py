"""`ZooConfig`: a `ModelConfig` as transformers stores it, with the library's version beside it."""

import os
from typing import Any, ClassVar

from packaging.version import InvalidVersion, Version
from transformers import PreTrainedConfig

from zoo import __version__
from zoo.config import ModelConfig, load_config

# The file beside each checkpoint that `trust_remote_code=True` runs where zoo was not imported. An import inside
# `try` is not looked up by transformers, which would advise `pip install zoo`, another project's name.
REMOTE_FILE = "modeling_zoo.py"
REMOTE_CODE = '''"""Loads this checkpoint's classes from the package efficient-zoo: `pip install efficient-zoo`."""

try:
    from zoo.hf import ZooConfig, ZooForCausalLM, ZooForMaskedLM
except ImportError as error:
    if (error.name or "").split(".")[0] != "zoo":
        raise
    raise ImportError("this checkpoint needs the package efficient-zoo: pip install efficient-zoo") from error

__all__ = ["ZooConfig", "ZooForCausalLM", "ZooForMaskedLM"]
'''


def _newer(written: str) -> bool:
    """Whether a checkpoint's version is of a later release than this library; patch releases read each other."""
    try:
        return Version(written).release[:2] > Version(__version__).release[:2]
    except InvalidVersion:
        raise ValueError(f"zoo_version={written!r} is no version; write the version of efficient-zoo") from None


class ZooConfig(PreTrainedConfig):
    """Configuration of a zoo language model: `ZooConfig(model=ModelConfig(...))`.

    Args:
        model: a `ModelConfig`, or what `load_config` takes (a mapping, a YAML file, a preset's name); kept as data.
        use_cache: whether inference returns a `ZooCache` unless told otherwise.
        skip_logits: whether a model in training mode that gets `labels` returns their loss and no logits, which then
            never exist all at once: less memory and time. A Trainer that reads logits while training needs False.
        published: the configuration of the published checkpoint that the model came from (see `zoo.convert`), if any.
        zoo_version: the version of efficient-zoo that wrote the file. Raises ValueError when it is newer than this one.

    `vocab_size`, `hidden_size`, `num_hidden_layers` and `tie_word_embeddings` read from `model`.
    """

    model_type: ClassVar[str] = "zoo"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values", "hidden_states", "aux"]

    model: Any = None
    use_cache: bool = True
    skip_logits: bool = False
    published: Any = None
    zoo_version: str = __version__

    def __post_init__(self, **kwargs: Any) -> None:
        if _newer(self.zoo_version):
            raise ValueError(
                f"this configuration was written by efficient-zoo {self.zoo_version}, this is efficient-zoo "
                f"{__version__}, which may not know what it says; pip install --upgrade efficient-zoo"
            )
        self.zoo_version = __version__
        if self.model is not None:
            self.model = load_config(self.model).to_dict()
            classes = {"causal": "CausalLM", "masked": "MaskedLM"}
            name = classes[self.model["objective"]]
            kwargs["auto_map"] = {
                "AutoConfig": f"{REMOTE_FILE[:-3]}.ZooConfig",
                f"AutoModelFor{name}": f"{REMOTE_FILE[:-3]}.ZooFor{name}",
            }
        super().__post_init__(**kwargs)

    @property
    def model_config(self) -> ModelConfig:
        """The `ModelConfig` itself. Raises ValueError where none was given."""
        if self.model is None:
            raise ValueError(
                "this ZooConfig describes no model; build it with ZooConfig(model=ModelConfig(...)) or a preset's name"
            )
        return ModelConfig.from_dict(self.model)

    @property
    def vocab_size(self) -> int | None:
        return self.model and self.model["vocab_size"]

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.model = self.model_config.to_dict() | {"vocab_size": int(value)}

    @property
    def hidden_size(self) -> int | None:
        return self.model and self.model["width"]

    @property
    def num_hidden_layers(self) -> int | None:
        return self.model and len(self.model_config.blocks())

    @property
    def tie_word_embeddings(self) -> bool:
        return bool(self.model and self.model["tied_embeddings"])

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.model = self.model_config.to_dict() | {"tied_embeddings": bool(value)}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json, and beside it the file that `trust_remote_code=True` runs."""
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; a configuration is saved to a folder")
        os.makedirs(save_directory, exist_ok=True)
        with open(os.path.join(save_directory, REMOTE_FILE), "w", encoding="utf-8") as file:
            file.write(REMOTE_CODE)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would copy this source file beside a checkpoint, ours writes its own small one."""
