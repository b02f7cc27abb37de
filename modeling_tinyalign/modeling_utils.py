"""The base of both models: loaded, saved with or without the models it was composed of, pushed, and given a memory."""

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

from .composition import check_origins, load_models, unless_local
from .configuration_tinyalign import TinyAlignConfig
from .connectors import (
    MemoryConnector,
    build_lexicon,
    check_memory_values,
    check_retrieval,
    check_tensor,
    for_each,
    used_slots,
)
from .files import WEIGHTS, apply_umask, make_model_card, push_files, resolve_commit
from .key_encoder import query_pixels
from .memory_bank import MemoryBank
from .outputs import TinyAlignRetrieval

logger = logging.get_logger(__name__)

CONNECTORS = r"^(model\.)?(memory_)?connector\."

# What a broken config.json or broken weights make transformers raise, beside ValueError and OSError.
BROKEN = (SafetensorError, StrictDataclassError, ArithmeticError, AssertionError, AttributeError, LookupError)
BROKEN += (RecursionError, TypeError)


def opened_bank(bank: MemoryBank | str | os.PathLike, revision: str | None = None) -> MemoryBank:
    """Return a bank, loaded if it is a name or a path; `TypeError` for anything else."""
    if isinstance(bank, (str, os.PathLike)):
        return MemoryBank.from_pretrained(bank, revision=revision)
    if "MemoryBank" not in (kind.__name__ for kind in type(bank).__mro__):  # a checkpoint's own class is another one
        raise TypeError(f"The bank is a {type(bank).__name__}, expected a MemoryBank, a folder or a repository.")
    return bank


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
    # The attached bank; of TinyAlignForConditionalGeneration it is that of its base model.
    _memory_bank: MemoryBank | None = None

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
            init.normal_(module.null_latents, std=0.02)
            init.zeros_(module.slot_embedding)
            if module.lexicon_bias is not None:  # as for words without tokens
                init.zeros_(module.lexicon_keys)
                init.zeros_(module.lexicon_bias)
                init.constant_(module.lexicon_tokens, -1)

    @property
    def dtype(self) -> torch.dtype:
        """The wider of the two models' dtypes: a checkpoint is saved as of this dtype, and nothing may be lost."""
        return torch.promote_types(self.base_model.vision_tower.dtype, self.base_model.language_model.dtype)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, **kwargs):
        """
        Load a model like every other; weights are read from safetensors only, never from pickles. Where there are
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
            return loaded
        except OSError as error:
            if os.path.isfile(os.path.join(str(pretrained_model_name_or_path), "trainer_state.json")):
                raise ValueError(
                    f"{pretrained_model_name_or_path} is a checkpoint in the middle of a run and holds only what "
                    "trains: the command that began the run goes on from it, and at the end puts the whole model, "
                    "which loads, into the folder above it."
                ) from error
            raise
        except BROKEN as error:
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
        """
        Save weights, config and the code that `trust_remote_code=True` loads them with; not the memory bank.

        Args:
            connectors_only: Save no weights but the connectors'. `from_pretrained` takes vision tower and language
                model from the checkpoints, at the commits, that the model was composed of.

        Raises:
            ValueError: `connectors_only`, but vision tower or language model were trained, or their checkpoints are
                not known.
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
        memory_bank = self.config.memory_bank
        if memory_bank is not None and os.path.exists(memory_bank):
            logger.warning(
                f"config.memory_bank is a local path ({memory_bank}) and is not saved: push the bank to the Hub and "
                "set config.memory_bank to its repository, or attach it again after loading."
            )
            self.config.memory_bank = self.config.memory_bank_revision = None
        if not connectors_only:
            for name in ("vision_model", "language_model"):
                setattr(self.config, name, unless_local(before[name]))
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
        """
        Push like every model, and: the config names the attached bank's repository, pinned to its commit; weights of
        an earlier push that are not overwritten are deleted; a repository without a card gets one without blanks.

        Args:
            kwargs: `private`, `revision`, `create_pr`, `commit_message`, `commit_description`.
        """
        self.base_model.pin_memory_bank(token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            _, commit = push_files(
                {path.name: path for path in Path(folder).iterdir()},
                repo_id,
                "model",
                replaced=WEIGHTS,
                make_card=lambda name: make_model_card(name, self.config, tags or []),
                token=token,
                **{"commit_message": "Upload model", **kwargs},
            )
        return commit

    # ------------------------------------------------------------------ memory

    @property
    def memory_bank(self) -> MemoryBank | None:
        """The attached bank. If there is none, `config.memory_bank` is loaded and attached, when that is set."""
        if self.base_model._memory_bank is None and self.config.memory_bank is not None:
            self.attach_memory_bank(self.config.memory_bank, self.config.memory_bank_revision)
        return self.base_model._memory_bank

    def attach_memory_bank(
        self, bank: MemoryBank | str | os.PathLike | None, revision: str | None = None, check_probes: bool = True
    ):
        """
        Retrieve from this bank from now on. It is no part of the weights; the config names its Hub repository.

        Args:
            bank: A bank, or the folder or dataset repository (at `revision`) of one. None: see `detach_memory_bank`.
            check_probes: `False` takes a bank of another vision tower too, as [`MemoryBank.for_any_tower`].

        Raises:
            ValueError: The bank has other latents or keys than the model, is too small, or is of another vision tower.
        """
        if bank is None:
            self.detach_memory_bank()
            return
        bank, config = opened_bank(bank, revision), self.config
        found = (*bank.config.value_shape, bank.config.key_encoder.key_space)
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

    def build_lexicon(self, tokenizer: PreTrainedTokenizerBase, bank: MemoryBank):
        """Teach the memory connector the words of a bank; see [`connectors.build_lexicon`]."""
        build_lexicon(self.base_model, tokenizer, bank.captions, bank.value_encoder)

    def require_bank(self) -> MemoryBank:
        """Return the bank; ValueError if there is none."""
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
        images: torch.Tensor | Any = None,
        vision_features: torch.Tensor | None = None,
        query_input_ids: torch.LongTensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
        top_k: int | None = None,
        exclude_ids: list | str | int | None = None,
        retrieval_threshold: float | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> TinyAlignRetrieval:
        """
        Return the `top_k` (default: as many as the model reads) neighbours of each image.

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
            vision_features = self.get_vision_features(pixels.to(self.device))
        check_tensor("vision_features", vision_features, "(images, tokens, width)")
        top_k = self.config.num_neighbours if top_k is None else top_k
        keys = bank.encode_queries(vision_features, query_input_ids, query_attention_mask)
        scores, ids = bank.search(keys, top_k, exclude=for_each(exclude_ids, len(keys)))
        threshold = self.config.retrieval_threshold if retrieval_threshold is None else retrieval_threshold
        ids, _ = used_slots(ids, scores, threshold)
        rows = [[neighbour for neighbour in row if neighbour is not None] for row in bank.rows(ids)]
        return TinyAlignRetrieval(
            scores=scores,
            ids=ids,
            captions=[[neighbour["caption"] for neighbour in row] for row in rows],
            source_ids=[[neighbour["source_id"] for neighbour in row] for row in rows],
        )

    def check_top_k(self):
        """Raise ValueError if `config.memory_top_k` was changed and the memory connector can't follow."""
        config = self.config
        if config.memory_top_k != self._built_top_k and (config.memory_fusion == "channel" or self._built_top_k == 0):
            raise ValueError(
                f"config.memory_top_k is {config.memory_top_k}, but the model was made for {self._built_top_k} "
                "neighbours, and only memory_fusion='sequence' reads another number of them: set it back, or make and "
                "train a model with the new number."
            )

    def look_up(
        self,
        queries: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
        memory_ids: torch.LongTensor | None,
        memory_scores: torch.Tensor | None,
        exclude_ids: list | str | int | None,
        top_k: int | None = None,
    ) -> dict[str, torch.Tensor | None]:
        """Return memory values, ids and scores: of these rows of the bank, or of the nearest to the queries."""
        self.check_top_k()
        bank = self.require_bank()
        if memory_ids is None:
            keys = bank.encode_queries(*queries)
            slots = self.config.memory_top_k
            top_k = slots if top_k is None else top_k
            memory_scores, memory_ids = bank.search(keys, top_k, exclude=for_each(exclude_ids, len(keys)))
            memory_ids = F.pad(memory_ids, (0, slots - top_k), value=-1)
            memory_scores = F.pad(memory_scores, (0, slots - top_k), value=-torch.inf)
        memory_ids = torch.as_tensor(memory_ids)
        return {"memory_ids": memory_ids, "memory_values": bank.gather(memory_ids), "memory_scores": memory_scores}

    def read_memory(
        self,
        tokens: torch.Tensor,
        threshold: float | None,
        memory_values: torch.Tensor,
        memory_ids: torch.LongTensor | None,
        memory_scores: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.LongTensor | None, torch.Tensor | None]:
        """Return memory tokens `(n, M, hidden_size)` for the images of `tokens`, and the ids and scores in use."""
        self.check_top_k()
        values = torch.as_tensor(memory_values)
        memory_ids = None if memory_ids is None else torch.as_tensor(memory_ids)
        memory_scores = None if memory_scores is None else torch.as_tensor(memory_scores)
        check_memory_values(self.config, values, tokens.shape[0], memory_ids=memory_ids, memory_scores=memory_scores)
        memory_ids, mask = used_slots(memory_ids, memory_scores, threshold)
        memory_tokens = self.memory_connector(
            values.to(tokens.device),
            mask,
            lambda ids: self.get_input_embeddings()(ids),  # accelerate would move the layer itself
            memory_scores,
        )
        return memory_tokens, memory_ids, memory_scores

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
