"""Low-rank adapters on every kind of block, through peft: they take part, learn, and can be merged."""

import builtins
import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

import zoo
import zoo.convert
from tests.variants import VARIANTS
from zoo.hf import ZooConfig, ZooForCausalLM, model_class
from zoo.hf.lora import CONFIG, LEFT_OUT, WEIGHTS, adaptable, chosen_targets, lora_config, require_peft, usual_targets

CASES = [
    pytest.param(kind, options, id=f"{kind}{json.dumps(options) if options else ''}")
    for kind in zoo.kinds()
    for options in VARIANTS.get(kind, [{}])
]
# No linear map in them is a module, nor a stack of experts' matrices.
WITHOUT = ("slstm", "learned_position")
MPO = {"experts": 4, "router": "unweighted", "expert": {"kind": "mpo", "bond": 4}, "load_balance": 0.0}
TOKENS = torch.arange(22).reshape(2, 11) * 7 % 19
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def model_of(*stack, dtype=torch.float64, objective="masked"):
    """In eval mode, away from zeros of the initialisation. Masked, so that bidirectional kinds can stand in it."""
    torch.manual_seed(3)
    config = ZooConfig(model={"vocab_size": 19, "width": 24, "stack": list(stack), "objective": objective})
    model = model_class(config)(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def adapted(model, **options):
    """With adapters that are no longer the zero they begin as."""
    made = peft.get_peft_model(model, lora_config(model, rank=3, **options))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return made.eval()


def logits(model):
    """Of a padded batch."""
    return model(input_ids=TOKENS, attention_mask=torch.tensor([[1] * 11, [0] * 4 + [1] * 7])).logits


def step_by_step(model):
    """The only block's outputs, one token at a time from its state."""
    block = model.model.blocks[0].block
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state, found = block.init_state(2), []
    for token in x.split(1, 1):
        y, state, _ = block(token, state)
        found.append(y)
    return torch.cat(found, 1)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_adapters_take_part_learn_and_merge(kind, options):
    """On all that can have one: a block that reads a weight beside its module would leave its adapter out. Merged it is
    the same function, also one token at a time."""
    model = model_of({"kind": kind, **options})
    whole = adaptable(model.model)
    names = sorted({path.removeprefix("model.blocks.0.block.") for part in whole for path in part})
    if not names:
        assert kind in WITHOUT or options == MPO
        with pytest.raises(ValueError, match=f"nothing in blocks of kind {kind} can have a LoRA adapter"):
            lora_config(model)
        return
    base = logits(model)
    made = adapted(model, targets=names)
    found = logits(made)
    assert (found - base).abs().max() > 1e-4
    cross_entropy(found.flatten(0, 1), TOKENS.flatten()).backward()
    trained = {name: each for name, each in made.named_parameters() if each.requires_grad}
    assert len(trained) == 2 * len(whole.modules + whole.parameters)
    assert not [name for name, each in trained.items() if each.grad is None or not each.grad.any()]
    with torch.no_grad():
        steps = step_by_step(model) if model.model.residuals[0].block.causal else None
        merged = made.merge_and_unload()
        torch.testing.assert_close(logits(merged), found, rtol=1e-9, atol=1e-9)
        if steps is not None:
            torch.testing.assert_close(step_by_step(merged), steps, rtol=1e-9, atol=1e-9)


def test_the_usual_targets_of_every_kind():
    """peft finds by the short names what was meant; thin maps are left out, each of them there."""
    stack = [{"kind": kind, **options} for kind in zoo.kinds() for options in VARIANTS.get(kind, [{}])]
    stack.append({"kind": "parallel", "blocks": ["mamba", "rfa"]}) if "parallel" in zoo.kinds() else None
    model = model_of(*stack)
    usual, whole = usual_targets(model.model), adaptable(model.model)
    left = {path.split(".block.", 1)[1] for path in set(whole.modules) - set(usual.modules)}
    for kind, names in LEFT_OUT.items():
        assert all(any(name in path.split(".") for path in left) for name in names), kind
    assert {path.rpartition(".")[2] for path in left} >= {"dt_proj", "decay_encode", "gate_proj", "shared_gate"}
    assert not [path for path in left if "in_proj" in path or "qkv" in path]
    made = peft.get_peft_model(model, lora_config(model))
    wrapped = {
        name.removeprefix("base_model.model."): each
        for name, each in made.named_modules()
        if isinstance(each, peft.tuners.lora.LoraLayer)
    }
    stacks = {name for name, each in wrapped.items() if hasattr(each, "parameter_name")}
    assert set(wrapped) - stacks == set(usual.modules)
    experts = {name.replace(".base_layer", "") for name in stacks}
    assert experts == {path.rpartition(".")[0] for path in usual.parameters}
    assert len(stacks) == len(usual.parameters)


def test_targets_by_name():
    model = model_of("gqa", {"kind": "moe", "shared_experts": 1, "router": "stable"}, "mamba")
    found = chosen_targets(model.model, ["qkv", "experts.up", "dt_proj"])
    assert found.modules == ("model.blocks.0.block.qkv", "model.blocks.2.block.dt_proj")
    assert found.parameters == ("model.blocks.1.block.experts.up",)
    assert chosen_targets(model.model, ["block.shared.up"]).modules == ("model.blocks.1.block.shared.up",)
    config = lora_config(model, rank=2, alpha=4, targets=["qkv", "experts.up"])
    assert (config.r, config.lora_alpha, config.target_parameters) == (2, 4, ["experts.up"])
    for name in ("qvk", "encode", "head", "embedding", "norm"):
        with pytest.raises(ValueError, match=rf"lora.targets: '{name}' is no linear map .* choose from .*qkv"):
            chosen_targets(model.model, [name])
    with pytest.raises(ValueError, match=r"did you mean 'qkv'"):
        chosen_targets(model.model, ["qvk"])
    with pytest.raises(ValueError, match=r"lora.dropout=0.1 cannot be applied before experts.*: \[.*qkv.*\]"):
        lora_config(model, dropout=0.1)
    assert lora_config(model, dropout=0.1, targets=["qkv"]).lora_dropout == 0.1


# Folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and an adapter of it."""
    folder = tmp_path_factory.mktemp("adapters")
    stack = [{"kind": "gqa", "heads": 2}, {"kind": "moe", "experts": 3}, "mamba"]
    model_of(*stack, dtype=torch.float32, objective="causal").save_pretrained(folder / "base")
    model = ZooForCausalLM.from_pretrained(folder / "base")
    adapted(model).save_pretrained(folder / "adapter")
    return folder


def test_every_way_of_loading_is_the_same_function(saved):
    merged = zoo.convert.load(saved / "adapter")
    assert not [name for name in merged.state_dict() if "lora" in name]
    assert all(each.requires_grad for each in merged.parameters())
    base = ZooForCausalLM.from_pretrained(saved / "base")
    assert (logits(merged) - logits(base)).abs().max() > 1e-2
    others = [
        peft.PeftModel.from_pretrained(base, str(saved / "adapter")),
        peft.AutoPeftModelForCausalLM.from_pretrained(str(saved / "adapter")),
        transformers.AutoModelForCausalLM.from_pretrained(saved / "adapter"),
        ZooForCausalLM.from_pretrained(saved / "adapter"),
    ]
    wanted = merged.generate(TOKENS, max_new_tokens=6, do_sample=False)
    for other in others:
        torch.testing.assert_close(logits(other.eval()), logits(merged), rtol=1e-4, atol=1e-5)
        assert torch.equal(other.generate(input_ids=TOKENS, max_new_tokens=6, do_sample=False), wanted)


def broken(saved, folder, **changes):
    """A copy of the adapter with another configuration."""
    shutil.copytree(saved / "adapter", folder)
    said = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(said))
    return folder


