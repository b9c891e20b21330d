"""A model as data: `ModelConfig`, YAML files and presets.

    vocab_size: 256
    width: 512
    stack:
      - repeat: 3
        blocks:
          - {kind: mamba, state_size: 16}
          - swiglu                          # a kind alone takes its defaults
          - {kind: swiglu, residual: {skip: 1.0, scale: 0.2}}      # x ← skip · x + scale · f(norm(x))

Every mistake is one ValueError that names the key, the value and the remedy.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from zoo.layers.checks import number
from zoo.layers.norm import NORMS
from zoo.registry import block_class, nearest, options

# Raised by one when the data's meaning changes; a file of a newer version is refused, an older one is read.
VERSION = 1
PRESETS = Path(__file__).parent / "presets"
_CHOICES = {
    "norm": tuple(NORMS),
    "norm_position": ("pre", "post"),
    "objective": ("causal", "masked"),
}


class BlockSpec(NamedTuple):
    """One block of a flattened stack; `where` is its place in the data, for messages. The model adds `scale` times its
    output to `skip` times the stream."""

    kind: str
    options: dict[str, Any]
    where: str
    skip: float = 1.0
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A residual stack of blocks between an embedding and a head.

    Args:
        vocab_size: rows of the embedding and of the head.
        width: features of the residual stream.
        stack: blocks in order, each `{kind: ..., option: ...}`, a kind alone, or `{repeat: n, blocks: [...]}`. Beside a
            block's own options, `residual: {skip: α, scale: β}` makes its sum α · x + β · f(x) (DeepNet, 2203.00555;
            MiniMax-01, 2501.08313; Granite).
        norm: "rms", "rms_zero_centered" (scales by 1 + weight; Gemma, Qwen3-Next) or "layer", before (or after) each
            block and before the head.
        norm_eps: added under the norm's root; None is the norm's own default.
        norm_position: "pre": x + f(norm(x)), a last norm before the head; "post": norm(x + f(x)).
        embedding_norm: a norm right after the embedding (RWKV, BLOOM).
        embedding_scale: a factor on the embedding's rows (Gemma: the root of width).
        tied_embeddings: the head is the embedding's transpose.
        logit_scale: a factor on the logits (Granite, Cohere; muP, 2203.03466).
        logit_softcap: logits are softcap · tanh(logits / softcap), so below it in size (Gemma 2); None leaves them.
        objective: "causal" (next token) or "masked" (fill in; bidirectional blocks allowed).
        dropout: on each block's output, while training.
        init_std: standard deviation of the embedding and of an untied head at the start.
        version: of this format; set by the library.
    """

    vocab_size: int
    width: int
    stack: Sequence[Any]
    norm: Literal["rms", "rms_zero_centered", "layer"] = "rms"
    norm_eps: float | None = None
    norm_position: Literal["pre", "post"] = "pre"
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    tied_embeddings: bool = True
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    objective: Literal["causal", "masked"] = "causal"
    dropout: float = 0.0
    init_std: float = 0.02
    version: int = VERSION

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name}={value!r} is unknown{nearest(value, allowed)}; choose from {', '.join(allowed)}"
                )
        for name in ("embedding_norm", "tied_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false")
        if number("embedding_scale", self.embedding_scale) == 0:
            raise ValueError("embedding_scale=0 would make every token alike; 1 leaves the embedding as it is")
        if number("logit_scale", self.logit_scale) == 0:
            raise ValueError("logit_scale=0 would make every token as likely; 1 leaves the logits as they are")
        if self.logit_softcap is not None and number("logit_softcap", self.logit_softcap) <= 0:
            raise ValueError(f"logit_softcap={self.logit_softcap!r} must be positive, or null for logits without bound")
        if not 0 <= number("dropout", self.dropout) < 1:
            raise ValueError(f"dropout={self.dropout!r} must be in [0, 1)")
        if self.version not in range(1, VERSION + 1):
            raise ValueError(
                f"this configuration has version={self.version!r}, this library reads up to {VERSION}; "
                "pip install --upgrade efficient-zoo"
            )
        if isinstance(self.stack, str) or not isinstance(self.stack, Sequence):
            raise ValueError(
                f"stack={self.stack!r} must be a list of blocks such as [{{kind: mamba}}, {{kind: swiglu}}]"
            )
        object.__setattr__(self, "stack", copy.deepcopy(list(self.stack)))
        for spec in self.blocks():
            self._check_block(spec)

    def blocks(self) -> list[BlockSpec]:
        """The stack flattened: one entry a block, repeats written out."""
        found = _flatten(self.stack, "stack")
        if not found:
            raise ValueError("stack is empty; list at least one block, such as {kind: swiglu}")
        return found

    def _check_block(self, spec: BlockSpec) -> None:
        try:
            cls, known = block_class(spec.kind), options(spec.kind)
        except ValueError as error:
            raise ValueError(f"{spec.where}: {error}") from None
        for name in spec.options:
            if name not in known:
                raise ValueError(
                    f"{spec.where}: block kind {spec.kind!r} has no option {name!r}{nearest(name, known)}. "
                    f"Its options: {', '.join(known)}"
                )
        if self.objective == "causal" and not cls.causal:
            raise ValueError(
                f"{spec.where}: block kind {spec.kind!r} is bidirectional and would see the tokens that a causal "
                "model predicts; use objective: masked, or a causal block"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back; defaults included, so that a later default changes nothing."""
        return {field.name: copy.deepcopy(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Build from plain data. Raises ValueError for an unknown or a missing key, or a newer version."""
        if not isinstance(data, Mapping):
            raise ValueError(
                f"a model configuration is a mapping of keys to values, got {type(data).__name__}: {data!r}"
            )
        version = data.get("version", VERSION)
        if version not in range(1, VERSION + 1):  # first: a newer file's keys may be unknown here
            raise ValueError(
                f"this configuration has version={version!r}, this library reads up to {VERSION}; "
                "pip install --upgrade efficient-zoo"
            )
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in data:
            if name not in known:
                raise ValueError(
                    f"unknown key {name!r} in the model configuration{nearest(name, known)}. Keys: {', '.join(known)}"
                )
        missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in data]
        if missing:
            raise ValueError(
                f"the model configuration lacks {', '.join(missing)}; vocab_size, width and stack are needed"
            )
        return cls(**data)

    def to_yaml(self) -> str:
        """The configuration as a YAML file's text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _flatten(entries: Any, where: str) -> list[BlockSpec]:
    found: list[BlockSpec] = []
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise ValueError(f"{where}={entries!r} must be a list of blocks")
    for index, entry in enumerate(entries):
        here = f"{where}[{index}]"
        if isinstance(entry, str):
            entry = {"kind": entry}
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"{here}={entry!r} must be a block such as {{kind: mamba}} or {{repeat: 2, blocks: [...]}}"
            )
        if "kind" in entry:
            chosen = {name: copy.deepcopy(value) for name, value in entry.items() if name not in ("kind", "residual")}
            found.append(BlockSpec(entry["kind"], chosen, here, *_residual(entry.get("residual", {}), here)))
        elif "blocks" in entry:
            extra = set(entry) - {"repeat", "blocks"}
            if extra:
                raise ValueError(f"{here}: {sorted(extra)} cannot stand beside repeat and blocks")
            times = entry.get("repeat", 1)
            if not isinstance(times, int) or isinstance(times, bool) or times < 1:
                raise ValueError(f"{here}.repeat={times!r} must be a positive integer")
            inner = _flatten(entry["blocks"], f"{here}.blocks")
            for _ in range(times):
                found += [spec._replace(options=copy.deepcopy(spec.options)) for spec in inner]
        else:
            raise ValueError(
                f"{here}={dict(entry)!r} has neither kind nor blocks; "
                "write {kind: mamba} or {repeat: 2, blocks: [...]}"
            )
    return found


def _residual(given: Any, where: str) -> tuple[float, float]:
    """The two factors of a residual sum."""
    known = ("skip", "scale")
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}.residual={given!r} must be a mapping such as {{skip: 1.0, scale: 0.2}}")
    for name in given:
        if name not in known:
            raise ValueError(f"{where}.residual has no {name!r}{nearest(name, known)}; its keys: {', '.join(known)}")
    skip, scale = (number(f"{where}.residual.{name}", given.get(name, 1.0)) for name in known)
    if scale == 0:
        raise ValueError(f"{where}.residual.scale=0 would leave the block without effect; leave the block out")
    return skip, scale


def load_config(source: str | Path | Mapping[str, Any] | ModelConfig) -> ModelConfig:
    """A configuration from a preset's name, a YAML file, a mapping, or itself."""
    if isinstance(source, ModelConfig):
        return source
    if isinstance(source, Mapping):
        return ModelConfig.from_dict(source)
    path = Path(source)
    if not path.exists():
        if path.suffix not in (".yaml", ".yml") and path.name == str(source):
            return preset(str(source))
        raise FileNotFoundError(f"there is no configuration file {path}; presets have names: {', '.join(presets())}")
    return _read(path)


def _read(path: Path) -> ModelConfig:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    try:
        return ModelConfig.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def presets() -> tuple[str, ...]:
    """Names of the configurations that come with the library."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.yaml")))


def preset(name: str) -> ModelConfig:
    """The configuration of a published (or our own) model by its name."""
    if name not in presets():
        raise ValueError(f"unknown preset {name!r}{nearest(name, presets())}. Presets: {', '.join(presets())}")
    return _read(PRESETS / f"{name}.yaml")
