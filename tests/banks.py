"""Small memory banks for tests."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from tinyalign_vlm import KeyEncoder, MemoryBank, ValueEncoder, ValueEncoderConfig
from tinyalign_vlm.modeling_tinyalign.bank_arrays import QUANTIZED_ROWS
from tinyalign_vlm.modeling_tinyalign.bank_format import (
    BankConfig,
    KeyEncoderConfig,
    TowerConfig,
    config_schema,
    config_sha256,
    list_column,
)

NUM_ROWS = 10  # of the bank that the tests of modeling_tinyalign share
VALUE_SHAPE = (3, 5)
SHARD = "data/train-00000-of-00001.parquet"
KEY_ENCODER = {"key_space": "vision", "grid": 1, "vision_pool_size": None, "alpha": 0.4, "connector_act": "gelu"}


def small_value_encoder(vision_feature_size: int = 16, num_vision_tokens: int = 16, **sizes) -> ValueEncoder:
    """A value encoder of latents 3 x 5, for the tiny towers; always with the same weights."""
    torch.manual_seed(0)
    heads = {"num_self_attention_heads": 1, "num_cross_attention_heads": 1, "num_self_attends_per_block": 1}
    sizes = {"d_model": 16, "bytes_per_patch": 4, "num_latents": 3, "latent_dim": 5, **sizes}
    tokens = {"vision_feature_size": vision_feature_size, "num_vision_tokens": num_vision_tokens}
    return ValueEncoder(ValueEncoderConfig(**heads, **sizes, **tokens)).eval()


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((50, 60), Image.Resampling.NEAREST)


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    """Random float32 vectors of length 1."""
    array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def clustered_keys(rows: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((200, width))
    keys = centres[rng.integers(200, size=rows)] + 0.7 * rng.standard_normal((rows, width))
    return (keys / np.linalg.norm(keys, axis=-1, keepdims=True)).astype(np.float32)


def random_values(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, *VALUE_SHAPE)).astype(np.float16)


def config_of(width: int, encoder: ValueEncoder, quantized: bool) -> BankConfig:
    return BankConfig(
        key_dim=width,
        num_latents=encoder.config.num_latents,
        latent_dim=encoder.config.latent_dim,
        quantized=quantized,
        tower=TowerConfig(
            name="test",
            revision=None,
            image_shape=[3, 8, 8],
            config={},
            vision_feature_layer=-2,
            vision_feature_select_strategy="full",
        ),
        preprocessing={},
        key_encoder=KeyEncoderConfig(**KEY_ENCODER),
        value_encoder=encoder.config.settings,
        columns=[],
        thumbnail_size=None,
        versions={},
    )


def bank_of(
    keys: np.ndarray,
    quantized: bool | None = None,
    source_ids: list[str] | None = None,
    values: np.ndarray | None = None,
) -> MemoryBank:
    """A bank of these keys, made by no tower."""
    rows, width = keys.shape
    encoder = small_value_encoder(width, 4)
    config = config_of(width, encoder, rows > QUANTIZED_ROWS if quantized is None else quantized)
    columns = [
        pa.array(range(rows), pa.int64()),
        pa.array(source_ids or [f"{row:032x}" for row in range(rows)]),
        pa.array([f"caption {row}" for row in range(rows)]),
        list_column(keys.astype(np.float32)),
        list_column((random_values(rows) if values is None else values).reshape(rows, -1)),
    ]
    batch = pa.record_batch(columns, schema=config_schema(config))
    return MemoryBank.from_batches([batch], config, KeyEncoder(torch.zeros(width)), torch.zeros(4, width), encoder)


def features_of(images, model, processor) -> torch.Tensor:
    return model.get_vision_features(processor.image_processor(images=images, return_tensors="pt")["pixel_values"])


def edit_config(folder: Path, **changes) -> None:
    """Change a saved bank's config and its checksum."""
    path = folder / "bank_config.json"
    content = {**json.loads(path.read_text()), **changes}
    if isinstance(content["sha256"], dict):
        content["sha256"]["config"] = config_sha256(content)
    path.write_text(json.dumps(content))


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
