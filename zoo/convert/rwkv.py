"""RWKV-4 (2305.13048): `RwkvForCausalLM`, time mixes and channel mixes in turn."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, RwkvConfig

from zoo.config import ModelConfig
from zoo.convert import decoder
from zoo.convert.family import Entry, Family, same
from zoo.convert.fused import affine
from zoo.model import LanguageModel
from zoo.recurrent.rwkv4 import RWKV4ChannelMix

KINDS = ("rwkv4", "rwkv4_channel_mix")
EMBEDDING, HEAD = "rwkv.embeddings.weight", "head.weight"
EPS = 1e-5  # of the last norm, whatever layer_norm_epsilon says
INIT_STD = 0.02  # transformers' own where a configuration names none, as this class does


def read(config: RwkvConfig) -> ModelConfig:
    """The model that an RWKV-4 configuration describes.

    `rescale_every` halves the stream and the matrices that write to it every so many layers, for float16's range; but
    for the eps of norms it is the same model, and stored weights are not divided. Beside the stream, eps is 4 times as
    large with each halving: little at the usual 6 (a few halvings), another model after a dozen.
    """
    said: Any = config
    if said.attention_hidden_size != said.hidden_size:
        raise ValueError(
            f"attention_hidden_size={said.attention_hidden_size} cannot be converted: time mixes here are as wide as "
            f"the model, hidden_size={said.hidden_size} (the caches of transformers are too); set it to that"
        )
    if said.layer_norm_epsilon != EPS:
        raise ValueError(
            f"layer_norm_epsilon={said.layer_norm_epsilon} cannot be converted: the last norm of this format has "
            f"{EPS} whatever it says, and a model here has one norm_eps; set it to {EPS}"
        )
    return ModelConfig(
        vocab_size=said.vocab_size,
        width=said.hidden_size,
        stack=[
            {
                "repeat": said.num_hidden_layers,
                "blocks": [KINDS[0], {"kind": KINDS[1], "hidden": said.intermediate_size}],
            }
        ],
        norm="layer",
        norm_eps=EPS,
        embedding_norm=True,
        tied_embeddings=said.tie_word_embeddings,
        init_std=getattr(said, "initializer_range", INIT_STD),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of an RWKV-4 configuration: what the first channel mix says, for all. Nothing is rescaled: then
    transformers' logits are ours to the last digits."""
    pairs = decoder.layers(config, [KINDS[1]], [KINDS[0]])
    feed: RWKV4ChannelMix = decoder.on_meta(pairs[0][1], config.width)
    found = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(pairs),
        "attention_hidden_size": config.width,
        "intermediate_size": feed.hidden,
        "layer_norm_epsilon": EPS,
        "rescale_every": 0,
        "tie_word_embeddings": config.tied_embeddings,
    }
    return found if config.init_std == INIT_STD else found | {"initializer_range": config.init_std}


def names(model: LanguageModel) -> list[Entry]:
    """The table of names."""
    found = [same("embedding.weight", EMBEDDING), *affine("norm", "rwkv.ln_out")]
    found += affine("embedding_norm", "rwkv.blocks.0.pre_ln")
    if not model.config.tied_embeddings:
        found.append(same("head.weight", HEAD))
    for index, residual in enumerate(model.residuals):
        ours, theirs = f"blocks.{index}", f"rwkv.blocks.{index // 2}"
        part, norm = ("feed_forward", "ln2") if index % 2 else ("attention", "ln1")
        found += affine(f"{ours}.norm", f"{theirs}.{norm}")
        for name, _ in residual.block.named_parameters():
            entry = _mix if name.startswith("time_mix") else same
            found.append(entry(f"{ours}.block.{name}", f"{theirs}.{part}.{name}"))
    return found


def _mix(ours: str, theirs: str) -> Entry:
    """A share of the current token for each channel; theirs has axes for batch and time."""
    return Entry(ours, (theirs,), lambda parts: parts[0][0, 0], lambda whole: [whole[None, None]])


def weights(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """A model's tensors as files hold them, those that transformers changes in place as copies.

    From its first pass in evaluation on, transformers' model holds matrices divided by powers of 2 (`rescale_every`).
    Here they are multiplied again, which is exact unless float16 lost digits below its normal range. (What
    save_pretrained writes at that time is divided, too, and nothing in the file tells: save before the first pass, or
    after one in training.)
    """
    held = dict(model.state_dict())
    inner: Any = model.base_model
    every = inner.config.rescale_every
    if every > 0:
        for layer in range(every, inner.config.num_hidden_layers):
            for name in ("attention.output.weight", "feed_forward.value.weight"):
                factor = 2 ** (layer // every) if inner.layers_are_rescaled else 1
                held[f"rwkv.blocks.{layer}.{name}"] = held[f"rwkv.blocks.{layer}.{name}"] * factor
    return held


FAMILY = Family(
    config_class=RwkvConfig,
    architecture="RwkvForCausalLM",
    read=read,
    write=write,
    names=names,
    embedding=EMBEDDING,
    head=HEAD,
    own_dtype=("*.time_decay", "*.time_first"),
    more=("initializer_range", "pad_token_id"),
    weights=weights,
)
