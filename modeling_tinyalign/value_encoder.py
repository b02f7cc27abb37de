"""The value encoder: a Perceiver that compresses an image and its caption into the latents a memory bank stores."""

import os
from pathlib import Path

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PerceiverConfig, PerceiverModel, PreTrainedConfig, PreTrainedModel

from .bank_format import MAX_SIZE, broken_bank
from .files import apply_umask

PADDING_BYTE = 256  # the first number that is no byte
MAX_LAYERS = 1024


@strict
class ValueEncoderConfig(PreTrainedConfig):
    r"""Sizes of the value encoder; the defaults are the paper's Table 4.

    num_latents, latent_dim (`int`, *optional*, default to 32 and 96): Shape of a value (L, D).
    d_model (`int`, *optional*, defaults to 128): Width of the inputs that the latents attend to.
    num_blocks, num_self_attends_per_block (`int`, *optional*, default to 1 and 8): Depth.
    num_self_attention_heads, num_cross_attention_heads (`int`, *optional*, default to 8): Attention heads.
    vision_feature_size (`int`, *optional*, defaults to 1152): Width of the vision tower's features (C).
    num_vision_tokens (`int`, *optional*, defaults to 729): Features of one image (T).
    bytes_per_patch (`int`, *optional*, defaults to 16):
        UTF-8 bytes of a caption that are read together. A patch is one word; a longer word goes on in the next patch.
    max_words (`int`, *optional*, defaults to 32): Words of a caption that are read.
    """

    model_type = "tinyalign_value_encoder"

    num_latents: int = 32
    latent_dim: int = 96
    d_model: int = 128
    num_blocks: int = 1
    num_self_attends_per_block: int = 8
    num_self_attention_heads: int = 8
    num_cross_attention_heads: int = 8
    vision_feature_size: int = 1152
    num_vision_tokens: int = 729
    bytes_per_patch: int = 16
    max_words: int = 32

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name, value in self.settings.items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more.")
        heads = (self.num_self_attention_heads, self.num_cross_attention_heads)
        if any(self.latent_dim % number for number in heads):
            raise ValueError(
                f"latent_dim is {self.latent_dim}, expected a multiple of the numbers of heads, {heads}: change it or "
                "num_self_attention_heads and num_cross_attention_heads."
            )
        if self.d_model % self.bytes_per_patch:
            raise ValueError(
                f"d_model is {self.d_model}, expected a multiple of bytes_per_patch = {self.bytes_per_patch}."
            )

    @property
    def settings(self) -> dict:
        """The fields above, without those every config has."""
        return {name: vars(self)[name] for name in ValueEncoderConfig.__annotations__}


