"""
Every recipe takes ten steps of both stages, with random weights of its models at their real widths.

What is cut so that it runs on two cores: layers to two, the vocabulary to that of the test tokenizer (300), images to
56 pixels (16 visual tokens), and rows to one a step.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import CHATML, LANGUAGE_MODELS, TOWERS, image_processor
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, set_seed

from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration, ValueEncoder, ValueEncoderConfig
from tinyalign_vlm.processing import TinyAlignProcessor
from tinyalign_vlm.training.arguments.files import CONFIGS, read_config
from tinyalign_vlm.training.stages.run import train_from_files

RECIPES = {
    f"{text}-{vision}.yaml": (tower, language_model)
    for vision, tower in (
        ("siglip", "google/siglip-so400m-patch14-384"),
        ("clip", "openai/clip-vit-large-patch14-336"),
    )
    for text, language_model in (
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("qwen2-0.5b", "Qwen/Qwen2-0.5B"),
        ("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("phi-2", "microsoft/phi-2"),
        ("qwen2.5-3b", "Qwen/Qwen2.5-3B"),
    )
}
IMAGE_SIZE = 56


def test_every_recipe_is_tested():
    assert {path.name for path in CONFIGS.glob("*.yaml")} == {"stage1.yaml", "stage2.yaml", *RECIPES}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_settings_of_the_paper(recipe, stage):
    """Table 3, on one device; the learning rate of stage 2 is that of the paper's code."""
    config = read_config([f"stage{stage}.yaml", *([] if recipe is None else [recipe])], ["--max_steps", "3"])
    rows, learning_rate = {1: (256, 1e-3), 2: (128, 2e-5)}[stage]
    assert config.global_batch_size == rows
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == rows
    assert config.learning_rate == learning_rate and config.max_steps == 3
    assert config.lr_scheduler_type == "cosine" and config.warmup_steps == 0.03 and config.optim == "adamw_torch_fused"
    if recipe is not None:
        assert (config.vision_model, config.language_model) == RECIPES[recipe]
        strategy = config.model_kwargs.get("vision_feature_select_strategy", "full")
        assert strategy == ("default" if "clip" in recipe else "full")


@pytest.fixture(scope="module")
def models(tmp_path_factory, checkpoints):
    """`models(name)` -> a folder with random weights of the architecture, made at the first call."""
    folders = {}

    def make(name: str) -> str:
        if name not in folders:
            set_seed(0)
            folder = tmp_path_factory.mktemp(name.replace("/", "-"))
            if name in TOWERS:
                config_class, sizes = TOWERS[name]
                config = config_class(**{**sizes, "num_hidden_layers": 2, "image_size": IMAGE_SIZE})
                AutoModel.from_config(config).save_pretrained(folder)
                image_processor(name, IMAGE_SIZE).save_pretrained(folder)
            else:
                config_class, sizes = LANGUAGE_MODELS[name]
                end = 0 if name.startswith("Qwen") else 2 if name in CHATML else 1  # Qwen's base models know no turns
                special = {"bos_token_id": 0, "eos_token_id": end, "pad_token_id": 0}
                config = config_class(**{**sizes, **special, "num_hidden_layers": 2, "vocab_size": 300})
                AutoModelForCausalLM.from_config(config).save_pretrained(folder)
                tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama" if name in CHATML else "phi"])
                tokenizer.save_pretrained(folder)
            folders[name] = str(folder)
        return folders[name]

    return make


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """LLaVA's rows: an image each, every fifth without; some of two turns."""
    folder, generator = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    rows = []
    for index in range(20):
        pixels = generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg")
        turns = [("human", "<image>\nwhat is in the image?"), ("gpt", f"a red square {index}")]
        turns += [("human", "and?"), ("gpt", "blue")] if index % 3 == 0 else []
        row = {"id": str(index), "image": f"{index}.jpg"}
        if index % 5 == 4:
            turns, row = [("human", "what?"), ("gpt", f"blue {index}")], {"id": index}
        rows.append({**row, "conversations": [{"from": name, "value": text} for name, text in turns]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


@pytest.fixture(scope="module")
def banks(models, rows, tmp_path_factory):
    """`banks(tower, strategy)` -> a folder with the paper's 32 x 96 latents of the images."""
    folders = {}

    def make(tower: str, strategy: str) -> str:
        if tower not in folders:
            names = models(tower), models("HuggingFaceTB/SmolLM2-135M-Instruct")
            model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(
                *names, vision_feature_select_strategy=strategy
            )
            processor = TinyAlignProcessor.from_vision_text_pretrained(*names, model.config)
            entries = [{"image": str(path), "caption": f"a square {path.stem}"} for path in rows.parent.glob("*.jpg")]
            encoder = ValueEncoder(
                ValueEncoderConfig(num_vision_tokens=16, vision_feature_size=model.config.vision_feature_size)
            )
            folders[tower] = str(tmp_path_factory.mktemp("bank"))
            MemoryBank.build(entries, model, processor, encoder).save_pretrained(folders[tower])
        return folders[tower]

    return make


@pytest.mark.parametrize("recipe", RECIPES)
def test_ten_steps_of_both_stages(recipe, models, rows, banks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tower, language_model = RECIPES[recipe]
    sizes = TOWERS[tower][1], LANGUAGE_MODELS[language_model][1]
    fields = {
        "vision_model": models(tower),
        "language_model": models(language_model),
        "memory_bank": banks(tower, "default" if "clip" in recipe else "full"),
        "dataset": rows,
        "max_steps": 10,
        "global_batch_size": 1,
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    fields = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    for stage in (1, 2):
        train_from_files([f"stage{stage}.yaml", recipe], fields)
        model = TinyAlignForConditionalGeneration.from_pretrained(tmp_path / f"out/stage{stage}")
        vision, text = model.config.vision_config, model.config.text_config
        for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
            assert (vision.to_dict()[name], text.to_dict()[name]) == tuple(size[name] for size in sizes)
        assert model.config.image_seq_length == 16 and model.config.num_memory_tokens == 32
        ends = model.generation_config.eos_token_id
        assert (2 if language_model in CHATML else 1) in (ends if isinstance(ends, list) else [ends])
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    shutil.rmtree(tmp_path / "out")  # gigabytes
