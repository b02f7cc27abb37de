"""`tinyalign push`."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard, SpaceCard

from tinyalign_vlm.training.hub import push

MODEL_FACTS = {
    "summary": "Names noise.",
    "license": "apache-2.0",
    "language": ["en"],
    "parts": [{"role": "vision tower", "source": "org/tower", "revision": "1", "license": "MIT", "hub_type": "model"}],
    "bank": {"role": "memory bank", "source": "../bank", "revision": "sha256 00", "license": "MIT"},
    "example": {"prompt": "what is it?"},
    "stages": {"Alignment": {"steps": 3}},
    "curves": "curves.png",
    "command": "tinyalign train",
    "evaluation": {
        "dataset": "Noise",
        "split": "test",
        "metrics": {"loss": "Loss"},
        "own": {"it": {"loss": [1.5]}},
    },
    "hardware": "2 cores",
    "limits": ["It knows noise only."],
    "versions": {"torch": "2.13.0"},
}
BANK_FACTS = {
    "summary": "Noise and its names.",
    "license": ["mit"],
    "language": ["en"],
    "parts": MODEL_FACTS["parts"],
    "command": "tinyalign demo",
    "limits": ["It is noise."],
    "model": "../model",
}


def command(*arguments: str) -> list:
    """What is printed, and how it ends."""
    import contextlib
    import io

    from tinyalign_cli.main import main

    output, end = io.StringIO(), None
    with contextlib.redirect_stdout(output):
        try:
            main(["push", *arguments])
        except SystemExit as error:
            end = str(error)
    return [output.getvalue(), end]


def set_in_card(space: str, visitors_may: str):
    from huggingface_hub import HfApi, SpaceCard

    card = SpaceCard.load(space)
    card.data["visitors_may"] = visitors_may
    HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=space, repo_type="space")


def put(repo: str, name: str, text: str):
    from huggingface_hub import HfApi

    HfApi().create_repo(repo, repo_type="dataset")
    HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo=name, repo_id=repo, repo_type="dataset")


@pytest.fixture
def folders(saved, tmp_path) -> dict[str, str]:
    """Copies, with what training leaves beside a checkpoint."""
    for name in ("model", "bank"):
        shutil.copytree(saved[name], tmp_path / name)
    for name in ("training_args.bin", "checkpoint-3/model.safetensors", "optimizer.pt"):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(b"not for the Hub")
    (tmp_path / "model" / "curves.png").write_bytes(b"a picture")
    return {name: str(tmp_path / name) for name in ("model", "bank")}


def write(folder: str, facts: dict | None = None, text: str | None = None):
    name = "README.md" if facts is None else "card_facts.json"
    with open(f"{folder}/{name}", "w") as file:
        file.write(text if facts is None else json.dumps(facts))


def test_push(hub, owner, folders):
    write(folders["model"], text="A model card.")
    write(folders["bank"], text="A bank card.")
    arguments = [folders["model"], "cli/model", "--bank", folders["bank"], "cli/bank"]
    output, end = owner.run(command, *arguments)
    heads = {
        kind: hub.repositories[kind, name].resolve("main")
        for kind, name in (("dataset", "cli/bank"), ("model", "cli/model"))
    }
    assert end is None
    assert output.splitlines() == [
        f"bank:  {hub.url}/datasets/cli/bank at {heads['dataset']}",
        f"model: {hub.url}/cli/model at {heads['model']}",
    ]
    files = hub.files("cli/model")
    config = json.loads(files["config.json"])
    assert (config["memory_bank"], config["memory_bank_revision"]) == ("cli/bank", heads["dataset"])
    assert files["README.md"] == b"A model card." and hub.files("cli/bank", "dataset")["README.md"] == b"A bank card."
    assert b"not for the Hub" not in files.values() and "_name_or_path" not in config
    for name, content in files.items():
        if name not in (".gitattributes", "config.json"):
            assert content == open(f"{folders['model']}/{name}", "rb").read(), name
    with open(f"{folders['model']}/config.json") as file:
        before = json.load(file)
    assert {**before, "memory_bank": "cli/bank", "memory_bank_revision": heads["dataset"]} == config
    # nothing changed, nothing is committed
    assert owner.run(command, *arguments) == [output, None]
    # the bank may stay where it is
    other = folders["model"] + "-2"
    shutil.copytree(folders["model"], other)
    with open(f"{other}/config.json", "w") as file:
        json.dump(config, file)
    output, end = owner.run(command, other, "cli/other", "--private", "--revision", "draft")
    assert end is None and hub.repositories["model", "cli/other"].private
    assert json.loads(hub.files("cli/other", revision="draft")["config.json"]) == config
    assert hub.files("cli/other").keys() == {".gitattributes"}


def test_cards_are_made_of_recorded_facts(hub, owner, folders):
    write(folders["model"], MODEL_FACTS)
    write(folders["bank"], BANK_FACTS)
    output, end = owner.run(command, folders["model"], "cli/facts", "--bank", folders["bank"], "cli/facts-bank")
    assert end is None
    commit = hub.repositories["dataset", "cli/facts-bank"].resolve("main")
    card = ModelCard(hub.files("cli/facts")["README.md"].decode())
    assert card.data.datasets == ["cli/facts-bank"] and commit in card.text and "../bank" not in card.text
    bank_card = DatasetCard(hub.files("cli/facts-bank", "dataset")["README.md"].decode())
    assert "12 rows" in bank_card.text and "cli/facts" in bank_card.text
    # the licence is that of the bank that is pushed, not of the one that was trained with
    write(folders["bank"], {**BANK_FACTS, "license": ["cc-by-4.0"]})
    _, end = owner.run(command, folders["model"], "cli/facts", "--bank", folders["bank"], "cli/facts-bank")
    assert end is None and json.loads(hub.files("cli/facts")["card_facts.json"])["bank"]["license"] == "cc-by-4.0"
    for kind, arguments in (("model", []), ("bank", ["--bank"])):
        _, end = owner.run(command, *arguments, folders[kind], "without-owner")
        assert "The repository is 'without-owner', expected OWNER/NAME" in end
    output, end = owner.run(command, folders["model"], "cli/facts-2")
    assert "names the local bank ../bank: push it too, with --bank" in end


@pytest.mark.parametrize(
    ("known", "pushed", "named"),
    [("../model", None, None), ("../model", "me/new", "me/new"), ("me/old", None, "me/old")],
)
def test_a_banks_card_names_a_model_that_is_on_the_hub(folders, known, pushed, named):
    write(folders["bank"], {**BANK_FACTS, "model": known})
    card = push.bank_card_for_push(Path(folders["bank"]), "me/bank", pushed)
    assert 'attach_memory_bank("me/bank")' in card and ("from_pretrained" in card) == (named is not None)
    assert named is None or f'from_pretrained("{named}"' in card


def test_what_is_missing_is_said_before_anything_is_pushed(hub, owner, folders, tmp_path):
    def push(*arguments: str) -> str:
        known = set(hub.repositories)
        _, end = owner.run(command, *arguments)
        assert set(hub.repositories) == known, "something was pushed"
        return end

    both = [folders["model"], "cli/nothing", "--bank", folders["bank"], "cli/nothing-bank"]
    end = push(*both)
    for text in (
        "card_facts.json lacks summary and license, which only you know",
        '("summary": "Photographs of North American birds with their names.", "license": ["cc-by-4.0"], say;',
    ):
        assert text in end
    path = tmp_path / "bank" / "card_facts.json"
    draft = json.loads(path.read_text())
    assert draft["parts"][0]["role"] == "vision tower" and "cannot use the bank" in draft["limits"][0]
    path.write_text(json.dumps({**draft, "summary": "Noise."}))
    example = 'put what is true in the place of the null ("license": ["cc-by-4.0"], say'
    assert f"card_facts.json lacks license, which only you know: {example}" in push(*both)
    path.write_text(json.dumps({**draft, "summary": " "}))
    assert "card_facts.json has no facts of a card: " in push(*both)
    path.write_text(json.dumps({**draft, "summary": "Noise.", "license": ["mit"]}))
    example = {**MODEL_FACTS, "example": {"prompt": "What is it?", "image": "query.jpg"}}
    write(folders["model"], example)
    assert "shows query.jpg, which is not there: put it there, or correct card_facts.json" in push(*both)
    (tmp_path / "model" / "card_facts.json").unlink()
    assert "me/a b" in push(folders["model"], "me/a b", *both[2:])
    (tmp_path / "model" / "connectors.py").unlink()
    (tmp_path / "model" / "processor_config.json").unlink()
    end = push(*both)
    assert (
        "it lacks" in end
        and "connectors.py" in end
        and "AutoProcessor in the auto_map of processor_config.json" in end
    )
    assert "expected the checkpoint's folder and its repository" not in end
    for incomplete in ([folders["model"]], []):
        assert "expected the checkpoint's folder and its repository" in push(*incomplete)
    assert "bank_config.json" in push("--bank", str(tmp_path / "model"), "cli/nothing-bank")


def test_a_bank_that_does_not_fit_is_not_pushed(hub, owner, folders, make_model, make_processor):
    import torch

    for folder in folders.values():
        write(folder, text="A card.")
    model = make_model()
    torch.nn.init.normal_(model.model.vision_tower.embeddings.patch_embedding.weight)
    model.save_pretrained(folders["model"])
    known = set(hub.repositories)
    _, end = owner.run(command, folders["model"], "cli/misfit", "--bank", folders["bank"], "cli/misfit-bank")
    assert "cosine" in end and set(hub.repositories) == known


def test_another_data_set_is_not_replaced_by_a_bank(hub, owner, folders):
    write(folders["bank"], BANK_FACTS)
    owner.run(put, "cli/birds", "data/train-00000-of-00001.parquet", "photographs")
    before = hub.files("cli/birds", "dataset")
    _, end = owner.run(command, "--bank", folders["bank"], "cli/birds")
    assert "cli/birds holds another data set (data/train-*.parquet), expected a bank: choose" in end
    assert hub.files("cli/birds", "dataset") == before


def test_a_space_chats_with_the_commit_that_was_pushed(hub, owner, folders):
    write(folders["model"], MODEL_FACTS)
    write(folders["bank"], BANK_FACTS)
    arguments = [folders["model"], "cli/spaced", "--bank", folders["bank"], "cli/spaced-bank", "--space", "cli/space"]
    output, end = owner.run(command, *arguments)
    assert end is None and "space: " in output
    files = hub.files("cli/space", "space")
    assert files.keys() >= {"README.md", "app.py", "requirements.txt"}
    data = SpaceCard(files["README.md"].decode()).data
    assert (data.models, data.datasets, data["prompt"]) == (["cli/spaced"], ["cli/spaced-bank"], "what is it?")
    assert data["model_revision"] == hub.repositories["model", "cli/spaced"].resolve("main")
    facts = json.loads(hub.files("cli/spaced")["card_facts.json"])
    assert (facts["repo_id"], facts["bank"]["source"]) == ("cli/spaced", "cli/spaced-bank")
    # what its owner has set stays when it is pushed again
    owner.run(set_in_card, "cli/space", "teach")
    assert owner.run(command, *arguments)[1] is None
    assert SpaceCard(hub.files("cli/space", "space")["README.md"].decode()).data["visitors_may"] == "teach"
    assert "A Space needs a checkpoint with card_facts.json" in owner.run(command, *arguments[2:])[1]


def test_files_that_name_paths_of_this_machine_stay_here(tmp_path, monkeypatch, make_model):
    model, sent = make_model(), {}
    model.save_pretrained(tmp_path)
    for name in ("run.json", "bad_rows.json", "trainer_state.json"):
        (tmp_path / name).write_text('{"image_folder": "/home/me"}')
    monkeypatch.setattr(push, "push_files", lambda files, *_, **__: (sent.update(files), None))
    push.push_checkpoint(tmp_path, "me/m", model.config, None)
    assert "config.json" in sent and not {"run.json", "bad_rows.json", "trainer_state.json"} & sent.keys()
