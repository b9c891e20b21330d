"""The laws every block obeys. Each is a function of a block maker and a dtype that raises AssertionError when broken.

`make(dtype)` returns a fresh block in eval mode. tests/test_laws.py runs every law over the whole registry;
tests/test_laws_can_fail.py shows for each law a block that breaks it.
"""

import inspect
import io
from collections.abc import Callable

import torch
import yaml
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

import ops
import zoo
from tests.measure import (
    BATCH,
    LENGTHS,
    TIME,
    WIDTH,
    close,
    gradients,
    implementations_met,
    inputs,
    place,
    run_chunks,
    same_gradients,
)
from zoo.block import Block, leaves, map_state, move, repeat, select, snapshot, state_bytes

Make = Callable[[torch.dtype], Block]
EXACT = (torch.float64, torch.float32)
# Laws by name, with the dtypes in which they are checked.
LAWS: dict[str, tuple[Callable[[Make, torch.dtype], None], tuple[torch.dtype, ...]]] = {}


def law(*dtypes: torch.dtype):
    def register(function):
        LAWS[function.__name__] = (function, dtypes or EXACT)
        return function

    return register


# The contract ---------------------------------------------------------------------------------------------------


@law(*EXACT, torch.bfloat16)
def contract(make: Make, dtype: torch.dtype) -> None:
    """Shape and dtype are kept; None in, None out; a state is a NamedTuple with batch first in every leaf."""
    block, x = make(dtype), inputs(dtype)
    y, state, aux = block(x)
    assert y.shape == x.shape and y.dtype == dtype, f"y is {tuple(y.shape)} {y.dtype}"
    assert state is None, "a state came out although none was given"
    assert all(isinstance(value, Tensor) for value in aux.values()), "aux holds something that is not a tensor"
    if not block.causal:
        return
    first = block.init_state(BATCH, dtype=dtype)
    kinds = [leaf.dtype for leaf in leaves(first)]
    _, state, _ = block(x, first)
    assert hasattr(state, "_fields"), f"the state is a {type(state).__name__}, not a NamedTuple"
    assert all(leaf.shape[0] == BATCH for leaf in leaves(state)), "a leaf's first dimension is not the batch"
    assert [leaf.dtype for leaf in leaves(state)] == kinds, "a leaf's dtype changed"
    try:
        block(x[..., :-1])
    except ValueError as error:
        assert str(WIDTH) in str(error), f"the error does not name the width: {error}"
    else:
        raise AssertionError("an input of the wrong width was taken")


