"""Settings of stage 1, alignment pre-training: the connectors train, all else is frozen unless one asks for it."""

from dataclasses import dataclass

from transformers import TrainingArguments

from .settings import setting
from .stage import StageArguments


@dataclass
class AlignmentConfig(StageArguments, TrainingArguments):
    """Settings of [`AlignmentTrainer`]: those of [`~transformers.TrainingArguments`] and of [`StageArguments`]."""

    learning_rate: float = setting(1e-3, "Learning rate of the connectors.")
    logging_steps: float = setting(10, "Steps between two logged losses.")
    save_steps: float = setting(0.1, "Steps between two checkpoints, or a share of all.")
