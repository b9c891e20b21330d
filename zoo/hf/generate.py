"""`zoo generate`: load a checkpoint, stream a continuation, and tell what it cost."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer, set_seed
from transformers.generation.streamers import BaseStreamer

from zoo.hf import ByteStreamer, ZooCache, hide_progress, load_tokenizer, model_class
from zoo.hf.checkpoint import check_source
from zoo.hf.tokenizer import is_byte_tokenizer


def generate(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    text: str | None = None,
    load: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """Print the prompt and its continuation as it is made, then tokens/s and the bytes of state held.

    Decodes with the recurrent state: a token costs the same however long the text is, where the blocks allow.
    `temperature=0` is greedy. `quantize` ("int8", "int4"): the weights are quantised first, and what that changes is
    printed, measured on the file `text` or else on the prompt (see `zoo.hf.quantize`). `load` makes the model of its
    name: None reads zoo checkpoints, `zoo.convert.load` published ones and adapters too. Returns {"text", "tokens",
    "seconds", "state_bytes"}; seconds of the new tokens alone.
    Raises ValueError or OSError for an empty prompt, a bad setting, and where there is no such model.
    """
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character to continue")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is a share of the probability: above 0, at most 1 (all tokens)")
    if text is not None and quantize is None:
        raise ValueError(f"text={text!r} is what a quantised model is compared on; give quantize, int8 or int4, too")
    if quantize is not None:
        from zoo.hf.quantize import require

        require(quantize)
    device, chosen = named_device(device), named_dtype(dtype)
    hide_progress()  # the text is all that belongs on the screen
    loaded = (load or _saved)(model)
    if not loaded.can_generate():
        raise ValueError(
            f"{model} is a masked model: it fills in hidden tokens and cannot continue a text; use "
            f"transformers.pipeline('fill-mask', {model!r}) after import zoo.hf, or give a model trained with "
            "objective: causal"
        )
    loaded = loaded.to(device=device, dtype=chosen).eval()
    tokenizer = tokenizer_of(model)
    batch = tokenizer(prompt, return_tensors="pt").to(device)
    if quantize is not None:
        _quantize(loaded, quantize, batch["input_ids"][0] if text is None else _begin(text, tokenizer))
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    streamer = _Stopwatch(ByteStreamer() if is_byte_tokenizer(tokenizer) else TextStreamer(tokenizer))
    cache = ZooCache()
    tokens = loaded.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        cache=cache,
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        **sampling,
    )
    made = tokens.shape[1] - batch["input_ids"].shape[1]
    seconds = streamer.seconds
    rate = f"{(made - 1) / seconds:.0f} tokens/s" if made > 1 else "one token"
    print(f"\n[{made} tokens, {rate}, {cache.bytes():,} bytes of state, {device}]", flush=True)
    return {
        "text": tokenizer.decode(tokens[0]),
        "tokens": made,
        "seconds": seconds,
        "state_bytes": cache.bytes(),
    }


def _saved(model: str) -> Any:
    check_source(model)
    return model_class(model).from_pretrained(model)


def _quantize(model: Any, mode: str, ids: torch.Tensor) -> None:
    """Quantise a model and tell what that saves and changes."""
    from zoo.hf.quantize import quantize_and_compare

    done, quality = quantize_and_compare(model, mode, ids)
    print(f"[{done.told()}]")
    told = "one token tells nothing of quality: give --text FILE" if quality is None else quality.told()
    print(f"[{told}]", flush=True)


def _begin(text: str, tokenizer: Any) -> torch.Tensor:
    """As much of a text file's tokens as quality is measured on."""
    from zoo.hf.perplexity import read_text
    from zoo.hf.quantize import COMPARED

    return torch.from_numpy(read_text(text, tokenizer).ids[: COMPARED + 1].astype("int64"))


def named_device(name: str | None) -> str:
    """A device by name; None is the GPU where there is one. Raises ValueError for one that cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it was built without CUDA
        why = str(error).splitlines()[0][:100]
        raise ValueError(f"device={name!r} cannot be used here ({why}); use cpu, or leave it out") from error
    return name


def named_dtype(name: str | None) -> torch.dtype | None:
    """A floating point dtype by name, None for None. Raises ValueError for another name."""
    found = None if name is None else getattr(torch, name, None)
    if name is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype={name!r} is unknown; use float32, bfloat16, float16 or float64")
    return found


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a checkpoint. Raises ValueError that tells how to save one where there is none."""
    try:
        return load_tokenizer(model)
    except (OSError, ValueError) as error:
        if not Path(model).is_dir():
            raise
        raise ValueError(
            f"{model} holds no tokenizer that can be read ({str(error).splitlines()[0]}); save the model's own beside "
            f"it: tokenizer.save_pretrained({model!r}), for bytes zoo.hf.save_byte_tokenizer({model!r})"
        ) from error


class _Stopwatch(BaseStreamer):
    """Hands tokens on to another streamer and times from the first new one to the last: without the prompt's cost."""

    def __init__(self, streamer: BaseStreamer):
        self.streamer = streamer
        self.calls, self.first, self.latest = 0, 0.0, 0.0

    def put(self, value: Any) -> None:
        self.latest = time.perf_counter()
        self.calls += 1
        if self.calls == 2:  # the first call brings the prompt
            self.first = self.latest
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()

    @property
    def seconds(self) -> float:
        return max(self.latest - self.first, 1e-9)
