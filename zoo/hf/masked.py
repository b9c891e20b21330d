"""`ZooForMaskedLM`: a masked `LanguageModel` behind transformers' interfaces."""

from typing import Any, cast

from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.hf.pretrained import ZooOutput, ZooPreTrainedModel, check_labels, refuse_attentions


class ZooForMaskedLM(ZooPreTrainedModel):
    """A masked language model made of blocks: logits of the hidden token at each position. `labels` are not shifted;
    -100 is ignored."""

    objective = "masked"

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        inputs_embeds: Float[Tensor, "batch time width"] | None = None,
        labels: Int[Tensor, "batch time"] | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> ZooOutput | tuple:
        """Logits, and the loss where `labels` are given; arguments as in `ZooForCausalLM`, without a cache."""
        refuse_attentions(output_attentions)
        piece = self._piece(input_ids, inputs_embeds, attention_mask, position_ids)
        want = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if labels is not None:
            check_labels(labels, piece, logits_to_keep)
        if self._skips_logits(skip_logits, labels):
            out, loss = self._loss_alone(piece, cast(Tensor, labels), bool(want), **kwargs)
            return self._finish(out, None, loss, return_dict)
        out = self.model(
            piece.tokens,
            None,
            piece.segments,
            embeddings=piece.embeddings,
            logits_to_keep=logits_to_keep,
            hidden_states=bool(want),
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(out.logits, labels, vocab_size=out.logits.shape[-1], **kwargs)
        return self._finish(out, None, loss, return_dict)
