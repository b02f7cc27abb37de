"""Settings of stage 2, instruction tuning: the connectors and the language model train, the vision tower is frozen."""

from dataclasses import dataclass, field

from trl import SFTConfig

from .run_arguments import RunArguments
from .tuning import LANGUAGE_MODEL_POLICIES


@dataclass
class Stage2Config(RunArguments, SFTConfig):
    __doc__ = f"""
    Settings of stage 2: those of [`~trl.SFTConfig`], with the paper's values (Table 3), and
    {RunArguments.__doc__}
    The learning rate is 2e-5, as in the reference's code: the 5e-8 that the paper prints leaves the model as it is.
    """

    tune_language_model: str = field(
        default="full",
        metadata={
            "help": "How the language model trains: frozen, full, lora, or qlora (CUDA).",
            "choices": LANGUAGE_MODEL_POLICIES,
        },
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate of the language model."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rates."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up: a share of all steps, or their number."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Autocast to bfloat16 (weights stay float32). Defaults to what the machine has."},
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Deprecated: set activation_checkpointing."}
    )
    save_steps: float = field(default=0.25, metadata={"help": "Steps between two checkpoints, or a share of all."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "wandb, trackio, tensorboard or none; in a file also a list of them."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator needs all columns."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation returns losses, not logits."})
    dataset_kwargs: dict | None = field(
        default_factory=lambda: {"skip_prepare_dataset": True}, metadata={"help": "The collator prepares the rows."}
    )
