"""Attaching a memory bank to a model, and asking it for neighbours."""

import os

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .bank_builder import check_latents
from .hub_files import resolve_commit
from .lexicon import lexicon_words, slot_tokens
from .memory_bank import MemoryBank
from .outputs import TinyAlignRetrieval

logger = logging.get_logger(__name__)


class RetrievalMixin:
    """What a model needs to retrieve: a bank, kept outside the weights, and `get_vision_features`."""

    _memory_bank: MemoryBank | None = None
    _built_top_k: int

    @property
    def memory_bank(self) -> MemoryBank | None:
        """The attached bank. If there is none, `config.memory_bank` is loaded and attached, when that is set."""
        if self._memory_bank is None and self.config.memory_bank is not None:
            self.attach_memory_bank(self.config.memory_bank, self.config.memory_bank_revision)
        return self._memory_bank

    def attach_memory_bank(
        self, bank: MemoryBank | str | os.PathLike, revision: str | None = None, check_probes: bool = True
    ):
        """
        Retrieve from this bank from now on. It is no part of the weights; its Hub repository, if any, goes into the
        config.

        Args:
            bank (`MemoryBank` or `str`): A bank, or the folder or dataset repository of one.
            revision (`str`, *optional*): Revision of the repository.
            check_probes (`bool`, *optional*, defaults to `True`): `False` takes a bank of another vision tower too, as
                [`MemoryBank.for_any_tower`].

        Raises:
            ValueError: The bank has other latents or keys than the model, is too small, or is of another vision tower.
        """
        if isinstance(bank, (str, os.PathLike)):
            bank = MemoryBank.from_pretrained(bank, revision=revision)
        config = self.config
        found = (bank.num_latents, bank.latent_dim, bank.key_space)
        expected = (config.num_latents, config.latent_dim, config.key_space)
        if found != expected:
            raise ValueError(
                f"The bank has (num_latents, latent_dim, key_space) = {found}, the model expects {expected}. Build a "
                "bank for this model, or use the model the bank was built for."
            )
        if len(bank) < config.num_neighbours:
            raise ValueError(
                f"The bank has {len(bank)} rows, expected at least memory_top_k = {config.num_neighbours}: add rows."
            )
        if not check_probes:
            bank = bank.for_any_tower()
        if not bank.any_tower:
            bank.check_probes(self)
        self._memory_bank = bank
        config.memory_bank, config.memory_bank_revision = bank.repo_id, bank.revision

    def pin_memory_bank(self, token: str | bool | None = None):
        """
        Writes the bank's repository and its commit into the config, as `push_to_hub` does.

        Raises:
            OSError: The Hub has no such bank, or can't be asked.
        """
        config, bank = self.config, self._memory_bank
        if bank is not None:
            config.memory_bank, config.memory_bank_revision = bank.repo_id, bank.revision
        if bank is not None and bank.repo_id is None:
            logger.warning(
                "The attached memory bank is not on the Hub, so the config names none: push it first "
                "(bank.push_to_hub), or attach it again after loading."
            )
        elif config.memory_bank is not None and not os.path.isdir(config.memory_bank):
            config.memory_bank_revision = resolve_commit(config.memory_bank, config.memory_bank_revision, token)

    def detach_memory_bank(self):
        """Forgets the bank, also the one that `config.memory_bank` names."""
        self._memory_bank = self.config.memory_bank = self.config.memory_bank_revision = None

    def build_lexicon(self, tokenizer: PreTrainedTokenizerBase, bank: MemoryBank):
        """
        Teaches the memory connector to read: the words of the bank's captions and of the tokenizer's vocabulary, as
        the bank's value encoder spells them. A closed form, nothing is trained. Call it before training, and again
        after a bank with new words is attached. The words are saved with the model.

        The first lexicon of a model sets the output layer of the memory connector's MLP to zero: it starts as a
        correction of the words. What a model that was trained without a lexicon had learned there is lost, and a
        warning says so.

        Args:
            tokenizer: The language model's.
            bank: A bank whose value encoder was trained to spell (`tinyalign_vlm.training.train_value_encoder`).

        Raises:
            ValueError: The model has no memory, or the bank's latents are not those that it reads.
        """
        if self.config.memory_top_k == 0:
            raise ValueError("memory_top_k is 0, a model without memory: it reads no bank and needs no lexicon.")
        encoder, connector = bank.value_encoder, self.memory_connector
        check_latents(encoder, self)
        if encoder.config.latents_per_word != self.config.latents_per_word:
            raise ValueError(
                f"The bank's value encoder writes {encoder.config.latents_per_word} latents a word, the model reads "
                f"{self.config.latents_per_word}: set latents_per_word of the model's config to the bank's."
            )
        words = lexicon_words(tokenizer, bank.captions)
        keys, bias = encoder.word_scores(words)
        tokens = slot_tokens(tokenizer, words, self.config.latents_per_word)
        if self.config.memory_lexicon_size == 0:  # the MLP starts as a correction of 0
            torch.nn.init.zeros_(connector.mlp.linear_2.weight)
            torch.nn.init.zeros_(connector.mlp.linear_2.bias)
            logger.warning(
                "This is the model's first lexicon: the output layer of its memory connector was set to zero, to be "
                "trained from there. If it was trained before, that is lost."
            )
        device = connector.null_latents.device
        connector.set_lexicon(keys.to(device), bias.to(device), tokens.to(device))
        self.config.memory_lexicon_size = len(words)

    def _require_bank(self) -> MemoryBank:
        bank = self.memory_bank
        if bank is None:
            raise ValueError(
                f"This model uses {self.config.num_neighbours} neighbours an image, but no memory bank is attached "
                "and no memory_values were given. Call model.attach_memory_bank(folder_or_repository), or pass "
                "memory='off' to do without."
            )
        return bank

    @torch.no_grad()
    def retrieve(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        query_input_ids: torch.LongTensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
        top_k: int | None = None,
        exclude_ids: list | None = None,
    ) -> TinyAlignRetrieval:
        """
        The `top_k` (default: as many as the model uses) neighbours of each image; inputs as [`get_image_features`].
        Those below `config.retrieval_threshold` have id -1, and neither caption nor source.
        """
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("Pass exactly one of pixel_values and vision_features.")
        if vision_features is None:
            vision_features = self.get_vision_features(pixel_values)
        top_k = self.config.num_neighbours if top_k is None else top_k
        bank = self._require_bank()
        keys = bank.encode_queries(vision_features, query_input_ids, query_attention_mask)
        scores, ids = bank.search(keys, top_k, exclude=exclude_ids)
        ids, _ = self._used_slots(ids, scores)
        rows = [[neighbour for neighbour in row if neighbour is not None] for row in bank.rows(ids)]
        return TinyAlignRetrieval(
            scores=scores,
            ids=ids,
            captions=[[neighbour["caption"] for neighbour in row] for row in rows],
            source_ids=[[neighbour["source_id"] for neighbour in row] for row in rows],
        )

    def _used_slots(
        self, ids: torch.LongTensor | None, scores: torch.Tensor | None
    ) -> tuple[torch.LongTensor | None, torch.Tensor | None]:
        """Of `(n, k)` neighbours: the ids, -1 in slots that are empty or below the threshold, and False in these."""
        used = None if ids is None else ids >= 0
        threshold = self.config.retrieval_threshold
        if scores is not None and threshold is not None:
            above = torch.as_tensor(scores, device=None if ids is None else ids.device) >= threshold
            used = above if ids is None else used & above
            ids = None if ids is None else ids.masked_fill(~used, -1)
        return ids, used

    def _check_top_k(self):
        config = self.config
        if config.memory_top_k != self._built_top_k and (config.memory_fusion == "channel" or self._built_top_k == 0):
            raise ValueError(
                f"config.memory_top_k is {config.memory_top_k}, but the model was made for {self._built_top_k} "
                "neighbours, and only memory_fusion='sequence' reads another number of them: set it back, or make and "
                "train a model with the new number."
            )

    def _check_memory_values(self, values: torch.Tensor, n: int, **of_each: torch.Tensor | None):
        config = self.config
        expected = (n, config.memory_top_k, config.num_latents, config.latent_dim)
        found = tuple(values.shape)
        free = {1} if config.memory_fusion == "sequence" else set()
        if len(found) != 4 or any(
            a != b for i, (a, b) in enumerate(zip(found, expected, strict=True)) if i not in free
        ):
            raise ValueError(
                f"memory_values have shape {found}, expected (images, top_k, num_latents, latent_dim) = {expected}."
            )
        for name, tensor in of_each.items():
            if tensor is not None and tensor.shape != values.shape[:2]:
                raise ValueError(f"{name} have shape {tuple(tensor.shape)}, expected (images, top_k) = {found[:2]}.")
