"""Settings of stage 2, instruction tuning: the connectors and the language model train, the vision tower is frozen."""

from dataclasses import dataclass, field

from trl import SFTConfig

from .settings import setting
from .stage import StageArguments
from .tuning import TuningArguments


@dataclass
class InstructionConfig(StageArguments, SFTConfig):
    """Settings of [`InstructionTrainer`]: those of [`~trl.SFTConfig`] and of [`StageArguments`].

    The learning rate is 2e-5, as in the reference's code: the 5e-8 that the paper prints leaves the model as it is.
    """

    tune_language_model: str = field(
        default="full", metadata=TuningArguments.__dataclass_fields__["tune_language_model"].metadata
    )
    learning_rate: float = setting(2e-5, "Learning rate of the language model.")
    gradient_checkpointing: bool | None = setting(None, "Deprecated: set activation_checkpointing.")
    save_steps: float = setting(0.25, "Steps between two checkpoints, or a share of all.")
    dataset_kwargs: dict | None = field(
        default_factory=lambda: {"skip_prepare_dataset": True}, metadata={"help": "The collator prepares the rows."}
    )
