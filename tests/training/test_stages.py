"""Both stages: what trains, the loss, accumulation, resuming."""

import numpy as np
import pytest
import torch

from tinyalign_vlm.training.stage1 import Stage1Config, train_stage1
from tinyalign_vlm.training.stage2 import Stage2Config, train_stage2

STAGES = {1: (Stage1Config, train_stage1), 2: (Stage2Config, train_stage2)}


def run(stage, model, processor, dataset, bank, output_dir, features=None, **settings):
    config, train = STAGES[stage]
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "bf16": False,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        **settings,
    }
    return train(config(output_dir=str(output_dir), **settings), model, processor, dataset, bank, features)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed_parts(before, after) -> set[str]:
    return {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("stage", "bf16", "expected"),
    [
        (1, False, {"connector", "memory_connector"}),
        (1, True, {"connector", "memory_connector"}),
        (2, False, {"connector", "memory_connector", "language_model", "weight"}),
        (2, True, {"connector", "memory_connector", "language_model", "weight"}),
    ],
)
def test_only_what_a_stage_trains_changes(
    stage, bf16, expected, make_model, processor, dataset, bank, features, tmp_path
):
    model = make_model()
    before = weights(model)
    trainer = run(stage, model, processor, dataset, bank, tmp_path, features, bf16=bf16)
    after = weights(model)
    assert changed_parts(before, after) == expected
    assert all(before[name].dtype == after[name].dtype for name in before)
    parts = ("connector.",) if stage == 1 else ("connector.", "language_model.", "lm_head.")
    for name, parameter in model.named_parameters():
        trains = any(part in name for part in parts)
        assert parameter.requires_grad == trains and (parameter.grad is None or trains)
    assert all(np.isfinite(losses(trainer))) and losses(trainer)[-1] < losses(trainer)[0]
    assert not model.training and "forward" not in vars(model)
