"""From pictures and neighbours to tokens: a vision tower, the two connectors, and captions as tokens."""

import copy
import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ModelOutput

from .configuration_tinyalign import TinyAlignConfig

SEPARATOR = ";"
MAX_CACHED = 100_000  # captions
JOINER = "\u200d"  # of an emoji that is made of several
# Thai, Lao, Tibetan, Burmese, Khmer, kana and Chinese characters: written without spaces between words.
SPACELESS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def read_vision_tower(
    vision_tower: PreTrainedModel, pixel_values: torch.Tensor, layer: int | list[int], strategy: str, **kwargs
) -> tuple[torch.Tensor, ModelOutput]:
    """Return visual features `(n, T, C)` of images `(n, 3, H, W)`, and all that the tower put out."""
    pixel_values = pixel_values.to(vision_tower.dtype)
    if vision_tower.device.type != "meta":  # of one that is offloaded accelerate moves the inputs
        pixel_values = pixel_values.to(vision_tower.device)
    outputs = vision_tower(pixel_values, **{**kwargs, "output_hidden_states": True, "return_dict": True})
    features = outputs.last_hidden_state
    if features.ndim == 4:  # a convolutional tower: (n, C, H, W)
        return features.flatten(2).transpose(1, 2), outputs
    if outputs.hidden_states[-1].ndim != 4:  # else a convolutional tower that makes tokens at its end: DINOv3's
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


def finished_logits(logits: torch.Tensor, text_config: PreTrainedConfig) -> torch.Tensor:
    """Scale and cap logits as Granite, Cohere, Gemma 2 and others do behind their heads."""
    settings = vars(text_config)
    if text_config.model_type.startswith(("granite", "cohere")):
        logits = logits * settings.get("logit_scale", 1) / settings.get("logits_scaling", 1)
    cap = settings.get("final_logit_softcapping")
    return logits if cap is None else cap * torch.tanh(logits / cap)


class Connector(nn.Module):
    """Two linear layers from one space to another, in float32 whatever torch's default dtype is."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int, act: str):
        super().__init__()
        self.linear_1 = nn.Linear(in_size, hidden_size, dtype=torch.float32)
        self.act = ACT2FN[act]
        self.linear_2 = nn.Linear(hidden_size, out_size, dtype=torch.float32)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., in_size)` of any dtype -> `(..., out_size)` in the connector's dtype."""
        weight = self.linear_1.weight  # on "meta" where it is offloaded: accelerate moves the inputs then
        features = features.to(features.device if weight.device.type == "meta" else weight.device, weight.dtype)
        return self.linear_2(self.act(self.linear_1(features)))


class MemoryConnector(nn.Module):
    """Turn what was retrieved into memory tokens (paper, section 4.1: the RAG connector).

    Captions are read as the language model's own tokens, in its embeddings. Latents go through a two-layer MLP, as in
    the paper, those of the neighbours side by side. With both, the two are added up, and a gate that starts at zero
    lets latents in (Flamingo's, arXiv 2204.14198): without it the first steps drown the captions. The neighbours'
    similarities are one more vector, which is added to every memory token.
    """

    def __init__(self, config: TinyAlignConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.empty_token = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))
        if config.memory_scores:
            self.score = nn.Linear(config.memory_top_k, hidden_size, bias=False, dtype=torch.float32)
        if config.reads_latents:
            shape = config.memory_tokens, config.memory_top_k * config.latent_dim
            self.null_latents = nn.Parameter(torch.zeros(shape[0], config.latent_dim, dtype=torch.float32))
            self.mlp = Connector(
                shape[1], config.memory_connector_size or hidden_size, hidden_size, config.projector_hidden_act
            )
        if config.memory_input == "both":
            self.gate = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        self.memory_scores = config.memory_scores

    def forward(
        self,
        words: torch.Tensor | None,
        places: torch.Tensor | None,
        scores: torch.Tensor | None,
        values: torch.Tensor | None,
        used: torch.Tensor,
    ) -> torch.Tensor:
        """Return memory tokens `(n, M, hidden_size)` in the connector's dtype.

        Args:
            words, places: Embeddings `(n, M, hidden_size)` of the captions' tokens, and `(n, M)`, False where there is
                none; `None` for a model that reads latents alone.
            scores, used: Similarities `(n, k)` of the neighbours (ValueError if they are wanted and missing), and
                False where there is none.
            values: Their latents `(n, k, L, D)`, for a model that reads them.
        """
        tokens = self.empty_token
        if words is not None:
            tokens = torch.where(places.unsqueeze(-1), words.to(tokens), tokens)
        if values is not None:
            values = torch.where(used[:, :, None, None], values.to(tokens), self.null_latents)
            latents = self.mlp(values.transpose(1, 2).flatten(2))
            tokens = tokens + (latents if words is None else self.gate.tanh() * latents)
        if self.memory_scores:
            if scores is None:
                raise ValueError(
                    "config.memory_scores: this model is told the similarity of each neighbour. Pass memory_scores "
                    "(images, top_k) with memory_ids, memory_input_ids or memory_values, or let the model retrieve."
                )
            scores = torch.where(used & scores.to(used.device).isfinite(), scores.to(tokens), 0.0)
            tokens = tokens + self.score(scores).unsqueeze(1)
        return tokens


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


