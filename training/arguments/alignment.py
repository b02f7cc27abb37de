"""Settings of stage 1, alignment pre-training: the connectors train, all else is frozen unless one asks for it."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .run_arguments import RunArguments


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
