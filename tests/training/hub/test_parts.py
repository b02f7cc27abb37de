"""Parts of models and banks are named without the paths of this machine."""

import json
from dataclasses import dataclass, field

import pytest
from huggingface_hub import HfApi

from tinyalign_vlm.training.hub.parts import describe_part, public_command, record_bank


def test_local_parts_are_named_without_their_folder(tmp_path):
    part = describe_part("vision tower", str(tmp_path), "model")
    assert (part.source, part.license, part.hub_type) == (tmp_path.name, "unknown", None)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert describe_part("vision tower", str(tmp_path), "model").license == "mit"
    assert describe_part("data", "shards/*.tar", "dataset").source == "*.tar"


def test_a_local_bank_has_the_licence_of_its_facts(bank, tmp_path):
    bank.save_pretrained(tmp_path / "bank")
    (tmp_path / "bank/card_facts.json").write_text('{"license": ["mit", "cc-by-4.0"]}')
    assert describe_part("memory bank", str(tmp_path / "bank"), "dataset").license == "mit, cc-by-4.0"


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    asked = []

    def repo_info(self, *args, **kwargs):
        asked.append(args)
        raise ConnectionError

    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    part = describe_part("vision tower", "org/never-heard-of", "model", "12ab")
    assert (part.revision, part.license, part.hub_type, len(asked)) == ("12ab", "unknown", "model", 1)


@pytest.mark.parametrize(
    ("argument", "public"),
    [
        ("/home/me/stage1.yaml", "stage1.yaml"),
        ("~/pairs.parquet", "pairs.parquet"),
        ("../data/shards/*.tar", "*.tar"),
        ("--model=/home/me/out 1", "--model=out 1"),
        ('{"a": "/home/me/x", "b": "org/name", "c": 0.5}', '{"a": "x", "b": "org/name", "c": 0.5}'),
        ("what is in the image, a/b or c?", "what is in the image, a/b or c?"),
        ("org/data", "org/data"),
        ("hf://datasets/org/data/x.parquet", "hf://datasets/org/data/x.parquet"),
        ("5e-3", "5e-3"),
    ],
)
def test_a_command_line_without_paths(argument, public):
    assert public_command([argument]) in (public, f"'{public}'")


def test_a_folder_that_looks_like_a_repository_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/pairs").mkdir(parents=True)
    assert public_command(["--dataset", "data/pairs"]) == "--dataset pairs"


@dataclass
class Settings:
    """Options of a command."""

    dataset: str
    dataset_revision: str | None = None
    keep: list[str] = field(default_factory=list)
    keep_duplicates: bool = False
    seed: int = 0


def test_what_building_knows_is_recorded(bank, tmp_path):
    bank.save_pretrained(tmp_path / "bank")
    (tmp_path / "pairs").mkdir()
    settings = Settings(str(tmp_path / "pairs"), keep=["style", "license"], keep_duplicates=True)
    record_bank(tmp_path / "bank", settings)
    text = (tmp_path / "bank/card_facts.json").read_text()
    facts = json.loads(text)
    assert facts["summary"] is None and facts["license"] is None and str(tmp_path) not in text
    assert facts["command"] == (
        "tinyalign bank build --dataset pairs --keep style license --keep_duplicates --out bank"
    )
    roles = {part["role"]: part["source"] for part in facts["parts"]}
    assert roles["images and captions"] == "pairs" and roles.keys() == {"vision tower", "images and captions"}
