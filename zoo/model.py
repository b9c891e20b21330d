"""Embedding -> residual stack -> norm -> head: a language model made of blocks, causal or masked."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.checkpoint import checkpoint

from ops import linear_cross_entropy
from ops.step import fits, takes
from zoo.block import Block, Out, State, Step, hand_back
from zoo.config import BlockSpec, ModelConfig, load_config
from zoo.kept import Kept
from zoo.layers.checks import number
from zoo.layers.linear import Linear, plain
from zoo.layers.norm import around, norm
from zoo.registry import block, options


def watched() -> bool:
    """Whether somebody watches the forward of every module (hooks)."""
    return bool(_global_forward_hooks or _global_forward_pre_hooks)


class ModelOut(NamedTuple):
    """What a model returns. `hidden` is what the head read, of every token; `hidden_states` (when asked for) the
    residual stream before each block and `hidden` last; `nats` (where targets were given) the summed cross entropy."""

    logits: Float[Tensor, "batch kept vocab"]
    state: tuple[State, ...] | None
    aux: dict[str, Tensor]
    hidden: Float[Tensor, "batch time width"]
    hidden_states: tuple[Tensor, ...] | None = None
    nats: Float[Tensor, ""] | None = None


class Residual(nn.Module):
    """A block in its norm and residual: α x + β f(norm(x)), or norm(α x + β f(x)), with skip α and scale β. A composite
    one stands bare."""

    block: Block
    _held_step: Kept | None = None  # what the block's bind_step gave

    def __init__(
        self, inner: Block, norm: nn.Module, position: str, dropout: float, skip: float = 1.0, scale: float = 1.0
    ):
        super().__init__()
        if not inner.residual and (skip, scale) != (1, 1):
            raise ValueError(
                f"residual with skip={skip} and scale={scale} is not for this block: it is composite and has residuals "
                "of its own"
            )
        self.block = inner
        self.norm = norm if inner.residual else nn.Identity()
        self.position = position
        self.dropout, self.skip, self.scale = dropout, skip, scale

    def forward(self, x: Tensor, state: State | None = None, segments: Tensor | None = None) -> Out:
        if not self.block.residual:
            return self.block(x, state, segments)
        if x.shape[1] == 1 and segments is None:
            out = self._one_token(x, state)
            if out is not None:
                return out
        y, state, aux = self.block(self.norm(x) if self.position == "pre" else x, state, segments)
        if self.dropout and self.training:
            y = nn.functional.dropout(y, self.dropout)
        if self.skip != 1:
            x = x * self.skip
        y = x + y if self.scale == 1 else torch.add(x, y, alpha=self.scale)
        return Out(y if self.position == "pre" else self.norm(y), state, aux)

    def _one_token(self, x: Tensor, state: State | None) -> Out | None:
        """Norm, block and residual in one call, where the block can and nobody watches the parts (hooks)."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if watched():
            return None
        kept = self._held_step
        if kept is None or not kept.holds():
            kept = self._held_step = Kept((self, self.block), self._bind())
        return None if kept.made is None else kept.made(x, state)

    def _bind(self) -> Step | None:
        block = self.block
        if self.training or self.position != "pre" or block._forward_hooks or block._forward_pre_hooks:
            return None
        found = around(self.norm, self.skip, self.scale)
        return None if found is None else block.bind_step(found)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._held_step = None
        return super()._apply(fn, recurse)


