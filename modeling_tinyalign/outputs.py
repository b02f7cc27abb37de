"""Outputs of the TinyAlign models."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)

# hidden states, attentions, and the cache: `cache` since transformers 5.24, `past_key_values` before
LANGUAGE_MODEL_FIELDS = tuple(
    field.name for field in fields(BaseModelOutputWithPast) if field.name != "last_hidden_state"
)


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
    image_outputs (`TinyAlignImageFeatures`, *optional*):
        Features, visual and memory tokens, and neighbours of all images of the batch.
    """

    image_outputs: TinyAlignImageFeatures | None = None


@dataclass
class TinyAlignCausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`):
        Or `(supervised positions, vocab_size)` with `supervised_logits_only=True`.
    image_outputs (`TinyAlignImageFeatures`, *optional*):
        Features, visual and memory tokens, and neighbours of all images of the batch.
    """

    image_outputs: TinyAlignImageFeatures | None = None


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


def cache_of(kwargs: dict[str, Any]) -> Cache | None:
    """Return the cache among these arguments: `cache`, called `past_key_values` before transformers 5.24."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def language_model_fields(outputs: ModelOutput) -> dict[str, Any]:
    """Return what a language model puts out beside its last hidden state, by the names that this transformers uses."""
    return {name: outputs[name] for name in LANGUAGE_MODEL_FIELDS if name in outputs}
