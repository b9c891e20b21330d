"""Every law over the whole registry: registering a block tests it."""

import json

import pytest
import torch

import zoo
from tests.laws import LAWS
from tests.measure import WIDTH
from tests.variants import VARIANTS

# Seconds a block, and the same kernels for all options of a kind: its first ones only.
SLOW = ("interpreted",)
CASES = [
    pytest.param(
        kind, options, name, dtype, id=f"{kind}{json.dumps(options) if options else ''}-{name}-{str(dtype)[6:]}"
    )
    for kind in zoo.kinds()
    for variant, options in enumerate(VARIANTS.get(kind, [{}]))
    for name, (_, dtypes) in LAWS.items()
    if variant == 0 or name not in SLOW
    for dtype in dtypes
]


def maker(kind: str, options: dict):
    def make(dtype: torch.dtype) -> zoo.Block:
        torch.manual_seed(7)
        block = zoo.block(kind, WIDTH, **options)
        with torch.no_grad():  # away from zeros and ones of the initialisation, where mistakes hide
            for parameter in block.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return block.to(dtype).eval()

    return make


@pytest.mark.parametrize(("kind", "options", "name", "dtype"), CASES)
def test_law(kind, options, name, dtype):
    LAWS[name][0](maker(kind, options), dtype)


def test_config_round_trip():
    """A stack of every kind and variant goes through YAML and back: same data, same parameters."""
    import yaml

    stack = [{"kind": kind, **options} for kind in zoo.kinds() for options in VARIANTS.get(kind, [{}])]
    config = zoo.ModelConfig(vocab_size=11, width=WIDTH, stack=stack, objective="masked")
    back = zoo.ModelConfig.from_dict(yaml.safe_load(config.to_yaml()))
    assert back == config
    shapes = [{n: p.shape for n, p in zoo.LanguageModel(each).named_parameters()} for each in (config, back)]
    assert shapes[0] == shapes[1]
