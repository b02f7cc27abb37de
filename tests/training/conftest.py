"""A tiny model, its bank, and a data set of chats about plain and noisy images."""

import json

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tinyalign_vlm import MemoryBank, ValueEncoder, ValueEncoderConfig
from tinyalign_vlm.training.data.chats import to_messages
from tinyalign_vlm.training.data.neighbours import find_neighbours, source_ids_of
from tinyalign_vlm.training.hub.run_facts import Curves

NUM_ROWS = 12


@pytest.fixture
def curves():
    """Ask for the pictures of training curves."""


@pytest.fixture(autouse=True)
def only_curves_that_are_asked_for(request, monkeypatch):
    """Draw no curves where no test looks at them: they take half the time of a training of four steps."""
    if "curves" not in request.fixturenames:
        for event in ("on_evaluate", "on_train_end"):
            monkeypatch.setattr(Curves, event, lambda *arguments, **keywords: None)


@pytest.fixture(scope="package")
def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)) for _ in range(NUM_ROWS)]


@pytest.fixture(scope="package")
def captions() -> list[str]:
    words = ("a red square", "blue", "what a white circle on the background", "in the image")
    return [f"{words[i % 4]} {i}" for i in range(NUM_ROWS)]


@pytest.fixture(scope="package")
def model(make_model):
    """For what does not train it; a test that does makes its own, which has the same weights."""
    return make_model()


@pytest.fixture(scope="package")
def processor(make_processor, model):
    return make_processor(model)


@pytest.fixture(scope="package")
def features(model, processor, images) -> np.ndarray:
    pixel_values = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    return model.get_vision_features(pixel_values).half().numpy()


@pytest.fixture(scope="package")
def value_encoder(features):
    torch.manual_seed(0)
    heads = {"num_self_attention_heads": 1, "num_cross_attention_heads": 1, "num_self_attends_per_block": 1}
    width = {"num_latents": 3, "latent_dim": 5, "d_model": 16}
    _, tokens, size = features.shape
    return ValueEncoder(ValueEncoderConfig(**heads, **width, vision_feature_size=size, num_vision_tokens=tokens))


@pytest.fixture(scope="package")
def bank(images, captions, model, processor, value_encoder):
    rows = [{"image": image, "caption": caption} for image, caption in zip(images, captions, strict=True)]
    return MemoryBank.build(rows, model, processor, value_encoder)


@pytest.fixture(scope="package")
def dataset(images, captions, bank, model, features) -> datasets.Dataset:
    _, neighbours = find_neighbours(bank, model, features, 2, source_ids_of(images))
    rows = {
        "image": images,
        "messages": [to_messages("what is in the image?", caption) for caption in captions],
        "memory_ids": neighbours.tolist(),
    }
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


@pytest.fixture(scope="package")
def scored_rows(dataset, bank, model, features, images):
    """The rows with four neighbours each and their similarities; the models read two."""
    scores, ids = find_neighbours(bank, model, features, 4, source_ids_of(images))
    rows = dataset.remove_columns("memory_ids").add_column("memory_ids", ids.tolist())
    return rows.add_column("memory_scores", scores.tolist())


@pytest.fixture
def files(tmp_path, checkpoints, make_model, processor, dataset, captions, bank, images):
    """A bank, a Parquet file of labels, a JSON file of chats with image paths, and the YAML files of both stages."""
    bank.save_pretrained(tmp_path / "bank")
    make_model().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    labelled = dataset.select_columns(["image"]).add_column("label", captions)
    labelled.to_parquet(tmp_path / "pairs.parquet")
    chats = []
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
        chats.append({"image": f"{index}.png", "messages": dataset[index]["messages"]})
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    common = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "seed": 1}
    labels = {"dataset": "pairs.parquet", "answer_column": "label", "prompt": "what is in the image?"}
    bank = {"memory_bank": "bank"}
    write = {
        "stage1": {"stage": 1, "model": "model", "output_dir": "out1", **labels, **bank, **common},
        "stage2": {"stage": 2, "model": "out1", "output_dir": "out2", "dataset": "chats.json", **bank, **common},
        "baseline": {
            "stage": 1,
            "vision_model": checkpoints["siglip"],
            "language_model": checkpoints["llama"],
            "model_kwargs": {"memory_top_k": 0},
            "output_dir": "baseline",
            **labels,
            **common,
        },
    }
    for name, settings in write.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


@pytest.fixture
def small_disk(make_disk):
    return make_disk("2m")
