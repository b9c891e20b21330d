"""transformers' models as an oracle in float64."""

import contextlib
from collections.abc import Iterator

import pytest
import torch


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Inside, what transformers computes in float32 whatever the model's dtype (norms, rotary angles, softmax) is
    computed in float64. Build and run its float64 models inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def randomise(model: torch.nn.Module, size: float = 0.4) -> torch.nn.Module:
    """Every weight random, so that no two tensors can be taken for one another, and large enough to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=size)
    return model.eval()
