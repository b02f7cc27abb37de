"""Runs that learn nothing."""

import pytest

from tinyalign_vlm.training.stages.movement import NothingLearnt, sums_of_trained

from .short_runs import make_trainer


@pytest.fixture
def trainer(make_model, processor, dataset, bank, tmp_path):
    return lambda stage=1, **settings: make_trainer(
        stage, make_model(), processor, dataset, bank, tmp_path, **{"max_steps": 2, **settings}
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_a_learning_rate_of_zero(stage, trainer, tmp_path):
    settings = {"lr_scheduler_type": "constant", "save_steps": 1, "save_total_limit": 2}
    with pytest.raises(NothingLearnt, match="^Nothing was learnt in 2 steps: .*rate was 0.*Set learning_rate"):
        trainer(stage, learning_rate=0.0, **settings).train()
    assert not (tmp_path / "checkpoint-2").exists()  # the same command does not find a finished run


def test_gradients_of_zero(trainer):
    run = trainer()
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(NothingLearnt, match="every gradient was 0.*Have the rows images and answers"):
        run.train()


def test_any_update_changes_the_sums(trainer):
    model = trainer().model
    before = sums_of_trained(model)
    assert sums_of_trained(model) == before and len(before) > 4
    model.model.connector.linear_2.bias.data[-1] += 1e-6
    assert sums_of_trained(model) != before


def test_adapters_move(trainer):
    pytest.importorskip("peft")
    trainer(2, tune_language_model="lora", tune_connector="frozen", tune_memory_connector="frozen").train()
