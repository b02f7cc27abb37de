"""Outputs of the TinyAlign models, and where in a prompt their image tokens go."""

from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)
from transformers.utils import is_tracing

from .bank_format import CalibrationConfig
from .configuration_tinyalign import TinyAlignConfig

# hidden states, attentions, and the cache: `cache` since transformers 5.24, `past_key_values` before
LANGUAGE_MODEL_FIELDS = tuple(
    field.name for field in fields(BaseModelOutputWithPast) if field.name != "last_hidden_state"
)

# What is remembered about an image; and everything that says what it is, as well.
MEMORY_INPUTS = (
    "memory_ids memory_input_ids memory_values memory_scores exclude_ids memory memory_top_k retrieval_threshold"
).split()
IMAGE_INPUTS = ["pixel_values", "vision_features", "query_input_ids", "query_attention_mask", *MEMORY_INPUTS]


@dataclass
class TinyAlignImageFeatures(BaseModelOutputWithPooling):
    r"""
    last_hidden_state (`torch.Tensor` of shape `(n, T, C)`): Features of the vision tower, not pooled.
    pooler_output (`list[torch.Tensor]`): `(P + M, hidden_size)` an image: visual tokens, then memory tokens.
    memory_ids, memory_scores (`torch.Tensor` of shape `(n, top_k)`, *optional*):
        Rows of the memory bank that were used, -1 for an empty slot, and their inner products with the query.
    """

    memory_ids: torch.LongTensor | None = None
    memory_scores: torch.Tensor | None = None
    bank = None  # that the rows are of, which may be exchanged before they are asked for: an attribute, no output


@dataclass
class TinyAlignModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    image_outputs (`TinyAlignImageFeatures`, *optional*): Features, tokens and neighbours of all images of the batch.
    """

    image_outputs: TinyAlignImageFeatures | None = None


@dataclass
class TinyAlignCausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`):
        Or `(supervised positions, vocab_size)` with `supervised_logits_only=True`.
    image_outputs (`TinyAlignImageFeatures`, *optional*): As in `TinyAlignModelOutputWithPast`.
    """

    image_outputs: TinyAlignImageFeatures | None = None


@dataclass
class TinyAlignRetrieval(ModelOutput):
    r"""
    scores, ids (`torch.Tensor` of shape `(n, top_k)`): Inner products and rows of the bank, best first.
    captions, source_ids (`list[list[str]]`): The same neighbours' captions and sources.
    probabilities (`torch.Tensor` of shape `(n, top_k)`), none_probability (`(n,)`): That each of them is right, and
        that none of the nearest is; None if the bank was not calibrated.
    """

    scores: torch.Tensor | None = None
    ids: torch.LongTensor | None = None
    captions: list[list[str]] | None = None
    source_ids: list[list[str]] | None = None
    probabilities: torch.Tensor | None = None
    none_probability: torch.Tensor | None = None


def captions_of(rows: list[list[dict | None]]) -> list[list[str]]:
    """Return the captions of each image's neighbours, without empty slots."""
    return [[neighbour["caption"] for neighbour in row if neighbour is not None] for row in rows]


