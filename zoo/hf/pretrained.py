"""What `ZooForCausalLM` and `ZooForMaskedLM` share: building, checkpoints, embeddings, inputs and outputs."""

import dataclasses
import os
from typing import Any, cast

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from zoo.hf.cache import ZooCache
from zoo.hf.checkpoint import check_source, damaged, refuse_pickle, staged
from zoo.hf.config import ZooConfig
from zoo.hf.history import Piece
from zoo.model import LanguageModel, ModelOut, losses


@dataclasses.dataclass
class ZooOutput(ModelOutput):
    """What a model returns; entries that were not asked for are None.

    loss: cross entropy of the labels plus the blocks' own losses (routers).
    logits: [batch, kept, vocab]; None where they were skipped.
    cache: the `ZooCache` after these tokens; `past_key_values` is another name of it.
    hidden_states: the residual stream before each block and what the head reads, [batch, time, width] each.
    aux: the blocks' named losses, statistics and, while training, sums: "blocks.<index>/<loss, stat or sum>/<name>".
        `loss` holds the losses. Sums are for models driven by the training step (some routers of `moe`): a trainer
        calls `model.model.after_step` with them after each optimizer step, see `LanguageModel.after_step`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: ZooCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux: dict[str, Tensor] | None = None

    @property
    def past_key_values(self) -> ZooCache | None:
        return self.cache

    def __contains__(self, key: object) -> bool:
        return super().__contains__(cast(Any, _renamed(key)))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_renamed(key))

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(_renamed(key), default)


def _renamed(key: Any) -> Any:
    """transformers up to 5.23 asks an output for its cache by that name."""
    return "cache" if key == "past_key_values" else key


class ZooPreTrainedModel(PreTrainedModel):
    """What the causal and the masked model share: building, embeddings, checkpoints, masks and loss."""

    config: ZooConfig
    config_class = ZooConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    objective = ""
    _no_split_modules = ["Residual"]  # noqa: RUF012, transformers' own forms
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    # Of a loss-free router: bfloat16 would round its small moves away.
    _keep_in_fp32_modules_strict = ["router.bias"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: ZooConfig):
        super().__init__(config)
        described = config.model_config
        if described.objective != self.objective:
            other = {"causal": "ZooForCausalLM", "masked": "ZooForMaskedLM"}[described.objective]
            raise ValueError(
                f"{type(self).__name__} needs objective={self.objective!r} and this configuration says "
                f"{described.objective!r}; use {other}, or change the objective"
            )
        self.model = LanguageModel(described)
        # from_pretrained builds on meta and loads into it; anything it lacks then is filled by `initialize_weights`.
        self._built = not self.model.embedding.weight.is_meta
        self.post_init()

    # Weights --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        """Initialise what was neither built nor loaded, as `LanguageModel` itself initialises it: weights that a
        checkpoint lacks, and buffers that are not saved."""
        if not self._built:
            blocks = self.model.blocks
            specs = self.model.config.blocks()
            for index, each in enumerate(blocks):
                _fill(each, lambda i=index: self.model._residual(specs[i], i, len(specs)))
            _fill(self.model, lambda: LanguageModel(self.model.config), skip="blocks.")
            self._built = True
        for module in self.model.modules():
            cast(Any, module)._is_hf_initialized = True
        super().initialize_weights()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = cast(nn.Linear, new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers' own; the model's configuration follows."""
        found = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = self.config.model_config
        return found

    # Checkpoints ----------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write weights (safetensors), configuration and the remote-code file. A failed save (a full disk) leaves
        the checkpoint that was in the folder, and raises OSError that says so."""
        if kwargs.pop("safe_serialization", True) is False:
            raise ValueError("safe_serialization=False would pickle the weights; zoo checkpoints are safetensors only")
        if kwargs.get("push_to_hub") or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        with staged(save_directory) as folder:
            super().save_pretrained(folder, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, from safetensors only.

        Raises ValueError for pickled weights, for a damaged file (named), and where the checkpoint lacks weights:
        a model that is partly random is no model. `ignore_mismatched_sizes=True` allows that.
        """
        if not {"config", "subfolder", "gguf_file"} & set(kwargs):
            check_source(pretrained_model_name_or_path)
        refuse_pickle(pretrained_model_name_or_path, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        options: dict[str, Any] = kwargs | {"output_loading_info": True, "use_safetensors": True}
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **options)
        except SafetensorError as error:
            raise damaged(pretrained_model_name_or_path, error) from error
        missing = sorted(name for name in info["missing_keys"] if name.startswith("model."))
        if missing and not kwargs.get("ignore_mismatched_sizes"):
            raise ValueError(
                f"the checkpoint {pretrained_model_name_or_path} lacks {len(missing)} weights of this model: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. It was written only in part, or for "
                "another configuration; copy it again, or pass ignore_mismatched_sizes=True to start these at random"
            )
        return (model, info) if wants_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: transformers would copy this source file beside a checkpoint, ours writes its own small one."""

    # Inputs ---------------------------------------------------------------------------------------------------

    def _piece(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: ZooCache | None = None,
    ) -> Piece:
        """The input and its segments. Raises ValueError for what is missing, empty or of another length."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        piece = Piece(input_ids, inputs_embeds)
        batch, time = piece.inputs.shape[:2]
        past = 0 if cache is None else cache.length
        if time == 0:
            raise ValueError("the input is empty; pass at least one token for each sequence")
        if attention_mask is None:
            return piece._replace(segments=_documents(position_ids, batch) if past == 0 else None)
        if attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; pass [batch, time] with 0 at padding and "
                "1 elsewhere, or one integer for each document of a packed row"
            )
        if attention_mask.shape[1] not in (time, past + time):
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns for {time} new tokens after {past} cached; "
                f"pass {time} or {past + time} columns"
            )
        segments = attention_mask[:, -time:]
        segments = segments.long() if segments.dtype == torch.bool else segments
        if cache is None or cache.current_document() is None:  # else all ones are another document than the cache's
            segments = _unless_ones(segments)
        return piece._replace(segments=segments)

    def _skips_logits(self, asked: bool | None, labels: Tensor | None) -> bool:
        """Whether a call makes the loss without logits: as asked, else as the configuration says of training.
        Raises ValueError where that was asked and cannot be."""
        own = getattr(self, "_loss_function", None) is not None
        if asked is None:
            return self.config.skip_logits and self.training and labels is not None and not own
        if asked and (labels is None or own):
            lacks = "labels, whose loss it is" if labels is None else "the library's own loss, not a loss_function"
            raise ValueError(f"skip_logits=True needs {lacks}; leave it out")
        return asked

    def _loss_alone(
        self,
        piece: Piece,
        targets: Int[Tensor, "batch time"],
        hidden_states: bool,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        **_: Any,
    ) -> tuple[ModelOut, Tensor]:
        """A call without logits, and the loss as transformers' own functions count it: over `num_items_in_batch`, or
        the mean over targets."""
        if ignore_index != -100:
            targets = torch.where(targets == ignore_index, -100, targets)
        out = self.model(
            piece.tokens,
            None,
            piece.segments,
            embeddings=piece.embeddings,
            hidden_states=hidden_states,
            targets=targets,
        )
        assert out.nats is not None
        number = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
        number = number.to(out.nats.device) if isinstance(number, Tensor) else number
        return out, out.nats / number

    def _finish(
        self, out: ModelOut, cache: ZooCache | None, loss: Tensor | None, return_dict: bool | None
    ) -> ZooOutput | tuple:
        """The output, with the blocks' own losses in `loss`."""
        if loss is not None:
            loss = loss + losses(out.aux)
        logits = out.logits if out.nats is None else None
        found = ZooOutput(loss, logits, cache, out.hidden_states, out.aux or None)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return found if wanted else found.to_tuple()


