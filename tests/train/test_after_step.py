"""What blocks do after an optimizer step: once, with the counts of all its batches and ranks, and through a resume."""

import re
import warnings

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from tests.train.helpers import DENSE, data, finish, module, network, start, trainer, write_config, write_text
from train.checkpoint import AtomicCheckpointIO, Checkpoints, read
from train.experts import DeadExperts, dead
from train.metrics import scalars
from train.module import LanguageModule, load_pretrained
from zoo.block import Block, Out, add_sums
from zoo.model import LanguageModel


def moe(kind, experts=4, top_k=2, **options):
    options = {"kind": kind} | options
    return {"kind": "moe", "experts": experts, "top_k": top_k, "hidden": 16, "router": options, "load_balance": 0.0}


LOSS_FREE = moe("loss_free", update_rate=0.01)
STABLE = moe("stable", top_k=1, stage_steps=4)
SMOE = moe("smoe_dropout", top_k=1, steps=6)
# Its own losses left out, a batch's gradient is the mean of its parts'.
ROUTED = [*DENSE, LOSS_FREE, SMOE, moe("stable", stage_steps=2, balance=0.0)]
LENGTH = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


class Record(Block):
    """Counts the tokens that it sees and keeps what after_step tells it."""

    def __init__(self, width):
        super().__init__(width)
        self.told = []

    def forward(self, x, state=None, segments=None):
        aux = {"sum/tokens": x.new_tensor(x.shape[0] * x.shape[1]), "stat/one": x.new_ones(())} if self.training else {}
        return Out(x, state, aux)

    def after_step(self, step, sums):
        self.told.append((step, {name: float(value) for name, value in sums.items()}))


class Composite(Block):
    """Two records, one in a module that is no block, named by their paths."""

    def __init__(self, width):
        super().__init__(width)
        self.first = Record(width)
        self.rest = torch.nn.ModuleList([Record(width)])

    def forward(self, x, state=None, segments=None):
        aux = {}
        for path, part in (("first", self.first), ("rest.0", self.rest[0])):
            x, _, found = part(x)
            aux |= {f"{path}/{name}": value for name, value in found.items()}
        return Out(x, state, aux)


def fit(one, source, folder, **options):
    running = trainer(folder, **options)
    running.fit(one, datamodule=source)
    return running


def buffers(one):
    return {name: value.clone() for name, value in one.network.named_buffers()}


# Who is called, with what ---------------------------------------------------------------------------------------


def test_every_block_is_called_once_a_step_with_its_own_sums(text, tmp_path):
    one = module(network(["swiglu", "swiglu"]))
    one.network.residuals[0].block, one.network.residuals[1].block = Record(16), Composite(16)
    fit(one, data(text), tmp_path, max_steps=3, accumulate_grad_batches=4, val_check_interval=2)
    tokens = 4.0 * 4 * LENGTH
    composite = one.network.residuals[1].block
    for record in (one.network.residuals[0].block, composite.first, composite.rest[0]):
        assert record.told == [(step, {"sum/tokens": tokens}) for step in (1, 2, 3)]


def test_a_block_without_sums_is_called_and_eval_mode_has_none():
    model = LanguageModel(network(["swiglu", LOSS_FREE]))
    tokens = torch.randint(256, (1, 5))
    assert [name for name in model(tokens).aux if "sum/" in name] == ["blocks.1/sum/choices"]
    assert not [name for name in model.eval()(tokens).aux if "sum/" in name]
    model.residuals[0].block = Record(16)
    model.after_step(7, {})
    assert model.residuals[0].block.told == [(7, {})]


def test_a_loop_of_ones_own():
    """As LanguageModel.after_step describes it."""
    torch.manual_seed(1)
    model = LanguageModel(network([LOSS_FREE, SMOE]))
    total = {}
    counts = torch.zeros(4, dtype=torch.long)
    for tokens in torch.randint(256, (3, 2, 9)):
        aux = model(tokens).aux
        counts += aux["blocks.0/sum/choices"]
        add_sums(total, aux)
    assert set(total) == {"blocks.0/sum/choices", "blocks.1/sum/choices"}
    assert torch.equal(total["blocks.0/sum/choices"], counts)
    model.after_step(1, total)
    router = model.residuals[0].block.router
    assert torch.equal(router.bias, 0.01 * (counts.double().mean() - counts).sign().float())
    assert model.residuals[1].block.router.step == 1


# Accumulation and recomputation -------------------------------------------------------------------------------


def run(text, folder, size=8, accumulated=1, steps=5, **options):
    torch.manual_seed(0)
    one = module(network(ROUTED), **options)
    source = data(text, batch_size=size, documents="stream", seed=1)
    per_step = []

    class Keep(DeadExperts):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if not trainer.fit_loop._should_accumulate():
                per_step.append(dict(pl_module.sums))

    settings = {"accumulate_grad_batches": accumulated, "precision": "64-true", "callbacks": [Keep()]}
    running = fit(one, source, folder, max_steps=steps, limit_val_batches=0, **settings)
    assert running.global_step == steps
    return one, per_step


