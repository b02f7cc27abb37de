"""The one engine that makes memory banks: `MemoryBank.build`, `tinyalign bank build` and `bank add` all use it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin, __version__

from ...modeling_tinyalign.bank_arrays import QUANTIZED_ROWS, SCRATCH_PREFIX, cache_errors, cache_root
from ...modeling_tinyalign.bank_format import BATCH_ROWS, BankConfig, KeyEncoderConfig, TowerConfig, matrix
from ...modeling_tinyalign.bank_rows import renumbered
from ...modeling_tinyalign.files import scratch_folder
from ...modeling_tinyalign.key_encoder import KeyEncoder, evaluating, probe_pixels, tower_name
from ...modeling_tinyalign.memory_bank import MemoryBank
from ...modeling_tinyalign.row_encoder import RowEncoder, check_as_many, check_many, check_row_settings, finished
from ...modeling_tinyalign.value_encoder import ValueEncoder
from ..data.images import DatasetImages
from ..hub.bank_facts import facts_of_dataset
from .encode import EncodedParts, no_usable_row
from .value_encoder_training import ValueEncoderTrainingConfig, train_new_value_encoder

MAX_WHITENING_ROWS = 4096  # that it is fitted on: their products with one another must fit in memory


def build_bank(
    dataset: Iterable[dict],
    model: PreTrainedModel,
    processor: ProcessorMixin,
    value_encoder: ValueEncoder | None = None,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    keep_columns: Sequence[str] = (),
    batch_size: int = 32,
    key_grid: int = 1,
    whiten_dim: int | None = None,
    thumbnail_size: int | None = 64,
    skip_bad_rows: bool = False,
    keep_duplicates: bool = False,
    vision_features: torch.Tensor | np.ndarray | None = None,
    quantized: bool | None = None,
    value_encoder_training: ValueEncoderTrainingConfig | None = None,
) -> MemoryBank:
    """Encode a data set into a bank.

    Args:
        dataset: a split of a Hub data set (streamed or not) or any iterable of dicts, with an image (PIL, bytes,
            path) and a caption in every row.
        value_encoder: makes the values. By default a model that reads latents gets a new one; other banks have none.
        keep_columns: other columns to keep with the rows as text, a source or licence say.
        key_grid: side of the raster of cells in a key, which gets so much wider: whiten it. 1: the paper's keys.
        whiten_dim: fit a PCA whitening to this many dimensions on the bank's raw keys. None: only centre them.
        thumbnail_size: side in pixels of the JPEG kept of every image, or None.
        skip_bad_rows: leave rows with a corrupt image or without a caption out and list them in `left_out`.
        keep_duplicates: keep images that an earlier row has, pixel for pixel; by default they are left out and listed.
        vision_features: `(rows of dataset, tokens, width)`, to skip the tower where features are cached.
        quantized: round keys to float16 and values to 8 bits. By default in banks of more than 20,000 rows.

    Raises `ValueError` if a row (it is named), a setting or the value encoder does not fit, or there is no row.
    """
    check_many(dataset, "dataset")
    check_row_settings(keep_columns, batch_size, thumbnail_size)
    source = DatasetImages(dataset, image_column, caption_column, keep_columns)
    check_as_many("vision_features", vision_features, dataset)
    if vision_features is not None and vision_features.ndim != 3:
        raise ValueError(f"vision_features are {tuple(vision_features.shape)}, expected (rows, tokens, width).")
    if value_encoder is None and model.config.reads_latents:
        source.check_can_be_read_twice()
        value_encoder = train_new_value_encoder(
            model, processor, source, value_encoder_training, batch_size, vision_features
        )
    seen, key_encoder = None if keep_duplicates else set(), new_key_encoder(model, processor, key_grid)
    settings = (keep_columns, batch_size, thumbnail_size, skip_bad_rows, seen, vision_features)
    encoder = RowEncoder(model, processor, value_encoder, key_encoder, source.read, *settings)
    with (
        evaluating(model, encoder.value_encoder),
        cache_errors(),
        scratch_folder(cache_root(), SCRATCH_PREFIX) as folder,
    ):
        parts = EncodedParts(folder, total=source.total)
        parts.encode(encoder, source)
        bank = finish_bank(encoder, parts, "The dataset", whiten_dim, quantized)
    bank.card_facts = facts_of_dataset(bank, dataset)
    return bank


def finish_bank(
    encoder: RowEncoder, parts: EncodedParts, name: str, whiten_dim: int | None = None, quantized: bool | None = None
) -> MemoryBank:
    """Make a bank of encoded rows: fit the key encoder's mean and whitening to them, and finish their keys.

    The encoder has made all parts, with a key encoder of `new_key_encoder`; `name` names the data set in errors.
    """
    if parts.num_rows == 0:
        raise no_usable_row(name, parts.left_out)
    key_encoder = encoder.key_encoder.cpu()
    mean, sample = mean_and_sample(parts.batches(), parts.num_rows)
    if parts.num_rows > 1:  # a single row is its own mean, and without it nothing of a key would be left
        key_encoder.mean = mean.float()
    if whiten_dim is not None:
        key_encoder.projection = fit_whitening(sample, mean, whiten_dim)
    config = new_bank_config(encoder, parts.num_rows > QUANTIZED_ROWS if quantized is None else quantized)
    value_encoder = copy.deepcopy(encoder.value_encoder)
    if value_encoder is not None:
        value_encoder.requires_grad_(False).eval()
    probe_keys = key_encoder.probe(encoder.model, config.tower.image_shape)
    rows = finished(parts.batches(), key_encoder.cpu())
    return MemoryBank.from_batches(rows, config, key_encoder, probe_keys, value_encoder, parts.left_out)


def new_bank_config(encoder: RowEncoder, quantized: bool) -> BankConfig:
    """Return the config of a new bank, without rows as yet."""
    model, processor, key_encoder = encoder.model, encoder.processor, encoder.key_encoder
    values = None if encoder.value_encoder is None else encoder.value_encoder.config.settings
    return BankConfig(
        key_dim=key_encoder.key_dim,
        num_latents=values["num_latents"] if values else 0,
        latent_dim=values["latent_dim"] if values else 0,
        quantized=quantized,
        tower=describe_tower(model, image_shape(processor)),
        preprocessing=json.loads(processor.image_processor.to_json_string()),
        key_encoder=KeyEncoderConfig(
            key_space=model.config.key_space,
            connector_act=model.config.projector_hidden_act,
            vision_pool_size=model.config.vision_pool_size,
            alpha=model.config.query_alpha,
            grid=key_encoder.grid,
        ),
        value_encoder=values,
        columns=list(encoder.keep_columns),
        thumbnail_size=encoder.thumbnail_size,
        versions={"torch": torch.__version__, "transformers": __version__},
    )


def new_key_encoder(model: PreTrainedModel, processor: ProcessorMixin, grid: int = 1) -> KeyEncoder:
    """Return a key encoder for a model's `config.key_space`; its mean is zero until it is fitted."""
    config = model.config
    if config.key_space == "vision":
        with evaluating(model):
            width = model.get_vision_features(probe_pixels(image_shape(processor))).shape[-1]
        return KeyEncoder(torch.zeros(grid**2 * width), grid=grid)
    embeddings = model.get_input_embeddings().weight.detach()
    connector = copy.deepcopy(model.base_model.connector).float()
    mean = torch.zeros(embeddings.shape[1])
    return KeyEncoder(mean, None, connector, embeddings, config.vision_pool_size, config.query_alpha, grid)


