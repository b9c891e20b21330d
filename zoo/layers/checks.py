"""Checks of options that are numbers: one error that names the option, its value and what it must be."""

import math
from typing import Any


def integer(name: str, value: Any, least: int = 1, otherwise: str = "") -> int:
    """`value` if it is an integer of at least `least`; ValueError for any other. `otherwise` ends the message."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = {0: "an integer that is not negative", 1: "a positive integer"}.get(least, f"an integer from {least}")
        raise ValueError(f"{name}={value!r} must be {kind}{otherwise}")
    return value


def number(name: str, value: Any) -> float:
    """`value` if it is a finite number; ValueError for any other."""
    if isinstance(value, str):
        raise ValueError(f"{name}={value!r} is text, not a number; YAML takes 1e-3 for text, write 1.0e-3")
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number")
    return value


def place(layer: int, layers: int) -> None:
    """ValueError unless `layer`, from 0, is the place of a block among `layers`."""
    if integer("layer", layer, 0) >= integer("layers", layers):
        raise ValueError(f"layer={layer} must be in [0, layers={layers}); count layers from 0")