class LanguageModel(nn.Module):
    """A language model from a `ModelConfig` (or what `load_config` takes: a mapping, a file, a preset's name).

    Raises ValueError that names the place in the stack for whatever a block's constructor refuses.
    """

    _held_end: Kept | None = None  # what _bind_end gave

    def __init__(self, config: ModelConfig | Mapping[str, Any] | str):
        super().__init__()
        self.config = config = load_config(config)
        self.gradient_checkpointing = False
        if number("init_std", config.init_std) < 0:
            raise ValueError(f"init_std={config.init_std} must not be negative")
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.embedding_norm = norm(config.norm, config.width, config.norm_eps) if config.embedding_norm else None
        specs = config.blocks()
        self.blocks = nn.ModuleList(self._residual(spec, index, len(specs)) for index, spec in enumerate(specs))
        # With norms after each block the stream is normed already.
        self.norm = norm(config.norm, config.width, config.norm_eps) if config.norm_position == "pre" else nn.Identity()
        self.head: nn.Linear = Linear(config.width, config.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=config.init_std)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        else:
            nn.init.normal_(self.head.weight, std=config.init_std)

    def _residual(self, spec: BlockSpec, index: int, depth: int) -> Residual:
        config, chosen = self.config, dict(spec.options)
        known = options(spec.kind)
        if "layer" in known and "layers" in known:  # initialisation that depends on depth (RWKV)
            chosen = {"layer": index, "layers": depth} | chosen
        try:
            inner = block(spec.kind, config.width, **chosen)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{spec.where} (kind {spec.kind}): {error}") from error
        if config.objective == "causal" and inner.refusal is not None:
            raise ValueError(f"{spec.where} (kind {spec.kind}) {inner.refusal}")
        around = norm(config.norm, config.width, config.norm_eps)
        try:
            return Residual(inner, around, config.norm_position, config.dropout, spec.skip, spec.scale)
        except ValueError as error:
            raise ValueError(f"{spec.where} (kind {spec.kind}): {error}") from None

    @property
    def residuals(self) -> list[Residual]:
        """The stack, typed."""
        return cast("list[Residual]", list(self.blocks))

    def init_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> tuple[State, ...]:
        """The state before the first token: one entry a block. `device` and `dtype` are the embedding's unless told."""
        if self.config.objective != "causal":
            raise ValueError("a masked model has no state: it reads the whole sequence at once")
        for spec, each in zip(self.config.blocks(), self.residuals, strict=True):
            if not each.block.causal:  # allowed by its options
                raise ValueError(
                    f"{spec.where} (kind {spec.kind}) looks at later tokens, so the model cannot go on from a state; "
                    "call it without one on the whole text (in generate: use_cache=False)"
                )
        device = self.embedding.weight.device if device is None else device
        dtype = self.embedding.weight.dtype if dtype is None else dtype
        return tuple(each.block.init_state(batch, device=device, dtype=dtype) for each in self.residuals)

    def state_bytes(self, tokens: int, *, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of state that one row holds after `tokens` tokens."""
        return sum(each.block.state_bytes(tokens, dtype=dtype) for each in self.residuals)

    def forward(
        self,
        tokens: Int[Tensor, "batch time"] | None = None,
        state: tuple[State, ...] | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
        *,
        embeddings: Float[Tensor, "batch time width"] | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        hidden_states: bool = False,
        targets: Int[Tensor, "batch time"] | None = None,
    ) -> ModelOut:
        """Logits of the next (causal) or the hidden (masked) token at each position.

        `logits_to_keep`: only the last so many positions, or the positions listed; 0 is all. `targets`: what each
        position must say, -100 where nothing is asked; then `nats` is the summed cross entropy, differentiable, and
        there are no logits ([batch, 0, vocab]): they never exist all at once, see `ops.linear_cross_entropy`. Other
        arguments are the blocks' own: a state to continue from (handed over), and who may see whom.
        """
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep={logits_to_keep} must not be negative; 0 keeps all, n the last n")
        x = self._embed(tokens, embeddings)
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(f"the state has {len(state)} entries, this model has {len(self.blocks)} blocks")
        states: list[State] = []
        stream = [x] if hidden_states else []
        aux: dict[str, Tensor] = {}
        for index, each in enumerate(self.residuals):
            given = None if state is None else state[index]
            if self.gradient_checkpointing and self.training and given is None:
                out = cast(Out, checkpoint(each, x, None, segments, use_reentrant=False))
            else:
                out = each(x, given, segments)
            x = out.y
            states.append(out.state)
            aux.update({f"blocks.{index}/{name}": value for name, value in out.aux.items()})
            if hidden_states:
                stream.append(x)
        nats = None
        if targets is None:
            hidden, logits = self._end(x, logits_to_keep)
        else:
            if targets.shape != x.shape[:2] or not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
                raise ValueError(
                    f"targets of shape {tuple(targets.shape)} with logits_to_keep={logits_to_keep} do not fit tokens "
                    f"of shape {tuple(x.shape[:2])}: one target a token, and no logits to keep"
                )
            hidden = self.norm(x)
            nats = self._nats(hidden.flatten(0, 1), targets.flatten())
            logits = hidden.new_empty(len(x), 0, self.config.vocab_size)
        if hidden_states:
            stream[-1] = hidden
        state = None if state is None else tuple(states)
        return ModelOut(self._bent(logits), state, aux, hidden, tuple(stream) or None, nats)

    def _bent(self, logits: Tensor) -> Tensor:
        """Scaled and capped, as the configuration says."""
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits

    def _nats(self, hidden: Float[Tensor, "rows width"], targets: Int[Tensor, " rows"]) -> Float[Tensor, ""]:
        """Summed cross entropy of the rows, float32 at least."""
        if plain(self.head) and self.head.bias is None and not watched():
            scale, softcap = self.config.logit_scale, self.config.logit_softcap
            return linear_cross_entropy(hidden, self.head.weight, targets, scale=scale, softcap=softcap)
        # A head with something of its own: adapters, hooks, another dtype of its weights.
        logits = self._bent(self.head(hidden))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy(logits, targets.long(), reduction="sum")

    def _end(self, x: Tensor, keep: int | Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads of all tokens, and what it makes of those kept."""
        if x.shape[1] == 1 and isinstance(keep, int) and takes(x, self.config.width) and not watched():
            kept = self._held_end
            if kept is None or not kept.holds():
                kept = self._held_end = Kept((self.norm, self.head), self._bind_end(), self)
            if kept.made is not None:
                return kept.made(x)
        hidden = self.norm(x)
        if not isinstance(keep, int):
            return hidden, self.head(hidden[:, keep])
        return hidden, self.head(hidden[:, -keep:] if keep else hidden)

    def _bind_end(self) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
        """The last norm and the head in one compiled call, for one token on a CPU; see `Block.bind_step`."""
        found = None if isinstance(self.norm, nn.Identity) else around(self.norm)
        if found is None or not plain(self.head) or self.head.bias is not None:
            return None
        if not fits(self.head.weight, found.weight, found.bias):
            return None
        from ops.step.head import head

        return head(self.head.weight, found)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._held_end = None
        return super()._apply(fn, recurse)

    def after_step(self, step: int, sums: Mapping[str, Tensor]) -> None:
        """To be called once after each optimizer step, for blocks that are driven by it (some routers of `moe`); where
        it is not, they stay at their first step. `zoo pretrain` and `zoo finetune` call it.

        `step`: optimizer steps done so far in the run, this one too. `sums`: the entries "sum/<name>" of `ModelOut.aux`
        over the step's micro-batches (see `zoo.block.add_sums`) and over ranks (all_reduce them). Not to be called
        after a step that a float16 gradient scaler skipped.

            total = {}
            for tokens, targets in micro_batches:
                out = model(tokens, targets=targets)
                (out.nats / targets.numel() + losses(out.aux)).backward()
                add_sums(total, out.aux)
            optimizer.step()
            model.after_step(step := step + 1, total)
        """
        hand_back(((f"blocks.{index}", each.block) for index, each in enumerate(self.residuals)), step, sums)

    def _embed(self, tokens: Tensor | None, embeddings: Tensor | None) -> Tensor:
        if (tokens is None) == (embeddings is None):
            raise ValueError("pass either tokens or embeddings")
        if embeddings is None:
            assert tokens is not None
            if tokens.ndim != 2 or tokens.shape[1] == 0:
                raise ValueError(
                    f"tokens must be [batch, time] with at least one token each, got shape {tuple(tokens.shape)}"
                )
            embeddings = self._look_up(tokens)
        assert embeddings is not None
        if embeddings.shape[-1] != self.config.width:
            raise ValueError(f"embeddings have width {embeddings.shape[-1]}, this model has width={self.config.width}")
        if self.config.embedding_scale != 1:
            embeddings = embeddings * self.config.embedding_scale
        return embeddings if self.embedding_norm is None else self.embedding_norm(embeddings)

    def _look_up(self, tokens: Tensor) -> Tensor:
        """The tokens' rows of the embedding. A GPU finds an id out of range by itself; on a CPU we say which."""
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens must be ids of type int64 or int32, got {tokens.dtype}; convert with .long()")
        if torch.compiler.is_compiling():
            return self.embedding(tokens)
        try:
            return self.embedding(tokens)
        except IndexError:
            low, high = tokens.min().item(), tokens.max().item()
            raise ValueError(
                f"tokens hold ids from {low} to {high}, this model's go from 0 to {self.config.vocab_size - 1} "
                f"(vocab_size={self.config.vocab_size}); use the model's own tokenizer, or a larger vocab_size"
            ) from None


def losses(aux: Mapping[str, Tensor]) -> Tensor | float:
    """Sum of the blocks' own losses (router losses), already weighted; 0.0 where there are none."""
    found = [value for name, value in aux.items() if "/loss/" in f"/{name}"]
    return torch.stack(found).sum() if found else 0.0
