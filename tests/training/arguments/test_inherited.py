"""Settings of transformers' and TRL's trainers: what they do here, or the line that refuses them."""

import json
from dataclasses import fields

import pytest
import yaml

from tinyalign_cli.main import main
from tinyalign_vlm.hub_cards.facts import read_facts
from tinyalign_vlm.training.arguments.alignment import AlignmentConfig
from tinyalign_vlm.training.arguments.instruction import InstructionConfig
from tinyalign_vlm.training.stages import run

REFUSED = [
    ("packing", "True", "leave it out"),
    ("eval_packing", "True", "leave it out"),
    ("padding_free", "True", "leave it out"),
    ("pad_to_multiple_of", "64", "leave it out"),
    ("dataset_text_field", "story", "messages_column"),
    ("dataset_num_proc", "2", "set num_proc"),
    ("shuffle_dataset", "True", "shuffled in each epoch"),
    ("truncation_mode", "keep_end", "set truncation"),
    ("chat_template_path", "chat.jinja", "the model's own processor"),
    ("eos_token", "</s>", "the model's own processor"),
    ("completion_only_loss", "False", "what the assistant says is learnt"),
    ("loss_type", "dft", "leave it out"),
    ("label_smoothing_factor", "0.1", "leave it out"),
    ("label_names", "answers", "leave it out"),
    ("use_liger_kernel", "True", "Liger has no kernels"),
    ("train_sampling_strategy", "group_by_length", "set random or sequential"),
    ("remove_unused_columns", "True", "leave it out"),
    ("auto_find_batch_size", "True", "set per_device_train_batch_size lower"),
    ("push_to_hub", "True", "tinyalign push"),
    ("optim_target_modules", "linear_1", "leave it out"),
    ("fp16", "True", "float16 trains on a GPU"),
    ("activation_offloading", "True", "runs on the CPU"),
]
# Stage 1 has none of TRL's own settings.
OF_STAGES = [
    (stage, *setting)
    for stage, config in ((1, AlignmentConfig), (2, InstructionConfig))
    for setting in REFUSED
    if setting[0] in {field.name for field in fields(config)}
]


@pytest.fixture
def both_stages(files, monkeypatch):
    """Stage 2 goes on from the model, too."""
    monkeypatch.chdir(files)
    settings = {**yaml.safe_load((files / "stage2.yaml").read_text()), "model": "model"}
    (files / "stage2.yaml").write_text(yaml.safe_dump(settings))
    return files


@pytest.mark.parametrize(("stage", "name", "value", "advice"), OF_STAGES)
def test_what_would_have_no_effect_is_refused_before_anything_is_read(
    stage, name, value, advice, both_stages, monkeypatch
):
    monkeypatch.setattr(run, "prepare", None)
    with pytest.raises(SystemExit, match=f"tinyalign: {name} is .*{value}.*{advice}"):
        main(["train", f"stage{stage}.yaml", f"--{name}", value, "--use_cpu", "True"])


def test_what_says_what_is_done_anyway_is_taken(tmp_path):
    InstructionConfig(output_dir=str(tmp_path), assistant_only_loss=True, completion_only_loss=True, packing=False)


def test_noise_is_for_a_language_model_that_trains(tmp_path):
    with pytest.raises(ValueError, match="neftune_noise_alpha is 5, but tune_language_model is frozen"):
        AlignmentConfig(output_dir=str(tmp_path), neftune_noise_alpha=5)
    InstructionConfig(output_dir=str(tmp_path), neftune_noise_alpha=5)


@pytest.mark.parametrize("config", [AlignmentConfig, InstructionConfig])
def test_a_process_has_one_gpu(config, tmp_path, monkeypatch):
    """Trainer would divide a batch's rows and its images among GPUs as if they were as many."""
    monkeypatch.setattr(config, "n_gpu", property(lambda self: 8))
    with pytest.raises(ValueError, match="sees 8 GPUs, expected one: .*ddp.yaml.*CUDA_VISIBLE_DEVICES=0"):
        config(output_dir=str(tmp_path))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("logging", [["--logging_steps", "10"], ["--logging_strategy", "no"]])
def test_the_last_step_is_logged_for_the_card(stage, logging, both_stages):
    main(["train", f"stage{stage}.yaml", *logging])
    facts = read_facts(both_stages / f"out{stage}")
    assert facts.evaluation.split == "training rows, step 2" and 4 < facts.evaluation.systems[0].scores[0].value < 8
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
    assert facts.evaluation.systems[0].scores[0].value == losses[1]


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