def check_memory(config: TinyAlignConfig, n: int, **given: torch.Tensor | None) -> None:
    """Raise ValueError unless what is given of the memory of `n` images has the shapes that the model reads."""
    neighbours = "images, top_k", (n, config.memory_top_k)
    shapes = {
        "memory_ids": neighbours,
        "memory_scores": neighbours,
        "memory_input_ids": ("images, memory_tokens", (n, config.memory_tokens)),
        "memory_values": (
            "images, top_k, memory_tokens, latent_dim",
            (*neighbours[1], config.memory_tokens, config.latent_dim),
        ),
    }
    for name, tensor in given.items():
        axes, expected = shapes[name]
        is_read = name != "memory_values" or config.reads_latents  # a bank may have what this model does not read
        if is_read and tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} have shape {tuple(tensor.shape)}, expected ({axes}) = {expected}.")


def check_retrieval(
    config: TinyAlignConfig, memory: str | None, top_k: int | None, threshold: float | None, known: bool = False
):
    """Raise `ValueError` if what steers the retrieval of one call is out of range, or what is read `known` without."""
    if known and top_k:
        raise ValueError("memory_top_k is of a search, but what is read is given: give fewer neighbours.")
    if memory not in (None, "on", "off"):
        raise ValueError(f"memory is {memory!r}, expected 'on' or 'off'.")
    if top_k is not None and not (type(top_k) is int and 0 <= top_k <= config.memory_top_k):
        raise ValueError(f"memory_top_k is {top_k!r}, expected 0 to the model's {config.memory_top_k}.")
    if threshold is not None and not (isinstance(threshold, (int, float)) and -1 <= threshold <= 1):
        raise ValueError(f"retrieval_threshold is {threshold!r}, expected a similarity from -1 to 1.")


def is_known(config: TinyAlignConfig, input_ids: torch.Tensor | None, values: torch.Tensor | None) -> bool:
    """Return True if all that a model reads of its neighbours is given, and no bank is asked."""
    return (input_ids is not None or not config.reads_captions) and (values is not None or not config.reads_latents)


def no_memory(config: TinyAlignConfig, n: int) -> dict[str, torch.Tensor]:
    """Return the memory of `n` images that nothing was retrieved for."""
    shape = (n, config.memory_top_k)
    memory = {"memory_ids": torch.full(shape, -1), "memory_scores": torch.full(shape, -torch.inf)}
    if config.reads_captions:
        memory["memory_input_ids"] = torch.full((n, config.memory_tokens), -1)
    if config.reads_latents:
        memory["memory_values"] = torch.zeros(*shape, config.memory_tokens, config.latent_dim)
    return memory


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
    if isinstance(exclude_ids, (torch.Tensor, np.ndarray, np.generic)):
        exclude_ids = exclude_ids.tolist()
    return [exclude_ids] * n if isinstance(exclude_ids, (str, int)) else exclude_ids


class Caption(NamedTuple):
    """The tokens of a caption, and after how many of them a word or a character ends, ascending."""

    ids: list[int]
    word_ends: list[int]
    character_ends: list[int]


