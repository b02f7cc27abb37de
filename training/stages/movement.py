"""A run that learns nothing ends with an error: none of its trained parameters is another than before."""

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback


class NothingLearnt(ValueError):
    """Weights that are after training what they were before it."""


class MovementCheck(TrainerCallback):
    """Compares sums of the trained parameters before the first step and after the last, before a checkpoint is written
    of it; and ends a run whose epochs have too few rows for a single step.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = self._sums()
        self.rate, self.epochs_without_step = 0.0, 0

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epochs_without_step += 1
        if self.epochs_without_step > 1:  # one may be all that was left of the epoch that a run goes on in
            rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            raise NothingLearnt(
                f"The data has fewer rows than the {rows} of a step, and streamed ones are not counted beforehand: no "
                "step was taken in an epoch. Set global_batch_size (and per_device_train_batch_size) lower, or "
                "streaming: false."
            )

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rate = max(self.rate, *(group["lr"] for group in optimizer.param_groups))

    def on_step_end(self, args, state, control, **kwargs):
        self.epochs_without_step = -1  # the epoch of this step ends, too
        if state.global_step < state.max_steps or self.before is None or self._sums() != self.before:
            return
        if self.rate == 0:
            reason = (
                f"the learning rate was 0 at each of them (learning_rate {args.learning_rate:g}, warmup_steps "
                f"{args.warmup_steps:g}). Set learning_rate higher, or warmup_steps to fewer than the run's steps"
            )
        else:
            reason = (
                "every gradient was 0, not finite, or too small to change a weight. Have the rows images and answers? "
                f"A learning rate higher than {self.rate:g} makes larger changes; fp16: false, finite gradients"
            )
        raise NothingLearnt(
            f"Nothing was learnt in {state.max_steps} steps: the trained parameters are what they were, for {reason}."
        )

    def _sums(self) -> list[float] | None:
        """Return None where the model is divided: each process has parts of the parameters."""
        return None if self.trainer.is_divided else sums_of_trained(self.trainer.model)


def sums_of_trained(model: PreTrainedModel) -> list[float]:
    """Return a sum for each parameter that trains, in float64: any update of it changes that."""
    with torch.no_grad():
        sums = [value.sum(dtype=torch.float64) for value in model.parameters() if value.requires_grad]
        return torch.stack([value.to(sums[0].device) for value in sums]).tolist()
