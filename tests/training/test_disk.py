"""Full disks, and files that are there whole or not at all."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import yaml
from isolation import set_hf_home

from tinyalign_cli.main import main
from tinyalign_vlm import MemoryBank
from tinyalign_vlm.hub_cards.facts import ModelFacts, write_facts
from tinyalign_vlm.training.data import neighbours
from tinyalign_vlm.training.demo.state import write_json
from tinyalign_vlm.training.hub.run_facts import StageRecord, write_records
from tinyalign_vlm.training.stages.samples import write_samples


def sample(step: int) -> list[dict]:
    return [{"step": step, "answer": "a blue circle"}]


def facts(summary: str) -> ModelFacts:
    return ModelFacts(repo_id="a model", summary=summary)


def record(step: int) -> list[StageRecord]:
    return [StageRecord("a stage", {}, [[step, 1.0]], [], 1.0, 1.0)]


@dataclass
class Killed(BaseException):
    """Instead of a SIGKILL."""

    source: str


def test_a_refused_command_leaves_nothing(files, monkeypatch):
    """Not even the folders that its output was to go to; what was there stays."""
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    build = "bank build --model model --caption_column label --value_encoder bank --out new/deep/bank --dataset"
    for command in (
        "train stage1.yaml --output_dir new/deep/out --resume_from_checkpoint new/deep/out/checkpoint-3",
        "train stage1.yaml --output_dir new/deep/out --tune_language_model lora --lora_target_modules nothing",
        f"{build} nothing.json",
        f"{build} pairs.parquet --rows 1000",
        f"{build} pairs.parquet --keep nothing",
        "bank add bank --model model --out new/deep/bank --dataset nothing.json",
        "bank view bank --row 1000 -o new/deep/page.html",
    ):
        with pytest.raises(SystemExit, match="tinyalign: "):
            main(command.split())
        assert sorted(files.rglob("*")) == before, command


WRITERS = {
    "samples.jsonl": lambda folder, step: write_samples(folder / "samples.jsonl", sample(step)),
    "training_record.json": lambda folder, step: write_records(
        folder, [StageRecord("a", {}, [[step, 1.0]], [], 1, 1)]
    ),
    "training_curves.png": lambda folder, step: write_records(folder, record(step)),
    "card_facts.json": lambda folder, step: write_facts(folder, facts(f"After {step} steps.")),
    "history.json": lambda folder, step: write_json(folder / "history.json", [step]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_killed_process_leaves_the_file_that_was_there(name, tmp_path, monkeypatch):
    """It is killed when the new file is written and not yet in its place; then all goes on."""
    write, replace = WRITERS[name], os.replace
    write(tmp_path, 1)
    earlier = (tmp_path / name).read_bytes()

    def kill(source, target):
        if Path(target).name == name:
            raise Killed(str(source))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(Killed):
            write(tmp_path, 2)
    assert (tmp_path / name).read_bytes() == earlier
    write(tmp_path, 2)
    assert (tmp_path / name).read_bytes() != earlier and not list(tmp_path.glob("*.new"))


def test_what_a_killed_process_leaves_beside_a_neighbour_table_goes(
    bank, model, processor, images, tmp_path, monkeypatch
):
    def killed(table, path):
        write(table, path)
        raise Killed(str(path))

    write, search = neighbours.write_parquet, neighbours.NeighbourSearch(bank, model, processor, images, 3)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(neighbours, "write_parquet", killed)
        search.table(tmp_path)
    assert len(list(tmp_path.glob("*.partial"))) == len(list(tmp_path.glob("*.parquet"))) == 1
    path = search.table(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} - {path.name} == {lock.name for lock in tmp_path.glob("*.lock")}


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def message_of(command: list[str]) -> str | None:
    """What a command ends with; None if all is well."""
    try:
        main(command)
    except SystemExit as error:
        return error.code or None


@pytest.mark.usefixtures("curves")
@pytest.mark.parametrize("stage", [1, 2])
def test_training_on_a_full_disk_and_again(stage, files, small_disk, monkeypatch):
    """A message in one line, whatever was being written; with space again, the same command ends with the same."""
    monkeypatch.chdir(files)
    settings = {**yaml.safe_load((files / f"stage{stage}.yaml").read_text()), "model": "model", "save_steps": 1}
    (files / "run.yaml").write_text(yaml.safe_dump(settings))
    main(["train", "run.yaml", "--output_dir", "whole"])
    expected, said = content(files / "whole"), []
    space, out = os.statvfs(small_disk), small_disk / "out"
    for free in (0, 8192, 16384, *range(32768, 1_900_000, 131072)):
        (small_disk / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - free))
        said.append(message_of(["train", "run.yaml", "--output_dir", str(out)]))
        if said[-1] is None:
            break  # enough for all
        (small_disk / "filler").unlink()
        if free in (8192, 16384):
            main(["train", "run.yaml", "--output_dir", str(out)])
            assert content(out) == expected
        shutil.rmtree(out, ignore_errors=True)
    assert content(out) == expected and said.pop() is None and len(said) > 4
    assert all(re.fullmatch("tinyalign: .*Nothing is lost: .*and run the same command again.*", text) for text in said)
    for part in ("torch.save", "serializing", "Errno 28"):
        assert any(part in text for text in said), part


@pytest.mark.parametrize("command", [["neighbours", "stage1.yaml"], ["data", "check", "chats.json"]])
def test_a_cache_on_a_full_disk_and_again(command, files, small_disk, monkeypatch):
    monkeypatch.chdir(files)
    space, said = os.statvfs(small_disk), []
    for free in range(0, 200_000, 4096):
        home, filler = small_disk / f"home {free}", small_disk / "filler"
        set_hf_home(monkeypatch, home)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        filler.write_bytes(bytes(space.f_bavail * space.f_frsize - free))
        said.append(message_of(command))
        filler.unlink()
        if free % 16384 == 0:
            assert message_of(command) is None
        shutil.rmtree(home)
        if said[-1] is None:
            break  # enough for all
    assert said.pop() is None and len(said) > 2
    assert all(re.fullmatch("tinyalign: .*and run the same command again.*", text) for text in said), said


def test_a_push_that_has_no_room_to_write_the_bank(files, small_disk, monkeypatch):
    """It is written before the Hub is asked for anything."""
    monkeypatch.chdir(files)
    set_hf_home(monkeypatch, small_disk)
    (files / "bank" / "README.md").write_text("A bank.")
    MemoryBank.from_pretrained("bank")
    space = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - 8192))
    said = message_of(["push", "--bank", "bank", "somebody/bank"])
    assert "No space left" in said and "Nothing is lost: bank keeps what is pushed. Free some space" in said
    assert not list((small_disk / "tinyalign").glob(".tmp-*"))
