"""Two processes on the CPU, and accelerate's configurations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from huggingface_hub import constants

from tinyalign_vlm.training import cli
from tinyalign_vlm.training.stage1 import Stage1Config

ACCELERATE = Path(cli.__file__).parent / "configs" / "accelerate"


def launch(*command: str, folder: Path) -> None:
    environment = {"HF_HOME": constants.HF_HOME, "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    environment |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=environment, cwd=folder, timeout=500
    )
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture
def files(tmp_path, make_model, processor, bank, images, captions):
    """A model, its bank, LLaVA's rows (one in four without an image) and a YAML file for each stage."""
    bank.save_pretrained(tmp_path / "bank")
    make_model().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = []
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        image.save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": caption}]
        rows.append({"image": f"{index}.png", "conversations": turns})
        if index % 4 == 0:
            rows[-1] = {"conversations": [{"from": "human", "value": "what?"}, turns[1]]}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for stage in (1, 2):
        settings = {
            "stage": stage,
            "model": "model",
            "memory_bank": "bank",
            "dataset": "rows.json",
            "cache_features": stage == 1,
            "global_batch_size": 4,
            "max_steps": 4,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "seed": 3,
            "bf16": False,
        }
        (tmp_path / f"stage{stage}.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def losses(folder: Path) -> list[float]:
    (state,) = folder.glob("checkpoint-4/trainer_state.json")
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_have_the_trajectory_of_one(stage, files, monkeypatch):
    """One row at a time in two processes: a batch of text alone meets one with an image."""
    monkeypatch.chdir(files)
    cli.main(["train", f"stage{stage}.yaml", "--output_dir", "one", "--per_device_train_batch_size", "2"])
    launch(
        *("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tinyalign_vlm.training.cli"),
        *("train", f"stage{stage}.yaml", "--output_dir", "two", "--per_device_train_batch_size", "1"),
        folder=files,
    )
    assert len(losses(files / "one")) == 4
    np.testing.assert_allclose(losses(files / "one"), losses(files / "two"), rtol=1e-4)


def test_a_global_batch_that_does_not_divide_is_refused():
    config = Stage1Config(output_dir="out", global_batch_size=256, per_device_train_batch_size=16, use_cpu=True)
    assert config.gradient_accumulation_steps == 16
    with pytest.raises(ValueError, match="global_batch_size is 256, expected a multiple of 12: 1 processes x 12 rows"):
        Stage1Config(output_dir="out", global_batch_size=256, per_device_train_batch_size=12, use_cpu=True)
    with pytest.raises(ValueError, match="global_batch_size is 8, expected a multiple of 16"):
        Stage1Config(output_dir="out", global_batch_size=8, per_device_train_batch_size=16, use_cpu=True)
    with pytest.raises(ValueError, match="16 rows x 16 accumulated batches, but gradient_accumulation_steps is 2"):
        Stage1Config(
            output_dir="out",
            global_batch_size=256,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            use_cpu=True,
        )


KINDS = {
    "single_gpu": ("NO", {}),
    "ddp": ("MULTI_GPU", {}),
    "fsdp2": ("FSDP", {"fsdp_version": 2}),
    "zero2": ("DEEPSPEED", {"zero_stage": 2}),
    "zero3": ("DEEPSPEED", {"zero_stage": 3}),
    "cpu": ("NO", {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_its_configurations(name):
    path = ACCELERATE / f"{name}.yaml"
    kind, details = KINDS[name]
    config = load_config_from_file(str(path))
    assert config.distributed_type == kind and config.use_cpu == (name == "cpu")
    assert details.items() <= {**config.fsdp_config, **config.deepspeed_config}.items()
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "tinyalign_vlm.training.cli"])
    arguments, _, precision_of_config = _validate_launch_command(arguments)
    assert arguments.mixed_precision == "no" and precision_of_config
    assert {path.stem for path in ACCELERATE.glob("*.yaml")} == set(KINDS)


def test_accelerate_launches_a_stage(files):
    launch(
        *("accelerate.commands.launch", "--config_file", str(ACCELERATE / "cpu.yaml")),
        *("-m", "tinyalign_vlm.training.cli", "train", "stage1.yaml", "--output_dir", "out"),
        *("--per_device_train_batch_size", "4"),
        folder=files,
    )
    assert len(losses(files / "out")) == 4
