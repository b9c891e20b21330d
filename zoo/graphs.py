"""Decoding with static buffers, on a GPU as one CUDA graph a token.

Launching the hundreds of small kernels of a token from Python costs more than they take; replaying a graph is one call.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.block import State, leaves, map_state
from zoo.model import LanguageModel

TOKENS = (1, 100, 10_000)  # a state with as many bytes after each of these is taken for one of constant size
WARMUPS = 3  # steps before capturing: kernels are tuned and workspaces made in them


class Stepper:
    """A causal model, one token a row at a time, with its state in buffers that never move.

        stepper = Stepper(model.eval(), batch=1)
        logits = stepper.read(prompt)  # [batch, vocab], behind the prompt's last token
        for _ in range(100):
            token = logits.argmax(-1)  # or any sampling
            logits = stepper(token)

    On a GPU a step is captured in a CUDA graph when the stepper is made, and calls replay it; on a CPU, or with
    graph=False, the same step runs as it is. The logits are equal to those of `model(token, state)`. They stand in a
    buffer that the next call overwrites: clone what is to be kept.

    For models whose states have a constant size: recurrences, state space models, attention over a window. One that
    grows has no place to grow into. The graph reads the parameters where they lay when it was captured: values may be
    changed in place (load_state_dict), but after model.to(...) make another stepper.

    Args:
        model: a `LanguageModel`, or a `ZooForCausalLM` that holds one; in eval mode.
        batch: rows.
        graph: None: capture where the model is on a GPU.

    Cost: the state once, and the graph's memory, about that of a step. A step copies what a block did not write in
    place, the whole state at most.

    Raises TypeError for another kind of model, ValueError for one in training mode, for a state that grows (which
    names the block) and for graph=True on a CPU, RuntimeError where a block waits for the GPU and so cannot be
    captured.
    """

    tokens: Int[Tensor, "batch 1"]
    logits: Float[Tensor, "batch vocab"]

    @torch.no_grad()
    def __init__(self, model: nn.Module, batch: int = 1, *, graph: bool | None = None):
        inner = model if isinstance(model, LanguageModel) else getattr(model, "model", None)
        if not isinstance(inner, LanguageModel):
            raise TypeError(f"Stepper takes a LanguageModel or a ZooForCausalLM, got {type(model).__name__}")
        if inner.training:
            raise ValueError("the model is in training mode, where dropout and routers draw numbers; call model.eval()")
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch={batch!r} must be a positive integer")
        device = inner.embedding.weight.device
        if graph and device.type != "cuda":
            raise ValueError(f"graph=True needs a model on a GPU, this one is on {device}; leave it out")
        self.model, self.batch = inner, batch
        _refuse_growing(inner)
        self.tokens = torch.zeros(batch, 1, device=device, dtype=torch.long)
        self._state = self._settled()
        self._buffers = leaves(self._state)
        self._graph: Any = None
        if graph or (graph is None and device.type == "cuda"):
            self._capture()
            self.reset()

    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, " batch *one"]) -> Float[Tensor, "batch vocab"]:
        """Logits of the next token after one more token a row, [batch] or [batch, 1]."""
        if tokens.numel() != self.batch:
            raise ValueError(f"this stepper takes one token for each of {self.batch} rows, got {tuple(tokens.shape)}")
        self.tokens.copy_(tokens.reshape(self.batch, 1))
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
        return self.logits

    @torch.no_grad()
    def read(
        self, tokens: Int[Tensor, "batch time"], segments: Int[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch vocab"]:
        """Go on over any number of tokens at once, a prompt for instance, and return the last one's logits.

        `segments` as in the model: 0 at padding, which should stand on the left.
        """
        out = self.model(tokens, self.state, segments, logits_to_keep=1)
        self.reset(out.state)
        self.logits.copy_(out.logits[:, -1])
        return self.logits

    @property
    def state(self) -> tuple[State, ...]:
        """A copy of the state, to come back to by `reset` or to go on from with the model itself."""
        return _copy(self._state)

    @torch.no_grad()
    def reset(self, state: tuple[State, ...] | None = None) -> None:
        """Start anew, or from a state of the same model and batch."""
        given = leaves(self.model.init_state(self.batch) if state is None else state)
        wanted, found = ([tuple(each.shape) for each in many] for many in (self._buffers, given))
        if wanted != found:
            place = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), len(wanted))
            raise ValueError(
                f"the state does not fit this stepper (of batch={self.batch}): its leaf {place} is another than the "
                "model's; pass a state of this model and batch"
            )
        for buffer, each in zip(self._buffers, given, strict=True):
            buffer.copy_(each)

    # A step ---------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """From `tokens` and the state's buffers into `logits` and the state's buffers."""
        out = self.model(self.tokens, self._state, logits_to_keep=1)
        held = {each.untyped_storage().data_ptr() for each in self._buffers}
        buffers, news = [], []
        for buffer, new in zip(self._buffers, leaves(out.state), strict=True):
            if new.numel() == 0 or (new.data_ptr() == buffer.data_ptr() and new.stride() == buffer.stride()):
                continue  # written in place
            # A view of some buffer must not change while the buffers are filled.
            news.append(new.clone() if new.untyped_storage().data_ptr() in held else new)
            buffers.append(buffer)
        if buffers:
            # One call: a few launches for all of them.
            torch._foreach_copy_(buffers, news)  # pyright: ignore[reportPrivateImportUsage]
        self.logits.copy_(out.logits[:, -1])

    def _settled(self) -> tuple[State, ...]:
        """The initial state in buffers of the shapes and types that a step returns, and a buffer for the logits."""
        start = self.model.init_state(self.batch)
        out = self.model(self.tokens, _copy(start), logits_to_keep=1)
        self.logits = torch.empty_like(out.logits[:, -1], memory_format=torch.contiguous_format)
        for spec, before, after in zip(self.model.config.blocks(), start, out.state, strict=True):
            if [each.shape for each in leaves(before)] != [each.shape for each in leaves(after)]:
                raise ValueError(_growing(spec))

        def buffer(like: Tensor, value: Tensor) -> Tensor:
            return torch.empty(value.shape, device=like.device, dtype=like.dtype).copy_(value)

        return map_state(buffer, out.state, start)

    def _capture(self) -> None:
        """Record a step. Buffers hold nonsense afterwards."""
        device = self.tokens.device
        with torch.cuda.device(device):
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(WARMUPS):
                    self._step()
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self._step()
            except RuntimeError as error:
                raise RuntimeError(
                    "a step of this model cannot be captured in a CUDA graph: some block waits for the GPU to know a "
                    f"value ({error}); use graph=False"
                ) from error
        self._graph = graph


def _copy(state: State) -> State:
    return map_state(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), state)


def _refuse_growing(model: LanguageModel) -> None:
    for spec, each in zip(model.config.blocks(), model.residuals, strict=True):
        if len({each.block.state_bytes(tokens) for tokens in TOKENS}) > 1:
            raise ValueError(_growing(spec))


def _growing(spec: Any) -> str:
    return (
        f"{spec.where} (kind {spec.kind}) has a state that grows with the context, which no static buffer holds; give "
        "it a window where it has one, or decode with the model itself"
    )
