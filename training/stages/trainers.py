"""The trainers of both stages."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import datasets
import numpy as np
import torch
from huggingface_hub import CommitInfo
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin, Trainer, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, PredictionOutput, TrainOutput, rotate_checkpoints
from trl import SFTTrainer

from ...modeling_tinyalign.memory_bank import MemoryBank
from ...modeling_tinyalign.modeling_tinyalign import TinyAlignForConditionalGeneration
from ..arguments.alignment import AlignmentConfig
from ..arguments.instruction import InstructionConfig
from ..arguments.stage import StageArguments
from ..data.collator import TrainingCollator
from ..data.memory_dropout import MemoryDropout
from ..data.training_rows import evaluation_rows, training_rows
from ..hub.run_facts import Curves, RunClock
from ..models import context_length
from .arguments import check_arguments
from .batches import align_tokens, check_batches, set_modes, with_blank_image, without_repeated_rows
from .checkpoints import begin_anew, last_checkpoint, load_trained, read_state, save_trained, trajectory_settings
from .lora import adapters
from .loss_check import EvaluationLoss, LossCheck
from .metrics import Meter
from .movement import MovementCheck
from .precision import bfloat16_language_model, ready_to_answer
from .progress import follow
from .samples import SampleAnswers
from .trainable_parts import TrainedPart, parameter_groups, parts_of, set_trainable, table_of_parts


class SupervisedTrainer(Trainer):
    """Behaviour that the trainers of both stages share: neighbours in batches, logits where there is a label and
    nowhere else, a learning rate for each part, no step on a loss that is NaN, and runs that go on by themselves.

    Args:
        model: Its parts are frozen or made trainable at once, as `args` says; adapters are there while it trains only.
        args: The settings.
        train_dataset: Rows as [`TrainingCollator`] wants them: `messages`; `image`, `images` or `feature_index`; and,
            for a model with memory, the `memory_ids` that [`find_neighbours`] found.
        eval_dataset: The same; with `vision_features` it needs a `feature_index`, or images.
        processing_class: The model's processor.
        memory_bank: The bank that `memory_ids` are of, or its folder: it is attached. None for a model without memory.
        vision_features: The array that [`cache_vision_features`] returned, for the rows of `train_dataset` in order,
            or at the rows' `feature_index`.
        kwargs: All else that the trainer takes: `callbacks`, `optimizers`, ...

    Raises:
        ValueError: A column or the bank is missing, or nothing would train.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: StageArguments,
        *,
        train_dataset: datasets.Dataset | datasets.IterableDataset | None = None,
        eval_dataset: datasets.Dataset | None = None,
        processing_class: ProcessorMixin,
        memory_bank: MemoryBank | None = None,
        vision_features: np.ndarray | None = None,
        **kwargs,
    ):
        check_arguments(model, args, kwargs)
        args.prediction_loss_only = args.prediction_loss_only and kwargs.get("compute_metrics") is None
        set_trainable(args, model)
        if train_dataset is not None:
            train_dataset = training_rows(model, train_dataset, memory_bank, vision_features)
        if memory_bank is not None:
            frozen = args.tune_vision_tower == "frozen"  # one that trains may already be another than the bank's
            model.attach_memory_bank(memory_bank, tokenizer=processing_class.tokenizer, check_probes=frozen)
            memory_bank = model.memory_bank  # opened, if it was a folder
        self.memory_bank, self.vision_features = memory_bank, vision_features
        neighbours = model.config.num_neighbours
        collator = TrainingCollator(
            processing_class,
            vision_features,
            memory_bank,
            context_length(model) if args.max_length is None else args.max_length,
            args.truncation,
            MemoryDropout(args.memory_dropout, neighbours, args.seed) if neighbours else None,
            model.config.prompt_captions,
            name_rows=True,
        )
        super().__init__(
            model,
            args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=evaluation_rows(model, eval_dataset, memory_bank, vision_features),
            processing_class=processing_class,
            **kwargs,
        )
        self.is_divided = self.is_fsdp_enabled or self.is_deepspeed_enabled  # the model, among processes
        if args.uses_lora and self.is_divided:
            raise ValueError(
                f"tune_language_model is {args.tune_language_model}, which FSDP and DeepSpeed are not supported "
                "with: train with ddp.yaml, adapters take little memory."
            )
        present = {type(module).__name__ for module in model.modules()}  # FSDP does not start if it misses one
        model._no_split_modules = [name for name in model._no_split_modules or () if name in present]
        self.parts: list[TrainedPart] = parts_of(args, model)
        self.evaluation_loss, self.loss_check = EvaluationLoss(self), LossCheck(self)
        self.meter = Meter(self, memory_bank)
        self._add_callbacks()

    def _add_callbacks(self):
        follow(self)
        for callback in (self.loss_check, MovementCheck(self), RunClock(), Curves()):
            self.add_callback(callback)
        if self.eval_dataset is not None and self.args.eval_samples:
            self.add_callback(SampleAnswers(self))
        self.add_callback(self.meter)
        if self.data_collator.dropout is not None:
            self.add_callback(self.data_collator.dropout)

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None) -> TrainOutput:
        """Train, from the last checkpoint in `output_dir` on if there is one; a run that is finished is loaded. The
        model is in evaluation mode afterwards, its adapters merged; frozen weights are the same bit for bit.

        Args:
            resume_from_checkpoint: Another checkpoint of this run to go on from, or `False` to begin anew.

        Raises:
            ValueError: `output_dir` has checkpoints of another run, a loss is NaN, or no step could be taken.
        """
        set_seed(self.args.seed)  # answers before the first step change nothing
        align_tokens(self.model, self.processing_class.tokenizer)
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        use_bfloat16 = self.args.bf16 and not self.is_divided  # FSDP and DeepSpeed have a precision of their own
        with (
            adapters(self.args, self.model),
            ready_to_answer(self.model),
            bfloat16_language_model(self.model, use_bfloat16, frozen_only=True),
        ):
            self.parts = parts_of(self.args, self.model)
            if self.is_world_process_zero():
                print(table_of_parts(self.parts), flush=True)
            if checkpoint is not None and self._load_finished(checkpoint):
                if self.is_world_process_zero():
                    print(f"{self.args.output_dir} is finished: nothing to train. Another output_dir trains anew.")
                losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
                return TrainOutput(self.state.global_step, fmean(losses) if losses else math.nan, {})
            if checkpoint is not None and self.args.save_only_model:
                raise ValueError(
                    f"{checkpoint} was saved with save_only_model: a run cannot go on without the optimizer's "
                    "state. Use another output_dir, or delete this one to train anew."
                )
            if checkpoint is not None and self.is_world_process_zero():
                print(f"Going on from {checkpoint}.", flush=True)
            return super().train(checkpoint, trial, ignore_keys_for_eval)

    def _checkpoint_to_resume(self, chosen: str | bool | None) -> str | None:
        args, rows = self.args, self.train_dataset
        if isinstance(rows, datasets.Dataset):
            check_batches(args, len(rows))
        settings = trajectory_settings(args, self.model, self.processing_class, rows, self.memory_bank)
        path = args.resume_from_checkpoint if chosen in (None, True) else chosen
        checkpoint = last_checkpoint(args.output_dir, settings, path or None, write=self.is_world_process_zero())
        return begin_anew(args) if path is False else checkpoint

    def _load_finished(self, checkpoint: str) -> bool:
        """Load weights and state if the checkpoint is of the last step, and return True if it is. `Trainer` itself
        would do one more step when `max_steps` ends within an epoch.
        """
        state = read_state(checkpoint)
        if not 0 < state.max_steps <= state.global_step:
            for name in ("logging_steps", "eval_steps", "save_steps"):  # `Trainer` warns of shares: it kept numbers
                share = vars(self.args)[name]
                if share is not None and share < 1:
                    setattr(self.args, name, math.ceil(state.max_steps * share))
            return False
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        else:
            self._load_from_checkpoint(checkpoint)
        return True

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return the loss, a mean over all supervised tokens, on `eval_dataset`, by default that of the trainer."""
        if isinstance(eval_dataset, datasets.Dataset):
            eval_dataset = evaluation_rows(self.model, eval_dataset, self.memory_bank, self.vision_features)
        with self._evaluating():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """Return what `evaluate` finds; with `compute_metrics`, also logits and labels."""
        rows = evaluation_rows(self.model, test_dataset, self.memory_bank, self.vision_features)
        with self._evaluating():
            return super().predict(rows, ignore_keys, metric_key_prefix)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Outside of training, leave the model as it was."""
        if self.is_in_train or self.is_divided:
            yield
            return
        self.accelerator.free_memory()  # accelerate puts its mixed precision around the model again, which
        with ready_to_answer(self.model):  # this takes away
            yield
        self.accelerator.free_memory()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Write model and processor to `output_dir`, for `from_pretrained`. All processes call it: each may hold a
        part of the weights. (`Trainer` calls it for a checkpoint, which has what trains and nothing else.)
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        if "peft_config" in vars(self.model.base_model.language_model):
            raise ValueError("The adapters are merged at the end of train(), expected save_model() after it.")
        output_dir = self.args.output_dir if output_dir is None else output_dir
        model, state_dict = self.model, None
        if self.is_divided:
            state_dict = dict(self.accelerator.get_state_dict(self.model_wrapped))
            if model.config.tie_word_embeddings:  # gathered, it is a second copy of the embeddings
                state_dict.pop("lm_head.weight", None)
            generation_config = model.generation_config
            with torch.device("meta"):  # FSDP changes the class of the model, and with it the code that is saved
                model = TinyAlignForConditionalGeneration(model.config)
            model.generation_config = generation_config
        if self.is_world_process_zero():
            alone = self.args.save_only == "connectors"
            model.save_pretrained(output_dir, connectors_only=alone, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir)

    def create_model_card(self, *args, **kwargs):
        """Write no card: that of the model is written by `tinyalign train`."""

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, **kwargs
    ) -> CommitInfo | None:
        """Push model and processor, whole, to `args.hub_model_id` or a repository of the output folder's name."""
        if self.is_divided:
            raise ValueError("The model is divided among processes: save_model(), then tinyalign push FOLDER REPO.")
        if not self.is_world_process_zero():
            return None
        name = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
        where = {"token": token or self.args.hub_token, "revision": revision, "private": self.args.hub_private_repo}
        self.processing_class.push_to_hub(name, commit_message=commit_message, **where)
        return self.model.push_to_hub(name, commit_message=commit_message, **where)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over all supervised tokens of the batch, also when it is accumulated in parts."""
        rows = inputs.get("rows") or [f"row {index} of the batch" for index in range(len(inputs["labels"]))]
        batch = {name: value for name, value in inputs.items() if name not in ("rows", "_prediction_loss_only")}
        is_training = self.model.training
        supervised = is_training or self.compute_metrics is None
        inputs = {**batch, "supervised_logits_only": supervised, "use_cache": False}
        if is_training:
            set_modes(self.model, self.args)  # Trainer has just put all of it in training mode
            if not {"pixel_values", "vision_features"} & inputs.keys():
                inputs = with_blank_image(self.model, self.data_collator.processor, inputs)
        items = num_items_in_batch if is_training else None  # in evaluation, the mean of the batch itself
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, items)
        if is_training:
            has_images = not {"pixel_values", "vision_features"}.isdisjoint(batch)
            self.meter.count(batch, outputs.image_outputs if has_images else None)
            self.loss_check.add(loss, batch, rows)
        else:
            self.evaluation_loss.add(loss, batch["labels"])
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self.evaluation_loss.begin()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss = self.evaluation_loss.mean(metric_key_prefix)
        return output._replace(metrics={**output.metrics, f"{metric_key_prefix}_loss": loss})

    def prediction_step(self, model, inputs, *args, **kwargs):
        inputs = without_repeated_rows(inputs, self.accelerator.gradient_state, self.args)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs and self.is_in_train:
            logs = {**logs, **self.meter.read(logs)}
        super().log(logs, start_time)

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs) -> DataLoader:
        """Neighbours, and rows that fill no batch, are taken away in training only."""
        collator, kept = self.data_collator, (self.args.dataloader_drop_last, self.args.dataloader_persistent_workers)
        if not is_training:  # `Trainer` would keep the loader of workers that persist for other rows, too
            self.data_collator = collator.for_evaluation()
            self.args.dataloader_drop_last = self.args.dataloader_persistent_workers = False
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator
            self.args.dataloader_drop_last, self.args.dataloader_persistent_workers = kept

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            try:
                optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
                kwargs["params"] = parameter_groups(self.args, model, decayed)
                self.optimizer_cls_and_kwargs = optimizer_cls, kwargs
                super().create_optimizer(model)
            except (TypeError, ValueError) as error:
                raise ValueError(f"optim {self.args.optim}, optim_args {self.args.optim_args!r}: {error}.") from error
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except (TypeError, ValueError) as error:
            kind, kwargs = self.args.lr_scheduler_type, self.args.lr_scheduler_kwargs
            raise ValueError(f"lr_scheduler_type {kind}, lr_scheduler_kwargs {kwargs!r}: {error}.") from error

    def _init_training_state(self, max_steps, *args):
        """Count epochs of streamed rows: these have no length, and `Trainer` takes all steps for one epoch."""
        epochs, batches = super()._init_training_state(max_steps, *args)
        if isinstance(self.train_dataset, datasets.IterableDataset) and self.state.epoch:
            epochs = int(self.state.epoch)
            batches = round((self.state.epoch - epochs) * max_steps * self.args.gradient_accumulation_steps)
        return epochs, batches

    def _save_checkpoint(self, model, trial):
        """The last file of a checkpoint says that it is complete: that of one that is written again goes first."""
        args, limit = self.args, self.args.save_total_limit
        if args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            Path(args.output_dir, folder, TRAINER_STATE_NAME).unlink(missing_ok=True)
        args.save_total_limit = None  # `Trainer` would go by the files' times, and warn of quick steps
        super()._save_checkpoint(model, trial)
        args.save_total_limit = limit
        if args.should_save:
            rotate_checkpoints(args.output_dir, limit, self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # each process has a file of its own; the last file comes after all

    def _save(self, output_dir=None, state_dict=None):
        """Save what trains, or all of the model if that is nearly the same."""
        if self.args.tune_language_model == "full":
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_trained(self.model, folder, state_dict, loadable=not self.is_divided)
            self.processing_class.save_pretrained(folder)

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


class AlignmentTrainer(SupervisedTrainer):
    """Stage 1 on transformers' trainer: the connectors train, or what else `args` says."""

    args: AlignmentConfig


class InstructionTrainer(SupervisedTrainer, SFTTrainer):
    """Stage 2 on TRL's trainer: the connectors and the language model train, or what else `args` says.

    What trains is float32 (a bfloat16 model is widened): in bfloat16 alone, updates of 2e-5 are rounded away.
    """

    args: InstructionConfig

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        logits = outputs.logits if outputs.logits.ndim == 2 else outputs.logits[:, :-1][labels != -100]
        correct = logits.argmax(-1) == labels[labels != -100]
        mode = "train" if self.model.training else "eval"
        if len(correct):
            self._metrics[mode]["mean_token_accuracy"].append(correct.float().mean().item())
        return (loss, outputs) if return_outputs else loss


TRAINERS = {1: AlignmentTrainer, 2: InstructionTrainer}
