"""Cards that training writes, and the Python that cards print, run as it is printed."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from PIL import Image
from transformers import TrainerState

from tinyalign_cli.main import main
from tinyalign_vlm.hub_cards.cards import usage_snippet, write_card
from tinyalign_vlm.hub_cards.facts import Part, read_facts
from tinyalign_vlm.training.hub.run_facts import (
    RunClock,
    StageRecord,
    hardware,
    peak_memory_gb,
    plot_curves,
    read_records,
    run_snippet,
)

pytestmark = pytest.mark.usefixtures("curves")


def run_without_package(code: str, folder: Path) -> str:
    """What code prints in a folder, in a new process that can't import this package."""
    blocked = 'import sys; sys.modules["tinyalign_vlm"] = None\n'
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", blocked + code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_of(card: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", card, re.S))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model, processor, bank, dataset, captions) -> Path:
    """A model, its bank, and what stage 1 and stage 2 read; stage 1 has run."""
    folder = tmp_path_factory.mktemp("training_card")
    bank.save_pretrained(folder / "bank")
    make_model().save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    dataset.select_columns(["image"]).add_column("label", captions).to_parquet(folder / "pairs.parquet")
    shared = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "memory_bank": "bank"}
    shared |= {"save_steps": 1}
    shared |= {"dataset": "pairs.parquet", "answer_column": "label", "prompt": 'what "is" in the image?'}
    shared |= {"vision_model": "org/default-of-a-recipe", "language_model": "org/default-of-a-recipe"}
    for stage, model in ((1, "model"), (2, "out1")):
        settings = {"stage": stage, "model": model, "output_dir": f"out{stage}", **shared}
        (folder / f"stage{stage}.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["train", "stage1.yaml", "--learning_rate", "5e-3"])
    return folder


def test_card_at_save(folder, bank):
    card = ModelCard.load(folder / "out1/README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("unknown", "image-text-to-text")
    (result,) = card.data.eval_results
    assert result.metric_type == "loss" and 0 < result.metric_value < 20
    for line in (
        "tinyalign train stage1.yaml --learning_rate 5e-3",
        "| learning rate | 0.005 |",
        "| rows a step | 4 |\n| steps | 2 |",
        f"| memory bank | bank | sha256 of the keys: {bank.config.sha256.keys[:12]} | unknown |",
        "| training data | pairs.parquet | sha256 of the rows: ",
        "![Training curves](training_curves.png)",
        "it says nothing about other images.",
        "is not known: find out before you share the model.",
    ):
        assert line in card.text
    assert not re.search(r"None|nan|More Information|default-of-a-recipe", card.text)
    assert Image.open(folder / "out1/training_curves.png").size[0] > 300
    facts = read_facts(folder / "out1")
    (settings,) = facts.stages.values()
    assert list(facts.stages) == ["Stage 1: alignment pre-training"]
    assert float(settings["minutes"]) >= 0 and float(settings["peak memory, GB"]) > 0.1


@pytest.mark.skipif(sys.platform == "win32", reason="has no umask")
@pytest.mark.parametrize("tuning", [["--tune_language_model=lora"], ["--tune_vision_tower=full"]])
def test_all_files_have_the_rights_that_the_user_wants(folder, bank, tmp_path, monkeypatch, tuning):
    monkeypatch.chdir(folder)
    mask = os.umask(0o007)
    try:
        bank.save_pretrained(tmp_path / "bank")
        main(["train", "stage1.yaml", f"--output_dir={tmp_path / 'new'}", *tuning])
    finally:
        os.umask(mask)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} >= {"data", "value_encoder", "new", "checkpoint-2"}
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".md", ".png", ".parquet", ".pt"}
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o770 if path.is_dir() else 0o660), path


def test_snippet_runs_as_printed(folder, captions):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "out1/README.md").read_text(), re.S)
    assert 'what \\"is\\" in the image?' in code and code.strip() == usage_snippet(read_facts(folder / "out1"))
    output = run_without_package(code, folder / "out1")
    (seen,) = json.loads(output.splitlines()[-1].replace("'", '"'))
    assert len(seen) == 2 and set(seen) <= set(captions)
    assert run_snippet(folder / "out1", read_facts(folder / "out1")) == output.rstrip()


def test_stage2_goes_on_with_the_facts_of_stage1(folder, monkeypatch):
    shutil.copytree(folder, copy := folder.parent / "copy")
    facts = read_facts(copy / "out1")
    parts = [replace(part, license="Apache-2.0", source=f"org/{part.role[:6]}") for part in facts.parts[:2]]
    write_card(copy / "out1", replace(facts, license="apache-2.0", language=["en"], parts=parts))
    monkeypatch.chdir(copy)
    main(["train", "stage2.yaml"])
    card = ModelCard.load("out2/README.md")
    assert (card.data.license, card.data.language) == ("apache-2.0", ["en"])
    assert "**1. Stage 1: alignment pre-training**" in card.text and "**2. Stage 2: instruction tuning**" in card.text
    assert "| vision tower | org/vision | local, without a revision | Apache-2.0 |" in card.text
    assert card.text.startswith(
        "\n# out2\n\nvision and langua, trained on pairs.parquet, with a memory bank of 12 rows."
    )
    assert Image.open("out2/training_curves.png").width > 1.5 * Image.open("out1/training_curves.png").width


