"""The trainers of both stages."""

import os
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerState
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from trl import SFTTrainer

from ...modeling_tinyalign.memory_bank import MemoryBank
from ..arguments.alignment import Stage1Config
from ..arguments.instruction import Stage2Config
from ..arguments.run_arguments import RunArguments
from ..arguments.tuning import part_of
from ..data.collator import TrainingCollator
from ..data.memory_dropout import MemoryDropout, TellEpoch
from ..data.training_rows import content_hash, evaluation_rows, training_rows
from ..hub.run_facts import Clock, Curves
from .checkpoints import last_checkpoint, load_trained, save_trained
from .lora import adapters
from .loss_check import LossCheck
from .metrics import Meter
from .precision import bfloat16_language_model
from .samples import SampleAnswers
from .trainable_parts import parts_of, set_trainable, table

# What decides the trajectory: with another value, checkpoints are of another run.
TRAJECTORY = (
    "learning_rate vision_tower_lr connector_lr memory_connector_lr language_model_lr lr_scheduler_type warmup_steps "
    "tune_vision_tower tune_connector tune_memory_connector tune_language_model lora_r lora_alpha lora_dropout "
    "lora_target_modules weight_decay optim optim_args adam_beta1 adam_beta2 adam_epsilon lr_scheduler_kwargs "
    "max_grad_norm neftune_noise_alpha num_train_epochs max_steps seed data_seed train_sampling_strategy "
    "dataloader_drop_last bf16 fp16 memory_dropout max_length truncation save_only_model model vision_model "
    "language_model"
).split()


MODEL_TRAJECTORY = (
    "memory_top_k memory_fusion num_latents latent_dim latents_per_word memory_lexicon_size image_seq_length "
    "key_space memory_scores retrieval_threshold connector_size prompt_captions"
).split()


