"""The cost section of every block's docstring: whole, printed, and its state bytes are the measured ones."""

import pytest
import torch

import zoo
from tests.measure import WIDTH
from tests.variants import VARIANTS
from zoo.block import Block, state_bytes
from zoo.cli import main
from zoo.describe import COSTS, cost_table
from zoo.layers.parallel import Parallel

CASES = [(kind, options) for kind in zoo.kinds() for options in VARIANTS.get(kind, [{}])]


def declared(block: Block, kind: str, tokens: int, dtype: torch.dtype) -> int:
    """The docstring's expression, evaluated for this block; `parts` in it are those of the blocks inside."""
    expression = compile(cost_table(kind)["state bytes"], f"state bytes of {kind}", "eval")
    names = {"T": tokens, "D": block.width, "b": dtype.itemsize, "max": max, "min": min, "sum": sum}
    names = {name: getattr(block, name) for name in expression.co_names if hasattr(block, name)} | names
    if isinstance(block, Parallel):
        inside = zip(block.specs, block.parts, strict=True)
        names["parts"] = [declared(part, kind, tokens, dtype) for (kind, _), part in inside]
    return eval(expression, {"__builtins__": {}}, names)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=[f"{k}-{i}" for i, (k, _) in enumerate(CASES)])
def test_the_state_bytes_of_the_docstring_are_the_measured(kind, options, dtype):
    block = zoo.block(kind, WIDTH, **options).to(dtype).eval()
    if not block.causal:  # a kind with both forms tells its causal form's
        assert type(block).causal or cost_table(kind)["state bytes"] == "0"
        return
    for tokens in (1, 7, 40):
        with torch.no_grad():
            state = block(torch.randn(1, tokens, WIDTH, dtype=dtype), block.init_state(1, dtype=dtype)).state
        assert declared(block, kind, tokens, dtype) == state_bytes(state), f"after {tokens} tokens"


@pytest.mark.parametrize("kind", zoo.kinds())
def test_the_section_is_whole_and_printed(kind, capsys):
    table = cost_table(kind)
    assert list(table) == list(COSTS)
    assert main(["describe", kind, "--width", "24"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, text in table.items():
        assert f"{name} {text}" in printed, f"zoo describe prints no {name}"


def test_a_missing_line_is_named(monkeypatch):
    cls = zoo.registry.block_class("swiglu")
    monkeypatch.setattr(cls, "__doc__", cls.__doc__.replace("        prefill:", "        pre-fill:"))
    with pytest.raises(ValueError, match="SwiGLU has no cost line for prefill"):
        cost_table("swiglu")
