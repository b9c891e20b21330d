"""Blocks side by side on one input."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.block import Block, Out, State
from zoo.layers.norm import NORMS
from zoo.layers.norm import norm as make_norm
from zoo.registry import block, options

BLOCKS: Sequence[Any] = [{"kind": "gqa"}, {"kind": "swiglu"}]


class ParallelState(NamedTuple):
    """The states of the blocks, in their order."""

    parts: tuple[State, ...]


class Parallel(Block):
    """Blocks side by side on one input, their outputs added up (GPT-J, PaLM 2204.02311, Falcon 2311.16867).

    y = Σ_i f_i(x): with the model's norm and residual around it x + Σ_i f_i(norm(x)) (PaLM, sec. 2). With a norm for
    each block it is composite, a model places it bare: y = x + Σ_i f_i(norm_i(x)) (Falcon-40B: ln_attn and ln_mlp).

    Causal where all its blocks are. aux: the blocks' own entries, named "blocks.<index>/<entry>".

    Args:
        width: features of x.
        blocks: two or more, each `{kind: ..., option: ...}` or a kind alone, as in a stack.
        norm: "rms", "layer" ... gives each block a norm of its own; None: the model's one norm before all of them.
        norm_eps: added under those norms' root; None is the norm's own default.
        layer: place in the stack, from 0, for blocks whose initialisation depends on depth; a model sets it.
        layers: blocks in the stack; a model sets it.

    State: `ParallelState`.

    Cost (T tokens, D = width, b bytes a number, parts = the state bytes of each block):
        train time: that of the blocks, added up
        train memory: that of the blocks, added up
        prefill: that of the blocks, added up
        decode: that of the blocks, added up
        state bytes: sum(parts)
    """

    def __init__(
        self,
        width: int,
        blocks: Sequence[Any] = BLOCKS,
        norm: str | None = None,
        norm_eps: float | None = None,
        layer: int = 0,
        layers: int = 1,
    ):
        super().__init__(width)
        if isinstance(blocks, str) or not isinstance(blocks, Sequence) or len(blocks) < 2:
            raise ValueError(
                f"blocks={blocks!r} must be a list of two blocks or more, such as [{{kind: gqa}}, {{kind: swiglu}}]"
            )
        # Kind and options of each block, as given.
        self.specs = [self._spec(index, entry) for index, entry in enumerate(blocks)]
        place = {"layer": layer, "layers": layers}
        self.blocks = nn.ModuleList(self._build(index, *spec, place) for index, spec in enumerate(self.specs))
        self.norms, self.norm_eps = self._norms(norm, norm_eps)
        self.residual = self.norms is None  # pyright: ignore[reportAttributeAccessIssue]  # composite or not by option
        self.causal = all(part.causal for part in self.parts)  # pyright: ignore[reportAttributeAccessIssue]

    @staticmethod
    def _spec(index: int, entry: Any) -> tuple[str, dict[str, Any]]:
        chosen = dict(entry) if isinstance(entry, Mapping) else {"kind": entry}
        kind = chosen.pop("kind", None)
        if not isinstance(kind, str):
            raise ValueError(f"blocks[{index}]={entry!r} must be a block such as {{kind: mamba}}, or a kind alone")
        return kind, chosen

    def _build(self, index: int, kind: str, chosen: dict[str, Any], place: dict[str, Any]) -> Block:
        where = f"blocks[{index}] (kind {kind})"
        try:
            known = options(kind)
            part = block(kind, self.width, **(place if known.keys() >= place.keys() else {}) | chosen)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
        if not part.residual:
            raise ValueError(
                f"{where} is composite: it adds its input to its output by itself, so a sum of blocks "
                "would hold that twice; place it in the stack"
            )
        return part

    def _norms(self, kind: str | None, eps: float | None) -> tuple[nn.ModuleList | None, float | None]:
        if kind is None:
            if eps is not None:
                raise ValueError(f"norm_eps={eps} needs a norm for each block; set norm to layer or rms")
            return None, None
        if kind not in NORMS:
            raise ValueError(f"norm={kind!r} is unknown; choose from {', '.join(NORMS)}, or None for the model's")
        made = [make_norm(kind, self.width, eps) for _ in self.blocks]
        return nn.ModuleList(made), cast(float, made[0].eps)

    @property
    def parts(self) -> list[Block]:
        """The blocks, typed."""
        return cast("list[Block]", list(self.blocks))

    @property
    def refusal(self) -> str | None:
        for index, part in enumerate(self.parts):
            if part.refusal is not None:
                return f"holds blocks[{index}] (kind {self.specs[index][0]}), which {part.refusal}"
        return None

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> ParallelState:
        if not self.causal:
            raise ValueError("Parallel with a bidirectional block in it is bidirectional and has no state")
        return ParallelState(tuple(part.init_state(batch, device=device, dtype=dtype) for part in self.parts))

    def state_bytes(self, tokens: int, *, dtype: torch.dtype = torch.float32) -> int:
        if not self.causal:
            return 0
        return sum(part.state_bytes(tokens, dtype=dtype) for part in self.parts)

    def flops_per_token(self, context: int) -> int:
        return sum(part.flops_per_token(context) for part in self.parts)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        state: ParallelState | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Out:
        self.check(x, state, segments)
        if self.norms is not None and segments is not None:
            x = torch.where((segments != 0)[..., None], x, 0.0)
        found: list[Out] = []
        for index, part in enumerate(self.parts):
            read = x if self.norms is None else self.norms[index](x)
            found.append(part(read, None if state is None else state.parts[index], segments))
        y = sum((each.y for each in found[1:]), found[0].y)
        aux = {f"blocks.{i}/{name}": value for i, each in enumerate(found) for name, value in each.aux.items()}
        after = None if state is None else ParallelState(tuple(each.state for each in found))
        return Out(y if self.norms is None else x + y, after, aux)


def single(kind: str, block: Block) -> Iterator[tuple[str, Block]]:
    """A block with its kind; in the place of blocks side by side each of them."""
    if not isinstance(block, Parallel):
        yield kind, block
        return
    for (inner, _), part in zip(block.specs, block.parts, strict=True):
        yield from single(inner, part)