@law(torch.bfloat16)
def precision(make: Make, dtype: torch.dtype) -> None:
    """bfloat16 stays near float64."""
    block, exact = make(dtype), make(torch.float64)
    exact.load_state_dict({name: value.double() for name, value in block.state_dict().items()})
    x = inputs(dtype)
    found, wanted = block(x).y.double(), exact(x.double()).y
    error = (found - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt()
    assert error < 0.05, f"bfloat16 is off by {error:.3g} of the root mean square"


# Time -----------------------------------------------------------------------------------------------------------


@law()
def causality(make: Make, dtype: torch.dtype) -> None:
    """Changing later tokens changes no earlier output."""
    block, x = make(dtype), inputs(dtype)
    if not block.causal:
        return
    whole = block(x).y
    for cut in (1, 13, 36):
        other = x.clone()
        other[:, cut:] = inputs(dtype, seed=2)[:, cut:]
        close(block(other).y[:, :cut], whole[:, :cut], dtype, f"outputs before {cut}", scale=0.1)


@law()
def chunks(make: Make, dtype: torch.dtype) -> None:
    """Any split into chunks gives the whole, and the state goes on alike."""
    block, x = make(dtype), inputs(dtype)
    if not block.causal:
        return
    whole, end = block(x, block.init_state(BATCH, dtype=dtype))[:2]
    close(block(x).y, whole, dtype, "without a state")
    after = block(inputs(dtype, 5, seed=3), snapshot(end)).y
    for sizes in ([1, 36], [36, 1], [5, 9, 1, 1, 21], [17, 20]):
        y, state = run_chunks(block, x, sizes)
        close(y, whole, dtype, f"chunks {sizes}")
        close(block(inputs(dtype, 5, seed=3), state).y, after, dtype, f"what follows chunks {sizes}")


@law()
def token_by_token(make: Make, dtype: torch.dtype) -> None:
    """One token at a time gives the whole."""
    block, x = make(dtype), inputs(dtype)
    if not block.causal:
        return
    with torch.no_grad():
        close(run_chunks(block, x, [1] * TIME)[0], block(x).y, dtype, "token by token")


# Segments -------------------------------------------------------------------------------------------------------


@law()
def padding(make: Make, dtype: torch.dtype) -> None:
    """Padding (left, right, between; full of NaN) changes neither outputs, nor gradients, nor what follows."""
    block, x = make(dtype), inputs(dtype)
    follow = inputs(dtype, 3, seed=4)
    for where in ("left", "right", "between"):
        padded, segments = place(x, where)
        y = block(padded, None, segments).y
        assert (y[segments == 0] == 0).all(), f"padding on the {where}: its output is not zero"
        wanted_gradient = {name: torch.zeros_like(value) for name, value in block.named_parameters()}
        for row, length in enumerate(LENGTHS):
            alone = x[row : row + 1, :length]
            close(y[row][segments[row] == 1], block(alone).y[0], dtype, f"row {row}, padding {where}")
            for name, value in _parameter_gradients(block, alone, None, row).items():
                wanted_gradient[name] += value
        found_gradient = _parameter_gradients(block, padded, segments, None)
        same_gradients(found_gradient, wanted_gradient, dtype, f"padding {where}")
        leak = gradients(block, padded, lambda v, s=segments: block(v, None, s).y)["x"][segments == 0]
        assert (leak == 0).all(), f"padding on the {where} has a gradient"
        if block.causal:
            _padding_in_state(block, x, padded, segments, follow, dtype, where)


def _parameter_gradients(block: Block, x: Tensor, segments: Tensor | None, row: int | None) -> dict[str, Tensor]:
    y = block(x, None, segments).y
    wave = torch.linspace(0, 9, LENGTHS[0] * WIDTH, dtype=torch.float64).cos().reshape(LENGTHS[0], WIDTH).to(y.dtype)
    if segments is None:
        total = (y[0] * wave[: y.shape[1]]).sum()
    else:
        total = sum((y[r][segments[r] == 1] * wave[:length]).sum() for r, length in enumerate(LENGTHS))
    parameters = dict(block.named_parameters())
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True) if parameters else ()
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def _padding_in_state(block, x, padded, segments, follow, dtype, where) -> None:
    sizes = [11, 1, 20, padded.shape[1] - 32]
    y, state = run_chunks(block, padded, sizes, segments)
    goes_on = block(follow, state).y
    for row, length in enumerate(LENGTHS):
        alone, end = block(x[row : row + 1, :length], block.init_state(1, dtype=dtype))[:2]
        close(y[row][segments[row] == 1], alone[0], dtype, f"row {row}, padding {where}, in chunks")
        close(goes_on[row], block(follow[row : row + 1], end).y[0], dtype, f"what follows row {row}, padding {where}")


@law()
def packed(make: Make, dtype: torch.dtype) -> None:
    """Documents packed into a row are each as if alone: outputs, gradients, and across chunks that carry a state."""
    block, x = make(dtype), inputs(dtype)
    segments = torch.zeros(BATCH, TIME, dtype=torch.long)
    documents = [[(0, 9, 1), (9, 10, 2), (10, 37, 7)], [(0, 20, 3), (22, 35, 1)], [(1, 37, 5)]]
    for row, parts in enumerate(documents):
        for start, end, name in parts:
            segments[row, start:end] = name
    y = block(x, None, segments).y
    for row, parts in enumerate(documents):
        for start, end, _ in parts:
            alone = block(x[row : row + 1, start:end]).y
            close(y[row : row + 1, start:end], alone, dtype, f"row {row}, document {start}:{end}")
    found = gradients(block, x, lambda v: block(v, None, segments).y[0:1, 10:])["x"]
    wanted = gradients(block, x[0:1, 10:], lambda v: block(v).y)["x"]
    close(found[0:1, 10:], wanted, dtype, "gradient inside a document", scale=10)
    assert (found[:, :10] == 0).all() and (found[1:] == 0).all(), "a gradient crossed into another document or row"
    if block.causal:
        for sizes in ([10, 27], [1] * TIME, [9, 12, 16]):
            close(run_chunks(block, x, sizes, segments)[0], y, dtype, f"packed, chunks {sizes[:3]}")
        _same_or_another(block, x, dtype)


def _same_or_another(block: Block, x: Tensor, dtype: torch.dtype) -> None:
    """The same id goes on, another resets, no segments goes on."""
    name = torch.full((BATCH, TIME), 4)
    first, state, _ = block(x[:, :20], block.init_state(BATCH, dtype=dtype), name[:, :20])
    whole = block(x).y
    close(first, whole[:, :20], dtype, "one document")
    kept = [snapshot(state) for _ in range(3)]
    close(block(x[:, 20:], kept[0], name[:, 20:]).y, whole[:, 20:], dtype, "the same id")
    close(block(x[:, 20:], kept[1]).y, whole[:, 20:], dtype, "no segments")
    fresh = block(x[:, 20:]).y
    close(block(x[:, 20:], kept[2], name[:, 20:] + 1).y, fresh, dtype, "another id")


