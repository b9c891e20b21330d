"""`ZooCache`: every block's state as a transformers cache, whatever the blocks are.

It counts tokens itself: an all-recurrent transformers cache otherwise has no length, and one whose blocks have no
convolution counts as empty.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from inspect import signature
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from zoo import __version__
from zoo.block import State, leaves, map_state, state_bytes
from zoo.hf.history import History, Piece, document_after, join

if TYPE_CHECKING:
    from zoo.hf.causal import ZooForCausalLM

# Tokens a cache can go back when generate asks for it without saying how many: a draft is 20 tokens by default.
ROLLBACK = 32
# The name of a cache in what generate passes and keeps, which transformers 5.24 changed.
PREPARE: Any = vars(GenerationMixin)["prepare_inputs_for_generation"]
NAME = "cache" if "cache" in signature(PREPARE).parameters else "past_key_values"
# Raised when the files' meaning changes.
FORMAT = 1


class ZooLayer(LinearAttentionCacheLayerMixin):
    """One block's state. Alone it cannot go back; the cache as a whole does, with its snapshots."""

    # Its shapes may grow, and generate would build 4-D masks for it.
    is_compileable = False  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
    is_croppable = False  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    def __init__(self, state: State):
        super().__init__()
        self.state = state

    @property
    def batch_size(self) -> int:
        leaf = next(iter(leaves(self.state)), None)
        return -1 if leaf is None else leaf.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.state = map_state(function, self.state)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        self.update()

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a zoo block's state is one whole that the model itself writes; pass the cache to the model")

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        self.update()

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        self.update()

    def offload(self) -> None:
        self.map(lambda each: each.to("cpu", non_blocking=True))

    def reorder_cache(self, beam_idx: Int[Tensor, " rows"]) -> None:
        self.map(lambda each: each.index_select(0, beam_idx.to(each.device)))


