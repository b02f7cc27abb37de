"""Cards say everything or are refused."""

import dataclasses
import json
import math
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard, ModelCard, SpaceCard

from tinyalign_vlm.hub_cards.cards import (
    render_bank_card,
    render_model_card,
    render_space_card,
    usage_snippet,
    write_card,
    write_space,
)
from tinyalign_vlm.hub_cards.facts import (
    Example,
    Part,
    Stage,
    on_hub,
    read_facts,
    write_facts,
)

TOWER = Part(role="vision tower", source="org/tower", revision="1234abcd", license="Apache-2.0", hub_type="model")
IMAGES = Part(role="images and labels", source="npm emoji-datasource", revision="16.0.0", license="CC-BY-4.0")
BANK = Part(role="memory bank", source="org/bank", revision="99ff", license="MIT", hub_type="dataset")
HOSTILE = "a|b\n# c <script>x</script> [d](javascript:e) `f` ```g {{ 7 * 7 }} *h* \x07"


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
        "| vision tower | [org/tower](https://huggingface.co/org/tower) | 1234abcd | Apache-2.0 |",
        "| memory bank | [org/bank](https://huggingface.co/datasets/org/bank) | 99ff | MIT |",
        "| images and labels | npm emoji-datasource | 16.0.0 | CC-BY-4.0 |",
        "| learning rate | 2e-05 |",
        "| system | Loss per token | Exact match |\n|---|---|---|\n",
        "| copy the nearest label | - | 0.4 |\n| bank extended | 2 | 0.5 (0.45 to 0.551) |\n\n",
        "![Training curves](loss.png)",
        "Hardware: 2 CPU cores. Training took 0.5 hours and at most\n3.25 GB of memory. Energy and CO2 were not",
        "takes 0.4 seconds an answer, from the image to\nthe text, in a process of at most 1.5 GB of memory.",
        "It printed:\n\n```text\ngrinning face\n```\n",
        f"```python\n{usage_snippet(model_facts)}\n```",
        "- It knows nothing but emoji.\n- It speaks English only.\n\n",
        "torch 2.13.0, transformers 5.23.0.",
    ):
        assert line in card.text


def test_card_of_a_run_that_measured_no_answers_has_no_gaps(model_facts):
    card = render_model_card(dataclasses.replace(model_facts, bank=None, example=Example(prompt="What is this?")))
    assert_no_blanks(card.text)
    assert "retrieve" not in card.text and "memory bank |" not in card.text and "It printed" not in card.text
    assert "the baseline, without a memory bank.\n\n## Use\n\n```python" in card.text


def test_energy_is_estimated_from_a_given_power_only(model_facts):
    card = render_model_card(dataclasses.replace(model_facts, watts=65))
    assert "Estimated from 65 W over that time: 0.0325 kWh; CO2 was not estimated." in card.text
    card = render_model_card(dataclasses.replace(model_facts, watts=65.0, grams_co2_per_kwh=400.0))
    assert "0.0325 kWh, 13 g CO2 equivalent at 400 g per kWh." in card.text


@pytest.mark.parametrize(
    ("change", "gap"),
    [
        ({"summary": " "}, "summary"),
        ({"summary": "[More Information Needed]"}, "summary"),
        ({"summary": 3}, "summary"),
        ({"curves": None}, "curves"),
        ({"limits": []}, "limits"),
        ({"peak_memory_gb": math.nan}, "peak_memory_gb"),
        ({"peak_memory_gb": "much"}, "peak_memory_gb"),
        ({"watts": True}, "watts"),
        ({"parts": [dataclasses.replace(TOWER, license="")]}, r"parts\[0\].license"),
        ({"bank": dataclasses.replace(BANK, revision=None)}, "bank.revision"),
        ({"example": Example(prompt="")}, "example.prompt"),
        ({"stages": [Stage(name="Alignment pre-training", hyperparameters={})]}, r"stages\[0\].hyperparameters"),
        ({"license": None, "command": ""}, "license, command"),
        ({"limits": "none"}, "limits"),
        ({"limits": ["one", 2]}, r"limits\[1\]"),
        ({"versions": {"torch": None}}, r"versions\['torch'\]"),
        ({"language": []}, "language"),
        ({"evaluation": "good"}, "evaluation"),
        ({"stages": [Stage(name="One", hyperparameters=["steps"])]}, r"stages\[0\].hyperparameters"),
        ({"stages": [Stage(name="One", hyperparameters={"steps": None})]}, r"stages\[0\].hyperparameters\['steps'\]"),
    ],
)
def test_model_card_with_a_gap_is_refused(model_facts, change, gap):
    with pytest.raises(ValueError, match=f"'org/tinyalign-emoji' lacks {gap}: missing.* fields of ModelFacts"):
        render_model_card(dataclasses.replace(model_facts, **change))