@law(torch.float64)
def bidirectional(make: Make, dtype: torch.dtype) -> None:
    """A bidirectional block sees later tokens, takes no state and is refused by a causal model by name."""
    block, x = make(dtype), inputs(dtype)
    if block.causal:
        return
    other = x.clone()
    other[:, 13:] = inputs(dtype, seed=2)[:, 13:]  # many: where experts choose tokens, one more may not be chosen
    assert not torch.equal(block(x).y[:, :13], block(other).y[:, :13]), "it does not look at later tokens"
    try:
        block(x, zoo.NoState())
    except ValueError as error:
        assert "bidirectional" in str(error)
    else:
        raise AssertionError("it took a state")


# States ---------------------------------------------------------------------------------------------------------


@law()
def select_commutes(make: Make, dtype: torch.dtype) -> None:
    """Selecting, reordering and repeating rows of a state commutes with forward."""
    block, x = make(dtype), inputs(dtype)
    if not block.causal:
        return
    with torch.no_grad():
        follow = inputs(dtype, 6, seed=5)
        prefix = block(x, block.init_state(BATCH, dtype=dtype)).state
        wanted = block(follow, snapshot(prefix)).y
        for order in ([2, 0, 1], [1], [0, 0, 2, 2, 1]):
            index = torch.tensor(order)
            close(block(follow[index], select(prefix, index)).y, wanted[index], dtype, f"rows {order}")
        twice = block(follow.repeat_interleave(2, 0), repeat(prefix, 2)).y
        close(twice, wanted.repeat_interleave(2, 0), dtype, "each row twice")
        moved = block(follow, move(snapshot(prefix), "cpu")).y
        close(moved, wanted, dtype, "moved")


@law()
def rolls_back(make: Make, dtype: torch.dtype) -> None:
    """A snapshot stays as it was while the state goes on, so that one can come back to it."""
    block, x = make(dtype), inputs(dtype)
    if not block.causal:
        return
    with torch.no_grad():
        whole = block(x).y
        state = block(x[:, :20], block.init_state(BATCH, dtype=dtype)).state
        kept = snapshot(state)
        for t in range(9):
            state = block(inputs(dtype, 1, seed=6 + t), state).state
        close(block(x[:, 20:], kept).y, whole[:, 20:], dtype, "after coming back")


@law()
def gradient_through_state(make: Make, dtype: torch.dtype) -> None:
    """Gradients flow into a given state and out of a returned one: chunked training without detaching is exact."""
    block, x = make(dtype), inputs(dtype)
    if not block.causal:
        return
    wanted = gradients(block, x, lambda v: block(v).y)
    for sizes in ([20, 17], [36, 1]):
        found = gradients(block, x, lambda v, s=sizes: run_chunks(block, v, s)[0])
        same_gradients(found, wanted, dtype, f"chunks {sizes}")


@law()
def state_size(make: Make, dtype: torch.dtype) -> None:
    """The declared bytes are the measured ones, at several lengths."""
    block = make(dtype)
    if not block.causal:
        return
    with torch.no_grad():
        for time in (1, 7, TIME, 150):
            state = block(inputs(dtype, time), block.init_state(BATCH, dtype=dtype)).state
            measured, declared = state_bytes(state) / BATCH, block.state_bytes(time, dtype=dtype)
            assert measured == declared, f"after {time} tokens a row holds {measured} bytes, declared are {declared}"


# Implementations ------------------------------------------------------------------------------------------------


def same_answers(make: Make, dtype: torch.dtype, given: Tensor | None, names: Callable[[set[str]], set[str]]) -> None:
    """The implementations that are named, of those met, equal the reference in values, states and gradients."""
    block = make(dtype)
    x, follow = inputs(dtype, 11), inputs(dtype, 2, seed=3)

    def outcome() -> list[tuple[str, Tensor]]:
        outputs: list[Tensor] = []

        def run(v: Tensor) -> Tensor:
            outputs.append(block(v, None, given).y)
            return outputs[0]

        found = list(gradients(block, x, run).items())
        found.append(("y", outputs[0].detach()))
        if block.causal:
            state = block(x, block.init_state(BATCH, dtype=dtype), given).state
            found.append(("what follows the state", block(follow, state).y))
        return found

    with ops.use("reference"), implementations_met() as met:
        wanted = dict(outcome())
    for name in sorted(names(met)):
        with ops.use(name):
            for key, value in outcome():
                close(value, wanted[key], dtype, f"{name}, {key}", scale=1 if key == "y" else 10)


def documents() -> Tensor:
    return torch.tensor([[1] * 11, [0, 1, 1, 1, 0, 2, 2, 2, 2, 3, 0], [4] * 5 + [0] * 6])