def cache_of(kwargs: dict[str, Any]) -> Cache | None:
    """Return the cache among these arguments: `cache`, called `past_key_values` before transformers 5.24."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def language_model_fields(outputs: ModelOutput) -> dict[str, Any]:
    """Return what a language model puts out beside its last hidden state, by the names that this transformers uses."""
    return {name: outputs[name] for name in LANGUAGE_MODEL_FIELDS if name in outputs}


def uncached_images(
    config: TinyAlignConfig, features: list[torch.Tensor], mask: torch.Tensor, cache: Cache | None, whole: bool = False
) -> list[torch.Tensor]:
    """Return the image tokens that go into a prompt, those of images that a cache holds left out: they come first.

    Args:
        whole: The prompt has what the cache holds as well, and not only what comes after it.
    """
    size, past = len(features[0]), 0
    if cache is not None and whole:
        past = int(cache.get_seq_length())
    elif cache is not None and cache.get_seq_length() > 0 and (len(mask) == 1 or not mask.any()):
        features = features[len(features) - int(mask.sum()) // size :]
        if not features:
            return features
    found = mask.sum(1).tolist()
    for row, count in enumerate(found):  # each row has those of its own: two wrong ones could cancel out
        if count % size:
            raise ValueError(
                f"Row {row} has {count} image placeholders (token {config.image_token_id}), expected a "
                f"multiple of {size}: {config.image_seq_length} visual + "
                f"{size - config.image_seq_length} memory tokens an image. Make the prompt with the "
                "processor saved with this model, and do not truncate it."
            )
    images = [count // size for count in found]
    if sum(images) != len(features):
        raise ValueError(
            f"The rows have placeholders for {images} images, {sum(images)} in all, but {len(features)} images "
            "were given. Pass one image for each."
        )
    left, new = iter(features), []
    for row, count in zip(mask, images, strict=True):
        cached = int(row[:past].sum())
        if cached % size:
            raise ValueError(f"The cache ends within an image, after {cached % size} of its {size} tokens.")
        new += list(islice(left, count))[cached // size :]
    return new


def take_image_inputs(kwargs: dict, encoded: TinyAlignImageFeatures | None = None) -> dict | None:
    """Take what an image is and what is remembered about it out of the arguments of a call; None without images, and
    ValueError for what is to be remembered about images that are `encoded` already.
    """
    inputs = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
    late = [name for name in MEMORY_INPUTS if inputs[name] is not None and (name, inputs[name]) != ("memory", "on")]
    if encoded is not None and late:
        raise ValueError(
            f"Found {', '.join(late)} with mm_encoder_outputs, expected it in get_image_features, which made these."
        )
    images = inputs["vision_features"] if inputs["pixel_values"] is None else inputs["pixel_values"]
    # a batch of chats without images has a tensor of none
    is_empty = torch.is_tensor(images) and not is_tracing(images) and len(images) == 0
    return None if images is None or is_empty else inputs


def repeat_queries(config: TinyAlignConfig, inputs: dict, mask: torch.Tensor) -> dict:
    """Return image inputs with the query of each row repeated for its images, whose places are in the `mask`."""
    queries = [name for name in ("query_input_ids", "query_attention_mask") if inputs[name] is not None]
    if is_tracing(mask) or not queries or len(inputs[queries[0]]) != len(mask):
        return inputs
    counts = mask.sum(1) // config.num_image_tokens
    return inputs | {name: inputs[name].repeat_interleave(counts.to(inputs[name].device), 0) for name in queries}


def check_no_placeholders(config: TinyAlignConfig, mask: torch.Tensor):
    """Raise ValueError if there is a place for an image: none was given."""
    if mask.any():
        raise ValueError(
            f"The rows have {mask.sum(1).tolist()} image placeholders (token {config.image_token_id}), but "
            "no image was given: pass pixel_values or vision_features."
        )


def evidence(scores: np.ndarray, top_k: int) -> np.ndarray:
    """Return the numbers `(n, k, 4)` that tell whether a neighbour is right: 1, how similar it is, how much less than
    the first, and how much more than the mean of the first `top_k`. Empty slots, not finite, are 0 similar.
    """
    scores = np.where(np.isfinite(scores), scores, 0.0)
    mean = scores[:, :top_k].mean(axis=1, keepdims=True)
    return np.stack([np.ones_like(scores), scores, scores[:, :1] - scores, scores - mean], axis=-1)


def probabilities(calibration: CalibrationConfig, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how probably each neighbour is right `(n, k)`, and that none of an image's is `(n,)`: logistic
    regressions on similarities `(n, k)`, best first, of as many neighbours as the bank was calibrated for, or all.
    """
    numbers = evidence(scores.double().cpu().numpy(), calibration.top_k)
    logits = numbers @ calibration.right, numbers[:, 0] @ calibration.none
    right, none = (torch.from_numpy(part).float().sigmoid().to(scores.device) for part in logits)
    right = right.masked_fill(~scores.isfinite(), 0.0)
    # the two were fitted apart; where nothing was found, none is right
    none = none.masked_fill(~scores.isfinite().any(1), 1.0)
    return right, torch.minimum(none, 1 - right[:, : calibration.top_k].amax(1))


def search_with_probabilities(bank: Any, keys: torch.Tensor, top_k: int, exclude: list | None) -> TinyAlignRetrieval:
    """Return what `bank.search` finds, and the probabilities if the bank was calibrated."""
    calibration = None if bank.any_tower else bank.config.calibration
    if calibration is None:
        return TinyAlignRetrieval(*bank.search(keys, top_k, exclude))
    calibrated = min(calibration.top_k, len(bank))
    depth = calibrated if type(top_k) is int and 1 <= top_k < calibrated else top_k
    scores, ids = bank.search(keys, depth, exclude)
    right, none = probabilities(calibration, scores)
    scores, ids, right = scores[:, :top_k], ids[:, :top_k], right[:, :top_k]
    return TinyAlignRetrieval(scores, ids, probabilities=right, none_probability=none)


def source_probabilities(bank: Any, scores: torch.Tensor) -> list[list[float] | None]:
    """Return what `probabilities` gives, None for images of which fewer neighbours were looked up than it takes."""
    calibration = None if bank.any_tower else bank.config.calibration
    if calibration is None or scores.shape[1] < calibration.top_k:
        return [None] * len(scores)
    known = scores[:, : calibration.top_k].isfinite().all(dim=1)
    right, _ = probabilities(calibration, scores)
    return [row if whole else None for row, whole in zip(right.tolist(), known.tolist(), strict=True)]


def sources_of(bank: Any, images: TinyAlignImageFeatures | None, mask: torch.Tensor) -> list[list[dict[str, Any]]]:
    """Return the neighbours that were read for each row of a prompt, whose placeholders are at `mask`."""
    sources = [[] for _ in mask]
    if images is None or images.memory_ids is None or bank is None:
        return sources
    scores = right = [None] * len(images.memory_ids)
    if images.memory_scores is not None:
        scores = images.memory_scores.tolist()
        right = source_probabilities(bank, images.memory_scores)
    counts = (mask.sum(1) // len(images.pooler_output[0])).tolist()
    found = zip(bank.rows(images.memory_ids), scores, right, strict=True)
    found = islice(found, len(images.memory_ids) - sum(counts), None)  # a cache holds the first ones
    for row, count in enumerate(counts):
        for number, (neighbours, similar, likely) in enumerate(islice(found, count)):
            for slot, neighbour in enumerate(neighbours):
                if neighbour is not None:
                    numbers = {"score": similar and similar[slot], "probability": likely and likely[slot]}
                    sources[row].append({"image": number, **numbers, **neighbour})
    return sources
