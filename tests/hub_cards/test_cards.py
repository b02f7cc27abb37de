"""Cards say everything or are refused."""

import dataclasses
import math
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import ModelCard

from tinyalign_vlm.hub_cards.cards import (
    BankFacts,
    Evaluation,
    ModelFacts,
    Part,
    Score,
    Stage,
    System,
    render_bank_card,
    render_model_card,
)

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
        snippet='print("grinning face")',
        snippet_output="grinning face",
        parts=[TOWER, BANK, IMAGES],
        stages=[
            Stage(name="Alignment pre-training", hyperparameters={"learning rate": 1e-3, "steps": 300}),
            Stage(name="Instruction tuning", hyperparameters={"learning rate": 2e-5, "steps": 100}),
        ],
        curves="loss.png",
        command="tinyalign demo",
        evaluation=Evaluation(
            dataset="emoji-pairs",
            dataset_name="Emoji pairs",
            split="held-out concepts",
            metrics={"loss": "Loss per token", "exact_match": "Exact match"},
            systems=[
                System(
                    name="copy the nearest label",
                    scores=[Score(metric="exact_match", value=0.4)],
                    is_this_model=False,
                ),
                System(
                    name="bank extended",
                    scores=[
                        Score(metric="exact_match", value=0.5, low=0.45, high=0.5512),
                        Score(metric="loss", value=2.0),
                    ],
                    is_this_model=True,
                ),
            ],
        ),
        hardware="2 CPU cores",
        training_hours=0.5,
        peak_memory_gb=3.25,
        seconds_per_answer=0.4,
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
            "thumbnail_size": 64,
        },
        size_mb=12.34,
        limits=["Some flags share a drawing."],
    )


def assert_no_blanks(text: str) -> None:
    assert not re.search(r"None|\bnan\b|\{\{|\}\}|\{%|More Information", text)
    assert not re.search(r"\n\n\n", text)


def test_model_card(model_facts):
    card = render_model_card(model_facts)
    assert_no_blanks(card.text)
    data = ModelCard(str(card)).data
    assert data.base_model == ["org/tower"] and data.datasets == ["org/bank"]
    assert (data.pipeline_tag, data.library_name) == ("image-text-to-text", "transformers")
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {"exact_match": 0.5, "loss": 2.0}
    assert results["loss"].metric_name == "Loss per token (bank extended)"
    for line in (
        "| vision tower | org/tower | `1234abcd` | Apache-2.0 |",
        "| learning rate | 2e-05 |",
        "| system | Loss per token | Exact match |\n|---|---|---|",
        "| copy the nearest label | - | 0.4 |",
        "| bank extended | 2 | 0.5 (0.45 to 0.551) |",
        "Hardware: 2 CPU cores, 0.5 hours.",
        '```python\nprint("grinning face")\n```',
        "- It speaks English only.",
        "torch 2.13.0, transformers 5.23.0.",
    ):
        assert line in card.text


def test_measured_emissions_are_stated(model_facts):
    card = render_model_card(dataclasses.replace(model_facts, co2_grams=12.0))
    assert "2 CPU cores, 0.5 hours, 12 g CO2 equivalent." in card.text


@pytest.mark.parametrize(
    ("change", "gap"),
    [
        ({"summary": " "}, "summary"),
        ({"curves": None}, "curves"),
        ({"limits": []}, "limits"),
        ({"peak_memory_gb": math.nan}, "peak_memory_gb"),
        ({"parts": [dataclasses.replace(TOWER, license="")]}, r"parts\[0\].license"),
        ({"stages": [Stage(name="Alignment pre-training", hyperparameters={})]}, r"stages\[0\].hyperparameters"),
        ({"license": None, "command": ""}, "license, command"),
    ],
)
def test_model_card_with_a_gap_is_refused(model_facts, change, gap):
    with pytest.raises(ValueError, match=f"'org/tinyalign-emoji' lacks {gap}. .* fill these fields of ModelFacts"):
        render_model_card(dataclasses.replace(model_facts, **change))


def test_score_that_is_no_number_is_refused(model_facts):
    model_facts.evaluation.systems[1].scores[0].value = math.nan
    with pytest.raises(ValueError, match=r"lacks evaluation.systems\[1\].scores\[0\].value"):
        render_model_card(model_facts)


def test_bank_card(bank_facts, tmp_path):
    card = render_bank_card(bank_facts)
    assert_no_blanks(card.text)
    assert card.data.size_categories == "1K<n<10K"
    for line in (
        "1,911 rows, 12.3 MB.",
        "| value | 3072 x float16 | 32 latents x 96, row by row |",
        "| thumbnail | image | at most 64 pixels a side |\n| style | string | from the source |",
        "- SHA-256 of the keys: `aa`",
        "vision space, from lite0, images of\n  3 x 224 x 224.",
    ):
        assert line in card.text

    # with the card beside them, load_dataset reads the rows and not the bank's other files
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"id": [0, 1]}), tmp_path / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "bank_config.json").write_text("{}")
    card.save(tmp_path / "README.md")
    dataset = load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset.column_names == ["id"] and len(dataset) == 2


@pytest.mark.parametrize(("num_rows", "category"), [(999, "n<1K"), (10**5, "100K<n<1M"), (10**8, "n>100M")])
def test_size_category(bank_facts, num_rows, category):
    bank_facts.config["num_rows"] = num_rows
    assert render_bank_card(bank_facts).data.size_categories == category


def test_bank_card_with_a_gap_is_refused(bank_facts):
    del bank_facts.config["tower"]
    with pytest.raises(ValueError, match=r"'org/bank' lacks limits, config\['tower'\]"):
        render_bank_card(dataclasses.replace(bank_facts, limits=[]))
