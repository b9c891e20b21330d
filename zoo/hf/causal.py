"""`ZooForCausalLM`: a causal `LanguageModel` behind transformers' interfaces, and its part in `generate`."""

from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin

from zoo.hf.cache import NAME, ROLLBACK, ZooCache, one_of
from zoo.hf.history import Piece
from zoo.hf.pretrained import ZooOutput, ZooPreTrainedModel, check_labels, refuse_attentions
from zoo.model import ModelOut


class ZooForCausalLM(ZooPreTrainedModel, GenerationMixin):
    """A causal language model made of blocks.

    `attention_mask` may hold 0/1 or the document of each token (packed). `labels` are shifted inside; -100 is ignored,
    and with a mask so are targets at padding and at the first token of a document, which nothing before it predicts.
    """

    objective = "causal"

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Int[Tensor, "batch columns"] | Bool[Tensor, "batch columns"] | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        cache: ZooCache | None = None,
        inputs_embeds: Float[Tensor, "batch time width"] | None = None,
        labels: Int[Tensor, "batch time"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool | None = None,
        past_key_values: ZooCache | None = None,
        **kwargs: Any,
    ) -> ZooOutput | tuple:
        """Logits of the next token at each position, the loss where `labels` are given, the cache where it is used.

        `cache`: what came before, `past_key_values` is its other name (transformers' own until 5.23).
        `use_cache=None` makes a cache under `torch.no_grad()` without labels, if the configuration says use_cache.
        `position_ids` only tell documents apart, where no mask does; blocks count positions themselves.
        `skip_logits=True` gives the loss of the labels without any logits, None as the configuration's `skip_logits`
        says. `kwargs` go to the loss (`num_items_in_batch`). Raises ValueError for inputs that do not fit one another.
        """
        refuse_attentions(output_attentions)
        cache = one_of(cache, past_key_values)
        if cache is None:
            if use_cache is None:
                use_cache = self.config.use_cache and labels is None and not torch.is_grad_enabled()
            cache = ZooCache() if use_cache else None
        elif not isinstance(cache, ZooCache):
            raise ValueError(
                f"the cache is a {type(cache).__name__}; zoo models keep their state in a ZooCache: "
                "pass zoo.hf.ZooCache(), or leave it out"
            )
        piece = self._piece(input_ids, inputs_embeds, attention_mask, position_ids, cache)
        want = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if labels is not None:
            check_labels(labels, piece, logits_to_keep)
        if self._skips_logits(skip_logits, labels):
            if cache is not None:
                raise ValueError("skip_logits goes without a cache; leave cache and use_cache out")
            shifted = kwargs.pop("shift_labels", None)
            if shifted is None:
                within = _within_documents(cast(Tensor, labels), piece.segments)
                shifted = nn.functional.pad(within[:, 1:], (0, 1), value=kwargs.get("ignore_index", -100))
            out, loss = self._loss_alone(piece, shifted, bool(want), **kwargs)
            return self._finish(out, None, loss, return_dict)
        if cache is None:
            out = self.model(
                piece.tokens,
                None,
                piece.segments,
                embeddings=piece.embeddings,
                logits_to_keep=logits_to_keep,
                hidden_states=bool(want),
            )
        else:
            out = self._run_cached(piece, cache, logits_to_keep, bool(want))
        loss = None
        if labels is not None:
            assert out.logits is not None
            labels = _within_documents(labels, piece.segments)
            loss = self.loss_function(out.logits, labels, vocab_size=out.logits.shape[-1], **kwargs)
        return self._finish(out, cache, loss, return_dict)

    def _run_cached(self, piece: Piece, cache: ZooCache, keep: int | Tensor, hidden_states: bool) -> ModelOut:
        """Run the pending tokens of `cache` and the new ones, and return the new ones' outputs."""
        time = piece.length
        if cache.history is not None and isinstance(keep, int):
            # Assisted decoding asks for the logits of a draft and may reject all of it.
            cache.activate_past_recording(min(keep + 1, time))
        cache.begin(self.config.model or {}, piece)
        if not cache.layers:
            cache.states = self.model.init_state(piece.inputs.shape[0], device=piece.inputs.device)
        outs: list[ModelOut] = []
        for part, dropped in cache.feed(piece, self.model.embedding):
            # One part with all that is new: the model itself makes the logits that are kept.
            single = part.length - dropped == time and isinstance(keep, int)
            out = self.model(
                part.tokens,
                cache.states,
                part.segments,
                embeddings=part.embeddings,
                logits_to_keep=(min(keep, time) if keep else time) if single else 1,
                hidden_states=hidden_states,
            )
            cache.states = out.state
            outs.append(_drop(out, dropped))
        if outs[-1].hidden.shape[1] == time and isinstance(keep, int):
            return outs[-1]
        hidden = torch.cat([out.hidden for out in outs], 1)
        kept = hidden[:, keep if isinstance(keep, Tensor) else slice(-keep, None)]
        streams = zip(*(out.hidden_states or () for out in outs), strict=True)
        return outs[-1]._replace(
            logits=self.model.head(kept),
            hidden=hidden,
            hidden_states=tuple(torch.cat(each, 1) for each in streams) or None,
        )

    # Generation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own. Raises ValueError for an empty prompt and for tokens outside the vocabulary."""
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        embedded = kwargs.get("inputs_embeds")
        if (prompt is None or prompt.shape[-1] == 0) and (embedded is None or embedded.shape[1] == 0):
            raise ValueError("the prompt is empty; pass at least one token, such as a newline")
        if prompt is not None and prompt.numel():
            low, high = (int(each) for each in prompt.aminmax())
            if low < 0 or high >= self.model.embedding.num_embeddings:
                raise ValueError(
                    f"the prompt holds token {low if low < 0 else high}, the model's vocabulary has "
                    f"{self.model.embedding.num_embeddings}; use the tokenizer that belongs to this model"
                )
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and mask.numel():
            if int(mask.max()) > 1:
                raise ValueError(
                    f"generate continues one document a row and attention_mask holds ids up to {int(mask.max())}; "
                    "pass 0 at padding and 1 elsewhere"
                )
            if not bool(mask[:, -1].all()):
                raise ValueError(
                    "a row of the prompt ends in padding, and its next token would continue that; pad on the left "
                    "(tokenizer.padding_side = 'left')"
                )
        cache = one_of(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        if cache is not None:
            kwargs[NAME] = cache
        return cast(Any, super()).generate(inputs, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> Any:
        """Give generate a `ZooCache`, one that can go back where drafts are tried."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={kind!r} is no way to keep a recurrent state; leave it out")
        cache = model_kwargs.get(NAME)
        if cache is not None:
            cast(Any, super())._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        elif generation_config.use_cache is not False:
            cache = model_kwargs[NAME] = ZooCache()
        if isinstance(cache, ZooCache) and generation_config.is_assistant:
            # As many new tokens as this round drafts, and the one before them, may be taken back.
            cache.activate_past_recording(max(ROLLBACK, (generation_config.max_new_tokens or 0) + 2))

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: ZooCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        past_key_values: ZooCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers' own, without what the blocks do not need, so that decoding takes their fast route."""
        cache = one_of(cache, past_key_values)
        past = 0 if cache is None else cache.get_seq_length()
        if next_sequence_length is not None and next_sequence_length < 1:
            raise ValueError(
                f"the cache holds {past} tokens and the input {input_ids.shape[1]}; pass the whole sequence, cached "
                "tokens and at least one more, or only new tokens with an attention_mask over cached and new ones"
            )
        if (
            past > 0
            and next_sequence_length == 1
            and not is_first_iteration
            and input_ids.device == self.model.embedding.weight.device
        ):
            # What generate itself chose: none of it is padding, and of all else blocks need nothing.
            token = input_ids[:, -1:].clone(memory_format=torch.contiguous_format)
            rest = {name: each for name, each in kwargs.items() if name not in ("position_ids", "labels")}
            return rest | {"input_ids": token, NAME: cache, "attention_mask": None}
        found = cast(Any, super()).prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{NAME: cache},
            **kwargs,
        )
        found.pop("position_ids", None)  # made from the mask, which says more
        mask = found.get("attention_mask")
        if mask is not None:
            given = found.get("inputs_embeds")
            time = (found["input_ids"] if given is None else given).shape[1]
            if bool((mask[:, -time:] == 1).all()):
                found["attention_mask"] = None
        return found


def _drop(out: ModelOut, count: int) -> ModelOut:
    """Without the first `count` tokens (the logits hold the kept ones already)."""
    if count == 0:
        return out
    streams = None if out.hidden_states is None else tuple(each[:, count:] for each in out.hidden_states)
    return out._replace(hidden=out.hidden[:, count:], hidden_states=streams)


def _within_documents(labels: Tensor, segments: Tensor | None) -> Tensor:
    """Labels without the targets that nothing in their own document predicts."""
    if segments is None:
        return labels
    before = nn.functional.pad(segments[:, :-1], (1, 0))
    return torch.where((segments != 0) & (segments == before), labels, -100)
