"""What the TinyAlign models return."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
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


def has_cache(kwargs: dict[str, Any]) -> bool:
    """Return whether a cache is among these arguments: `cache`, called `past_key_values` before transformers 5.24."""
    return kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None


def select_fields(outputs: ModelOutput, output_class: type[ModelOutput]) -> dict[str, Any]:
    """Return those of a model's outputs that `output_class` has as well, by the names that this transformers uses."""
    names = {field.name for field in fields(output_class)}
    return {name: value for name, value in outputs.items() if name in names}
