"""Settings that both stages add to those of their trainer, or set otherwise than it."""

import importlib.util
import math
import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from .data import DataArguments
from .model import ModelArguments
from .refused import refuse_harmful_settings
from .settings import setting
from .tuning import TuningArguments

LEAST_STEPS = 100  # of a run whose length the user leaves to the data
ONE_OR_MORE = ("max_length", "global_batch_size", "per_device_train_batch_size", "num_proc", "eval_benchmark_images")
ONE_OR_MORE += ("gradient_accumulation_steps",)
ZERO_OR_MORE = ("eval_samples", "eval_steps", "weight_decay", "dataloader_num_workers")


@dataclass
class StageArguments(ModelArguments, DataArguments, TuningArguments):
    """Settings that the stages share. A mixin: [`~transformers.TrainingArguments`] or a subclass comes after it among
    the bases of a config. Defaults are the paper's (Table 3).
    """

    stage: int | None = setting(None, "1 or 2: the stage that a YAML file is for.")
    global_batch_size: int | None = setting(
        None,
        "Rows of an optimizer step, whatever the number of processes; gradient_accumulation_steps follows from it. "
        "Unless it is set, fewer of small data.",
    )
    lr_scheduler_type: str = setting("cosine", "Schedule of the learning rates.")
    warmup_steps: float = setting(0.03, "Warm-up: a share of all steps, or their number.")
    num_train_epochs: float = setting(1.0, "Passes over the data; unless it is set, more over small data.")
    bf16: bool | None = setting(
        None, "Compute in bfloat16; weights that train stay float32. By default where the machine is fast in it."
    )
    eval_strategy: str | None = setting(
        None, "When to evaluate: no, steps or epoch; by default every tenth of the steps, if there is an eval_dataset."
    )
    save_total_limit: int | None = setting(1, "Checkpoints to keep.")
    report_to: list[str] | None = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Experiment trackers: wandb, trackio, tensorboard, several of them, or none."},
    )
    activation_checkpointing: bool | None = setting(
        None, "Compute activations again in the backward pass: less memory, a slower step."
    )
    ddp_timeout: int = setting(86_400, "Seconds that a process waits for another, for its check of all rows say.")
    remove_unused_columns: bool = setting(False, "The collator needs all columns.")
    prediction_loss_only: bool = setting(True, "Evaluation returns losses, not logits.")

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, str) and value.startswith("~/"):
                setattr(self, name, os.path.expanduser(value))
        self.read_model_kwargs()
        self._check_run()
        if "activation_checkpointing" not in TrainingArguments.__dataclass_fields__:  # before transformers 5.23
            self.gradient_checkpointing = self.gradient_checkpointing or bool(self.activation_checkpointing)
        if not torch.accelerator.is_available():
            self.use_cpu = True
        refuse_harmful_settings(self)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bfloat16_is_fast(self.use_cpu)
        # a run goes on from its last checkpoint anyway, or begins anew
        resumes = {"true": None, "yes": None, "false": False, "no": False}
        self.resume_from_checkpoint = resumes.get(
            str(self.resume_from_checkpoint).lower(), self.resume_from_checkpoint
        )
        self.logging_nan_inf_filter = False  # it waits for the device at every batch; LossCheck does once a step
        if self.eval_dataset is None and (self.eval_split, self.eval_image_folder) != ("validation", None):
            raise ValueError(
                f"eval_split is {self.eval_split!r} and eval_image_folder {self.eval_image_folder!r}, but there is no "
                "eval_dataset: set it, to the same as dataset if they are of a split of that."
            )
        if self.eval_strategy is None:
            self.eval_strategy = "no" if self.eval_dataset is None else "steps"
            self.eval_steps = self.eval_steps or (0.1 if self.eval_strategy == "steps" else None)
        if self.load_best_model_at_end and self.eval_steps and self.save_steps == type(self).save_steps:
            if min(self.eval_steps, self.save_steps) < 1 or self.save_steps % self.eval_steps:
                self.save_steps = self.eval_steps  # or transformers would refuse the package's own
        super().__post_init__()
        # in accelerate's other mode one process reads a stream for all, and cuts what is not as long as the rows
        self.accelerator_config.dispatch_batches = False
        self.check_tuning()
        self._check_machine()
        if self.tune_vision_tower != "frozen":
            self._check_trained_vision_tower()
        if self.memory_dropout is None:
            self.memory_dropout = 0.0 if self.streaming else 0.3
        if self.streaming:
            self._check_streaming()
        if self.global_batch_size is not None:
            self._accumulate_to_global_batch()

    def _check_streaming(self):
        if self.cache_features:
            raise ValueError(
                "Found streaming and cache_features, expected one of the two: features are kept of rows that are read "
                "in the same order again and again. Set streaming: false, or cache_features: false."
            )
        if self.memory_dropout or self.baseline in ("static_rag", "text_rag"):
            raise ValueError(
                f"memory_dropout is {self.memory_dropout} and baseline {self.baseline!r}: they need neighbours "
                "looked up beforehand, but those of streamed rows are looked up in every step. Set streaming: false."
            )

    def _check_run(self):
        """Raise `ValueError` for values that would fail later, with less to go by."""
        for name, minimum in (dict.fromkeys(ONE_OR_MORE, 1) | dict.fromkeys(ZERO_OR_MORE, 0)).items():
            value = vars(self)[name]
            if value is not None and value < minimum:
                raise ValueError(f"{name} is {value}, expected {minimum} or more.")
        if os.path.isfile(self.output_dir or ""):
            raise ValueError(f"output_dir is {self.output_dir}, which is a file, expected a folder or a new name.")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(
                f"num_train_epochs is {self.num_train_epochs:g} and max_steps {self.max_steps}: expected passes over "
                "the data, more than 0, or a number of steps."
            )
        if self.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                f"deepspeed is {self.deepspeed!r}, but DeepSpeed is not installed: pip install deepspeed, or leave it "
                "out and divide the model with FSDP2 (accelerate launch --config_file fsdp2.yaml)."
            )

    def _check_machine(self):
        """Raise `ValueError` for several GPUs, and for trackers that are not installed."""
        if self.n_gpu > 1:
            raise ValueError(
                f"This process sees {self.n_gpu} GPUs, expected one: start one for each with accelerate launch "
                "--config_file ddp.yaml (see docs/training.md), or choose one with CUDA_VISIBLE_DEVICES=0."
            )
        for name in set(self.report_to) - set(get_available_reporting_integrations()):
            if name in INTEGRATION_TO_CALLBACK:
                raise ValueError(f"report_to is {name}, which is not installed: pip install {name}.")
            raise ValueError(f"report_to is {name}, expected one of {', '.join(INTEGRATION_TO_CALLBACK)}, or none.")

    def _check_trained_vision_tower(self):
        if self.streaming and self.memory_bank is not None:
            raise ValueError(
                f"tune_vision_tower is {self.tune_vision_tower!r} and streaming true: neighbours of streamed rows are "
                "looked up in every step, with keys of a vision tower that is no longer that of the bank. Set "
                "streaming: false, and they are looked up beforehand."
            )
        if self.cache_features:
            raise ValueError(
                f"tune_vision_tower is {self.tune_vision_tower!r} and cache_features true: features computed once are "
                "those of a tower that stays as it is. Set cache_features: false, or tune_vision_tower: frozen."
            )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the steps of warm-up, fewer than there are; the first of them has a learning rate of 0."""
        if 1 <= num_training_steps <= self.warmup_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps:g}, but the run has {num_training_steps} steps: expected fewer, "
                "or a share of all steps, 0.03 say."
            )
        return min(super().get_warmup_steps(num_training_steps), max(0, num_training_steps - 1))

    def fit_to_data(self, num_rows: int, given: set[str]):
        """Take smaller batches and more epochs of small data, so that a run has about `LEAST_STEPS` steps. The
        settings that are `given`, by the user and not by the package, stay as they are.
        """
        batch = self.train_batch_size * self.world_size
        if not {"global_batch_size", "gradient_accumulation_steps"} & given and self.deepspeed is None:
            while 0.5 * LEAST_STEPS * batch * self.gradient_accumulation_steps > num_rows:
                if self.gradient_accumulation_steps > 1:
                    self.gradient_accumulation_steps //= 2
                elif self.per_device_train_batch_size > 1 and "per_device_train_batch_size" not in given:
                    self.per_device_train_batch_size //= 2
                    batch = self.train_batch_size * self.world_size
                else:
                    break
            self.global_batch_size = batch * self.gradient_accumulation_steps
        if not {"num_train_epochs", "max_steps"} & given:
            steps = math.ceil(num_rows / (batch * self.gradient_accumulation_steps))
            self.num_train_epochs = max(self.num_train_epochs, math.ceil(LEAST_STEPS / steps))

    def _accumulate_to_global_batch(self):
        if self.deepspeed is not None:
            raise ValueError(
                "Found deepspeed and global_batch_size, expected one of the two: DeepSpeed's file is read before the "
                "accumulated batches are known. Use accelerate launch --config_file zero2.yaml, or set "
                "gradient_accumulation_steps."
            )
        rows = self.train_batch_size * self.world_size
        steps, rest = divmod(self.global_batch_size, rows)
        if rest or steps == 0:
            raise ValueError(
                f"global_batch_size is {self.global_batch_size}, expected a multiple of {rows}: {self.world_size} "
                f"processes x {self.train_batch_size} rows each. Change per_device_train_batch_size or the number of "
                "processes."
            )
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is {rows} rows x {steps} accumulated batches, but "
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}: for that, set global_batch_size "
                f"to {rows * self.gradient_accumulation_steps}."
            )
        self.gradient_accumulation_steps = steps


def bfloat16_is_fast(use_cpu: bool) -> bool:
    """Return True if the device that trains computes in bfloat16 itself."""
    if not use_cpu and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return use_cpu and (capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False))
