"""Answers to read at each evaluation, evaluation data of a run, and curves."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tinyalign_cli.main import main
from tinyalign_vlm.training.stages.samples import SampleAnswers, write_samples

from .short_runs import losses, run

pytestmark = pytest.mark.usefixtures("curves")


def samples_in(folder) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("stage", "bf16"), [(1, False), (1, True), (2, False), (2, True)])
def test_answers_at_each_evaluation(stage, bf16, make_model, processor, dataset, bank, features, tmp_path, capsys):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "eval_samples": 3}
    rows = dataset.add_column("memory_scores", [[0.5, 0.25]] * 12)
    trainer = run(stage, make_model(), processor, rows, bank, tmp_path, features, rows, bf16=bf16, **settings)
    samples = samples_in(tmp_path)
    assert [(sample["step"], sample["row"]) for sample in samples] == [(s, r) for s in (2, 4) for r in range(3)]
    for sample in samples:
        row = rows[sample["row"]]
        assert sample["prompt"] == "user: <image>what is in the image?"
        assert sample["reference"] == row["messages"][1]["content"][0]["text"]
        captions = [found["caption"] for found in bank.rows(row["memory_ids"])]
        assert [found["caption"] for found in sample["neighbours"]] == captions
        assert [found["score"] for found in sample["neighbours"]] == [0.5, 0.25]
    printed = capsys.readouterr().out
    assert "[step 2, row 0] user: <image>what is in the image?" in printed
    assert f"neighbours: {captions[0]} (0.500); {captions[1]} (0.250)" in printed
    assert Image.open(tmp_path / "training_curves.png").size[0] > 300
    assert not trainer.model.training


def test_answers_do_not_change_training(make_model, processor, dataset, bank, features, tmp_path):
    found = {}
    for number in (0, 2):
        folder = tmp_path / str(number)
        settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_samples": number}
        found[number] = losses(run(1, make_model(), processor, dataset, bank, folder, features, dataset, **settings))
        assert Path(folder, "samples.jsonl").exists() == (number > 0)
    assert found[0] == found[2]


def test_neighbours_below_the_threshold_are_not_shown(make_model, processor, dataset, bank, features, tmp_path):
    rows = dataset.add_column("memory_scores", [[0.5, 0.25]] * 12)
    settings = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    run(1, make_model(retrieval_threshold=0.4), processor, rows, bank, tmp_path, features, rows, **settings)
    assert all(len(sample["neighbours"]) == 1 for sample in samples_in(tmp_path))


def test_trackers_get_a_table(make_model, processor, dataset, bank, features, tmp_path, monkeypatch):
    logged = []
    tracker = SimpleNamespace(Table=lambda dataframe: dataframe, log=logged.append)
    trainer = run(1, make_model(), processor, dataset, bank, tmp_path, features, dataset, max_steps=1, eval_samples=2)
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, tracker)
    trainer.args.report_to = ["trackio", "tensorboard"]
    SampleAnswers(trainer).on_evaluate(trainer.args, trainer.state, None)
    (entry,) = logged
    assert entry["train/global_step"] == 1
    assert list(entry["samples"].columns) == ["step", "row", "prompt", "answer", "reference", "neighbours"]
    assert len(entry["samples"]) == 2 and "; " in entry["samples"]["neighbours"][0]


def test_an_interrupted_run_writes_no_step_twice(tmp_path):
    path = tmp_path / "samples.jsonl"
    for step in (2, 4, 6, 4):
        write_samples(path, [{"step": step, "row": 0}, {"step": step, "row": 1}])
    assert [sample["step"] for sample in samples_in(tmp_path)] == [2, 2, 4, 4]


def test_evaluation_data_of_a_run(files, monkeypatch):
    """From Parquet with images, as the training data, in JSON with paths; streamed training rows, too."""
    monkeypatch.chdir(files)
    fields = ["--eval_dataset", "chats.json", "--answer_column", "", "--eval_samples", "2", "--max_steps", "4"]
    main(["train", "stage1.yaml", *fields, "--dataset", "chats.json"])
    state = json.loads((files / "out1/checkpoint-4/trainer_state.json").read_text())
    evaluated = [entry["step"] for entry in state["log_history"] if "eval_loss" in entry]
    assert evaluated == [1, 2, 3, 4]
    own = [entry["own_samples_excluded"] for entry in state["log_history"] if "loss" in entry]
    assert own == [1.0] * 4  # all images are in the bank
    for sample in samples_in(files / "out1"):
        assert len(sample["neighbours"]) == 2
        assert sample["reference"] not in [found["caption"] for found in sample["neighbours"]]
    facts = json.loads((files / "out1/training_record.json").read_text())
    assert len(facts[0]["eval_losses"]) == 4 and len(facts[0]["learning_rates"]) == 4

    streamed = ["--dataset", "chats.json", "--streaming", "True", "--output_dir", "streamed"]
    main(["train", "stage1.yaml", *fields, *streamed])
    (files / "other.json").write_bytes((files / "chats.json").read_bytes())
    with pytest.raises(SystemExit, match="streamed holds checkpoints of another run .dataset: 'chats.json' then"):
        main(["train", "stage1.yaml", *fields, "--dataset", "other.json", *streamed[2:]])
    with pytest.raises(SystemExit, match="another run .dataloader_num_workers: 0 then, 2 now"):
        main(["train", "stage1.yaml", *fields, *streamed, "--dataloader_num_workers", "2"])
    state = json.loads((files / "streamed/checkpoint-4/trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert all(entry["own_samples_excluded"] == 1.0 and 0 < entry["neighbour_similarity"] < 1 for entry in logged)
    assert len(samples_in(files / "streamed")) == 8