class ValueEncoder(PreTrainedModel):
    """Perceiver (`transformers.PerceiverModel`) over the words of a caption and the tokens of its image.

    It knows no language model: captions are read as bytes, so one bank serves every language model.
    `ValueEncoder(config)` is the untrained encoder of the reference; seed it and it can be saved and used again.
    """

    config_class = ValueEncoderConfig
    main_input_name = "images"

    def __init__(self, config: ValueEncoderConfig):
        super().__init__(config)
        self.byte_embedding = nn.Embedding(PADDING_BYTE + 1, config.d_model // config.bytes_per_patch)
        self.word_position = nn.Embedding(config.max_words, config.d_model)
        self.image_projection = nn.Linear(config.vision_feature_size, config.d_model)
        self.image_norm = nn.LayerNorm(config.d_model)
        self.image_position = nn.Embedding(config.num_vision_tokens, config.d_model)
        self.perceiver = PerceiverModel(
            PerceiverConfig(
                **config.settings,  # those that a Perceiver does not have are left unread
                **dict.fromkeys(("d_latents", "qk_channels", "v_channels"), config.latent_dim),
                attention_probs_dropout_prob=0.0,
            )
        )
        self.output_norm = nn.LayerNorm(config.latent_dim, elementwise_affine=False)
        self.post_init()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Save weights and config as every model does, readable for all whom the user's umask lets read."""
        super().save_pretrained(save_directory, **kwargs)
        apply_umask(save_directory)

    @classmethod
    def of_bank(cls, path: Path, settings: dict) -> "ValueEncoder":
        """Read a memory bank's value encoder, frozen, from its tensors and `value_encoder` of its bank_config.json.

        A bank may be anybody's, and a config.json can make `from_pretrained` read other files, adapters and kernels:
        here nothing counts but tensors and sizes. ValueError, naming the file, if it holds no encoder of these sizes.
        """
        try:
            tensors = load_file(path)
            settings = {name: settings[name] for name in ValueEncoderConfig.__annotations__}
            if not all(type(size) is int and 1 <= size <= MAX_SIZE for size in settings.values()):
                raise ValueError(f"found {settings}, expected integers between 1 and {MAX_SIZE}")
            if settings["num_blocks"] * settings["num_self_attends_per_block"] > MAX_LAYERS:
                raise ValueError(f"more than {MAX_LAYERS} layers")
            with torch.device("meta"):  # nothing is allocated before the sizes are known to be those of the tensors
                encoder = cls(ValueEncoderConfig(**settings))
            encoder.load_state_dict(tensors, assign=True)
            for name, tensor in tensors.items():
                if not (tensor.dtype == encoder.dtype and tensor.is_floating_point() and tensor.isfinite().all()):
                    raise ValueError(f"{name} is not made of finite floating-point numbers of one type")
        except (SafetensorError, StrictDataclassError, LookupError, TypeError, ValueError, RuntimeError) as error:
            found = f"{type(error).__name__}: {error}"
            raise broken_bank(f"{path} does not hold this bank's value encoder ({found})") from error
        return encoder.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor, caption_bytes: torch.LongTensor) -> torch.Tensor:
        """Return values `(n, num_latents, latent_dim)`, of mean 0 and variance 1 in each latent.

        Args:
            images: `(n, T, C)` vision features.
            caption_bytes: `(n, words, bytes_per_patch)` from [`tokenize`]; a word of 256s is padding.
        """
        images = self.image_projection(images)
        if images.shape[1] != self.image_position.num_embeddings:
            raise ValueError(
                f"An image has {images.shape[1]} tokens, but the value encoder was made for "
                f"{self.image_position.num_embeddings}: use the vision tower and image size it was made for."
            )
        images = self.image_norm(images) + self.image_position.weight
        words = self.byte_embedding(caption_bytes).flatten(2) + self.word_position.weight[: caption_bytes.shape[1]]
        mask = torch.cat([(caption_bytes != PADDING_BYTE).any(-1), images.new_ones(images.shape[:2]).bool()], dim=1)
        latents = self.perceiver(torch.cat([words, images], dim=1), attention_mask=mask).last_hidden_state
        return self.output_norm(latents)

    def tokenize(self, captions: list[str]) -> torch.LongTensor:
        """Return the UTF-8 bytes of captions `(n, words, bytes_per_patch)`, one word a row, padded with 256.

        A longer word goes on in the next row; at most `max_words` rows are kept.
        """
        size, rows = self.config.bytes_per_patch, []
        for caption in captions:
            patches = []
            for word in map(str.encode, caption.split()):
                patches += [word[start : start + size] for start in range(0, len(word), size)]
            rows.append(patches[: self.config.max_words])
        patches = torch.full((len(rows), max(1, *map(len, rows)), size), PADDING_BYTE)
        for row, words in enumerate(rows):
            for column, word in enumerate(words):
                patches[row, column, : len(word)] = torch.tensor(list(word))
        return patches

    def encode(self, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """Return values `(n, num_latents, latent_dim)` of images (see [`forward`]) and their captions."""
        return self(images.to(self.device, self.dtype), self.tokenize(captions).to(self.device))
