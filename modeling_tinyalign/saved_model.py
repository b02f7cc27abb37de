"""What a TinyAlign model does about files: loaded, saved with or without the models it was composed of, and pushed."""

import os
import re
import tempfile
from pathlib import Path

import torch
from huggingface_hub import CommitInfo
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from .composition import check_origins, load_models, unless_local
from .configuration_tinyalign import TinyAlignConfig
from .connectors import MemoryConnector
from .hub_files import WEIGHTS, push_files
from .plain_cards import model_card

logger = logging.get_logger(__name__)

CONNECTORS = r"^(model\.)?(memory_)?connector\."

# What a broken config.json or broken weights make transformers raise, beside ValueError and OSError.
BROKEN = (
    SafetensorError,
    StrictDataclassError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
)


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
        As of every model, but weights are read from safetensors only, never from pickles. Where there are connectors
        alone, vision tower and language model are loaded from the checkpoints that the config names.

        Raises:
            ValueError: The checkpoint's config or weights are broken, or `use_safetensors=False` is asked for; or its
                connectors are of other models.
            OSError: A model that the config names cannot be had.
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
        Saves weights, config and the code that `trust_remote_code=True` loads them with; not the memory bank.

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
        memory_bank, revision = self.config.memory_bank, self.config.memory_bank_revision
        if memory_bank is not None and os.path.exists(memory_bank):
            logger.warning(
                f"config.memory_bank is a local path ({memory_bank}) and is not saved: push the bank to the Hub and "
                "set config.memory_bank to its repository, or attach it again after loading."
            )
            self.config.memory_bank = self.config.memory_bank_revision = None
        vision_model, language_model = self.config.vision_model, self.config.language_model
        if not connectors_only:
            self.config.vision_model, self.config.language_model = map(unless_local, (vision_model, language_model))
        self.config.connectors_only = connectors_only
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        finally:
            self.config.memory_bank, self.config.memory_bank_revision = memory_bank, revision
            self.config.vision_model, self.config.language_model = vision_model, language_model
            self.config.connectors_only = False

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload model",
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
        token: str | bool | None = None,
        **kwargs,
    ) -> CommitInfo:
        """
        As of every model, and: the config names the attached bank's repository, pinned to its commit; weights of an
        earlier push that are not overwritten are deleted; a repository without a card gets one without blanks.

        Args:
            kwargs: `private`, `revision`, `create_pr`, `commit_description`.
        """
        self.base_model.pin_memory_bank(token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            _, commit = push_files(
                {path.name: path for path in Path(folder).iterdir()},
                repo_id,
                "model",
                replaced=WEIGHTS,
                plain_card=lambda name: model_card(name, self.config, tags or []),
                commit_message=commit_message,
                token=token,
                **kwargs,
            )
        return commit
