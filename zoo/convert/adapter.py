"""Adapters merged into the model that they were trained on."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from zoo.hf.checkpoint import damaged
from zoo.hf.lora import CONFIG, WEIGHTS, require_peft


def merged(folder: Path, load: Callable[[str], Any]) -> Any:
    """The model of an adapter's folder: its base, which `load` makes of the name in adapter_config.json, with the
    adapter added to its weights, in their dtype.

    Raises ValueError for weights that are damaged, pickled or not finite, for a base that cannot be loaded or is not
    the adapter's, and for adapters that cannot be merged; ImportError without peft.
    """
    peft = require_peft()
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"the adapter in {folder} has no {WEIGHTS}; save it again with peft, as safetensors")
    base = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    remedy = f"correct base_model_name_or_path in {folder / CONFIG}"
    if not base:
        raise ValueError(f"the adapter in {folder} does not say which model it was trained on; {remedy}")
    try:
        model = load(base)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the adapter in {folder} was trained on {base}, which cannot be loaded: {error}; {remedy}"
        ) from error
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            stored = set(file.keys())
        with warnings.catch_warnings(action="ignore"):  # what it may warn of is looked at below
            adapted = peft.PeftModel.from_pretrained(model, str(folder))
    except SafetensorError as error:
        raise damaged(folder, error) from error
    except (RuntimeError, ValueError) as error:  # of other sizes (a line each); on parts that the model lacks
        why = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ValueError(f"the adapter in {folder} does not fit {base}: {why}; {remedy}") from error
    if odd := sorted(stored ^ set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))):
        more = ", ..." if len(odd) > 3 else ""
        raise ValueError(f"the adapter in {folder} does not fit {base}: {', '.join(odd[:3])}{more} have no counterpart")
    if not hasattr(adapted, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type.value
        raise ValueError(f"the adapter in {folder} is of type {kind}, which cannot be merged; LoRA can")
    try:
        whole = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ValueError(f"the adapter in {folder} cannot be merged: {error}") from error
    return whole.requires_grad_(True).eval()
