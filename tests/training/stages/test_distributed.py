"""Two processes on the CPU, and accelerate's configurations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from packaging import version
from safetensors.torch import load_file

from tinyalign_cli.main import main
from tinyalign_vlm.training.arguments.alignment import AlignmentConfig
from tinyalign_vlm.training.arguments.files import CONFIGS

ACCELERATE = CONFIGS / "accelerate"


def launch(*command: str, folder: Path, environment: dict[str, str] | None = None) -> None:
    environment = {**os.environ, **(environment or {}), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=environment, cwd=folder, timeout=1200
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


def log(folder: Path) -> list[dict]:
    (state,) = folder.glob("checkpoint-4/trainer_state.json")
    return [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


def eval_loss(folder: Path) -> float:
    (state,) = folder.glob("checkpoint-4/trainer_state.json")
    (found,) = (entry["eval_loss"] for entry in json.loads(state.read_text())["log_history"] if "eval_loss" in entry)
    return found


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in log(folder)]


ADAPTERS = ["--tune_language_model", "lora", "--lora_dropout", "0", "--tune_vision_tower", "full"]


@pytest.mark.parametrize(("stage", "fields"), [(1, []), (2, []), (2, ADAPTERS)])
def test_two_processes_have_the_trajectory_of_one(stage, fields, files, monkeypatch):
    """One row at a time in two processes: a batch of text alone meets one with an image."""
    monkeypatch.chdir(files)
    rows = json.loads((files / "rows.json").read_text())[:5]  # the sixth of two processes is there a second time
    for number, row in enumerate(rows):
        row["conversations"][1]["value"] *= 1 + 3 * (number % 2)
    (files / "eval.json").write_text(json.dumps(rows))
    evaluation = {"eval_dataset": "eval.json", "eval_steps": 4, "eval_samples": 0, "per_device_eval_batch_size": 1}
    fields = [*fields, *(text for name, value in evaluation.items() for text in (f"--{name}", str(value)))]
    main(["train", f"stage{stage}.yaml", "--output_dir", "one", "--per_device_train_batch_size", "2", *fields])
    launch(
        *("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tinyalign_cli"),
        *("train", f"stage{stage}.yaml", "--output_dir", "two", "--per_device_train_batch_size", "1", *fields),
        folder=files,
    )
    assert len(losses(files / "one")) == 4
    assert eval_loss(files / "one") == pytest.approx(eval_loss(files / "two"), rel=1e-4)
    np.testing.assert_allclose(losses(files / "one"), losses(files / "two"), rtol=1e-4)
    parts = ("connector", "memory_connector", *(["language_model"] if stage == 2 else []))
    names = ("neighbour_similarity", "own_samples_excluded", "memory_slots_off", *(f"grad_norm_{p}" for p in parts))
    for one, two in zip(log(files / "one"), log(files / "two"), strict=True):
        assert names[0] in one
        np.testing.assert_allclose([one[n] for n in names if n in one], [two[n] for n in names if n in one], rtol=1e-3)
        ratios = [entry["tokens_per_second"] / entry["samples_per_second"] for entry in (one, two)]
        assert ratios[0] == pytest.approx(ratios[1], rel=1e-3)


AS_GPUS = """
import sys
import accelerate.state
from accelerate.utils import DistributedType
made = accelerate.state.PartialState.__init__
def make(self, *arguments, **settings):
    made(self, *arguments, **settings)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
accelerate.state.PartialState.__init__ = make
from tinyalign_cli.main import main
main()
"""


@pytest.mark.skipif(version.parse(accelerate.__version__) < version.parse("1.7"), reason="FSDP2 came with 1.7")
@pytest.mark.parametrize("stage", [1, 2])
def test_a_model_divided_by_fsdp2_is_saved_whole(stage, files, monkeypatch):
    """accelerate has FSDP for GPUs alone: it is told that the two gloo processes are some."""
    monkeypatch.chdir(files)
    main(["train", f"stage{stage}.yaml", "--output_dir", "one", "--per_device_train_batch_size", "2"])
    settings = yaml.safe_load((ACCELERATE / "fsdp2.yaml").read_text())["fsdp_config"]
    (files / "as_gpus.py").write_text(AS_GPUS)
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "as_gpus.py"]
    command += ["train", f"stage{stage}.yaml", "--output_dir", "two", "--per_device_train_batch_size", "2"]
    command += ["--save_steps", "3", "--save_total_limit", "2"]
    fsdp = {"ACCELERATE_USE_FSDP": "true", **{name.upper(): str(value) for name, value in settings.items()}}
    launch(*command, folder=files, environment=fsdp)
    if stage == 1:  # goes on from step 3; stage 2 does as any other model
        (files / "two" / "checkpoint-4" / "trainer_state.json").unlink()
        launch(*command, folder=files, environment=fsdp)
    np.testing.assert_allclose(losses(files / "one"), losses(files / "two"), rtol=1e-4)
    whole, divided = (load_file(files / name / "model.safetensors") for name in ("one", "two"))
    assert whole.keys() == divided.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(divided[name], tensor, rtol=1e-4, atol=1e-5)
    assert {path.name for path in (files / "two").glob("*.py")} == {path.name for path in (files / "one").glob("*.py")}


def test_a_global_batch_that_does_not_divide_is_refused():
    config = AlignmentConfig(output_dir="out", global_batch_size=256, per_device_train_batch_size=16, use_cpu=True)
    assert config.gradient_accumulation_steps == 16
    with pytest.raises(ValueError, match="global_batch_size is 256, expected a multiple of 12: 1 processes x 12 rows"):
        AlignmentConfig(output_dir="out", global_batch_size=256, per_device_train_batch_size=12, use_cpu=True)
    with pytest.raises(ValueError, match="global_batch_size is 8, expected a multiple of 16"):
        AlignmentConfig(output_dir="out", global_batch_size=8, per_device_train_batch_size=16, use_cpu=True)
    with pytest.raises(ValueError, match="16 rows x 16 accumulated batches, but gradient_accumulation_steps is 2"):
        AlignmentConfig(
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
    if details.get("fsdp_version") == 2 and version.parse(accelerate.__version__) < version.parse("1.7"):
        pytest.skip("FSDP2 came with 1.7")
    config = load_config_from_file(str(path))
    assert config.distributed_type == kind and config.use_cpu == (name == "cpu")
    assert details.items() <= {**config.fsdp_config, **config.deepspeed_config}.items()
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "tinyalign_cli"])
    arguments, _, precision_of_config = _validate_launch_command(arguments)
    assert arguments.mixed_precision == "no" and precision_of_config
    assert {path.stem for path in ACCELERATE.glob("*.yaml")} == set(KINDS)


def test_accelerate_launches_a_stage(files):
    launch(
        *("accelerate.commands.launch", "--config_file", str(ACCELERATE / "cpu.yaml")),
        *("-m", "tinyalign_cli", "train", "stage1.yaml", "--output_dir", "out"),
        *("--per_device_train_batch_size", "4"),
        folder=files,
    )
    assert len(losses(files / "out")) == 4