def same_runs(found, wanted):
    one, per_step = found
    other, expected = wanted
    assert len(per_step) == len(expected) == 5
    for sums, wanted_sums in zip(per_step, expected, strict=True):
        assert sums.keys() == wanted_sums.keys()
        assert all(torch.equal(value, wanted_sums[name]) for name, value in sums.items())
        assert int(sums["blocks.2/sum/choices"].sum()) == 2 * 8 * LENGTH
    for name, value in buffers(one).items():
        torch.testing.assert_close(value, buffers(other)[name], rtol=0, atol=1e-8, msg=name)
    assert torch.equal(one.network.residuals[2].block.router.bias, other.network.residuals[2].block.router.bias)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    return run(text, tmp_path_factory.mktemp("whole"))


def test_the_routers_went_through_their_schedules(whole):
    one, per_step = whole
    routers = [each.block.router for each in one.network.residuals[2:]]
    assert routers[0].bias.abs().max() == pytest.approx(0.05)
    assert routers[1].step == routers[2].step == 5
    # k = 1 + round(3 · step / 6) of the steps 0 to 4; Python rounds a half to the even number.
    assert [int(each["blocks.3/sum/choices"].sum()) // (8 * LENGTH) for each in per_step] == [1, 1, 2, 3, 3]
    assert routers[2].stage == 2


def test_four_micro_batches_are_one_batch(text, tmp_path, whole):
    same_runs(run(text, tmp_path, size=2, accumulated=4), whole)


def test_activation_checkpointing_counts_once(text, tmp_path, whole):
    same_runs(run(text, tmp_path, activation_checkpointing=True), whole)


def test_a_step_that_float16_skips_moves_nothing(text, tmp_path):
    """The first scale overflows, so the first steps are skipped; then one is done."""
    one = module(network([*DENSE, LOSS_FREE, SMOE]))
    told = []
    one.network.after_step = lambda step, sums: told.append((step, int(sums["blocks.2/sum/choices"].sum())))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-60)
    running = fit(
        one, data(text, documents="stream"), tmp_path, max_steps=4, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]
    )
    skipped = round((126 - torch.tensor(scaler.get_scale()).log2().item()) / 60)
    assert running.global_step == 4
    assert 0 < skipped < 4
    assert told == [(step, 2 * 4 * LENGTH) for step in range(skipped + 1, 5)]


# Resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [3, 5])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(text, tmp_path, at):
    """Before and after StableMoE's switch at step 4, with k on its way; the window of dead experts goes on too."""
    stack = [LOSS_FREE, STABLE, SMOE]
    ends = []
    for folder, resumed in ((tmp_path / "whole", None), (tmp_path / "again", at)):
        one, watch = module(network(stack)), DeadExperts(window=7)
        callbacks = [watch, Checkpoints(every=1, keep=9)]
        path = None if resumed is None else str(tmp_path / "whole" / "checkpoints" / f"step-{resumed}.ckpt")
        settings = {"callbacks": callbacks, "plugins": [AtomicCheckpointIO()], "enable_checkpointing": True}
        running = trainer(folder, max_steps=6, accumulate_grad_batches=2, **settings)
        running.fit(one, datamodule=data(text, documents="stream"), ckpt_path=path)
        ends.append((one.network.state_dict(), watch.state_dict(), one))
    (first, window, one), (second, again, _) = ends
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert window["steps"] == again["steps"] == 6
    assert int(window["counts"]["blocks.0/sum/choices"].sum()) == 6 * 2 * 4 * LENGTH * 2
    assert all(torch.equal(value, again["counts"][name]) for name, value in window["counts"].items())
    assert [each.block.router.step for each in one.network.residuals[1:]] == [6, 6]
    assert one.network.residuals[1].block.router.stage == 2
    saved = read(tmp_path / "whole" / "checkpoints" / f"step-{at}.ckpt")["state_dict"]
    assert saved["network.blocks.1.block.router.step"] == at
    assert not torch.equal(saved["network.blocks.0.block.router.bias"], first["blocks.0.block.router.bias"])


