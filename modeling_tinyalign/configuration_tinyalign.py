"""TinyAlign configuration."""

import os
import re
from typing import Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

# `transformers serve` knows models by this table, which neither auto_map nor AutoModel.register fills.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["tinyalign"] = "TinyAlignForConditionalGeneration"

# What is sane, lowest and highest: a config.json may be anybody's.
LIMITS = {
    "image_token_id": (0, 2**31),
    "image_seq_length": (1, 2**16),
    "vision_feature_size": (1, 2**20),
    "vision_pool_size": (1, 2**10),
    "connector_size": (1, 2**20),
    "memory_top_k": (0, 2**10),
    "memory_tokens": (1, 2**16),
    "latent_dim": (1, 2**16),
    "memory_connector_size": (1, 2**20),
    "query_alpha": (0, 1),
    "retrieval_threshold": (-1, 1),
    "prompt_captions": (0, 2**10),
}
# Of the fields of a part, by name: layers and times that a block is repeated, sizes and numbers of things.
PART_LIMITS = {"layers?$|repeat|depth": (-(2**10), 2**10), "size|num_|dim|heads|channels": (0, 2**24)}
# Fields that name code or kernels to be loaded: for the user to set, not for a config.json.
CODE_FIELDS = ("trust_remote_code", "attn_implementation", "_attn_implementation", "experts_implementation")


