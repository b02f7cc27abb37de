"""`tinyalign train`: what a run leaves for its card, and what it goes on from."""

import json

import pytest
import yaml

from tinyalign_cli.main import main
from tinyalign_vlm.hub_cards.facts import read_facts


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
    (loss,) = facts.evaluation.systems["this model"]["loss"]
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
    assert facts.evaluation.systems["this model"]["loss"][0] == losses[1]


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