class SupervisedTrainer(Trainer):
    """Computes logits where there is a label and nowhere else; a learning rate for each part; no step that is NaN."""

    meter: Meter | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_check = LossCheck(self)
        self.evaluated = torch.zeros(2)  # the loss summed over supervised tokens, and their number
        self.add_callback(self.loss_check)
        if self.args.uses_lora and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"tune_language_model is {self.args.tune_language_model}, which FSDP and DeepSpeed are not supported "
                "with: train with ddp.yaml, adapters take little memory."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over all supervised tokens of the batch, also when it is accumulated in parts."""
        rows = inputs.get("rows") or [f"row {index} of the batch" for index in range(len(inputs["labels"]))]
        batch = {name: value for name, value in inputs.items() if name not in ("rows", "_prediction_loss_only")}
        if self.args.tune_language_model == "frozen" and self.model.training:
            without_dropout(self.model.base_model.language_model)  # Trainer has just put it in training mode
        inputs = {**batch, "supervised_logits_only": True, "use_cache": False}
        if self.model.training and self.meter is not None:
            self.meter.count(inputs)
        if self.model.training and not {"pixel_values", "vision_features"} & inputs.keys():
            inputs = with_blank_image(self.model, self.data_collator.processor, inputs)
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        if self.model.training:
            self.loss_check.add(loss, batch, rows)
        else:
            tokens = (inputs["labels"][:, 1:] != -100).sum()
            self.evaluated += torch.stack([loss.detach().float() * tokens, tokens.float()])
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """The loss is the mean over all supervised tokens. That of the batches' means would depend on the batches."""
        self.evaluated = torch.zeros(2, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, tokens = self.accelerator.reduce(self.evaluated, "sum").tolist()
        return output._replace(metrics={**output.metrics, f"{metric_key_prefix}_loss": loss / tokens})

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if self.meter is not None and "loss" in logs:
            logs = {**logs, **self.meter.read(logs)}
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Neighbours are taken away in training only."""
        collator, self.data_collator = self.data_collator, self.data_collator.for_evaluation()
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups = {}
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    continue
                part = part_of(name)
                decay = self.args.weight_decay if name in decayed else 0.0
                group = groups.setdefault(
                    (part, decay), {"params": [], "lr": self.args.rate(part), "weight_decay": decay}
                )
                group["params"].append(parameter)
            optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_cls(list(groups.values()), **kwargs)
        return self.optimizer

    def _init_training_state(self, max_steps, *args):
        """Of streamed rows, which have no length, `Trainer` takes all steps for those of the first epoch."""
        epochs, batches = super()._init_training_state(max_steps, *args)
        if isinstance(self.train_dataset, datasets.IterableDataset) and self.state.epoch:
            epochs = int(self.state.epoch)
            batches = round((self.state.epoch - epochs) * max_steps * self.args.gradient_accumulation_steps)
        return epochs, batches

    def _save_checkpoint(self, model, trial):
        """The last file of a checkpoint says that it is complete: that of one that is written again goes first."""
        if self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            Path(self.args.output_dir, folder, TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # each process has a file of its own; the last file comes after all

    def _save(self, output_dir=None, state_dict=None):
        """What trains, or all of the model if that is nearly the same."""
        if self.args.tune_language_model == "full":
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_trained(self.model, output_dir or self.args.output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.args.tune_language_model == "full":
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.model, resume_from_checkpoint)

    def _load_best_model(self):
        if self.args.tune_language_model == "full":
            super()._load_best_model()
        else:
            load_trained(self.model, self.state.best_model_checkpoint)


def without_dropout(language_model: PreTrainedModel):
    """Evaluation mode for all but the layers themselves, which checkpoint their activations in training mode only."""
    language_model.eval()
    for module in language_model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = module.gradient_checkpointing


def with_blank_image(model: PreTrainedModel, processor: ProcessorMixin, inputs: dict) -> dict:
    """
    Adds a row with a blank image and no label to a batch of text. The connectors get a gradient of zero from it: none
    at all would stop stage 1, and processes that wait for each other's.
    """
    length = max(inputs["input_ids"].shape[1], processor.num_image_tokens)
    inputs = dict(inputs)
    for name, padding in (
        ("input_ids", processor.tokenizer.pad_token_id or 0),
        ("attention_mask", 0),
        ("labels", -100),
    ):
        inputs[name] = F.pad(inputs[name], (0, length - inputs[name].shape[1], 0, 1), value=padding)
    inputs["input_ids"][-1, : processor.num_image_tokens] = processor.image_token_id
    inputs["attention_mask"][-1, : processor.num_image_tokens] = 1
    blank = processor.image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    inputs["pixel_values"] = blank["pixel_values"].to(inputs["input_ids"].device)
    return {**inputs, "memory": "off"} if model.config.memory_top_k > 0 else inputs


def collator_of(
    config: RunArguments,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    bank: MemoryBank | None,
    vision_features: np.ndarray | None,
) -> TrainingCollator:
    """What makes the batches of a run. Raises `ValueError` if neighbours that are not there should be dropped."""
    neighbours = model.config.num_neighbours
    if config.memory_dropout and not neighbours:
        raise ValueError(
            f"memory_dropout is {config.memory_dropout}, but the model reads no neighbours (memory_top_k: 0, or a "
            "baseline without memory): leave it out."
        )
    return TrainingCollator(
        processor,
        vision_features,
        bank,
        config.max_length,
        config.truncation,
        MemoryDropout(config.memory_dropout, neighbours, config.seed) if neighbours else None,
        model.config.prompt_captions,
        name_rows=True,
    )


def train(trainer: Trainer, bank: MemoryBank | None):
    """
    Trains, from the last checkpoint in `output_dir` on if there is one; leaves the model in evaluation mode and free
    of what accelerate and TRL put around its forward. A run that is finished is loaded and not trained. Raises
    `ValueError` when the checkpoints are of another run, or no step could be taken.
    """
    model, args = trainer.model, trainer.args
    settings = {name: vars(args)[name] for name in TRAJECTORY}
    settings["global_batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if isinstance(trainer.train_dataset, datasets.Dataset):
        settings["rows"] = len(trainer.train_dataset)
        settings["rows_hash"] = content_hash(trainer.train_dataset)
        if args.dataloader_drop_last and settings["rows"] < args.train_batch_size * args.world_size:
            raise ValueError(
                f"There are {settings['rows']} rows, but a batch of all processes has "
                f"{args.train_batch_size * args.world_size}, and dataloader_drop_last drops what is less: no step "
                "could be taken. Leave it out, or set a smaller per_device_train_batch_size."
            )
    settings["memory_bank"] = (
        None if bank is None else {"keys": bank.config.sha256.keys, "values": bank.config.sha256.values}
    )
    settings["image_aspect_ratio"] = trainer.data_collator.processor.image_aspect_ratio
    for name in MODEL_TRAJECTORY:
        settings[name] = vars(model.config)[name]
    write = trainer.is_world_process_zero()
    checkpoint = last_checkpoint(args.output_dir, settings, args.resume_from_checkpoint, write)
    trainer.add_callback(Clock())
    trainer.add_callback(Curves())
    if trainer.eval_dataset is not None and args.eval_samples:
        trainer.add_callback(SampleAnswers(trainer))
    trainer.meter = Meter(trainer, bank)
    trainer.add_callback(trainer.meter)
    if trainer.data_collator.dropout is not None:
        trainer.add_callback(TellEpoch(trainer.data_collator.dropout))
    present = {type(module).__name__ for module in model.modules()}  # FSDP does not start if it misses one
    model._no_split_modules = [name for name in model._no_split_modules or () if name in present]
    divided = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # these have a precision of their own
    try:
        with bfloat16_language_model(model, args.bf16 and not divided, frozen_only=True):
            trainer.parts = parts_of(args, model)
            if trainer.is_world_process_zero():
                print(table(trainer.parts), flush=True)
            if checkpoint is None or not _load_finished(trainer, checkpoint):
                if checkpoint is not None and args.save_only_model:
                    raise ValueError(
                        f"{checkpoint} was saved with save_only_model: a run cannot go on without the optimizer's "
                        "state. Use another output_dir, or delete this one to train anew."
                    )
                trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.meter.close()
        for name in ("forward", "_original_forward"):
            vars(model).pop(name, None)
        model.eval()


def _load_finished(trainer: Trainer, checkpoint: str) -> bool:
    """
    Loads weights and state if the checkpoint is of the last step, and says whether it is. `Trainer` itself would do
    one more step when `max_steps` ends within an epoch.
    """
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    if not 0 < state.max_steps <= state.global_step:
        return False
    trainer.state = state
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        trainer._load_best_model()
    else:
        trainer._load_from_checkpoint(checkpoint)
    return True


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
