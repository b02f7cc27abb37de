"""Facts of an invented model and bank."""

import pytest

from tinyalign_vlm.hub_cards.facts import BankFacts, Evaluation, Example, ModelFacts, Part

TOWER = Part(role="vision tower", source="org/tower", revision="1234abcd", license="Apache-2.0", hub_type="model")
IMAGES = Part(role="images and labels", source="npm emoji-datasource", revision="16.0.0", license="CC-BY-4.0")
BANK = Part(role="memory bank", source="org/bank", revision="99ff", license="MIT", hub_type="dataset")


@pytest.fixture
def model_facts() -> ModelFacts:
    return ModelFacts(
        repo_id="org/tinyalign-emoji",
        summary="Names emoji.",
        license="apache-2.0",
        language=["en"],
        parts=[TOWER, IMAGES],
        bank=BANK,
        example=Example(prompt="What is this?", image="example.png", output="grinning face"),
        stages={
            "Alignment pre-training": {"learning rate": 1e-3, "steps": 300},
            "Instruction tuning": {"learning rate": 2e-5, "steps": 100},
        },
        curves="loss.png",
        command="tinyalign demo",
        evaluation=Evaluation(
            dataset="Emoji pairs",
            split="held-out concepts",
            metrics={"loss": "Loss per token", "exact_match": "Exact match"},
            own={"bank extended": {"exact_match": [0.5, 0.45, 0.5512], "loss": [2.0]}},
            others={"copy the nearest label": {"exact_match": [0.4]}},
        ),
        hardware="2 CPU cores",
        limits=["It knows nothing but emoji.", "It speaks English only."],
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
    )


@pytest.fixture
def bank_facts() -> BankFacts:
    return BankFacts(
        repo_id="org/bank",
        summary="Noto drawings and their names.",
        license=["apache-2.0", "mit"],
        language=["en"],
        parts=[TOWER, IMAGES],
        command="tinyalign demo",
        model="org/tinyalign-emoji",
        config={
            "num_rows": 1911,
            "key_dim": 1280,
            "num_latents": 32,
            "latent_dim": 96,
            "tower": {"name": "lite0", "revision": None, "image_shape": [3, 224, 224]},
            "key_encoder": {"key_space": "vision"},
            "value_encoder": {"d_model": 128},
            "sha256": {"keys": "aa", "values": "bb"},
            "versions": {"torch": "2.13.0"},
            "columns": ["style"],
            "num_left_out": 0,
            "quantized": False,
            "thumbnail_size": 64,
        },
        size_mb=12.34,
        limits=["Some flags share a drawing."],
    )
