"""What the TinyAlign models return."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput


@dataclass
class TinyAlignImageFeatures(BaseModelOutputWithPooling):
    r"""
    last_hidden_state (`torch.Tensor` of shape `(n, T, C)`):
        Features of the vision tower, not pooled.
    pooler_output (`list[torch.Tensor]`):
        One tensor `(P + M, hidden_size)` an image: visual tokens, then memory tokens.
    memory_ids (`torch.Tensor` of shape `(n, top_k)`, *optional*):
        Rows of the memory bank that were used, -1 for an empty slot.
    memory_scores (`torch.Tensor` of shape `(n, top_k)`, *optional*):
        Their inner products with the query, when they were searched for.
    """

    memory_ids: torch.LongTensor | None = None
    memory_scores: torch.Tensor | None = None


@dataclass
class TinyAlignModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    image_hidden_states (`torch.Tensor` of shape `(image_tokens, hidden_size)`, *optional*):
        Visual and memory tokens of all images of the batch.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class TinyAlignCausalLMOutputWithPast(ModelOutput):
    r"""
    loss (`torch.Tensor`, *optional*): Next-token loss, when `labels` are given.
    logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`):
        Or `(supervised positions, vocab_size)` with `supervised_logits_only=True`.
    image_hidden_states (`torch.Tensor` of shape `(image_tokens, hidden_size)`, *optional*):
        Visual and memory tokens of all images of the batch.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None
    image_hidden_states: torch.Tensor | None = None


@dataclass
class TinyAlignRetrieval(ModelOutput):
    r"""
    scores, ids (`torch.Tensor` of shape `(n, top_k)`): Inner products and rows of the bank, best first.
    captions, source_ids (`list[list[str]]`): The same neighbours' captions and sources.
    """

    scores: torch.Tensor | None = None
    ids: torch.LongTensor | None = None
    captions: list[list[str]] | None = None
    source_ids: list[list[str]] | None = None
