"""Parts of models and banks are named without the paths of this machine."""

import pytest
from huggingface_hub import HfApi

from tinyalign_vlm.hub_cards.facts import Part
from tinyalign_vlm.training.hub.parts import common_license, describe_part, public_command


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
        ("/home/me/my data/*.tar", "*.tar"),
        ("source=/home/me/pairs", "source=pairs"),
        ("file:///home/me/pairs.json", "pairs.json"),
        ("org/data", "org/data"),
        ("hf://datasets/org/data/x.parquet", "hf://datasets/org/data/x.parquet"),
        ("https://me:secret@host.org/x.parquet", "https://host.org/x.parquet"),
        ("5e-3", "5e-3"),
    ],
)
def test_a_command_line_without_paths(argument, public):
    assert public_command([argument]) in (public, f"'{public}'")


def test_a_command_line_without_tokens_and_with_the_words_of_a_prompt():
    arguments = ["--prompt", "what is in the image, a/b or c?", "--hub_token", "hf_secret", "--hub_token=hf_secret"]
    assert public_command(arguments) == "--prompt 'what is in the image, a/b or c?' --hub_token ... --hub_token=..."
    token = f"hf_{'x' * 34}"  # as long as the Hub's are
    for more in (["--token", "hf_secret"], ["--model_kwargs", f'{{"token": "{token}"}}'], ["--report_to", token]):
        assert public_command(more) == f"{more[0]} ..."
    assert public_command(["--dataset", "hf_pairs.json"]) == "--dataset hf_pairs.json"


def test_conditions_and_constants_are_no_paths():
    command = ["--where", "caption~and/or", "source=a b/c", "--set", "note=a/b/c", "--out", "/home/me/bank"]
    assert public_command(command) == "--where 'caption~and/or' 'source=a b/c' --set note=a/b/c --out bank"
    assert public_command(["--set", f"note=hf_{'x' * 34}"]) == "--set note=..."


@pytest.mark.parametrize(("license", "known"), [("[mit", "unknown"), ("2.0", "2.0"), ("[mit, 3]", "mit, 3")])
def test_somebodys_readme(license, known, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    assert describe_part("data", str(tmp_path), "dataset").license == known


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert describe_part("data", ".", "dataset").source == tmp_path.name
    assert describe_part("data", "/", "dataset").source == "(local)"


@pytest.mark.parametrize(
    ("licenses", "whole"), [(["MIT", "mit"], "mit"), (["mit", "apache-2.0"], "other"), (["mit", None], "unknown")]
)
def test_license_of_the_whole(licenses, whole):
    parts = [Part(role="a part", source="org/name", license=license) for license in licenses]
    assert common_license(parts) == whole


def test_a_folder_that_looks_like_a_repository_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/pairs").mkdir(parents=True)
    assert public_command(["--dataset", "data/pairs"]) == "--dataset pairs"
