"""lm-eval's harness over a causal model: its tasks, prompts and metrics. Imported only where they are asked for."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lm_eval
import torch
from lm_eval.models import huggingface
from lm_eval.tasks import TaskManager
from torch import Tensor

from zoo.layers.learned_position import LearnedPosition
from zoo.layers.spelling import nearest

LENGTH = 2048  # tokens of context where nothing else is said


class HarnessLM(cast(Any, huggingface).HFLM):  # its decorator hides its type
    """The harness's own model class over a model and tokenizer in memory.

    It differs where a plain HFLM would not serve a tokenizer of bytes or would waste work: the token that stands before
    a text's first one, and ends a text, is the tokenizer's begin, end or padding token, or the model's, whichever there
    is (for bytes the 0 that ends documents in training); texts that are only read make no cache; and log-probabilities
    are computed in float32 at least. The harness pads texts that it scores on the right, which a causal model does not
    see, and prompts that it continues on the left, with a mask.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | str = 1, max_length: int | None = None):
        self._boundary = boundary(model, tokenizer)
        low = model.dtype.itemsize < 4
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=context_length(model) if max_length is None else max_length,
            softmax_dtype="float32" if low else None,
        )

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self._boundary if begin is None else begin

    @property
    def eot_token_id(self) -> int:
        end = self.tokenizer.eos_token_id
        return self._boundary if end is None else end

    @torch.no_grad()
    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return self.model(input_ids=inps, use_cache=False).logits

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any) -> Any:
        # The harness reads once what several requests read alike (options of one token each), but takes the wrong
        # places where these cut it into context and continuation differently.
        cuts: dict[tuple[int, ...], int] = {}
        lengths = [(cuts.setdefault((*begin, *then[:-1]), len(then)), len(then)) for _, begin, then in requests]
        self.logits_cache = all(first == length for first, length in lengths)
        return super()._loglikelihood_tokens(requests, **options)


def boundary(model: Any, tokenizer: Any) -> int:
    """A token that stands between texts. Raises ValueError where neither tokenizer nor model names one."""
    for owner in (tokenizer, model.config):
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            found = getattr(owner, name, None)
            if isinstance(found, int):
                return found
    raise ValueError(
        "the harness needs a token before a text's first one, and the tokenizer names none; add eos_token to its "
        "tokenizer_config.json"
    )


def context_length(model: Any) -> int:
    """Tokens of context a model takes: what its blocks or the checkpoint it came from say, else 2048."""
    tables = [each.context for each in model.modules() if isinstance(each, LearnedPosition)]
    if tables:
        return min(tables)
    said = (getattr(model.config, "published", None) or {}).get("max_position_embeddings")
    return said if isinstance(said, int) else LENGTH


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: float | None = None,
    fewshot: int | None = None,
    batch_size: int | str = 1,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Run tasks of the harness, and return all that it returns.

    Args:
        tasks: names of tasks, groups or tags that the harness knows, or YAML files of tasks.
        include_path: a folder of more tasks; its names come first.
        limit: examples of each task, or a share of them below 1.
        fewshot: solved examples before each; None: as the task says.
        batch_size: requests at once; "auto" finds out what fits in memory.
        max_length: tokens of context, from which longer texts are cut; None: see `context_length`.

    Raises ValueError for an unknown task and a limit of nothing.
    """
    if limit is not None and limit <= 0:
        raise ValueError(f"limit={limit} must be a number of examples, or a share of them below 1")
    for name in ("lm_eval", "lm_eval.models.huggingface"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it warns of a model in memory, and of defaults
    manager = _manager(tasks, include_path)
    found = cast(Any, lm_eval).simple_evaluate(
        model=HarnessLM(model, tokenizer, batch_size, max_length),
        tasks=list(tasks),
        num_fewshot=fewshot,
        batch_size=batch_size,
        limit=int(limit) if limit is not None and limit >= 1 else limit,
        log_samples=False,
        task_manager=manager,
    )
    assert found is not None  # only other ranks get nothing
    return dict(found)


def _manager(tasks: Sequence[str], include_path: str | None) -> TaskManager:
    """The tasks that are known. The harness's own thousands take seconds to list: only if one of them is asked for."""
    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"there is no folder {include_path}; --include-path takes one of tasks' YAML files")
    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if all(_is_known(name, manager) for name in tasks):
            return manager
    manager = TaskManager(include_path=include_path)
    for name in tasks:
        if not _is_known(name, manager):
            raise ValueError(
                f"the harness knows no task {name!r}{nearest(name, manager.all_tasks)}; `lm-eval ls tasks` lists its "
                "own, --include-path FOLDER adds yours"
            )
    return manager


def _is_known(name: str, manager: TaskManager) -> bool:
    return name in manager.all_tasks or (name.endswith((".yaml", ".yml")) and Path(name).is_file())