@law(*EXACT, torch.bfloat16)
def implementations(make: Make, dtype: torch.dtype) -> None:
    """Every implementation that runs here equals the reference, with segments and without."""
    for given in (None, documents()):
        same_answers(make, dtype, given, lambda met: met - {"reference", "triton"})


@law(torch.float32)
def interpreted(make: Make, dtype: torch.dtype) -> None:
    """The Triton kernels, interpreted, equal the reference. The interpreter takes seconds a block: ops' own tests hold
    other dtypes and calls without segments."""
    same_answers(make, dtype, documents(), lambda met: met & {"triton"})


# Keeping --------------------------------------------------------------------------------------------------------


@law(torch.float32)
def save_and_load(make: Make, dtype: torch.dtype) -> None:
    """Weights and states go through safetensors and come back bitwise."""
    block, x = make(dtype), inputs(dtype)
    kept = load_safetensors(save_safetensors({k: v.contiguous() for k, v in block.state_dict().items()}))
    torch.manual_seed(123)
    other = make(dtype)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(kept)
    with torch.no_grad():
        assert torch.equal(block(x).y, other(x).y), "loaded weights give another output"
        if block.causal:
            state = block(x, block.init_state(BATCH, dtype=dtype)).state
            values = load_safetensors(
                save_safetensors({str(i): leaf.contiguous() for i, leaf in enumerate(leaves(state))})
            )
            order = iter(range(len(values)))
            restored = map_state(lambda leaf: values[str(next(order))], snapshot(state))
            assert torch.equal(block(x, state).y, block(x, restored).y), "a loaded state goes on differently"
    buffer = io.BytesIO()
    torch.save(block, buffer)  # the whole module pickles too: spawned workers need it


@law(torch.float32)
def config_round_trip(make: Make, dtype: torch.dtype) -> None:
    """Every option has a default that is plain data, and a block built from YAML of them is the default block."""
    cls = type(make(dtype))
    options = {n: p.default for n, p in inspect.signature(cls).parameters.items() if n != "width"}
    assert inspect.Parameter.empty not in options.values(), f"an option has no default: {options}"
    try:
        back = yaml.safe_load(yaml.safe_dump(options))
    except yaml.YAMLError as error:
        raise AssertionError(f"a default is not plain data: {error}") from None
    assert back == options, f"YAML gives back {back}, not {options}"
    shapes = [{n: p.shape for n, p in each.named_parameters()} for each in (cls(WIDTH), cls(WIDTH, **back))]
    assert shapes[0] == shapes[1], "a block built from YAML has other parameters"


@law(torch.float32)
def meta_device(make: Make, dtype: torch.dtype) -> None:
    """A block can be built without memory, for counting and for loading into."""
    block = make(dtype)
    with torch.device("meta"):
        empty = make(dtype)
    assert all(p.is_meta for p in empty.parameters()), "a parameter was made on another device"
    shapes = {n: p.shape for n, p in block.named_parameters()}
    assert shapes == {n: p.shape for n, p in empty.named_parameters()}, "shapes differ"


# Robustness -----------------------------------------------------------------------------------------------------


@law(torch.float32, torch.bfloat16)
def finite(make: Make, dtype: torch.dtype) -> None:
    """Long sequences, large, tiny and constant inputs give finite outputs and gradients."""
    block = make(dtype)
    cases = {
        "long": inputs(dtype, 1500, batch=1),
        "large": inputs(dtype) * 1e3,
        "tiny": inputs(dtype) * 1e-20,
        "zero": torch.zeros_like(inputs(dtype)),
        "constant": torch.full_like(inputs(dtype), 7.0),
    }
    for name, x in cases.items():
        for key, value in gradients(block, x, lambda v: block(v).y).items():
            assert torch.isfinite(value).all(), f"{name} inputs: gradient of {key} is not finite"
        assert torch.isfinite(block(x).y).all(), f"{name} inputs: output is not finite"


@law(torch.float32)
def compiles(make: Make, dtype: torch.dtype) -> None:
    """torch.compile takes the whole block as one graph, forward and backward, and a decoding step too."""
    block, x = make(dtype), inputs(dtype)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    outputs: list[Tensor] = []

    def run(called: Callable, v: Tensor) -> Tensor:
        outputs.append(called(v).y)  # one call for outputs and gradients: another would be compiled again, for seconds
        return outputs[-1]

    wanted = gradients(block, x, lambda v: run(block, v))
    same_gradients(gradients(block, x, lambda v: run(compiled, v)), wanted, dtype, "compiled")
    close(outputs[1].detach(), outputs[0].detach(), dtype, "compiled")
    if block.causal:
        with torch.no_grad():
            state = block(x, block.init_state(BATCH, dtype=dtype)).state
            step = inputs(dtype, 1, seed=2)
            wanted_step = block(step, snapshot(state)).y
            close(compiled(step, state).y, wanted_step, dtype, "a compiled step")
