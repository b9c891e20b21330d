"""What a family of published models is: one table of tensors' names and one mapping of configurations, both ways."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from zoo.config import ModelConfig
from zoo.layers.norm import norm
from zoo.layers.position import SCALINGS, Rotary
from zoo.model import LanguageModel
from zoo.registry import options


class Entry(NamedTuple):
    """A tensor of ours and the published ones that it is made of. `split` is the inverse of `join`."""

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


def same(ours: str, theirs: str) -> Entry:
    """One tensor under two names."""
    return Entry(ours, (theirs,), lambda parts: parts[0], lambda whole: [whole])


def stacked(ours: str, theirs: Sequence[str], rows: Sequence[int]) -> Entry:
    """Ours holds theirs below one another, each of so many rows."""
    return Entry(ours, tuple(theirs), lambda parts: torch.cat(list(parts)), lambda whole: whole.split(list(rows)))


def taps(ours: str, theirs: str) -> Entry:
    """A depthwise convolution's taps [channels, taps]; theirs have an axis of one input channel between them."""
    return Entry(ours, (theirs,), lambda parts: parts[0].squeeze(1), lambda whole: [whole.unsqueeze(1)])


class Family(NamedTuple):
    """A published format.

    - `read(config)` is the `ModelConfig` of a transformers configuration; it raises ValueError that names an option
      that has no counterpart.
    - `write(config)` gives the configuration's fields for a `ModelConfig`. It need not check whether they say all:
      `published_config` does, by reading them back.
    - `names(model)` lists every tensor of a model (one on the meta device) but a tied head.
    - `derived`: patterns of published tensors' names that hold nothing but what the configuration says.
    - `beside`: patterns of names of tensors that published files hold and the model does not compute with (heads for
      speculative decoding). They are left out with a warning that names them.
    - `spelling(name)`: the published name of a tensor which some files name otherwise.
    - `own_dtype`: patterns of our tensors' names that keep their dtype where files hold them in another one than the
      rest. (A router's bias is in float32 in every model.)
    - `weights(model)`: the tensors of transformers' model, as if it had not computed yet.
    """

    config_class: type[PreTrainedConfig]
    architecture: str
    read: Callable[[Any], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    names: Callable[[LanguageModel], list[Entry]]
    embedding: str
    head: str
    derived: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    spelling: Callable[[str], str] = str
    own_dtype: tuple[str, ...] = ()
    more: tuple[str, ...] = ()  # what files hold though the class does not declare it, and `read` reads or knows
    weights: Callable[[PreTrainedModel], Mapping[str, Tensor]] = PreTrainedModel.state_dict

    @property
    def model_type(self) -> str:
        return self.config_class.model_type


def published_config(family: Family, config: ModelConfig, original: Mapping[str, Any] | None) -> PreTrainedConfig:
    """The family's configuration of a model: `original`, which it came with, where that still describes it.

    Raises ValueError that names what the format cannot say.
    """
    wanted = spelled_out(config)
    kept = {} if original is None or original.get("model_type") != family.model_type else dict(original)
    kept.pop("model_type", None)
    if kept:
        found = family.config_class(**kept)
        if spelled_out(family.read(found)) == wanted:
            return found
    try:
        found = family.config_class(**kept | family.write(config))
        said = spelled_out(family.read(found))
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"the format {family.model_type!r} cannot hold this model: {error}") from error
    for name in wanted | said:
        if wanted.get(name) != said.get(name):
            raise ValueError(
                f"the format {family.model_type!r} cannot hold this model: {name}={wanted.get(name)!r} would become "
                f"{said.get(name)!r}"
            )
    return found


def spelled_out(config: ModelConfig) -> dict[str, Any]:
    """All that a configuration says, flat and with every default written out, so that equal models are equal."""
    with torch.device("meta"):
        model = LanguageModel(config)
    said = {name: value for name, value in config.to_dict().items() if name not in ("stack", "version")}
    if said["norm_eps"] is None:
        said["norm_eps"] = vars(norm(config.norm, config.width))["eps"]
    for index, (spec, residual) in enumerate(zip(config.blocks(), model.residuals, strict=True)):
        said |= _block(f"blocks[{index}]", spec.kind, spec.options, residual.block)
        said[f"blocks[{index}].residual"] = {"skip": spec.skip, "scale": spec.scale}
    return said


def _block(where: str, kind: str, given: Mapping[str, Any], block: Any) -> dict[str, Any]:
    """What a block's options say, and those of the blocks inside it."""
    said: dict[str, Any] = {f"{where}.kind": kind}
    for option, parameter in options(kind).items():
        value = given.get(option, parameter.default)
        if option in ("layer", "layers") and option not in given:  # the model counted
            value = getattr(block, option, value)
        if kind == "parallel" and option == "blocks":
            for index, ((inner, chosen), part) in enumerate(zip(block.specs, block.parts, strict=True)):
                said |= _block(f"{where}.blocks[{index}]", inner, chosen, part)
            continue
        built = getattr(block, option, None)
        if option == "hidden" and kind == "moe":
            built = block.experts.hidden
        if value is None and isinstance(built, int | float):  # a size that the block chose
            value = built
        if kind == "moe" and option in ("router", "expert"):
            value = _part(value, block.router if option == "router" else block.experts)
        value = list(value) if isinstance(value, tuple) else value  # as a file gives it back
        said[f"{where}.{option}"] = _position(value) if option == "position" else value
    return said


def _part(spec: Any, built: Any) -> Any:
    """A router or experts, named by a spec, with their defaults, and what they chose in the place of None."""
    if not isinstance(spec, str | Mapping):
        return spec
    given = dict(spec) if isinstance(spec, Mapping) else {"kind": spec}
    known = inspect.signature(type(built)).parameters.values()
    full = {each.name: each.default for each in known if each.kind is each.KEYWORD_ONLY} | given
    return {name: getattr(built, name, None) if value is None else value for name, value in full.items()}


def _position(position: Any) -> Any:
    """A position with its defaults."""
    if not isinstance(position, Mapping):
        return position
    if position["kind"] == "alibi":
        return {"multiplier": 1.0} | dict(position)
    known = inspect.signature(Rotary).parameters
    full = {name: each.default for name, each in known.items() if name != "head_dim"} | dict(position)
    if full["scaling"] is not None:
        chosen = list(inspect.signature(SCALINGS[full["scaling"]["kind"]]).parameters.values())[3:]
        full["scaling"] = {each.name: each.default for each in chosen} | dict(full["scaling"])
    return full
