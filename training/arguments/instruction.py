"""Settings of stage 2, instruction tuning: the connectors and the language model train, the vision tower is frozen."""

from dataclasses import dataclass, field

from trl import SFTConfig

from .stage import StageArguments
from .tuning import TuningArguments


@dataclass
class InstructionConfig(StageArguments, SFTConfig):
    """
    Settings of [`InstructionTrainer`]: those of [`~trl.SFTConfig`] and of [`StageArguments`].

    The learning rate is 2e-5, as in the reference's code: the 5e-8 that the paper prints leaves the model as it is.
    """

    tune_language_model: str = field(
        default="full", metadata=TuningArguments.__dataclass_fields__["tune_language_model"].metadata
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate of the language model."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Deprecated: set activation_checkpointing."}
    )
    save_steps: float = field(default=0.25, metadata={"help": "Steps between two checkpoints, or a share of all."})
    dataset_kwargs: dict | None = field(
        default_factory=lambda: {"skip_prepare_dataset": True}, metadata={"help": "The collator prepares the rows."}
    )
