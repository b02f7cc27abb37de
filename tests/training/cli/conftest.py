"""Images of five kinds with their captions, a bank of some of them, and a run that composes a model."""

import json

import numpy as np
import pytest
import yaml
from isolation import set_hf_home
from PIL import Image

from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration

WORDS = ("a red square", "a blue circle", "what is on the background", "user", "system")
SMALL = {"memory_tokens": 3, "latent_dim": 5, "memory_top_k": 2, "memory_input": "latents", "memory_scores": False}


@pytest.fixture
def compose(checkpoints):
    """Models with the towers of the checkpoints, as `tinyalign train` makes them."""
    towers = checkpoints["siglip"], checkpoints["llama"]
    return lambda **config: TinyAlignForConditionalGeneration.from_vision_text_pretrained(*towers, **SMALL, **config)


@pytest.fixture
def folder(tmp_path, compose, processor, value_encoder, checkpoints, monkeypatch):
    """30 images of 5 kinds with their captions; the bank has 20 of them; a YAML file of a composed model."""
    generator = np.random.default_rng(0)
    kinds = [generator.integers(0, 256, (6, 5, 3)) for _ in WORDS]
    rows = []
    for index in range(30):
        pixels = (kinds[index % 5] + generator.integers(0, 6, (6, 5, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        chat = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": WORDS[index % 5]}]
        rows.append({"image": f"{index}.png", "conversations": chat})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    set_hf_home(monkeypatch, tmp_path / "home")
    pairs = [{"image": str(tmp_path / f"{index}.png"), "caption": WORDS[index % 5]} for index in range(20)]
    MemoryBank.build(pairs, compose(), processor, value_encoder).save_pretrained(tmp_path / "bank")
    settings = {
        "stage": 1,
        "vision_model": checkpoints["siglip"],
        "language_model": checkpoints["llama"],
        "model_kwargs": SMALL,
        "memory_bank": "bank",
        "dataset": "rows.json",
        "output_dir": "out",
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "seed": 1,
    }
    (tmp_path / "stage1.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    return tmp_path
