"""Stage 2, instruction tuning: the connectors and the language model train, the vision tower is frozen."""

from dataclasses import dataclass, field

import datasets
import numpy as np
from transformers import PreTrainedModel, ProcessorMixin
from trl import SFTConfig, SFTTrainer

from ..modeling_tinyalign.memory_bank import MemoryBank
from .arguments import RunArguments
from .lora import adapters
from .trainable_parts import set_trainable
from .trainer import SupervisedTrainer, collator_of, evaluation_rows, train, training_rows
from .tuning_arguments import LANGUAGE_MODEL_POLICIES


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


class Stage2Trainer(SupervisedTrainer, SFTTrainer):
    """TRL's trainer, with logits at supervised positions only. Make it with [`train_stage2`]."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        correct = outputs.logits.argmax(-1) == labels[labels != -100]
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append(correct.float().mean().item())
        return (loss, outputs) if return_outputs else loss

    def create_model_card(self, *args, **kwargs):
        """None: the model's card is of hub_cards."""


def train_stage2(
    config: Stage2Config,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: datasets.Dataset,
    bank: MemoryBank | None = None,
    vision_features: np.ndarray | None = None,
    eval_dataset: datasets.Dataset | None = None,
) -> Stage2Trainer:
    """
    Trains the connectors and the language model of `model`, or what else `config` says, from the last checkpoint in
    `config.output_dir` on if there is one. Arguments, result and errors are those of [`train_stage1`].

    What trains is float32 (a bfloat16 model is widened): in bfloat16 alone, updates of 2e-5 are rounded away.
    """
    set_trainable(config, model)
    with adapters(config, model):
        trainer = Stage2Trainer(
            model,
            config,
            data_collator=collator_of(config, model, processor, bank, vision_features),
            train_dataset=training_rows(model, dataset, bank, vision_features),
            eval_dataset=evaluation_rows(model, eval_dataset, bank, vision_features),
            processing_class=processor,
        )
        train(trainer, bank)
    return trainer
