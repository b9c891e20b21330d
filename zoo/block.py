"""The contract every block obeys: `Block`, `Out`, states, `segments`.

Shape vocabulary: batch, time, width (model), heads, kv_heads, channels (inner width), state_size, experts.
A `State` is a NamedTuple of tensors, batch first in every leaf (nested NamedTuples allowed), so selecting,
reordering, repeating, moving, saving and counting states are one generic function each, below.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ops import segments as seg
from ops.step import BARE, Around
from zoo.kept import Kept

State = Any  # a NamedTuple of tensors; Python has no type for "any NamedTuple"


class Out(NamedTuple):
    """What a block returns. `state` is None exactly when None was given; `aux` holds named tensors:
    "loss/<name>" is added to the training loss as it is, "stat/<name>" is a statistic to log, "sum/<name>" (detached,
    in training mode alone) is added up for `Block.after_step`. A composite names its parts' entries "<path>/<entry>",
    with the path of the part in it."""

    y: Float[Tensor, "batch time width"]
    state: State | None
    aux: Mapping[str, Tensor]


Step = Callable[[Tensor, State | None], Out | None]


class NoState(NamedTuple):
    """The state of a block without one, so that every block of a model takes and returns a state alike."""


STATELESS = (type(None), NoState)  # the types of what such a block is given


class Tag(NamedTuple):
    """What an optimizer must know of a parameter; see `tag`."""

    weight_decay: bool = True
    learning_rate: float | None = None  # an own rate for this parameter; None: the optimizer's


class Block(nn.Module):
    """A map from [batch, time, width] to the same shape, that can continue from a state.

    One `forward` for any number of tokens: a whole sequence, a chunk that continues `state`, or one token.
    `segments` (0 padding, equal ids one document) says who may see whom: a token's output depends on earlier
    tokens of its own document alone and padding changes no state. With `segments=None` every token belongs to
    the document the state is in. Passing a state hands it over: the block may reuse its storage.
    """

    causal: ClassVar[bool] = True
    # False: a composite block, which owns its layers with their norms and residuals; a model places it bare.
    residual: ClassVar[bool] = True
    width: int
    # The class of the states that init_state makes and their leaves' shapes a row; found when first asked for.
    _state_made: tuple[type, list[tuple[int, ...]]] | None = None
    _held_step: Kept | None = None  # what bind_step gave

    def __init__(self, width: int):
        super().__init__()
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ValueError(f"width={width!r} must be a positive integer")
        self.width = width

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls) and "bind_step" not in vars(cls):
            cls.bind_step = Block.bind_step  # what was inherited does what the old forward does

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: State | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def bind_step(self, around: Around) -> Step | None:
        """A function of one token and the state that runs all of this block, with the norm before it and the residual
        around it, in one compiled call on a CPU (`ops.step`), bound to the block's weights as they are now. None where
        the weights, or what stands in the block, have to go the usual way, which is what blocks without such a kernel
        say; the function gives None where a call has to."""
        return None

    def one_token(self, x: Float[Tensor, "batch one width"], state: State | None) -> Out | None:
        """One token, none of padding, by `bind_step`; None where it has to go the usual way."""
        if type(self).bind_step is Block.bind_step or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        kept = self._held_step
        if kept is None or not kept.holds():
            kept = self._held_step = Kept((self,), self.bind_step(BARE))
        return None if kept.made is None else kept.made(x, state)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._held_step = None  # would keep the old weights' memory
        return super()._apply(fn, recurse)

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        """The state before the first token. `dtype` is the activations'; recurrent sums are float32 at least."""
        return NoState()

    def state_bytes(self, tokens: int, *, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of state that one row holds after `tokens` tokens. The default is right for constant states."""
        return state_bytes(self.init_state(1, device="meta", dtype=dtype))

    def after_step(self, step: int, sums: Mapping[str, Tensor]) -> None:
        """What a block does once after each optimizer step: move a schedule on, correct what no gradient reaches.

        `sums` holds the entries "sum/<name>" of this block's aux, under the same names, added up over all micro-batches
        and ranks of that step. They come out of `forward` like any output, so activations computed again in the
        backward pass count nothing twice. `step`: optimizer steps done so far in the run. A saved model that is
        trained further is in another run: a schedule that shall go on counts its own steps in a buffer.

        By default a block hands their sums on to the blocks inside it, and does nothing itself.
        """
        hand_back(_inside(self), step, sums)

    @property
    def refusal(self) -> str | None:
        """Why no causal model takes this block, as the end of a sentence; None where it may stand in one."""
        if self.causal:
            return None
        return (
            "is bidirectional and would see the tokens a causal model predicts; use objective: masked, or its causal "
            "form"
        )

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs for one more token after `context` tokens (a multiply-add is 2).
        The default counts every matrix once; blocks whose work depends on the context or on routing add theirs."""
        return sum(2 * p.numel() for p in self.parameters() if p.ndim >= 2)

    def check(self, x: Tensor, state: State | None, segments: Tensor | None) -> None:
        """Raise a clear error for inputs of the wrong shape, type or place."""
        name = type(self).__name__
        if x.ndim != 3:
            raise ValueError(f"{name} takes [batch, time, width], got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} takes floating point inputs, got {x.dtype}; convert with .float()")
        if x.shape[-1] != self.width:
            raise ValueError(f"{name} was built for width={self.width}, got an input of width {x.shape[-1]}")
        if x.shape[1] == 0:
            raise ValueError(f"{name} got an empty sequence (time=0); pass at least one token")
        if segments is not None:
            seg.check(segments, x.shape[0], x.shape[1])
        if state is not None:
            if not self.causal:
                raise ValueError(f"{name} is bidirectional and takes no state; call it on the whole sequence")
            self._check_state(state, x.shape[0])

    def _check_state(self, state: State, batch: int) -> None:
        """Refuse the state of another block, another size or another batch: it may fit by chance and give nonsense."""
        name = type(self).__name__
        if torch.compiler.is_compiling():  # a graph checks shapes by guards and must not break here
            return
        if self._state_made is None:
            made = self.init_state(1, device="meta")
            self._state_made = type(made), [tuple(leaf.shape[1:]) for leaf in leaves(made)]
        kind, shapes = self._state_made
        if type(state) is not kind:
            raise ValueError(
                f"{name} takes the {kind.__name__} that its init_state makes, got {type(state).__name__}; "
                "pass the state that this block returned"
            )
        for number, (leaf, shape) in enumerate(zip(leaves(state), shapes, strict=True)):
            rows, *found = leaf.shape
            # A size of 0 is one that grows (keys and values): any will do there.
            if len(found) != len(shape) or any(w not in (0, f) for f, w in zip(found, shape, strict=True)):
                raise ValueError(
                    f"{name} got a {kind.__name__} of other sizes: its leaf {number} holds {tuple(found)} a row, "
                    f"this block's {shape}; pass the state of a block of the same options"
                )
            if rows != batch:
                raise ValueError(f"{name} got a state for batch={rows} and an input of batch={batch}")


# Sums over an optimizer step -----------------------------------------------------------------------------------


def add_sums(total: dict[str, Tensor], aux: Mapping[str, Tensor]) -> None:
    """Add the sums among a forward's aux to `total`, which holds those of the micro-batches before it."""
    for name, value in aux.items():
        if is_sum(name):
            total[name] = total[name] + value if name in total else value


def is_sum(name: str) -> bool:
    """Whether an entry of aux, its path before it or not, is a sum."""
    return "/sum/" in f"/{name}"


def hand_back(blocks: Iterable[tuple[str, Block]], step: int, sums: Mapping[str, Tensor]) -> None:
    """Call `after_step` of each block with the entries of `sums` that bear its path. Blocks without any are called
    too: a schedule needs the step alone."""
    for path, block in blocks:
        begin = f"{path}/"
        own = {name.removeprefix(begin): value for name, value in sums.items() if name.startswith(begin)}
        block.after_step(step, own)


def _inside(module: nn.Module) -> Iterator[tuple[str, Block]]:
    """The blocks in a module with their paths, but not the blocks in those."""
    for name, child in module.named_children():
        if isinstance(child, Block):
            yield name, child
        else:
            yield from ((f"{name}.{path}", block) for path, block in _inside(child))


# Parameters' tags ---------------------------------------------------------------------------------------------


def tag(module: nn.Module, name: str, *, weight_decay: bool = True, learning_rate: float | None = None) -> None:
    """Tell the optimizer about the parameter `name` of `module`. Kept on the module, so that it outlives copies
    and sharding, which replace the parameter itself."""
    module.__dict__.setdefault("_parameter_tags", {})[name] = Tag(weight_decay, learning_rate)


def tags(model: nn.Module) -> dict[str, Tag]:
    """Every tagged parameter of a model by its full name."""
    found: dict[str, Tag] = {}
    for prefix, module in model.named_modules():
        for name, each in module.__dict__.get("_parameter_tags", {}).items():
            found[f"{prefix}.{name}" if prefix else name] = each
    return found


# States: one generic function for each thing done to them ------------------------------------------------------


def leaves(state: State) -> list[Tensor]:
    """The tensors of a state, depth first."""
    if isinstance(state, Tensor):
        return [state]
    return [leaf for each in state for leaf in leaves(each)]


def map_state(function: Callable[..., Tensor], state: State, *others: State) -> State:
    """Apply `function` to every leaf (and to the leaves at the same place of `others`)."""
    if isinstance(state, Tensor):
        return function(state, *others)
    parts = [map_state(function, *each) for each in zip(state, *others, strict=True)]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def select(state: State, index: Int[Tensor, " rows"]) -> State:
    """Rows of a state: a subset, a new order, or repeats (beams). Copies."""
    return map_state(lambda leaf: leaf.index_select(0, index.to(leaf.device)), state)


def repeat(state: State, times: int) -> State:
    """Each row `times` times, next to one another."""
    return map_state(lambda leaf: leaf.repeat_interleave(times, 0), state)


def move(state: State, device: Any) -> State:
    return map_state(lambda leaf: leaf.to(device), state)


def detach(state: State) -> State:
    """Cut the gradient, as truncated backpropagation through time does between chunks."""
    return map_state(lambda leaf: leaf.detach(), state)


def snapshot(state: State) -> State:
    """A state to come back to. Leaves are copied, except in a state class that says `APPEND_ONLY = True`: it only
    ever writes behind its leaves' ends, so the leaves themselves stay as they are."""
    if isinstance(state, Tensor):
        return state.clone()
    if getattr(state, "APPEND_ONLY", False):
        return state
    parts = [snapshot(each) for each in state]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def state_bytes(state: State) -> int:
    """Bytes in a state's leaves (spare capacity behind them is not counted)."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))


def enter(state: State, initial: State, segments: Int[Tensor, "batch time"] | None) -> State:
    """Reset the rows of a recurrent `state` (it has a leaf `segment: [batch]`) whose call begins another document.

    `initial` is the block's `init_state`. A row with `segment == 0` has seen nothing and is left as given, so a
    learned initial state survives. Without segments the document goes on.
    """
    if segments is None:
        return state
    now = seg.first(segments)
    fresh = (state.segment != 0) & (now != 0) & (now != state.segment)

    def reset(leaf: Tensor, start: Tensor) -> Tensor:
        return torch.where(fresh.reshape(-1, *[1] * (leaf.ndim - 1)), start, leaf)

    return map_state(reset, state, initial)


def leave(segment: Int[Tensor, " batch"], segments: Int[Tensor, "batch time"] | None) -> Int[Tensor, " batch"]:
    """The document a state is in after a call: the last valid token's; without segments the same (a new one is 1)."""
    if segments is None:
        return torch.where(segment == 0, 1, segment)
    now = seg.last(segments).to(segment.dtype)
    return torch.where(now != 0, now, segment)


def stay(segment: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """`leave` without segments, for a few rows on a CPU: the same tensor where every row is in a document."""
    return leave(segment, None) if 0 in segment.tolist() else segment


# Packing: for blocks that cannot run a ragged or packed batch directly -----------------------------------------


def each_document(
    run: Callable[[Float[Tensor, "rows longest width"], Int[Tensor, "rows longest"]], Tensor],
    x: Float[Tensor, "batch time width"],
    segments: Int[Tensor, "batch time"],
) -> Float[Tensor, "batch time width"]:
    """Run every document of a packed batch in a row of its own, and put the outputs back; zeros at padding.

    `run` gets right-padded rows and their 0/1 mask. Costs a copy of x into [documents, longest document] and one
    host synchronisation for those two sizes.
    """
    found = seg.runs(segments)
    per_row = found.run.amax(1)
    offset = per_row.cumsum(0) - per_row
    row = (offset[:, None] + found.run - 1)[found.valid]
    documents = int(per_row.sum())
    if documents == 0:
        return torch.zeros_like(x)
    lengths = torch.bincount(row, minlength=documents)
    # Documents are stored in order, so a token's place is its rank less the tokens of the documents before it.
    place = torch.arange(row.numel(), device=x.device) - (lengths.cumsum(0) - lengths)[row]
    longest = int(lengths.max())
    rows = x.new_zeros(documents, longest, x.shape[-1]).index_put((row, place), x[found.valid])
    mask = (torch.arange(longest, device=x.device) < lengths[:, None]).long()
    y = run(rows, mask)
    return torch.zeros_like(x).masked_scatter(found.valid[..., None], cast(Tensor, y[row, place]).to(x.dtype))
