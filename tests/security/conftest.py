"""A bank and a checkpoint to be damaged."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from isolation import set_hf_home
from PIL import Image
from security.attacks import Canary

from tinyalign_vlm import MemoryBank, ValueEncoder, ValueEncoderConfig

VALUE_ENCODER = {
    "num_latents": 3,
    "latent_dim": 5,
    "vision_feature_size": 16,
    "num_vision_tokens": 16,
    "num_self_attention_heads": 1,
    "num_cross_attention_heads": 1,
    "num_self_attends_per_block": 1,
    "d_model": 16,
    "bytes_per_patch": 4,
}


@pytest.fixture(scope="session")
def victims(make_model, make_processor, tmp_path_factory) -> Path:
    """A folder with `bank` and `checkpoint`, which fit together."""
    root = tmp_path_factory.mktemp("victims")
    model = make_model()
    processor = make_processor(model)
    model.save_pretrained(root / "checkpoint")
    processor.save_pretrained(root / "checkpoint")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), dtype=np.uint8)
    rows = [
        {"image": Image.fromarray(image), "caption": f"noise {i}", "licence": "CC0"} for i, image in enumerate(pixels)
    ]
    encoder = ValueEncoder(ValueEncoderConfig(**VALUE_ENCODER)).eval()
    MemoryBank.build(rows, model, processor, encoder, keep_columns=["licence"]).save_pretrained(root / "bank")
    return root


@pytest.fixture
def bank_folder(victims, tmp_path, monkeypatch) -> Path:
    """A copy of the bank; nothing was loaded before."""
    set_hf_home(monkeypatch, tmp_path / "home")
    return Path(shutil.copytree(victims / "bank", tmp_path / "bank"))


@pytest.fixture
def checkpoint(victims, tmp_path) -> Path:
    """A copy of the checkpoint."""
    return Path(shutil.copytree(victims / "checkpoint", tmp_path / "checkpoint"))


@pytest.fixture
def canary(tmp_path) -> Canary:
    return Canary(tmp_path / "it_ran")
