"""Stage 1, alignment pre-training: the two connectors train, everything else is frozen unless one asks for it."""

from dataclasses import dataclass, field

import datasets
import numpy as np
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments

from ..modeling_tinyalign.memory_bank import MemoryBank
from .arguments import RunArguments
from .lora import adapters
from .trainable_parts import set_trainable
from .trainer import SupervisedTrainer, collator_of, evaluation_rows, train, training_rows


@dataclass
class Stage1Config(RunArguments, TrainingArguments):
    __doc__ = f"""
    Settings of stage 1: those of [`~transformers.TrainingArguments`], with the paper's values (Table 3), and
    {RunArguments.__doc__}
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the connectors."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rates."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up: a share of all steps, or their number."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Run the frozen parts in bfloat16. Defaults to what the machine has."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logged losses."})
    save_steps: float = field(default=0.1, metadata={"help": "Steps between two checkpoints, or a share of all."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "wandb, trackio, tensorboard or none; in a file also a list of them."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator needs all columns."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation returns losses, not logits."})


class Stage1Trainer(SupervisedTrainer):
    """transformers' trainer. Make it with [`train_stage1`]."""


def train_stage1(
    config: Stage1Config,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: datasets.Dataset,
    bank: MemoryBank | None = None,
    vision_features: np.ndarray | None = None,
    eval_dataset: datasets.Dataset | None = None,
) -> Stage1Trainer:
    """
    Trains the connectors of `model`, or what else `config` says, from the last checkpoint in `config.output_dir` on if
    there is one, and writes them to `connectors.safetensors` there.

    Args:
        dataset: Rows as [`TrainingCollator`] wants them: `messages`, `image`, `images` or `feature_index`,
            `memory_ids`.
        bank: The memory bank that `memory_ids` are of; None for a model without memory.
        vision_features: What [`cache_vision_features`] returned, for the rows of `dataset` in order, or at the rows'
            `feature_index`.
        eval_dataset: The same, for `config.eval_strategy`; with `vision_features` it needs `feature_index`.

    Returns:
        The trainer; losses are in its `state.log_history`. The frozen weights are the same bit for bit.

    Raises:
        ValueError: A column or the bank is missing, `output_dir` has checkpoints of another run, or a loss is NaN.
    """
    set_trainable(config, model)
    with adapters(config, model):
        trainer = Stage1Trainer(
            model,
            config,
            data_collator=collator_of(config, model, processor, bank, vision_features),
            train_dataset=training_rows(model, dataset, bank, vision_features),
            eval_dataset=evaluation_rows(model, eval_dataset, bank, vision_features),
        )
        train(trainer, bank)
        trainer.save_model()
    return trainer
