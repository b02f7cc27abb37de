"""What is known of a bank's rows is recorded, however the bank was made."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import HfApi

from tinyalign_cli.main import build_parser
from tinyalign_vlm import MemoryBank
from tinyalign_vlm.hub_cards.facts import Part, read_facts
from tinyalign_vlm.training.bank.changes import remove_rows
from tinyalign_vlm.training.bank.from_files import BuildSettings
from tinyalign_vlm.training.bank.merge import merge_banks
from tinyalign_vlm.training.hub.bank_facts import command_of_settings, facts_of_dataset, save_with_facts


@dataclass
class Settings:
    """Options of a command."""

    dataset: str
    keep: list[str] = field(default_factory=list)
    keep_duplicates: bool = False
    seed: int = 0


@pytest.fixture
def saved(bank, tmp_path) -> Path:
    """A bank of pairs with a known licence, to which a person has added a summary."""
    data = Part(role="images and captions", source="pairs", revision="1", license="MIT, cc-by-4.0")
    save_with_facts(bank, tmp_path / "bank", ["tinyalign"], data=data)
    path = tmp_path / "bank/card_facts.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "summary": "Noise.", "limits": ["It is noise."]}))
    return tmp_path / "bank"


def test_what_building_knows_is_recorded(bank, tmp_path):
    settings = Settings(str(tmp_path / "pairs"), keep=["style", "license"], keep_duplicates=True)
    data = Part(role="images and captions", source="pairs", license="unknown")
    save_with_facts(bank, tmp_path / "bank", command_of_settings(["build"], settings), data=data)
    text = (tmp_path / "bank/card_facts.json").read_text()
    facts = json.loads(text)
    assert facts["summary"] is None and facts["license"] is None and str(tmp_path) not in text
    assert facts["command"] == (
        "tinyalign bank build --dataset pairs --keep style license --keep_duplicates --out bank"
    )
    assert [part["role"] for part in facts["parts"]] == ["vision tower", "images and captions"]


def test_a_bank_without_some_rows_keeps_what_is_known(bank, saved, tmp_path):
    assert read_facts(saved).license == ["MIT", "cc-by-4.0"]
    remove_rows(saved, tmp_path / "fewer", source_ids=[bank.rows([0])[0]["source_id"]])
    facts = read_facts(tmp_path / "fewer")
    assert (facts.summary, facts.license) == ("Noise.", ["MIT", "cc-by-4.0"])
    assert [part.source for part in facts.parts][1:] == ["pairs"] and "It is noise." in facts.limits
    assert facts.command.startswith("tinyalign bank remove bank --source-id ") and str(tmp_path) not in facts.command


def test_a_merged_bank_has_the_parts_of_all(bank, saved, tmp_path):
    other = Part(role="images and captions", source="birds", revision="2", license="cc0-1.0")
    save_with_facts(bank, tmp_path / "other", ["tinyalign"], data=other)
    merge_banks([saved, tmp_path / "other"], tmp_path / "both", keep_duplicates=True)
    facts = read_facts(tmp_path / "both")
    assert [part.source for part in facts.parts][1:] == ["pairs", "birds"]
    assert facts.license == ["MIT", "cc-by-4.0", "cc0-1.0"] and facts.summary is None
    assert facts.command == "tinyalign bank merge bank other --keep_duplicates --out bank"
    # the licence of one is not known, so that of both is not
    bank.save_pretrained(tmp_path / "unknown")
    merge_banks([saved, tmp_path / "unknown"], tmp_path / "more", keep_duplicates=True)
    assert read_facts(tmp_path / "more").license is None


def test_a_bank_built_in_python_knows_the_repository_of_its_rows(bank, tmp_path, monkeypatch):
    dataset = datasets.Dataset.from_dict({"image": [1]})
    assert [part["role"] for part in json.loads(facts_of_dataset(bank, dataset))["parts"]] == ["vision tower"]
    path = f"/cache/org___pairs/default/0.0.0/{'ab' * 20}/pairs-train.arrow"
    monkeypatch.setattr(datasets.Dataset, "cache_files", [{"filename": path}])
    monkeypatch.setattr(HfApi, "repo_info", None)  # the Hub is not asked
    part = json.loads(facts_of_dataset(bank, dataset))["parts"][1]
    assert (part["source"], part["revision"], part["hub_type"]) == ("org/pairs", "ab" * 20, "dataset")


def test_the_licences_of_the_rows_are_those_of_the_bank(images, captions, model, processor, value_encoder, tmp_path):
    def build(licenses: list[str]) -> MemoryBank:
        names = ("image", "caption", "licence")
        rows = [dict(zip(names, row, strict=True)) for row in zip(images, captions, licenses, strict=True)]
        return MemoryBank.build(rows, model, processor, value_encoder, keep_columns=["licence"])

    licenses = ["CC0-1.0", "cc-by-4.0"] * (len(captions) // 2)
    build(licenses).save_pretrained(tmp_path / "bank")
    assert read_facts(tmp_path / "bank").license == ["cc-by-4.0", "cc0-1.0"]
    assert json.loads(build([*licenses[:-1], ""]).card_facts)["license"] is None


def test_a_bank_changed_in_python_keeps_the_facts_that_are_still_true(saved, images, model, processor, tmp_path):
    facts = json.loads((saved / "card_facts.json").read_text()) | {"summary": "Pairs.", "repo_id": "org/pairs"}
    (saved / "card_facts.json").write_text(json.dumps(facts))
    bank = MemoryBank.from_pretrained(saved)
    bank.remove(0).save_pretrained(tmp_path / "smaller")
    smaller = read_facts(tmp_path / "smaller")
    assert (smaller.summary, smaller.license, smaller.command) == ("Pairs.", facts["license"], None)
    assert smaller.repo_id == "smaller" and [part.source for part in smaller.parts][1:] == ["pairs"]
    more = bank.add(images[:1], model, processor, ["another"], keep_duplicates=True)
    more.save_pretrained(tmp_path / "more")
    more = read_facts(tmp_path / "more")
    assert (more.summary, more.license, more.limits) == (None, None, smaller.limits)
    assert more.parts == smaller.parts


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        (b"{", "no JSON object .Expecting property name .*mend or delete it"),
        (b"\xff\xfe", "no JSON object"),
        (b"", "no JSON object"),
        (b"null", "no JSON object"),
        (b"[]", "/bank/card_facts.json holds a list, expected a JSON object"),
        (b'{"parts": 3}', "/bank/card_facts.json has no facts of a card: '3', expected an object"),
    ],
)
def test_broken_facts_are_named_when_a_bank_is_changed(saved, images, facts, problem, tmp_path):
    (saved / "card_facts.json").write_bytes(facts)
    MemoryBank.from_pretrained(saved).search(np.zeros((1, 16), np.float32), 1)  # which needs no card
    images[0].save(tmp_path / "first.png")
    with pytest.raises(ValueError, match=problem) as error:
        remove_rows(saved, tmp_path / "smaller", images=[str(tmp_path / "first.png")])
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.glob("*smaller*")] == []


def test_the_command_of_a_card_can_be_typed():
    given = [
        "--vision_model",
        "v",
        "--language_model",
        "l",
        "--set",
        "license=cc0",
        "source=x",
        "--dataset",
        "rows.json",
    ]
    arguments = vars(build_parser().parse_args(["bank", "build", *given, "--out", "bank"]))
    settings = BuildSettings(**{name: arguments[name] for name in BuildSettings.__dataclass_fields__})
    assert build_parser().parse_args(command_of_settings(["build"], settings)[1:]).set == arguments["set"]
