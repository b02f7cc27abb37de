"""The key encoder: what an image (and, in language space, its text) is filed under in the memory bank."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
from transformers.utils import logging

from .bank_format import KeyEncoderConfig, TowerConfig, broken_bank
from .configuration_tinyalign import public_name
from .connectors import Connector, pool_grid
from .files import apply_umask

logger = logging.get_logger(__name__)

NUM_PROBES = 4
MIN_PROBE_COSINE = 0.99  # bfloat16 has 0.999, see probe_pixels
MAX_PROBE_DIFFERENCE = 1e-3
MAX_RATIO = 100  # of an image's sides, as the processor's
TOWER_SIDE = 4096  # of a picture made for the tower: a bank's settings may be anybody's
MAX_FEATURES = 2**26  # of one image


def attention_pool(features: torch.Tensor, attention_mask: torch.Tensor | None = None, grid: int = 1) -> torch.Tensor:
    """Attention-weighted aggregation of a token sequence into one vector (paper section 4.2, "Key Generation"),
    `(batch, grid * grid * dim)` float32.

    The tokens attend to one another by cosine similarity; a token's weight is the attention it receives, averaged
    over the tokens that look at it.

    Args:
        features: `(batch, tokens, dim)`, any floating dtype; computed in float32.
        attention_mask: `(batch, tokens)`, 0 or False where a token is padding.
        grid: the weights are those of the whole image, but the weighted tokens are averaged in the cells of a
            `grid` x `grid` raster, and the cells concatenated: the key also tells where something is.
    """
    features = features.float()
    directions = F.normalize(features, dim=-1)
    similarity = directions @ directions.transpose(1, 2)
    if attention_mask is None:
        weights = similarity.softmax(dim=-1).mean(dim=1)
    else:
        mask = attention_mask.to(features.device, torch.float32)
        similarity = similarity.masked_fill(mask[:, None, :] == 0, torch.finfo(torch.float32).min)
        weights = (similarity.softmax(dim=-1) * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    if grid > 1:
        return pool_grid(features.shape[1] * weights[:, :, None] * features, grid).flatten(1)
    return torch.einsum("nt,ntd->nd", weights, features)


class KeyEncoder(nn.Module):
    """Frozen map from vision features to retrieval keys; it belongs to a bank and is saved with it.

    `key_space="vision"`: keys are pooled vision features, whatever language model uses the bank. `"language"` (the
    paper's and the reference's variant): connector outputs and caption embeddings, mixed by `alpha` and pooled
    together, through snapshots of the connector and of the token embeddings taken when the bank was built.

    Args:
        mean: `(raw_dim,)`, the mean of the bank's raw keys.
        projection: `(raw_dim, key_dim)`, PCA whitening fitted on the bank's raw keys, or None.
        token_embeddings: `(vocabulary, raw_dim)`; with the connector, for keys in language space.
        vision_pool_size: side of the grid the visual tokens are average-pooled to before the connector, or None.
        alpha: weight of the image tokens; the text tokens weigh `1 - alpha`.
        grid: in vision space, keys hold `grid` x `grid` cells of the image (see `attention_pool`).
    """

    def __init__(
        self,
        mean: torch.Tensor,
        projection: torch.Tensor | None = None,
        connector: Connector | None = None,
        token_embeddings: torch.Tensor | None = None,
        vision_pool_size: int | None = None,
        alpha: float = 0.4,
        grid: int = 1,
    ):
        super().__init__()
        if grid < 1 or (grid > 1 and connector is not None):
            raise ValueError(
                f'The key grid is {grid}, expected 1 or, with key_space="vision", more: keys of the language space '
                "have no spatial cells."
            )
        self.register_buffer("mean", mean.float())
        self.register_buffer("projection", None if projection is None else projection.float())
        self.register_buffer("token_embeddings", None if token_embeddings is None else token_embeddings.half())
        self.connector, self.vision_pool_size = connector, vision_pool_size
        self.alpha, self.grid = alpha, grid

    @property
    def key_dim(self) -> int:
        return self.mean.numel() if self.projection is None else self.projection.shape[1]

    @property
    def feature_dim(self) -> int:
        """Width of the vision features it reads."""
        return self.mean.numel() // self.grid**2 if self.connector is None else self.connector.linear_1.in_features

    @torch.no_grad()
    def raw_keys(
        self,
        vision_features: torch.Tensor,
        query_input_ids: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Keys before centring: `(batch, tokens, width)` features to `(batch, raw_dim)` float32.

        The text, `query_input_ids` `(batch, length)` with its mask, is read in language space only; without it the key
        is the image's alone.
        """
        if vision_features.shape[-1] != self.feature_dim:
            raise ValueError(
                f"The vision features are {vision_features.shape[-1]} wide, but this bank's key encoder was built for "
                f"{self.feature_dim}. Use the vision tower the bank was built with, or build a bank for this one."
            )
        with torch.autocast(vision_features.device.type, enabled=False):
            if self.token_embeddings is None:
                return attention_pool(vision_features, grid=self.grid)
            tokens = self.connector(pool_grid(vision_features, self.vision_pool_size))
            image = self.alpha * F.normalize(tokens.float(), dim=-1)
            if query_input_ids is None:
                return attention_pool(image)
            if query_attention_mask is None:
                query_attention_mask = torch.ones_like(query_input_ids)
            vocabulary = len(self.token_embeddings)
            if query_input_ids.numel() and int(query_input_ids.max()) >= vocabulary:
                raise ValueError(
                    f"Query token {int(query_input_ids.max())} is outside the {vocabulary} tokens this bank was built "
                    "with. A language-space bank belongs to one tokenizer: use the language model it was built with."
                )
            text = (1 - self.alpha) * F.normalize(self.token_embeddings[query_input_ids].float(), dim=-1)
            mask = torch.cat([torch.ones_like(image[..., 0]), query_attention_mask.to(image)], dim=1)
            return attention_pool(torch.cat([image, text], dim=1), mask)

    @torch.no_grad()
    def finish(self, raw_keys: torch.Tensor) -> torch.Tensor:
        """Centre, project and L2-normalise raw keys: `(batch, raw_dim)` to `(batch, key_dim)` float32."""
        with torch.autocast(raw_keys.device.type, enabled=False):
            keys = raw_keys.float() - self.mean.to(raw_keys.device)
            if self.projection is not None:
                keys = keys @ self.projection.to(raw_keys.device)
            return F.normalize(keys, dim=-1)

    def forward(
        self,
        vision_features: torch.Tensor,
        query_input_ids: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(batch, tokens, width)` features, with the query of `raw_keys`, to unit-length keys `(batch, key_dim)`."""
        return self.finish(self.raw_keys(vision_features, query_input_ids, query_attention_mask))

    def save(self, path: Path, probe_keys: torch.Tensor) -> None:
        """Write it as safetensors, with the bank's probe keys."""
        save_file({**self.cpu().state_dict(), "probe_keys": probe_keys}, path)
        apply_umask(path.parent)

    @classmethod
    def load(cls, path: Path, config: KeyEncoderConfig, key_dim: int) -> tuple[KeyEncoder, torch.Tensor]:
        """Read what `save` wrote: the key encoder, of keys `key_dim` wide, and the probe keys `(4, raw_dim)`.
        ValueError, naming the file, if it is not safetensors, or its tensors do not fit together.
        """
        try:
            tensors = load_file(path)
            for name, tensor in tensors.items():  # with none empty, nothing made of them is larger than the file
                if not (tensor.is_floating_point() and tensor.numel() and tensor.isfinite().all()):
                    raise ValueError(f"{name} is empty, of {tensor.dtype}, or holds numbers that are not finite")
            mean, probe_keys = tensors.pop("mean"), tensors.pop("probe_keys")
            projection, embeddings = tensors.pop("projection", None), tensors.pop("token_embeddings", None)
            connector = None
            if config.key_space == "language":
                weights = {name.removeprefix("connector."): tensors.pop(name) for name in list(tensors)}
                hidden_size, in_size = weights["linear_1.weight"].shape
                with torch.device("meta"):
                    connector = Connector(in_size, hidden_size, len(weights["linear_2.bias"]), config.connector_act)
                connector.load_state_dict(weights, assign=True)
            grid, pool_size = config.grid, config.vision_pool_size
            encoder = cls(mean, projection, connector, embeddings, pool_size, config.alpha, grid)
            (raw_dim,) = mean.shape
            if tensors or (embeddings is None) != (connector is None):
                raise ValueError(f"tensors too many or too few, {sorted(tensors)}")
            if probe_keys.shape != (NUM_PROBES, raw_dim):
                raise ValueError(f"probe keys of shape {tuple(probe_keys.shape)}, expected {(NUM_PROBES, raw_dim)}")
            if embeddings is not None and embeddings[0].shape != (raw_dim,):
                raise ValueError(f"token embeddings of shape {tuple(embeddings.shape)}, expected (tokens, {raw_dim})")
            # one pass shows whether the other shapes fit together
            side = max(grid, pool_size or 1)
            if side**2 * encoder.feature_dim > MAX_FEATURES:
                raise ValueError(f"{side} x {side} tokens {encoder.feature_dim} wide, expected {MAX_FEATURES} numbers")
            keys = encoder(torch.zeros(1, side**2, encoder.feature_dim))
            if keys.shape != (1, key_dim):
                raise ValueError(f"keys of shape {tuple(keys.shape)}, expected (1, {key_dim})")
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            found = f"{type(error).__name__}: {error}"
            raise broken_bank(f"{path} does not hold this bank's key encoder ({found})") from error
        return encoder, probe_keys

    def probe(self, model: PreTrainedModel, image_shape: list[int]) -> torch.Tensor:
        """Return the raw keys `(4, raw_dim)` of four fixed synthetic images: they say which vision tower it is."""
        with evaluating(model):
            features = model.get_vision_features(probe_pixels(image_shape))
        return self.to(features.device).raw_keys(features).cpu()

    def check_tower(self, model: PreTrainedModel, tower: TowerConfig, probe_keys: torch.Tensor) -> None:
        """Refuse another tower than `tower`, by its probe keys, in a ValueError; warn, once, of a small difference."""
        found = tower_name(model)
        advice = "Use the tower the bank was built with, or build a bank with this one (MemoryBank.build)."
        if not all(parameter.is_floating_point() for parameter in model.base_model.vision_tower.parameters()):
            advice = "The vision tower is quantized: leave it out (llm_int8_skip_modules, modules_to_not_convert)."
        try:
            raw = self.probe(model, tower.image_shape)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"The memory bank was built with the vision tower {tower.name}, of images {tower.image_shape} and "
                f"features {self.feature_dim} wide, which this model's ({found}) does not take or make ({error}). "
                f"{advice}"
            ) from error
        # a nearly constant tower, an untrained one say, leaves nothing to take a cosine of; squares need float64
        probes, mean = probe_keys.double(), self.mean.cpu()
        if ((raw - probes).norm(dim=-1) <= MAX_PROBE_DIFFERENCE * probes.norm(dim=-1)).all():
            return
        cosine = F.cosine_similarity(raw - mean, probe_keys - mean).min().item()
        if not cosine >= MIN_PROBE_COSINE:
            raise ValueError(
                f"The memory bank was built with the vision tower {tower.name}, this model has {found}: on the probe "
                f"images the cosine of their keys is {cosine:.3f}, expected at least {MIN_PROBE_COSINE}. {advice}"
            )
        dtype = str(model.base_model.vision_tower.dtype).removeprefix("torch.")
        logger.warning_once(
            f"The vision tower is in {dtype}, and the cosine of its keys and the bank's is {cosine:.4f}: now and then "
            "the nearest neighbour is another one (docs/keys.md). To find the same ones load the tower in the dtype "
            "that the bank was built in, float32 mostly."
        )


@contextlib.contextmanager
def evaluating(*modules: nn.Module | None) -> Iterator[None]:
    """Switch gradients off and eval mode on; the modes are put back afterwards."""
    modes = [(part, part.training) for module in modules if module is not None for part in module.modules()]
    try:
        with torch.no_grad():
            for part, _ in modes:
                part.training = False
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def probe_pixels(image_shape: Sequence[int]) -> torch.Tensor:
    """Return four fixed synthetic images `(4, *image_shape)`, float32 in [-1, 1], free of any random generator.

    They have waves of several scales, as a photograph has: with a single slow wave bfloat16 alone moves EfficientNet's
    keys to a cosine of 0.93, with these to 0.999.
    """
    channels, height, width = image_shape
    probe, channel, y, x = np.ogrid[:NUM_PROBES, :channels, :height, :width]
    scales, waves = (1, 2, 4, 8, 16), []
    for k in scales:
        down = np.sin(2 * np.pi * k * y / height + 2.3 * probe)
        waves.append(np.sin(2 * np.pi * k * x / width + k * probe + 1.7 * channel + down))
    return torch.from_numpy(np.average(waves, axis=0, weights=[k**-0.5 for k in scales])).float()


def tower_name(model: PreTrainedModel) -> str:
    """Return the name of a model's vision tower; that of a local folder without its path."""
    config = model.config.vision_config
    return public_name(config._name_or_path or config.model_type)


def read_query_image(image: Image.Image | str | os.PathLike) -> Image.Image:
    """Return an image, upright and on white, as a bank's images are read; `ValueError` if it is none."""
    try:
        read = ImageOps.exif_transpose(image if isinstance(image, Image.Image) else Image.open(image))
        if read.mode[0] in "IF" or not 0 < max(read.size) <= MAX_RATIO * min(read.size):
            raise ValueError(f"{read.size} pixels, mode {read.mode}: pass the processor's pixel_values")
        read = read.convert("RGBA")
    except Exception as error:  # PIL and its codecs raise many
        raise ValueError(f"Found {str(image)[:200]!r}, expected a PIL image or the path of one ({error}).") from error
    return Image.alpha_composite(Image.new("RGBA", read.size, "white"), read).convert("RGB")


def query_pixels(preprocessing: dict, images: Any) -> torch.Tensor:
    """Return PIL images, or those of files, one or a list, as pixels `(images, 3, H, W)` made as a bank's were;
    ValueError if something is no image, or the settings make none of transformers' image processors.
    """
    sides = re.findall(r"\d+", f"{preprocessing.get('size')} {preprocessing.get('crop_size')}")
    name = str(preprocessing.get("image_processor_type")).removesuffix("Pil")
    # without torchvision the other class warns and gives this one
    image_processor = get_image_processor_class_from_name(f"{name}Pil") or get_image_processor_class_from_name(name)
    if image_processor is None or max(map(int, sides), default=0) > TOWER_SIDE:
        raise ValueError(
            f"The bank's preprocessing names no image processor of transformers with sides up to {TOWER_SIDE}: pass "
            "pixel_values that the model's processor made."
        )
    images = [read_query_image(image) for image in (images if isinstance(images, (list, tuple)) else [images])]
    return image_processor.from_dict(dict(preprocessing))(images=images, return_tensors="pt")["pixel_values"]
