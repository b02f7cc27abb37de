"""Runs of a few steps on the tiny model, and what is looked at afterwards."""

import torch

from tinyalign_vlm.training import AlignmentConfig, AlignmentTrainer, InstructionConfig, InstructionTrainer

STAGES = {1: (AlignmentConfig, AlignmentTrainer), 2: (InstructionConfig, InstructionTrainer)}
SETTINGS = {
    "memory_dropout": 0.0,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "bf16": False,
    "disable_tqdm": True,
    "learning_rate": 1e-2,
}


def make_trainer(
    stage, model, processor, dataset, bank, output_dir, features=None, eval_dataset=None, callbacks=None, **settings
):
    config, trainer = STAGES[stage]
    return trainer(
        model,
        config(output_dir=str(output_dir), **{**SETTINGS, **settings}),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        memory_bank=None if bank is None else bank.for_any_tower(),  # models of these tests have towers of their own
        vision_features=features,
        callbacks=callbacks,
    )


def run(*args, **kwargs):
    """The trainer that [`make_trainer`] makes, when it has trained."""
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    return trainer


def entries(trainer, name: str = "loss") -> list[dict]:
    return [entry for entry in trainer.state.log_history if name in entry]


def losses(trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in entries(trainer, name)]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed_parts(before, after) -> set[str]:
    return {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