def _fill(module: nn.Module, build: Any, skip: str | None = None) -> None:
    """Copy what `module` lacks from a new one of its kind."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    lacking = [
        name
        for name, tensor in tensors.items()
        if not getattr(tensor, "_is_hf_initialized", False) and not (skip and name.startswith(skip))
    ]
    if lacking:
        new = build()
        source = dict(new.named_parameters(remove_duplicate=False)) | dict(new.named_buffers(remove_duplicate=False))
        for name in lacking:
            init.copy_(tensors[name], source[name])


def _unless_ones(segments: Tensor) -> Tensor | None:
    """None in place of all ones, where seeing that costs no synchronisation with a device."""
    if segments.device.type == "cpu" and not torch.compiler.is_compiling() and bool((segments == 1).all()):
        return None
    return segments


def _documents(position_ids: Tensor | None, batch: int) -> Tensor | None:
    """Segments of a packed batch that says by positions alone where documents begin (DataCollatorWithFlattening)."""
    if position_ids is None or position_ids.ndim != 2:
        return None
    segments = (position_ids == 0).long().cumsum(1)
    segments = segments - segments[:, :1] + 1  # a row whose positions begin later is one document too
    return _unless_ones(segments.expand(batch, -1))


def refuse_attentions(wanted: bool | None) -> None:
    if wanted:
        raise ValueError("zoo blocks make no attention maps; leave output_attentions out")


def check_labels(labels: Tensor, piece: Piece, logits_to_keep: int | Tensor) -> None:
    """Raise ValueError where labels and logits would not stand beside one another."""
    shape = piece.inputs.shape[:2]
    if labels.shape != shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and the input {tuple(shape)}; pass one for each token"
        )
    if isinstance(logits_to_keep, Tensor) or logits_to_keep:
        raise ValueError("labels need the logits of every position; leave logits_to_keep out")