def test_a_saved_model_goes_on_where_it_stood(text, tmp_path):
    """The export holds steps and biases; another run, whose own steps begin at 0, does not set them back."""
    one = module(network([LOSS_FREE, moe("stable", stage_steps=2), SMOE]))
    plugins = {"callbacks": [Checkpoints(every=4)], "plugins": [AtomicCheckpointIO()], "enable_checkpointing": True}
    fit(one, data(text), tmp_path / "first", max_steps=4, **plugins)
    loaded = load_pretrained(str(tmp_path / "first" / "model"))
    found = dict(loaded.named_buffers())
    assert all(torch.equal(value, found[name]) for name, value in buffers(one).items())
    stable, smoe = (each.block.router for each in loaded.residuals[1:])
    assert (stable.stage, smoe.train_top_k) == (2, 3)
    fit(LanguageModule(loaded), data(text), tmp_path / "second", max_steps=1)
    assert (stable.step, smoe.step) == (5, 5)
    assert (stable.stage, smoe.train_top_k) == (2, 3)


# Ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_count_together(tmp_path):
    """Biases and steps as of one process with the whole batch, replicated and sharded; the frozen router is whole."""
    text = write_text(tmp_path / "text")
    stack = [*DENSE, LOSS_FREE, SMOE, moe("stable", stage_steps=3, balance=0.0)]
    options = {"precision": "64-true", "max_steps": 5, "val_check_interval": 50}
    config = write_config(tmp_path / "c.yaml", text, stack, **options)
    shared = ["pretrain", "--config", config, "--data.documents", "stream"]
    one = start(*shared, "--trainer.default_root_dir", tmp_path / "one", "--data.batch_size", "8")
    for name in ("ddp", "sharded"):
        two = ["--trainer.devices", "2", "--trainer.strategy", name]
        finish(start(*shared, "--trainer.default_root_dir", tmp_path / name, *two))
    finish(one)
    ends = {}
    for name in ("one", "ddp", "sharded"):
        third, last = (read(tmp_path / name / "checkpoints" / f"step-{step}.ckpt") for step in (3, 5))
        ends[name] = last["state_dict"]
        watch = last["callbacks"]["DeadExperts"]
        assert watch["steps"] == 5
        choices = [int(each.sum()) // (8 * LENGTH) for each in watch["counts"].values()]
        assert choices == [2 * 5, 1 + 1 + 2 + 3 + 3, 2 * 5]
        router = "network.blocks.4.block.router."
        for part in ("encode", "decode"):  # frozen at step 3, as the weights were then
            frozen, live = f"{router}frozen_{part}", f"{router}light.{part}.weight"
            assert torch.equal(ends[name][frozen], third["state_dict"][live])
            assert not torch.equal(ends[name][frozen], ends[name][live])
    bias = "network.blocks.2.block.router.bias"
    assert ends["one"][bias].any()
    for name in ("ddp", "sharded"):
        assert torch.equal(ends[name][bias], ends["one"][bias])
        for key, value in ends["one"].items():
            torch.testing.assert_close(ends[name][key], value, rtol=0, atol=1e-6, msg=f"{name} {key}")


# What is logged -----------------------------------------------------------------------------------------------


def test_dead_experts_are_named(text, tmp_path):
    """For two steps no token chooses two of the experts, then for two steps every token does."""
    one = module(network([*DENSE, "swiglu", moe("loss_free", experts=6, update_rate=0.0)]))
    bias = one.network.residuals[3].block.router.bias
    bias[[2, 5]] = -9.0

    class Swap(DeadExperts):
        def on_train_batch_end(self, trainer, *rest):
            super().on_train_batch_end(trainer, *rest)
            if trainer.global_step == 2:
                bias[[2, 5]] = 9.0

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(one, data(text), tmp_path, max_steps=5, accumulate_grad_batches=2, callbacks=[Swap(window=2)])
    assert [str(each.message) for each in caught if "took no token" in str(each.message)] == [
        "step 2: block 3 (moe): experts 2, 5 took no token in the last 2 steps",
        "step 4: block 3 (moe): experts 0, 1, 3, 4 took no token in the last 2 steps",
    ]


def test_lines_of_dead_experts():
    config = network(["swiglu", LOSS_FREE])
    counts = {"blocks.1/sum/choices": torch.tensor([3, 0, 1, 1]), "blocks.0/rest.0/sum/choices": torch.tensor([0, 0])}
    wanted = ["block 1 (moe): expert 1 took no token", "block 0 (swiglu)/rest.0: experts 0, 1 took no token"]
    assert dead(counts, config) == wanted
    assert dead({"blocks.1/sum/choices": torch.ones(4)}, config) == []
    with pytest.raises(ValueError, match=re.escape("window=0 must be at least 1")):
        DeadExperts(window=0)
    watch = DeadExperts(window=5)
    watch.load_state_dict({"window": 4, "steps": 3, "counts": counts})
    assert watch.state_dict() == {"window": 5, "steps": 0, "counts": {}}


def test_sums_are_not_logged():
    aux = {"blocks.0/stat/load": torch.tensor(0.5), "blocks.0/sum/choices": torch.tensor([1, 2])}
    assert scalars(aux) == {"blocks.0/stat/load": 0.5}
