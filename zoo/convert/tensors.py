"""Tensors on their way from one format to another, a few at a time: where they are read, renamed and written."""

import fnmatch
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zoo.convert.family import Entry, Family
from zoo.hf.checkpoint import damaged, refuse_pickle
from zoo.model import LanguageModel

SHARD = 5_000_000_000  # bytes of a file, as transformers' own
OURS = "model."  # before every name of a LanguageModel within a ZooForCausalLM
INDEX = "model.safetensors.index.json"


class Tensors:
    """Named tensors that are read one at a time: `names`, and `read(name)`."""

    def __init__(self, where: str, names: Iterable[str], read: Callable[[str], Tensor]):
        self.where, self.names, self.read = where, set(names), read

    @classmethod
    def of(cls, where: str, held: Mapping[str, Tensor]) -> "Tensors":
        """Those of a state dict."""
        return cls(where, held, held.__getitem__)

    @classmethod
    def stored(cls, folder: Path) -> "Tensors":
        """Those in a folder's safetensors files, mapped into memory when read.

        Raises ValueError for pickles alone, a damaged file, and a file that the index names and is not there.
        """
        refuse_pickle(folder, {})
        index, listed = folder / INDEX, dict[str, str]()
        if index.exists():
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(listed.values()))
            absent = [each for each in files if not (folder / each).exists()]
            if absent:
                raise ValueError(f"{folder} lacks {', '.join(absent)}, which {INDEX} names; copy the checkpoint again")
        else:
            files = sorted(each.name for each in folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"the folder {folder} holds no safetensors files")
        places: dict[str, str] = {}

        @lru_cache(maxsize=1)  # what is read stays mapped while its file is open
        def opened(file: str) -> Any:
            return safe_open(folder / file, framework="pt")

        try:
            for each in files:
                for name in opened(each).keys():  # noqa: SIM118, not a dict
                    if name in places:
                        raise ValueError(f"{folder} holds {name} in two files; keep one of {', '.join(files)}")
                    places[name] = each
        except SafetensorError as error:
            raise damaged(folder, error) from error
        if lost := sorted(set(listed) - set(places)):
            raise ValueError(f"{folder} lacks {_some(lost)}, which {INDEX} names; copy the checkpoint again")
        return cls(str(folder), places, lambda name: opened(places[name]).get_tensor(name))

    def spelled(self, spelling: Callable[[str], str]) -> "Tensors":
        """The same by other names. Raises ValueError where two tensors have one."""
        places: dict[str, str] = {}
        for name in sorted(self.names):
            other = places.setdefault(spelling(name), name)
            if other != name:
                raise ValueError(f"{self.where} holds {other} and {name}, which are names of one tensor; keep one")
        return Tensors(self.where, places, lambda name: self.read(places[name]))


def inward(source: Tensors, family: Family, model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Published tensors as those of a `ZooForCausalLM` of this model (on the meta device), one at a time.

    Raises ValueError that names tensors which are missing, not expected, or of another shape than the model's.
    """
    entries, wanted = table(family, model)
    source = source.spelled(family.spelling)
    theirs = {name for entry in entries for name in entry.theirs}
    tied = model.config.tied_embeddings and family.head in source.names
    if tied:
        theirs.add(family.head)
    _check_names(source, theirs, family)
    if tied and not torch.equal(source.read(family.head), source.read(family.embedding)):
        raise ValueError(
            f"{source.where}: the configuration ties head and embedding, but {family.head} is not "
            f"{family.embedding}; set tie_word_embeddings to false in config.json, or leave {family.head} out"
        )
    for entry in entries:
        parts = [source.read(name) for name in entry.theirs]
        for name, part, model_of in zip(entry.theirs, parts, entry.split(wanted[entry.ours]), strict=True):
            _check(source.where, name, part, model_of)
        if len({part.dtype for part in parts}) > 1:
            raise ValueError(f"{source.where}: {', '.join(entry.theirs)} have different dtypes; store them alike")
        yield OURS + entry.ours, entry.join(parts)


def outward(source: Tensors, family: Family, model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a `ZooForCausalLM` in the family's format, one entry at a time. Errors as of `inward`."""
    entries, wanted = table(family, model)
    ours = {OURS + entry.ours for entry in entries}
    if model.config.tied_embeddings and f"{OURS}head.weight" in source.names:
        ours.add(f"{OURS}head.weight")  # the embedding under its second name
    _check_names(source, ours, None)
    for entry in entries:
        whole = source.read(OURS + entry.ours)
        _check(source.where, OURS + entry.ours, whole, wanted[entry.ours])
        for name, part in zip(entry.theirs, entry.split(whole), strict=True):
            yield name, part.detach().clone(memory_format=torch.contiguous_format)  # files hold no views


def table(family: Family, model: LanguageModel) -> tuple[list[Entry], dict[str, Tensor]]:
    """The family's entries for a model and the model's tensors; each of them has one entry."""
    wanted = dict(model.state_dict())
    if model.config.tied_embeddings:
        del wanted["head.weight"]
    entries = family.names(model)
    assert sorted(entry.ours for entry in entries) == sorted(wanted), "the table of names does not fit the model"
    return entries, wanted


def write(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int = SHARD) -> None:
    """Write tensors to safetensors files of up to `limit` bytes (a single tensor may be larger), holding no more than
    one file's. Several files get an index beside them, named as transformers names them."""
    places: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    size = total = count = 0

    def flush() -> None:
        nonlocal shard, size, count
        count += 1
        save_file(shard, folder / f"{count}.part", metadata={"format": "pt"})
        shard, size = {}, 0

    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if shard and size + bytes_ > limit:
            flush()
        shard[name], places[name] = tensor.cpu(), count
        size, total = size + bytes_, total + bytes_
    flush()
    names = [f"model-{each + 1:05d}-of-{count:05d}.safetensors" for each in range(count)]
    names = ["model.safetensors"] if count == 1 else names
    for each, name in enumerate(names):
        (folder / f"{each + 1}.part").rename(folder / name)
    if count > 1:
        weight_map = {name: names[place] for name, place in places.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _check_names(source: Tensors, wanted: set[str], family: Family | None) -> None:
    """Raise ValueError for names that are missing or not expected, warn of those that a family leaves out."""
    missing = sorted(wanted - source.names)
    if missing:
        raise ValueError(f"{source.where} lacks {_some(missing)}, which its configuration needs")
    patterns, beside = ((), ()) if family is None else (family.derived, family.beside)
    extra = sorted(name for name in source.names - wanted if not matches(name, patterns))
    left_out = [name for name in extra if matches(name, beside)]
    if left_out:
        warnings.warn(
            f"{source.where} holds {_some(left_out)}, which the model does not compute with; they are left out, here "
            "and on the way back",
            stacklevel=2,
        )
    extra = [name for name in extra if not matches(name, beside)]
    if extra:
        raise ValueError(
            f"{source.where} holds {_some(extra)}, which its configuration does not tell of; nothing is left out in "
            "silence: remove them, or correct config.json"
        )


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns fits."""
    return any(fnmatch.fnmatchcase(name, each) for each in patterns)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _check(where: str, name: str, found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape:
        raise ValueError(
            f"{where}: {name} has shape {tuple(found.shape)}, its configuration says {tuple(wanted.shape)}"
        )
    if not found.is_floating_point() or found.element_size() < 2:
        raise ValueError(f"{where}: {name} is of {found.dtype}; quantised weights cannot be converted, dequantise them")
