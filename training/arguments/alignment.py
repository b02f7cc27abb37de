"""Settings of stage 1, alignment pre-training: the connectors train, all else is frozen unless one asks for it."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .stage import StageArguments


@dataclass
class AlignmentConfig(StageArguments, TrainingArguments):
    """Settings of [`AlignmentTrainer`]: those of [`~transformers.TrainingArguments`] and of [`StageArguments`]."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the connectors."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logged losses."})
    save_steps: float = field(default=0.1, metadata={"help": "Steps between two checkpoints, or a share of all."})