class CaptionTokenizer:
    """Write the captions of an image's neighbours into `size` places, a token each.

    The captions follow one another as running text, the nearest first, with `"; "` between them. Where there is no
    room for all, each gets an equal share and is cut after the last word that fits; what one leaves is the others'.

    Args:
        tokenizer: the language model's; ValueError if it is a slow one.
        size: places of one image (`config.memory_tokens`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"The tokenizer is a {type(tokenizer).__name__}, which says nothing of where in a text its tokens "
                "stand, expected a fast one: load it with AutoTokenizer."
            )
        self.tokenizer, self.size = copy.deepcopy(tokenizer), size  # other users change padding and truncation
        # what is no special token may be a word, unless it looks like <this>
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        names = [token.content for token in added if token.special or not token.content.strip()[-1].isalnum()]
        names = "|".join(map(re.escape, names))
        self.control = re.compile(f"(?={names or '(?!)'}).", re.DOTALL)
        self.separator = self._behind("a", SEPARATOR).ids
        self.captions: dict[str, Caption] = {}

    def __call__(self, captions: Sequence[Sequence[str]]) -> torch.LongTensor:
        """Return token ids `(images, size)` of each image's captions, nearest first; -1 in the places left over."""
        ids = torch.full((len(captions), self.size), -1)
        for row, texts in enumerate(captions):
            tokens = self.pack([self.tokenize(text) for text in texts])
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        return ids

    def pack(self, captions: Sequence[Caption]) -> list[int]:
        """Return at most `size` tokens of these captions."""
        captions = [caption for caption in captions if caption.character_ends]  # the others are blank
        room = self.size + len(self.separator)  # each caption counts with a separator, the last has none
        lengths = [len(caption.ids) + len(self.separator) for caption in captions]
        kept = []
        for caption, share in zip(captions, shares(lengths, room), strict=True):
            share -= len(self.separator)
            words, characters = ([end for end in ends if end <= share] for ends in caption[1:])
            kept.append(max(words or characters, default=0))  # characters of a first word that is longer
        for number, caption in enumerate(captions):  # what cutting at words has left
            left = room - sum(count + len(self.separator) for count in kept if count)
            free = left + kept[number] if kept[number] else left - len(self.separator)
            kept[number] = max([kept[number], *(end for end in caption.word_ends if end <= free)])
        whole_words = {len(captions[-1].ids), *captions[-1].word_ends} if captions else set()
        if len(kept) > 1 and (0 in kept or kept[-1] not in whole_words):
            return self.pack(captions[:-1])  # so many that of the last one not a word is read, or of another nothing
        tokens = []
        for caption, count in zip(captions, kept, strict=True):
            tokens += [*(self.separator if tokens else []), *caption.ids[:count]]
        return tokens

    def tokenize(self, text: str) -> Caption:
        """Return the tokens of a caption as they are behind a separator; what looks like a control token is text."""
        if text not in self.captions:
            if len(self.captions) >= MAX_CACHED:
                self.captions.clear()
            plain = text.strip()[: 256 * self.size]  # more than fits
            cuts = [0, *(match.end() for match in self.control.finditer(plain)), len(plain)]
            pieces = [plain[start:end] for start, end in itertools.pairwise(cuts)]
            caption = self._behind(SEPARATOR, f" {pieces[0]}")
            for piece in pieces[1:]:
                caption = _joined(caption, self._behind(SEPARATOR, piece))
            limit = self.size + 1  # no more of it is ever read
            ends = ([end for end in part if end <= limit] for part in caption[1:])
            self.captions[text] = Caption(caption.ids[:limit], *ends)
        return self.captions[text]

    def _behind(self, before: str, text: str) -> Caption:
        """Tokens of a text as they are behind another one, or behind a letter if the two share a token."""
        for behind in (before, "a", "1"):
            whole, start = behind + text, len(behind)
            encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            if any(end == start for _, end in encoded["offset_mapping"]):
                break
        ids, ends = [], []
        for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if end > start:
                ids.append(token)
                ends.append(end)
        characters, words = [], []
        for count, end in enumerate(ends, start=1):
            if count < len(ends) and (ends[count] == end or goes_on(whole[end - 1 : end + 1])):
                continue  # the next token goes on with the same character
            last, after = whole[end - 1], whole[end : end + 1]
            if last.isspace():
                continue
            characters.append(count)
            if not after.strip() or (SPACELESS.match(after) and SPACELESS.match(last)):  # "" at the end
                words.append(count)
        return Caption(ids, words, characters)


def goes_on(pair: str) -> bool:
    """Return True if the second of two characters is a part of what the first one writes, as a vowel sign is."""
    return unicodedata.category(pair[1]).startswith("M") or JOINER in pair


def _joined(first: Caption, second: Caption) -> Caption:
    """The tokens of a caption that was cut within a control token."""
    count = len(first.ids)
    words = [end for end in first.word_ends if end < count] + [count + end for end in second.word_ends]
    characters = [*first.character_ends, *(count + end for end in second.character_ends)]
    return Caption(first.ids + second.ids, words, characters)


def shares(lengths: Sequence[int], room: int) -> list[int]:
    """Divide `room` equally among things of these lengths; what one does not need goes to the others."""
    found = [0] * len(lengths)
    for done, number in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        found[number] = min(lengths[number], room // (len(lengths) - done))
        room -= found[number]
    return found


def check_vocabulary(input_ids: torch.LongTensor, known: int):
    """Raise ValueError if a caption has a token that the language model, which knows so many, does not know."""
    if input_ids.max() >= known:
        raise ValueError(
            f"A caption has token {input_ids.max()}, the language model knows {known}: the tokenizer is another "
            "model's, attach the bank with that of the processor saved with the model."
        )


def find_tokenizer(config: TinyAlignConfig, name_or_path: str, **settings) -> PreTrainedTokenizerBase:
    """Return the tokenizer saved with a model, loaded as it was, from the network only if it must."""
    # with the config transformers need not read it again, which would ask whether its code can be trusted
    settings["config"] = config
    advice = "pass that of its processor: model.attach_memory_bank(bank, tokenizer=processor.tokenizer)"
    if not name_or_path:
        raise ValueError(
            f"The model was not loaded, so there is no tokenizer beside it to read captions with: {advice}."
        )
    try:
        try:
            return AutoTokenizer.from_pretrained(name_or_path, **settings | {"local_files_only": True})
        except OSError:
            return AutoTokenizer.from_pretrained(name_or_path, **settings)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name_or_path} has no tokenizer, expected one beside the model's weights, to read captions with: save "
            f"the processor there as well, or {advice}."
        ) from error