class ZooCache(Cache):
    """The states of a `ZooForCausalLM` after the tokens it has seen; empty at first.

    Args:
        rollback: how far `crop` can go behind the longest the cache has been, in tokens; 0 keeps nothing for it and
            costs nothing. With n > 0 it holds up to two copies of the recurrent states and the last tokens (see
            `zoo.hf.history`). Assisted decoding turns it on by itself.

    A forward takes the cache over and updates it in place. `copy.deepcopy(cache)` keeps a prompt for several uses.
    """

    layers: list[ZooLayer]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, rollback: int = 0):
        super().__init__(layers=[])
        if not isinstance(rollback, int) or rollback < 0:
            raise ValueError(f"rollback={rollback!r} must be a number of tokens, 0 for none")
        self.length = 0
        self.document: Tensor | None = None  # each row's document (None: 1), until there is a history that knows
        self.history: History | None = None
        self.configuration: dict[str, Any] | None = None  # of the model whose states these are
        if rollback:
            self.activate_past_recording(rollback)

    def __repr__(self) -> str:
        return f"ZooCache({self.length} tokens, {self.bytes()} bytes, rollback={self.rollback})"

    # What a forward uses --------------------------------------------------------------------------------------

    @property
    def states(self) -> tuple[State, ...]:
        return tuple(layer.state for layer in self.layers)

    @states.setter
    def states(self, values: tuple[State, ...]) -> None:
        if len(self.layers) == len(values):
            for layer, each in zip(self.layers, values, strict=True):
                layer.state = each
        else:
            self.layers[:] = [ZooLayer(each) for each in values]

    @property
    def rollback(self) -> int:
        return 0 if self.history is None else self.history.bound

    def current_document(self) -> Tensor | None:
        """The document each row is in; None where that is known to be 1 in every row."""
        return self.document if self.history is None else self.history.document_at(self.length)

    def begin(self, configuration: dict[str, Any], piece: Piece) -> None:
        """Check that this cache fits a model and its input. Raises ValueError."""
        if self.configuration is None:
            self.configuration = configuration
        elif self.configuration is not configuration and self.configuration != configuration:
            raise ValueError(
                "this cache holds the states of a model with another configuration; start from a new ZooCache"
            )
        batch = piece.inputs.shape[0]
        if self.batch_size not in (-1, batch):
            raise ValueError(
                f"the cache holds {self.batch_size} sequences and the input {batch}; "
                "start from a new ZooCache, or select its rows with batch_select_indices"
            )

    def feed(self, piece: Piece, embed: Callable[[Tensor], Tensor]) -> Iterator[tuple[Piece, int]]:
        """Yield what to run for `piece` and how many outputs to drop at its front. The caller sets `states` after
        each part; more than one part comes only while `rollback` is on."""
        new = self.length
        if self.history is None:
            yield piece, 0
            self.document = document_after(self.document, piece.segments)
        else:
            here = self.history.live
            for pieces in self.history.feed(piece, lambda: self.states):
                part = join(pieces, embed)
                yield part, min(max(new - here, 0), part.length)
                here += part.length
        self.length += piece.length

    # What generate uses ---------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included: the columns of the attention mask so far."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.length > 0

    @property
    def is_croppable(self) -> bool:
        return self.history is not None

    @property
    def is_linear(self) -> list[bool]:
        """Of no layer: generate would take these for layers that know no length, and pass cached tokens again."""
        return [False] * max(1, len(self.layers))

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before the first token (and for a stack without any state)."""
        return next((each.batch_size for each in self.layers if each.batch_size != -1), -1)

    def activate_past_recording(self, rollback: int = ROLLBACK) -> None:
        """Be ready to go back `rollback` tokens from here on."""
        if self.history is None:
            self.history = History(rollback, self.length, self.document)
        self.history.bound = max(self.history.bound, rollback)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the last `-tokens_to_remove` tokens; a positive number is the length to keep.

        Raises ValueError when that is further back than the cache can go.
        """
        tokens_to_remove = int(tokens_to_remove)  # some releases of transformers pass a tensor
        length = tokens_to_remove if tokens_to_remove > 0 else self.length + tokens_to_remove
        if length < 0:
            raise ValueError(f"cannot remove {-tokens_to_remove} tokens from a cache of {self.length}")
        if length >= self.length:
            return
        if length == 0:
            self.reset()
            return
        if self.history is None:
            raise ValueError(
                f"cannot go back from {self.length} tokens to {length}: this cache keeps nothing to go back with; "
                f"use ZooCache(rollback={self.length - length}) or larger"
            )
        states = self.history.back_to(length)
        if states is not None:
            self.states = states
        self.length = length

    def reset(self) -> None:
        """Forget everything; the rollback bound stays."""
        self.layers.clear()
        self.length, self.document, self.configuration = 0, None, None
        if self.history is not None:
            self.history = History(self.history.bound, 0, None)

    # Rows and devices -----------------------------------------------------------------------------------------

    def map(self, function: Callable[[Tensor], Tensor]) -> "ZooCache":
        """Apply `function` to every tensor held (batch first in each)."""
        for layer in self.layers:
            layer.map(function)
        self.document = None if self.document is None else function(self.document)
        if self.history is not None:
            self.history.map(function)
        return self

    def reorder_cache(self, beam_idx: Int[Tensor, " rows"]) -> None:
        self.map(lambda each: each.index_select(0, beam_idx.to(each.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map(lambda each: each[indices.to(each.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda each: each.repeat_interleave(repeats, 0))

    def to(self, device: Any, non_blocking: bool = False) -> "ZooCache":
        return self.map(lambda each: each.to(device, non_blocking=non_blocking))

    def bytes(self) -> int:
        """Bytes of the blocks' states; the copies kept for `rollback` are not counted."""
        return sum(state_bytes(each) for each in self.states)

    # Files ----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to a safetensors file that `load` reads in any process with the same model.

        What was kept for `rollback` is not written. A failed write (a full disk) leaves an older file as it was.
        """
        tensors = {f"state.{i}.{j}": leaf for i, s in enumerate(self.states) for j, leaf in enumerate(leaves(s))}
        live, document, pending = self.length, self.document, []
        if self.history is not None:
            live, document = self.history.live, self.history.document_at(self.history.live)
            pending = self.history.between(live, self.length)
        for index, piece in enumerate(pending):
            tensors |= {f"pending.{index}.{n}": t for n, t in piece._asdict().items() if t is not None}
        if document is not None:
            tensors["document"] = document
        about = {
            "format": FORMAT,
            "zoo_version": __version__,
            "model": fingerprint(self.configuration),
            "blocks": len(self.layers),
            "live": live,
            "pending": len(pending),
            "rollback": self.rollback,
        }
        staged = f"{os.fspath(path)}.{os.getpid()}.part"
        try:
            # Clones: views of a larger storage (spare capacity) would be written whole, or refused.
            whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
            save_file(whole, staged, {"zoo": json.dumps(about)})
            os.replace(staged, path)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"could not write {path}: {error}; an older file there is unchanged. "
                "Free space, or choose another folder"
            ) from error
        finally:
            if os.path.exists(staged):
                os.remove(staged)

    @classmethod
    def load(cls, path: str | os.PathLike, model: "ZooForCausalLM") -> "ZooCache":
        """Read a cache that `save` wrote for this model, onto the model's device.

        Raises FileNotFoundError, or ValueError for a damaged file, a file of something else or of another model.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no cache file {path}")
        try:
            with safe_open(path, framework="pt", device=str(model.device)) as file:
                about = json.loads((file.metadata() or {}).get("zoo", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or only partly written ({error}); save the cache again") from error
        if "format" not in about:
            raise ValueError(
                f"{path} is a safetensors file, but holds no ZooCache; pass a file that ZooCache.save wrote"
            )
        if about["format"] > FORMAT:
            raise ValueError(
                f"{path} was written by efficient-zoo {about['zoo_version']}, this is {__version__}; "
                "pip install --upgrade efficient-zoo"
            )
        if about["blocks"] and about["model"] != fingerprint(model.config.model):
            raise ValueError(
                f"{path} holds the states of a model with another configuration; load the model it was saved with"
            )
        return cls()._restore(about, tensors, model)

    def _restore(self, about: dict[str, Any], tensors: dict[str, Tensor], model: "ZooForCausalLM") -> "ZooCache":
        if about["blocks"]:
            # On meta: only the structure of each block's state is wanted.
            shells = model.model.init_state(1, device="meta")
            values = [iter([tensors[f"state.{i}.{j}"] for j in range(len(leaves(s)))]) for i, s in enumerate(shells)]
            self.configuration = model.config.model
            self.states = tuple(map_state(lambda _, v=v: next(v), s) for s, v in zip(shells, values, strict=True))
        self.length, self.document = about["live"], tensors.get("document")
        if about["rollback"]:
            self.activate_past_recording(about["rollback"])
        for index in range(about["pending"]):
            assert self.history is not None
            piece = Piece(*(tensors.get(f"pending.{index}.{name}") for name in Piece._fields))
            self.history.pieces.append(piece)
            self.history.length += piece.length
            self.length += piece.length
        return self


def one_of(cache: Any, past_key_values: Any) -> Any:
    """The cache given by either name. Raises ValueError for both."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one thing; pass one of them")
    return past_key_values if cache is None else cache


def fingerprint(configuration: dict[str, Any] | None) -> str:
    """Of a model's configuration: caches of one configuration have one structure."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()
