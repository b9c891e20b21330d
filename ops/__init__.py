"""Kernels and their references: one public function an op, with `impl="auto"` or a named implementation.

Importing this module imports no kernel and no compiler: triton and numba are imported when first chosen.
"""

from ops.attention import attention
from ops.causal_conv1d import causal_conv1d
from ops.delta_rule import delta_rule
from ops.dispatch import Explanation, explain, use
from ops.gated import gated
from ops.gated_norm import gated_norm
from ops.grouped_mm import grouped_mm
from ops.linear import linear
from ops.linear_attention import linear_attention
from ops.linear_cross_entropy import linear_cross_entropy
from ops.linear_recurrence import linear_recurrence
from ops.long_conv import long_conv
from ops.relu2 import relu2
from ops.rms_norm import rms_norm
from ops.selective_scan import selective_scan
from ops.slstm import slstm
from ops.sparse_attention import sparse_attention
from ops.ssd import ssd
from ops.ssm_kernel import cauchy, vandermonde
from ops.token_mix import token_mix
from ops.wkv import wkv

__all__ = [
    "Explanation",
    "attention",
    "cauchy",
    "causal_conv1d",
    "delta_rule",
    "explain",
    "gated",
    "gated_norm",
    "grouped_mm",
    "linear",
    "linear_attention",
    "linear_cross_entropy",
    "linear_recurrence",
    "long_conv",
    "relu2",
    "rms_norm",
    "selective_scan",
    "slstm",
    "sparse_attention",
    "ssd",
    "token_mix",
    "use",
    "vandermonde",
    "wkv",
]