def test_score_of_an_unnamed_metric_is_refused(model_facts):
    model_facts.evaluation.systems[0].scores[0].metric = "bleu"
    with pytest.raises(ValueError, match="has a score of 'bleu', evaluation.metrics lacks it"):
        render_model_card(model_facts)


def test_score_that_is_no_number_is_refused(model_facts):
    model_facts.evaluation.systems[1].scores[0].value = math.nan
    with pytest.raises(ValueError, match=r"lacks evaluation.systems\[1\].scores\[0\].value"):
        render_model_card(model_facts)


@pytest.mark.parametrize("name", ["../secret.png", "a) ![x](b.png", "/etc/passwd", "a b.png"])
def test_pictures_lie_beside_the_card(model_facts, name):
    with pytest.raises(ValueError, match="expected the name of a file beside it"):
        render_model_card(dataclasses.replace(model_facts, curves=name))


def test_facts_are_text_and_not_markdown(model_facts, bank_facts, space_facts):
    part = Part(role=HOSTILE, source=HOSTILE, revision=HOSTILE, license=HOSTILE, hub_type="model")
    stage = Stage(name=HOSTILE, hyperparameters={HOSTILE: HOSTILE})
    example = Example(prompt='"); import os #', output=HOSTILE)
    changes = {"summary": HOSTILE, "limits": [HOSTILE], "versions": {HOSTILE: HOSTILE}, "command": HOSTILE}
    model_facts = dataclasses.replace(model_facts, parts=[part], stages=[stage], example=example, **changes)
    model_facts.evaluation.systems[1].name = HOSTILE
    del changes["versions"]
    config = {**bank_facts.config, "columns": [HOSTILE], "versions": {"torch": HOSTILE}}
    config["tower"] = {"name": HOSTILE, "revision": HOSTILE, "image_shape": [3, 4, 5]}
    bank_facts = dataclasses.replace(bank_facts, parts=[part], config=config, **changes)
    for card in (render_model_card(model_facts), render_bank_card(bank_facts)):
        prose = re.sub(r"(?ms)^(````?`?)\w*\n.*?^\1$", "", card.text)
        assert "\n# c" not in prose and "\x07" not in prose
        assert not re.search(r"(?<!\\)<script|(?<!\\)\[d\]|(?<!\\)`f|(?<!\\)\*h", prose)
        assert "{{ 7 * 7 }}" in card.text.replace("\\", "") and "49" not in prose
        for line in prose.splitlines():
            if line.startswith("| a"):
                assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 5), line
        assert type(card)(str(card)).data.to_dict() == card.data.to_dict()
        assert re.search(r"^````bash\na\|b\n# c .*?^````$", card.text, re.M | re.S)
    compile(usage_snippet(model_facts), "snippet", "exec")
    assert r'"text": "\"); import os #"' in usage_snippet(model_facts)
    with pytest.raises(ValueError):
        render_space_card(dataclasses.replace(space_facts, model=HOSTILE))


def test_bank_card(bank_facts, tmp_path):
    card = render_bank_card(bank_facts)
    assert_no_blanks(card.text)
    assert card.data.size_categories == ["1K<n<10K"]
    for line in (
        "1,911 rows, 12.3 MB of Parquet.",
        "| value | 3072 x float16 | 32 latents x 96, row by row |",
        "| thumbnail | image | at most 64 pixels a side |\n| style | string | from the source |\n\n## Sources",
        "| images and labels | npm emoji-datasource | 16.0.0 | CC-BY-4.0 |\n\n## How",
        "- SHA-256 of the keys: `aa`",
        "vision space, from lite0, images of\n  3 x 224 x 224.",
        'load_dataset("org/bank", split="train")',
        'attach_memory_bank("org/bank")',
        'from_pretrained("org/tinyalign-emoji", trust_remote_code=True)',
    ):
        assert line in card.text

    # with the card beside them, load_dataset reads the rows and not the bank's other files
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"id": [0, 1]}), tmp_path / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "bank_config.json").write_text("{}")
    card.save(tmp_path / "README.md")
    dataset = load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset.column_names == ["id"] and len(dataset) == 2


@pytest.mark.parametrize(
    ("num_rows", "category"), [(999, "n<1K"), (10**5, "100K<n<1M"), (10**8, "100M<n<1B"), (10**12, "n>1T")]
)
def test_size_category(bank_facts, num_rows, category):
    bank_facts.config["num_rows"] = num_rows
    assert render_bank_card(bank_facts).data.size_categories == [category]


@pytest.mark.parametrize(("packed", "key", "value"), [(False, "", ""), ("keys", "12", ""), (True, "12", "8")])
def test_the_card_of_a_packed_bank(packed, key, value, bank_facts):
    bank_facts.config["packed"] = packed
    text = render_bank_card(bank_facts).text
    for kind, bits in (("float32", key), ("float16", value)):
        assert f"x {kind}, rounded to {bits} bits |" in text if bits else f"x {kind} |" in text


