"""Batches, epochs and warm-up that follow from the size of the data."""

import pytest

from tinyalign_vlm.training.arguments.alignment import AlignmentConfig
from tinyalign_vlm.training.arguments.files import CONFIGS, read_config
from tinyalign_vlm.training.arguments.instruction import InstructionConfig


@pytest.fixture
def config():
    return lambda stage=1, *fields: read_config([CONFIGS / f"stage{stage}.yaml"], ["--use_cpu", "True", *fields])


@pytest.mark.parametrize(
    ("stage", "rows", "batch", "epochs"),
    [
        (1, 1, 1, 100),
        (1, 10, 1, 10),
        (1, 200, 4, 2),
        (2, 200, 4, 2),
        (1, 5_000, 64, 2),
        (2, 5_000, 64, 2),
        (1, 12_800, 256, 2),
        (1, 25_600, 256, 1),
        (2, 558_000, 128, 1),
    ],
)
def test_small_data_has_smaller_batches_and_more_epochs(stage, rows, batch, epochs, config):
    settings = config(stage)
    settings.fit_to_data(rows, set())
    assert settings.global_batch_size == batch and settings.num_train_epochs == epochs
    assert settings.train_batch_size * settings.gradient_accumulation_steps == batch


def test_what_the_user_chose_stays(config):
    settings = config()
    settings.fit_to_data(200, {"global_batch_size", "num_train_epochs"})
    assert (settings.global_batch_size, settings.num_train_epochs) == (256, 1)
    settings = config(1, "--per_device_train_batch_size", "8")
    settings.fit_to_data(200, {"per_device_train_batch_size", "max_steps"})
    assert (settings.global_batch_size, settings.train_batch_size, settings.num_train_epochs) == (8, 8, 1)
    settings = config()
    settings.fit_to_data(200, {"gradient_accumulation_steps"})
    assert settings.train_batch_size * settings.gradient_accumulation_steps == 256


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [(0.03, 1, 0), (0.03, 2, 1), (0.03, 100, 3), (0.03, 120, 4), (0.9, 5, 4), (0, 5, 0), (3, 5, 3)],
)
def test_warm_up_leaves_a_step(warmup, steps, expected, config):
    assert config(1, "--warmup_steps", str(warmup)).get_warmup_steps(steps) == expected


def test_warm_up_of_more_steps_than_there_are(config):
    with pytest.raises(ValueError, match="warmup_steps is 100, but the run has 50 steps: expected fewer"):
        config(1, "--warmup_steps", "100").get_warmup_steps(50)


def test_checkpoints_are_where_the_best_model_is_looked_for():
    settings = {"output_dir": "out", "eval_dataset": "rows.json", "load_best_model_at_end": True, "use_cpu": True}
    for kind in (AlignmentConfig, InstructionConfig):
        assert kind(**settings).save_steps == 0.1
        assert kind(**settings, eval_steps=500).save_steps == 500
        assert kind(**settings, eval_steps=50, save_steps=500).save_steps == 500
        assert kind(output_dir="out", use_cpu=True).ddp_timeout == 86_400


def test_an_output_folder_that_is_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file, which is a file, expected a folder or a new name"):
        AlignmentConfig(output_dir=str(tmp_path / "file"))


def test_when_to_evaluate(config):
    data = ("--eval_dataset", "rows.json")
    assert config(1).eval_strategy == "no"
    assert (config(1, *data).eval_strategy, config(1, *data).eval_steps) == ("steps", 0.1)
    assert config(1, *data, "--eval_strategy", "no").eval_strategy == "no"
    with pytest.raises(ValueError, match="eval_split is 'test' .*, but there is no eval_dataset: set it"):
        config(1, "--eval_split", "test")
