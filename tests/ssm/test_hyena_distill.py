"""Distilling Hyena: known modes are found, errors are what is told, fall with modes, and models keep working."""

import cmath
from itertools import pairwise

import pytest
import torch
import yaml

import zoo
from zoo.block import state_bytes
from zoo.ssm import hyena_distill
from zoo.ssm.hyena import Hyena
from zoo.ssm.hyena_distill import distill_model, fit
from zoo.ssm.hyena_modal import HyenaModal

SMOOTH = {"length": 128, "frequency": 1.0, "filter_width": 16, "bands": 4}


def values(block: HyenaModal, stage: int, channel: int, taps: int) -> list[float]:
    """A modal filter with D at lag 0, in plain numbers from the parameters."""
    each = block.filters[stage]
    decay, angle = each.log_decay[channel].double().exp().tolist(), each.angle[channel].tolist()
    residues = [complex(*pair) for pair in each.residue[channel].tolist()]
    modes = list(zip(residues, (complex(-d, w) for d, w in zip(decay, angle, strict=True)), strict=True))
    found = [2 * sum((r * cmath.exp(log_a * lag)).real for r, log_a in modes) for lag in range(taps)]
    return [found[0] + each.D[channel].item(), *found[1:]]


def test_modes_of_a_modal_filter_are_found():
    lag = torch.arange(200, dtype=torch.float64)
    log_a = torch.tensor([[-0.05 + 0.3j, -0.01 + 1.1j, -0.2 + 2.5j], [-0.02 + 0.9j, -0.03 + 1.0j, -0.5 + 0.1j]])
    residue = torch.tensor([[1.0 + 0.5j, -0.3j, 0.7 + 0j], [0.2 - 1j, 0.4 + 0.1j, 1 + 1j]])
    log_a, residue = log_a.to(torch.complex128), residue.to(torch.complex128)
    h = 2 * (residue[..., None] * torch.exp(log_a[..., None] * lag)).sum(1).real
    found, weights = fit(h, 3)
    order = found.imag.argsort(1)
    wanted = log_a.imag.argsort(1)
    torch.testing.assert_close(found.gather(1, order), log_a.gather(1, wanted), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights.gather(1, order), residue.gather(1, wanted), rtol=1e-3, atol=1e-3)


def test_modes_may_be_real_numbers():
    """A mode and its conjugate coincide there, and one filter may have more of them than complex ones."""
    lag = torch.arange(100, dtype=torch.float64)
    h = torch.stack([0.9**lag - 0.5 * 0.7**lag, (-0.8) ** lag + 0.95**lag, 0.9**lag])
    log_a, residue = fit(h, 2)
    made = 2 * (residue[..., None] * torch.exp(log_a[..., None] * lag)).sum(1).real
    torch.testing.assert_close(made[:, 1:], h[:, 1:], rtol=0, atol=1e-6)


def test_errors_are_what_is_told():
    block = Hyena(5, order=3, **SMOOTH).double()
    made = block.distill(3)
    assert made.l2.shape == made.linf.shape == (2, 5)
    wanted = block.filter(128)
    wanted[:, 0] += block.D
    for stage in range(2):
        for channel in range(5):
            h = wanted[stage * 5 + channel].detach()
            error = torch.tensor(values(made.block, stage, channel, 128), dtype=torch.float64) - h
            assert abs(error[0]) < 1e-9, "lag 0 is not exact"
            h[0] -= block.D[stage * 5 + channel]
            torch.testing.assert_close(made.l2[stage, channel], error.norm() / h.norm(), rtol=1e-6, atol=1e-9)
            told = error.abs().max() / h.abs().max()
            torch.testing.assert_close(made.linf[stage, channel], told, rtol=1e-6, atol=1e-9)


def test_errors_fall_with_modes():
    block = Hyena(8, **SMOOTH)
    errors = [block.distill(modes) for modes in (1, 2, 4, 8)]
    medians = [each.l2.median().item() for each in errors]
    assert all(b < 0.7 * a for a, b in pairwise(medians)), medians
    assert medians[-1] < 0.02
    x = torch.randn(2, 128, 8)
    wanted = block(x).y
    changes = [(each.block(x).y - wanted).norm().item() for each in errors]
    assert changes == sorted(changes, reverse=True) and changes[-1] < 0.02 * wanted.norm().item(), changes