def test_bank_card_with_a_gap_is_refused(bank_facts):
    with pytest.raises(ValueError, match="'org/bank' lacks license, limits: .* fields of BankFacts"):
        render_bank_card(dataclasses.replace(bank_facts, limits=[], license=None))
    del bank_facts.config["tower"]["image_shape"]
    with pytest.raises(ValueError, match="'org/bank' lacks what it is made of .*image_shape"):
        render_bank_card(bank_facts)
    del bank_facts.config["tower"]
    with pytest.raises(ValueError, match=r"'org/bank' lacks config\['tower'\]"):
        render_bank_card(bank_facts)


def test_space_card(space_facts, tmp_path):
    card = write_space(tmp_path, space_facts)
    assert_no_blanks(card.text)
    data = SpaceCard.load(tmp_path / "README.md").data
    assert (data.sdk, data.app_file, data.models, data.datasets) == (
        "gradio",
        "app.py",
        ["org/tinyalign-emoji"],
        ["org/bank"],
    )
    assert data["model_revision"] == "0123456789abcdef" and data["prompt"] == "What is this?"
    compile((tmp_path / "app.py").read_text(), "app.py", "exec")
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "app.py", "requirements.txt"}
    with pytest.raises(ValueError, match="lacks model_revision"):
        render_space_card(dataclasses.replace(space_facts, model_revision=""))
    with pytest.raises(ValueError, match="61 characters, expected at most 60"):
        render_space_card(dataclasses.replace(space_facts, summary="x" * 61))


def test_facts_are_kept_beside_what_they_are_of(model_facts, bank_facts, tmp_path):
    write_facts(tmp_path, model_facts)
    assert read_facts(tmp_path) == model_facts
    (tmp_path / "bank/data").mkdir(parents=True)
    (tmp_path / "bank/data/train-00000-of-00001.parquet").write_bytes(b"x" * 12_340_000)
    (tmp_path / "bank/bank_config.json").write_text(json.dumps(bank_facts.config))
    write_facts(tmp_path / "bank", bank_facts)
    assert read_facts(tmp_path / "bank") == bank_facts


def test_a_push_changes_the_names(model_facts, bank_facts):
    local = dataclasses.replace(
        model_facts, repo_id="checkpoint", bank=dataclasses.replace(BANK, source="../bank", hub_type=None)
    )
    assert 'model="."' in usage_snippet(local) and 'attach_memory_bank("../bank")' in usage_snippet(local)
    assert 'Image.open("example.png")' in usage_snippet(local)
    pushed = on_hub(local, "org/model", "org/new-bank", "abc")
    assert (pushed.bank.source, pushed.bank.revision, pushed.bank.hub_type) == ("org/new-bank", "abc", "dataset")
    assert "attach" not in usage_snippet(pushed)
    assert 'hf_hub_download("org/model", "example.png")' in usage_snippet(pushed)
    assert local.bank.source == "../bank"
    assert on_hub(bank_facts, "me/bank", "me/model").model == "me/model"
    assert on_hub(bank_facts, "me/bank").model == "org/tinyalign-emoji"
    alone = on_hub(dataclasses.replace(bank_facts, model="../checkpoint"), "me/bank")
    text = render_bank_card(alone).text
    assert alone.model is None and 'model.attach_memory_bank("me/bank")' in text and "from_pretrained" not in text
    assert_no_blanks(text)


def test_missing_facts_of_a_folder_are_named(tmp_path, bank_facts):
    (tmp_path / "bank_config.json").write_text(json.dumps(bank_facts.config))
    with pytest.raises(ValueError, match="lacks summary, license, language, parts, command, limits: .*card_f"):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "no JSON object"),
        ("[1]", "no JSON object"),
        ('{"sumary": "x"}', "has sumary, expected the fields of ModelFacts: repo_id, summary"),
        ('{"parts": ["x"]}', r"parts\[0\] is 'x', expected an object with the fields of Part"),
        ('{"evaluation": {"systems": [{"rank": 1}]}}', "has rank, expected the fields of System"),
    ],
)
def test_facts_that_are_none_are_refused(tmp_path, content, message):
    (tmp_path / "card_facts.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_facts(tmp_path)
    assert "card_facts.json" in str(error.value)


def test_a_bank_config_that_is_none_is_refused(tmp_path):
    (tmp_path / "bank_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="bank_config.json is no JSON object"):
        read_facts(tmp_path)


def test_a_card_shows_pictures_that_are_there(model_facts, tmp_path):
    (tmp_path / "loss.png").write_bytes(b"")
    with pytest.raises(ValueError, match="shows example.png, which is not there"):
        write_card(tmp_path, model_facts)
    (tmp_path / "example.png").write_bytes(b"")
    write_card(tmp_path, model_facts)
    assert str(ModelCard.load(tmp_path / "README.md")) == str(render_model_card(model_facts))
    assert isinstance(DatasetCard.load(tmp_path / "README.md"), DatasetCard)
    assert read_facts(tmp_path) == model_facts