def test_facts_that_cannot_be_read_leave_the_model(folder, tmp_path, monkeypatch, caplog):
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    Path("out1/card_facts.json").write_text("[")
    main(["train", "stage2.yaml"])
    assert Path("out2/model.safetensors").is_file() and not Path("out2/README.md").exists()
    Path("out1/training_record.json").write_text('[{"stage": 1}]')
    with pytest.raises(ValueError, match="training_record.json is no record of training"):
        read_records("out1")


def test_bank_card_runs_as_printed(folder):
    bank_folder = shutil.copytree(folder / "bank", folder / "bank_with_card")
    part = Part(role="vision tower", source="siglip", revision="1", license="Apache-2.0")
    facts = replace(read_facts(bank_folder), summary="Noise.", license=["mit"], parts=[part], model="../model")
    card = write_card(bank_folder, facts)
    output = run_without_package(python_of(card.text), bank_folder).splitlines()
    assert output[0] == "a red square 0" and len(output) == 2
    kept = (
        json.loads((bank_folder / name / "bank_config.json").read_text()) for name in ("bigger-bank", "smaller-bank")
    )
    assert [config["num_rows"] for config in kept] == [13, 11]


def test_clock_goes_on_after_an_interruption(monkeypatch):
    now = iter([100.0, 107.0, 1000.0, 1002.5])
    monkeypatch.setattr("tinyalign_vlm.training.hub.run_facts.time.monotonic", lambda: next(now))
    state, clock = TrainerState(log_history=[{"step": 1}]), RunClock()
    clock.on_log(None, state, None)  # an evaluation before training
    assert "seconds" not in state.log_history[0]
    clock.on_train_begin(None, state, None)
    clock.on_log(None, state, None)
    state = TrainerState(log_history=[*state.log_history, {"step": 2}])  # from a checkpoint
    (again := RunClock()).on_train_begin(None, state, None)
    again.on_log(None, state, None)
    assert [entry["seconds"] for entry in state.log_history] == [7.0, 9.5]


def test_curves_show_what_there_is(tmp_path):
    record = StageRecord("one", {}, [[1, 2.0], [2, 1.0]], [[2, 1.5]], 1.0, 1.0)
    plot_curves(tmp_path / "a.png", [record])
    plot_curves(tmp_path / "b.png", [record, StageRecord("two", {}, [], [], 1.0, 1.0)])
    assert Image.open(tmp_path / "b.png").width > 1.5 * Image.open(tmp_path / "a.png").width


def test_curves_have_whole_steps_and_a_legend_beside_them(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    record = StageRecord("one", {}, [[1, 2.0], [3, 1.0]], [[3, 1.5]], 1.0, 1.0, [[1, 1e-3], [3, 1e-4]])
    plot_curves(tmp_path / "a.png", [record])
    (figure,) = figures
    assert all(tick == round(tick) for axis in figure.axes for tick in axis.get_xticks())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["training loss", "evaluation loss", "learning rate"]
    figure.draw_without_rendering()
    assert legend.get_window_extent().x0 >= max(axis.get_window_extent().x1 for axis in figure.axes)


def test_a_card_of_files_elsewhere_has_no_path_of_this_machine(folder, monkeypatch, captions):
    """The bank's licence is that of its rows, the loss is of the evaluation data, and both data sets are named."""
    copy = shutil.copytree(folder, folder.parent / "private/project", dirs_exist_ok=True)
    (folder.parent / "elsewhere of mine/store").mkdir(parents=True)
    bank = shutil.move(copy / "bank", folder.parent / "elsewhere of mine/store/bank")
    (Path(bank) / "card_facts.json").write_text('{"license": ["mit", "cc-by-4.0"]}')
    data = shutil.copy(copy / "pairs.parquet", folder.parent / "elsewhere of mine/store/my pairs (test).parquet")
    options = {"memory_bank": bank, "eval_dataset": data, "image_folder": str(copy), "eval_steps": "2"}
    options |= {"dataset": str(copy / "pairs.parquet"), "model": str(copy / "model"), "output_dir": str(copy / "new")}
    monkeypatch.chdir(copy)
    main(["train", "stage1.yaml", *(f"--{name}={value}" for name, value in options.items())])
    text = (copy / "new/README.md").read_text() + (copy / "new/card_facts.json").read_text()
    for hidden in (str(folder.parent), "elsewhere of mine", "private", "store"):
        assert hidden not in text
    assert "| memory bank | bank |" in text and "| mit, cc-by-4.0 |" in text
    card = ModelCard.load(copy / "new/README.md")
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_type) == ("my pairs (test).parquet", "my-pairs-test-.parquet")
    assert result.dataset_split == "evaluation rows, step 2" and card.data.base_model is None
    assert "| rows | 12 |" in card.text and "| passes over the rows | 0.667 |" in card.text


def test_the_card_names_the_hardware_that_was_used(monkeypatch):
    """Not all that the machine has."""
    cuda = {"is_available": True, "device_count": 8, "get_device_name": "H200", "max_memory_allocated": 0}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert hardware() == "1 x H200" and hardware(2) == "2 x H200"
    assert "cores of" in hardware(2, use_cpu=True) and peak_memory_gb() > 0.01
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3_000_000_000)
    assert peak_memory_gb() == 3