def test_the_last_fit_improves_on_the_hankel_matrix(monkeypatch):
    """In every channel: a step that does not is not taken. Rough filters gain by it."""
    block = Hyena(8, length=128)
    refined = block.distill(6)
    monkeypatch.setattr(hyena_distill, "STEPS", 0)
    start = block.distill(6)
    assert (refined.l2 <= start.l2 * 1.001).all()
    assert refined.l2.mean() < 0.9 * start.l2.mean()


def test_float32_keeps_what_the_fit_found():
    """Modes may cancel one another; not by so much that rounding shows."""
    block = Hyena(8, length=128)
    rounded, exact = block.distill(20).l2, block.double().distill(20).l2
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=1e-3)


def test_the_block_keeps_its_place_and_its_own():
    block = Hyena(6, order=3, conv_width=2, **SMOOTH).eval()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    made = block.distill(2, taps=40).block
    assert not made.training and made.order == 3 and made.conv.taps == 2 and made.modes == 2
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    made.in_proj.weight.data.zero_()
    assert torch.equal(block.in_proj.weight, before["in_proj.weight"]), "the two share memory"


def test_a_filter_of_zeros_stays_one():
    block = Hyena(3, **SMOOTH)
    block.filter.out.weight.data[1] = 0
    made = block.distill(2)
    assert made.block.filters[0].kernel(30)[1].abs().max() == 0
    assert made.l2.isfinite().all() and made.l2[0, 1] == 0
    assert all(each.isfinite().all() for each in made.block.parameters())


# Models --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> zoo.LanguageModel:
    stack = [
        {"repeat": 2, "blocks": [{"kind": "hyena", **SMOOTH}, "swiglu"]},
        {"kind": "gqa", "heads": 2},
        {"kind": "hyena", "order": 3, **SMOOTH},
    ]
    return zoo.LanguageModel({"vocab_size": 31, "width": 12, "stack": stack, "init_std": 0.5, "dropout": 0.1})


def test_a_model_tells_the_change_in_its_logits(model):
    tokens = torch.randint(31, (2, 90))
    before = model.eval()(tokens).logits.detach()
    model.train()
    told = {modes: distill_model(model, modes, tokens) for modes in (1, 8)}
    assert model.training and told[8].model.training
    model.eval()
    assert torch.equal(model(tokens).logits, before), "the model itself has changed"
    for each in told.values():
        assert list(each.filters) == [0, 2, 5]
        after = each.model.eval()(tokens).logits.detach()
        assert each.logits_linf == pytest.approx((after - before).abs().max().item(), rel=1e-4)
        spread = before - before.mean(-1, keepdim=True)
        assert each.logits_l2 == pytest.approx(((after - before).norm() / spread.norm()).item(), rel=1e-4)
        same = (after.argmax(-1) == before.argmax(-1)).float().mean().item()
        assert each.agreement == pytest.approx(same, abs=1e-6)
    assert told[8].logits_l2 < 0.3 * told[1].logits_l2
    assert told[8].agreement >= told[1].agreement


def test_a_distilled_model_saves_and_decodes_from_a_constant_state(model):
    tokens = torch.randint(31, (2, 40))
    new = distill_model(model.eval(), 4, tokens).model
    config = zoo.ModelConfig.from_dict(yaml.safe_load(new.config.to_yaml()))
    other = zoo.LanguageModel(config).eval()
    other.load_state_dict(new.state_dict())
    with torch.no_grad():
        whole = new(tokens).logits
        assert torch.equal(other(tokens).logits, whole)
        state, found = other.init_state(2), []
        for t in range(40):
            out = other(tokens[:, t : t + 1], state)
            state = out.state
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-3, atol=1e-3)
    fresh = other.init_state(2)
    for index in (0, 2, 5):
        assert state_bytes(state[index]) == state_bytes(fresh[index])


def test_bad_wishes_are_named(model):
    block = Hyena(4, **SMOOTH)
    with pytest.raises(ValueError, match="modes=0 must be a positive integer"):
        block.distill(0)
    with pytest.raises(ValueError, match=r"taps=20 must be an integer from 34 to fit modes=8.*fewer modes"):
        block.distill(8, taps=20)
    plain = zoo.LanguageModel({"vocab_size": 5, "width": 8, "stack": ["swiglu", {"kind": "gqa", "heads": 2}]})
    with pytest.raises(ValueError, match="no hyena block to distill; its stack holds swiglu, gqa"):
        distill_model(plain, 2, torch.zeros(1, 4, dtype=torch.long))
