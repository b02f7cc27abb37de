"""Cards say what is known, and leave out what is not."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard, ModelCard, SpaceCard
from huggingface_hub.errors import StrictDataclassError

from tinyalign_vlm.hub_cards.cards import (
    SPACE_SUMMARY,
    bank_card,
    model_card,
    plain_model_card,
    usage_snippet,
    write_card,
    write_space,
)
from tinyalign_vlm.hub_cards.facts import (
    Example,
    ModelFacts,
    Part,
    facts_of_bank_config,
    read_facts,
    write_facts,
)

TOWER = Part(role="vision tower", source="org/tower", revision="1234abcd", license="Apache-2.0", hub_type="model")
IMAGES = Part(role="images and labels", source="npm emoji-datasource", revision="16.0.0", license="CC-BY-4.0")
BANK = Part(role="memory bank", source="org/bank", revision="99ff", license="MIT", hub_type="dataset")
HOSTILE = "# a|b\n# c <script>x</script> [d](javascript:e) `f` ```g {{ 7 * 7 }} *h* \x07"


def assert_no_blanks(text: str) -> None:
    assert not re.search(r"None|\bnan\b|\{\{|\}\}|\{%|More Information", text)
    assert not re.search(r"\n\n\n", text)


def test_model_card(model_facts):
    card = model_card(model_facts)
    assert_no_blanks(card.text)
    data = ModelCard(str(card)).data
    assert data.base_model == ["org/tower"] and data.datasets == ["org/bank"]
    assert (data.pipeline_tag, data.library_name) == ("image-text-to-text", "transformers")
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {"exact_match": 0.5, "loss": 2.0}
    assert results["loss"].metric_name == "Loss per token (bank extended)"
    assert (results["loss"].dataset_name, results["loss"].dataset_type) == ("Emoji pairs", "Emoji-pairs")
    for line in (
        "| vision tower | [org/tower](https://huggingface.co/org/tower) | 1234abcd | Apache-2.0 |",
        "| memory bank | [org/bank](https://huggingface.co/datasets/org/bank) | 99ff | MIT |",
        "| images and labels | npm emoji-datasource | 16.0.0 | CC-BY-4.0 |",
        "| learning rate | 2e-05 |",
        "| system | Loss per token | Exact match |\n|---|---|---|\n",
        "| bank extended | 2 | 0.5 (0.45 to 0.551) |\n| copy the nearest label | - | 0.4 |\n\n",
        "![Training curves](loss.png)",
        "Hardware: 2 CPU cores.\n",
        "It printed:\n\n```text\ngrinning face\n```\n",
        f"```python\n{usage_snippet(model_facts)}\n```",
        "- It knows nothing but emoji.\n- It speaks English only.\n\n",
        "torch 2.13.0, transformers 5.23.0.",
    ):
        assert line in card.text


def test_card_of_a_run_that_measured_no_answers_has_no_gaps(model_facts):
    card = model_card(dataclasses.replace(model_facts, bank=None, example=Example(prompt="What is this?")))
    assert_no_blanks(card.text)
    assert "retrieve" not in card.text and "memory bank |" not in card.text and "It printed" not in card.text
    assert "the baseline, without a memory bank.\n\n## Use\n\n```python" in card.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"summary": " "}, "summary is blank"),
        ({"summary": "[More Information Needed]"}, "summary is blank"),
        ({"summary": 3}, "'summary'"),
        ({"limits": [""]}, "limits is blank"),
        ({"limits": "none"}, "'limits'"),
        ({"limits": ["one", 2]}, r"index 1 in list 'limits'"),
        ({"stages": {"Alignment": {"steps": math.nan}}}, "stages is nan, expected a finite number"),
        ({"stages": {"Alignment": {"steps": [3]}}}, "'stages'"),
        ({"versions": {"torch": None}}, "'versions'"),
        ({"evaluation": "good"}, "'evaluation'"),
        ({"parts": ["tower"]}, "'parts'"),
        ({"curves": "../secret.png"}, "a picture is '../secret.png', expected the name of a file beside the card"),
        ({"curves": "a)![x](b.png"}, "the name of a file beside the card"),
        ({"curves": "/etc/passwd"}, "the name of a file beside the card"),
        ({"curves": "a b.png"}, "without spaces"),
    ],
)
def test_facts_that_say_nothing_are_refused(model_facts, change, message):
    with pytest.raises(StrictDataclassError, match=message):
        dataclasses.replace(model_facts, **change)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"loss": [math.nan]}, "own is nan"),
        ({"bleu": [1.0]}, r"it has a score of \['bleu'\], expected those of \['loss'"),
        ({"loss": [1.0, 2.0]}, r"expected \[value\] or \[value, low, high\]"),
    ],
)
def test_scores_have_a_heading_and_a_value(model_facts, scores, message):
    with pytest.raises(StrictDataclassError, match=message):
        dataclasses.replace(model_facts.evaluation, own={"it": scores})


OPTIONAL = "summary license language stages curves command evaluation hardware limits versions"


@pytest.mark.parametrize("name", OPTIONAL.split())
def test_what_is_not_known_is_left_out(model_facts, name):
    facts = {field: value for field, value in vars(model_facts).items() if field != name}
    card = model_card(ModelFacts(**facts))
    assert_no_blanks(str(card))
    sections = re.findall(r"^## (.*)$", card.text, re.M)
    left_out = {"evaluation": "Evaluation", "limits": "Limits", "versions": "Versions"}.get(name)
    known = ["Use", "What it is made of", "Training", "Evaluation", "Limits", "Versions"]
    assert sections == [section for section in known if section != left_out]


def config(**changes) -> SimpleNamespace:
    """A config as a composed model has it."""
    parts = {"vision": "siglip", "text": "llama"}
    configs = {f"{name}_config": SimpleNamespace(_name_or_path="", model_type=kind) for name, kind in parts.items()}
    fields = {"vision_model": "org/tower", "vision_model_revision": "12ab", "language_model": "/home/me/llm"}
    fields |= {"language_model_revision": None, "memory_top_k": 5, "memory_bank": None, "memory_bank_revision": None}
    return SimpleNamespace(**{**configs, **fields, **changes})


def test_a_model_without_facts_has_a_card_of_its_config(tmp_path):
    card = ModelCard(plain_model_card("me/model", config(memory_bank="me/bank", memory_bank_revision="34cd"), ["x"]))
    assert_no_blanks(str(card))
    assert (card.data.base_model, card.data.datasets, card.data.tags[-1]) == (["org/tower"], ["me/bank"], "x")
    for line in (
        "it looks up the 5 most similar examples in a memory\nbank",
        'pipeline("image-text-to-text", model="me/model", revision="main", trust_remote_code=True)',
        "| vision tower | [org/tower](https://huggingface.co/org/tower) | 12ab |",
        "| language model | llm | - |",
        "| memory bank | [me/bank](https://huggingface.co/datasets/me/bank) | 34cd |",
    ):
        assert line in card.text
    assert re.findall(r"^## (.*)$", card.text, re.M) == ["Use", "What it is made of"]

    local = plain_model_card("me/model", config(memory_bank=str(tmp_path)), [])
    assert str(tmp_path) not in local and "It names no memory bank" in local
    alone = plain_model_card("me/model", config(memory_top_k=0, vision_model=None, vision_model_revision=None), [])
    assert "the baseline, without a memory bank." in alone and "| vision tower | siglip |\n| language" in alone
    assert_no_blanks(local + alone)


def card_of_config(config: dict) -> str:
    return str(bank_card(facts_of_bank_config("me/bank", config)))


def test_the_card_of_a_bank_without_values_tells_of_none(bank_facts):
    config = {**bank_facts.config, "num_latents": 0, "latent_dim": 0, "value_encoder": None}
    text = card_of_config({**config, "sha256": {"keys": "0", "values": "1", "rows": "2"}})
    assert "read by the model through its caption." in text and "SHA-256 of the keys" in text
    assert not any(word in text for word in ("`value`", "| value", "value_encoder/", "SHA-256 of the values"))
    assert_no_blanks(text)


def test_a_bank_without_facts_has_a_card_of_its_config(bank_facts):
    text = card_of_config({**bank_facts.config, "num_left_out": 3, "sha256": {}})
    card = DatasetCard(text)
    assert_no_blanks(text)
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    for line in (
        'load_dataset("me/bank", split="train")',
        'model.attach_memory_bank("me/bank")',
        "1,911 rows.\n",
        "| vision tower | lite0 |\n",
        "| style | string | from the source |\n\n3 rows of the source were left out: bad rows, or",
        "- A model with another vision tower than lite0 cannot use the bank.\n",
    ):
        assert line in text


def test_facts_are_text_and_not_markdown(model_facts, bank_facts, tmp_path):
    part = Part(role=HOSTILE, source=HOSTILE, revision=HOSTILE, license=HOSTILE, hub_type="model")
    example = Example(prompt='"); import os #', output=HOSTILE)
    changes = {"summary": HOSTILE, "limits": [HOSTILE], "versions": {HOSTILE: HOSTILE}, "command": HOSTILE}
    model_facts = dataclasses.replace(
        model_facts, parts=[part], stages={HOSTILE: {HOSTILE: HOSTILE}}, example=example, **changes
    )
    model_facts.evaluation = dataclasses.replace(
        model_facts.evaluation, own={HOSTILE: {"loss": [1.0]}}, others={HOSTILE: {"loss": [1.0]}}
    )
    del changes["versions"]
    config = {**bank_facts.config, "columns": [HOSTILE], "versions": {"torch": HOSTILE}}
    config["tower"] = {"name": HOSTILE, "revision": HOSTILE, "image_shape": [3, 4, 5]}
    bank_facts = dataclasses.replace(bank_facts, parts=[part], config=config, **changes)
    for card in (model_card(model_facts), bank_card(bank_facts)):
        prose = re.sub(r"(?ms)^(````?`?)\w*\n.*?^\1$", "", card.text)
        assert "\n# c" not in prose and "\n# a" not in prose and "\x07" not in prose
        assert not re.search(r"(?<!\\)<script|(?<!\\)\[d\]|(?<!\\)`f|(?<!\\)\*h", prose)
        assert "{{ 7 * 7 }}" in card.text.replace("\\", "") and "49" not in prose
        for line in prose.splitlines():
            if line.startswith("| \\# a"):
                assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 5), line
        assert type(card)(str(card)).data.to_dict() == card.data.to_dict()
        assert re.search(r"^````bash\n# a\|b\n# c .*?^````$", card.text, re.M | re.S)
    compile(usage_snippet(model_facts), "snippet", "exec")
    assert r'"text": "\"); import os #"' in usage_snippet(model_facts)
    with pytest.raises(ValueError):
        write_space(tmp_path, "org/demo", dataclasses.replace(model_facts, repo_id=HOSTILE), "abc")


def test_bank_card(bank_facts, tmp_path):
    card = bank_card(bank_facts)
    assert_no_blanks(card.text)
    for line in (
        "1,911 rows, 12.3 MB of Parquet.",
        "| value | 3072 x float16 | 32 latents x 96, row by row |",
        "| thumbnail | image | at most 64 pixels a side |\n| style | string | from the source |\n\n## Sources",
        "| images and labels | npm emoji-datasource | 16.0.0 | CC-BY-4.0 |\n\n## How",
        "- SHA-256 of the keys: aa",
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


def test_the_card_of_a_quantized_bank(bank_facts):
    bank_facts.config["quantized"] = True
    text = bank_card(bank_facts).text
    assert "1280 x float32, rounded to float16 |" in text and "3072 x float16, rounded to 8 bits |" in text


def test_space_card(model_facts, tmp_path):
    card = write_space(tmp_path, "org/emoji-demo", model_facts, "0123456789abcdef")
    assert_no_blanks(card.text)
    data = SpaceCard.load(tmp_path / "README.md").data
    assert (data.sdk, data.app_file, data.models, data.datasets) == (
        "gradio",
        "app.py",
        ["org/tinyalign-emoji"],
        ["org/bank"],
    )
    assert data["model_revision"] == "0123456789abcdef" and data["prompt"] == "What is this?"
    assert len(SPACE_SUMMARY) <= 60 and data["short_description"] == SPACE_SUMMARY
    compile((tmp_path / "app.py").read_text(), "app.py", "exec")
    assert data["visitors_may"] == "ask"
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"README.md", "app.py", "requirements.txt", "tinyalign_vlm"}
    needed = (tmp_path / "requirements.txt").read_text().splitlines()
    assert "transformers" in " ".join(needed) and not any("extra" in line for line in needed)
    package = tmp_path / "tinyalign_vlm"
    assert (package / "__init__.py").is_file() and (package / "training/bank/view.html").is_file()
    assert not list(package.rglob("cli")) and not list(package.rglob("__pycache__"))


def test_facts_are_kept_beside_what_they_are_of(model_facts, bank_facts, tmp_path):
    write_facts(tmp_path, model_facts)
    assert read_facts(tmp_path) == model_facts
    (tmp_path / "bank/data").mkdir(parents=True)
    (tmp_path / "bank/data/train-00000-of-00001.parquet").write_bytes(b"x" * 12_340_000)
    (tmp_path / "bank/bank_config.json").write_text(json.dumps(bank_facts.config))
    write_facts(tmp_path / "bank", bank_facts)
    assert read_facts(tmp_path / "bank") == bank_facts


def test_the_python_of_a_card_names_files_or_repositories(model_facts, bank_facts):
    bank = dataclasses.replace(BANK, source="../bank", hub_type=None)
    local = usage_snippet(dataclasses.replace(model_facts, repo_id="checkpoint", bank=bank))
    assert 'model="."' in local and 'attach_memory_bank("../bank")' in local and 'Image.open("example.png")' in local
    pushed = usage_snippet(model_facts)
    assert "attach" not in pushed and 'hf_hub_download("org/tinyalign-emoji", "example.png")' in pushed
    text = bank_card(dataclasses.replace(bank_facts, model=None)).text
    assert 'model.attach_memory_bank("org/bank")' in text and "from_pretrained" not in text
    assert_no_blanks(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is no JSON"),
        ("[1]", "holds a list, expected a JSON object"),
        ('{"sumary": "x"}', "unexpected keyword argument 'sumary'"),
        ('{"parts": ["x"]}', "'x', expected an object with the fields of Part"),
        ('{"parts": [{"role": "x"}]}', "missing 1 required .*'source'"),
        ('{"summary": ""}', "summary is blank"),
        ('{"evaluation": {"rank": 1}}', "unexpected keyword argument 'rank'"),
    ],
)
def test_facts_that_are_none_are_refused(tmp_path, content, message):
    (tmp_path / "card_facts.json").write_text(content)
    with pytest.raises(ValueError, match=f"card_facts.json .*{message}"):
        read_facts(tmp_path)


def test_a_bank_config_that_is_none_is_refused(tmp_path):
    (tmp_path / "bank_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="bank_config.json is no JSON"):
        read_facts(tmp_path)


def test_a_card_shows_pictures_that_are_there(model_facts, tmp_path):
    (tmp_path / "loss.png").write_bytes(b"")
    with pytest.raises(ValueError, match="shows example.png, which is not there"):
        write_card(tmp_path, model_facts)
    (tmp_path / "example.png").write_bytes(b"")
    write_card(tmp_path, model_facts)
    assert str(ModelCard.load(tmp_path / "README.md")) == str(model_card(model_facts))
    assert isinstance(DatasetCard.load(tmp_path / "README.md"), DatasetCard)
    assert read_facts(tmp_path) == model_facts
