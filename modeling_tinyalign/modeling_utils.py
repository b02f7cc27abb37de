"""The base of both models: loaded, saved with or without the models it was composed of, pushed, and given a memory."""

import fnmatch
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.utils import logging

from .composition import DOWNLOAD_KWARGS, check_origins, load_models
from .configuration_tinyalign import TinyAlignConfig
from .connectors import (
    CaptionTokenizer,
    MemoryConnector,
    check_memory,
    check_retrieval,
    check_tensor,
    check_vocabulary,
    find_tokenizer,
    for_each,
    used_slots,
)
from .files import WEIGHTS, apply_umask, make_model_card, push_files, resolve_commit
from .key_encoder import query_pixels
from .memory_bank import MemoryBank, opened_bank
from .outputs import TinyAlignRetrieval, captions_of, search_with_probabilities

logger = logging.get_logger(__name__)

CONNECTORS = r"^(model\.)?(memory_)?connector\."

# What a broken config.json or broken weights make transformers raise, beside ValueError and OSError.
BROKEN_MODEL = (SafetensorError, StrictDataclassError, ArithmeticError, AssertionError, AttributeError, LookupError)
BROKEN_MODEL += (RecursionError, TypeError)


class TinyAlignPreTrainedModel(PreTrainedModel):
    config: TinyAlignConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    # They are small, train in float32, and read and write whatever dtype the frozen parts have. The second line is
    # for half precision, the first for quantizers, which match whole names; a baseline has no memory_connector.
    _keep_in_fp32_modules = {r"(?:.*\.)?(?:memory_)?connector"}
    _keep_in_fp32_modules_strict = {r"(?:memory_)?connector"}
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The attached bank, and what reads its captions; of TinyAlignForConditionalGeneration they are its base model's.
    _memory_bank: MemoryBank | None = None
    _caption_tokenizer: CaptionTokenizer | None = None
    _loaded_from: tuple[str, dict] | None = None  # where its tokenizer is, and how to load it

    def __init__(self, config: TinyAlignConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if config.connectors_only:  # from_pretrained gets them from elsewhere
            self._keys_to_ignore_on_load_missing = {"vision_tower", "language_model", "lm_head"}

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True):
        """Connectors alone have no weights to tie: what is missing is no sign of a corrupted checkpoint."""
        super().tie_weights(None if self.config.connectors_only else missing_keys, recompute_mapping)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MemoryConnector):
            for parameter in module.parameters(recurse=False):
                init.zeros_(parameter)
            if module.memory_scores:
                init.zeros_(module.score.weight)
            if self.config.reads_latents:
                init.normal_(module.null_latents, std=0.02)

    @property
    def dtype(self) -> torch.dtype:
        """The wider of the two models' dtypes: a checkpoint is saved as of this dtype, and nothing may be lost."""
        return torch.promote_types(self.base_model.vision_tower.dtype, self.base_model.language_model.dtype)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, **kwargs):
        """Load a model like every other; weights are read from safetensors only, never from pickles. Where there are
        connectors alone, vision tower and language model are loaded from the checkpoints that the config names.

        Raises:
            ValueError: Config or weights are broken or not those of a finished run, or `use_safetensors=False`.
            OSError: A model that the config names cannot be loaded.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors is False, but TinyAlign reads no pickles: save as safetensors first.")
        try:
            loaded = super().from_pretrained(
                pretrained_model_name_or_path, *args, **{**kwargs, "use_safetensors": True}
            )
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            if model.config.connectors_only:
                load_models(model, kwargs)
            place = model.name_or_path if model._hf_peft_config_loaded else pretrained_model_name_or_path or ""
            place = os.path.abspath(place) if os.path.isdir(place) else str(place)
            names = (*DOWNLOAD_KWARGS, "revision", "subfolder")
            model.base_model._loaded_from = place, {name: kwargs[name] for name in names if name in kwargs}
            return loaded
        except OSError as error:
            if os.path.isfile(os.path.join(str(pretrained_model_name_or_path), "trainer_state.json")):
                raise ValueError(
                    f"{pretrained_model_name_or_path} is a checkpoint in the middle of a run and holds only what "
                    "trains: the command that began the run goes on from it, and at the end puts the whole model, "
                    "which loads, into the folder above it."
                ) from error
            raise
        except BROKEN_MODEL as error:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds no TinyAlign model: its config.json or its weights are "
                f"broken, or an argument is wrong ({type(error).__name__}: {error})."
            ) from error

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        connectors_only: bool = False,
        state_dict: dict | None = None,
        **kwargs,
    ):
        """Save weights, config and the code that `trust_remote_code=True` loads them with; not the memory bank.

        Args:
            connectors_only: Save no weights but the connectors'. `from_pretrained` takes vision tower and language
                model from the checkpoints, at the commits, that the model was composed of; ValueError if these are
                not known, or were trained.
        """
        if connectors_only:
            check_origins(self.config)
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {name: tensor for name, tensor in state_dict.items() if re.search(CONNECTORS, name)}
        self.config.auto_map = {
            "AutoConfig": "configuration_tinyalign.TinyAlignConfig",
            "AutoModel": "modeling_tinyalign.TinyAlignModel",
            "AutoModelForImageTextToText": "modeling_tinyalign.TinyAlignForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_tinyalign.TinyAlignForConditionalGeneration",
        }
        bank = self.base_model._memory_bank
        if bank is not None:  # it may have been pushed since it was attached
            self.config.memory_bank, self.config.memory_bank_revision = bank.repo_id, bank.revision
        kept = "memory_bank", "memory_bank_revision", "vision_model", "language_model"
        before = {name: vars(self.config)[name] for name in kept}
        if os.path.exists(before["memory_bank"] or ""):
            logger.warning(
                f"config.memory_bank is a local path ({before['memory_bank']}) and is not saved: push the bank to the "
                "Hub and set config.memory_bank to its repository, or attach it again after loading."
            )
            self.config.memory_bank = self.config.memory_bank_revision = None
        if not connectors_only:
            for name in ("vision_model", "language_model"):
                if os.path.exists(before[name] or ""):  # a path of this machine means nothing elsewhere
                    setattr(self.config, name, None)
        self.config.connectors_only = connectors_only
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
            apply_umask(save_directory)
        finally:
            self.config.update({**before, "connectors_only": False})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
        token: str | bool | None = None,
        **kwargs,
    ) -> CommitInfo:
        """Push like every model, and: the config names the attached bank's repository, pinned to its commit; weights
        of an earlier push that are not overwritten are deleted; a repository without a card gets one without blanks.

        Args:
            kwargs: `private`, `revision`, `create_pr`, `commit_message`, `commit_description`.
        """
        self.base_model.pin_memory_bank(token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            files = {path.name: path for path in Path(folder).iterdir()}
            _, commit = push_files(
                files,
                repo_id,
                "model",
                replaced=WEIGHTS if fnmatch.filter(files, WEIGHTS) else "",  # PEFT's adapters are saved alone
                make_card=lambda name: make_model_card(name, self.config, tags or []),
                token=token,
                **{"commit_message": "Upload model", **kwargs},
            )
        return commit

    @property
    def memory_bank(self) -> MemoryBank | None:
        """The attached bank. If there is none, `config.memory_bank` is loaded and attached, when that is set."""
        if self.base_model._memory_bank is None and self.config.memory_bank is not None:
            token = (self.base_model._loaded_from or ("", {}))[1].get("token")
            self.attach_memory_bank(self.config.memory_bank, self.config.memory_bank_revision, token=token)
        return self.base_model._memory_bank

    def attach_memory_bank(
        self,
        bank: MemoryBank | str | os.PathLike | None,
        revision: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        check_probes: bool = True,
        token: str | bool | None = None,
    ):
        """Retrieve from this bank from now on. It is no part of the weights; the config names its Hub repository.

        Args:
            bank: A bank, or the folder or dataset repository (at `revision`, read with `token`) of one; None: detach.
            tokenizer: The processor's, to read captions with. A checkpoint finds its own beside its weights.
            check_probes: `False` takes a bank of another vision tower too, as [`MemoryBank.for_any_tower`].

        Raises ValueError if the bank has other latents or keys than the model, is too small, or of another tower.
        """
        if bank is None:
            self.detach_memory_bank()
            return
        bank, config = opened_bank(bank, revision, token), self.config
        found, expected = [bank.config.key_encoder.key_space], [config.key_space]
        if config.reads_latents:
            found += bank.config.value_shape
            expected += [config.memory_tokens, config.latent_dim]
        if found != expected:
            raise ValueError(
                f"The bank has (key_space, num_latents, latent_dim) = {found}, the model expects {expected}. Build a "
                "bank for this model, or use the model the bank was built for."
            )
        if len(bank) < config.num_neighbours:
            raise ValueError(
                f"The bank has {len(bank)} rows, expected at least memory_top_k = {config.num_neighbours}: add rows."
            )
        bank = bank if check_probes else bank.for_any_tower()
        if not bank.any_tower:
            bank.check_probes(self)
        if tokenizer is not None:
            self.read_captions_with(tokenizer)
        self.base_model._memory_bank = bank
        config.memory_bank, config.memory_bank_revision = bank.repo_id, bank.revision

    def pin_memory_bank(self, token: str | bool | None = None):
        """Write the bank's repository and commit into the config; `OSError` if the Hub has no such bank."""
        config, bank = self.config, self.base_model._memory_bank
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
        """Forget the bank, also the one that `config.memory_bank` names."""
        self.base_model._memory_bank = self.config.memory_bank = self.config.memory_bank_revision = None

    @property
    def caption_tokenizer(self) -> CaptionTokenizer:
        """The reader of captions, with the tokenizer that lies beside the model's weights unless one was given."""
        if self.base_model._caption_tokenizer is None:
            place, settings = self.base_model._loaded_from or (self.config.name_or_path, {})
            self.read_captions_with(find_tokenizer(self.config, place, **settings))
        return self.base_model._caption_tokenizer

    def read_captions_with(self, tokenizer: PreTrainedTokenizerBase):
        """Set the language model's tokenizer; a loaded model finds it beside its weights."""
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        self.base_model._caption_tokenizer = CaptionTokenizer(tokenizer, self.config.memory_tokens)

    def require_bank(self) -> MemoryBank:
        """Return the bank; ValueError if there is none."""
        bank = self.memory_bank
        if bank is None:
            raise ValueError(
                f"This model uses {self.config.num_neighbours} neighbours an image, but no memory bank is attached "
                "and none of them were given. Call model.attach_memory_bank(folder_or_repository), or pass "
                "memory='off' to do without."
            )
        return bank

    @torch.no_grad()
    def retrieve(
        self,
        images: torch.Tensor | Any = None,
        vision_features: torch.Tensor | None = None,
        query_input_ids: torch.LongTensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
        top_k: int | None = None,
        exclude_ids: list | str | int | None = None,
        retrieval_threshold: float | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> TinyAlignRetrieval:
        """Return the `top_k` (default: as many as the model reads) neighbours of each image; of a calibrated bank
        (`tinyalign bank calibrate`) with the probabilities that each of them is right, and that none is.

        Those below `retrieval_threshold` (default: the config's) have id -1, and neither caption nor source.

        Args:
            images: `pixel_values` of the processor, or a PIL image, the path of one, or a list of these. The other
                inputs are those of [`TinyAlignModel.get_image_features`].
        """
        images = pixel_values if images is None else images
        if (images is None) == (vision_features is None):
            raise ValueError("Pass exactly one of pixel_values and vision_features.")
        check_retrieval(self.config, None, None, retrieval_threshold)
        bank = self.require_bank()
        if vision_features is None:
            pixels = images if torch.is_tensor(images) else query_pixels(bank.config.preprocessing, images)
            vision_features = self.get_vision_features(pixels)
        top_k = self.config.num_neighbours if top_k is None else top_k
        keys = bank.encode_queries(vision_features, query_input_ids, query_attention_mask)
        found = search_with_probabilities(bank, keys, top_k, for_each(exclude_ids, len(keys)))
        threshold = self.config.retrieval_threshold if retrieval_threshold is None else retrieval_threshold
        found.ids, _ = used_slots(found.ids, found.scores, threshold)
        rows = [[neighbour for neighbour in row if neighbour is not None] for row in bank.rows(found.ids)]
        found.captions = captions_of(rows)
        found.source_ids = [[neighbour["source_id"] for neighbour in row] for row in rows]
        return found

    @torch.compiler.disable  # the search is no part of a graph
    def look_up(
        self,
        bank: MemoryBank,
        queries: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
        memory_ids: torch.LongTensor | None,
        memory_scores: torch.Tensor | None,
        exclude_ids: list | str | int | None,
        top_k: int | None = None,
    ) -> dict[str, torch.Tensor | None]:
        """Return ids, scores and values that the model reads: of these rows, or of the nearest to the queries."""
        slots = self.config.memory_top_k
        top_k = slots if top_k is None else top_k
        if memory_ids is None:
            keys = bank.encode_queries(*queries)
            memory_scores, memory_ids = bank.search(keys, top_k, exclude=for_each(exclude_ids, len(keys)))
        memory = {"memory_ids": F.pad(torch.as_tensor(memory_ids)[..., :top_k], (0, slots - top_k), value=-1)}
        if memory_scores is not None:
            scores = torch.as_tensor(memory_scores)[..., :top_k]
            memory["memory_scores"] = F.pad(scores, (0, slots - top_k), value=-torch.inf)
        if self.config.reads_latents:
            memory["memory_values"] = bank.gather(memory["memory_ids"])
        return memory

    def read_memory(
        self, tokens: torch.Tensor, threshold: float | None, bank: MemoryBank | None, **memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.LongTensor | None, torch.Tensor | None]:
        """Return memory tokens `(n, M, hidden_size)` for the images of `tokens`, and the ids and scores in use.

        Args:
            memory: Those of `memory_ids`, `memory_scores`, `memory_input_ids` and `memory_values` that are known.
                Without `memory_input_ids` the captions of the bank's rows are read.
        """
        if self.config.memory_top_k != self.built_top_k:
            raise ValueError(
                f"config.memory_top_k is {self.config.memory_top_k}, but the model was made for {self.built_top_k} "
                "neighbours: set it back (memory_top_k of a call takes fewer), or make and train another model."
            )
        memory = {name: torch.as_tensor(value) for name, value in memory.items() if value is not None}
        check_memory(self.config, tokens.shape[0], **memory)
        scores, words, places = memory.get("memory_scores"), None, None
        threshold = self.config.retrieval_threshold if threshold is None else threshold
        ids, used = used_slots(memory.get("memory_ids"), scores, threshold)
        if self.config.reads_captions:
            input_ids = memory.get("memory_input_ids")
            if input_ids is None:
                input_ids = self.caption_tokenizer(captions_of(bank.rows(ids)))
                check_vocabulary(input_ids, self.config.text_config.vocab_size)
            places = input_ids.to(tokens.device) >= 0
            words = self.get_input_embeddings()(input_ids.to(tokens.device).clamp(min=0))
        values = memory["memory_values"].to(tokens.device) if self.config.reads_latents else None
        used = torch.ones(tokens.shape[0], self.config.memory_top_k, dtype=torch.bool) if used is None else used
        return self.memory_connector(words, places, scores, values, used.to(tokens.device)), ids, scores

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return `(batch, sequence)`, True where an image token goes."""
        if input_ids is not None:
            check_tensor("input_ids", input_ids, "(batch, sequence)", floating=False)
            return input_ids == self.config.image_token_id
        if inputs_embeds is None:
            raise ValueError("Pass input_ids or inputs_embeds, the prompt made by the processor, with the images.")
        check_tensor("inputs_embeds", inputs_embeds, "(batch, sequence, hidden size)")
        placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)