@strict
class TinyAlignConfig(PreTrainedConfig):
    r"""Configuration of a vision tower, a language model, the connector between them and the memory.

    > The two models

    vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a SigLIP vision tower):
        Any vision tower `AutoModel` can build. Of a dual tower (SigLIP, CLIP) the vision half is taken.
    text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a Llama):
        Any causal language model `AutoModel` can build.
    lm_head_bias (`bool`, *optional*, defaults to `False`): The language model's head has a bias, as Phi's.

    > What an image becomes

    image_token_id (`int`, *optional*, defaults to 32000): Id of the placeholder `<image>`.
    image_seq_length (`int`, *optional*, defaults to 196): Visual tokens of one image (P), after pooling.
    vision_feature_layer (`int` or `list[int]`, *optional*, defaults to -2):
        Hidden states of the vision tower to read; several are concatenated. A convolutional tower is always read at
        its last layer.
    vision_feature_select_strategy (`str`, *optional*, defaults to `"full"`):
        `"default"` drops the first token (CLIP's CLS token), `"full"` keeps all.
    vision_feature_size (`int`, *optional*):
        Width of the visual features (C). Defaults to the tower's `hidden_size` times the number of layers read; must
        be given for a tower that has no `hidden_size`.
    vision_pool_size (`int`, *optional*):
        Average-pools the square grid of visual tokens to this many rows and columns. `None` keeps all tokens.
    projector_hidden_act (`str`, *optional*, defaults to `"gelu"`): Activation of both connectors.
    connector_size, memory_connector_size (`int`, *optional*):
        Hidden width of the two connectors. Defaults to the language model's hidden size.

    > The memory

    memory_top_k (`int`, *optional*, defaults to 4):
        Neighbours per image. 0 is the plain baseline, without memory connector. `top_k` is accepted as another name;
        it is kept as `memory_top_k`, because to transformers a config's `top_k` is a setting of generation.
    memory_tokens (`int`, *optional*, defaults to 32):
        Memory tokens of one image (M), however many neighbours there are and however long their captions.
    memory_input (`str`, *optional*, defaults to `"captions"`):
        The part of the neighbours that is read. `"captions"`: their text, in the language model's own tokens.
        `"latents"`: the values of the bank, side by side, through a trained MLP (the paper's way; their number L is
        `memory_tokens`). `"both"`: the two added up, latents through a gate that opens.
    latent_dim (`int`, *optional*, defaults to 96):
        Width of a latent of the values (D), for a model that reads them.
    key_space (`str`, *optional*, defaults to `"vision"`):
        Space of the bank's keys: the vision tower's, or (the paper's) the language model's, with the text mixed in.
    query_alpha (`float`, *optional*, defaults to 0.4): Weight of the image in a key of the language space (eq. 4).
    retrieval_threshold (`float`, *optional*):
        Similarity (the inner product of unit keys, -1 to 1) below which a neighbour is not used: its slot gets the
        learned "nothing retrieved". `None` uses all neighbours. `tinyalign bank calibrate` chooses one.
    memory_scores (`bool`, *optional*, defaults to `True`): The memory connector is told their similarities.
    prompt_captions (`int`, *optional*, defaults to 0):
        Neighbours whose captions are written into the prompt. More than 0, with `memory_top_k=0`, is text-only RAG.
    vision_model, vision_model_revision, language_model, language_model_revision (`str`, *optional*):
        The checkpoints that a model was composed of, at their commits, as long as they are not trained any further.
    connectors_only (`bool`, *optional*, defaults to `False`): Set in a checkpoint without the weights of these.
    memory_bank, memory_bank_revision (`str`, *optional*):
        Hub repository and revision of the bank, loaded at the first retrieval.
    """

    _auto_class = "AutoConfig"
    model_type = "tinyalign"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_outputs"]  # by Trainer
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    lm_head_bias: bool = False
    image_token_id: int = 32000
    image_seq_length: int = 196
    vision_feature_layer: int | list[int] = -2
    vision_feature_select_strategy: Literal["default", "full"] = "full"
    vision_feature_size: int | None = None
    vision_pool_size: int | None = None
    projector_hidden_act: str = "gelu"
    connector_size: int | None = None
    memory_top_k: int | None = None
    memory_tokens: int = 32
    memory_input: Literal["captions", "latents", "both"] = "captions"
    latent_dim: int = 96
    memory_connector_size: int | None = None
    key_space: Literal["vision", "language"] = "vision"
    query_alpha: float = 0.4
    retrieval_threshold: float | None = None
    memory_scores: bool = True
    prompt_captions: int = 0
    vision_model: str | None = None
    vision_model_revision: str | None = None
    language_model: str | None = None
    language_model_revision: str | None = None
    connectors_only: bool = False
    memory_bank: str | None = None
    memory_bank_revision: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision_config = _sub_config(self.vision_config, "siglip_vision_model", "vision_config")
        if "vision_config" in self.vision_config.sub_configs:
            self.vision_config = self.vision_config.vision_config
        self.text_config = _sub_config(self.text_config, "llama", "text_config")
        for part in (self.vision_config, self.text_config):
            part._name_or_path = public_name(part._name_or_path)
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        top_k = kwargs.pop("top_k", self.memory_top_k)
        if self.memory_top_k not in (None, top_k):
            raise ValueError(
                f"Found top_k={top_k} and memory_top_k={self.memory_top_k}, two names of one setting: give one."
            )
        self.memory_top_k = 4 if top_k is None else top_k
        for name, (low, high) in LIMITS.items():
            value = vars(self)[name]
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value}, expected {low} or more, and at most {high}.")
        if self.memory_top_k and self.prompt_captions:
            raise ValueError(
                f"memory_top_k is {self.memory_top_k} and prompt_captions {self.prompt_captions}, expected one of "
                "them to be 0: neighbours are read by the memory connector or in the prompt."
            )
        if self.vision_feature_size is None:
            width = self.vision_config.to_dict().get("hidden_size")
            if width is None:
                raise ValueError(
                    f"A {self.vision_config.model_type} config has no hidden_size: pass vision_feature_size, the "
                    "number of channels of the tower's last layer."
                )
            layers = 1 if isinstance(self.vision_feature_layer, int) else len(self.vision_feature_layer)
            self.vision_feature_size = width * layers
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Take `top_k` for `memory_top_k`, so that `from_pretrained(folder, top_k=0)` does; ValueError if config.json
        is not that of a TinyAlign model.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(f"config.json is of a {kind} model, expected a TinyAlign checkpoint.")
        if "top_k" in kwargs:
            kwargs["memory_top_k"] = kwargs.pop("top_k")
        if kwargs.get("memory_bank") not in (None, config_dict.get("memory_bank")):  # is at a commit of its own
            kwargs.setdefault("memory_bank_revision", None)
        try:
            limited = {name: kwargs.pop(name) for name in LIMITS.keys() & kwargs.keys()}  # else set unchecked
            return super().from_dict(_without_code(config_dict | limited), **kwargs)
        except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"config.json does not describe a TinyAlign model ({type(error).__name__}: {error}). Save or download "
                "the model again."
            ) from error

    @property
    def num_neighbours(self) -> int:
        """Neighbours of one image that are read, as memory tokens or in the prompt (k)."""
        return self.memory_top_k or self.prompt_captions

    @property
    def reads_captions(self) -> bool:
        """True if memory tokens are made of the neighbours' captions."""
        return self.memory_top_k > 0 and self.memory_input != "latents"

    @property
    def reads_latents(self) -> bool:
        """True if memory tokens are made of the neighbours' values."""
        return self.memory_top_k > 0 and self.memory_input != "captions"

    @property
    def num_memory_tokens(self) -> int:
        """Memory tokens of one image (M)."""
        return self.memory_tokens if self.memory_top_k else 0

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one image: visual tokens, then memory tokens (P + M)."""
        return self.image_seq_length + self.num_memory_tokens


def public_name(name_or_path: str) -> str:
    """Return a Hub name as it is, of a local folder the last part: configs are shared, paths of a machine are not."""
    is_path = os.path.isabs(name_or_path) or os.path.isdir(name_or_path)
    return os.path.basename(os.path.abspath(name_or_path)) if is_path else name_or_path


def _without_code(config: dict) -> dict:
    return {name: value for name, value in config.items() if name not in CODE_FIELDS}


def _sub_config(config: dict | PreTrainedConfig | None, model_type: str, name: str) -> PreTrainedConfig:
    """By hand, because transformers 5.17 has no `sub_configs_defaults`.

    A config.json may be anybody's: what would have a part loaded with code or kernels of its own is dropped.
    """
    if isinstance(config, PreTrainedConfig):
        return config
    config = _without_code(config or {})
    config.pop("auto_map", None)
    model_type = config.pop("model_type", model_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{name}.model_type is {model_type!r}, expected one that transformers knows. A model with code of its "
            "own can be no part of a TinyAlign model; a newer transformers may know more."
        )
    _check_limits(config, name)
    return CONFIG_MAPPING[model_type](**config)


def _check_limits(config: dict, name: str):
    """Refuse (`ValueError`) what is not sane in a part, and in the parts of it."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_limits(value, f"{name}.{key}")
        values = value if isinstance(value, list) else [value]
        numbers = [number for number in values if type(number) in (int, float)]
        for pattern, (low, high) in PART_LIMITS.items():
            if re.search(pattern, str(key)) and not all(low <= number <= high for number in numbers):
                raise ValueError(f"{name}.{key} is {str(value)[:100]}, expected {low} to {high}.")


__all__ = ["TinyAlignConfig"]
