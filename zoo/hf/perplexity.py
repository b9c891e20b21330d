"""How well a causal model predicts a text: by a sliding window, or in one pass that carries the state along."""

import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.hf.cache import ZooCache
from zoo.hf.tokenizer import is_byte_tokenizer


class Text(NamedTuple):
    """A text's tokens, and how many bytes of it all tokens but the first stand for."""

    ids: np.ndarray
    bytes: int


class Score(NamedTuple):
    """What a text cost: every token but the first is predicted once. `state_bytes`: held at the end of a stream."""

    nats: float
    tokens: int
    bytes: int
    state_bytes: int = 0

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)

    @property
    def bits_per_token(self) -> float:
        return self.nats / math.log(2) / self.tokens

    @property
    def perplexity(self) -> float:
        """Of a token: exp(nats / tokens), infinite where that is no longer a number."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    def facts(self) -> dict[str, Any]:
        return self._asdict() | {
            "bits_per_byte": self.bits_per_byte,
            "bits_per_token": self.bits_per_token,
            "perplexity": self.perplexity,
        }


def read_text(path: str | Path, tokenizer: Any) -> Text:
    """A text file as its tokenizer reads it, special tokens too. Byte tokens stay in the file, whatever its size; other
    tokenizers take the whole text at once.

    Raises OSError for no file, ValueError where it is not UTF-8 or holds fewer than two tokens.
    """
    path = Path(path)
    if is_byte_tokenizer(tokenizer):
        size = path.stat().st_size
        found = Text(np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8), size - 1)
    else:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 (byte {error.start}); convert it") from error
        found = encode(text, tokenizer)
    if len(found.ids) < 2:
        raise ValueError(f"{path} holds {len(found.ids)} tokens, and the first has nothing before it; give more text")
    return found


def encode(text: str, tokenizer: Any) -> Text:
    """A text's tokens. A special token at the begin is no text: then all bytes are predicted."""
    made = tokenizer(text, verbose=False)
    ids = np.asarray(made["input_ids"], np.int64)
    if not len(ids):
        return Text(ids, 0)
    if made.is_fast:
        span = made.token_to_chars(0)
        first = "" if span is None else text[: span.end]
    else:
        first = tokenizer.decode(ids[:1].tolist(), skip_special_tokens=True)
    return Text(ids, max(len(text.encode()) - len(first.encode()), 0))


@torch.no_grad()
def sliding(model: Any, text: Text, window: int = 1024, stride: int = 512, batch_size: int = 1) -> Score:
    """Perplexity of a fixed length: windows of `window` tokens begin every `stride` tokens, and each predicts the
    tokens that none before it did. So each token but the first is predicted once; from the second window on, with at
    least `window - stride` tokens before it (transformers' "perplexity of fixed-length models").

    A smaller stride gives more context and costs more: window / stride times the text. `batch_size` windows run at
    once.
    """
    _check(window, stride, batch_size)
    nats = 0.0
    places = groupby(_windows(len(text.ids), window, stride), lambda each: each[1:])
    for (size, new), group in places:
        begins = [begin for begin, *_ in group]
        for first in range(0, len(begins), batch_size):
            rows = begins[first : first + batch_size]
            tokens = torch.stack([_take(text.ids, begin, begin + size) for begin in rows]).to(model.device)
            logits = model(input_ids=tokens, use_cache=False, logits_to_keep=new + 1).logits
            nats += _nats(logits[:, :-1], tokens[:, -new:])
    return Score(nats, len(text.ids) - 1, text.bytes)


@torch.no_grad()
def streamed(model: Any, text: Text, chunk: int = 1024) -> Score:
    """Every token from all before it: chunks of `chunk` tokens, each going on from the state of the one before.

    As a window without end. Recurrent blocks need memory for one chunk and their state, however long the text is;
    attention without a window also keeps keys and values of the whole text.
    """
    if chunk < 1:
        raise ValueError(f"window={chunk} is the length of a chunk here and must be at least 1")
    cache, nats, last = ZooCache(), 0.0, len(text.ids) - 1
    for begin in range(0, last, chunk):
        tokens = _take(text.ids, begin, min(begin + chunk, last) + 1).to(model.device)[None]
        logits = model(input_ids=tokens[:, :-1], cache=cache, use_cache=True).logits
        nats += _nats(logits, tokens[:, 1:])
    return Score(nats, last, text.bytes, cache.bytes())


def _check(window: int, stride: int, batch_size: int) -> None:
    if window < 2:
        raise ValueError(f"window={window} must be at least 2: a token and one before it")
    if not 1 <= stride < window:
        raise ValueError(
            f"stride={stride} must be at least 1 and less than window={window}: the first token of a window is "
            "predicted by the window before"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")


def _windows(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Where each window begins, its length, and how many tokens at its end it predicts."""
    seen = 1  # the first token has nothing before it
    for begin in range(0, tokens, stride):
        end = min(begin + window, tokens)
        yield begin, end - begin, end - seen
        seen = end
        if end == tokens:
            return


def _take(ids: np.ndarray, begin: int, end: int) -> Int[Tensor, " tokens"]:
    return torch.from_numpy(ids[begin:end].astype(np.int64))


def _nats(logits: Float[Tensor, "batch time vocab"], targets: Int[Tensor, "batch time"]) -> float:
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return float(nn.functional.cross_entropy(exact, targets.flatten(), reduction="none").double().sum())
