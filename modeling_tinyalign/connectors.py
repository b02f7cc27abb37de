"""From pictures and neighbours to tokens: reading a vision tower, and the two connectors that are trained."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .configuration_tinyalign import TinyAlignConfig

logger = logging.get_logger(__name__)

LONGEST_REST = 4  # tokens of a word's last slot that are read


def read_vision_tower(
    vision_tower: PreTrainedModel, pixel_values: torch.Tensor, layer: int | list[int], strategy: str, **kwargs
) -> tuple[torch.Tensor, ModelOutput]:
    """Return visual features `(n, T, C)` of images `(n, 3, H, W)`, and all that the tower put out."""
    pixel_values = pixel_values.to(vision_tower.device, vision_tower.dtype)
    outputs = vision_tower(pixel_values, **{**kwargs, "output_hidden_states": True, "return_dict": True})
    if outputs.last_hidden_state.ndim == 4:  # a convolutional tower: (n, C, H, W)
        return outputs.last_hidden_state.flatten(2).transpose(1, 2), outputs
    layers = [layer] if isinstance(layer, int) else layer
    features = torch.cat([outputs.hidden_states[index] for index in layers], dim=-1)
    return (features[:, 1:] if strategy == "default" else features), outputs


def pool_grid(features: torch.Tensor, size: int | None) -> torch.Tensor:
    """Average-pool visual features `(n, T, C)` on a square grid to `(n, size * size, C)`; `None` keeps them all."""
    if size is None:
        return features
    n, tokens, width = features.shape
    side = int(tokens**0.5)
    if side**2 != tokens or side < size:
        raise ValueError(
            f"Found {tokens} visual tokens, expected a square of at least {size} x {size} to pool to {size} x {size} "
            "(vision_pool_size, or the grid of a bank's keys). A tower with a CLS token needs "
            'vision_feature_select_strategy="default".'
        )
    grid = features.transpose(1, 2).reshape(n, width, side, side)
    return F.adaptive_avg_pool2d(grid, size).flatten(2).transpose(1, 2)


class Connector(nn.Module):
    """Two linear layers from one space to another, in float32 whatever torch's default dtype is."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int, act: str):
        super().__init__()
        self.linear_1 = nn.Linear(in_size, hidden_size, dtype=torch.float32)
        self.act = ACT2FN[act]
        self.linear_2 = nn.Linear(hidden_size, out_size, dtype=torch.float32)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., in_size)` of any dtype -> `(..., out_size)` in the connector's dtype."""
        features = features.to(self.linear_1.weight)
        return self.linear_2(self.act(self.linear_1(features)))


class MemoryConnector(nn.Module):
    """
    Turn the values of the neighbours into memory tokens (paper, section 4.1: the RAG connector).

    A two-layer MLP, as in the paper. With a lexicon (`TinyAlignForConditionalGeneration.build_lexicon`) the word that
    each latent spells is added to it, in the language model's own embedding: what the bank says can be read at once,
    and training has to learn only what to make of it.
    """

    def __init__(self, config: TinyAlignConfig):
        super().__init__()
        self.memory_fusion = config.memory_fusion
        hidden_size = config.text_config.hidden_size
        self.memory_scores = config.memory_scores
        width = config.latent_dim + (1 if config.memory_scores else 0)
        in_size = width * (config.memory_top_k if config.memory_fusion == "channel" else 1)
        self.null_latents = nn.Parameter(torch.zeros(config.num_latents, config.latent_dim, dtype=torch.float32))
        self.slot_embedding = nn.Parameter(torch.zeros(config.num_latents, hidden_size, dtype=torch.float32))
        self.mlp = Connector(
            in_size, config.memory_connector_size or hidden_size, hidden_size, config.projector_hidden_act
        )
        words = config.memory_lexicon_size
        if words == 0:
            self.set_lexicon(None, None, None)
        else:
            self.set_lexicon(
                torch.zeros(words, config.latent_dim, dtype=torch.float32),
                torch.zeros(words, dtype=torch.float32),
                torch.full((config.latents_per_word, words, LONGEST_REST), -1),
            )

    def set_lexicon(self, keys: torch.Tensor | None, bias: torch.Tensor | None, tokens: torch.LongTensor | None):
        """See `read_words` for the shapes; without words (`None`) the connector is the MLP alone."""
        self.register_buffer("lexicon_keys", keys)
        self.register_buffer("lexicon_bias", bias)
        self.register_buffer("lexicon_tokens", tokens)

    def _apply(self, fn, recurse: bool = True):
        """Loading in half precision makes the token ids float32: as bfloat16 they would become other tokens."""
        if self.lexicon_tokens is not None:
            self.lexicon_tokens = self.lexicon_tokens.long()
        return super()._apply(fn, recurse)

    def forward(
        self,
        values: torch.Tensor,
        mask: torch.Tensor | None = None,
        embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        `values (n, k, L, D)`, `mask (n, k)` that is False where nothing was retrieved, the language model's
        embedding layer (used if there is a lexicon) and the neighbours' similarities `(n, k)` (read with
        `config.memory_scores`) -> `(n, M, hidden_size)`: L tokens (`"channel"`), or k x L, neighbour by neighbour
        (`"sequence"`). Raises `ValueError` when the similarities are wanted and missing.
        """
        values = values.to(self.null_latents)
        mask = torch.ones(values.shape[:2]) if mask is None else mask
        mask = mask.to(values.device, torch.bool)[:, :, None, None]
        words = 0.0
        if self.lexicon_bias is not None:
            with torch.no_grad():
                words = read_words(values, self.lexicon_keys, self.lexicon_bias, self.lexicon_tokens, embed)
                words = torch.where(mask, words, 0.0)
                words = words.mean(1) if self.memory_fusion == "channel" else words
        values = torch.where(mask, values, self.null_latents)
        if self.memory_scores:
            if scores is None:
                raise ValueError(
                    "config.memory_scores: this model is told the similarity of each neighbour. Pass memory_scores "
                    "(images, top_k) with memory_ids or memory_values, or let the model retrieve."
                )
            scores = torch.where(mask, scores.to(values)[:, :, None, None], 0.0)
            values = torch.cat([values, scores.expand(*values.shape[:3], 1)], dim=-1)
        if self.memory_fusion == "channel":
            return self.mlp(values.transpose(1, 2).flatten(2)) + self.slot_embedding + words
        return (self.mlp(values) + self.slot_embedding + words).flatten(1, 2)


def used_slots(
    ids: torch.LongTensor | None, scores: torch.Tensor | None, threshold: float | None
) -> tuple[torch.LongTensor | None, torch.Tensor | None]:
    """Return the ids `(n, k)` of neighbours, -1 in slots that are empty or below the threshold, and False in these."""
    used = None if ids is None else ids >= 0
    if scores is not None and threshold is not None:
        above = torch.as_tensor(scores, device=None if ids is None else ids.device) >= threshold
        used = above if ids is None else used & above
        ids = None if ids is None else ids.masked_fill(~used, -1)
    return ids, used


def check_memory_values(config: TinyAlignConfig, values: torch.Tensor, n: int, **of_each: torch.Tensor | None) -> None:
    """Raise ValueError unless memory values, and tensors with a number for each, are of `n` images."""
    expected = (n, config.memory_top_k, config.num_latents, config.latent_dim)
    found = tuple(values.shape)
    free = {1} if config.memory_fusion == "sequence" else set()
    if len(found) != 4 or any(a != b for i, (a, b) in enumerate(zip(found, expected, strict=True)) if i not in free):
        raise ValueError(
            f"memory_values have shape {found}, expected (images, top_k, num_latents, latent_dim) = {expected}."
        )
    for name, tensor in of_each.items():
        if tensor is not None and tensor.shape != values.shape[:2]:
            raise ValueError(f"{name} have shape {tuple(tensor.shape)}, expected (images, top_k) = {found[:2]}.")


def check_retrieval(config: TinyAlignConfig, memory: str | None, top_k: int | None, threshold: float | None):
    """Raise `ValueError` if what steers the retrieval of one call is out of range."""
    if memory not in (None, "on", "off"):
        raise ValueError(f"memory is {memory!r}, expected 'on' or 'off'.")
    if top_k is not None and not (type(top_k) is int and 0 <= top_k <= config.memory_top_k):
        raise ValueError(f"memory_top_k is {top_k!r}, expected 0 to the model's {config.memory_top_k}.")
    if threshold is not None and not (isinstance(threshold, (int, float)) and -1 <= threshold <= 1):
        raise ValueError(f"retrieval_threshold is {threshold!r}, expected a similarity from -1 to 1.")


def no_memory(config: TinyAlignConfig, n: int) -> dict[str, torch.Tensor]:
    """Return memory values, ids and scores for `n` images that nothing was retrieved for."""
    shape = (n, config.memory_top_k)
    return {
        "memory_ids": torch.full(shape, -1),
        "memory_values": torch.zeros(*shape, config.num_latents, config.latent_dim),
        "memory_scores": torch.full(shape, -torch.inf),
    }


def check_tensor(name: str, value: Any, axes: str, floating: bool = True):
    """Raise `ValueError` unless a value is a tensor with these axes, of floating point or of integers."""
    if not torch.is_tensor(value) or value.ndim != len(axes.split(",")) or value.is_floating_point() != floating:
        found = f"{tuple(value.shape)} of {value.dtype}" if torch.is_tensor(value) else type(value).__name__
        kind = "floats" if floating else "integers"
        raise ValueError(f"{name} is {found}, expected a tensor {axes} of {kind}, as the processor makes it.")


def merged_settings(settings: dict | list[dict] | None) -> dict:
    """Return what a call of a pipeline sets, of one chat or of the chats of a batch, in which it is the same."""
    if isinstance(settings, dict) or not settings:
        return settings or {}
    merged = dict(settings[0])
    if isinstance(merged.get("exclude_ids"), list):
        merged["exclude_ids"] = [item for chat in settings for item in chat["exclude_ids"]]
    return merged


def for_each(exclude_ids: list | str | int | None, n: int) -> list | None:
    """Return what not to retrieve, one item an image: one `source_id` or row id is for all of them."""
    return [exclude_ids] * n if isinstance(exclude_ids, (str, int)) else exclude_ids


# ---------------------------------------------------------------------- the lexicon


def vocabulary_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The whole words that are one token: byte-level (`Ġword`) and SentencePiece (`▁word`) vocabularies."""
    words = (token[1:] for token in tokenizer.get_vocab() if token[:1] in ("Ġ", "▁"))
    return sorted(word for word in words if word.isascii() and word.isalpha())


def lexicon_words(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[str]:
    """The words of the captions and of the vocabulary; the empty string stands for "no word here"."""
    return ["", *sorted({word for caption in captions for word in caption.split()} | set(vocabulary_words(tokenizer)))]


def slot_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], slots: int) -> torch.LongTensor:
    """
    Tokens of each word for each of its slots: one token a slot, all that are left in the last slot, a line break where
    none is left.

    Returns:
        `(slots, len(words), LONGEST_REST)`, padded with -1.
    """
    lead = len(tokenizer("x", add_special_tokens=False)["input_ids"])  # a word after another has its space
    blank = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    tokens = torch.full((slots, len(words), LONGEST_REST), -1)
    encoded = tokenizer([f"x {word}" if word else "x" for word in words], add_special_tokens=False)["input_ids"]
    for row, ids in enumerate(encoded):
        ids = ids[lead:]
        parts = [*([token] for token in ids[: slots - 1]), ids[slots - 1 :][:LONGEST_REST]]
        for slot in range(slots):
            part = (parts[slot] if slot < len(parts) else None) or blank
            tokens[slot, row, : len(part)] = torch.tensor(part)
    return tokens


def read_words(
    values: torch.Tensor,
    keys: torch.Tensor,
    bias: torch.Tensor,
    tokens: torch.Tensor,
    embed: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """
    Each latent's word, in the language model's own input embeddings.

    Args:
        values: `(..., L, D)` latents.
        keys, bias: `(words, D)` and `(words,)`, from `ValueEncoder.word_scores`.
        tokens: `(slots, words, LONGEST_REST)` from `slot_tokens`.
        embed: token ids to embeddings, `(...)` to `(..., hidden_size)`. Not their weight, which may be offloaded.

    Returns:
        `(..., L, hidden_size)`, the mean over the likeliest words.
    """
    with torch.autocast(values.device.type, enabled=False):  # bfloat16 would take one word for another
        scores = values.float() @ keys.float().T + bias.float()
    weights, words = scores.topk(min(4, len(bias)))
    slot = torch.arange(values.shape[-2], device=values.device) % len(tokens)
    ids = tokens[slot[:, None], words].long()  # loading in half precision casts integer buffers too
    is_token = (ids >= 0).unsqueeze(-1)
    vectors = (embed(ids.clamp(min=0)).float() * is_token).sum(-2) / is_token.sum(-2).clamp(min=1)
    return (weights.softmax(-1).unsqueeze(-1) * vectors).sum(-2)


def build_lexicon(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], value_encoder: PreTrainedModel
) -> None:
    """
    Teach the memory connector to read: the words of a bank's captions and of the tokenizer's vocabulary, as the bank's
    value encoder spells them. A closed form, nothing is trained. Call it before training, and again after a bank with
    new words is attached. The words are saved with the model.

    The first lexicon of a model sets the output layer of the memory connector's MLP to zero: it starts as a correction
    of the words. What a model that was trained without a lexicon had learned there is lost, and a warning says so.

    Args:
        tokenizer: The language model's.
        value_encoder: The bank's, trained to spell.

    Raises:
        ValueError: The model has no memory, or the latents are not those that it reads.
    """
    config, encoder = model.config, value_encoder.config
    if config.memory_top_k == 0:
        raise ValueError("memory_top_k is 0, a model without memory: it reads no bank and needs no lexicon.")
    found = (encoder.num_latents, encoder.latent_dim, encoder.latents_per_word)
    expected = (config.num_latents, config.latent_dim, config.latents_per_word)
    if found != expected:
        raise ValueError(
            f"The bank's value encoder has (num_latents, latent_dim, latents_per_word) = {found}, the model expects "
            f"{expected}: set those of the model's config to the bank's."
        )
    words = lexicon_words(tokenizer, captions)
    keys, bias = value_encoder.word_scores(words)
    tokens = slot_tokens(tokenizer, words, config.latents_per_word)
    connector = model.memory_connector
    if config.memory_lexicon_size == 0:  # the MLP starts as a correction of 0
        nn.init.zeros_(connector.mlp.linear_2.weight)
        nn.init.zeros_(connector.mlp.linear_2.bias)
        logger.warning(
            "This is the model's first lexicon: the output layer of its memory connector was set to zero, to be "
            "trained from there. If it was trained before, that is lost."
        )
    device = connector.null_latents.device
    connector.set_lexicon(keys.to(device), bias.to(device), tokens.to(device))
    config.memory_lexicon_size = len(words)
