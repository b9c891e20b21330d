"""Small language models of one mixer each, all of the same number of parameters.

A layer is the mixer and a SwiGLU, each in its norm and residual; the SwiGLU's hidden width is what makes the counts
equal, so that residual width, depth, embedding and head are the same for all.
"""

from typing import Any

from zoo.model import LanguageModel

WIDTH, LAYERS = 64, 2
PARAMETERS = 120_000
TOLERANCE = 0.03

# A mixer: a block's kind and options. States are of the papers' sizes, or as large as a width of 64 asks for.
MIXERS: dict[str, dict[str, Any]] = {
    "mamba": {"kind": "mamba"},
    "gqa": {"kind": "gqa", "heads": 4},
    "s4d": {"kind": "s4d"},
    "mamba2": {"kind": "mamba2", "state_size": 64, "head_dim": 32},
    "gqa_alibi": {"kind": "gqa", "heads": 4, "position": {"kind": "alibi"}},
    "dss": {"kind": "dss"},
    "linear_attention": {"kind": "linear_attention", "heads": 2, "position": {"kind": "rotary"}},
    "hyena": {"kind": "hyena", "length": 256},
    "h3": {"kind": "h3"},
    "mamba3": {"kind": "mamba3", "state_size": 64, "head_dim": 32},
    "s5": {"kind": "s5"},
    "rwkv4": {"kind": "rwkv4"},
    "s4": {"kind": "s4"},
    "liquid_s4": {"kind": "liquid_s4"},
    "gss": {"kind": "gss", "state_size": 64},
}


def model(mixer: dict[str, Any], vocab_size: int, hidden: int, init_std: float = 0.02) -> LanguageModel:
    layer = {"repeat": LAYERS, "blocks": [mixer, {"kind": "swiglu", "hidden": hidden}]}
    config = {"vocab_size": vocab_size, "width": WIDTH, "tied_embeddings": False, "init_std": init_std}
    return LanguageModel(config | {"stack": [layer]})


def count(built: LanguageModel) -> int:
    return sum(each.numel() for each in built.parameters())


def matched(
    mixer: dict[str, Any], vocab_size: int, init_std: float = 0.02, parameters: int = PARAMETERS
) -> tuple[LanguageModel, int]:
    """The model whose number of parameters is nearest to `parameters`, and its SwiGLU's hidden width.

    `parameters` is without embedding and head. Raises ValueError where none comes within TOLERANCE.
    """
    target = parameters + 2 * vocab_size * WIDTH
    least = count(model(mixer, vocab_size, 1))
    hidden = max(1, 1 + round((target - least) / (3 * WIDTH * LAYERS)))
    built = model(mixer, vocab_size, hidden, init_std)
    if abs(count(built) - target) > TOLERANCE * target:
        raise ValueError(
            f"{mixer} has {count(built)} parameters with hidden={hidden}, more than {TOLERANCE:.0%} from {target}; "
            "choose smaller options or raise the number of parameters"
        )
    return built, hidden
