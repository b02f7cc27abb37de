"""The lexicon: which words a language model can write, and how to recognise them in a bank's latents."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

LONGEST_REST = 4  # tokens of a word's last slot that are read


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