def test_what_cannot_be_merged_is_named(saved, tmp_path):
    load = zoo.convert.load
    with pytest.raises(ValueError, match=r"trained on /no/such, which cannot be loaded: .*correct base_model_name"):
        load(broken(saved, tmp_path / "lost", base_model_name_or_path="/no/such"))
    with pytest.raises(ValueError, match=r"does not say which model it was trained on"):
        load(broken(saved, tmp_path / "silent", base_model_name_or_path=None))
    model_of("swiglu", objective="causal").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"does not fit {tmp_path / 'other'}"):
        load(broken(saved, tmp_path / "stranger", base_model_name_or_path=str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"does not fit .*base: .*size mismatch for .*qkv"):
        load(broken(saved, tmp_path / "rank", r=5))
    with pytest.raises(ValueError, match=r"does not fit .*qkv.*no counterpart"):
        load(broken(saved, tmp_path / "fewer", target_modules=["in_proj", "x_proj", "out_proj", "out"]))
    partly = broken(saved, tmp_path / "partly")
    tensors = load_file(partly / WEIGHTS)
    save_file({name: each for name, each in tensors.items() if "qkv.lora_A" not in name}, partly / WEIGHTS)
    with pytest.raises(ValueError, match=r"does not fit .*qkv.lora_A.weight have no counterpart"):
        load(partly)
    (partly / WEIGHTS).write_bytes((saved / "adapter" / WEIGHTS).read_bytes()[:200])
    with pytest.raises(ValueError, match=rf"{WEIGHTS}.*is damaged or only partly written"):
        load(partly)
    (partly / WEIGHTS).rename(partly / "adapter_model.bin")
    with pytest.raises(ValueError, match=rf"has no {WEIGHTS}; save it again with peft, as safetensors"):
        load(partly)
    with pytest.raises(ValueError, match=r"holds an adapter; make a whole model of it first with zoo convert merge"):
        zoo.convert.convert(saved / "adapter", tmp_path / "converted")
    tensors = load_file(saved / "adapter" / WEIGHTS)
    wild = broken(saved, tmp_path / "wild")
    save_file({name: each * float("nan") for name, each in tensors.items()}, wild / WEIGHTS)
    with pytest.raises(ValueError, match=r"wild cannot be merged: NaNs detected"):
        load(wild)


def test_only_what_changes_weights_can_be_merged(saved, tmp_path):
    model = ZooForCausalLM.from_pretrained(saved / "base")
    sizes = {"token_dim": 24, "num_layers": 3, "num_attention_heads": 2}
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", **sizes)
    made = peft.get_peft_model(model, config)
    made.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match=r"is of type PROMPT_TUNING, which cannot be merged; LoRA can"):
        zoo.convert.load(tmp_path / "prompt")


def test_without_peft_the_way_to_it_is_told(saved, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"LoRA adapters need peft: pip install 'efficient-zoo\[peft\]'"):
        require_peft()
    with pytest.raises(ImportError, match="pip install"):
        zoo.convert.load(saved / "adapter")
