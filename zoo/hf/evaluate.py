"""`zoo evaluate`: the harness's tasks and the perplexity of a text, of a model as it is or quantised."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.hf.causal import ZooForCausalLM
from zoo.hf.perplexity import Score, Text, read_text, sliding, streamed
from zoo.hf.quantize import quantize as quantized
from zoo.hf.quantize import require


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    tasks: Sequence[str] = (),
    text: str | None = None,
    window: int = 1024,
    stride: int | None = None,
    stream: bool = False,
    quantize: str | None = None,
    batch_size: int | str = 1,
    include_path: str | None = None,
    limit: float | None = None,
    fewshot: int | None = None,
    max_length: int | None = None,
    output: str | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Measure a model, print tables, and return (and write to `output`, as JSON) what was found.

    `text`: a file whose perplexity is measured, see `sliding` and, with `stream`, `streamed`; stride None is half the
    window. With `quantize` the text is measured before and after, and tasks after. `tasks`, `include_path`, `limit`,
    `fewshot`, `max_length`: see `zoo.hf.harness.run_tasks`. `batch_size`: requests, or windows of text, at once.
    `name`: of the model, for the file.

    Raises ValueError where nothing is asked for and for what the parts refuse, ImportError without lm-eval or torchao.
    """
    if not isinstance(model, ZooForCausalLM):
        raise ValueError(f"a {type(model).__name__} cannot be evaluated so; only causal models can (objective: causal)")
    if not tasks and text is None:
        raise ValueError("what shall be evaluated? Give --tasks NAME,... or --text FILE")
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {Path(output).parent} for {output}; create it")
    if quantize is not None:
        require(quantize)
    run_tasks = harness().run_tasks if tasks else None
    read = None if text is None else read_text(text, tokenizer)
    dtype = str(model.dtype).removeprefix("torch.")
    found: dict[str, Any] = {"model": name, "dtype": dtype, "device": str(model.device)}
    scores: dict[str, Score] = {}
    if read is not None:
        scores[dtype] = _score(model, read, window, stride, stream, batch_size)
    if quantize is not None:
        done = quantized(model, quantize)
        print(done.told())
        found["quantized"] = done._asdict()
        if read is not None:
            scores[quantize] = _score(model, read, window, stride, stream, batch_size)
    if read is not None:
        how = {"chunk": window} if stream else {"window": window, "stride": _stride(window, stride)}
        found["text"] = {"file": text, **how, "scores": {weights: each.facts() for weights, each in scores.items()}}
        _print_scores(scores, f"{text} ({', '.join(f'{size} {value}' for size, value in how.items())})")
    if run_tasks is not None:
        options = {"include_path": include_path, "limit": limit, "fewshot": fewshot, "max_length": max_length}
        found["harness"] = run_tasks(model, tokenizer, tasks, batch_size=batch_size, **options)
        _print_tasks(found["harness"])
    if output is not None:
        Path(output).write_text(json.dumps(_plain(found), indent=2) + "\n", encoding="utf-8")
    return found


def harness() -> Any:
    """The module `zoo.hf.harness`. Raises ImportError that tells how to install what it needs."""
    try:
        import zoo.hf.harness
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("lm_eval", "accelerate", "peft"):
            raise
        raise ImportError(
            f"tasks run in lm-eval's harness, and {error.name} is not installed: pip install 'efficient-zoo[eval]'"
        ) from error
    return zoo.hf.harness


def _score(model: Any, text: Text, window: int, stride: int | None, stream: bool, batch_size: int | str) -> Score:
    if stream:
        if stride is not None:
            raise ValueError(f"stride={stride} is for a sliding window; a stream predicts every token of each chunk")
        return streamed(model, text, window)
    return sliding(model, text, window, _stride(window, stride), 1 if isinstance(batch_size, str) else batch_size)


def _stride(window: int, stride: int | None) -> int:
    return max(1, window // 2) if stride is None else stride


def _print_scores(scores: dict[str, Score], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    streams = any(each.state_bytes for each in scores.values())
    heads = ("weights", "bits/byte", "bits/token", "perplexity", "tokens", "bytes")
    table = Table(*heads, *(["state bytes"] if streams else []), title=title)
    for name, each in scores.items():
        numbers = [f"{value:,.4f}" for value in (each.bits_per_byte, each.bits_per_token, each.perplexity)]
        numbers += [f"{value:,}" for value in (each.tokens, each.bytes, *([each.state_bytes] if streams else []))]
        table.add_row(name, *numbers)
    for column in table.columns[1:]:
        column.justify = "right"
    Console().print(table)


def _print_tasks(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "filter", "n-shot", "metric", "value", "±", title="lm-eval")
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or not filtered or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            spread = f"{error:.4f}" if isinstance(error, int | float) else ""
            shots = found.get("n-shot", {}).get(task, "")
            name = metrics.get("alias", task)
            table.add_row(name, filtered, str(shots), metric, f"{value:.4f}", spread)
    for column in table.columns[2:]:
        column.justify = "left" if column.header == "metric" else "right"
    Console().print(table)


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers of numpy as Python's, infinite ones and whatever else as text."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)
