"""`tinyalign train`: what a run leaves for its card, and what it goes on from."""

import json
import re

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tinyalign_cli.main import main
from tinyalign_vlm import TinyAlignForConditionalGeneration
from tinyalign_vlm.hub_cards.facts import read_facts
from tinyalign_vlm.training.arguments.files import CONFIGS
from tinyalign_vlm.training.stages.run import given_settings
from tinyalign_vlm.training.stages.trainers import AlignmentTrainer


@pytest.fixture
def both_stages(files, monkeypatch):
    """Stage 2 goes on from the model, too."""
    monkeypatch.chdir(files)
    settings = {**yaml.safe_load((files / "stage2.yaml").read_text()), "model": "model"}
    (files / "stage2.yaml").write_text(yaml.safe_dump(settings))
    return files


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("logging", [["--logging_steps", "10"], ["--logging_strategy", "no"]])
def test_the_last_step_is_logged_for_the_card(stage, logging, both_stages):
    main(["train", f"stage{stage}.yaml", *logging])
    facts = read_facts(both_stages / f"out{stage}")
    (loss,) = facts.evaluation.own["this model"]["loss"]
    assert facts.evaluation.split == "training rows, step 2" and 4 < loss < 8
    history = json.loads((both_stages / f"out{stage}/checkpoint-2/trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2] and logged[0]["grad_norm_connector"] > 0


@pytest.mark.parametrize("stage", [1, 2])
def test_the_card_has_the_loss_of_the_weights_that_are_saved(stage, both_stages):
    """The best are those of step 1, as the highest loss is asked for."""
    steps = "--max_steps 3 --eval_dataset chats.json --eval_steps 1 --save_steps 1 --save_total_limit 3"
    best = "--load_best_model_at_end True --metric_for_best_model eval_loss --greater_is_better True"
    main(["train", f"stage{stage}.yaml", *steps.split(), *best.split(), "--learning_rate", "1e-2"])
    folder = both_stages / f"out{stage}"
    (record,) = json.loads((folder / "training_record.json").read_text())
    losses = dict(record["eval_losses"])
    assert record["saved_step"] == 1 and losses[1] > losses[3] + 0.1
    facts = read_facts(folder)
    assert facts.evaluation.split == "evaluation rows, step 1"
    assert facts.evaluation.own["this model"]["loss"][0] == losses[1]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_without_a_step_is_no_success(stage, both_stages):
    with pytest.raises(SystemExit, match="There are 12 rows, but a batch of all processes has 16, and .*no step"):
        main(["train", f"stage{stage}.yaml", "--dataloader_drop_last", "True", "--per_device_train_batch_size", "16"])
    assert not (both_stages / f"out{stage}/model.safetensors").exists()


@pytest.mark.parametrize("stage", [1, 2])
def test_checkpoints_without_an_optimizer_are_not_gone_on_from(stage, both_stages):
    """`Trainer` would, with a new optimizer, the schedule from its start and other rows."""
    command = ["train", f"stage{stage}.yaml", "--save_only_model", "True", "--save_steps", "1"]
    main([*command, "--save_total_limit", "2"])
    main([*command, "--save_total_limit", "2"])  # finished: it is loaded
    chosen = ["--resume_from_checkpoint", f"out{stage}/checkpoint-1"]
    with pytest.raises(SystemExit, match="checkpoint-1 was saved with save_only_model"):
        main([*command, *chosen])
    with pytest.raises(SystemExit, match="save_only_model: True then, False now"):
        main([*command[:2], "--save_steps", "1", *chosen])


@pytest.mark.parametrize(
    "change",
    [
        ["--adam_beta2", "0.95"],
        ["--lr_scheduler_kwargs", '{"num_cycles": 1}'],
        ["--train_sampling_strategy", "sequential"],
        ["--max_length", "100"],
    ],
)
def test_another_optimizer_schedule_or_order_is_another_run(change, both_stages):
    main(["train", "stage1.yaml"])
    with pytest.raises(SystemExit, match=f"out1 holds checkpoints of another run .{change[0][2:]}: "):
        main(["train", "stage1.yaml", *change])


@pytest.fixture
def train(files, monkeypatch, capsys):
    """`train(stage, rows, *fields)` -> what it printed, of a run with the package's stage file on so many rows."""
    monkeypatch.chdir(files)
    (files / "stage1.yaml").unlink()
    (files / "stage2.yaml").unlink()

    def run(stage: int, rows: int, *fields: str, file: str | None = None) -> str:
        generator = np.random.default_rng(0)
        images = [Image.fromarray(generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)) for _ in range(rows)]
        data = {"image": images, "label": [f"a red square {row % 7}" for row in range(rows)]}
        datasets.Dataset.from_dict(data).cast_column("image", datasets.Image()).to_parquet("rows.parquet")
        answers = ["--dataset", "rows.parquet", "--answer_column", "label", "--prompt", "what?", "--bf16", "no"]
        out = ["--output_dir", f"out{stage}", "--model", "model"]
        main(["train", file or f"stage{stage}.yaml", *out, *answers, *fields])
        return capsys.readouterr().out

    return run


def moved(folder) -> bool:
    before, after = (
        TinyAlignForConditionalGeneration.from_pretrained(name).model.connector.linear_1.weight
        for name in ("model", folder)
    )
    return not torch.equal(before, after)


@pytest.mark.parametrize(
    ("stage", "rows", "plan"),
    [
        (1, 10, "Training: 100 steps, 1 rows each, 10 x the 10 rows of the data"),
        (2, 200, "Training: 100 steps, 4 rows each, 2 x the 200 rows of the data"),
    ],
)
def test_the_stage_files_train_on_small_data(stage, rows, plan, train):
    printed = train(stage, rows)
    assert plan in printed and moved(f"out{stage}")
    losses = [float(loss) for loss in re.findall(r"^step \d+/100  loss (\S+)  lr", printed, re.M)]
    assert len(losses) == 10 if stage == 1 else losses and losses[-1] < losses[0]


@pytest.mark.parametrize("rows", [1, 10])
def test_one_step_of_all_rows_moves_the_weights(rows, train, files):
    """A copy of the package's file, as its user has chosen: its only step is not warm-up."""
    own = yaml.safe_load((CONFIGS / "stage1.yaml").read_text())
    (files / "mine.yaml").write_text(yaml.safe_dump(own))
    printed = train(1, rows, file="mine.yaml")
    assert f"Training: 1 step, {rows} rows each, 1 x the {rows} rows" in printed
    assert "So few steps teach little: set global_batch_size lower than 256, or num_train_epochs" in printed
    assert moved("out1")


@pytest.mark.parametrize("stage", [1, 2])
def test_streamed_rows_that_are_fewer_than_a_step(stage, train):
    """Their number is not known beforehand; `Trainer` would read them again and again without a step."""
    fields = ["--streaming", "True", "--max_steps", "3"]
    with pytest.raises(SystemExit, match="fewer rows than the .* of a step.*Set global_batch_size"):
        train(stage, 10, *fields)
    train(stage, 10, *fields, "--global_batch_size", "10", "--per_device_train_batch_size", "5")
    assert moved(f"out{stage}")


def test_a_small_run_goes_on(train, monkeypatch, capsys):
    """With the batch and the epochs that it was begun with."""
    compute_loss = AlignmentTrainer.compute_loss

    def killed(trainer, *arguments, **kwargs):
        if trainer.state.global_step == 25:
            raise KeyboardInterrupt
        return compute_loss(trainer, *arguments, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(AlignmentTrainer, "compute_loss", killed)
        train(1, 10)
    capsys.readouterr()
    printed = train(1, 10)
    assert "Going on from out1/checkpoint-20" in printed and "step 30/100  loss" in printed
    assert "step 20/100" not in printed


def test_chosen_settings_are_kept_apart_from_the_packages(files, monkeypatch):
    monkeypatch.chdir(files)
    (files / "mine.yaml").write_text("num_train_epochs: 1\n")
    fields = ["--learning_rate", "-1", "--seed=3"]
    found = given_settings([CONFIGS / "stage2.yaml", "phi-2-clip.yaml", "mine.yaml"], fields)
    assert found - {"model_kwargs"} == {"num_train_epochs", "learning_rate", "seed"}