def describe_tower(model: PreTrainedModel, image_shape: list[int]) -> TowerConfig:
    """Return name, revision and settings of a model's vision tower."""
    settings = json.loads(model.config.vision_config.to_json_string())
    settings.pop("_name_or_path", None)
    return TowerConfig(
        name=tower_name(model),
        revision=model.config.vision_model_revision,
        config=settings,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        image_shape=image_shape,
    )


def image_shape(processor: ProcessorMixin) -> list[int]:
    """Return `[channels, height, width]` of what the processor makes of an image."""
    pixels = processor.image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"]
    return list(pixels.shape[1:])


def mean_and_sample(batches: Iterable[pa.RecordBatch], num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of all raw keys, float64 `(raw_dim,)`, and up to `MAX_WHITENING_ROWS` of them."""
    chosen = np.zeros(num_rows, dtype=bool)
    chosen[np.random.default_rng(0).permutation(num_rows)[:MAX_WHITENING_ROWS]] = True  # always the same ones
    keys, total, start = [], 0.0, 0
    for batch in batches:
        of_batch = matrix(batch, "key")
        total += torch.from_numpy(of_batch.astype(np.float64)).sum(dim=0)
        keys.append(of_batch[chosen[start : start + len(batch)]])
        start += len(batch)
    return total / num_rows, torch.from_numpy(np.concatenate(keys))


def fit_whitening(raw_keys: torch.Tensor, mean: torch.Tensor, dim: int) -> torch.Tensor:
    """Return a PCA whitening `(raw_dim, dim)` float32, through the products of the rows: fewer than keys are wide.

    `raw_keys` `(rows, raw_dim)` may be a sample, `mean` `(raw_dim,)` is of all of them. Raises `ValueError` if `dim`
    exceeds the raw width or the rank that so many rows can have.
    """
    rows, width = raw_keys.shape
    limit = min(width, rows - 1)
    if not 1 <= dim <= limit:
        raise ValueError(
            f"whiten_dim is {dim}, but {rows} rows of {width}-wide keys have at most {limit} components. "
            f"Pass whiten_dim <= {limit}, or None."
        )
    centred = raw_keys - mean.double()
    variance, scores = torch.linalg.eigh(centred @ centred.T / rows)
    variance, scores = variance.flip(0)[:dim], scores.flip(1)[:, :dim]  # eigh has the smallest first
    # directions that hardly vary are noise, which whitening would make as large as the others
    floor = variance[0].clamp(min=torch.finfo(torch.float32).tiny) * 1e-6
    # the directions are centred^T scores / sqrt(rows variance)
    projection = centred.T @ scores / variance.clamp(min=floor) / rows**0.5
    return projection.float().contiguous()


def bank_of_dataset(
    dataset: Iterable[dict],
    like: MemoryBank | str | os.PathLike,
    revision: str | None = None,
    quantized: bool | None = None,
) -> MemoryBank:
    """Make a bank of a bank's rows that were loaded with `datasets`, filtered or concatenated say.

    Args:
        dataset: with a bank's columns. Filter a streamed one after `.decode(False)`: `datasets` would encode its
            thumbnails anew.
        like: the bank whose encoders made the rows, or its folder or repository (then at `revision`), of which no
            rows are downloaded.

    Raises:
        ValueError: a column is missing or of another type, or there is no row.
    """
    if isinstance(dataset, dict):
        raise ValueError(f"The dataset has the splits {list(dataset)}: pass one of them, dataset['train'] say.")
    if isinstance(like, (str, os.PathLike)):
        like = MemoryBank.open_encoders(like, revision)
    return like.with_rows(renumbered(dataset.with_format("arrow").iter(BATCH_ROWS)), quantized=quantized)
