"""What the formats of hybrids share: the fields of their Mamba and Mamba-2 mixers."""

from collections.abc import Sequence
from typing import Any

from zoo.config import BlockSpec
from zoo.convert.decoder import on_meta
from zoo.ssm.mamba import Mamba
from zoo.ssm.mamba2 import Mamba2


def dual(said: Any) -> dict[str, Any]:
    """The mamba2 block of a configuration. Raises ValueError for an activation that its convolution has not."""
    refuse_activation(said)
    least, greatest = said.time_step_limit or (0.0, float("inf"))
    greatest = None if greatest == float("inf") else greatest
    return {
        "kind": "mamba2",
        "expand": said.mamba_expand,
        "state_size": said.mamba_d_state,
        "head_dim": said.mamba_d_head,
        "groups": said.mamba_n_groups,
        "conv_width": said.mamba_d_conv,
        "dt_limit": None if least <= 0 and greatest is None else [max(least, 0.0), greatest],
        "bias": said.mamba_proj_bias,
        "conv_bias": said.mamba_conv_bias,
        "norm_eps": said.rms_norm_eps,
    }


def dual_fields(spec: BlockSpec | None, width: int) -> dict[str, Any]:
    """The fields of a mamba2 block; without one, what fits every width."""
    if spec is None:
        return {"mamba_n_heads": 1, "mamba_d_head": "auto"}
    made: Mamba2 = on_meta(spec, width)
    least, greatest = made.dt_limit or (0.0, None)
    return _fields(made, width) | {
        "mamba_n_heads": made.heads,
        "mamba_d_head": made.head_dim,
        "mamba_n_groups": made.groups,
        "time_step_limit": (float(least), float("inf") if greatest is None else float(greatest)),
    }


def selective(said: Any) -> dict[str, Any]:
    """The mamba block of a configuration, with Jamba's norms inside. Errors as of `dual`."""
    refuse_activation(said)
    return {
        "kind": "mamba",
        "expand": said.mamba_expand,
        "state_size": said.mamba_d_state,
        "conv_width": said.mamba_d_conv,
        "dt_rank": said.mamba_dt_rank,
        "bias": said.mamba_proj_bias,
        "conv_bias": said.mamba_conv_bias,
        "inner_norm": True,
        "inner_norm_eps": said.rms_norm_eps,
    }


def selective_fields(spec: BlockSpec, width: int) -> dict[str, Any]:
    """The fields of a mamba block."""
    made: Mamba = on_meta(spec, width)
    return _fields(made, width) | {"mamba_dt_rank": made.dt_rank}


def refuse_activation(said: Any) -> None:
    """Raise ValueError for an activation that the convolution of a mixer here has not."""
    if said.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"hidden_act={said.hidden_act!r} cannot be converted: the convolution of Mamba layers here ends in silu"
        )


def first_of(specs: Sequence[BlockSpec]) -> dict[str, BlockSpec]:
    """The first block of each kind."""
    return {spec.kind: spec for spec in reversed(specs)}


def _fields(made: Mamba | Mamba2, width: int) -> dict[str, Any]:
    return {
        "mamba_expand": made.inner // width,
        "mamba_d_state": made.state_size,
        "mamba_d_conv": made.conv.taps,
        "mamba_conv_bias": made.conv.bias is not None,
        "mamba_proj_bias": made.in_proj.bias is not None,
    }
