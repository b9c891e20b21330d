"""Rotary positions as transformers' `rope_parameters` say them, and as `zoo.layers.position` does."""

from collections.abc import Mapping
from typing import Any

# transformers' rope_type: our kind of scaling and, for each of its keys, our option. The rest cannot be converted:
# "dynamic" and "longrope" change with the length of the input, which a state of turned keys cannot follow.
_CONTEXT = {"original_max_position_embeddings": "original_context"}
TYPES: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {each: each for each in ("factor", "low_freq_factor", "high_freq_factor")} | _CONTEXT,
    "yarn": {
        each: each
        for each in ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
    }
    | _CONTEXT,
}


def to_position(rope: Mapping[str, Any], partial: bool = False) -> dict[str, Any]:
    """The `position` option for these `rope_parameters`. Raises ValueError that names what cannot be converted.

    `partial`: the format turns the share `partial_rotary_factor` of each head; in others that must be all of it.
    """
    given = {name: value for name, value in rope.items() if value is not None}
    kind, base = given.pop("rope_type", "default"), given.pop("rope_theta", 10000.0)
    given.pop("type", None)  # what older files call rope_type; transformers keeps both
    fraction = 1.0
    if partial or given.get("partial_rotary_factor") == 1:
        fraction = given.pop("partial_rotary_factor", 1.0)
    if kind != "default" and kind not in TYPES:
        raise ValueError(
            f"rope_parameters: rope_type={kind!r} cannot be converted; default, {', '.join(TYPES)} can (others change "
            "with the length of the input)"
        )
    names = TYPES.get(kind, {})
    for name in given:
        if name not in names:
            raise ValueError(f"rope_parameters: {name}={given[name]!r} cannot be converted with rope_type={kind!r}")
    position: dict[str, Any] = {"kind": "rotary", "base": float(base)}
    if fraction != 1:
        position["fraction"] = float(fraction)
    if kind != "default":
        position["scaling"] = {"kind": kind} | {names[name]: value for name, value in given.items()}
    return position


def from_position(position: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `rope_parameters` of a rotary `position`, as far as they can say it."""
    given = position or {}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": given.get("base", 10000.0)}
    if given.get("fraction", 1.0) != 1:
        rope["partial_rotary_factor"] = given["fraction"]
    scaling = dict(given.get("scaling") or {})
    if scaling:
        rope["rope_type"] = scaling.pop("kind")
        theirs = {ours: name for name, ours in TYPES[rope["rope_type"]].items()}
        rope |= {theirs[option]: value for option, value in scaling.items() if value is not None}
    return rope
