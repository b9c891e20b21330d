"""No configuration of a Triton kernel may be chosen that no test has run: values, gradients, memory filled with NaN.

Which tests do so on a GPU is said here. Another tuned kernel, or a new list of blocks, fails until it has one.
"""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from triton.runtime.autotuner import Autotuner

import ops

# module -> the kernels that it tunes or the lists that it picks blocks from, and the tests that run each of them
TESTED = {
    "ops.attention.triton": (
        {"_forward_kernel", "_query_kernel", "_key_kernel"},
        ["test_attention.py::test_gpu_every_triton_configuration"],
    ),
    "ops.causal_conv1d.triton": ({"BLOCKS"}, ["test_causal_conv1d.py::test_on_gpu"]),
    "ops.delta_rule.triton": (
        {"pairs", "pair_gradients", "invert", "carry"},
        ["test_delta_rule.py::test_every_configuration_on_a_gpu"],
    ),
    "ops.grouped_mm.triton": (
        {"rows_kernel", "outer_kernel"},
        [
            "test_grouped_mm.py::test_every_configuration_on_a_gpu",
            "test_grouped_mm.py::test_gradients_of_every_configuration_on_a_gpu",
        ],
    ),
    "ops.linear_attention.triton": (
        {"pairs", "wide_pairs", "carry", "outputs", "pair_gradients", "value_gradients", "key_gradients"},
        ["test_linear_attention.py::test_every_configuration_on_a_gpu"],
    ),
    "ops.linear_recurrence.triton": ({"BLOCKS"}, ["test_linear_recurrence.py::test_every_block_and_chunk_on_a_gpu"]),
    "ops.long_conv.toeplitz": ({"BLOCKS"}, ["test_long_conv.py::test_every_block_size_on_a_gpu"]),
    "ops.selective_scan.triton": ({"BLOCKS"}, ["test_selective_scan.py::test_every_block_size_on_a_gpu"]),
    "ops.ssm_kernel.triton": (
        {"VANDERMONDE_BLOCKS", "CAUCHY_BLOCKS", "CAUCHY_BACKWARD_BLOCKS"},
        ["test_ssm_kernel.py::test_every_block_size_on_a_gpu"],
    ),
    "ops.wkv.triton": ({"BLOCKS"}, ["test_wkv.py::test_on_gpu"]),
}


def imports_triton(name):
    spec = importlib.util.find_spec(name)
    return (
        spec is not None
        and spec.origin is not None
        and re.search(r"^import triton", Path(spec.origin).read_text(), re.M)
    )


def choices(name):
    """The names of the kernels that a module tunes, and of its lists of blocks."""
    module = importlib.import_module(name)
    values = list(vars(module).values())
    values += [each for value in values if isinstance(value, dict) for each in value.values()]
    found = {each.base_fn.__name__ for each in values if isinstance(each, Autotuner)}
    return found | {each for each in vars(module) if each.endswith("BLOCKS")}


def test_every_choice_has_its_test():
    modules = [each.name for each in pkgutil.walk_packages(ops.__path__, "ops.") if not each.ispkg]
    found = {name: choices(name) for name in modules if imports_triton(name)}
    assert {name: each for name, each in found.items() if each} == {name: kinds for name, (kinds, _) in TESTED.items()}


@pytest.mark.parametrize("test", [test for _, tests in TESTED.values() for test in tests])
def test_the_tests_are_there(test):
    file, name = test.split("::")
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    found = re.search(rf"((?:^@.*\n(?:^    .*\n|^\)\n)*)+)^def {name}\(", text, re.M)
    assert found, f"{test} is gone"
    assert "@pytest.mark.gpu" in found.group(1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_new_memory_is_not_a_number(device, dtype):
    like = torch.ones(2, 3, device=device, dtype=dtype)
    for made in (torch.empty(5, device=device, dtype=dtype), torch.empty_like(like), like.new_empty(4)):
        assert made.isnan().all()
