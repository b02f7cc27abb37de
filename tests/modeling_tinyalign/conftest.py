"""A bank of ten pictures of noise, with the model that made it."""

from pathlib import Path

import pytest
from banks import NUM_ROWS, noise, small_value_encoder
from isolation import set_hf_home

from tinyalign_vlm import MemoryBank, ValueEncoder


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Nothing was loaded before: the shards are read and checked."""
    set_hf_home(monkeypatch, tmp_path / "fresh_home")


@pytest.fixture(scope="module")
def value_encoder() -> ValueEncoder:
    return small_value_encoder()


@pytest.fixture(scope="module")
def dataset() -> list[dict]:
    return [{"image": noise(i), "caption": f"noise number {i}", "licence": "CC0"} for i in range(NUM_ROWS)]


@pytest.fixture(scope="module")
def bank(dataset, model, processor, value_encoder) -> MemoryBank:
    return MemoryBank.build(dataset, model, processor, value_encoder, keep_columns=["licence"], batch_size=4)


@pytest.fixture
def saved(bank, tmp_path) -> Path:
    folder = tmp_path / "bank"
    bank.save_pretrained(folder)
    return folder


@pytest.fixture
def small_limits(monkeypatch):
    """Banks of more than 500 rows are quantized, and searched through a fast index."""
    monkeypatch.setattr("banks.QUANTIZED_ROWS", 500)
    monkeypatch.setattr("tinyalign_vlm.modeling_tinyalign.bank_index.EXACT_ROWS", 500)
